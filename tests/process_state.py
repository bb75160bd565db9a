"""The switches of a process that a test may leave changed, each with a way to restore it."""

import gc
import locale
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import overrides
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext

# SIGCHLD: torch installs a handler with the first worker process of a DataLoader, once for all.
SIGNALS = [s for s in signal.Signals if s not in {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}]


class Probe(NamedTuple):
    """One part of the state of the process.

    Attributes:
        what: Its name in the report.
        read: Return its value: a mapping, or anything that can be compared.
        restore: Restore a value that `read` returned.
    """

    what: str
    read: Callable[[], Any]
    restore: Callable[[Any], object]


def _environment() -> dict[str, str]:
    """The environment without what pytest, and joblib when it is imported, set."""
    theirs = ("PYTEST_CURRENT_TEST", "KMP_INIT_AT_FORK")
    return {name: value for name, value in os.environ.items() if name not in theirs}


def _set_environment(wanted: Mapping[str, str]) -> None:
    for name in _environment().keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


def _directory() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "a folder that was deleted"


def _signals() -> dict[str, Any]:
    return {s.name: signal.getsignal(s) for s in SIGNALS}


def _set_signals(wanted: Mapping[str, Any]) -> None:
    for name, handler in wanted.items():
        signal.signal(signal.Signals[name], handler)


def _loggers() -> dict[str, tuple[Any, ...]]:
    """The settings of each logger, without the handlers of pytest.

    The one of torch.compile puts a handler aside once it has found that it has nothing to write.
    """
    loggers = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    return {
        x.name: (x.level, x.propagate, x.disabled, _handlers(x), x.filters[:])
        for x in [logging.root, *loggers]
        if x.name != "torch.__trace"
    }


def _handlers(logger: logging.Logger) -> list[logging.Handler]:
    return [x for x in logger.handlers if not type(x).__module__.startswith("_pytest")]


def _set_loggers(wanted: Mapping[str, tuple[Any, ...]]) -> None:
    for name, (level, propagate, disabled, handlers, filters) in wanted.items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
        of_pytest = [x for x in logger.handlers if x not in _handlers(logger)]
        logger.handlers[:], logger.filters[:] = handlers + of_pytest, filters


def _hooks() -> dict[str, Any]:
    names = ("stdin", "stdout", "stderr", "excepthook", "unraisablehook", "displayhook")
    return {"thread": threading.excepthook} | {name: vars(sys)[name] for name in names}


def _set_hooks(wanted: Mapping[str, Any]) -> None:
    threading.excepthook = wanted["thread"]
    for name in wanted.keys() - {"thread"}:
        setattr(sys, name, wanted[name])


def _stance() -> str:
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    return "default" if dynamo is None else str(dynamo._stance.stance)


def _modes() -> list[str]:
    """The active modes of torch; a default device is one."""
    functions = overrides._get_current_function_mode_stack()
    return [
        f"default device {mode.device}" if isinstance(mode, DeviceContext) else repr(mode)
        for mode in [*functions, *_python_dispatch._get_current_dispatch_mode_stack()]
    ]


def _set_modes(_: list[str]) -> None:
    while torch._C._len_torch_dispatch_stack():
        _python_dispatch._pop_mode()
    while torch._C._len_torch_function_stack():
        if isinstance(overrides._get_current_function_mode(), DeviceContext):
            torch.set_default_device(None)
        else:
            overrides._pop_mode()


def _kernels() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "mem_efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }


def _set_kernels(wanted: Mapping[str, bool]) -> None:
    for name, enabled in wanted.items():
        vars(torch.backends.cuda)[f"enable_{name}_sdp"](enabled)


def _autocast() -> dict[str, tuple[bool, torch.dtype]]:
    return {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    }


def _set_autocast(wanted: Mapping[str, tuple[bool, torch.dtype]]) -> None:
    for device, (enabled, dtype) in wanted.items():
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _figures() -> int:
    pylab: Any = sys.modules.get("matplotlib._pylab_helpers")
    return 0 if pylab is None else len(pylab.Gcf.figs)


def _set_sys_path(wanted: list[str]) -> None:
    sys.path[:] = wanted


def _set_rank(wanted: int) -> None:
    vars(rank_zero_only)["rank"] = wanted


_entered: list[torch.inference_mode] = []  # each ends with its object


def _set_inference_mode(wanted: bool) -> None:
    _entered.append(torch.inference_mode(wanted))
    _entered[-1].__enter__()


PROBES = [
    Probe("modes of torch", _modes, _set_modes),  # first: one may change what the others do
    Probe("process group", dist.is_initialized, lambda _: dist.destroy_process_group()),
    Probe("environment variable", _environment, _set_environment),
    Probe("current directory", _directory, os.chdir),
    Probe("sys.path", sys.path.copy, _set_sys_path),
    Probe("handler of", _signals, _set_signals),
    Probe("logger", _loggers, _set_loggers),
    Probe("logging.disable", lambda: logging.root.manager.disable, logging.disable),
    Probe("sys", _hooks, _set_hooks),
    Probe(
        "locale",
        lambda: locale.setlocale(locale.LC_ALL),
        lambda old: locale.setlocale(locale.LC_ALL, old),
    ),
    Probe("numpy errstate", np.geterr, lambda old: np.seterr(**old)),
    Probe("numpy print option", np.get_printoptions, lambda old: np.set_printoptions(**old)),
    Probe("gc enabled", gc.isenabled, lambda old: gc.enable() if old else gc.disable()),
    Probe("matplotlib figures", _figures, lambda _: sys.modules["matplotlib.pyplot"].close("all")),
    Probe("rank_zero_only.rank", lambda: vars(rank_zero_only)["rank"], _set_rank),
    Probe("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Probe("torch threads", torch.get_num_threads, torch.set_num_threads),
    Probe(
        "float32 matmul precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    Probe(
        "deterministic algorithms",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    Probe("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Probe(
        "inference mode",
        torch.is_inference_mode_enabled,
        _set_inference_mode,
    ),
    Probe("autocast", _autocast, _set_autocast),
    Probe("anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    Probe("compiler stance", _stance, torch.compiler.set_stance),
    Probe("attention kernel", _kernels, _set_kernels),
]
