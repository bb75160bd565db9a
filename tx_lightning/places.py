"""What a type hint accepts in a configuration, and what parameters a class has for the parser."""

import collections.abc
import datetime
import decimal
import inspect
import os
import types
import typing
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import FunctionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse._common import is_subclasses_disabled
from jsonargparse._parameter_resolvers import ParamData, get_signature_parameters
from jsonargparse._util import get_import_path

# What the parser makes of a text by itself.
_TEXT = (
    str,
    bytes,
    bytearray,
    complex,
    range,
    datetime.timedelta,
    decimal.Decimal,
    uuid.UUID,
    os.PathLike,
    Enum,
)
_NUMBERS = (bool, int, float)
_CONTAINERS = ("builtins", "collections", "collections.abc")  # modules of lists, sets, mappings


@dataclass
class Place:
    """What may be at a place. Numbers, true and false may be anywhere: they do no harm.

    Attributes:
        null: Nothing.
        text: A text, which stays one.
        anything: Plain data of any kind.
        module: A module or a type expression, which no file may name.
        classes: An object of one of these classes.
        factories: What makes an object of one of these classes from so many arguments.
        callables: What can be called and makes no such object.
        kinds: One of these classes itself, or a subclass.
        records: The fields of one of these classes, without a class path.
        items: Lists of these types.
        values: Mappings to these types.
    """

    null: bool = False
    text: bool = False
    anything: bool = False
    module: bool = False
    classes: tuple[type, ...] = ()
    factories: tuple[tuple[tuple[type, ...], int], ...] = ()
    callables: bool = False
    kinds: tuple[type, ...] = ()
    records: tuple[type, ...] = ()
    items: tuple[Any, ...] = ()
    values: tuple[Any, ...] = ()

    @property
    def named(self) -> bool:
        """Whether a text may be the name of something to import."""
        return bool(self.classes or self.factories or self.kinds or self.callables)

    @property
    def loaded(self) -> bool:
        """Whether a text may be the name of a file that holds what should be here."""
        return bool(self.named or self.items or self.values or self.records)

    @property
    def plain(self) -> bool:
        """Whether only numbers and texts may be here."""
        return not (self.anything or self.module or self.loaded)

    def wanted(self) -> str:
        """What is asked for, in words."""
        made = [kind for kinds, _ in self.factories for kind in kinds]
        names = dict.fromkeys(kind.__name__ for kind in (*self.classes, *made, *self.kinds))
        more = [
            word
            for word, here in (
                ("a function", self.callables),
                ("a list", self.items),
                ("a mapping", self.values),
                ("a text", self.text),
                ("plain data", self.anything),
            )
            if here
        ]
        return " or ".join((*names, *more)) or "a number"


def place_of(*hints: Any) -> Place:
    """Read type hints, of which one holds, as the parser does; unknown ones accept plain data."""
    place = Place()
    for hint in hints:
        _add(place, hint)
    return place


def _add(place: Place, hint: Any) -> None:
    """Let a place accept what a hint accepts as well."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (Any, object, inspect.Parameter.empty):
        place.anything = place.null = True
    elif hint in (None, type(None)):
        place.null = True
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            _add(place, argument)
    elif origin is typing.Annotated:
        _add(place, arguments[0])
    elif isinstance(hint, typing.NewType):
        _add(place, hint.__supertype__)
    elif type(hint).__name__ == "TypeAliasType":  # of Python 3.12 or typing_extensions
        _add(place, hint.__value__)
    elif origin is Literal:
        place.text = place.text or any(isinstance(argument, str) for argument in arguments)
    elif collections.abc.Callable in (origin, hint) or hint is typing.Callable:
        _add_callable(place, arguments)
    elif type in (origin, hint):
        kinds = place_of(arguments[0]).classes if arguments else ()
        place.kinds += kinds or (object,)
    elif isinstance(origin or hint, type):
        _add_class(place, origin or hint, arguments)
    else:
        place.anything = place.null = True


def _add_callable(place: Place, arguments: tuple[Any, ...]) -> None:
    made = place_of(arguments[-1]).classes if arguments else ()
    if made:
        given = arguments[0]
        place.factories += ((made, len(given) if isinstance(given, list) else 1),)
    else:
        place.callables = True


def _add_class(place: Place, kind: type, arguments: tuple[Any, ...]) -> None:
    if kind in _NUMBERS:
        return
    if kind in (types.ModuleType, types.UnionType, types.GenericAlias):
        place.module = True
    elif issubclass(kind, _TEXT):
        place.text = True
    elif typing.is_typeddict(kind):
        place.values += (Any,)
    elif issubclass(kind, tuple) and hasattr(kind, "_fields"):
        place.items += (Any,)
        place.values += (Any,)
    elif kind.__module__ in _CONTAINERS and issubclass(kind, Mapping):
        place.values += arguments[1:] or (Any,)
    elif kind.__module__ in _CONTAINERS:
        place.items += tuple(item for item in arguments if item is not Ellipsis) or (Any,)
    else:
        place.classes += (kind,)
        if is_subclasses_disabled(kind):
            place.records += (kind,)


@cache
def parameters_of(callable_: Callable[..., Any]) -> list[ParamData]:
    """The parameters of a class or function as the parser sees them, inherited ones included."""
    return list(get_signature_parameters(callable_, logger=False))


@cache
def defaults_of(callable_: Callable[..., Any]) -> dict[str, frozenset[str]]:
    """The names of what the parameters of a class have by default."""
    return {p.name: names_of(p.default) for p in parameters_of(callable_)}


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


def is_a(found: type, kind: type) -> bool:
    """Whether a class is what is asked for: a subclass, or one with the methods of a protocol."""
    if not getattr(kind, "_is_protocol", False):
        return issubclass(found, kind)
    methods = [name for name, value in vars(kind).items() if inspect.isfunction(value)]
    return all(hasattr(found, name) for name in methods if not name.startswith("_"))
