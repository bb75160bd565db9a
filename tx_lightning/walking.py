"""The walk through settings that a file brings, from place to place.

It starts from the type that the place asks for, checks a class before its module is imported, and
continues with the types of the class's parameters. What it returns holds nothing that it did not
understand.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from jsonargparse._loaders_dumpers import get_yaml_default_loader
from jsonargparse._parameter_resolvers import ParamData
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from tx_lightning.places import Place, defaults_of, is_a, names_of, parameters_of, place_of
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
_MOST_BITS = 4096  # of an integer in them
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


class TooMuch(Exception):
    """The tree is too deep or too large to be settings."""


class Walk:
    """One pass over a tree. It collects what is wrong and goes on, so that an error names all.

    Args:
        trust: The user's consent.
        folder: That of the file, beside which the parser looks for others.
    """

    def __init__(self, trust: Trust, folder: Path | None = None) -> None:
        self.trust = trust
        self.folder = Path() if folder is None else folder
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
        except TooMuch as error:
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
        defaults = defaults_of(Trainer)
        checked: dict[str, Any] = {}
        for key, value in sections.items():
            if key == "model":
                checked[key] = self.value(value, (LightningModule,), key)
            elif key == "data":
                checked[key] = self.value(value, (LightningDataModule,), key)
            elif key == "trainer" and isinstance(value, Mapping | None):
                checked[key] = self._arguments(value, trainer, key, 0, defaults)
            elif key == "trainer":
                self.forbidden.append(f"trainer: {_shown(value)}: only arguments may be here")
            elif key == "config":
                self.forbidden.append(f"config: {_shown(value)}: a file may not name another one")
            elif _is_key(key):
                checked[key] = self.value(value, (str,), key)
            else:
                self._mistake("the file", f"{_shown(key)} is no section")
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
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            self._mistake(at, f"an integer of {value.bit_length():,} bits is no setting")
            return None
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
        if is_dotted(text) and place.named:
            return self._named(text, place, at, depth, defaults)
        if place.loaded and self._is_file(text):
            self.forbidden.append(f"{at}: {_shown(text)} is a file, which would be read")
            return None
        if is_dotted(text):
            if not (place.text or place.anything):
                self._mistake(at, f"{text} is nothing that may be here")
                return None
            self.texts.add(text)
            return text
        if place.plain and place.text:
            return text
        read = _loaded(text)
        tree = isinstance(read, Mapping | list | tuple | set)
        if place.module or tree:
            self.forbidden.append(f"{at}: {_shown(text)} would be read as more than a text")
            return None
        if isinstance(read, str) and not (place.text or place.anything):
            more = "; a class has its full path" if place.named else ""
            self._mistake(at, f"{_shown(text)} is not {place.wanted()}{more}")
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
            self._scan(name, at, depth)
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
        usual = defaults_of(found)
        self.names.update(*usual.values())  # what the parser may come to by itself
        known = {parameter.name: parameter for parameter in parameters[skipped:]}
        inner = self._arguments(arguments, known, at, depth, usual)
        checked = {"class_path": name, "init_args": inner}
        if more:
            apart = {key: value for key, value in known.items() if key not in more}
            if len(apart) < len(known):
                self._mistake(at, f"dict_kwargs of {name} has arguments that belong in init_args")
            checked["dict_kwargs"] = self._arguments(more, {}, at, depth, {})
        return checked

    def _fit(self, found: Callable[..., Any], name: str, place: Place) -> int | None:
        """How many arguments the caller gives to what is here; None where it does not fit."""
        if isinstance(found, type):
            if any(is_a(found, kind) for kind in place.classes):
                return 0
            for kinds, given in place.factories:
                if any(is_a(found, kind) for kind in kinds):
                    return given
            return 0 if place.callables and self.trust.agreed(name) else None
        return next((given for _, given in place.factories), 0 if place.callables else None)

    def _arguments(
        self,
        arguments: Any,
        known: Mapping[str, ParamData],
        at: str,
        depth: int,
        defaults: Mapping[str, frozenset[str]],
    ) -> dict[str, Any]:
        """Check arguments by the parameters of their class; the parser refuses unknown ones."""
        if arguments is None:
            return {}
        if not isinstance(arguments, Mapping):
            self._mistake(at, f"arguments are {_kind(arguments)}")
            return {}
        checked: dict[str, Any] = {}
        for key, value in arguments.items():
            if not _is_key(key) or (key in _SPEC and key not in known):
                self._mistake(at, f"{_shown(key)} is no argument")
                self._scan({key: value}, at, depth)
                continue
            inner = f"{at}.{key}"
            if key in known:
                parameter = known[key]
                hints = (parameter.annotation,)
                if value is None and _needed(parameter):
                    self._mistake(inner, f"null is not {place_of(*hints).wanted()}")
                checked[key] = self.value(value, hints, inner, depth + 1, defaults[key])
            else:
                checked[key] = self.value(value, (Any,), inner, depth + 1)
        return checked

    def _mapping(self, value: Mapping[Any, Any], place: Place, at: str, depth: int) -> Any:
        """Check a mapping that names no class."""
        if place.records:
            known = {p.name: p for kind in place.records for p in parameters_of(kind)}
            defaults = {key: names_of(parameter.default) for key, parameter in known.items()}
            return self._arguments(value, known, at, depth, defaults)
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
            if isinstance(name, str) and is_dotted(name):
                self._find(name, at, frozenset())
            for key, value in tree.items():
                self._scan(value, at if key in _SPEC else f"{at}.{key}", depth + 1)
        elif isinstance(tree, list | tuple):
            for number, value in enumerate(tree):
                self._scan(value, f"{at}.{number}", depth + 1)

    def _is_file(self, text: str) -> bool:
        try:
            return Path(text).is_file() or (self.folder / text).is_file()
        except (OSError, ValueError):
            return False

    def _mistake(self, at: str, what: str) -> None:
        self.mistakes.append(f"{at}: {what}")

    def _count(self, at: str, depth: int) -> None:
        self._values += 1
        if depth > DEEPEST or self._values > MOST_VALUES:
            raise TooMuch(f"{at.partition('.')[0]}: this is no tree of settings")


def _needed(parameter: ParamData) -> bool:
    """Whether a parameter has a value by default and may not be without one."""
    none = parameter.default is None or parameter.default is inspect.Parameter.empty
    return not none and not place_of(parameter.annotation).null


def _is_key(key: Any) -> bool:
    """Whether a key is the name of an argument; one with a dot would reach further down."""
    return isinstance(key, str) and key.isidentifier()


def read_yaml(text: str) -> Any:
    """Read YAML as the parser does, to the last tab: nothing else may be checked than is built.

    Raises:
        yaml.YAMLError: It is none.
    """
    loader: Any = get_yaml_default_loader()  # type: ignore[no-untyped-call]
    return yaml.load(text, Loader=loader)  # noqa: S506  # a safe one


def _loaded(text: str) -> Any:
    """What the parser would read a text as."""
    try:
        return read_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text
    except RecursionError:
        return []


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else _kind(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
