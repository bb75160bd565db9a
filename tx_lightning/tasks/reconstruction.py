"""What the pretraining tasks have in common: a network that restores what was hidden in a text.

Shapes: N predicted tokens, D d_model, V vocabulary.
"""

from abc import abstractmethod
from typing import Literal, TypeVar

from torch import Tensor, nn

from tx_lightning.data.batches import Batch
from tx_lightning.losses import TokenLoss, linear_cross_entropy
from tx_lightning.metrics import TokenMean
from tx_lightning.tasks.guesses import best_tokens
from tx_lightning.tasks.task import Task

B = TypeVar("B", bound=Batch)


class ReconstructionScores(nn.Module):
    """The metrics of one evaluation: sums over predicted tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.nll = TokenMean()
        self.accuracy = TokenMean()


class Reconstruction(Task[B]):
    """A task that predicts tokens from a damaged text; logs loss, perplexity and accuracy.

    A subclass calls `Task.__init__`, then `start_scores`.
    """

    val_scores: ReconstructionScores
    test_scores: ReconstructionScores
    evaluated: Literal["val", "test"] = "val"  # the split of the last evaluation

    def start_scores(self) -> None:
        """Make the metrics of validation and test."""
        self.val_scores = ReconstructionScores()
        self.test_scores = ReconstructionScores()

    @abstractmethod
    def predicted(self, batch: B) -> tuple[Tensor, Tensor]:
        """Return the vectors that tokens are read off, (N, D), and the true tokens, (N,)."""

    @abstractmethod
    def output(self) -> tuple[Tensor, Tensor | None]:
        """Return the output projection, (V, D), and its bias, (V,)."""

    def forward(self, batch: B) -> TokenLoss:
        """Sum the loss over the predicted tokens of a batch."""
        return self._loss(*self.predicted(batch))

    def _loss(self, hidden: Tensor, targets: Tensor) -> TokenLoss:
        weight, bias = self.output()
        return linear_cross_entropy(hidden, weight, targets, bias=bias)

    def best(self, hidden: Tensor) -> Tensor:
        """Return the likeliest of the tokens that can be predicted, (N, D) -> (N,)."""
        return best_tokens(hidden, *self.output())

    def on_validation_epoch_start(self) -> None:
        """Samples are of the validation split from here on."""
        self.evaluated = "val"

    def on_test_epoch_start(self) -> None:
        """Samples are of the test split from here on."""
        self.evaluated = "test"

    def validation_step(self, batch: B, batch_idx: int) -> None:
        """Add a batch to the validation scores."""
        self._score(batch, self.val_scores)

    def test_step(self, batch: B, batch_idx: int) -> None:
        """Add a batch to the test scores."""
        self._score(batch, self.test_scores)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/nll, val/perplexity and val/accuracy."""
        self._log_scores("val", self.val_scores)

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/nll, test/perplexity and test/accuracy."""
        self._log_scores("test", self.test_scores)

    def _score(self, batch: B, scores: ReconstructionScores) -> None:
        hidden, targets = self.predicted(batch)
        scores.nll.update(self._loss(hidden, targets).nll, batch.loss_tokens)
        scores.accuracy.update((self.best(hidden) == targets).sum(), batch.loss_tokens)

    def _log_scores(self, split: str, scores: ReconstructionScores) -> None:
        nll = scores.nll.compute()
        values = {
            "loss": nll,
            "nll": nll,
            "perplexity": nll.exp(),
            "accuracy": scores.accuracy.compute(),
        }
        self.log_scores(split, scores, values)
