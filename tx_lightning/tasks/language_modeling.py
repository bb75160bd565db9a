"""Language modelling: train a decoder-only Transformer to predict the next token of a stream.

Shapes: B blocks, L tokens of a block, D d_model.
"""

import math
from collections.abc import Callable, Sequence

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from tx_lightning.data.blocks import BlockBatch
from tx_lightning.data.language_modeling import LanguageModelingData
from tx_lightning.decoding import Decoding, Sampling
from tx_lightning.losses import TokenLoss, linear_cross_entropy
from tx_lightning.metrics import TokenMean
from tx_lightning.models import LanguageModel
from tx_lightning.tasks.continuation import continue_ids
from tx_lightning.tasks.task import Labels, Row, Task, fused_adamw

NetworkFactory = Callable[[int], LanguageModel]
_SAMPLED = 64  # tokens of a prompt in a table of samples, and of its continuation


class _Scores(nn.Module):
    """The log-likelihood over blocks side by side, and under a sliding window."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = TokenMean()
        self.sliding = TokenMean()


class LanguageModeling(Task[BlockBatch]):
    """Trains a `LanguageModel` on the next token; logs loss, perplexity and bits per byte.

    Scores are over the whole held-out stream, every token once. In test they are taken twice: in
    blocks side by side, as in validation, and, named `test/sliding_...`, with a window that slides,
    so that each token has a full context. Where the source knows the true distribution, excess
    nats are what the loss lies above its optimum.

    Args:
        vocab_size: Rows of the embedding table; on the command line it follows data.vocab_size.
        network: Builds the network from the vocabulary size.
        optimizer: Builds the optimizer; its weight decay applies to matrices only.
        scheduler: Builds the learning-rate schedule, stepped once per optimizer step.
        layer_decay: The learning rate of a layer is that of the layer above times this factor;
            null: one rate for all.
        freeze: Parameters that are not trained, by name, with * for anything.
        decoding: How the samples of a validation, and of `generate`, are continued.
    """

    network: LanguageModel

    def __init__(
        self,
        vocab_size: int,
        network: NetworkFactory = LanguageModel,
        *,
        optimizer: OptimizerCallable = fused_adamw,
        scheduler: LRSchedulerCallable | None = None,
        layer_decay: float | None = None,
        freeze: Sequence[str] = (),
        decoding: Decoding | None = None,
    ) -> None:
        super().__init__(
            network(vocab_size),
            vocab_size,
            optimizer=optimizer,
            scheduler=scheduler,
            layer_decay=layer_decay,
            freeze=freeze,
        )
        self.decoding = decoding or Sampling(temperature=0.8, top_k=200)
        self.val_scores = _Scores()
        self.test_scores = _Scores()
        self._evaluated = "val"  # the split that samples are taken from

    def setup(self, stage: str) -> None:
        """Take the data's tokenizer; refuse blocks that do not fit into the context."""
        super().setup(stage)
        length, context = self._data().block_length, self.network.context_length
        if length > context:
            raise ValueError(
                f"data.block_length is {length}, but the network's context_length is {context}: "
                "lower the one or raise the other"
            )

    def _data(self) -> LanguageModelingData:
        data: object = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, LanguageModelingData):
            raise ValueError(
                f"LanguageModeling needs LanguageModelingData, not {type(data).__name__}"
            )
        return data

    # Training

    def forward(self, batch: BlockBatch) -> TokenLoss:
        """Sum the loss over the predicted tokens of a batch."""
        hidden = self.network.hidden(batch.ids).flatten(0, 1)  # (B, L, D) -> (B L, D)
        targets = batch.targets.flatten()
        if batch.predicted < len(targets):
            hidden = hidden.index_select(0, batch.places)
            targets = targets.index_select(0, batch.places)
        return linear_cross_entropy(hidden, self.network.output_weight, targets)

    # Validation and test

    def validation_step(self, batch: BlockBatch, batch_idx: int) -> None:
        """Add a batch to the validation scores."""
        self.val_scores.blocks.update(self(batch).nll, batch.predicted)

    def test_step(self, batch: BlockBatch, batch_idx: int) -> None:
        """Add a batch to the test scores: of blocks side by side, or of the sliding window."""
        scores = self.test_scores.sliding if batch.sliding else self.test_scores.blocks
        scores.update(self(batch).nll, batch.predicted)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/nll, val/perplexity, val/bits_per_byte and val/excess_nats."""
        values = self._values("val", self.val_scores.blocks, "")
        self.log_scores("val", self.val_scores, values)

    def on_test_epoch_end(self) -> None:
        """Log the same of the test split, and test/sliding_... besides."""
        values = self._values("test", self.test_scores.blocks, "")
        if int(self.test_scores.sliding.count):
            values |= self._values("test", self.test_scores.sliding, "sliding_")
        self.log_scores("test", self.test_scores, values)

    def _values(self, split: str, nll: TokenMean, prefix: str) -> dict[str, Tensor]:
        self._evaluated = split
        data, loss = self._data(), nll.compute()
        values = {
            "loss": loss,
            "nll": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": loss / (math.log(2) * data.bytes_per_token(split)),
        }
        optimum = data.optimum(split)
        if optimum is not None:
            values["excess_nats"] = loss - optimum
        return {f"{prefix}{name}": value for name, value in values.items()}

    # Samples and attention maps

    def sample_rows(self, n: int) -> list[Row]:
        """Continuations of the beginnings of the first blocks that were evaluated."""
        data, tokenizer = self._data(), self.tokenizer
        store = data.evaluated_store(self._evaluated)
        prompts, truths = [], []
        for index in range(min(n, data.n_blocks(store))):
            ids = data.example(index, store).ids[0].tolist()
            length = max(1, min(_SAMPLED, len(ids) // 2))
            prompts.append(ids[:length])
            truths.append(ids[length : 2 * length])
        found = continue_ids(
            self.network,
            tokenizer,
            prompts,
            self.decoding,
            max_new_tokens=max(map(len, prompts)),
            past_context="slide",
        )
        decoded = zip(tokenizer.decode_batch(prompts), tokenizer.decode_batch(truths), strict=True)
        return [
            {"prompt": prompt, "continuation": best.text, "reference": truth}
            for (prompt, truth), (best, *_) in zip(decoded, found, strict=True)
        ]

    def attention_inputs(
        self, batch: BlockBatch
    ) -> tuple[tuple[Tensor, ...], list[dict[str, Labels]]]:
        """Return what the network is called with and, per example, the labels of its maps."""
        labels: list[dict[str, Labels]] = []
        for row in batch.ids.tolist():
            tokens = self.tokenizer.tokens(row)
            labels.append({"self": (tokens, tokens)})
        return (batch.ids,), labels
