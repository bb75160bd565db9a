"""Why a configuration was refused: where the wrong name stands, and the nearest valid one.

The parser says what it expected; this module reads the same words and files again, class by class,
and finds the name that does not exist. It runs only after the parser has refused.
"""

import importlib
import inspect
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tx_lightning.configuration import (
    DuplicateKey,
    NotYAML,
    given,
    load_yaml,
    options,
    read_yaml,
)
from tx_lightning.errors import did_you_mean

SEAMS = (LightningModule, LightningDataModule, Callback, Logger, Optimizer, LRScheduler)
CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
NOISE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Given value type:|- Expected a <class 'None"
    r"|Expected a path but|Subclass types expect|- a class path|- a dict with|Given value:"
    r"|Not a valid subclass"
)
MOST_LINES = 6

Path_ = tuple[str, ...]


class Fault(Exception):
    """The name that does not exist, found."""


def explain(message: str, words: Sequence[str], parser: ArgumentParser) -> str:
    """The cause of a refusal in a few lines.

    Args:
        message: What the parser said.
        words: The words of the command, the verb first.
        parser: The parser of the verb.
    """
    reader = _Reader(parser)
    try:
        for key, text in options(words):
            reader.read_option(key, text)
    except Fault as fault:
        return str(fault)
    return _shortened(message, given(words))


class _Reader:
    """Follows words and files in order, remembering which class stands at which key."""

    def __init__(self, parser: ArgumentParser) -> None:
        keys = [a.dest for a in parser._actions if not a.dest.endswith(("help", "print_config"))]
        self._keys = [tuple(key.split(".")) for key in keys]
        self._classes: dict[Path_, Callable[..., Any]] = {}
        self._where = ""

    def read_option(self, key: str, text: str) -> None:
        if key in ("config", "c"):
            self._where = text
            self._read_tree((), _load(text))
            return
        if Path(text).suffix in (".yaml", ".yml") and Path(text).is_file():
            _content(Path(text))
        self._where = f"--{key}"
        path = tuple(part for part in key.rstrip("+").split(".") if part not in CLASS_KEYS)
        if path[-1] in ("help", "print_config"):
            return
        for length in range(1, len(path) + 1):
            self._check_name(path[:length])
        try:
            value = load_yaml(text)
        except (yaml.YAMLError, DuplicateKey):
            return
        if isinstance(value, str) and path in (("model",), ("data",)):
            value = {"class_path": value}
        self._read(path, value)

    def _read(self, path: Path_, value: Any) -> None:
        if isinstance(value, list):
            for position, item in enumerate(value):
                self._read((*path, str(position)), item)
        elif isinstance(value, Mapping):
            if CLASS_KEYS & set(value):
                self._read_class(path, value)
            else:
                self._read_tree(path, value)

    def _read_tree(self, path: Path_, tree: Mapping[str, Any]) -> None:
        for key, value in tree.items():
            inner = (*path, str(key).removesuffix("+"))
            self._check_name(inner)
            self._read(inner, value)

    def _read_class(self, path: Path_, value: Mapping[str, Any]) -> None:
        if "class_path" in value:
            self._classes[path] = self._resolve(path, str(value["class_path"]))
        beside = [str(key) for key in value if key not in CLASS_KEYS]
        if beside:
            raise Fault(
                f"{self._where}: {'.'.join(path)}: '{beside[0]}' stands beside class_path; "
                "its place is below init_args"
            )
        arguments = value.get("init_args", {})
        if not isinstance(arguments, Mapping):
            raise Fault(
                f"{self._where}: {'.'.join((*path, 'init_args'))} is {arguments!r}; it must hold "
                "arguments by their names"
            )
        self._read_tree(path, arguments)

    def _check_name(self, path: Path_) -> None:
        """Fail where the last name of a path is not one of those that may stand there."""
        parent, name = path[:-1], path[-1]
        if parent in self._classes:
            there = self._classes[parent]
            known = parameters(there)
            if known is not None and name not in known:
                raise Fault(
                    f"{self._where}: {'.'.join(parent)}: {there.__name__} has no parameter '{name}'"
                    f"{did_you_mean(name, known)}; it has {', '.join(known)}"
                )
            return
        inside = {key[len(parent)] for key in self._keys if key[: len(parent)] == parent != key}
        if inside and name not in inside:
            raise Fault(
                f"{self._where}: there is no '{'.'.join(path)}'{did_you_mean(name, inside)}"
                + ("" if parent else f"; there are {', '.join(sorted(inside))}")
            )

    def _resolve(self, path: Path_, class_path: str) -> Callable[..., Any]:
        place = f"{self._where}: {'.'.join(path)}"
        module_name, dot, name = class_path.rpartition(".")
        if not dot:
            classes = {found.__name__: found for found in known_classes()}
            if name not in classes:
                near = did_you_mean(name, classes)
                raise Fault(f"{place}: there is no class '{name}'{near}")
            return classes[name]
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise Fault(f"{place}: class_path '{class_path}': {error}") from error
        if not hasattr(module, name):
            near = did_you_mean(name, dir(module))
            raise Fault(f"{place}: module '{module_name}' has no class '{name}'{near}")
        found: Callable[..., Any] = getattr(module, name)
        return found


def _load(path: str) -> Mapping[str, Any]:
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        raise Fault(f"--config {path}: there is no such file{did_you_mean(path, siblings)}")
    tree = _content(file)
    if not isinstance(tree, Mapping):
        raise Fault(f"{path} holds no keys, but {type(tree).__name__}")
    return tree


def _content(file: Path) -> Any:
    try:
        return read_yaml(file)
    except (NotYAML, DuplicateKey) as error:
        raise Fault(str(error)) from error


def parameters(of: Callable[..., Any]) -> list[str] | None:
    """Names of the parameters of a class, inherited ones included; None where any is accepted."""
    names: list[str] = []
    functions = [of]
    if isinstance(of, type):
        functions = [vars(cls)["__init__"] for cls in of.__mro__ if "__init__" in vars(cls)]
    for function in functions:
        signature = inspect.signature(function).parameters.values()
        names += [p.name for p in signature if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if not any(p.kind == p.VAR_KEYWORD for p in signature):
            return [name for name in dict.fromkeys(names) if name != "self"]
    return None


def known_classes() -> Iterator[type]:
    """Every class that may be meant by a short name: ours, and those of Lightning and torch."""
    for seam in SEAMS:
        yield from _descendants(seam)
    for name, module in list(sys.modules.items()):
        if name.startswith("tx_lightning."):
            yield from (value for value in vars(module).values() if isinstance(value, type))


def _descendants(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _descendants(child)


def _shortened(message: str, values: Mapping[str, Any]) -> str:
    """A refusal of the parser without what says nothing."""
    if ours := re.findall(r'Parser key "([^"]+)": (\S.*)', message):
        key, told = ours[-1]
        outer = re.findall(r'Parser key "([^"]+)":', message)
        told = told.split(". Got value: ")[0]
        return f"{_full_key(key, values, told.split(' is not ')[0], outer)}: {told}"
    if name := re.search(r"(?:dot import path string|import path format): (\S*)", message):
        classes = {found.__name__ for found in known_classes()}
        return f"there is no class '{name[1]}'{did_you_mean(name[1], classes)}"
    *outer, innermost = re.split(r'Parser key "', message)
    key, _, told = innermost.partition('":')
    value = re.search(r"(?:Got|Given) value: (.*)", told)
    told = told[: value.end()] if value else told
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", told, re.MULTILINE)
    if outer and expected and value and "class_path" not in told:
        kinds = " or ".join(dict.fromkeys(_kind(kind) for kind in expected))
        keys = re.findall(r'Parser key "([^"]+)":', message)
        return f"{_full_key(key, values, value[1], keys)}: {value[1]} is not {kinds}"
    lines = [line.strip() for line in message.splitlines() if not NOISE.search(line)]
    told_lines = [re.sub(r'Parser key "(.*)":', r"\1:", line) for line in lines if line]
    if value and all(line.endswith(":") for line in told_lines):
        told_lines.append(f"{value[1]} is not accepted there")
    return " ".join(list(dict.fromkeys(told_lines))[:MOST_LINES])


def _full_key(key: str, values: Mapping[str, Any], value: str, keys: Sequence[str]) -> str:
    """The key as it is in the files, where the parser names only the last part of it.

    Args:
        key: The last part.
        values: What words and files set.
        value: What is wrong, as text.
        keys: The parts that the parser named, from the outermost to this one and maybe others.
    """
    found = [name for name in values if name == key or name.endswith(f".{key}")]
    same = [name for name in found if str(values[name]) == value]
    if len(same) == 1 or len(found) == 1:
        return (same or found)[0]
    return ".".join(keys[: len(keys) - keys[::-1].index(key)]) if key in keys else key


def _kind(expected: str) -> str:
    """A type as one reads it."""
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", expected)
    return re.sub(r"(?:typing\.)?Literal\[(.*)\]", r"one of \1", name).replace("NoneType", "null")


_OF_EACH_TYPE = (
    "Does not validate", "Subtypes:", "Errors:", "Not a valid subclass", "Subclass types expect",
    "a class path", "a dict ", "Import path", "Expected a", "Given value", "Problem with given",
)  # fmt: skip


def reason_among_types(message: str) -> str | None:
    """Why a class of Lightning or torch, of one of several types, cannot be built; else None.

    The parser lists what each type of the place refused, on a hundred lines; one of them matters.
    """
    if not message.startswith("Does not validate against any of the Union subtypes"):
        return None
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    reasons = [line for line in lines if line and not line.startswith(_OF_EACH_TYPE)]
    named = re.search(r"class_path='((?:lightning|torch)\.[^']+)'", message)
    if named is None or not reasons:
        return None
    return f"{named[1]}: {' '.join(dict.fromkeys(reasons))}"
