"""How tensors of one format become those of another, and back: tables of invertible rules.

Shapes: I inputs, O outputs, V vocabulary, P positions, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tx_lightning.checkpoints import not_finite
from tx_lightning.weights.errors import WeightsError

Tensors = dict[str, Tensor]
_SHOWN = 4  # names in a line
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Rule(ABC):
    """One tensor of ours, and those of theirs that it is made of.

    Args:
        ours: Its name.
        theirs: Their names.
    """

    ours: str
    theirs: tuple[str, ...]

    @abstractmethod
    def read(self, theirs: Sequence[Tensor]) -> Tensor:
        """Make ours of theirs."""

    @abstractmethod
    def write(self, ours: Tensor, kept: Mapping[str, Tensor]) -> list[Tensor]:
        """Make theirs of ours, and of what `keep` gave."""

    def keep(self, theirs: Sequence[Tensor]) -> Tensors:
        """What ours has no place for, by name."""
        return {}


class Same(Rule):
    """The same tensor."""

    def read(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0]

    def write(self, ours: Tensor, kept: Mapping[str, Tensor]) -> list[Tensor]:
        return [ours]


class Transposed(Rule):
    """A matrix that they keep as (I, O), as GPT-2's Conv1D does, and we as (O, I)."""

    def read(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0].t()

    def write(self, ours: Tensor, kept: Mapping[str, Tensor]) -> list[Tensor]:
        return [ours.t()]


class Stacked(Rule):
    """Tensors of one shape that we keep one below the other: queries, keys, values."""

    def read(self, theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(theirs))

    def write(self, ours: Tensor, kept: Mapping[str, Tensor]) -> list[Tensor]:
        return list(ours.chunk(len(self.theirs)))


class Flat(Rule):
    """A bias that they keep as (1, V) and we as (V,)."""

    def read(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0][0]

    def write(self, ours: Tensor, kept: Mapping[str, Tensor]) -> list[Tensor]:
        return [ours[None]]


class LaterRows(Rule):
    """A table of positions whose first two rows are never used: theirs (2 + P, D), ours (P, D)."""

    OFFSET = 2

    def read(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0][self.OFFSET :]

    def write(self, ours: Tensor, kept: Mapping[str, Tensor]) -> list[Tensor]:
        first = kept.get(self.theirs[0])
        if first is None:
            first = ours.new_zeros(self.OFFSET, ours.shape[1])
        return [torch.cat([first, ours])]

    def keep(self, theirs: Sequence[Tensor]) -> Tensors:
        return {self.theirs[0]: theirs[0][: self.OFFSET].clone()}


@dataclass(frozen=True)
class Table:
    """All tensors of a network in both formats.

    Args:
        rules: One for each tensor of ours that is not tied to another.
        ours_tied: Tensors of ours that are the same as others: name -> name of the other.
        theirs_tied: Tensors of theirs that are the same as others and may be absent, likewise.
        zero_if_absent: Tensors of theirs that are 0 where a file has none.
        ignored: Ends of the names of tensors of theirs that are computed and not learned.
    """

    rules: list[Rule]
    ours_tied: Mapping[str, str] = field(default_factory=dict)
    theirs_tied: Mapping[str, str] = field(default_factory=dict)
    zero_if_absent: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()

    def check_names(self, theirs: Mapping[str, Tensor], where: str) -> None:
        """Refuse missing and unexpected tensors, before a network is built.

        Args:
            theirs: The tensors of the folder.
            where: The path, for errors.

        Raises:
            WeightsError: A tensor is missing or unexpected.
        """
        given = {name for name in theirs if not name.endswith(self.ignored)}
        given = {self.theirs_tied.get(name, name) for name in given}
        names = {name for rule in self.rules for name in rule.theirs}
        missing = sorted(names - given - self.zero_if_absent)
        if missing:
            raise WeightsError(f"{where} has no tensor {listed(missing)}")
        extra = sorted(given - names)
        if extra:
            raise WeightsError(
                f"{where} has tensors that its architecture does not have: {listed(extra)}"
            )

    def read(
        self, theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], where: str
    ) -> tuple[Tensors, Tensors]:
        """Make all tensors of ours, and what has to be kept to write theirs again.

        Args:
            theirs: Their tensors; `check_names` has accepted them.
            shapes: The shapes of ours.
            where: What the error names.

        Raises:
            WeightsError: A tensor is of another shape or type, not finite, or differs from the one
                that it should be tied to.
        """
        given = {n: tensor for n, tensor in theirs.items() if not n.endswith(self.ignored)}
        for name, tensor in given.items():
            _check_plain(name, tensor, where)
        given = self._untied(given, where)
        ours: Tensors = {}
        kept: Tensors = {}
        for rule in self.rules:
            expected = rule.write(torch.empty(shapes[rule.ours], device="meta"), {})
            parts = [
                given[name] if name in given else torch.zeros(like.shape)
                for name, like in zip(rule.theirs, expected, strict=True)
            ]
            for name, part, like in zip(rule.theirs, parts, expected, strict=True):
                if part.shape != like.shape:
                    raise WeightsError(
                        f"{where}: {name} is {tuple(part.shape)}, but by config.json it would be "
                        f"{tuple(like.shape)}"
                    )
            require_finite(dict(zip(rule.theirs, parts, strict=True)), where)
            ours[rule.ours] = rule.read(parts)
            kept.update(rule.keep(parts))
        for name, other in self.ours_tied.items():
            ours[name] = ours[other]
        return ours, kept

    def _untied(self, theirs: Mapping[str, Tensor], where: str) -> Tensors:
        """Theirs without what is tied; tied tensors must be equal."""
        given = dict(theirs)
        for name, other in self.theirs_tied.items():
            if name not in given:
                continue
            tensor = given.pop(name)
            if other not in given:
                given[other] = tensor
            elif tensor.shape != given[other].shape or not torch.equal(tensor, given[other]):
                raise WeightsError(
                    f"{where}: {name} differs from {other}, but config.json ties them: weights "
                    "that are tied in name only cannot be represented"
                )
        return given

    def write(self, ours: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensors:
        """Make all tensors of theirs that are not tied to others; the inverse of `read`.

        A bias that we do not have is 0.
        """
        theirs: Tensors = {}
        for rule in self.rules:
            tensor = ours.get(rule.ours)
            if tensor is None:
                weight = ours[f"{rule.ours.removesuffix('bias')}weight"]
                tensor = weight.new_zeros(len(weight))
            for name, part in zip(rule.theirs, rule.write(tensor, kept), strict=True):
                theirs[name] = part.contiguous()
        return theirs


def _check_plain(name: str, tensor: Tensor, where: str) -> None:
    """Refuse a tensor of another dtype, and one that does not store all its elements."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype not in _NUMBERS:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NUMBERS)
        raise WeightsError(f"{where}: {name} has type {kind}; supported: {supported}")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise WeightsError(f"{where}: {name} does not store all its elements")


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors with NaN or infinity, including values that overflow float32.

    Args:
        tensors: The tensors by name.
        where: The path, for errors.

    Raises:
        WeightsError: A tensor has such a value.
    """
    if found := not_finite(tensors):
        raise WeightsError(f"{where}: {found}: the training diverged or the file is damaged")


def affine(rule: type[Rule], ours: str, *theirs: str) -> list[Rule]:
    """Rules for a weight and a bias; only a weight can be transposed."""
    bias = Same if rule is Transposed else rule
    return [
        rule(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs)),
        bias(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)),
    ]


def same(ours: str, theirs: str) -> Rule:
    """The rule of one tensor that is the same in both."""
    return Same(ours, (theirs,))


def listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
