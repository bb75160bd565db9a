"""What becomes of a base and later files and words, compared with a plain recursive merge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_lightning.configuration import ConfigurationParser, DuplicateKey, NotYAML, read_yaml

NODE, SMALL = "tests.test_overlays.Node", "tests.test_overlays.SmallNode"


class Node:
    """Has lists wherever there can be one."""

    def __init__(
        self,
        a: int = 1,
        b: float = 2.0,
        child: Node | None = None,
        nodes: Sequence[Node] = (),
        either: Node | list[Node] | None = None,
        table: dict[str, list[Node]] | None = None,
        numbers: list[int] | None = None,
        rows: list[list[int]] | None = None,
        plain: dict[str, Any] | None = None,
    ) -> None:
        pass


class SmallNode(Node):
    """Accepts fewer arguments than a Node."""

    def __init__(self, a: int = 1, nodes: Sequence[Node] = ()) -> None:
        pass


def parser() -> ConfigurationParser:
    made = ConfigurationParser()
    made.add_argument("--config", action="config")
    made.add_argument("--root", type=Node)
    made.add_argument("--top", type=Node | list[Node] | None)
    return made


def parsed(*layers: dict[str, Any] | list[str]) -> dict[str, Any]:
    """What the parser makes of files and words, without what nobody gave."""
    words: list[str] = []
    for layer in layers:
        words += layer if isinstance(layer, list) else ["--config", yaml.safe_dump(layer)]
    tree = parser().parse_args(words, defaults=False).as_dict()
    del tree["config"]
    return shortened(tree)


def shortened(tree: Any) -> Any:
    """Without nulls and empty `init_args`, which the parser adds or drops as it likes."""
    if isinstance(tree, dict):
        items = {key: shortened(value) for key, value in tree.items() if value is not None}
        return {key: value for key, value in items.items() if key != "init_args" or value}
    return [shortened(item) for item in tree] if isinstance(tree, list) else tree


def merged(old: Any, new: Any) -> Any:
    """The oracle: mappings merge, anything else replaces."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: merged(old.get(key), value) for key, value in new.items()}


def node(**arguments: Any) -> dict[str, Any]:
    return {"class_path": NODE, "init_args": arguments}


numbers = st.integers(0, 9)
leaves = st.fixed_dictionaries({}, optional={"a": numbers, "numbers": st.lists(numbers)})
nodes = st.recursive(
    leaves.map(lambda arguments: node(**arguments)),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "a": numbers,
            "child": inner,
            "nodes": st.lists(inner, max_size=3),
            "either": inner | st.lists(inner, max_size=2),
            "table": st.dictionaries(st.sampled_from("xyz"), st.lists(inner, max_size=2)),
            "rows": st.lists(st.lists(numbers, max_size=2), max_size=2),
            "plain": st.dictionaries(
                st.sampled_from("xyz"), numbers | st.dictionaries(st.just("w"), numbers)
            ),
        },
    ).map(lambda arguments: node(**arguments)),
    max_leaves=4,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(nodes, min_size=2, max_size=3))
def test_mappings_merge_and_lists_replace(trees: list[dict[str, Any]]) -> None:
    layers = [{"root": tree, "top": [tree]} for tree in trees]
    expected: Any = {}
    for layer in layers:
        expected = merged(expected, layer)
    assert parsed(*layers) == shortened(expected)
    as_words = [f"--{key}={json.dumps(value)}" for key, value in layers[-1].items()]
    assert parsed(*layers[:-1], as_words) == shortened(expected)


ONE = node(a=5, b=6.0, nodes=[node(a=7)])


@pytest.mark.parametrize(
    ("base", "later", "expected"),
    [
        # Of the same length, of another, of another class, and where a class was alone.
        ({"top": [ONE]}, {"top": [node(b=1.0)]}, {"top": [node(b=1.0)]}),
        ({"top": [ONE]}, {"top": [node(), ONE]}, {"top": [node(), ONE]}),
        ({"top": [ONE]}, {"top": [{"class_path": SMALL}]}, {"top": [{"class_path": SMALL}]}),
        ({"top": ONE}, {"top": [node()]}, {"top": [node()]}),
        ({"top": [ONE]}, {"top": node(a=1)}, {"top": node(a=1)}),
        ({"top": [ONE]}, {"top": []}, {"top": []}),
        # Below classes, in lists of lists and in mappings of lists.
        (
            {"root": ONE},
            {"root": {"init_args": {"nodes": [node()]}}},
            {"root": node(a=5, b=6.0, nodes=[node()])},
        ),
        ({"root": ONE}, {"root": {"nodes": [node()]}}, {"root": node(a=5, b=6.0, nodes=[node()])}),
        (
            {"root": ONE},
            ["--root.nodes", json.dumps([node()])],
            {"root": node(a=5, b=6.0, nodes=[node()])},
        ),
        (
            {"root": node(child=ONE)},
            [f"--root.child.nodes=[{json.dumps(node())}]"],
            {"root": node(child=node(a=5, b=6.0, nodes=[node()]))},
        ),
        (
            {"root": node(table={"x": [ONE], "y": []})},
            {"root": {"init_args": {"table": {"x": [node()]}}}},
            {"root": node(table={"x": [node()], "y": []})},
        ),
        (
            {"root": node(table={"x": [ONE]})},
            [f"--root.table.x=[{json.dumps(node())}]"],
            {"root": node(table={"x": [node()]})},
        ),
        (
            {"root": node(nodes=[node(nodes=[ONE])])},
            {"root": {"init_args": {"nodes": [node(nodes=[node()])]}}},
            {"root": node(nodes=[node(nodes=[node()])])},
        ),
        ({"root": node(rows=[[1, 2]])}, ["--root.rows=[[3]]"], {"root": node(rows=[[3]])}),
        # A plus appends, in files and words, lists and single elements.
        ({"top": [ONE]}, {"top+": [node(a=1), node(a=2)]}, {"top": [ONE, node(a=1), node(a=2)]}),
        ({"top": [ONE]}, {"top+": node(a=1)}, {"top": [ONE, node(a=1)]}),
        ({"top": ONE}, {"top+": [node(a=1)]}, {"top": [ONE, node(a=1)]}),
        ({}, {"top+": [node(a=1)]}, {"top": [node(a=1)]}),
        ({"top": [ONE]}, [f"--top+={json.dumps(node(a=1))}"], {"top": [ONE, node(a=1)]}),
        ({"top": [ONE]}, ["--top+=Node", "--top.a=3"], {"top": [ONE, node(a=3)]}),
        (
            {"root": ONE},
            {"root": {"init_args": {"nodes+": [node()]}}},
            {"root": node(a=5, b=6.0, nodes=[node(a=7), node()])},
        ),
        (
            {"root": ONE},
            ["--root.nodes+=Node"],
            {"root": node(a=5, b=6.0, nodes=[node(a=7), node()])},
        ),
        (
            {"root": node(numbers=[1])},
            ["--root.numbers+=2", "--root.numbers+=[3, 4]"],
            {"root": node(numbers=[1, 2, 3, 4])},
        ),
        # The last element is still changed by a word that names one of its arguments.
        ({"top": [ONE]}, ["--top.a=3"], {"top": [node(a=3, b=6.0, nodes=[node(a=7)])]}),
        # Another class keeps what it accepts, but for what is replaced.
        (
            {"root": ONE},
            {"root": {"class_path": SMALL}},
            {"root": {"class_path": SMALL, "init_args": {"a": 5, "nodes": [node(a=7)]}}},
        ),
        (
            {"root": ONE},
            {"root": {"class_path": SMALL, "init_args": {"nodes": [node()]}}},
            {"root": {"class_path": SMALL, "init_args": {"a": 5, "nodes": [node()]}}},
        ),
    ],
)
def test_nothing_is_inherited_by_place_and_a_plus_appends(
    base: dict[str, Any], later: dict[str, Any] | list[str], expected: dict[str, Any]
) -> None:
    assert parsed(base, later) == shortened(expected)


def test_a_default_mapping_is_replaced_by_one_that_is_given() -> None:
    """Nobody gave the default, so nobody expects it among what was given."""
    made = ConfigurationParser()
    made.add_argument("--plain", type=dict[str, int], default={"x": 1})
    assert made.parse_args(["--plain", "{y: 2}"]).plain == {"y": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "a is given twice, in lines 1 and 3; keep one"),
        ("a:\n  b:\n  - c: 1\n    c: 2\n", "a.b.0.c is given twice, in lines 3 and 4"),
        ("a: {b: 1, 'b': 1}", "a.b is given twice, in lines 1 and 1"),
        ("x: &x {1: 2}\ny: {k: *x, k: *x}", "y.k is given twice, in lines 2 and 2"),
        ('{"a": {"b": 1},\n "a": {}}', "a is given twice, in lines 1 and 2"),
    ],
)
def test_a_key_may_not_be_given_twice(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(DuplicateKey) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_keys_that_only_look_alike_are_two(tmp_path: Path) -> None:
    path = tmp_path / "fine.yaml"
    path.write_text("base: &b {a: 1}\nx: {<<: *b, a: 2}\ny: {1: a, '1': b}\nz: *b\n")
    assert read_yaml(path)["x"] == {"a": 2}
    assert read_yaml(path)["y"] == {1: "a", "1": "b"}


@pytest.mark.parametrize(
    "text", ["a: [", "a: " + "9" * 5000, "[" * 5000, "a: !!python/name:os.system"]
)
def test_what_is_no_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(NotYAML, match="broken.yaml is not YAML: ") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
