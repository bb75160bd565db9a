"""Read and write folders in the layout of Hugging Face, local or from its hub.

A folder holds config.json and tensors: model.safetensors or pytorch_model.bin, or an index beside
their shards. Nothing in it is executed: pickles are read with `weights_only=True`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from tx_lightning.strict_json import to_json
from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.rules import Tensors, listed

CONFIG = "config.json"
GENERATION = "generation_config.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_INSTALL = "pip install 'tx-lightning[huggingface]'"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TEXTS = ["*.json", "*.txt", "*.spm"]  # configurations and tokenizers
_LONGEST_REASON = 200


@contextmanager
def damaged(path: Path, what: str) -> Iterator[None]:
    """Convert any exception that a library raises on a damaged file to a `WeightsError`.

    Args:
        path: The file.
        what: The message after the path, such as "is no tokenizer in JSON".
    """
    try:
        yield
    except (WeightsError, KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # tokenizers raises bare Exception, and Rust panics, which are none
        raise WeightsError(f"{path} {what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the message of an error as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def local_folder(folder_or_name: str) -> Path:
    """The folder itself, or the one to which the hub's model of that name was downloaded.

    Raises:
        WeightsError: There is neither, or the hub cannot be reached.
    """
    try:
        folder = Path(folder_or_name).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise WeightsError(f"{folder_or_name} is a file; give the folder that it is in")
    except (OSError, RuntimeError) as error:  # a name too long, or the home of nobody
        raise WeightsError(f"{folder_or_name}: there is no such folder: {reason(error)}") from error
    if not _NAME.fullmatch(folder_or_name) or folder_or_name.startswith("."):
        raise WeightsError(f"{folder_or_name}: there is no such folder")
    return _download(folder_or_name)


def _download(name: str) -> Path:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise WeightsError(
            f"{name}: there is no such folder, and for a model of the Hugging Face hub the package "
            f"huggingface-hub is missing: {_INSTALL}"
        ) from None

    def fetch(patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))

    try:
        folder = fetch([*_TEXTS, "model*.safetensors"])
        if not any(folder.glob("model*.safetensors")):
            folder = fetch([*_TEXTS, "pytorch_model*.bin"])
    except Exception as error:  # of its own, of its HTTP client and of the system
        raise WeightsError(
            f"{name}: there is no such folder, and the Hugging Face hub gives no model of that "
            f"name: {reason(error)}"
        ) from error
    return folder


def read_text(path: Path) -> str:
    """Read a file of UTF-8.

    Raises:
        WeightsError: It holds something else, or cannot be read.
    """
    with damaged(path, "is no text in UTF-8"):
        return path.read_text("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        WeightsError: It holds something else.
    """
    text = read_text(path)
    with damaged(path, "is not JSON"):
        values = json.loads(text, parse_constant=_no_number)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return values


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"it has {name} in place of a number")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        WeightsError: There is none; the message lists what is there.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise WeightsError(f"{folder} has no {CONFIG}; {contents(folder)}")
    return read_json(path)


def contents(folder: Path) -> str:
    """What is in a folder, for an error."""
    with damaged(folder, "cannot be read"):
        names = sorted(path.name for path in folder.iterdir())
    return f"it has {listed(names)}" if names else "it is empty"


def read_tensors(folder: Path) -> tuple[Tensors, str]:
    """Read all tensors of a folder, safetensors rather than pickles; return also where they were.

    Raises:
        WeightsError: There are none, a file is damaged, or a pickle holds more than tensors.
    """
    for name in (SAFETENSORS, PICKLE):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _read_file(folder / name), str(folder / name)
        if index.is_file():
            return _read_shards(index), str(index)
    raise WeightsError(f"{folder} has no {SAFETENSORS} and no {PICKLE}; {contents(folder)}")


def _read_shards(index: Path) -> Tensors:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise WeightsError(f"{index} has no weight_map: it is no index of shards")
    if not places or not all(isinstance(shard, str) for shard in places.values()):
        raise WeightsError(f"{index}: its weight_map does not name a shard for each tensor")
    tensors: Tensors = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if path.parent != index.parent or not path.name:
            raise WeightsError(
                f"{index} names {shard}, which is missing in its folder: a shard must lie beside "
                "its index"
            )
        with damaged(index, "names a shard that cannot be read"):
            there = path.is_file()
        if not there:
            raise WeightsError(f"{index} names {shard}, which is missing: download it again")
        found = _read_file(path)
        tensors.update((n, t) for n, t in found.items() if places.get(n, shard) == shard)
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise WeightsError(f"{index} names tensors that its shards do not have: {listed(missing)}")
    return tensors


def _read_file(path: Path) -> Tensors:
    loaded: Any
    if path.suffix == ".safetensors":
        safetensors = _safetensors()
        with damaged(path, "is truncated or no safetensors file"):
            loaded = safetensors.torch.load_file(path)
    else:
        with damaged(path, "is truncated or no file of torch"):
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True)
            except UnpicklingError as error:
                raise WeightsError(
                    f"{path} is refused: it is damaged, or holds Python objects besides tensors, "
                    "which could run code; nothing of it was run"
                ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path} holds no dictionary of tensors")
    others = sorted(
        str(name)
        for name, value in loaded.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    )
    if others:
        raise WeightsError(f"{path} holds more than tensors: {listed(others)}")
    return dict(loaded)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise WeightsError(f"the package safetensors is missing: {_INSTALL}") from None
    return safetensors


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    documents: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a new folder, whole or not at all.

    Args:
        folder: It must not exist, or be empty.
        tensors: What goes to model.safetensors.
        documents: JSON files by name.

    Raises:
        WeightsError: The folder has something in it, or cannot be written.
    """
    safetensors = _safetensors()
    folder = folder.absolute()
    check_free(folder)
    # An existing folder is kept: it may be a link, a mount point or the current directory.
    there = folder.is_dir()
    temporary = (folder if there else folder.parent) / f".{folder.name}.tmp-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        safetensors.torch.save_file(
            dict(tensors), temporary / SAFETENSORS, metadata={"format": "pt"}
        )
        for name, values in documents.items():
            text = to_json(values, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, "utf-8")
        if there:
            for path in temporary.iterdir():
                path.replace(folder / path.name)
        else:
            temporary.replace(folder)
    except (OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be written: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder, or that cannot be written."""
    check_writable(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise WeightsError(f"{folder} exists already: choose a new folder")


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be created."""
    try:
        place = path.absolute()
        while not place.exists():
            place = place.parent
        if place != path.absolute() and not place.is_dir():
            raise WeightsError(f"{path} cannot be written: {place} is a file")
        if not os.access(place, os.W_OK):
            raise WeightsError(f"{path} cannot be written: there is no permission for {place}")
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {reason(error)}") from error
