"""Build tasks from settings, while the parser that does it can import only what was approved."""

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from jsonargparse import ArgumentError
from jsonargparse import _actions as parser_actions
from jsonargparse import _typehints as parser_types
from lightning.pytorch import LightningModule

from tx_lightning.configuration import ConfigurationParser, dumped, load_yaml
from tx_lightning.trust import is_dotted
from tx_lightning.walking import Approved, SettingsError

NOTHING: Mapping[str, Any] = MappingProxyType({})
# How the parser turns a text into a class, or into a module: where one of these is gone, nothing is
# parsed. Only newer ones look for a module first, which imports the packages that it is in.
LOADERS = ((parser_types, "import_object"), (parser_actions, "import_object"))
MODULE_LOADERS = (
    (parser_types, "import_module"),
    *((parser_types, name) for name in ("find_spec",) if name in vars(parser_types)),
)
_LOCK = threading.RLock()  # one guard at a time


class NotApproved(ImportError, ValueError):
    """The parser tried to import what was not approved; both are refusals to it."""


@contextlib.contextmanager
def only(approved: Approved, where: str) -> Iterator[None]:
    """In this context the parser can import what was approved, and nothing else.

    Args:
        approved: Its names, and what its consent covers.
        where: The file, for errors.

    Raises:
        SettingsError: The parser tried to import something else, whatever it did afterwards.
    """

    def permits(name: str) -> bool:
        try:
            return name in approved.names or approved.trust.find(name) is not None
        except ValueError:
            return False

    with _guarded(permits, where):
        yield


@contextlib.contextmanager
def all_but(names: frozenset[str], where: str) -> Iterator[None]:
    """In this context the parser cannot import certain names.

    Args:
        names: Texts of a file that is read together with a configuration of the user's own.
        where: The file, for errors.

    Raises:
        SettingsError: The parser tried to import one, whatever it did afterwards.
    """
    with _guarded(lambda name: name not in names, where):
        yield


@contextlib.contextmanager
def _guarded(permits: Callable[[str], bool], where: str) -> Iterator[None]:
    denied: list[str] = []

    def guard(original: Callable[..., Any], *, modules: bool = False) -> Callable[..., Any]:
        def load(name: Any, *further: Any, **options: Any) -> Any:
            permitted = name in sys.modules if modules else not is_dotted(str(name))
            if not permitted and not permits(str(name)):
                denied.append(str(name))
                raise NotApproved(f"{name} was not approved")
            return original(name, *further, **options)

        return load

    def refuse(error: Exception | None) -> None:
        if denied:
            raise SettingsError(f"{where}: {denied[0]} is nothing that it may import") from error

    with _LOCK:
        before = [(*place, getattr(*place)) for place in (*LOADERS, *MODULE_LOADERS)]
        try:
            for module, name, original in before:
                modules = (module, name) in MODULE_LOADERS
                setattr(module, name, guard(original, modules=modules))
            yield
        except Exception as error:
            refuse(error)
            raise
        finally:
            for place in before:
                setattr(*place)
    refuse(None)


def build(approved: Approved, where: str, changed: Mapping[str, Any] = NOTHING) -> LightningModule:
    """Build the task of approved settings.

    Args:
        approved: Settings of a task.
        where: The file, for errors.
        changed: Arguments of the task that replace those of the settings.

    Raises:
        ArgumentError: The class does not accept the settings.
        Exception: Whatever the classes raise that are built.
    """
    settings = approved.settings
    kind = approved.trust.find(settings["class_path"])
    parser = ConfigurationParser()
    parser.add_class_arguments(kind, "task", fail_untyped=False, instantiate=False)
    with only(approved, where):
        # A copy: the parser puts objects of its own into lists.
        parsed = parser.parse_object({"task": copy.deepcopy(settings["init_args"])})
        arguments = dict(parser.instantiate(parsed).task)
    task = kind(**{**arguments, **settings.get("dict_kwargs", {}), **changed})
    assert isinstance(task, LightningModule)
    return task


def try_parsing(approved: Approved, where: str) -> None:
    """Have the parser read approved settings alone, where it can import nothing else.

    Raises:
        SettingsError: It tried to import something else.
    """
    parser = ConfigurationParser()
    parser.add_subclass_arguments(LightningModule, "task", fail_untyped=False)
    with only(approved, where), contextlib.suppress(ArgumentError):  # said where it matters
        parser.parse_object({"task": copy.deepcopy(approved.settings)})


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with all that their classes have by default, as the command line has them.

    Args:
        settings: Of a task of this process, whose classes are imported already.

    Raises:
        ArgumentError: The classes cannot be built from settings.
    """
    parser = ConfigurationParser()
    parser.add_subclass_arguments(LightningModule, "task", fail_untyped=False)
    parsed = parser.parse_object({"task": copy.deepcopy(dict(settings))})
    found = load_yaml(dumped(parser, parsed, links=True))["task"]
    assert isinstance(found, dict)
    return found
