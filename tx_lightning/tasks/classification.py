"""Classification of texts, or pairs of texts: train a classifier, score it, classify text.

Shapes: B batch, T length, C classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from tx_lightning.data.batches import row_ids
from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.classification import (
    ClassificationBatch,
    ClassificationData,
    fitting,
    joined,
    joined_length,
)
from tx_lightning.decoding.limits import LARGEST, at_least
from tx_lightning.losses import TokenLoss
from tx_lightning.models import Classifier
from tx_lightning.tasks.labels import Answer, LabelScores, LabelTask, check_length, label_loss
from tx_lightning.tasks.task import Labels, Row, fused_adamw

NetworkFactory = Callable[[int, int], Classifier]
KEPT = 100  # examples of an evaluation that can be shown


@dataclass(frozen=True)
class Judged:
    """An example of an evaluation with what the model takes it for.

    Attributes:
        texts: The untouched text, or the two of a pair.
        label: What it is.
        predicted: What it is taken for.
        probability: Of what it is taken for.
        index: Its place in the split.
    """

    texts: tuple[str, ...]
    label: str
    predicted: str
    probability: float
    index: int

    @property
    def order(self) -> tuple[bool, float, int]:
        """Mistakes first, the surest before the others; then the rest as it stands in the split."""
        right = self.label == self.predicted
        return right, 0.0 if right else -self.probability, self.index


class Classification(LabelTask[ClassificationBatch]):
    """Trains a `Classifier`; logs loss, accuracy over all examples, and F1 averaged over classes.

    Args:
        vocab_size: Rows of the embedding table; on the command line it follows data.vocab_size.
        n_classes: Number of classes; on the command line it follows data.n_classes.
        network: Builds the network from the vocabulary size and the number of classes.
        class_weights: What the loss of an example is multiplied by, for each class in the order of
            the labels; `balanced`: the inverse of its frequency in the training split, 1 on average
            over the examples; null: 1. The loss is divided by examples, not by weights.
        label_smoothing: Share of each target that is spread over all classes.
        optimizer: Builds the optimizer; its weight decay applies to matrices only.
        scheduler: Builds the learning-rate schedule, stepped once per optimizer step.
        layer_decay: The learning rate of a layer is that of the layer above times this factor;
            null: one rate for all.
        freeze: Parameters that are not trained, by name, with * for anything.
    """

    network: Classifier
    class_weights: Tensor | None
    prediction_file = "labels.tsv"  # of `predict`: a label and its probability a line

    def __init__(
        self,
        vocab_size: int,
        n_classes: int,
        network: NetworkFactory = Classifier,
        *,
        class_weights: list[float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = fused_adamw,
        scheduler: LRSchedulerCallable | None = None,
        layer_decay: float | None = None,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__(
            network(vocab_size, n_classes),
            vocab_size,
            n_classes,
            label_smoothing=label_smoothing,
            optimizer=optimizer,
            scheduler=scheduler,
            layer_decay=layer_decay,
            freeze=freeze,
        )
        self.balanced = class_weights == "balanced"
        weights = _weights(class_weights, n_classes)
        # In the checkpoint, so that balanced ones are known without the training split.
        self.register_buffer("class_weights", weights)
        self.judged: list[Judged] = []

    def setup(self, stage: str) -> None:
        """Take tokenizer and labels of the data; refuse texts that the network cannot hold."""
        super().setup(stage)
        data: object = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ClassificationData):
            raise ValueError(f"Classification needs ClassificationData, not {type(data).__name__}")
        check_length(data.max_length, self.network.encoder.max_length)
        self.attach_labels(data.labels, len(data.texts))
        if self.balanced and stage == "fit":
            assert self.class_weights is not None
            self.class_weights.copy_(balanced_weights(data.label_counts()))

    # Training

    def forward(self, batch: ClassificationBatch) -> TokenLoss:
        """Sum the loss over the labelled texts of a batch."""
        return self._loss(
            self._logits(batch.ids, batch.segments, padded=batch.padded), batch.labels
        )

    def _logits(self, ids: Tensor, segments: Tensor, *, padded: bool) -> Tensor:
        inputs = self.inputs(self.network.encoder, ids, segments)
        logits: Tensor = self.network(*inputs, padded=padded)
        return logits

    def _loss(self, logits: Tensor, labels: Tensor) -> TokenLoss:
        return label_loss(logits, labels, self.label_smoothing, self.class_weights)

    # Validation, test, prediction

    def on_validation_epoch_start(self) -> None:
        """Forget the examples of the last validation."""
        self.judged = []

    def validation_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Add a batch to the validation scores and keep what can be shown of it."""
        self._evaluate(batch, self.val_scores)

    def on_test_epoch_start(self) -> None:
        """Forget the examples of a validation."""
        self.judged = []

    def test_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Add a batch to the test scores and keep what can be shown of it."""
        self._evaluate(batch, self.test_scores)

    def _evaluate(self, batch: ClassificationBatch, scores: LabelScores) -> None:
        logits = self._logits(batch.ids, batch.segments, padded=batch.padded)
        scores.update(self._loss(logits, batch.labels), logits, batch.labels, batch.labelled)
        names = self.require_labels()
        rows = zip(batch.texts, _columns(logits, batch.labels), batch.indices, strict=True)
        self.judged += [
            Judged(texts, names[int(label)], names[int(predicted)], probability, index)
            for texts, (probability, predicted, label), index in rows
            if label != IGNORED
        ]
        self.judged = sorted(self.judged, key=lambda judged: judged.order)[:KEPT]

    def sample_rows(self, n: int) -> list[Row]:
        """The misclassified examples, the surest mistakes first, then correct ones; 100 at most."""
        rows: list[Row] = []
        for judged in self.judged[:n]:
            row: Row = dict(zip(("text", "second"), judged.texts, strict=False))
            row |= {"label": judged.label, "predicted": judged.predicted}
            rows.append(row | {"probability": round(judged.probability, 4)})
        return rows

    def predict_step(
        self, batch: ClassificationBatch, batch_idx: int
    ) -> list[tuple[int, list[Answer]]]:
        """Return for each text its index and its most probable label."""
        names = self.require_labels()
        logits = self._logits(batch.ids, batch.segments, padded=batch.padded)
        answers = [
            [Answer(f"{names[int(label)]}\t{probability:.4f}", probability)]
            for probability, label in _columns(logits)
        ]
        return list(zip(batch.indices, answers, strict=True))

    # Classification of text

    @torch.inference_mode()
    def classify(
        self,
        texts: Sequence[str],
        seconds: Sequence[str] | None = None,
        *,
        batch_tokens: int = 16384,
        on_cut: Callable[[int, int], None] | None = None,
    ) -> list[list[tuple[str, float]]]:
        """Classify texts: for each, in order, all labels with their probabilities, best first.

        A text that is longer than the network's max_length is cut, of a pair the longer one first.

        Args:
            texts: Raw texts.
            seconds: The second text of each pair; None where the network was trained on single
                texts.
            batch_tokens: Tokens, with padding, that are held at once.
            on_cut: Told the place of each text that is cut, and its tokens before.

        Raises:
            ValueError: When there are seconds and should not be, or the other way round.
        """
        at_least("batch_tokens", batch_tokens, 1, LARGEST)
        sides = [texts] if seconds is None else [texts, seconds]
        if self.n_texts is not None and len(sides) != self.n_texts:
            needs = (
                "single texts: leave out seconds" if self.n_texts == 1 else "pairs: give seconds"
            )
            raise ValueError(f"this classifier was trained on {needs}")
        names, special = self.require_labels(), row_ids(self.tokenizer)
        rows = list(zip(*map(self.tokenizer.encode_batch, sides), strict=True))
        most = self.network.encoder.max_length
        for i, row in enumerate(rows):
            if joined_length(row) > most:
                if on_cut is not None:
                    on_cut(i, joined_length(row))
                for ids, kept in zip(row, fitting([len(ids) for ids in row], most), strict=True):
                    del ids[kept:]
        results: list[list[tuple[str, float]]] = [[] for _ in texts]
        order = sorted(range(len(rows)), key=lambda i: -joined_length(rows[i]))
        training, _ = self.training, self.eval()
        while order:
            held = max(1, batch_tokens // joined_length(rows[order[0]]))
            chosen, order = order[:held], order[held:]
            ids, segments = joined([rows[i] for i in chosen], special)
            ragged = len({joined_length(rows[i]) for i in chosen}) > 1
            logits = self._logits(ids.to(self.device), segments.to(self.device), padded=ragged)
            found = logits.float().softmax(-1).sort(descending=True, stable=True)
            for i, values, places in zip(
                chosen, found.values.tolist(), found.indices.tolist(), strict=True
            ):
                results[i] = [(names[place], p) for place, p in zip(places, values, strict=True)]
        self.train(training)
        return results

    # Attention maps

    def attention_inputs(
        self, batch: ClassificationBatch
    ) -> tuple[tuple[Tensor, ...], list[dict[str, Labels]]]:
        """Return what the network is called with and, per example, the labels of its maps."""
        labels = self.map_labels(batch.ids)
        return self.inputs(self.network.encoder, batch.ids, batch.segments), labels


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """The inverse frequency of each class, scaled to a mean of 1 over the examples."""
    n_examples = sum(counts)
    return torch.tensor([n_examples / (len(counts) * max(count, 1)) for count in counts])


def _weights(asked: list[float] | Literal["balanced"] | None, n_classes: int) -> Tensor | None:
    if asked is None:
        return None
    if asked == "balanced":
        return torch.ones(n_classes)  # until the training split is counted
    if len(asked) != n_classes:
        raise ValueError(
            f"class_weights has {len(asked)} numbers, but there are {n_classes} classes"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in asked) or not any(asked):
        raise ValueError(f"class_weights={asked} must be numbers from 0 up, not all of them 0")
    return torch.tensor(asked, dtype=torch.float32)


def _columns(logits: Tensor, *more: Tensor) -> list[list[float]]:
    """The probability and the number of each row's best class, and what else there is of rows.

    All of it in one transfer to the host; the numbers of classes are exact in float32.
    """
    best = logits.float().softmax(-1).max(-1)
    columns = (best.values, best.indices, *more)
    rows: list[list[float]] = torch.stack([column.float() for column in columns], -1).tolist()
    return rows
