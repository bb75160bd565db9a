"""A task's training, evaluation and decoding do not make the host wait for a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.device_guard import device_guard
from tests.small import MAKERS, make, make_trainer

Watch = Callable[..., list[list[str]]]
ANSWERS = {"Classification": 1, "Tagging": 1}  # the waits of a batch, which is shown to people


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Have each call of a method run under the guard; return the waits of each."""

    def watch(owner: Any, name: str, **options: Any) -> list[list[str]]:
        method = getattr(owner, name)
        waits: list[list[str]] = []

        def watched(*args: Any, **kwargs: Any) -> Any:
            with device_guard(**options) as guard:
                result = method(*args, **kwargs)
            waits.append(guard.waits)
            return result

        monkeypatch.setattr(owner, name, watched)
        return waits

    return watch


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", MAKERS)
def test_training_does_not_wait(name: str, precision: Any, watch: Watch, tmp_path: Path) -> None:
    """Micro-batches, clipping and the optimizer included, where nothing is logged."""
    task, data = make(name)
    micro_batches, steps = watch(task, "training_step"), watch(task, "optimizer_step")
    options: dict[str, Any] = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    trainer = make_trainer(
        tmp_path, max_steps=4, log_every_n_steps=100, precision=precision, **options
    )
    trainer.fit(task, datamodule=data)
    assert (len(micro_batches), len(steps)) == (8, 4)


@pytest.mark.parametrize("name", MAKERS)
def test_only_steps_that_log_wait(name: str, watch: Watch, tmp_path: Path) -> None:
    task, data = make(name)
    # What callbacks monitor is float64, on the host.
    steps = watch(task, "optimizer_step", allowed_waits=2, float64=True)
    make_trainer(tmp_path, max_steps=4, log_every_n_steps=2).fit(task, datamodule=data)
    assert [len(waits) for waits in steps] == [0, 2, 0, 2]  # the loss and the norm


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_waits_for_answers_alone(
    verb: str, name: str, watch: Watch, tmp_path: Path
) -> None:
    """Metrics wait for nothing; a search waits once a step, besides its limits and its end."""
    task, data = make(name)
    decoded = watch(task.network, "step") if name == "Translation" else []
    evaluated = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
    # On NVIDIA's devices the sums of metrics are float64.
    batches = watch(task, evaluated[verb], allowed_waits=1000, float64=True)
    verbs: Any = make_trainer(tmp_path, limit_val_batches=1.0)
    getattr(verbs, verb)(task, datamodule=data)
    waits = [wait for found in batches for wait in found]
    assert len(batches) > 0
    if decoded:
        assert 0 < len(waits) <= len(decoded) + 3 * len(batches), waits
    else:
        assert [len(found) for found in batches] == [ANSWERS.get(name, 0)] * len(batches), waits
