"""Devices that are not here: Apple's without float64, checkpoints of GPUs, processes with GPUs.

Stand-ins say what such a device would say; tests/test_gpu.py asks real ones.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small import MAKERS, make, make_trainer
from tx_lightning.checkpoints import read_checkpoint
from tx_lightning.errors import ConfigurationError
from tx_lightning.metrics import ConfusionCounts, CorpusBLEU, CorpusChrF, SumMetric, TokenMean
from tx_lightning.tasks.companions import TrainerSettings

APPLE = torch.device("mps")


class OnApple(Tensor):
    """A tensor that says it is on an Apple device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return APPLE


def to_apple(tensor: Tensor) -> Tensor:
    """What `module.to("mps")` does to each of its tensors."""
    if tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
    return tensor.as_subclass(OnApple)


def metrics() -> nn.ModuleList:
    return nn.ModuleList([TokenMean(), CorpusBLEU(), CorpusChrF(), ConfusionCounts(3)])


def states(found: nn.Module) -> list[Tensor]:
    """The sums of all metrics."""
    return [
        state
        for metric in found.modules()
        if isinstance(metric, SumMetric)
        for state in metric.metric_state.values()
        if isinstance(state, Tensor)
    ]


def test_sums_stay_on_the_host_of_an_apple_device() -> None:
    found = metrics()._apply(to_apple)
    for metric in found:
        assert isinstance(metric, SumMetric)
        for name, state in metric.metric_state.items():
            assert type(state) is Tensor, name
            assert state.device.type == "cpu"
    mean = TokenMean()
    mean._apply(to_apple)
    mean.update(torch.tensor(1.5), 2)
    assert mean.compute().dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_keep_their_type_whatever_the_precision(dtype: torch.dtype) -> None:
    before = [state.dtype for state in states(metrics())]
    for convert in (nn.Module.to, nn.Module.type):
        assert [state.dtype for state in states(convert(metrics(), dtype))] == before


def test_sums_follow_the_module() -> None:
    assert {state.device.type for state in states(metrics().to("meta"))} == {"meta"}


def test_float64_is_refused_on_apple_devices(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(
        callbacks=[], precision="64-true", strategy=SimpleNamespace(root_device=APPLE)
    )
    with pytest.raises(ConfigurationError, match="trainer.precision=64-true: .* no float64; use"):
        TrainerSettings().on_fit_start(trainer, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MAKERS)
def test_scores_are_logged_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes with GPUs exchange nothing that is on the host, as most scores are."""
    task, _ = make(name)
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(type(task), "device", torch.device("meta"))
    monkeypatch.setattr(task, "log_dict", lambda values, **_: logged.update(values))
    bleu = CorpusBLEU()
    bleu.update(["a b c d"], ["a b c d"])
    values = {"mean": torch.tensor(1.0, dtype=torch.float32), "bleu": bleu.compute()}
    task.log_scores("val", metrics(), values)
    assert {name: (v.device.type, v.dtype) for name, v in logged.items()} == {
        "val/mean": ("meta", torch.float64),
        "val/bleu": ("meta", torch.float64),
    }


@pytest.fixture
def from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tensors saved as if they had been on a GPU."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")


@pytest.mark.usefixtures("from_a_gpu")
@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(name: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.ckpt"
    weights = []
    for steps, start in ((3, None), (5, saved)):
        task, data = make(name)
        trainer = make_trainer(tmp_path, max_steps=steps)
        trainer.fit(task, datamodule=data, ckpt_path=start)
        trainer.save_checkpoint(saved)
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
        torch.load(saved, weights_only=True)
    weights = read_checkpoint(saved)["state_dict"]
    assert all(weight.device.type == "cpu" for weight in weights.values())
    task, data = make(name)
    trainer = make_trainer(tmp_path, max_steps=5)
    trainer.fit(task, datamodule=data)
    assert all(torch.equal(value, weights[key]) for key, value in task.state_dict().items())
