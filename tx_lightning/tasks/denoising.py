"""Denoising: train an encoder-decoder to repair damaged texts, as T5 and BART are pretrained.

Shapes: B rows, S source length, T target length, D d_model, N target tokens of a batch.
"""

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from tx_lightning.data.batches import TranslationBatch
from tx_lightning.data.denoising import DenoisingData
from tx_lightning.decoding import Greedy
from tx_lightning.models import EncoderDecoder
from tx_lightning.tasks.guesses import gap_names, marked_text, shown_tokens
from tx_lightning.tasks.reconstruction import Reconstruction
from tx_lightning.tasks.search import search
from tx_lightning.tasks.steps import selected
from tx_lightning.tasks.task import Labels, Row, fused_adamw

NetworkFactory = Callable[[int], EncoderDecoder]


class Denoising(Reconstruction[TranslationBatch]):
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
        self.start_scores()

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

    # Training and scores

    def predicted(self, batch: TranslationBatch) -> tuple[Tensor, Tensor]:
        """Return the vectors that target tokens are read off, (N, D), and those tokens, (N,)."""
        hidden = self.network.hidden(  # (B, T, D)
            batch.source, batch.target[:, :-1], padded=batch.padded
        )
        hidden, labels = selected(batch.places, hidden, batch.target[:, 1:])
        return hidden, labels

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Return the output projection, (V, D), and its bias, (V,), where it has one."""
        return self.network.output_weight, self.network.output_bias

    # Samples and attention maps

    @torch.inference_mode()
    def sample_rows(self, n: int) -> list[Row]:
        """The first segments of the split: damaged, what greedy search writes, what it should."""
        data, tokenizer = self._data(), self.tokenizer
        store = data.val_store if self.evaluated == "val" else data.test_store
        segments = data.evaluation_batches(store)
        training, _ = self.network.training, self.network.eval()
        rows: list[Row] = []
        for index in range(min(n, len(segments))):
            batch = segments.__getitems__(data.example_share(index)).to(self.device)
            [[best]] = search(self.network, Greedy(), batch.source, tokenizer, padded=batch.padded)
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
