"""Tagging: train a network to give every word of a sentence a class, score it, tag text.

Shapes: B batch, T length, N words, C tags.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from tx_lightning.data.batches import padded, row_ids
from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.tagging import TaggingBatch, TaggingData
from tx_lightning.decoding.limits import LARGEST, at_least
from tx_lightning.losses import TokenLoss
from tx_lightning.models import Tagger
from tx_lightning.tasks.labels import Answer, LabelScores, LabelTask, check_length, label_loss
from tx_lightning.tasks.steps import selected
from tx_lightning.tasks.task import Labels, Row, fused_adamw

NetworkFactory = Callable[[int, int], Tagger]
KEPT = 100  # sentences of an evaluation that can be shown


@dataclass(frozen=True)
class TaggedRow:
    """A sentence of an evaluation with the tags that the model gives it.

    Attributes:
        words: Its words, as far as they are scored.
        tags: Their tags.
        predicted: Those the model gives.
        index: Its place in the split.
    """

    words: list[str]
    tags: list[str]
    predicted: list[str]
    index: int

    @property
    def wrong(self) -> int:
        """How many words have a wrong tag."""
        return sum(a != b for a, b in zip(self.tags, self.predicted, strict=True))


class Tagging(LabelTask[TaggingBatch]):
    """Trains a `Tagger`; logs loss, accuracy over all words, and F1 averaged over tags.

    Accuracy and F1 are of single words, also where tags mark spans as B-PER and I-PER do.

    Args:
        vocab_size: Rows of the embedding table; on the command line it follows data.vocab_size.
        n_tags: Number of tags; on the command line it follows data.n_tags.
        network: Builds the network from the vocabulary size and the number of tags.
        label_smoothing: Share of each target that is spread over all tags.
        optimizer: Builds the optimizer; its weight decay applies to matrices only.
        scheduler: Builds the learning-rate schedule, stepped once per optimizer step.
        layer_decay: The learning rate of a layer is that of the layer above times this factor;
            null: one rate for all.
        freeze: Parameters that are not trained, by name, with * for anything.
    """

    network: Tagger
    prediction_file = "tags.tsv"  # of `predict`: the tags of a sentence a line

    def __init__(
        self,
        vocab_size: int,
        n_tags: int,
        network: NetworkFactory = Tagger,
        *,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = fused_adamw,
        scheduler: LRSchedulerCallable | None = None,
        layer_decay: float | None = None,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__(
            network(vocab_size, n_tags),
            vocab_size,
            n_tags,
            label_smoothing=label_smoothing,
            optimizer=optimizer,
            scheduler=scheduler,
            layer_decay=layer_decay,
            freeze=freeze,
        )
        self.rows: list[TaggedRow] = []

    def setup(self, stage: str) -> None:
        """Take tokenizer and tags of the data; refuse sentences that the network cannot hold."""
        super().setup(stage)
        data: object = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TaggingData):
            raise ValueError(f"Tagging needs TaggingData, not {type(data).__name__}")
        check_length(data.max_length, self.network.encoder.max_length)
        self.attach_labels(data.labels, n_texts=1)

    # Training

    def forward(self, batch: TaggingBatch) -> TokenLoss:
        """Sum the loss over the tagged words of a batch."""
        return self._loss(self._logits(batch).flatten(0, 1), batch.labels.flatten())

    def _logits(self, batch: TaggingBatch) -> Tensor:
        logits: Tensor = self.network(batch.ids, padded=batch.padded)
        return logits

    def _loss(self, logits: Tensor, labels: Tensor) -> TokenLoss:
        return label_loss(logits, labels, self.label_smoothing)

    # Validation, test, prediction

    def on_validation_epoch_start(self) -> None:
        """Forget the sentences of the last validation."""
        self.rows = []

    def validation_step(self, batch: TaggingBatch, batch_idx: int) -> None:
        """Add a batch to the validation scores and keep what can be shown of it."""
        self._evaluate(batch, self.val_scores)

    def on_test_epoch_start(self) -> None:
        """Forget the sentences of a validation."""
        self.rows = []

    def test_step(self, batch: TaggingBatch, batch_idx: int) -> None:
        """Add a batch to the test scores and keep what can be shown of it."""
        self._evaluate(batch, self.test_scores)

    def _evaluate(self, batch: TaggingBatch, scores: LabelScores) -> None:
        logits, labels = selected(batch.places, self._logits(batch), batch.labels)
        scores.update(self._loss(logits, labels), logits, labels, batch.labelled)
        names = self.require_labels()
        sizes = (batch.labels != IGNORED).sum(1)
        # In one transfer to the host.
        numbers = torch.cat((sizes, labels, logits.argmax(-1))).tolist()
        rows = iter(numbers[: len(sizes)])
        tags = iter([names[i] for i in numbers[len(sizes) : len(sizes) + len(labels)]])
        predicted = iter([names[i] for i in numbers[len(sizes) + len(labels) :]])
        for words, size, index in zip(batch.words, rows, batch.indices, strict=True):
            gold, given = list(islice(tags, size)), list(islice(predicted, size))
            self.rows.append(TaggedRow(words[:size], gold, given, index))
        self.rows = sorted(self.rows, key=lambda row: (-row.wrong, row.index))[:KEPT]

    def sample_rows(self, n: int) -> list[Row]:
        """The sentences with the most wrong tags first; 100 at most."""
        return [
            {
                "text": " ".join(row.words),
                "tags": " ".join(row.tags),
                "predicted": " ".join(row.predicted),
                "wrong": row.wrong,
            }
            for row in self.rows[:n]
        ]

    def predict_step(self, batch: TaggingBatch, batch_idx: int) -> list[tuple[int, list[Answer]]]:
        """Return for each sentence its index and the tags of all its words, between tabs."""
        found = self.tag(batch.words, batch_tokens=batch.positions)
        answers = [[Answer("\t".join(tags))] for tags in found]
        return list(zip(batch.indices, answers, strict=True))

    # Tagging of text

    @torch.inference_mode()
    def tag(
        self,
        sentences: Sequence[Sequence[str]],
        *,
        batch_tokens: int = 16384,
        on_long: Callable[[int, int], None] | None = None,
    ) -> list[list[str]]:
        """Tag sentences: for each, in order, a tag for every word.

        A sentence that is longer than the network's max_length is tagged in parts, between words;
        of a word that is longer alone, the end is left out.

        Args:
            sentences: Words of sentences; one without words has no tags.
            batch_tokens: Tokens, with padding, that are held at once.
            on_long: Told the place of each sentence that is tagged in parts, and its tokens.
        """
        at_least("batch_tokens", batch_tokens, 1, LARGEST)
        names, special = self.require_labels(), row_ids(self.tokenizer)
        room = self.network.encoder.max_length - 2  # BOS and EOS
        parts: list[tuple[int, list[list[int]]]] = []  # (sentence, the tokens of some of its words)
        for i, words in enumerate(self.tokenizer.encode_words(sentences)):
            pieces = _pieces(words, room)
            parts += [(i, piece) for piece in pieces]
            if on_long is not None and (tokens := sum(map(len, words))) > room:
                on_long(i, tokens + 2)
        rows = [[i for word in piece for i in word] for _, piece in parts]
        found: list[list[str]] = [[] for _ in parts]
        order = sorted(range(len(parts)), key=lambda p: -len(rows[p]))
        training, _ = self.training, self.eval()
        while order:
            held = max(1, batch_tokens // (len(rows[order[0]]) + 2))
            chosen, order = order[:held], order[held:]
            ids = padded([rows[p] for p in chosen], special, start=True).to(self.device)
            ragged = len({len(rows[p]) for p in chosen}) > 1
            best = self.network(ids, padded=ragged).argmax(-1).tolist()
            for p, classes in zip(chosen, best, strict=True):
                start = 1  # after BOS
                for word in parts[p][1]:
                    found[p].append(names[classes[start]])
                    start += len(word)
        self.train(training)
        results: list[list[str]] = [[] for _ in sentences]
        for (i, _), tags in zip(parts, found, strict=True):
            results[i] += tags
        return results

    # Attention maps

    def attention_inputs(
        self, batch: TaggingBatch
    ) -> tuple[tuple[Tensor, ...], list[dict[str, Labels]]]:
        """Return what the network is called with and, per example, the labels of its maps."""
        labels = self.map_labels(batch.ids)
        return (batch.ids,), labels


def _pieces(words: list[list[int]], room: int) -> list[list[list[int]]]:
    """Words in parts of at most `room` tokens; of a longer word the end is left out."""
    pieces: list[list[list[int]]] = []
    size = room
    for word in (word[:room] for word in words):
        if size + len(word) > room:
            pieces.append([])
            size = 0
        pieces[-1].append(word)
        size += len(word)
    return pieces
