"""What a checkpoint file must hold before anything is done with it: each entry of the right type.

Torch has read the file by then, without running code. A file can still hold any plain values and
tensors anywhere.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_VERSION = re.compile(r"\d+(\.\d+)+([.+\-\w]*)")
_DEEPEST = 50
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
    for name, value in checkpoint["state_dict"].items():
        if isinstance(value, Tensor):
            check_tensor(f"state_dict.{name}", value)


def check_tensor(name: str, value: Tensor) -> None:
    """Refuse a tensor that is no plain array, or claims to be larger than what is stored.

    Raises:
        WrongEntry: It is.
    """
    plain = value.layout == torch.strided and not (value.is_quantized or value.is_nested)
    if not plain or value.is_meta:
        raise WrongEntry(f"is damaged: '{name}' is not a plain tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
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
    state = value.get("state") if isinstance(value, dict) else None
    return isinstance(state, dict) and all(isinstance(item, dict) for item in state.values())


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
    "lr_schedulers": (_list(_dict(_anything)), "a list of states"),
    "callbacks": (_dict(_anything), "a mapping"),
    "loops": (_dict(_anything), "a mapping"),
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
