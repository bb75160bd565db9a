"""Denoising: train an encoder-decoder to repair damaged texts, as T5 and BART are pretrained.

Shapes: B rows, S source length, T target length, D d_model, N target tokens of a batch.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from tx_lightning.data.batches import TranslationBatch
from tx_lightning.data.denoising import DenoisingData
from tx_lightning.data.tokenizers import Tokenizers
from tx_lightning.decoding import Greedy
from tx_lightning.losses import TokenLoss, linear_cross_entropy
from tx_lightning.metrics import TokenMean
from tx_lightning.models import EncoderDecoder
from tx_lightning.tasks.guesses import best_tokens, gap_names, marked_text, shown_tokens
from tx_lightning.tasks.task import Labels, Row, Task, fused_adamw

NetworkFactory = Callable[[int], EncoderDecoder]


class _Scores(nn.Module):
    """The metrics of one evaluation: sums over target tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.nll = TokenMean()
        self.accuracy = TokenMean()


class Denoising(Task[TranslationBatch]):
    """Trains an `EncoderDecoder` on damaged texts; logs loss, perplexity and accuracy of tokens.

    What is damaged is said by data.noise: `SpanCorruption` is T5's (Raffel et al. 2020),
    `TextInfilling` BART's (Lewis et al. 2020). The weights have the names they have in a
    `Translation`, which can start from them.

    Args:
        vocab_size: Rows of the embedding tables; on the command line it follows data.vocab_size.
        network: Builds the network from the vocabulary size.
        optimizer: Builds the optimizer; its weight decay applies to matrices only.
        scheduler: Builds the learning-rate schedule, stepped once per optimizer step.
        layer_decay: The learning rate of a layer is that of the layer above times this factor;
            null: one rate for all.
        freeze: Parameters that are not trained, by name, with * for anything.
    """

    network: EncoderDecoder

    def __init__(
        self,
        vocab_size: int,
        network: NetworkFactory = EncoderDecoder,
        *,
        optimizer: OptimizerCallable = fused_adamw,
        scheduler: LRSchedulerCallable | None = None,
        layer_decay: float | None = None,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__(
            network(vocab_size),
            vocab_size,
            optimizer=optimizer,
            scheduler=scheduler,
            layer_decay=layer_decay,
            freeze=freeze,
        )
        self.val_scores = _Scores()
        self.test_scores = _Scores()
        self._split: Literal["val", "test"] = "val"  # of the last evaluation

    def attach(self, tokenizers: Tokenizers) -> None:
        """Use these tokenizers.

        Raises:
            ValueError: When they differ from a checkpoint's, or pad with another id.
        """
        pad_id = tokenizers.source.pad_id
        if pad_id != self.network.pad_id:
            raise ValueError(
                f"the network's pad_id is {self.network.pad_id}, but the tokenizer pads with "
                f"{pad_id}: set pad_id to that"
            )
        super().attach(tokenizers)

    def setup(self, stage: str) -> None:
        """Check the lengths of the data against the network."""
        super().setup(stage)
        encoder, decoder = self.network.encoder.positions, self.network.decoder.positions
        self._data().check_reach(encoder.max_length, decoder.max_length)

    def _data(self) -> DenoisingData:
        data: object = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, DenoisingData):
            raise ValueError(f"Denoising needs DenoisingData, not {type(data).__name__}")
        return data

    # Training

    def forward(self, batch: TranslationBatch) -> TokenLoss:
        """Sum the loss over the real target tokens of a batch, by teacher forcing."""
        return self._loss(*self._hidden(batch))

    def _hidden(self, batch: TranslationBatch) -> tuple[Tensor, Tensor]:
        """Return the vectors that target tokens are read off, (N, D), and those tokens, (N,)."""
        labels = batch.target[:, 1:]  # (B, T)
        real = labels != self.network.pad_id
        hidden = self.network.hidden(batch.source, batch.target[:, :-1])  # (B, T, D)
        return hidden[real], labels[real]

    def _loss(self, hidden: Tensor, labels: Tensor) -> TokenLoss:
        network = self.network
        return linear_cross_entropy(hidden, network.output_weight, labels, bias=network.output_bias)

    # Validation and test

    def on_validation_epoch_start(self) -> None:
        """Samples are of the validation split from here on."""
        self._split = "val"

    def on_test_epoch_start(self) -> None:
        """Samples are of the test split from here on."""
        self._split = "test"

    def validation_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        """Add a batch to the validation scores."""
        self._score(batch, self.val_scores)

    def test_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        """Add a batch to the test scores."""
        self._score(batch, self.test_scores)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/nll, val/perplexity and val/accuracy."""
        self._log_scores("val", self.val_scores)

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/nll, test/perplexity and test/accuracy."""
        self._log_scores("test", self.test_scores)

    def _score(self, batch: TranslationBatch, scores: _Scores) -> None:
        hidden, labels = self._hidden(batch)
        scores.nll.update(self._loss(hidden, labels).nll, batch.target_tokens)
        best = best_tokens(hidden, self.network.output_weight, self.network.output_bias)
        scores.accuracy.update((best == labels).sum(), batch.target_tokens)

    def _log_scores(self, split: str, scores: _Scores) -> None:
        nll = scores.nll.compute()
        values = {
            "loss": nll,
            "nll": nll,
            "perplexity": nll.exp(),
            "accuracy": scores.accuracy.compute(),
        }
        self.log_scores(split, scores, values)

    # Samples and attention maps

    @torch.inference_mode()
    def sample_rows(self, n: int) -> list[Row]:
        """The first segments of the split: damaged, what greedy search writes, what it should."""
        data, tokenizer = self._data(), self.tokenizer
        store = data.val_store if self._split == "val" else data.test_store
        segments = data.evaluation_batches(store)
        training, _ = self.network.training, self.network.eval()
        rows: list[Row] = []
        for index in range(min(n, len(segments))):
            batch = segments.__getitems__(data.example_share(index)).to(self.device)
            [[best]] = Greedy()(
                self.network.step,
                self.network.start(batch.source),
                torch.tensor([batch.source.shape[1]], device=self.device),
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                pad_id=tokenizer.pad_id,
            )
            rows.append(
                {
                    "corrupted": self._text(batch.source[0, :-1].tolist()),
                    "output": self._text(best.tokens),
                    "reference": self._text(batch.target[0, 1:-1].tolist()),
                }
            )
        self.network.train(training)
        return rows

    def _text(self, ids: list[int]) -> str:
        """Tokens as text, with sentinels as ``<0>``, ``<1>``, ..."""
        names = gap_names(self.tokenizer, self.vocab_size)
        marks = {place: names[i] for place, i in enumerate(ids) if i in names}
        return marked_text(self.tokenizer, ids, marks)

    def attention_inputs(
        self, batch: TranslationBatch
    ) -> tuple[tuple[Tensor, ...], list[dict[str, Labels]]]:
        """Return what the network is called with and, per example, the labels of its maps."""
        names = gap_names(self.tokenizer, self.vocab_size)
        inputs = (batch.source, batch.target[:, :-1])
        sides = [
            [shown_tokens(self.tokenizer, row, names) for row in side.tolist()] for side in inputs
        ]
        labels: list[dict[str, Labels]] = [
            {"encoder.self": (s, s), "decoder.self": (t, t), "cross": (t, s)}
            for s, t in zip(*sides, strict=True)
        ]
        return inputs, labels
