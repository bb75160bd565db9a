"""What a checkpoint file must hold before anything is done with it: each entry of the right type.

Torch has read the file by then, without running code. A file can still hold any plain values and
tensors anywhere.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_VERSION = re.compile(r"\d+(\.\d+)+([.+\-\w]*)")
_DEEPEST = 50
_PROGRESS = {"ready", "started", "processed", "completed"}  # what Lightning's loops count
Check = Callable[[Any], bool]


class WrongEntry(ValueError):
    """An entry is missing, or not what it has to be: the end of a sentence about the file."""


def check_entries(checkpoint: Mapping[str, Any], record: str) -> None:
    """Refuse a checkpoint in which something is not of its type.

    Args:
        checkpoint: Its entries.
        record: The name of our own, which is there.

    Raises:
        WrongEntry: Which one, and what it should be.
    """
    _require(checkpoint, _REQUIRED, required=True)
    _require(checkpoint, _OPTIONAL, required=False)
    _require(checkpoint[record], _RECORD, required=True, inside=f"{record}.")
    _require(checkpoint[record], _RECORD_OPTIONAL, required=False, inside=f"{record}.")
    for name, value in _tensors(checkpoint):
        _check_tensor(name, value)


def _tensors(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are computed with, by name."""
    named: dict[str, Any] = {
        f"state_dict.{name}": v for name, v in checkpoint["state_dict"].items()
    }
    for optimizer in checkpoint.get("optimizer_states", []):
        for parameter, state in optimizer["state"].items():
            named |= {f"optimizer_states.{parameter}.{key}": v for key, v in state.items()}
    yield from ((name, value) for name, value in named.items() if isinstance(value, Tensor))


def _check_tensor(name: str, value: Tensor) -> None:
    """Refuse a tensor that is no plain array, or claims to be larger than what is stored.

    Kernels that take it for an array would read and write beyond its memory.

    Raises:
        WrongEntry: It is.
    """
    plain = value.layout == torch.strided and not (value.is_quantized or value.is_nested)
    lazy = value.is_meta or value.is_neg() or value.is_conj()
    if not plain or lazy:
        raise WrongEntry(f"is damaged: '{name}' is not a plain tensor")
    end = (value.storage_offset() + value.numel()) * value.element_size()
    if end > value.untyped_storage().nbytes():
        raise WrongEntry(f"is damaged: '{name}' is larger than what is stored of it")


def _require(
    entries: Mapping[str, Any], checks: Mapping[str, "Entry"], *, required: bool, inside: str = ""
) -> None:
    for name, (check, what) in checks.items():
        if name not in entries:
            if required:
                raise WrongEntry(f"is damaged: it has no '{inside}{name}'")
        elif not check(entries[name]):
            raise WrongEntry(f"is damaged: '{inside}{name}' is not {what}")


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _text(value: Any) -> bool:
    return type(value) is str


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _dict(check: Check) -> Check:
    return lambda value: (
        isinstance(value, dict) and all(_text(key) and check(item) for key, item in value.items())
    )


def _anything(value: Any) -> bool:
    return True


def _weights(value: Any) -> bool:
    """Tensors by name; what a module keeps besides has a name that says so."""
    return isinstance(value, dict) and all(
        _text(name) and (isinstance(item, Tensor) or name.endswith("_extra_state"))
        for name, item in value.items()
    )


def _optimizer(value: Any) -> bool:
    """A state for each parameter, of tensors and numbers."""
    state = value.get("state") if isinstance(value, dict) else None
    return isinstance(state, dict) and all(_dict(_state)(item) for item in state.values())


def _state(value: Any) -> bool:
    return isinstance(value, Tensor | list) or value is None or type(value) in (bool, int, float)


def _scheduler(value: Any) -> bool:
    counts = ("last_epoch", "_step_count")
    return _dict(_anything)(value) and all(type(value.get(key, 0)) is int for key in counts)


def _loops(value: Any, depth: int = 0) -> bool:
    """Nested mappings in which all progress is counted."""
    if not isinstance(value, dict) or depth > _DEEPEST:
        return not isinstance(value, dict)
    if value.keys() & _PROGRESS:
        return all(_count(item) for item in value.values())
    return all(_loops(item, depth + 1) for item in value.values())


def _averaged(value: Any) -> bool:
    return (
        _dict(_anything)(value)
        and _list(_text)(value.get("files"))
        and _list(_count)(value.get("steps"))
    )


def _imported(value: Any) -> bool:
    return (
        _dict(_anything)(value)
        and all(isinstance(value.get(key), dict) for key in ("config", "generation", "kept"))
        and _json(value["config"])
        and _json(value["generation"])
        and _weights(value["kept"])
    )


def _json(value: Any, depth: int = 0) -> bool:
    """Whether a value can be written as JSON."""
    if isinstance(value, dict | list) and depth < _DEEPEST:
        items = value.values() if isinstance(value, dict) else value
        keys = isinstance(value, list) or all(map(_text, value))
        return keys and all(_json(item, depth + 1) for item in items)
    return value is None or type(value) in (bool, int, float, str)


def _version(value: Any) -> bool:
    return _text(value) and _VERSION.fullmatch(value) is not None


Entry = tuple[Check, str]
_REQUIRED: dict[str, Entry] = {
    "state_dict": (_weights, "tensors by name"),
    "global_step": (_count, "a number of steps"),
}
_OPTIONAL: dict[str, Entry] = {
    "epoch": (_count, "a number of epochs"),
    "pytorch-lightning_version": (_version, "a version"),
    "optimizer_states": (_list(_optimizer), "a list of states"),
    "lr_schedulers": (_list(_scheduler), "a list of states"),
    "callbacks": (_dict(_anything), "a mapping"),
    "loops": (lambda value: _dict(_anything)(value) and _loops(value), "progress"),
    "metrics": (_dict(_number), "numbers by name"),
    "metrics_size": (_count, "a number of bytes"),
    "sizes": (_dict(_count), "numbers of bytes by name"),
    "wandb_rows": (_or_none(_count), "a number of rows"),
    "train_sums": (lambda value: _list(_number)(value) and len(value) == 2, "two sums"),
    "averaged": (_averaged, "files and steps"),
    "averaged_weights": (_list(_text), "a list of digests"),
    "imported": (_imported, "a configuration"),
}
_RECORD: dict[str, Entry] = {
    "versions": (_dict(_text), "versions by name"),
    "task": (_or_none(_dict(_anything)), "settings"),
    "tokenizers": (_or_none(_dict(_text)), "tokenizers by side"),
    "labels": (_or_none(_list(_text)), "a list of texts"),
    "n_texts": (lambda value: value is None or (_count(value) and value in (1, 2)), "1 or 2"),
}
_RECORD_OPTIONAL: dict[str, Entry] = {"undescribed": (_dict(_text), "reasons by name")}
