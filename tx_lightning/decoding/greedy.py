"""The most probable token at each step."""

from collections.abc import Sequence

from torch import Tensor

from tx_lightning.decoding.filters import Filter
from tx_lightning.decoding.rows import Choice, RowSearch
from tx_lightning.decoding.search import Problem


class Greedy(RowSearch):
    """Takes the most probable token at each step; among equals the one of lowest id.

    Args:
        length_penalty: Exponent of the length penalty in the reported score; it changes no token.
        max_length_ratio: Most tokens, EOS included, per token of the source.
        max_length_offset: Added to that.
        filters: What may not come next, such as `NoRepeatNgram` and `MinLength`.
    """

    def __init__(
        self,
        *,
        length_penalty: float = 0.6,
        max_length_ratio: float = 2.0,
        max_length_offset: int = 10,
        filters: Sequence[Filter] = (),
    ) -> None:
        super().__init__(
            length_penalty=length_penalty,
            max_length_ratio=max_length_ratio,
            max_length_offset=max_length_offset,
            filters=filters,
        )

    @property
    def rows_per_sentence(self) -> int:
        return 1

    def choice(self, problem: Problem) -> Choice:
        def choose(log_probs: Tensor, rows: Tensor, step: int) -> Tensor:
            return log_probs.argmax(dim=1)

        return choose
