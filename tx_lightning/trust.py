"""Whose code a file may name: that of this package, torch and Lightning, and what the user trusts.

A checkpoint, and the configuration of a run that came with it, name classes. Building them runs
code, and so does importing their modules. So a name is checked before its module is imported, and
what it turns out to be is checked again afterwards.
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

from tx_lightning.configuration import given
from tx_lightning.errors import ConfigurationError

OPTION = "trust"
HELP = (
    "A package whose classes a checkpoint or a run folder may name, besides those of tx_lightning, "
    "torch and Lightning; may be repeated. Only here, never in a file."
)
# A file may name the classes below these without asking.
ROOTS = ("tx_lightning", "torch.nn", "torch.optim", "lightning.pytorch", "lightning.fabric")
# Demonstrations of Lightning, which download data and unpickle it, and whole networks of torch,
# which copy as many layers as a file says before anybody can count them.
_CLOSED = ("lightning.pytorch.demos", "torch.nn.modules.transformer")
# The functions that a file may name: default optimizers.
FUNCTIONS = frozenset(
    {"tx_lightning.tasks.task.fused_adamw", "tx_lightning.tasks.translation.fused_adam"}
)
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_LONGEST = 300  # characters of a class path
_MOST_NAMES = 4  # in an error


class UnknownName(ValueError):
    """A name that may be used leads nowhere."""


class ForbiddenName(ValueError):
    """A name of something that no file may use, whatever the user trusts."""


class ForeignName(ValueError):
    """A name that may be used once the user trusts a package.

    Attributes:
        package: That package.
    """

    def __init__(self, name: str, package: str) -> None:
        super().__init__(f"{name} is not trusted")
        self.package = package


def is_dotted(text: str) -> bool:
    """Whether a text could be a class path."""
    return len(text) <= _LONGEST and _DOTTED.fullmatch(text) is not None


@dataclass(frozen=True)
class Trust:
    """What the user has agreed to, besides the classes that need no consent.

    Args:
        packages: Packages or modules; a name below one of them is trusted.
        names: Names that are trusted one by one, as those in the user's own configuration.
        everything: Whether to trust all that there is, as a configuration of the user's own.
    """

    packages: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    everything: bool = False

    @classmethod
    def of(cls, packages: str | Iterable[str]) -> "Trust":
        """The consent that was given as an argument or on the command line.

        Raises:
            ConfigurationError: When a package cannot be trusted.
        """
        words = (packages,) if isinstance(packages, str) else tuple(packages)
        for word in words:
            if not is_dotted(f"{word}.x"):
                raise ConfigurationError(
                    f"--{OPTION} {word}: give the name of a package, as --{OPTION} my_package"
                )
            if _is_python(word):
                raise ConfigurationError(
                    f"--{OPTION} {word}: this is part of Python's own library, which a file must "
                    "never call"
                )
        return cls(tuple(dict.fromkeys(words)))

    def agreed(self, name: str) -> bool:
        """Whether the user has agreed to something of this name."""
        return self.everything or name in self.names or _below(name, self.packages)

    def covers(self, name: str) -> bool:
        """Whether something of this name may be imported."""
        return self.agreed(name) or (_below(name, ROOTS) and not _below(name, _CLOSED))

    def naming(self, *names: str) -> "Trust":
        """The same consent, and that to some names."""
        return replace(self, names=self.names | set(names))

    def find(self, name: str) -> Callable[..., Any]:
        """Import the class or function that a class path of a file names.

        Raises:
            ForeignName: It needs the user's consent; nothing was imported.
            ForbiddenName: It is nothing that a file may name.
            UnknownName: There is no such class, or its module cannot be imported.
        """
        if not is_dotted(name):
            raise UnknownName(f"{name!r} is not the full path of a class, as package.module.Class")
        if any(part.startswith("__") for part in name.removeprefix("__main__.").split(".")):
            raise ForbiddenName(f"{name} reaches into the inside of Python")
        self._require(name, name)
        found = _resolve(name)
        if isinstance(found, type):
            self._require(found.__module__, name)
            return found
        if not callable(found):
            raise ForbiddenName(f"{name} is no class, but a {type(found).__name__}")
        home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
        if home in FUNCTIONS or name in self.names or self.everything:
            return found
        if name in self.packages or (_below(name, self.packages) and _below(home, self.packages)):
            return found
        raise ForbiddenName(f"{name} is a function, and a file may name only classes")

    def _require(self, home: str, name: str) -> None:
        """Refuse a name, or what it leads to, where it is neither ours nor trusted."""
        if self.covers(home) or name in self.names or name in self.packages:
            return
        if _is_python(home) or _below(home, _CLOSED):
            raise ForbiddenName(f"{name} may not be named in a file: it is no part of a model")
        raise ForeignName(name, package_of(home))


NO_TRUST = Trust()


def package_of(name: str) -> str:
    """What has to be trusted for a name: its package, but of torch or Lightning only the module."""
    top, _, _ = name.partition(".")
    shared = any(root.partition(".")[0] == top for root in ROOTS)
    return name.rpartition(".")[0] if shared and "." in name else top


def _is_python(name: str) -> bool:
    top = name.partition(".")[0]
    return top in sys.stdlib_module_names and top != "__main__"


def _below(name: str, roots: Sequence[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _resolve(name: str) -> object:
    """What a dotted name leads to: a member of a module, or of a class in a module."""
    module_name, _, rest = name.rpartition(".")
    members = [rest]
    while True:
        try:
            found: object = import_module(module_name)
            break
        except ModuleNotFoundError as error:
            outer, dot, last = module_name.rpartition(".")
            if not dot or not f"{module_name}.".startswith(f"{error.name}."):
                raise UnknownName(f"{name} cannot be imported: {error}") from error
            module_name, members = outer, [last, *members]
        except Exception as error:  # of somebody's module, which the user trusts
            reason = " ".join(str(error).split())
            raise UnknownName(f"{name} cannot be imported: {reason}") from error
    for position, member in enumerate(members):
        if position and not isinstance(found, type):
            raise ForbiddenName(f"{name} reaches through {module_name} into something else")
        try:
            found = getattr(found, member)
        except AttributeError:
            raise UnknownName(f"{name}: {module_name} has no {member}") from None
    if isinstance(found, ModuleType):
        raise UnknownName(f"{name} is a module, not a class")
    return found


def take_trust(words: Sequence[str]) -> tuple[Trust, list[str]]:
    """Split the words of a command into the consent they give and the others.

    Raises:
        ConfigurationError: When a package is missing or cannot be trusted.
    """
    packages: list[str] = []
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word == f"--{OPTION}":
            packages.append(next(remaining, ""))
        elif word.startswith(f"--{OPTION}="):
            packages.append(word.partition("=")[2])
        else:
            rest.append(word)
    return Trust.of(packages), rest


def own_names(words: Sequence[str]) -> frozenset[str]:
    """The names in the user's own words, and in the files that they give with --config."""
    found: set[str] = set()
    for value in given(words).values():
        values = value if isinstance(value, list) else [value]
        found |= {name for name in values if isinstance(name, str) and is_dotted(name)}
    return frozenset(found)


def trust_words(packages: Iterable[str]) -> str:
    """The words that give consent, with a blank before each."""
    return "".join(f" --{OPTION} {package}" for package in dict.fromkeys(packages))


def refusal(where: str, foreign: dict[str, tuple[str, str]]) -> str:
    """The line that asks for consent.

    Args:
        where: The file.
        foreign: Its names, each with the place that has it and the package to trust.
    """
    shown = [f"{name} ({place})" for name, (place, _) in list(foreign.items())[:_MOST_NAMES]]
    more = len(foreign) - len(shown)
    names = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    packages = list(dict.fromkeys(package for _, package in foreign.values()))
    argument = f'"{packages[0]}"' if len(packages) == 1 else str(packages).replace("'", '"')
    return (
        f"{where} names code that is not part of tx_lightning, torch or Lightning, and using it "
        f"runs that code: {names}. If you trust it, add{trust_words(packages)} "
        f"(in Python {OPTION}={argument})"
    )
