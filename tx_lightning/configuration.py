"""What the words of a command set, before they are parsed, and how two configurations differ."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


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
    """
    values: dict[str, Any] = {}
    for key, text in options(words):
        if key in ("config", "c"):
            values |= flat(_mapping(text))
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        values |= flat(value, key.replace(".init_args", ""))
    return values


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options among words, as (name without dashes, value)."""
    for position, word in enumerate(words):
        if not word.startswith("-"):
            continue
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
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, Mapping) else {}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys at which two nested mappings differ, with both values (None: absent)."""
    left, right = flat(ours), flat(theirs)
    keys = [*left, *(key for key in right if key not in left)]
    pairs = {key: (left.get(key), right.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
