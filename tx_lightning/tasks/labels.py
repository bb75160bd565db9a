"""What tasks share whose answers are labels: labels in checkpoints, exact scores, confusions.

Shapes: B batch, T length, N examples or words, C classes.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from tx_lightning.data.batches import Batch
from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.errors import listed
from tx_lightning.losses import TokenLoss
from tx_lightning.metrics import Confusion, ConfusionCounts, TokenMean
from tx_lightning.models import TextEncoder
from tx_lightning.tasks.task import Labels, Task, check_label_smoothing, without_padding

B = TypeVar("B", bound=Batch)
_NOT_PRINTED = ("Cc", "Cs", "Zl", "Zp")  # controls, surrogates, ends of lines and paragraphs


@dataclass  # not frozen: Lightning refuses those among predictions
class Answer:
    """A line of a file of predictions.

    Attributes:
        text: What stands there.
        score: The probability of a single label.
    """

    text: str
    score: float = 0.0


class LabelScores(nn.Module):
    """The metrics of one evaluation.

    Args:
        n_classes: C.
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.loss = TokenMean()
        self.nll = TokenMean()
        self.confusion = ConfusionCounts(n_classes)

    def update(self, sums: TokenLoss, logits: Tensor, labels: Tensor, n_labels: int) -> None:
        """Add N examples, of which n_labels have a label.

        Args:
            sums: Their loss.
            logits: (N, C).
            labels: (N,), IGNORED where there is none.
            n_labels: How many are not.
        """
        self.loss.update(sums.loss, n_labels)
        self.nll.update(sums.nll, n_labels)
        self.confusion.update(logits.argmax(-1), labels)


class LabelTask(Task[B]):
    """A task whose answers are labels.

    Args:
        network: What is trained.
        vocab_size: Rows of its embedding table.
        n_classes: C.
        label_smoothing: Share of each target that is spread over all classes.
        optimizer: Builds the optimizer; its weight decay applies to matrices only.
        scheduler: Builds the learning-rate schedule, stepped once per optimizer step.
        layer_decay: The learning rate of a layer is that of the layer above times this factor.
        freeze: Parameters that are not trained, by name, with * for anything.

    Attributes:
        labels: Label i is class i; None before data or a checkpoint are there.
        n_texts: How many texts are classified together, 1 or 2; None likewise.
        confusion: Of the last whole evaluation of each split, `val` and `test`.
    """

    def __init__(
        self,
        network: nn.Module,
        vocab_size: int,
        n_classes: int,
        *,
        label_smoothing: float,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        layer_decay: float | None,
        freeze: Sequence[str],
    ) -> None:
        check_label_smoothing(label_smoothing)
        super().__init__(
            network,
            vocab_size,
            optimizer=optimizer,
            scheduler=scheduler,
            layer_decay=layer_decay,
            freeze=freeze,
        )
        self.n_classes = n_classes
        self.label_smoothing = label_smoothing
        self.labels: list[str] | None = None
        self.n_texts: int | None = None
        self.confusion: dict[str, Confusion] = {}
        self.val_scores = LabelScores(n_classes)
        self.test_scores = LabelScores(n_classes)

    def attach_labels(self, labels: list[str], n_texts: int) -> None:
        """Use these labels, for so many texts at once.

        Raises:
            ValueError: When they differ from a checkpoint's, are not as many as the classes, or are
                no words to print between tabs.
        """
        for label in labels:
            if any(unicodedata.category(character) in _NOT_PRINTED for character in label):
                raise ValueError(
                    f"label {label!r}: it may have no tabs, line breaks and other control "
                    "characters, since each answer is a line"
                )
        if len(labels) != self.n_classes:
            raise ValueError(
                f"the network has {self.n_classes} classes, but there are {len(labels)} labels: "
                f"{listed(labels, '')}"
            )
        if self.labels is not None and self.labels != labels:
            raise ValueError(
                "the labels of the data differ from those of the checkpoint, "
                f"{listed(self.labels, '')} from {listed(labels, '')}: use the data that it was "
                "trained with"
            )
        if self.n_texts is not None and self.n_texts != n_texts:
            raise ValueError(
                "of data and checkpoint, one has single texts and the other has pairs of texts: "
                "use data like that it was trained with"
            )
        self.labels, self.n_texts = list(labels), n_texts

    def require_labels(self) -> list[str]:
        """The labels, where there must be some."""
        if self.labels is None:
            raise ValueError("this task has no labels yet: attach_labels() or load a checkpoint")
        return self.labels

    def record(self) -> dict[str, Any]:
        """All that using the weights needs: settings, tokenizers and labels."""
        return {**super().record(), "labels": self.labels, "n_texts": self.n_texts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's tokenizers and labels, or refuse if the data's differ."""
        super().on_load_checkpoint(checkpoint)
        record = checkpoint["tx_lightning"]
        self.attach_labels(record["labels"], record["n_texts"])

    # Evaluation

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/nll, val/accuracy and val/macro_f1."""
        self._log("val", self.val_scores)

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/nll, test/accuracy and test/macro_f1."""
        self._log("test", self.test_scores)

    def _log(self, split: str, scores: LabelScores) -> None:
        confusion = scores.confusion.compute()
        if not self.trainer.sanity_checking:
            self.confusion[split] = confusion
        values = {
            "loss": scores.loss.compute(),
            "nll": scores.nll.compute(),
            "accuracy": self._score(confusion.accuracy),
            "macro_f1": self._score(confusion.macro_f1),
        }
        self.log_scores(split, scores, values)

    def _score(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    # The network

    def inputs(self, encoder: TextEncoder, ids: Tensor, segments: Tensor) -> tuple[Tensor, ...]:
        """What the network is called with: the segments only where it tells them apart."""
        table = encoder.embedding.segments
        if self.n_texts == 1 or table is None or table.num_embeddings < 2:
            return (ids,)
        return ids, segments

    def map_labels(self, ids: Tensor) -> list[dict[str, Labels]]:
        """The labels of the attention maps of each row of ids (B, T): its tokens, no padding."""
        tokenizer, labels = self.tokenizer, []
        for row in ids.tolist():
            tokens = tokenizer.tokens(without_padding(row, tokenizer.pad_id))
            labels.append({"encoder.self": (tokens, tokens)})
        return labels


def check_length(ours: int, most: int) -> None:
    """Refuse data whose longest rows the network cannot hold.

    Args:
        ours: max_length of the data.
        most: max_length of the network.
    """
    if ours > most:
        raise ValueError(
            f"data.max_length is {ours}, but the network's max_length is {most}: lower the one or "
            "raise the other"
        )


def label_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    class_weights: Tensor | None = None,
) -> TokenLoss:
    """Sum the weighted, label-smoothed cross-entropy and the plain one, as `F.cross_entropy` does.

    Args:
        logits: (N, C).
        labels: (N,), IGNORED where there is none.
        label_smoothing: Share of each target that is spread over all classes.
        class_weights: (C,); None: all 1.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if class_weights is None and not label_smoothing:
        return TokenLoss(nll, nll.detach())
    loss = F.cross_entropy(
        logits,
        labels,
        weight=None if class_weights is None else class_weights.to(logits.dtype),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return TokenLoss(loss, nll.detach())
