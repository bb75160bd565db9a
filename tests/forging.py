"""Settings of every kind there is, every place in them, and what a stranger would write there."""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import tx_lightning.tasks
from tx_lightning.commands import import_classes
from tx_lightning.data.module import TextData
from tx_lightning.places import Place, parameters_of, place_of
from tx_lightning.tasks.task import Task
from tx_lightning.trust import NO_TRUST

PWNED = "PWNED"  # the file that code of a stranger would write
COMMAND = {"command": f"touch {PWNED}", "cmd": f"touch {PWNED}"}
EVIL = "evil_module_of_a_stranger"  # its import writes that file
Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Payload:
    """Something that must not be built.

    Attributes:
        value: What the file holds.
        named: What the refusal has to name.
    """

    value: Any
    named: str


def spec(class_path: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


PAYLOADS = (
    Payload(spec("os.system", **COMMAND), "os.system"),
    Payload(spec("os.popen", **COMMAND), "os.popen"),
    Payload(spec("subprocess.Popen", args=["touch", PWNED]), "subprocess.Popen"),
    Payload(spec("builtins.eval", source=f"open('{PWNED}', 'w')"), "builtins.eval"),
    Payload(spec("builtins.exec", source=f"open('{PWNED}', 'w')"), "builtins.exec"),
    Payload(spec(f"{EVIL}.Anything"), f"{EVIL}.Anything"),
    Payload(f"{EVIL}.Anything", f"{EVIL}.Anything"),
    Payload("os.system", "os.system"),
    Payload(spec("tx_lightning.runs.os.system", **COMMAND), "tx_lightning.runs.os.system"),
    Payload("torch.nn.functional.torch.hub.load", "torch.nn.functional.torch.hub.load"),
    Payload(
        spec("tx_lightning.trust.import_module", name=EVIL), "tx_lightning.trust.import_module"
    ),
    Payload(spec("functools.partial", func="os.system"), "functools.partial"),
    Payload([spec("os.system", **COMMAND)], "os.system"),
    Payload({**spec("os.system", **COMMAND), "more": 1}, "os.system"),
    Payload({"inner.class_path": "os.system"}, "class_path"),
    Payload('{"class_path": "os.system", "init_args": {"command": "touch PWNED"}}', "os.system"),
    Payload("class_path: os.system\ninit_args: {command: touch PWNED}", "os.system"),
    # As YAML only to the parser's loader, which knows tabs and no dates.
    Payload("class_path:\tos.system", "os.system"),
    Payload("{class_path: os.system, init_args: {command: 2020-99-99}}", "os.system"),
    Payload("evil.yaml", "evil.yaml"),
)


def descendants(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield child
        yield from descendants(child)


def buildable(kind: type) -> list[type]:
    """The classes that a file may name for a place that asks for `kind`, each once."""
    found = [kind, *descendants(kind)]
    return [
        each
        for each in dict.fromkeys(found)
        if NO_TRUST.covers(each.__module__)
        and not inspect.isabstract(each)
        and not each.__name__.startswith("_")
        and "._" not in each.__module__
        and vars(sys.modules[each.__module__]).get(each.__qualname__) is each  # not made on the fly
    ]


def tasks() -> list[type[Task[Any]]]:
    """Every task of the package."""
    import_classes()
    found: list[Any] = [each for each in buildable(Task) if each.__module__.startswith("tx_")]
    return [each for each in found if each.__name__ in tx_lightning.tasks.__all__ and each != Task]


def data_modules() -> list[type]:
    """Every data module of the package."""
    import_classes()
    return [each for each in buildable(TextData) if each.__module__.startswith("tx_")]


@dataclass(frozen=True)
class Spot:
    """A place in a tree of settings.

    Attributes:
        path: Keys and positions that lead there.
        hint: What the code asks for; Any where it asks for nothing.
        owner: The class that has it, and the name of its argument.
    """

    path: Path_
    hint: Any
    owner: tuple[str, str]


def kind_of(spot: Spot) -> tuple[str, str, bool]:
    """What is tried once: an argument of a class, and an element of one."""
    return *spot.owner, bool(spot.path) and isinstance(spot.path[-1], int)


class Grower:
    """Makes the fullest settings of a class: every argument given, every list with an element.

    Where a place can have objects of many classes, each tree takes the next of them.

    Args:
        turn: Which tree it is.
    """

    def __init__(self, turn: int = 0) -> None:
        self.turn = turn

    def grow(self, kind: type, given: int = 0, depth: int = 0) -> dict[str, Any]:
        """Settings of a class, without the arguments that its caller gives."""
        arguments = {
            parameter.name: self.fill(parameter.annotation, depth + 1)
            for parameter in parameters_of(kind)[given:]
        }
        return spec(f"{kind.__module__}.{kind.__qualname__}", **arguments)

    def fill(self, hint: Any, depth: int) -> Any:
        """A value for a type hint."""
        place = place_of(hint)
        for kind, given in makers(place):
            classes = buildable(kind)
            if classes and depth < 7:
                return self.grow(classes[self.turn % len(classes)], given, depth)
        if place.items:
            return [self.fill(item, depth + 1) for item in place.items]
        if place.values:
            return {"key": self.fill(place.values[0], depth + 1)}
        if place.text:
            return "text"
        return {"key": ["plain"]} if place.anything else None if place.null else 1


def makers(place: Place) -> Iterator[tuple[type, int]]:
    """The classes whose objects a place can have, with what their callers give."""
    yield from ((kind, 0) for kind in place.classes if not issubclass(kind, torch.Tensor))
    for kinds, given in place.factories:
        yield from ((kind, given) for kind in kinds if not issubclass(kind, torch.Tensor))


def spots(
    value: Any, hint: Any, path: Path_ = (), owner: tuple[str, str] = ("", "")
) -> Iterator[Spot]:
    """Every place in a tree, those that are not taken yet included."""
    yield Spot(path, hint, owner)
    place = place_of(hint)
    if isinstance(value, dict) and "class_path" in value:
        kind: Any = NO_TRUST.find(value["class_path"])
        known = {parameter.name: parameter.annotation for parameter in parameters_of(kind)}
        name = kind.__name__
        for key, inner in value["init_args"].items():
            yield from spots(inner, known[key], (*path, "init_args", key), (name, key))
        yield Spot((*path, "init_args", "strange"), Any, (name, "strange"))
        yield Spot((*path, "dict_kwargs", "strange"), Any, (name, "dict_kwargs"))
        yield Spot((*path, "class_path"), type, (name, "class_path"))
    elif isinstance(value, dict):
        inner = place.values[0] if place.values else Any
        for key in (*value, "new"):
            yield from spots(value.get(key), inner, (*path, key), owner)
    elif isinstance(value, list):
        for number, item in enumerate((*value, None)):
            inner = place.items[min(number, len(place.items) - 1)] if place.items else Any
            yield from spots(item, inner, (*path, number), owner)


def put(tree: Any, path: Path_, value: Any) -> Any:
    """A copy of a tree with another value at a place."""
    if not path:
        return value
    key, *rest = path
    if isinstance(tree, list):
        assert isinstance(key, int)
        old = tree[key] if key < len(tree) else None
        return [*tree[:key], put(old, tuple(rest), value), *tree[key + 1 :]]
    old = tree.get(key) if isinstance(tree, dict) else None
    return {**(tree or {}), key: put(old, tuple(rest), value)}


def forged(tree: Any, path: Path_, value: Any) -> Any:
    """As `put`, with nothing of the tree but the classes on the way."""
    if not path:
        return value
    key, *rest = path
    if isinstance(tree, list):
        assert isinstance(key, int)
        old = tree[key] if key < len(tree) else None
        return [None] * key + [forged(old, tuple(rest), value)]
    named = {"class_path": tree["class_path"]} if tree and "class_path" in tree else {}
    return {**named, key: forged((tree or {}).get(key), tuple(rest), value)}


def is_mere_text(payload: Payload, hint: Any) -> bool:
    """Whether a payload is a text at a place where texts stay what they are."""
    place = place_of(hint)
    return isinstance(payload.value, str) and (place.text or place.anything) and not place.named
