import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tx_lightning.averaging import (
    average_checkpoints,
    best_checkpoints,
    distinct_checkpoints,
    last_checkpoints,
    main,
)
from tx_lightning.checkpoints import CheckpointError, checkpoint_record, require_finite
from tx_lightning.errors import ConfigurationError

SETTINGS = {"class_path": "tx_lightning.tasks.Translation", "init_args": {"vocab_size": 2}}


def save(
    folder: Path,
    step: int,
    *,
    name: str | None = None,
    settings: dict[str, Any] = SETTINGS,
    vocabulary: str = "{}",
    metrics: dict[str, float] | None = None,
    **weights: Tensor,
) -> Path:
    """Write a checkpoint as the trainer would."""
    path = folder / (name or f"step={step}.ckpt")
    checkpoint: dict[str, Any] = {
        "epoch": step // 10,
        "global_step": step,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": weights or {"weight": torch.tensor([float(step), 1.0])},
        "optimizer_states": [{"state": {}}],
        "lr_schedulers": [],
        "callbacks": {"LRWarmup": {"scheduled": None}},
        "loops": {},
        "tx_lightning": checkpoint_record(settings, {"source": vocabulary}),
    }
    if metrics is not None:
        checkpoint["metrics"] = metrics
    folder.mkdir(exist_ok=True)
    torch.save(checkpoint, path)
    return path


def load(path: Path) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True)
    assert isinstance(checkpoint, dict)
    return checkpoint


def test_the_mean_is_taken_in_float64_and_keeps_dtypes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    values = [torch.randn(3, 2) * 10**i for i in range(-3, 4)]
    halves = [torch.randn(4).bfloat16() for _ in values]
    count = torch.tensor([3, 4])
    paths = [
        save(tmp_path, step, single=single, half=half, count=count)
        for step, (single, half) in enumerate(zip(values, halves, strict=True))
    ]
    average_checkpoints(paths, tmp_path / "mean.ckpt")
    state = load(tmp_path / "mean.ckpt")["state_dict"]
    assert torch.equal(state["single"], torch.stack(values).double().mean(0).float())
    assert torch.equal(state["half"], torch.stack(halves).double().mean(0).bfloat16())
    assert torch.equal(state["count"], count)


def test_one_checkpoint_is_its_own_mean(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    average_checkpoints([path], tmp_path / "mean.ckpt")
    assert torch.equal(load(tmp_path / "mean.ckpt")["state_dict"]["weight"], torch.tensor([7.0, 1]))


def test_what_else_is_in_the_file(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (20, 30, 10)]
    average_checkpoints(paths, tmp_path / "new" / "mean.ckpt")
    checkpoint = load(tmp_path / "new" / "mean.ckpt")
    assert checkpoint["global_step"] == 30
    assert checkpoint["tx_lightning"] == load(paths[0])["tx_lightning"]
    assert checkpoint["averaged"] == {
        "files": ["step=20.ckpt", "step=30.ckpt", "step=10.ckpt"],
        "steps": [20, 30, 10],
    }
    assert not {"optimizer_states", "lr_schedulers", "callbacks", "loops"} & checkpoint.keys()
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "mean.ckpt"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"settings": {**SETTINGS, "init_args": {"vocab_size": 3}}},
            "settings of the model",
        ),
        ({"vocabulary": "{x}"}, "the tokenizers"),
        ({"weight": torch.zeros(3)}, "the shape of weight"),
        ({"weight": torch.zeros(2), "bias": torch.zeros(2)}, r"names of their weights \(bias\)"),
        ({"weight": torch.zeros(2, dtype=torch.int64)}, "weight, which is no float"),
    ],
)
def test_checkpoints_of_different_models_are_refused(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    paths = [save(tmp_path, 1), save(tmp_path, 2, **other)]
    with pytest.raises(CheckpointError, match=rf"step=1.ckpt and .*step=2.ckpt .*{message}"):
        average_checkpoints(paths, tmp_path / "mean.ckpt")
    assert not (tmp_path / "mean.ckpt").exists()


def test_integers_must_agree(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, weight=torch.ones(2), n=torch.tensor(step)) for step in (1, 2)]
    with pytest.raises(CheckpointError, match="n, which is no float"):
        average_checkpoints(paths, tmp_path / "mean.ckpt")


def test_nothing_to_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoints to average"):
        average_checkpoints([], tmp_path / "mean.ckpt")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    paths = [save(tmp_path, 1), save(tmp_path, 2)]
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step=2.ckpt cannot be read"):
        average_checkpoints(paths, tmp_path / "mean.ckpt")


def test_the_last_are_chosen_by_step_each_once(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        save(tmp_path, step)
    save(tmp_path, 100, name="last.ckpt")
    average_checkpoints([tmp_path / "step=3.ckpt"], tmp_path / "averaged.ckpt")
    assert [path.name for path in last_checkpoints(tmp_path, 5)][:2] == [
        "step=3.ckpt",
        "step=20.ckpt",
    ]
    assert len(last_checkpoints(tmp_path, 5)) == 3
    assert last_checkpoints(tmp_path, 2)[0] == tmp_path / "step=20.ckpt"


def test_the_best_are_chosen_by_a_metric(tmp_path: Path) -> None:
    for step, bleu in ((1, 10.0), (2, 30.0), (3, 20.0)):
        save(tmp_path, step, metrics={"val/bleu": bleu, "val/loss": bleu})
    save(tmp_path, 3, name="last.ckpt")  # the same step, without scores
    save(tmp_path, 4)
    assert [p.name for p in best_checkpoints(tmp_path, 2)] == ["step=2.ckpt", "step=3.ckpt"]
    assert best_checkpoints(tmp_path, 1, "val/loss") == [tmp_path / "step=1.ckpt"]
    assert best_checkpoints(tmp_path, 1, "val/accuracy") == []
    with pytest.raises(ConfigurationError, match="did you mean 'val/bleu'"):
        best_checkpoints(tmp_path, 1, "val/blue")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 9):
        save(folder, step, metrics={"val/bleu": -float(step)})
    assert main([str(tmp_path), "--last", "2"]) == 0
    assert load(folder / "averaged.ckpt")["averaged"]["steps"] == [4, 9]
    assert "averaged.ckpt" in capsys.readouterr().out
    assert main([str(tmp_path), "--best=2", f"--output={tmp_path}/best.ckpt"]) == 0
    assert load(tmp_path / "best.ckpt")["averaged"]["steps"] == [2, 4]
    files = [str(folder / f"step={step}.ckpt") for step in (9, 2)]
    assert main([*files, f"--output={tmp_path}/two.ckpt"]) == 0
    assert torch.equal(load(tmp_path / "two.ckpt")["state_dict"]["weight"], torch.tensor([5.5, 1]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--last", "1", "--best", "1"], "exclude each other"),
        (["--last", "0"], "0 checkpoints cannot be averaged"),
        (["--best", "1"], "no checkpoints with val/bleu"),
        (["--lost", "1"], "lost"),
    ],
)
def test_a_wrong_command_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main([str(tmp_path), *words])


def equal_weights(path: Path, *steps: int) -> bool:
    """Whether a file is the mean of those steps' weights, each once."""
    mean = torch.tensor([sum(steps) / len(steps), 1.0])
    return torch.equal(load(path)["state_dict"]["weight"], mean)


def test_no_file_counts_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`average RUN/checkpoints/*.ckpt`, again and again."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 6):
        save(folder, step)
    save(folder, 6, name="last.ckpt")
    for _ in range(3):
        files = sorted(str(path) for path in folder.glob("*.ckpt"))
        assert main(files) == 0
        assert equal_weights(folder / "averaged.ckpt", 1, 2, 6)
    said = capsys.readouterr().err
    assert f"left out {folder}/step=6.ckpt: it has the weights of {folder}/last.ckpt\n" in said
    assert f"left out {folder}/averaged.ckpt: it is an average of {folder}/last.ckpt, " in said
    # An average of averages is one of their parts too.
    assert main([str(folder / "averaged.ckpt"), f"--output={tmp_path}/again.ckpt"]) == 0
    one, two = str(tmp_path / "again.ckpt"), str(folder / "averaged.ckpt")
    assert main([one, two, f"--output={tmp_path}/both.ckpt"]) == 0
    assert equal_weights(tmp_path / "both.ckpt", 1, 2, 6)


def test_averages_of_different_runs_can_be_averaged(tmp_path: Path) -> None:
    """Their parts have the same names, but are others."""
    for name, steps in (("a", (1, 3)), ("b", (5, 7))):
        for number, step in enumerate(steps):
            save(tmp_path / name, step, name=f"{number}.ckpt")
        assert main([str(tmp_path / name)]) == 0
    averages = [str(tmp_path / name / "averaged.ckpt") for name in "ab"]
    assert main([*averages, f"--output={tmp_path}/both.ckpt"]) == 0
    assert equal_weights(tmp_path / "both.ckpt", 1, 3, 5, 7)
    mixed = [str(tmp_path / "a" / "0.ckpt"), averages[1], f"--output={tmp_path}/mixed.ckpt"]
    assert main(mixed) == 0
    assert equal_weights(tmp_path / "mixed.ckpt", 1, 6)


def test_an_older_average_is_known_by_the_names_of_its_parts(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (1, 3)]
    average_checkpoints(paths, tmp_path / "averaged.ckpt")
    old = load(tmp_path / "averaged.ckpt")
    del old["averaged_weights"]
    torch.save(old, tmp_path / "averaged.ckpt")
    kept, left_out = distinct_checkpoints([*paths, tmp_path / "averaged.ckpt"])
    assert kept == paths
    assert len(left_out) == 1


@pytest.mark.parametrize("way", ["same", "relative", "link", "hard link", "folder link"])
def test_an_input_is_not_written_over(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [save(tmp_path / "run", step) for step in (1, 3)]
    before = paths[0].read_bytes()
    output = {
        "same": paths[0],
        "relative": Path("run/../run/step=1.ckpt"),
        "link": tmp_path / "link.ckpt",
        "hard link": tmp_path / "hard.ckpt",
        "folder link": tmp_path / "other" / "step=1.ckpt",
    }[way]
    (tmp_path / "link.ckpt").symlink_to(paths[0])
    os.link(paths[0], tmp_path / "hard.ckpt")
    (tmp_path / "other").symlink_to(tmp_path / "run")
    for inputs in (map(str, paths), [str(tmp_path / "run")]):
        with pytest.raises(CheckpointError, match="is one of the checkpoints to average"):
            main([*inputs, "--output", str(output)])
    with pytest.raises(CheckpointError, match="is one of the checkpoints to average"):
        average_checkpoints(paths, output)
    assert paths[0].read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_diverged_are_named(value: float, tmp_path: Path) -> None:
    worse = torch.tensor([1.0, value])
    paths = [
        save(tmp_path, 1, fine=torch.ones(2), worse=torch.ones(2)),
        save(tmp_path, 2, fine=torch.ones(2), worse=worse),
    ]
    with pytest.raises(
        CheckpointError, match=r"step=2\.ckpt: worse has 1 of 2 values that are not finite"
    ):
        main([*map(str, paths), f"--output={tmp_path}/mean.ckpt"])
    assert not (tmp_path / "mean.ckpt").exists()
    require_finite({"text": "nan", "count": torch.tensor(3), "fine": torch.ones(2)}, "it")
    with pytest.raises(CheckpointError, match="it: weight has 1 of 1 values that are not finite"):
        require_finite({"weight": torch.tensor(value).bfloat16()}, "it")


def test_nan_is_never_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nan = float("nan")
    for step, loss in ((1, 0.9), (2, nan), (3, 0.5), (4, nan), (5, float("inf"))):
        save(tmp_path, step, metrics={"val/loss": loss})
    assert [path.stem for path in best_checkpoints(tmp_path, 9, "val/loss")] == ["step=3", "step=1"]
    assert [path.stem for path in last_checkpoints(tmp_path, 9)] == ["step=1", "step=3", "step=5"]
    assert "step=2.ckpt: its val/loss is nan" in capsys.readouterr().err


def test_a_folder_has_to_be_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 1)
    for words in ([str(tmp_path / "run"), str(path)], [str(tmp_path / "run")] * 2):
        with pytest.raises(ConfigurationError, match="is a folder, so it has to be alone"):
            main(words)
    with pytest.raises(CheckpointError, match="is a folder"):
        main([str(path), str(tmp_path / "run")])
    with pytest.raises(ConfigurationError, match="--metric val/loss says what --best goes by"):
        main([str(tmp_path / "run"), "--metric", "val/loss"])
