"""Checkpoints: whole or not there, enough by themselves, and one line when they are not ours."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stand_ins import TinyTask
from tx_lightning import checkpoints
from tx_lightning.checkpoints import AtomicCheckpointIO, CheckpointError, Rebuildable
from tx_lightning.rebuilding import saved_location

SETTINGS = {"class_path": "tests.stand_ins.TinyTask", "init_args": {"vocab_size": 6, "dim": 2}}


def checkpoint(step: int = 3, **changed: Any) -> dict[str, Any]:
    task = TinyTask(6, dim=2)
    whole: dict[str, Any] = {
        "state_dict": task.state_dict(),
        "global_step": step,
        "optimizer_states": [],
        "tx_lightning": checkpoints.checkpoint_record(SETTINGS, {"source": "{}", "target": "{}"}),
    }
    return whole | changed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.ckpt"
    checkpoints.write_atomically(checkpoint(), path)
    return path


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process may grow beyond 4 kB: a real failure in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_task_is_rebuilt_from_the_file_alone(file: Path) -> None:
    task = checkpoints.load_task(file, trust="tests")
    assert isinstance(task, TinyTask)
    assert task.layer.in_features == 2
    assert task.settings == SETTINGS
    assert not task.training
    stored: dict[str, Tensor] = torch.load(file, weights_only=True)["state_dict"]
    for name, tensor in task.state_dict().items():
        assert torch.equal(tensor, stored[name])


def test_only_a_task_with_settings_is_rebuildable() -> None:
    assert isinstance(TinyTask(6), Rebuildable)
    assert not isinstance(torch.nn.Linear(1, 1), Rebuildable)


def test_a_truncated_file_is_named(file: Path) -> None:
    whole = file.read_bytes()
    for share in (0.0, 0.3, 0.99):
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointError, match=r"model\.ckpt cannot be read: it is truncated$"):
            checkpoints.read_checkpoint(file)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.ckpt"
    text.write_text("dear diary")
    with pytest.raises(CheckpointError, match=r"it is not a checkpoint$"):
        checkpoints.read_checkpoint(text)


def test_python_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "objects.ckpt"
    torch.save({"state_dict": {}, "path": path}, path)
    with pytest.raises(CheckpointError, match="holds Python objects"):
        checkpoints.read_checkpoint(path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tx_lightning": None}, "was not written by tx_lightning"),
        ({"tx_lightning": checkpoints.checkpoint_record(SETTINGS, {}) | {"format": 3}}, "format 3"),
    ],
)
def test_checkpoints_of_others_are_refused(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(checkpoint(**changed), path)
    with pytest.raises(CheckpointError, match=says):
        checkpoints.read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="no 'state_dict'"):
        checkpoints.read_checkpoint(path)


@pytest.mark.parametrize(
    ("settings", "tokenizers", "says"),
    [
        (SETTINGS, None, "has no tokenizers"),
        (None, {"source": "{}"}, "has no model settings"),
        (
            {"class_path": "tests.stand_ins.TinyTask", "init_args": {"vocab_size": 6, "dims": 2}},
            {"source": "{}"},
            "settings are not accepted .*dims",
        ),
        (
            {"class_path": "tests.stand_ins.TinyTask", "init_args": {"vocab_size": 7, "dim": 2}},
            {"source": "{}"},
            "the weights do not fit tests.stand_ins.TinyTask: size mismatch for layer.weight",
        ),
    ],
)
def test_what_is_missing_to_rebuild_a_task_is_said(
    tmp_path: Path, settings: dict[str, Any] | None, tokenizers: dict[str, str] | None, says: str
) -> None:
    path = tmp_path / "model.ckpt"
    record = checkpoints.checkpoint_record(settings, tokenizers)
    torch.save(checkpoint(tx_lightning=record), path)
    with pytest.raises(CheckpointError, match=says) as caught:
        checkpoints.load_task(path, trust="tests")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_those_beside_it(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file; .* has model\.ckpt"):
        checkpoints.read_checkpoint(file.with_name("modle.ckpt"))


@pytest.mark.usefixtures("small_disk")
def test_a_write_that_fails_leaves_the_previous_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()
    large = checkpoint(step=4, more=torch.ones(10_000))
    with pytest.raises(CheckpointError, match="earlier checkpoints are untouched") as caught:
        AtomicCheckpointIO().save_checkpoint(large, file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_name_holds_a_whole_file_at_every_moment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When torch has written half of the new file, the old one is still there."""
    seen: list[int] = []

    def half(value: Any, stream: Any) -> None:
        stream.write(b"PK half")
        stream.flush()
        seen.append(checkpoints.read_checkpoint(file)["global_step"])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_atomically(checkpoint(step=4), file)
    assert seen == [3]
    assert checkpoints.read_checkpoint(file)["global_step"] == 3


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for name, step in (("b", 20), ("a", 30), ("c", 10)):
        checkpoints.write_atomically(checkpoint(step), tmp_path / f"{name}.ckpt")
    averaged = checkpoint(40)
    del averaged["optimizer_states"]
    checkpoints.write_atomically(averaged, tmp_path / "averaged.ckpt")
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "a.ckpt"
    assert checkpoints.newest_checkpoint(tmp_path / "nowhere") is None


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.write_atomically(checkpoint(1), tmp_path / "good.ckpt")
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "good.ckpt").read_bytes()[:500])
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "good.ckpt"
    said = capsys.readouterr().err
    assert "torn.ckpt" in said
    assert "last.ckpt" in said


def test_a_run_does_not_start_again_when_none_of_its_checkpoints_loads(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoints.newest_checkpoint(tmp_path)


def test_a_folder_of_shards_is_not_passed_over(tmp_path: Path) -> None:
    """Else a run of which there is nothing else would begin anew."""
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"last\.ckpt is a folder, not one of ours"):
        checkpoints.newest_checkpoint(tmp_path)


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    """As root, a checkpoint written to /dev/null would otherwise take its place."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder):
        with pytest.raises(CheckpointError, match="could not be written: there is something else"):
            checkpoints.write_atomically({"state_dict": {}}, path)
    assert pipe.is_fifo()
    assert folder.is_dir()
    assert {entry.name for entry in tmp_path.iterdir()} == {"pipe", "folder"}


def test_nothing_is_unpickled_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "objects.ckpt"
    torch.save({**checkpoint(), "path": path}, path)
    with pytest.raises(CheckpointError, match="holds Python objects"):
        checkpoints.read_checkpoint(path)
    for weights_only in (None, True):
        with pytest.raises(UnpicklingError, match="Weights only load failed"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    with pytest.raises(ValueError, match="weights_only=False"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)


def test_tensors_go_where_they_were_saved_if_there_is_such_a_device() -> None:
    storage = torch.zeros(2).untyped_storage()
    assert saved_location(storage, "cpu") is None
    if not torch.cuda.is_available():
        there = saved_location(storage, "cuda:0")
        assert there is not None
        assert there.device.type == "cpu"
