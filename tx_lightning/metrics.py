"""Corpus metrics that are the same number on one process and on many.

Each is a sum of statistics over segments or tokens. Processes add their sums; nothing is averaged
over batches or ranks, so uneven shards change nothing.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import torch
from sacrebleu.metrics.base import Metric as Scorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor
from torchmetrics import Metric

MOST_WORDS = 10  # of an n-gram
MOST_CLASSES = 20_000


class SumMetric(Metric):
    """A metric whose state is sums, with the same type whatever the precision of training.

    The state follows the module to its device, but keeps its type when the module is converted to
    another (sums of a whole epoch in bfloat16 would be wrong). Apple's devices have no float64:
    there the sums stay on the host, and adding to them waits for the device.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()
    ) -> "SumMetric":
        # An integer is moved like everything else, but never converted.
        device = fn(torch.zeros(0, dtype=torch.int64, device=self.device)).device
        super()._apply(fn, exclude_state=list(self.metric_state))
        host = device.type == "mps"
        for name, value in self.metric_state.items():
            assert isinstance(value, Tensor)
            setattr(self, name, value.to("cpu" if host else device))
        return self

    def _add(self, name: str, value: Tensor) -> None:
        """Add to a sum, on its device and in its type."""
        total = self.metric_state[name]
        assert isinstance(total, Tensor)
        total += value.detach().to(total.device).to(total.dtype)


class _CorpusScore(SumMetric):
    """A sacreBLEU score from summed integer statistics, one reference per hypothesis."""

    higher_is_better = True
    statistics: Tensor

    def __init__(self, scorer: Scorer, n_statistics: int) -> None:
        super().__init__()
        scorer.num_refs = 1  # makes the signature known before the first update
        self._scorer = scorer
        self.add_state(
            "statistics", torch.zeros(n_statistics, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add segments.

        Args:
            hypotheses: Detokenized output, one string per segment; may be empty.
            references: The untouched reference of each.

        Raises:
            ValueError: When there are more of the one than of the other.
        """
        if isinstance(hypotheses, str) or isinstance(references, str):
            raise ValueError("hypotheses and references are lists of texts, not one text each")
        if len(hypotheses) != len(references):
            raise ValueError(
                f"{len(hypotheses)} hypotheses were given for {len(references)} references: "
                "every hypothesis needs exactly one"
            )
        if hypotheses:
            segments = self._scorer._extract_corpus_statistics(hypotheses, [references])
            self._add("statistics", torch.tensor(segments, device="cpu").sum(0))

    def compute(self) -> Tensor:
        """Return the corpus score, 0 to 100, a float64 scalar; 0 for an empty corpus."""
        score = self._scorer._compute_score_from_stats(self.statistics.tolist()).score
        return torch.tensor(score, dtype=torch.float64)

    @property
    def signature(self) -> str:
        """What has to stand beside the number for it to mean something."""
        return str(self._scorer.get_signature())


class CorpusBLEU(_CorpusScore):
    """sacreBLEU's corpus BLEU (Papineni et al. 2002; Post 2018), bit for bit.

    Args:
        lowercase: Score lower-cased text.
        tokenize: sacreBLEU's tokenization: 13a (default), intl, char, zh, or none for text that is
            tokenized already.

    Raises:
        ValueError: When sacreBLEU knows no such tokenization.
    """

    def __init__(self, *, lowercase: bool = False, tokenize: str = "13a") -> None:
        if tokenize not in BLEU.TOKENIZERS:
            known = sorted(BLEU.TOKENIZERS)
            nearest = get_close_matches(tokenize, known, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(
                f"tokenize={tokenize!r} is no tokenization of sacreBLEU: "
                f"{hint}There are {', '.join(known)}"
            )
        super().__init__(BLEU(lowercase=lowercase, tokenize=tokenize, force=True), n_statistics=10)
        self._of_a_sentence = BLEU(
            lowercase=lowercase, tokenize=tokenize, force=True, effective_order=True
        )

    def sentence(self, hypothesis: str, reference: str) -> float:
        """Return sacreBLEU's BLEU of one sentence, 0 to 100, tokenized and cased as the corpus.

        N-grams longer than the sentence do not count (`effective_order`, Post 2018).
        """
        return float(self._of_a_sentence.sentence_score(hypothesis, [reference]).score)


class CorpusChrF(_CorpusScore):
    """sacreBLEU's corpus chrF (Popović 2015), bit for bit; chrF++ with `word_order=2`.

    Args:
        word_order: Longest word n-grams that are counted besides characters; 0 counts none.
        lowercase: Score lower-cased text.
    """

    def __init__(self, *, word_order: int = 0, lowercase: bool = False) -> None:
        if type(word_order) is not int or not 0 <= word_order <= MOST_WORDS:
            raise ValueError(f"word_order must be from 0 to {MOST_WORDS}; it is {word_order}")
        scorer = CHRF(word_order=word_order, lowercase=lowercase)
        super().__init__(scorer, n_statistics=3 * scorer.order)


class TokenMean(SumMetric):
    """A mean over tokens: the sum of all totals by the sum of all counts."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor | float, count: Tensor | int) -> None:
        """Add a batch, without waiting for the device.

        Args:
            total: The sum of a quantity over tokens, a scalar.
            count: The number of those tokens.
        """
        if isinstance(total, Tensor):
            self._add("total", total)
        else:
            self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Return the mean, a float64 scalar; NaN where nothing was counted."""
        return self.total / self.count


class ClassScores(NamedTuple):
    """How well one class is found; 0 where a score is not defined.

    Attributes:
        precision: Of the examples that were given the class, the share that has it.
        recall: Of the examples that have the class, the share that was given it.
        f1: Their harmonic mean.
        support: Examples that have the class.
    """

    precision: float
    recall: float
    f1: float
    support: int


class Confusion(NamedTuple):
    """What was taken for what.

    Attributes:
        counts: (C, C) int64 on the CPU: examples of class i that were given class j.
    """

    counts: Tensor

    @property
    def accuracy(self) -> float:
        """The share that was given its own class; NaN where there is no example."""
        total = int(self.counts.sum())
        return int(self.counts.trace()) / total if total else float("nan")

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that some example has or was given; NaN where none is."""
        scores = self.per_class()
        found = self.counts.sum(0) + self.counts.sum(1) > 0
        f1 = [score.f1 for score, there in zip(scores, found.tolist(), strict=True) if there]
        return sum(f1) / len(f1) if f1 else float("nan")

    def per_class(self) -> list[ClassScores]:
        """The scores of each class."""
        right = self.counts.diagonal().tolist()
        given, had = self.counts.sum(0).tolist(), self.counts.sum(1).tolist()
        return [
            ClassScores(
                precision=r / g if g else 0.0,
                recall=r / h if h else 0.0,
                f1=2 * r / (g + h) if g + h else 0.0,
                support=h,
            )
            for r, g, h in zip(right, given, had, strict=True)
        ]


class ConfusionCounts(SumMetric):
    """Counts of what was taken for what, from which accuracy and F1 follow exactly.

    Args:
        n_classes: C.
    """

    counts: Tensor

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        if type(n_classes) is not int or not 1 <= n_classes <= MOST_CLASSES:
            raise ValueError(
                f"n_classes must be from 1 to {MOST_CLASSES:,}, since every pair of classes is "
                f"counted; it is {n_classes}"
            )
        self.n_classes = n_classes
        counts = torch.zeros(n_classes * n_classes, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, given: Tensor, labels: Tensor) -> None:
        """Add examples, without waiting for the device.

        Args:
            given: (N,), the class that each was given.
            labels: (N,), the class that each has; below 0 where it has none: it does not count.
        """
        cells = labels.clamp(min=0) * self.n_classes + given
        counts = torch.zeros_like(self.counts, device=cells.device)
        counts.scatter_add_(0, cells, (labels >= 0).to(counts.dtype))
        self._add("counts", counts)

    def compute(self) -> Confusion:
        """Return the counts of all processes."""
        return Confusion(self.counts.view(self.n_classes, self.n_classes).cpu())
