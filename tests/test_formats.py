"""A checkpoint of each format that was ever written still loads, and says what it said."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.test_every_task import configuration
from tx_lightning.checkpoints import FORMAT, RECORD, load_task, read_checkpoint, write_atomically
from tx_lightning.cli import CommandLine, process_restored
from tx_lightning.models import LanguageModel
from tx_lightning.nn import SinusoidalPositions
from tx_lightning.tasks import LanguageModeling, Translation

FILES = Path(__file__).parent / "formats"
# What the model of each file makes of "Das Kind tanzt .", as it did when the file was written.
SAID = {1: "This boy.", 2: "This child."}


def test_there_is_a_file_of_each_format() -> None:
    assert sorted(SAID) == list(range(1, FORMAT + 1))


@pytest.mark.parametrize("number", SAID)
def test_it_loads_and_translates(number: int) -> None:
    path = FILES / f"format-{number}.ckpt"
    assert read_checkpoint(path)["tx_lightning"]["format"] == number
    task = load_task(path)
    assert isinstance(task, Translation)
    ((best, *_),) = task.translate(["Das Kind tanzt ."])
    assert best.text == SAID[number]


# Sinusoids had no scale in format 1: they were as large as 1, beside tokens of any size.

SIZES = {"d_model": 8, "n_heads": 2, "n_layers": 1, "context_length": 16}


def as_format_1(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings as format 1 wrote them."""
    found = copy.deepcopy(settings)
    positions = found["init_args"]["network"]["init_args"]["positions"]
    assert positions["init_args"].pop("scale") == 1
    return found


def test_an_old_language_model_with_sinusoids_computes_what_it_did(tmp_path: Path) -> None:
    positions = {"class_path": "tx_lightning.nn.SinusoidalPositions", "init_args": {"scale": 1.0}}
    network = {
        "class_path": "tx_lightning.models.LanguageModel",
        "init_args": {**SIZES, "positions": positions},
    }
    settings = {
        "class_path": "tx_lightning.tasks.LanguageModeling",
        "init_args": {"vocab_size": 120, "network": network},
    }
    model = LanguageModel(120, **SIZES, positions=partial(SinusoidalPositions, scale=1.0))  # type: ignore[arg-type]
    record = read_checkpoint(FILES / "format-1.ckpt")[RECORD]
    assert record["format"] == 1
    checkpoint = {
        "state_dict": {f"network.{name}": value for name, value in model.state_dict().items()},
        "global_step": 1,
        RECORD: {**record, "task": as_format_1(settings)},
    }
    write_atomically(checkpoint, tmp_path / "old.ckpt")
    task = load_task(tmp_path / "old.ckpt")
    assert isinstance(task, LanguageModeling)
    assert task.settings == settings  # what is saved from now on says it
    ids = torch.arange(12)[None]
    assert torch.equal(task.network(ids), model.eval()(ids))


def test_an_old_run_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config.yaml and its checkpoints say nothing of a scale."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CommandLine, "_run_subcommand", lambda self, verb: None)  # built is enough
    key, folder = "--model.init_args.network.init_args.positions", "--trainer.default_root_dir"
    tree = configuration("LanguageModeling")
    tree["trainer"]["callbacks"] = None
    Path("task.yaml").write_text(yaml.safe_dump(tree))
    words = ["--config", "task.yaml", key, "SinusoidalPositions"]
    with process_restored():
        built = CommandLine([*words, f"{key}.init_args.scale", "1.0", folder, "run"], run=False)
    config, path = Path("run/config.yaml"), Path("run/checkpoints/last.ckpt")
    settings = yaml.safe_load(config.read_text())
    model = built.model.settings
    settings["model"], model = as_format_1(settings["model"]), as_format_1(model)
    config.write_text(yaml.safe_dump(settings))
    record = read_checkpoint(FILES / "format-1.ckpt")[RECORD] | {"task": model}
    state = {"state_dict": built.model.state_dict(), RECORD: record}
    write_atomically({**state, "global_step": 1, "optimizer_states": []}, path)

    with process_restored():
        CommandLine(["test", "--config", str(config), "--ckpt_path", str(path), folder, "tested"])
        assert scale_of(Path("tested/config.yaml")) == 1
        CommandLine(["fit", "--resume", "run", "--model_from", "config"])
        assert scale_of(config) == 1
        CommandLine(["fit", "--resume", "run"])  # which agrees with the checkpoint
        # Weights of an old run bring the scale that they were trained with to another task as well.
        CommandLine([*words, folder, "started", "--pretrained", str(path)], run=False)
        assert scale_of(Path("started/config.yaml")) == 1


def scale_of(config: Path) -> float | None:
    """The scale of the sinusoids of a run."""
    network = yaml.safe_load(config.read_text())["model"]["init_args"]["network"]
    scale: float | None = network["init_args"]["positions"]["init_args"]["scale"]
    return scale
