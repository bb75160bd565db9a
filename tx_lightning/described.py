"""What an object was built with, so that it can be written down as settings and built again.

A task that was built in Python has no configuration. So its class, and the classes of its parts,
keep the arguments that they were called with, as `{"class_path": ..., "init_args": {...}}`.
"""

import functools
import inspect
import numbers
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType, MethodType
from typing import Any

from torch.nn import Module

_NAME = "_description"  # the attribute of an object


class CannotDescribe(ValueError):
    """There is no way to write a value into a file."""


@dataclass
class Description:
    """An object as settings.

    Attributes:
        settings: Its class path and arguments.
        missing: Arguments that cannot be written down and are left out, each with the reason; one
            named "" is the class itself.
    """

    settings: dict[str, Any]
    missing: dict[str, str] = field(default_factory=dict)


class Described:
    """Base of classes whose objects remember what they were built with.

    They do so in a slot, which is not among their variables; modules, whose state is their
    variables when they are copied, in one of these.
    """

    __slots__ = (_NAME,)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _describing(cls.__init__)  # type: ignore[method-assign]


def description_of(built: object) -> Description | None:
    """What an object was built with; None where its class does not keep it."""
    if isinstance(built, Module):
        return vars(built).get(_NAME)
    return getattr(built, _NAME) if hasattr(built, _NAME) else None


def _keep(built: object, description: Description | None) -> None:
    if isinstance(built, Module):
        vars(built)[_NAME] = description
    else:
        setattr(built, _NAME, description)


def _describing(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor so that it keeps its arguments, unless a subclass's constructor does."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def describing(self: Any, *args: Any, **kwargs: Any) -> None:
        if _NAME in vars(self) or hasattr(self, _NAME):
            init(self, *args, **kwargs)
            return
        _keep(self, None)
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError:
            init(self, *args, **kwargs)  # tells what is wrong
            raise
        watched = {
            name: _Watched(value)
            for name, value in given.arguments.items()
            if isinstance(value, FunctionType | MethodType | functools.partial)
        }
        described = dict(given.arguments) | watched
        given.arguments.update(watched)
        init(*given.args, **given.kwargs)
        for name, value in vars(self).items():
            if isinstance(value, _Watched) and value in watched.values():
                vars(self)[name] = value.factory
        _keep(self, _describe(type(self), signature, described))

    return describing


class _Watched:
    """A factory that remembers the description of what it makes."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self.factory = factory
        self.made: list[Description] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self.factory(*args, **kwargs)
        description = description_of(made)
        if description is not None:
            self.made.append(_without(description, type(made), args, kwargs))
        return made


def _without(
    description: Description, kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Description:
    """The description of an object without what its factory was called with."""
    names = list(inspect.signature(kind).parameters)
    called = dict(zip(names, args, strict=False)) | dict(kwargs)
    arguments = description.settings["init_args"]
    missing = dict(description.missing)
    for name, value in called.items():
        if arguments.get(name, value) != value:
            missing[name] = f"the factory calls its class with another {name}"
    rest = {name: value for name, value in arguments.items() if name not in called}
    return Description(description.settings | {"init_args": rest}, missing)


def _describe(kind: type, signature: inspect.Signature, given: Mapping[str, Any]) -> Description:
    arguments: dict[str, Any] = {}
    missing: dict[str, str] = {}
    _, *parameters = signature.parameters.values()
    for parameter in parameters:
        if parameter.name not in given:
            continue
        value = given[parameter.name]
        if parameter.kind == parameter.VAR_KEYWORD:
            for name, more in value.items():
                _add(arguments, missing, name, more)
        elif parameter.kind == parameter.VAR_POSITIONAL:
            if value:
                missing[parameter.name] = "arguments without a name"
        else:
            _add(arguments, missing, parameter.name, value)
    try:
        path = _path(kind)
    except CannotDescribe as error:
        path, missing = "", {"": str(error), **missing}
    return Description({"class_path": path, "init_args": arguments}, missing)


def _add(arguments: dict[str, Any], missing: dict[str, str], name: str, value: Any) -> None:
    """Add an argument to those that are written down, or to those that cannot be."""
    found: dict[str, str] = {}
    try:
        described = _value(value, found)
    except CannotDescribe as error:
        missing[name] = str(error)
        return
    missing.update({f"{name}.{inner}".rstrip("."): why for inner, why in found.items()})
    arguments[name] = described


def _value(value: Any, missing: dict[str, str]) -> Any:
    """A value as plain data; what is missing inside of it is added to `missing`.

    Raises:
        CannotDescribe: It has no such form.
    """
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_value(item, missing) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _value(item, missing) for key, item in value.items()}
    if isinstance(value, type):
        return {"class_path": _path(value), "init_args": {}}
    description = _of_factory(value) if isinstance(value, _Watched) else description_of(value)
    if description is not None:
        missing.update(description.missing)
        return description.settings
    factory = value.factory if isinstance(value, _Watched) else value
    if isinstance(factory, functools.partial) and isinstance(factory.func, type):
        if factory.args:
            raise CannotDescribe("functools.partial with an argument that has no name")
        inner: dict[str, Any] = {}
        for name, argument in factory.keywords.items():
            _add(inner, missing, name, argument)
        return {"class_path": _path(factory.func), "init_args": inner}
    if isinstance(factory, FunctionType) and factory.__module__.startswith("tx_lightning."):
        return _path(factory)
    if callable(factory):
        raise CannotDescribe(f"a function ({getattr(factory, '__name__', type(factory).__name__)})")
    raise CannotDescribe(f"a {type(value).__name__}")


def _of_factory(watched: _Watched) -> Description | None:
    """The description of all that a factory made, which must be one and the same."""
    for other in watched.made[1:]:
        if other.settings != watched.made[0].settings:
            raise CannotDescribe("a function that does not always make the same")
    return watched.made[0] if watched.made else None


def _path(named: Any) -> str:
    """The shortest name by which a class or function can be imported."""
    name = named.__qualname__
    if "<" in name:
        raise CannotDescribe(f"{name}, which is defined inside of a function")
    parts = named.__module__.split(".")
    for length in range(1, len(parts)):
        package = ".".join(parts[:length])
        if package in sys.modules and vars(sys.modules[package]).get(name) is named:
            return f"{package}.{name}"
    return f"{named.__module__}.{name}"
