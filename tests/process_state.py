"""The switches of a process that a test may leave changed, each with a way to restore it."""

import gc
import locale
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

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
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


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
    loggers = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    return {
        x.name: (x.level, x.propagate, x.disabled, x.handlers[:], x.filters[:])
        for x in [logging.root, *loggers]
    }


def _set_loggers(wanted: Mapping[str, tuple[Any, ...]]) -> None:
    for name, (level, propagate, disabled, handlers, filters) in wanted.items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
        logger.handlers[:], logger.filters[:] = handlers, filters


def _hooks() -> dict[str, Any]:
    names = ("stdin", "stdout", "stderr", "excepthook", "unraisablehook", "displayhook")
    return {name: vars(sys)[name] for name in names}


def _set_hooks(wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        setattr(sys, name, value)


def _stance() -> str:
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    return "default" if dynamo is None else str(dynamo._stance.stance)


def _modes() -> tuple[int, int]:
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def _set_modes(wanted: tuple[int, int]) -> None:
    while _modes()[0] > wanted[0]:
        torch._C._pop_torch_function_stack()
    while _modes()[1] > wanted[1]:
        torch._C._pop_torch_dispatch_stack()


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


PROBES = [
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
    Probe("torch modes", _modes, _set_modes),
    Probe("default device", torch.get_default_device, lambda _: torch.set_default_device(None)),
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
        lambda old: torch.inference_mode(old).__enter__(),
    ),
    Probe("autocast", _autocast, _set_autocast),
    Probe("anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    Probe("compiler stance", _stance, torch.compiler.set_stance),
    Probe("attention kernel", _kernels, _set_kernels),
]
