"""Masked language modelling: train a text encoder to guess the tokens that were hidden from it.

Shapes: B rows, T tokens, D d_model, K hidden tokens.
"""

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.masked_language_modeling import MaskedBatch, MaskedLanguageModelingData
from tx_lightning.data.masking import mask_id
from tx_lightning.models import MaskedLanguageModel
from tx_lightning.tasks.guesses import best_tokens, marked_text, shown_tokens
from tx_lightning.tasks.reconstruction import Reconstruction
from tx_lightning.tasks.steps import selected
from tx_lightning.tasks.task import Labels, Row, fused_adamw

NetworkFactory = Callable[[int], MaskedLanguageModel]
_MASK = "<mask>"


class MaskedLanguageModeling(Reconstruction[MaskedBatch]):
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
        self.start_scores()

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

    # Training and scores

    def predicted(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Return the vectors at the places of hidden tokens, (K, D), and those tokens, (K,)."""
        hidden = self.network.hidden(batch.ids, padded=batch.padded)  # (B, T, D)
        hidden, targets = selected(batch.places, hidden, batch.targets)
        return hidden, targets

    def output(self) -> tuple[Tensor, Tensor]:
        """Return the output projection, (V, D), and its bias, (V,)."""
        return self.network.output_weight, self.network.output_bias

    def best(self, hidden: Tensor) -> Tensor:
        """Return the likeliest of the tokenizer's tokens for each vector, (K, D) -> (K,)."""
        n = self.tokenizer.vocab_size
        return best_tokens(hidden, self.network.output_weight[:n], self.network.output_bias[:n])

    # Samples and attention maps

    @torch.inference_mode()
    def sample_rows(self, n: int) -> list[Row]:
        """The first segments of the split: what was hidden, what is guessed, what was there.

        A place where a token was replaced or left to be guessed is shown as a mask as well.
        """
        data, tokenizer = self._data(), self.tokenizer
        store = data.val_store if self.evaluated == "val" else data.test_store
        segments = data.evaluation_batches(store)
        training, _ = self.network.training, self.network.eval()
        rows: list[Row] = []
        for index in range(min(n, len(segments))):
            batch = segments.__getitems__(data.example_share(index)).to(self.device)
            hidden, targets = self.predicted(batch)
            guesses = tokenizer.tokens(self.best(hidden).tolist())
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
