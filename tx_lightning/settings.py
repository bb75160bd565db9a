"""Settings that a file brings, checked place by place against what may be built.

Settings are a tree of `{"class_path": ..., "init_args": {...}}`. The walk starts from the type that
the place asks for, checks a class before its module is imported, and continues with the types of
the class's parameters. What it returns holds nothing that was not understood.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import yaml
from jsonargparse._parameter_resolvers import ParamData, get_signature_parameters
from jsonargparse._util import get_import_path
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from tx_lightning.errors import ConfigurationError
from tx_lightning.places import Place, place_of
from tx_lightning.runs import shown
from tx_lightning.trust import (
    ForbiddenName,
    ForeignName,
    Trust,
    UnknownName,
    is_dotted,
    package_of,
    refusal,
)

MOST_VALUES = 100_000  # in the settings of a file
DEEPEST = 60  # levels of them
_SPEC = ("class_path", "init_args", "dict_kwargs")
_SHOWN = 60  # characters of a value in an error


class SettingsError(ValueError):
    """The settings in a file are not accepted; one line that says where and why."""


@dataclass(frozen=True)
class Approved:
    """Settings that may be built.

    Attributes:
        settings: The tree, of plain values.
        names: The classes and functions in it, and those that are defaults of these classes.
        texts: Dotted names in it that are mere text.
        trust: The consent that it was checked with.
    """

    settings: Any
    names: frozenset[str]
    texts: frozenset[str]
    trust: Trust


def approve_task(settings: Any, trust: Trust, where: str) -> Approved:
    """Check the settings of a task; nothing is imported that the user has not agreed to.

    Args:
        settings: From a file.
        trust: The user's consent.
        where: The file, for errors.

    Raises:
        SettingsError: They name something that may not be built, or are no settings.
    """
    walk = _Walk(trust)
    return walk.finish(lambda: walk.value(settings, (LightningModule,), "task"), where)


def approve_run(sections: Any, trust: Trust, where: str) -> Approved:
    """Check the configuration of a run: model, data, trainer, and all that belongs to these.

    Args:
        sections: The content of config.yaml.
        trust: The user's consent.
        where: The file, for errors.

    Raises:
        SettingsError: It names something that may not be built, or is no configuration.
    """
    walk = _Walk(trust)
    return walk.finish(lambda: walk.sections(sections), where)


def check_run(config: Path, trust: Trust) -> Approved:
    """Check the configuration of a run that may be of others, before the parser reads it.

    Args:
        config: Its config.yaml.
        trust: The user's consent.

    Raises:
        ConfigurationError: It names something that may not be built, or is no configuration.
    """
    try:
        sections = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{shown(config)} is not YAML: {reason}") from error
    try:
        return approve_run(sections, trust, shown(config))
    except SettingsError as error:
        raise ConfigurationError(str(error)) from None


def packages_of(sections: Mapping[str, Any]) -> list[str]:
    """What has to be trusted before a configuration of one's own can be read from a file."""
    walk = _Walk(Trust(everything=True))
    with contextlib.suppress(_TooMuch):
        walk.sections(sections)
    return list(dict.fromkeys(package for _, package in walk.foreign.values()))


class _TooMuch(Exception):
    """The tree is too deep or too large to be settings."""


class _Walk:
    """One pass over a tree. It collects what is wrong and goes on, so that an error names all."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self.names: set[str] = set()
        self.texts: set[str] = set()
        self.forbidden: list[str] = []
        self.foreign: dict[str, tuple[str, str]] = {}  # name: its place, the package to trust
        self.mistakes: list[str] = []
        self._values = 0

    def finish(self, walk: Callable[[], Any], where: str) -> Approved:
        """Carry out the pass, and refuse what it found."""
        try:
            settings = walk()
        except _TooMuch as error:
            raise SettingsError(f"{where}: {error}") from None
        if self.forbidden:
            raise SettingsError(f"{where}: {self.forbidden[0]}")
        if self.foreign:
            raise SettingsError(refusal(where, self.foreign))
        if self.mistakes:
            raise SettingsError(f"{where}: its settings are not accepted: {self.mistakes[0]}")
        return Approved(settings, frozenset(self.names), frozenset(self.texts), self.trust)

    def sections(self, sections: Any) -> dict[str, Any]:
        """Check a whole configuration, section by section."""
        if not isinstance(sections, Mapping):
            self._mistake("the file", f"holds no sections, but {_kind(sections)}")
            return {}
        trainer = {p.name: p for p in parameters_of(Trainer)}
        checked: dict[str, Any] = {}
        for key, value in sections.items():
            if key == "model":
                checked[key] = self.value(value, (LightningModule,), key)
            elif key == "data":
                checked[key] = self.value(value, (LightningDataModule,), key)
            elif key == "trainer" and isinstance(value, Mapping):
                checked[key] = self._arguments(value, trainer, key, 0)
            elif key == "config":
                self.forbidden.append(f"config: {_shown(value)}: a file may not name another one")
            elif self._is_key(key, "the file"):
                checked[key] = self.value(value, (str,), key)
        return checked

    def value(
        self,
        value: Any,
        hints: tuple[Any, ...],
        at: str,
        depth: int = 0,
        defaults: frozenset[str] = frozenset(),
    ) -> Any:
        """Check a value.

        Args:
            value: From the file.
            hints: The types that the place asks for, one of them.
            at: The place.
            depth: How many levels lie above.
            defaults: Names of what the code itself has here where nothing is said.
        """
        self._count(at, depth)
        if value is None or isinstance(value, bool | int | float | date):
            return value
        place = place_of(*hints)
        if isinstance(value, str):
            return self._text(value, place, at, depth, defaults)
        if isinstance(value, Mapping):
            if "class_path" in value:
                return self._spec(value, place, at, depth, defaults)
            return self._mapping(value, place, at, depth)
        if not isinstance(value, list | tuple | set | frozenset):
            self._mistake(at, f"{_kind(value)} is no setting")
            return None
        if not (place.items or place.anything):
            self._mistake(at, f"a list is not {place.wanted()}")
            self._scan(value, at, depth)
            return None
        inner = place.items or (Any,)
        return [
            self.value(item, inner, f"{at}.{number}", depth + 1)
            for number, item in enumerate(value)
        ]

    def _text(self, text: str, place: Place, at: str, depth: int, defaults: frozenset[str]) -> Any:
        """Check a text: it may name a class, or be read as a tree or as the name of a file."""
        if is_dotted(text):
            if place.named:
                return self._named(text, place, at, depth, defaults)
            if not (place.text or place.anything):
                self._mistake(at, f"{text} is nothing that may be here")
                return None
            self.texts.add(text)
        elif place.plain:
            return text
        elif place.module or _is_tree(text) or (place.loaded and _is_file(text)):
            self.forbidden.append(f"{at}: {_shown(text)} would be read as more than a text")
            return None
        elif not (place.text or place.anything or _is_scalar(text)):
            self._mistake(at, f"{_shown(text)} is not {place.wanted()}; a class has its full path")
            return None
        return text

    def _named(self, name: str, place: Place, at: str, depth: int, defaults: frozenset[str]) -> Any:
        """Check a class or function that a text names."""
        found = self._find(name, at, defaults)
        if found is None:
            return None
        if isinstance(found, type):
            if not issubclass(found, place.kinds):
                return self._spec({"class_path": name}, place, at, depth, defaults)
        elif not (place.factories or place.callables):
            self.forbidden.append(f"{at}: {name} is a function, not {place.wanted()}")
        self.names.add(name)
        return name

    def _spec(
        self, spec: Mapping[Any, Any], place: Place, at: str, depth: int, defaults: frozenset[str]
    ) -> Any:
        """Check a class with its arguments."""
        name, arguments, more = (spec.get(key) for key in _SPEC)
        beside = [key for key in spec if key not in _SPEC]
        if beside:
            self._mistake(at, f"{_shown(name)} has the key {_shown(beside[0])} beside class_path")
        if not isinstance(name, str):
            self._mistake(at, f"class_path is {_shown(name)}")
            return None
        found = self._find(name, at, defaults)
        if found is None:
            self._scan(arguments, at, depth)
            return None
        skipped = self._fit(found, name, place)
        if skipped is None:
            self.forbidden.append(f"{at}: {name} is not {place.wanted()}")
            return None
        self.names.add(name)
        parameters = parameters_of(found)
        for parameter in parameters:  # what the parser may come to by itself
            self.names |= names_of(parameter.default)
        known = {parameter.name: parameter for parameter in parameters[skipped:]}
        checked = {"class_path": name, "init_args": self._arguments(arguments, known, at, depth)}
        if more:
            apart = {key: value for key, value in known.items() if key not in more}
            if len(apart) < len(known):
                self._mistake(at, f"dict_kwargs of {name} has arguments that belong in init_args")
            checked["dict_kwargs"] = self._arguments(more, {}, at, depth)
        return checked

    def _fit(self, found: Callable[..., Any], name: str, place: Place) -> int | None:
        """How many arguments the caller gives to what is here; None where it does not fit."""
        if isinstance(found, type):
            if any(_is_a(found, kind) for kind in place.classes):
                return 0
            for kinds, given in place.factories:
                if any(_is_a(found, kind) for kind in kinds):
                    return given
            return 0 if place.callables and self.trust.agreed(name) else None
        return next((given for _, given in place.factories), 0 if place.callables else None)

    def _arguments(
        self, arguments: Any, known: Mapping[str, ParamData], at: str, depth: int
    ) -> dict[str, Any]:
        """Check arguments by the parameters of their class; the parser refuses unknown ones."""
        if arguments is None:
            return {}
        if not isinstance(arguments, Mapping):
            self._mistake(at, f"arguments are {_kind(arguments)}")
            return {}
        checked: dict[str, Any] = {}
        for key, value in arguments.items():
            if not self._is_key(key, at):
                self._scan(value, at, depth)
                continue
            inner = f"{at}.{key}"
            if key in known:
                default = names_of(known[key].default)
                hints = (known[key].annotation,)
                checked[key] = self.value(value, hints, inner, depth + 1, default)
            else:
                checked[key] = self.value(value, (Any,), inner, depth + 1)
        return checked

    def _mapping(self, value: Mapping[Any, Any], place: Place, at: str, depth: int) -> Any:
        """Check a mapping that names no class."""
        if place.records:
            known = {p.name: p for kind in place.records for p in parameters_of(kind)}
            return self._arguments(value, known, at, depth)
        if not (place.values or place.anything):
            self._mistake(at, f"a mapping without class_path is not {place.wanted()}")
            self._scan(value, at, depth)
            return None
        inner = place.values or (Any,)
        checked = {}
        for key, item in value.items():
            if not isinstance(key, str | int) or "class_path" in str(key):
                self._mistake(at, f"{_shown(key)} is no key")
                self._scan(item, at, depth)
                continue
            checked[key] = self.value(item, inner, at, depth + 1)
        return checked

    def _find(self, name: str, at: str, defaults: frozenset[str]) -> Callable[..., Any] | None:
        """Import what a name leads to if it may be, else take note of it."""
        trust = self.trust.naming(name) if name in defaults else self.trust
        try:
            found = trust.find(name)
        except ForeignName as error:
            self.foreign.setdefault(name, (at, error.package))
        except ForbiddenName as error:
            self.forbidden.append(f"{at}: {error}")
        except UnknownName as error:
            self._mistake(at, str(error))
        else:
            if self.trust.everything and not Trust().covers(name):
                self.foreign.setdefault(name, (at, package_of(name)))
            return found
        return None

    def _scan(self, tree: Any, at: str, depth: int) -> None:
        """Take note of the names below a class whose parameters are not known."""
        self._count(at, depth)
        if isinstance(tree, Mapping):
            name = tree.get("class_path")
            if isinstance(name, str) and is_dotted(name) and not self.trust.covers(name):
                self._find(name, at, frozenset())
            for key, value in tree.items():
                self._scan(value, at if key in _SPEC else f"{at}.{key}", depth + 1)
        elif isinstance(tree, list | tuple):
            for number, value in enumerate(tree):
                self._scan(value, f"{at}.{number}", depth + 1)

    def _is_key(self, key: Any, at: str) -> bool:
        """Whether a key is the name of an argument; one with a dot would reach further down."""
        if isinstance(key, str) and key.isidentifier():
            return True
        self._mistake(at, f"{_shown(key)} is no name of an argument")
        return False

    def _mistake(self, at: str, what: str) -> None:
        self.mistakes.append(f"{at}: {what}")

    def _count(self, at: str, depth: int) -> None:
        self._values += 1
        if depth > DEEPEST or self._values > MOST_VALUES:
            raise _TooMuch(f"{at.partition('.')[0]}: this is no tree of settings")


@cache
def parameters_of(callable_: Callable[..., Any]) -> list[ParamData]:
    """The parameters of a class or function as the parser sees them, inherited ones included."""
    return list(get_signature_parameters(callable_, logger=False))


def names_of(default: Any) -> frozenset[str]:
    """The names by which a file may say what the code has anyway."""
    if isinstance(default, Mapping):
        name = default.get("class_path")
        return frozenset({name}) if isinstance(name, str) else frozenset()
    if not isinstance(default, type | FunctionType) or default is inspect.Parameter.empty:
        return frozenset()
    names = {f"{default.__module__}.{default.__qualname__}"}
    try:
        shortest = get_import_path(default)
    except (ValueError, AttributeError, ImportError):
        shortest = None
    return frozenset(names if shortest is None else names | {shortest})


def _is_a(found: type, kind: type) -> bool:
    """Whether a class is what is asked for: a subclass, or one with the methods of a protocol."""
    if not getattr(kind, "_is_protocol", False):
        return issubclass(found, kind)
    methods = [name for name, value in vars(kind).items() if inspect.isfunction(value)]
    return all(hasattr(found, name) for name in methods if not name.startswith("_"))


def _is_scalar(text: str) -> bool:
    """Whether a text is a number, true, false or null in YAML."""
    return not isinstance(_loaded(text), str)


def _is_tree(text: str) -> bool:
    """Whether the parser would read a text as more than a text."""
    return isinstance(_loaded(text), Mapping | list | tuple | set)


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    except RecursionError:
        return []


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else _kind(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
