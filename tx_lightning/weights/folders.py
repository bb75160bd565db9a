"""Folders of weights as Hugging Face lays them out, local or from its hub: read, and written whole.

A folder holds config.json and tensors: model.safetensors or pytorch_model.bin, or an index beside
their shards. Nothing in it is executed: pickles are read with `weights_only=True`.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

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


def local_folder(folder_or_name: str) -> Path:
    """The folder itself, or the one to which the hub's model of that name was downloaded.

    Raises:
        WeightsError: There is neither, or the hub cannot be reached.
    """
    folder = Path(folder_or_name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise WeightsError(f"{folder_or_name} is a file; give the folder that it is in")
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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(
            f"{name}: there is no such folder, and the Hugging Face hub gives no model of that "
            f"name: {reason}"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        WeightsError: It holds something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return values


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
    tensors: Tensors = {}
    for shard in sorted(set(places.values())):
        path = index.parent / Path(shard).name  # a shard lies beside its index
        if not path.is_file():
            raise WeightsError(f"{index} names {shard}, which is missing: download it again")
        tensors.update(_read_file(path))
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise WeightsError(f"{index} names tensors that its shards do not have: {listed(missing)}")
    return tensors


def _read_file(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        safetensors = _safetensors()
        try:
            loaded: Any = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise WeightsError(f"{path} is truncated or no safetensors file: {reason}") from error
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise WeightsError(
                f"{path} is refused: it is damaged, or holds Python objects besides tensors, which "
                "could run code; nothing of it was run"
            ) from error
        except (RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
            raise WeightsError(f"{path} is truncated or no file of torch") from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path} holds no dictionary of tensors")
    others = sorted(str(name) for name, value in loaded.items() if not isinstance(value, Tensor))
    if others:
        raise WeightsError(f"{path} holds more than tensors: {listed(others)}")
    return loaded


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
    texts: Iterable[tuple[str, str]] = (),
) -> None:
    """Write a new folder, whole or not at all.

    Args:
        folder: It must not exist, or be empty.
        tensors: What goes to model.safetensors.
        documents: JSON files by name.
        texts: Other files: name and text.

    Raises:
        WeightsError: The folder has something in it.
    """
    safetensors = _safetensors()
    folder = folder.absolute()
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        safetensors.torch.save_file(
            dict(tensors), temporary / SAFETENSORS, metadata={"format": "pt"}
        )
        for name, values in documents.items():
            text = to_json(values, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, "utf-8")
        for name, text in texts:
            (temporary / name).write_text(text, "utf-8")
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Refuse a folder, or file, that would be overwritten."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise WeightsError(f"{folder} exists already: choose a new folder")
