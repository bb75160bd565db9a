"""Translation: train an encoder-decoder on sentence pairs, score it with BLEU, translate text.

Shapes: B batch, S source length, T target length, D d_model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam

from tx_lightning.data.batches import TranslationBatch, padded, row_ids
from tx_lightning.data.tokenizers import Tokenizers
from tx_lightning.data.translation import MOST_TOKENS, TranslationData
from tx_lightning.decoding import Beam, Decoding, Greedy, NotFinite
from tx_lightning.decoding.limits import LARGEST, at_least
from tx_lightning.losses import TokenLoss, linear_cross_entropy
from tx_lightning.metrics import CorpusBLEU, CorpusChrF, TokenMean
from tx_lightning.models import EncoderDecoder
from tx_lightning.tasks.search import search
from tx_lightning.tasks.steps import selected
from tx_lightning.tasks.task import Labels, Row, Task, check_label_smoothing, without_padding

NetworkFactory = Callable[[int], EncoderDecoder]


def fused_adam(parameters: Any) -> Adam:
    """Adam as in Vaswani et al. 2017, section 5.3, one kernel for all parameters."""
    return Adam(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-9, fused=True)


@dataclass  # not frozen: Lightning refuses those among predictions
class Translated:
    """One hypothesis for a sentence.

    Attributes:
        text: Detokenized.
        score: What hypotheses of a sentence are ranked by: the length-normalized log-probability.
        log_prob: Log-probability in nats, including the end of the sentence.
        tokens: Ids, without the end of the sentence.
    """

    text: str
    score: float
    log_prob: float
    tokens: list[int]


class TextTooLong(ValueError):
    """A text has so many tokens that it would not be translated within reasonable time.

    Attributes:
        index: Its place among the texts.
        tokens: Its tokens.
        most: The most that can be translated.
    """

    def __init__(self, index: int, tokens: int, most: int = MOST_TOKENS) -> None:
        super().__init__(
            f"text {index} has {tokens:,} tokens, more than the {most:,} that can be "
            "translated: split it into sentences"
        )
        self.index = index
        self.tokens = tokens
        self.most = most


@dataclass(frozen=True)
class Sample:
    """A validation sentence with its best hypothesis; index is its place in the split."""

    source: str
    reference: str
    hypothesis: str
    index: int


class _Scores(nn.Module):
    """The metrics of one evaluation: sums over tokens, statistics over sentences."""

    def __init__(self, lowercase: bool) -> None:
        super().__init__()
        self.loss = TokenMean()
        self.nll = TokenMean()
        self.bleu = CorpusBLEU(lowercase=lowercase)
        self.chrf = CorpusChrF(lowercase=lowercase)


class Translation(Task[TranslationBatch]):
    """Trains an `EncoderDecoder` with label smoothing; logs loss, perplexity, BLEU and chrF.

    Args:
        vocab_size: Rows of the embedding tables; on the command line it follows data.vocab_size.
        network: Builds the network from the vocabulary size.
        label_smoothing: Share of each target that is spread over the vocabulary.
        optimizer: Builds the optimizer; its weight decay applies to matrices only.
        scheduler: Builds the learning-rate schedule, stepped once per optimizer step.
        layer_decay: The learning rate of a layer is that of the layer above times this factor;
            null: one rate for all.
        freeze: Parameters that are not trained, by name, with * for anything.
        decoding: How validation and `predict` search for hypotheses.
        test_decoding: How `test` and `translate` search; `decoding` where null.
        lowercase_scores: Score lower-cased text, for models trained on it.
    """

    network: EncoderDecoder

    def __init__(
        self,
        vocab_size: int,
        network: NetworkFactory = EncoderDecoder,
        *,
        label_smoothing: float = 0.1,
        optimizer: OptimizerCallable = fused_adam,
        scheduler: LRSchedulerCallable | None = None,
        layer_decay: float | None = None,
        freeze: Sequence[str] = (),
        decoding: Decoding | None = None,
        test_decoding: Decoding | None = None,
        lowercase_scores: bool = False,
    ) -> None:
        check_label_smoothing(label_smoothing)
        super().__init__(
            network(vocab_size),
            vocab_size,
            optimizer=optimizer,
            scheduler=scheduler,
            layer_decay=layer_decay,
            freeze=freeze,
        )
        self.label_smoothing = label_smoothing
        self.decoding = decoding or Greedy()
        self.test_decoding = test_decoding or decoding or Beam(beam_size=5)
        self.val_scores = _Scores(lowercase_scores)
        self.test_scores = _Scores(lowercase_scores)
        self.samples: list[Sample] = []

    def attach(self, tokenizers: Tokenizers) -> None:
        """Use these tokenizers.

        Raises:
            ValueError: When they differ from a checkpoint's, or are two where the network has one
                embedding table.
        """
        if self.network.share_embeddings and not tokenizers.shared:
            raise ValueError(
                "share_embeddings=true needs one vocabulary, but data.shared_vocabulary is false: "
                "set network.init_args.share_embeddings to false or share the vocabulary"
            )
        super().attach(tokenizers)

    def setup(self, stage: str) -> None:
        """Take the tokenizers of the data, and check its lengths against the network."""
        super().setup(stage)
        data: object = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TranslationData):
            encoder, decoder = self.network.encoder.positions, self.network.decoder.positions
            data.check_reach(encoder.max_length, decoder.max_length)

    # Training

    def forward(self, batch: TranslationBatch) -> TokenLoss:
        """Sum the loss over the real target tokens of a batch, by teacher forcing."""
        hidden = self.network.hidden(  # (B, T, D)
            batch.source, batch.target[:, :-1], padded=batch.padded
        )
        hidden, labels = selected(batch.places, hidden, batch.target[:, 1:])
        return linear_cross_entropy(
            hidden,
            self.network.output_weight,
            labels,
            self.label_smoothing,
            bias=self.network.output_bias,
        )

    # Validation, test, prediction

    def on_validation_epoch_start(self) -> None:
        """Forget the samples of the last validation."""
        self.samples = []

    def validation_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        """Add a batch to the validation scores and keep its hypotheses."""
        self.samples += self._score(batch, self.val_scores, self.decoding)

    def test_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        """Add a batch to the test scores and keep its hypotheses."""
        self.samples += self._score(batch, self.test_scores, self.test_decoding)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/nll, val/perplexity, val/bleu and val/chrf."""
        self._log_scores("val", self.val_scores)

    def on_test_epoch_start(self) -> None:
        """Forget the samples of a validation."""
        self.samples = []

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/nll, test/perplexity, test/bleu and test/chrf."""
        self._log_scores("test", self.test_scores)

    def _score(self, batch: TranslationBatch, scores: _Scores, decoding: Decoding) -> list[Sample]:
        sums = self(batch)
        scores.loss.update(sums.loss, batch.target_tokens)
        scores.nll.update(sums.nll, batch.target_tokens)
        found = self._decode(
            batch.source_text, batch.source, decoding, batch.indices, padded=batch.padded
        )
        hypotheses = [best.text for best, *_ in found]
        scores.bleu.update(hypotheses, batch.target_text)
        scores.chrf.update(hypotheses, batch.target_text)
        columns = zip(batch.source_text, batch.target_text, hypotheses, batch.indices, strict=True)
        return [Sample(*column) for column in columns]

    def _log_scores(self, split: str, scores: _Scores) -> None:
        self.samples.sort(key=lambda sample: sample.index)
        nll = scores.nll.compute()
        values = {
            "loss": scores.loss.compute(),
            "nll": nll,
            "perplexity": nll.exp(),
            "bleu": scores.bleu.compute(),
            "chrf": scores.chrf.compute(),
        }
        self.log_scores(split, scores, values)

    def sample_rows(self, n: int) -> list[Row]:
        """The first sentences of the split with their best hypotheses and sentence BLEU."""
        bleu = self.val_scores.bleu
        return [
            {
                "source": sample.source,
                "reference": sample.reference,
                "hypothesis": sample.hypothesis,
                "bleu": round(bleu.sentence(sample.hypothesis, sample.reference), 2),
            }
            for sample in self.samples[:n]
        ]

    def predict_step(
        self, batch: TranslationBatch, batch_idx: int
    ) -> list[tuple[int, list[Translated]]]:
        """Return for each sentence its index and its hypotheses, the best first."""
        found = self._decode(
            batch.source_text, batch.source, self.test_decoding, batch.indices, padded=batch.padded
        )
        return list(zip(batch.indices, found, strict=True))

    # Translation

    @torch.inference_mode()
    def translate(
        self,
        texts: Sequence[str],
        decoding: Decoding | None = None,
        batch_tokens: int = 4096,
        first_index: int = 0,
    ) -> list[list[Translated]]:
        """Translate sentences: for each, in order, its hypotheses, the best first.

        Args:
            texts: Raw source sentences; an empty one gives one empty hypothesis.
            decoding: How to search; `test_decoding` where None.
            batch_tokens: Source tokens, with padding, that are decoded at once.
            first_index: The place of the first text in a longer input: what is sampled for a text
                depends on its place, and not on how the input is cut.

        Raises:
            TextTooLong: When a text has more than 10,000 tokens, or more than the positions of
                the encoder reach.
        """
        at_least("batch_tokens", batch_tokens, 1, LARGEST)
        tokenizers = self.require_tokenizers()
        sources = tokenizers.source.encode_batch(texts)
        reach = self.network.encoder.positions.max_length
        most = MOST_TOKENS if reach is None else min(MOST_TOKENS, reach - 1)  # EOS follows
        for i, ids in enumerate(sources):
            if len(ids) > most:
                raise TextTooLong(i, len(ids), most)
        results: list[list[Translated]] = [[] for _ in texts]
        order = sorted(range(len(texts)), key=lambda i: -len(sources[i]))
        training, _ = self.training, self.eval()
        while order:
            rows = max(1, batch_tokens // (len(sources[order[0]]) + 1))
            chosen, order = order[:rows], order[rows:]
            rows_of_ids = [sources[i] for i in chosen]
            source = padded(rows_of_ids, row_ids(tokenizers.source)).to(self.device)
            places = [first_index + i for i in chosen]
            lines = [texts[i] for i in chosen]
            ragged = len(set(map(len, rows_of_ids))) > 1
            found = self._decode(
                lines, source, decoding or self.test_decoding, places, padded=ragged
            )
            for i, hypotheses in zip(chosen, found, strict=True):
                results[i] = hypotheses
        self.train(training)
        return results

    def _decode(
        self,
        texts: Sequence[str],
        source: Tensor,
        decoding: Decoding,
        indices: Sequence[int],
        *,
        padded: bool,
    ) -> list[list[Translated]]:
        """Decode sentences: for each its hypotheses, the best first; for a blank one a blank one.

        Where training goes on after it diverged, all hypotheses are blank.

        Args:
            texts: The B sentences.
            source: (B, S), their ids with EOS, padded.
            decoding: How to search.
            indices: Names of the sentences.
            padded: Whether there may be padding.
        """
        tokenizer = self.require_tokenizers().target
        written = [i for i, text in enumerate(texts) if text.strip()]
        results = [[Translated("", 0.0, 0.0, [])] for _ in texts]
        if len(written) < len(texts):
            source = source[torch.tensor(written, dtype=torch.int64, device=source.device)]
        if not written:
            return results
        names = [indices[i] for i in written]
        try:
            found = search(self.network, decoding, source, tokenizer, names, padded=padded)
        except NotFinite:
            if self.stop_when_diverged:
                raise
            return results  # training was told to go on whatever comes
        for i, hypotheses in zip(written, found, strict=True):
            lines = tokenizer.decode_batch([hypothesis.tokens for hypothesis in hypotheses])
            results[i] = [
                Translated(line, hypothesis.score, hypothesis.log_prob, hypothesis.tokens)
                for line, hypothesis in zip(lines, hypotheses, strict=True)
            ]
        return results

    # Attention maps

    def attention_inputs(
        self, batch: TranslationBatch
    ) -> tuple[tuple[Tensor, ...], list[dict[str, Labels]]]:
        """Return what the network is called with and, per example, the labels of its maps.

        The labels are (row tokens, column tokens) for "encoder.self", "decoder.self" and "cross";
        padding has none.
        """
        tokenizers = self.require_tokenizers()
        inputs = (batch.source, batch.target[:, :-1])
        labels = []
        for source, target in zip(
            batch.source.tolist(), batch.target[:, :-1].tolist(), strict=True
        ):
            s = tokenizers.source.tokens(without_padding(source, tokenizers.source.pad_id))
            t = tokenizers.target.tokens(without_padding(target, tokenizers.target.pad_id))
            labels.append({"encoder.self": (s, s), "decoder.self": (t, t), "cross": (t, s)})
        return inputs, labels
