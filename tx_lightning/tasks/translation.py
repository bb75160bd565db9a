"""Translation: train an encoder-decoder on sentence pairs, score it with BLEU, translate text.

Shapes: B batch, S source length, T target length, D d_model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from tx_lightning.checkpoints import checkpoint_record
from tx_lightning.data.batches import TranslationBatch, padded
from tx_lightning.data.tokenizers import PAD, Tokenizers
from tx_lightning.data.translation import MOST_TOKENS
from tx_lightning.decoding import Beam, Decoding, Greedy
from tx_lightning.losses import TokenLoss, linear_cross_entropy
from tx_lightning.metrics import CorpusBLEU, CorpusChrF, TokenMean
from tx_lightning.models import EncoderDecoder
from tx_lightning.tasks.steps import clip_gradients, configure_optimizers, seed_batch

NetworkFactory = Callable[[int], EncoderDecoder]


def fused_adam(parameters: Any) -> Adam:
    """Adam as in Vaswani et al. 2017, section 5.3, one kernel for all parameters."""
    return Adam(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-9, fused=True)


@dataclass(frozen=True)
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
    """

    def __init__(self, index: int, tokens: int) -> None:
        super().__init__(
            f"text {index} has {tokens:,} tokens, more than the {MOST_TOKENS:,} that can be "
            "translated: split it into sentences"
        )
        self.index = index
        self.tokens = tokens


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


class Translation(LightningModule):
    """Trains an `EncoderDecoder` with label smoothing; logs loss, perplexity, BLEU and chrF.

    Args:
        vocab_size: Rows of the embedding tables; on the command line it follows data.vocab_size.
        network: Builds the network from the vocabulary size.
        label_smoothing: Share of each target that is spread over the vocabulary.
        optimizer: Builds the optimizer; its weight decay applies to matrices only.
        scheduler: Builds the learning-rate schedule, stepped once per optimizer step.
        decoding: How validation and `predict` search for hypotheses.
        test_decoding: How `test` and `translate` search; `decoding` where null.
        lowercase_scores: Score lower-cased text, for models trained on it.
    """

    def __init__(
        self,
        vocab_size: int,
        network: NetworkFactory = EncoderDecoder,
        *,
        label_smoothing: float = 0.1,
        optimizer: OptimizerCallable = fused_adam,
        scheduler: LRSchedulerCallable | None = None,
        decoding: Decoding | None = None,
        test_decoding: Decoding | None = None,
        lowercase_scores: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
        self.network = network(vocab_size)
        self.vocab_size = vocab_size
        self.label_smoothing = label_smoothing
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.decoding = decoding or Greedy()
        self.test_decoding = test_decoding or decoding or Beam(beam_size=5)
        self.val_scores = _Scores(lowercase_scores)
        self.test_scores = _Scores(lowercase_scores)
        self.tokenizers: Tokenizers | None = None
        self.settings: dict[str, Any] | None = None
        self.samples: list[Sample] = []
        self._train_sums: Tensor | None = None
        self._grad_norm: Tensor | None = None

    # Set-up and checkpoints

    def setup(self, stage: str) -> None:
        """Take the tokenizers of the data that the trainer was given."""
        self.attach(self.trainer.datamodule.tokenizers)  # type: ignore[attr-defined]

    def attach(self, tokenizers: Tokenizers) -> None:
        """Use these tokenizers.

        Raises:
            ValueError: When they differ from a checkpoint's, do not fit the embedding tables, or
                are two where the network has one table.
        """
        if self.tokenizers is not None and self.tokenizers.to_dict() != tokenizers.to_dict():
            raise ValueError(
                "the tokenizers of the data differ from those of the checkpoint: use the data and "
                "tokenizer settings that it was trained with"
            )
        if self.network.share_embeddings and tokenizers.source.sha256 != tokenizers.target.sha256:
            raise ValueError(
                "share_embeddings=true needs one vocabulary, but data.shared_vocabulary is false: "
                "set network.init_args.share_embeddings to false or share the vocabulary"
            )
        self.tokenizers = tokenizers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in all that using the weights needs: settings and tokenizers."""
        tokenizers = None if self.tokenizers is None else self.tokenizers.to_dict()
        checkpoint["tx_lightning"] = checkpoint_record(self.settings, tokenizers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's tokenizers, or refuse if the data's differ."""
        stored = Tokenizers.from_dict(checkpoint["tx_lightning"]["tokenizers"])
        self.attach(stored)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule."""
        return configure_optimizers(self.network, self.optimizer, self.scheduler)

    # Training

    def forward(self, batch: TranslationBatch) -> TokenLoss:
        """Sum the loss over the real target tokens of a batch, by teacher forcing."""
        hidden = self.network.hidden(batch.source, batch.target[:, :-1])  # (B, T, D)
        labels = batch.target[:, 1:]  # (B, T)
        real = labels != PAD
        return linear_cross_entropy(
            hidden[real], self.network.output_weight, labels[real], self.label_smoothing
        )

    def on_train_batch_start(self, batch: TranslationBatch, batch_idx: int) -> None:
        """Make this batch's dropout a function of its place in the run."""
        seed_batch(self.trainer, batch_idx)

    def training_step(self, batch: TranslationBatch, batch_idx: int) -> Tensor:
        """Return this part's share of the loss per target token of the whole optimizer step.

        Accumulation and processes each average over their parts, so the sum is multiplied by the
        number of parts and divided by the tokens of all of them.
        """
        sums = self(batch)
        if self._train_sums is None:
            self._train_sums = torch.zeros(2, device=self.device)
        self._train_sums[0] += sums.loss.detach()
        self._train_sums[1] += batch.target_tokens
        loss: Tensor = sums.loss * (batch.parts / batch.step_tokens)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and keep the norm for the log."""
        if gradient_clip_val is not None or self._logs_after(self.trainer.global_step + 1):
            self._grad_norm = clip_gradients(self, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: TranslationBatch, batch_idx: int) -> None:
        """On logging steps, log the loss per token since the last one and the gradient norm."""
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if not stepped or not self._logs_after(self.trainer.global_step):
            return
        if self._train_sums is None or self._grad_norm is None:
            return
        loss, tokens = self.trainer.strategy.reduce(self._train_sums, reduce_op="sum").tolist()
        self._train_sums = None
        metrics = {"train/loss": loss / max(tokens, 1), "train/grad_norm": float(self._grad_norm)}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)
        self.trainer.progress_bar_metrics["train/loss"] = metrics["train/loss"]

    def _logs_after(self, step: int) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step % max(1, every) == 0

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
        hypotheses = [best[0].text for best in self._search(batch.source, decoding, batch.indices)]
        scores.bleu.update(hypotheses, batch.target_text)
        scores.chrf.update(hypotheses, batch.target_text)
        columns = zip(batch.source_text, batch.target_text, hypotheses, batch.indices, strict=True)
        return [Sample(*column) for column in columns]

    def _log_scores(self, split: str, scores: _Scores) -> None:
        self.samples.sort(key=lambda sample: sample.index)
        nll = scores.nll.compute()
        values = {
            f"{split}/loss": scores.loss.compute(),
            f"{split}/nll": nll,
            f"{split}/perplexity": nll.exp(),
            f"{split}/bleu": scores.bleu.compute(),
            f"{split}/chrf": scores.chrf.compute(),
        }
        # The metrics have added up all processes; the mean of equal numbers is that number.
        self.log_dict(values, prog_bar=split == "val", sync_dist=True)
        for metric in (scores.loss, scores.nll, scores.bleu, scores.chrf):
            metric.reset()

    def predict_step(
        self, batch: TranslationBatch, batch_idx: int
    ) -> list[tuple[int, list[Translated]]]:
        """Return for each sentence its index and its hypotheses, the best first."""
        found = self._search(batch.source, self.test_decoding, batch.indices)
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
            TextTooLong: When a text has more than 10,000 tokens.
        """
        tokenizers = self._require_tokenizers()
        sources = tokenizers.source.encode_batch(texts)
        for i, ids in enumerate(sources):
            if len(ids) > MOST_TOKENS:
                raise TextTooLong(i, len(ids))
        results = [[Translated("", 0.0, 0.0, [])] for _ in texts]
        order = sorted(
            (i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(sources[i])
        )
        training, _ = self.training, self.eval()
        while order:
            rows = max(1, batch_tokens // (len(sources[order[0]]) + 1))
            chosen, order = order[:rows], order[rows:]
            source = padded([sources[i] for i in chosen]).to(self.device)
            places = [first_index + i for i in chosen]
            found = self._search(source, decoding or self.test_decoding, places)
            for i, hypotheses in zip(chosen, found, strict=True):
                results[i] = hypotheses
        self.train(training)
        return results

    def _search(
        self, source: Tensor, decoding: Decoding, indices: Sequence[int]
    ) -> list[list[Translated]]:
        """Decode source ids (B, S), B > 0; for each sentence its hypotheses, the best first.

        Indices name the sentences, so that what is sampled for one does not depend on the batch.
        """
        tokenizer = self._require_tokenizers().target
        lengths = (source != PAD).sum(1)
        state = self.network.start(source)
        found = decoding(
            self.network.step,
            state,
            lengths,
            indices=indices,
            vocabulary_size=tokenizer.vocab_size,
        )
        return [
            [
                Translated(text, hypothesis.score, hypothesis.log_prob, hypothesis.tokens)
                for hypothesis, text in zip(
                    hypotheses, tokenizer.decode_batch([h.tokens for h in hypotheses]), strict=True
                )
            ]
            for hypotheses in found
        ]

    def _require_tokenizers(self) -> Tokenizers:
        if self.tokenizers is None:
            raise ValueError("this task has no tokenizers yet: attach() them or load a checkpoint")
        return self.tokenizers

    # Attention maps

    def attention_inputs(
        self, batch: TranslationBatch
    ) -> tuple[tuple[Tensor, Tensor], list[dict[str, tuple[list[str], list[str]]]]]:
        """Return what the network is called with and, per example, the labels of its maps.

        The labels are (row tokens, column tokens) for "encoder.self", "decoder.self" and "cross";
        padding has none.
        """
        tokenizers = self._require_tokenizers()
        inputs = (batch.source, batch.target[:, :-1])
        labels = []
        for source, target in zip(
            batch.source.tolist(), batch.target[:, :-1].tolist(), strict=True
        ):
            s = tokenizers.source.tokens([i for i in source if i != PAD])
            t = tokenizers.target.tokens([i for i in target if i != PAD])
            labels.append({"encoder.self": (s, s), "decoder.self": (t, t), "cross": (t, s)})
        return inputs, labels
