"""Masked language modelling: train a text encoder to guess the tokens that were hidden from it.

Shapes: B rows, T tokens, D d_model, K hidden tokens.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.masked_language_modeling import MaskedBatch, MaskedLanguageModelingData
from tx_lightning.data.masking import mask_id
from tx_lightning.data.tokenizers import Tokenizers
from tx_lightning.losses import TokenLoss, linear_cross_entropy
from tx_lightning.metrics import TokenMean
from tx_lightning.models import MaskedLanguageModel
from tx_lightning.tasks.guesses import best_tokens, marked_text, shown_tokens
from tx_lightning.tasks.task import Labels, Row, Task, fused_adamw

NetworkFactory = Callable[[int], MaskedLanguageModel]
_MASK = "<mask>"


class _Scores(nn.Module):
    """The metrics of one evaluation: sums over hidden tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.nll = TokenMean()
        self.accuracy = TokenMean()


class MaskedLanguageModeling(Task[MaskedBatch]):
    """Trains a `MaskedLanguageModel` to guess hidden tokens (BERT, Devlin et al. 2019).

    Logs loss, perplexity and accuracy over hidden tokens. They are the easier the less is hidden:
    compare runs with the same data.masking only.

    Args:
        vocab_size: Rows of the embedding table; on the command line it follows data.vocab_size.
        network: Builds the network from the vocabulary size.
        optimizer: Builds the optimizer; its weight decay applies to matrices only.
        scheduler: Builds the learning-rate schedule, stepped once per optimizer step.
        layer_decay: The learning rate of a layer is that of the layer above times this factor;
            null: one rate for all.
        freeze: Parameters that are not trained, by name, with * for anything.
    """

    network: MaskedLanguageModel

    def __init__(
        self,
        vocab_size: int,
        network: NetworkFactory = MaskedLanguageModel,
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
        pad_id = self.network.encoder.pad_id
        if tokenizers.source.pad_id != pad_id:
            raise ValueError(
                f"the encoder's pad_id is {pad_id}, but the tokenizer pads with "
                f"{tokenizers.source.pad_id}: set pad_id to that"
            )
        super().attach(tokenizers)

    def setup(self, stage: str) -> None:
        """Take the data's tokenizer; refuse rows that do not fit into the network."""
        super().setup(stage)
        length, longest = self._data().max_length, self.network.encoder.max_length
        if length > longest:
            raise ValueError(
                f"data.max_length is {length}, but the encoder's max_length is {longest}: lower "
                "the one or raise the other"
            )

    def _data(self) -> MaskedLanguageModelingData:
        data: object = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MaskedLanguageModelingData):
            raise ValueError(
                "MaskedLanguageModeling needs MaskedLanguageModelingData, not "
                f"{type(data).__name__}"
            )
        return data

    # Training

    def forward(self, batch: MaskedBatch) -> TokenLoss:
        """Sum the loss over the hidden tokens of a batch."""
        return self._loss(*self._hidden(batch))

    def _hidden(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Return the vectors at the places of hidden tokens, (K, D), and those tokens, (K,)."""
        real = batch.targets != IGNORED
        return self.network.hidden(batch.ids)[real], batch.targets[real]

    def _loss(self, hidden: Tensor, targets: Tensor) -> TokenLoss:
        network = self.network
        return linear_cross_entropy(
            hidden, network.output_weight, targets, bias=network.output_bias
        )

    # Validation and test

    def on_validation_epoch_start(self) -> None:
        """Samples are of the validation split from here on."""
        self._split = "val"

    def on_test_epoch_start(self) -> None:
        """Samples are of the test split from here on."""
        self._split = "test"

    def validation_step(self, batch: MaskedBatch, batch_idx: int) -> None:
        """Add a batch to the validation scores."""
        self._score(batch, self.val_scores)

    def test_step(self, batch: MaskedBatch, batch_idx: int) -> None:
        """Add a batch to the test scores."""
        self._score(batch, self.test_scores)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/nll, val/perplexity and val/accuracy."""
        self._log_scores("val", self.val_scores)

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/nll, test/perplexity and test/accuracy."""
        self._log_scores("test", self.test_scores)

    def _score(self, batch: MaskedBatch, scores: _Scores) -> None:
        hidden, targets = self._hidden(batch)
        scores.nll.update(self._loss(hidden, targets).nll, batch.predicted)
        scores.accuracy.update((self._best(hidden) == targets).sum(), batch.predicted)

    def _best(self, hidden: Tensor) -> Tensor:
        """Return the likeliest of the tokenizer's tokens for each vector, (K, D) -> (K,)."""
        n = self.tokenizer.vocab_size
        return best_tokens(hidden, self.network.output_weight[:n], self.network.output_bias[:n])

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
        """The first segments of the split: what was hidden, what is guessed, what was there.

        A place where a token was replaced or left to be guessed is shown as a mask as well.
        """
        data, tokenizer = self._data(), self.tokenizer
        store = data.val_store if self._split == "val" else data.test_store
        segments = data.evaluation_batches(store)
        training, _ = self.network.training, self.network.eval()
        rows: list[Row] = []
        for index in range(min(n, len(segments))):
            batch = segments.__getitems__(data.example_share(index)).to(self.device)
            hidden, targets = self._hidden(batch)
            guesses = tokenizer.tokens(self._best(hidden).tolist())
            places = (batch.targets[0] != IGNORED).nonzero()[:, 0].tolist()
            ids = batch.ids[0].clone()
            ids[places] = targets
            original = ids.tolist()[1:-1]
            masks = dict.fromkeys((place - 1 for place in places), _MASK)
            filled = {
                place - 1: f"[{guess.strip('▁')}]"
                for place, guess in zip(places, guesses, strict=True)
            }
            rows.append(
                {
                    "masked": marked_text(tokenizer, original, masks),
                    "guesses": marked_text(tokenizer, original, filled),
                    "reference": tokenizer.decode_batch([original])[0],
                }
            )
        self.network.train(training)
        return rows

    def attention_inputs(
        self, batch: MaskedBatch
    ) -> tuple[tuple[Tensor, ...], list[dict[str, Labels]]]:
        """Return what the network is called with and, per example, the labels of its maps."""
        names = {mask_id(self.tokenizer, self.vocab_size): _MASK}
        labels: list[dict[str, Labels]] = []
        for row in batch.ids.tolist():
            tokens = shown_tokens(self.tokenizer, row, names)
            labels.append({"encoder.self": (tokens, tokens)})
        return (batch.ids,), labels
