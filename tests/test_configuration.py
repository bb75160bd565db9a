"""What words and files set, before they are parsed."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as examples
from hypothesis import settings as limits
from hypothesis import strategies as st

from tx_lightning.configuration import (
    differences,
    flat,
    given,
    upgraded_settings,
    without_option,
)


def test_nested_settings_become_dotted_keys_without_init_args() -> None:
    tree = {
        "model": {"class_path": "A", "init_args": {"net": {"init_args": {"d": 3}}, "empty": {}}},
        "trainer": {"callbacks": [{"class_path": "B", "init_args": {"n": 1}}], "devices": [0, 1]},
    }
    assert flat(tree) == {
        "model.class_path": "A",
        "model.net.d": 3,
        "model.empty": {},
        "trainer.callbacks.0.class_path": "B",
        "trainer.callbacks.0.n": 1,
        "trainer.devices": [0, 1],
    }


def test_the_last_of_files_and_words_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed_everything: 1\nmodel: {init_args: {dim: 2, lr: 1}}\n")
    second.write_text("model: {init_args: {dim: 3}}\n")
    words = ["fit", "--config", str(first), "-c", str(second), "--model.init_args.lr=5"]
    assert given(words) == {"seed_everything": 1, "model.dim": 3, "model.lr": 5}
    section = ["--model", '{"class_path": "A", "init_args": {"dim": 4}}']
    assert given([*words, *section])["model.dim"] == 4


def test_what_cannot_be_read_is_left_to_the_parser(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    words = ["--config", str(broken), "--config", "nowhere.yaml", "--x", "[", "--seed=2", "--last"]
    assert given(words) == {"x": "[", "seed": 2, "last": None}


def test_an_option_is_taken_out_in_both_spellings() -> None:
    words = ["--a", "1", "--resume", "runs/x", "--resume=runs/y", "--resumes", "2"]
    assert without_option(words, "resume") == ["--a", "1", "--resumes", "2"]


def test_differences_name_the_keys_of_either_side() -> None:
    ours = {"class_path": "A", "init_args": {"dim": 2, "only": 1, "same": [1]}}
    theirs = {"class_path": "A", "init_args": {"dim": 3, "other": 2, "same": [1]}}
    assert differences(ours, theirs) == {"dim": (2, 3), "only": (1, None), "other": (None, 2)}


# Settings of format 1 --------------------------------------------------------------------------

NAMES = ["tx_lightning.nn.SinusoidalPositions", "tx_lightning.nn.positions.SinusoidalPositions"]
OTHERS = ["tx_lightning.nn.RotaryPositions", "my.SinusoidalPositions", "text", 1, None, True, 0.5]
sinusoids = st.sampled_from(NAMES).flatmap(
    lambda name: st.sampled_from(
        [
            name,
            {"class_path": name},
            {"class_path": name, "init_args": None},
            {"class_path": name, "init_args": {"layout": "halves"}},
            {"class_path": name, "init_args": {"scale": None}},
            {"class_path": name, "init_args": {"scale": 0.5}},
        ]
    )
)
trees = st.recursive(
    st.one_of(st.sampled_from(OTHERS), sinusoids),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["positions", "init_args", "network", "a"]), inner),
    ),
    max_leaves=12,
)


def found_in(tree: Any) -> list[Any]:
    """The sinusoids of a tree, in order."""
    if tree in NAMES or (isinstance(tree, dict) and tree.get("class_path") in NAMES):
        return [tree]
    below = (
        list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    )
    return [sinusoid for value in below for sinusoid in found_in(value)]


@limits(max_examples=60, deadline=None, derandomize=True, database=None)
@examples(trees)
def test_every_sinusoid_of_format_1_gets_the_scale_it_had(tree: Any) -> None:
    before = copy.deepcopy(tree)
    upgraded = upgraded_settings(tree)
    assert tree == before
    assert upgraded_settings(upgraded) == upgraded
    old, new = found_in(before), found_in(upgraded)
    assert len(old) == len(new)
    for one, other in zip(old, new, strict=True):
        arguments = (one.get("init_args") or {}) if isinstance(one, dict) else {}
        scale = 1.0 if arguments.get("scale") is None else arguments["scale"]
        name = one["class_path"] if isinstance(one, dict) else one
        assert other == {"class_path": name, "init_args": {**arguments, "scale": scale}}
    if not old:
        assert upgraded == before


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ({"scale_embeddings": False}, {"scale": 1.0}),
        ({"scale_embeddings": False, "positions": NAMES[0]}, {"scale": 1.0}),
        ({"scale_embeddings": True, "positions": {"class_path": OTHERS[0]}}, None),
        ({"d_model": 8}, None),  # embeddings are scaled: 1 as before
    ],
)
def test_the_default_of_an_encoder_decoder_is_written_out(
    network: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    settings = {"class_path": "x.Translation", "init_args": {"network": {"init_args": network}}}
    positions = upgraded_settings(settings)["init_args"]["network"]["init_args"].get("positions")
    if expected is None:
        assert positions == network.get("positions")
    else:
        assert positions == {"class_path": NAMES[0], "init_args": expected}
