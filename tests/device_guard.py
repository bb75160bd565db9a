"""Finds on a CPU what a GPU would wait for, and what an Apple device does not have."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result, or its shape, the host must know: it waits until the device has it.
WAITS = {
    "_local_scalar_dense", "item", "equal", "allclose", "is_nonzero", "nonzero", "nonzero_numpy",
    "argwhere", "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2",
    "bincount", "histc",
}  # fmt: skip
READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
OURS = ("tx_lightning", "tests")


class DeviceError(AssertionError):
    """Code that would be slow on a GPU or fail on an Apple device; names the line."""


class OnHost(Tensor):
    """A tensor that was brought to the host: to look at it costs nothing any more."""


class DeviceGuard:
    """What was found.

    Attributes:
        waits: Where the host waited for the device, each time: an operator, a file and a line.
    """

    def __init__(self, allowed: int, *, float64: bool = False) -> None:
        self.allowed = allowed
        self.float64 = float64
        self.waits: list[str] = []

    def wait(self, what: str) -> None:
        """Note a wait, and refuse it where it is one too many."""
        self.waits.append(f"{what} at {_line(sys._getframe())}")
        if len(self.waits) > self.allowed:
            raise DeviceError(f"the host waits for the device: {'; '.join(self.waits)}")


@contextmanager
def device_guard(allowed_waits: int = 0, *, float64: bool = False) -> Iterator[DeviceGuard]:
    """Refuse waits for the device, float64, and tensors made without saying on which device.

    It runs on a CPU and looks at each operator and at each call of torch from this package.

    Args:
        allowed_waits: How often the host may wait for the device.
        float64: Whether there may be numbers of that type, which NVIDIA's devices have.

    Raises:
        DeviceError: Where one of these happens.
    """
    guard = DeviceGuard(allowed_waits, float64=float64)
    calls, run = _Calls(guard), torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def watched(*args: Any, **kwargs: Any) -> Any:
        with calls:  # torch lifts such modes when it calls the engine of its gradients
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = watched  # type: ignore[attr-defined]
    try:
        with calls, _Operators(guard):
            yield guard
    finally:
        torch.autograd._engine_run_backward = run  # type: ignore[attr-defined]


class _Operators(TorchDispatchMode):
    def __init__(self, guard: DeviceGuard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.guard = guard

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in WAITS and not any(isinstance(tensor, OnHost) for tensor in tensors):
            self.guard.wait(name)
        elif _selects_by_mask(name, args) or (name == "repeat_interleave" and len(args) == 1):
            self.guard.wait(f"{name} by a mask or by numbers on the device")
        result = func(*args, **(kwargs or {}))
        for leaf in [] if self.guard.float64 else tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype in (torch.float64, torch.complex128):
                where = _line(sys._getframe())
                raise DeviceError(f"{name} makes a {leaf.dtype}, which Apple's lack: {where}")
        return result


def _selects_by_mask(name: str, args: Any) -> bool:
    """Whether elements are chosen by a boolean mask; one value for all of them needs no choice."""
    if name.rstrip("_") not in ("index", "index_put", "_index_put_impl", "_unsafe_index"):
        return False
    masks = [index for index in args[1] if index is not None and index.dtype in _MASKS]
    one_value = len(args) > 2 and args[2].numel() == 1
    return bool(masks) and not one_value


_MASKS = (torch.bool, torch.uint8)


class _Calls(TorchFunctionMode):
    def __init__(self, guard: DeviceGuard) -> None:
        super().__init__()
        self.guard = guard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        makes = func in _device_constructors() or func is torch.as_tensor
        if makes and named.get("device") is None and _is_ours(sys._getframe()):
            where = _line(sys._getframe())
            raise DeviceError(f"{func.__name__} does not say on which device: {where}")
        if not (func in READS or _moves_to_host(func, args, named)):
            return func(*args, **named)
        if not isinstance(args[0], OnHost):
            self.guard.wait(func.__name__)
        result = func(*args, **named)
        return result.as_subclass(OnHost) if isinstance(result, Tensor) else result


def _moves_to_host(func: Any, args: Any, named: dict[str, Any]) -> bool:
    """Whether "cpu" is asked for; a `torch.device` may here be that of the batch."""
    return func is Tensor.to and "cpu" in [
        value for value in (*args[1:], *named.values()) if isinstance(value, str)
    ]


def _caller(frame: FrameType) -> FrameType:
    """The innermost frame outside of torch and of this file."""
    found: FrameType | None = frame
    while found is not None:
        module = str(found.f_globals.get("__name__", ""))
        if module != __name__ and module.partition(".")[0] != "torch":
            return found
        found = found.f_back
    return frame


def _is_ours(frame: FrameType) -> bool:
    return str(_caller(frame).f_globals.get("__name__", "")).partition(".")[0] in OURS


def _line(frame: FrameType) -> str:
    caller = _caller(frame)
    return f"{caller.f_code.co_filename}:{caller.f_lineno}"
