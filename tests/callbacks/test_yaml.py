"""Every callback can be named in YAML, and what was parsed can be written and parsed again."""

from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

import tx_lightning.callbacks
from tx_lightning.callbacks import AttentionLogger, CheckpointAveraging, LRWarmup, SampleLogger

SETTINGS: dict[str, dict[str, Any]] = {
    "AttentionLogger": {"examples": [3, 5], "layers": "all", "heads": [0], "every_n_steps": 10},
    "CheckpointAveraging": {"n": 3, "best": "val/bleu"},
    "ClassReport": {"console": False},
    "Goal": {"metric": "test/bleu", "at_least": 1.5},
    "LRWarmup": {"warmup_steps": 7},
    "LongestBatch": {},
    "SampleLogger": {"n": 2, "console": False},
    "Throughput": {},
}


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--callbacks", type=list[Callback])
    return made


def test_all_are_covered() -> None:
    assert set(SETTINGS) == set(tx_lightning.callbacks.__all__)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_round_trip(name: str) -> None:
    path = f"tx_lightning.callbacks.{name}"
    chosen = [{"class_path": path, "init_args": SETTINGS[name]}]
    config = parser().parse_object({"callbacks": chosen})
    again = parser().parse_string(parser().dump(config))
    assert parser().dump(again) == parser().dump(config)
    [callback] = parser().instantiate(again).callbacks
    assert type(callback).__name__ == name
    assert {key: vars(callback)[key] for key in SETTINGS[name]} == SETTINGS[name]


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {"Goal"}))
def test_defaults_suffice(name: str) -> None:
    chosen = [{"class_path": f"tx_lightning.callbacks.{name}"}]
    config = parser().parse_object({"callbacks": chosen})
    again = parser().parse_string(parser().dump(config))
    assert parser().dump(again) == parser().dump(config)
    assert type(parser().instantiate(again).callbacks[0]).__name__ == name


@pytest.mark.parametrize("callback", [AttentionLogger, CheckpointAveraging, LRWarmup, SampleLogger])
def test_every_argument_has_its_help(callback: type[Callback]) -> None:
    made = ArgumentParser()
    made.add_class_arguments(callback, "callback")
    helped = {action.dest: action.help for action in made._actions}
    for argument in SETTINGS[callback.__name__]:
        assert len(helped[f"callback.{argument}"] or "") > 10
