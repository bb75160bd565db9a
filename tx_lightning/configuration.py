"""How files and words become one configuration, what they set, and how two of them differ.

Mappings merge key by key. A list replaces the earlier one, and its elements inherit nothing from
those that were there; `key+` appends instead.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import Namespace, get_loader, set_dumper, set_loader
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import NestedArg, parse_value_or_config
from lightning.pytorch.cli import LightningArgumentParser

from tx_lightning.errors import ConfigurationError

_MODE = "yaml without duplicate keys"
_COMPOSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"  # the key <<


class NotYAML(ConfigurationError):
    """A file is not UTF-8 or not YAML."""


class DuplicateKey(ConfigurationError):
    """A mapping in YAML has a key twice."""


class ConfigurationParser(LightningArgumentParser):
    """The parser of every verb: lists replace earlier lists, keys are unique, numbers are finite.

    Raises:
        ArgumentError: Words or files are not accepted.
        DuplicateKey: A file has a key twice.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"parser_mode": _MODE, "exit_on_error": False, **options})
        # What begins like this is a value and no option; argparse knows neither -1e-3 nor -.inf.
        self._negative_number_matcher = re.compile(r"-\.?(\d|inf|nan)", re.IGNORECASE)

    # jsonargparse copies this method into its class of argument groups.
    def add_argument(self, *args: Any, **options: Any) -> Any:
        action = super().add_argument(*args, **options)
        if type(action) is ActionTypeHint:
            action.__class__ = _Option
        return action

    def _apply_actions(
        self, cfg: Any, parent_key: str = "", prev_cfg: Any = None, skip_fn: Any = None
    ) -> Namespace:
        """Take the values of a file; jsonargparse passes over a section that is no mapping."""
        for name in self.groups or ():
            section = cfg.get(name) if isinstance(cfg, Mapping) and not parent_key else None
            if not isinstance(section, Mapping | Namespace | str | None):
                raise TypeError(f'Parser key "{name}": {_short(section)} is no section of keys')
        return super()._apply_actions(cfg, parent_key, prev_cfg, skip_fn)

    def validate(self, namespace: Namespace, skip_unset: bool = True, **options: Any) -> None:
        """Check all values, nulls included: jsonargparse lets a null pass for any type."""
        super().validate(namespace, skip_unset=False, **options)


class _Option(ActionTypeHint):
    """An option of a verb, or an argument of a class that a configuration names."""

    def _check_type(
        self, value: Any, append: bool = False, cfg: Any = None, mode: str | None = None
    ) -> Any:
        """Parse a value of a file or word, on top of what was there before (cfg)."""
        new = self._loaded(value)
        if cfg and not append and self.dest in cfg:
            old = cfg[self.dest]
            if _is_mapping(old) and _is_mapping(new) and old != self.default:
                value = new = _merged(old, new)
            inherited = _inherited(old, new)
            cfg = Namespace({self.dest: inherited})  # type: ignore[no-untyped-call]
        if isinstance(value, list) and all(isinstance(item, _PLAIN) for item in value):
            value = _Plain(value)
        try:
            parsed = super()._check_type(  # type: ignore[no-untyped-call]
                value, append=append, cfg=cfg, mode=mode
            )
        except OverflowError:  # an integer of hundreds of digits for a float
            raise self._refusal(f"{_short(value)} is not a finite number") from None
        except TypeError as error:
            kinds = _kinds(self._typehint)
            no_number = {"int", "float"} & set(kinds) and isinstance(value, str | int | float)
            if no_number or (kinds and value is None):
                raise self._refusal(_not_one_of(kinds, value)) from error
            raise
        if isinstance(parsed, _Plain):
            parsed = list(parsed)
        for number in _numbers(parsed):
            # Nobody gave a default: some classes mean "no limit" by infinity.
            if not math.isfinite(number) and str(parsed) != str(self.default):
                raise self._refusal(f"{number} is not a finite number")
        return parsed

    def _refusal(self, why: str) -> TypeError:
        """In the form of jsonargparse, on one line, which `diagnosis` looks for."""
        return TypeError(f'Parser key "{self.dest}": {why}')

    def _loaded(self, value: Any) -> Any:
        """What a word or a file of a word holds; super() says what is wrong with it."""
        try:
            return parse_value_or_config(value, enable_path=self._enable_path)[0]
        except DuplicateKey as error:
            if self._is_valid_string(value):  # type: ignore[no-untyped-call]
                return value  # a text that looks like YAML
            raise self._refusal(str(error)) from error
        except (yaml.YAMLError, TypeError, ValueError, OSError):
            return value


_NAMES = ("resume", "ckpt_path", "pretrained", "name", "runs_dir")  # of files and folders
_PLAIN = (str, int, float, NoneType)


class _Plain(list[Any]):
    """A list of plain values, of which the parser makes a copy for each of them."""

    def __deepcopy__(self, memo: Any) -> "_Plain":
        return self


def _is_mapping(value: Any) -> bool:
    """Whether a value is a mapping in its own right, and not a class with its arguments."""
    return isinstance(value, dict) and "class_path" not in value


def _merged(old: dict[Any, Any], new: dict[Any, Any]) -> dict[Any, Any]:
    both = {key for key in new if _is_mapping(old.get(key)) and _is_mapping(new[key])}
    return old | {key: _merged(old[key], new[key]) if key in both else new[key] for key in new}


def _kinds(hint: Any) -> list[str]:
    """The names of the plain types among those of a type hint."""
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = {int: "int", float: "float", bool: "bool", str: "str", NoneType: "null"}
    return [names[kind] for kind in hints if kind in names]


def _short(value: object) -> str:
    text = str(value) or "''"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _not_one_of(kinds: list[str], value: str | float | None) -> str:
    """The refusal of something else where a number is expected."""
    plain = _short(value) if isinstance(value, str | float) else json.dumps(value)
    looks = "0.001 or 1e-3" if "float" in kinds else "3 or -1"
    hint = f"; a number looks like {looks}" if isinstance(value, str) else ""
    if value is None:
        hint = "; give it a value"
    return f"{plain} is not {' or '.join(kinds)}{hint}"


def _inherited(old: Any, new: Any) -> Any:
    """The part of an earlier value that a new one is merged with; nothing of a replaced list."""
    if isinstance(new, NestedArg):  # --key.inner=value
        inner, _, rest = new.key.partition(".")
        if not isinstance(old, dict) or inner not in old:
            return old
        return {**old, inner: _inherited(old[inner], NestedArg(rest, new.val) if rest else new.val)}
    if isinstance(new, list | tuple):
        return []
    if isinstance(old, dict) and isinstance(new, Mapping):
        return {key: _inherited(old[key], new[key]) for key in old if key in new}
    return old


def _numbers(value: Any) -> Iterator[float]:
    """The numbers of a parsed value; the arguments of classes are values of their own options."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, Namespace):
        yield from _numbers(value.get("dict_kwargs"))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _numbers(item)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        OSError: It cannot be read.
        NotYAML: It is not UTF-8, or not YAML.
        DuplicateKey: A key occurs twice; says where.
    """
    try:
        return load_yaml(Path(path).read_text(encoding="utf-8"))
    except DuplicateKey as error:
        raise DuplicateKey(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise NotYAML(f"{path} is not UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise NotYAML(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def load_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does, but refuse duplicate keys.

    Raises:
        YAMLError: The text is not YAML.
        DuplicateKey: A key occurs twice in a mapping.
    """
    try:
        _refuse_duplicates(yaml.compose(text, Loader=_COMPOSER), (), set())
        return get_loader("yaml")(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except DuplicateKey:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def dumped(parser: LightningArgumentParser, config: Namespace, *, links: bool = False) -> str:
    """The YAML text of what this parser has parsed, which it does not check a second time.

    Args:
        parser: Of a verb, or of all.
        config: What it made of words and files.
        links: Whether values that follow from others are written too.
    """
    text = parser.dump(
        config, format=_MODE, skip_unset=False, skip_validation=True, skip_link_targets=not links
    )
    assert isinstance(text, str)
    return text


def _refuse_duplicates(node: yaml.Node | None, path: tuple[str, ...], seen: set[int]) -> None:
    if node is None or id(node) in seen:  # an alias is the node that it names
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _refuse_duplicates(item, (*path, str(position)), seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, name) in lines:
                    raise DuplicateKey(
                        f"{'.'.join((*path, name))} is given twice, in lines "
                        f"{lines[key.tag, name]} and {line}; keep one"
                    )
                lines[key.tag, name] = line
            _refuse_duplicates(value, (*path, name), seen)


class _Dumper(yaml.SafeDumper):
    """Writes a member of an Enum, as some classes have by default, as its value."""


def _represent_member(dumper: yaml.SafeDumper, member: Enum) -> yaml.Node:
    return dumper.represent_data(member.value)


def _dump_yaml(tree: Any) -> str:
    text: str = yaml.dump(tree, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
    return text


_Dumper.add_multi_representer(Enum, _represent_member)
set_loader(_MODE, load_yaml, (yaml.YAMLError,))
set_dumper(_MODE, _dump_yaml)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one level of dotted keys, `init_args` left out of them."""
    if isinstance(tree, Mapping) and tree:
        items = [("" if key == "init_args" else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = [(str(position), item) for position, item in enumerate(tree)]
    else:
        return {prefix: tree} if prefix else {}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flat(value, ".".join(part for part in (prefix, key) if part))
    return leaves


def given(words: Sequence[str]) -> dict[str, Any]:
    """The values that command line words and the YAML files they name set, the last one winning.

    It reads what it can: what is wrong with a word or a file is for the parser to say.

    Raises:
        ConfigurationError: A configuration is a folder, a pipe or a device, which cannot be read
            again, or never ends.
    """
    values: dict[str, Any] = {}
    for key, text in options(words):
        if key in ("config", "c"):
            with contextlib.suppress(OSError):  # the word may be a configuration itself
                if Path(text).exists() and not Path(text).is_file():
                    raise ConfigurationError(f"--{key} {text}: it is not a file")
            values |= flat(_mapping(text))
            continue
        try:
            value = load_yaml(text)
        except (yaml.YAMLError, DuplicateKey):
            value = text
        if key in _NAMES and value is not None:
            value = text  # 010 is a folder, and not the number 8
        values |= flat(value, key.replace(".init_args", ""))
    return values


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options among words, as (name without dashes, value)."""
    for position, word in enumerate(words):
        if not word.startswith("--") and word.partition("=")[0] not in ("-c", "-h"):
            continue  # a value, maybe a negative number
        key, equals, text = word.lstrip("-").partition("=")
        follows = words[position + 1] if position + 1 < len(words) else ""
        yield key, text if equals else follows


def without_option(words: Sequence[str], key: str) -> list[str]:
    """The words without `--key value` and `--key=value`."""
    rest: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == f"--{key}":
            skip = True
        elif not word.startswith(f"--{key}="):
            rest.append(word)
    return rest


_SINUSOIDS = (
    "tx_lightning.nn.SinusoidalPositions",
    "tx_lightning.nn.positions.SinusoidalPositions",
)


def upgraded_settings(settings: Any) -> Any:
    """Return the model settings of a checkpoint of format 1 with what they left unsaid.

    Sinusoids had no scale then, and were as large as 1 beside token embeddings of any size. The
    weights were trained with that, so it is written into the settings of every sinusoid.

    Args:
        settings: Nested mappings and lists, as `{"class_path": ..., "init_args": ...}`.
    """
    if isinstance(settings, list):
        return [upgraded_settings(value) for value in settings]
    if isinstance(settings, str) and settings in _SINUSOIDS:
        settings = {"class_path": settings}
    if not isinstance(settings, Mapping):
        return settings
    found = {
        key: value if key == "class_path" else upgraded_settings(value)
        for key, value in settings.items()
    }
    if found.get("class_path") in _SINUSOIDS:
        arguments = found.get("init_args") or {}
        scale = 1.0 if arguments.get("scale") is None else arguments["scale"]
        found["init_args"] = {**arguments, "scale": scale}
    if "scale_embeddings" in found and "positions" not in found:  # an EncoderDecoder's default
        found["positions"] = upgraded_settings(_SINUSOIDS[0])
    return found


def _mapping(path: str) -> Mapping[str, Any]:
    try:
        tree = read_yaml(path)
    except (OSError, ConfigurationError):
        return {}
    return tree if isinstance(tree, Mapping) else {}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys at which two nested mappings differ, with both values (None: absent)."""
    left, right = flat(ours), flat(theirs)
    keys = [*left, *(key for key in right if key not in left)]
    pairs = {key: (left.get(key), right.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
