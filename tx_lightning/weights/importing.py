"""`import_weights`: a folder of Hugging Face becomes a checkpoint that every verb takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import LightningModule

from tx_lightning.building import build
from tx_lightning.checkpoints import RECORD, checkpoint_record, write_atomically
from tx_lightning.settings import approve_task
from tx_lightning.trust import Trust
from tx_lightning.walking import SettingsError
from tx_lightning.weights import bert, gpt2, seq2seq
from tx_lightning.weights.configuration import Arguments, Configuration
from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.folders import (
    CONFIG,
    GENERATION,
    check_writable,
    local_folder,
    read_config,
    read_json,
    read_tensors,
    reason,
)
from tx_lightning.weights.plans import Family, ImportPlan
from tx_lightning.weights.rules import Tensors, listed
from tx_lightning.weights.tokenizer_files import read_tokenizers

IMPORTED = "imported"  # the entry of a checkpoint with what writing the folder again needs
FAMILIES = {
    family.model_type: family for family in (gpt2.FAMILY, bert.FAMILY, seq2seq.BART, seq2seq.MARIAN)
}


@dataclass(frozen=True)
class Imported:
    """What a folder became.

    Args:
        architecture: What was read.
        task: The class of the task that it became.
        parameters: How many numbers were taken, tied ones once.
        notes: What the user should know, a line each.
    """

    architecture: str
    task: str
    parameters: int
    notes: list[str]


def import_weights(
    folder_or_name: str,
    output: str | Path,
    *,
    task: str | None = None,
    n_texts: int = 1,
    trust: str | Iterable[str] = (),
) -> Imported:
    """Write a checkpoint with the network, the weights and the tokenizers of a folder.

    Args:
        folder_or_name: A folder with config.json, weights and tokenizer, or the name of a model of
            the Hugging Face hub, which is downloaded to its cache.
        output: The checkpoint to write; it must not exist.
        task: What to make of it, such as `Classification`, where it is open or the head is to be
            another.
        n_texts: How many texts a classifier takes at once, 1 or 2.
        trust: Packages whose classes what is built may name, as in `load_task`.

    Raises:
        WeightsError: The folder cannot be read or represented.
        CheckpointError: The checkpoint cannot be written.
    """
    output = Path(output)
    _check_output(output)
    folder = local_folder(folder_or_name)
    values = read_config(folder)
    family, architecture = _family(values, folder)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    config, passed_over = _configuration(values, generation, family, folder)
    plan = family.plan(config, architecture, task)
    _check_texts(n_texts, plan)
    tensors, where = read_tensors(folder)
    tensors = _renamed(tensors, family, where)
    plan, notes = _settle(plan, tensors)
    notes += passed_over
    tokenizers = read_tokenizers(folder, config, family)
    plan.table.check_names(tensors, where)
    with torch.device("meta"):  # no memory is allocated before the shapes match the file
        built = build_task(plan.settings, trust=trust)
    shapes = {n: t.shape for n, t in built.get_submodule("network").state_dict().items()}
    ours, kept = plan.table.read(tensors, shapes, where)
    state, new = _state(built, ours, plan, trust)
    if new:
        notes.append(f"new, and to be trained: {listed(new)}")
    record = checkpoint_record(
        plan.settings,
        tokenizers.to_dict(),
        labels=plan.labels,
        n_texts=None if plan.labels is None else n_texts,
    )
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": state,
        RECORD: record,
        IMPORTED: {"config": values, "generation": generation, "kept": kept},
    }
    try:
        built.on_load_checkpoint(checkpoint)  # refuses what does not suit the network
    except ValueError as error:
        raise WeightsError(f"{folder}: {reason(error)}") from error
    write_atomically(checkpoint, output)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    return Imported(architecture, plan.task, parameters, notes)


def _check_output(output: Path) -> None:
    """Refuse a path that exists or cannot be written."""
    check_writable(output)
    if output.is_dir():
        raise WeightsError(f"{output} is a folder: give the name of a file")
    if output.exists():
        raise WeightsError(f"{output} exists already: choose a new name")


def _family(values: Mapping[str, Any], folder: Path) -> tuple[Family, str]:
    """The family and architecture that a config.json names."""
    named = values.get("architectures")
    architecture = None if named is None or named == [] else str(named)
    if isinstance(named, list) and named:
        architecture = str(named[0])
    known = {name: family for family in FAMILIES.values() for name in family.architectures}
    model_type = values.get("model_type")
    family = None if architecture is None else known.get(architecture)
    if architecture is None and isinstance(model_type, str):
        family = FAMILIES.get(model_type)
    if family is not None and model_type in (None, family.model_type):
        return family, architecture or family.architectures[0]
    what = f"model_type is {model_type}"
    if architecture is not None:
        what = f"architectures is {architecture}, model_type {model_type}"
    raise WeightsError(f"{folder / CONFIG}: {what}; supported: {', '.join(known)}")


def _configuration(
    values: Mapping[str, Any], generation: Mapping[str, Any], family: Family, folder: Path
) -> tuple[Configuration, list[str]]:
    """Merge config.json and generation_config.json; return notes on what is ignored."""
    where = str(folder / GENERATION)
    config = Configuration(values, family.defaults, str(folder / CONFIG))
    config.check_token_ids()
    ids = {**generation, "vocab_size": config.integer("vocab_size")}
    Configuration(ids, {}, where).check_token_ids()
    config.only("quantization_config", None)
    overridden = {
        name: generation[name] for name in family.overridden if generation.get(name) is not None
    }
    notes = []
    ends = overridden.get("eos_token_id")
    if isinstance(ends, list) and len(ends) != 1:
        del overridden["eos_token_id"]
        notes.append(
            f"{GENERATION} has several eos_token_id, {ends}: only that of {CONFIG} is used"
        )
    config.override(overridden, where)
    return config, notes


def _check_texts(n_texts: int, plan: ImportPlan) -> None:
    """Refuse text pairs for tasks that take one text."""
    if n_texts not in (1, 2):
        raise WeightsError(f"--n_texts {n_texts}: a classifier takes 1 or 2 texts")
    if n_texts == 2 and plan.task != "Classification":
        raise WeightsError(f"--n_texts 2: a {plan.task} takes one text; leave the option out")


def _renamed(tensors: Tensors, family: Family, where: str) -> Tensors:
    """Tensors by the names that a file with a head has today."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        new = name
        if name.partition(".")[0] in family.parts:
            new = f"{family.base}.{name}"
        if name.endswith((".gamma", ".beta")):  # what TensorFlow calls them
            new = new.replace(".gamma", ".weight").replace(".beta", ".bias")
        if new in renamed:
            raise WeightsError(f"{where} has {new} twice, once as {name}")
        renamed[new] = tensor
    return renamed


def _settle(plan: ImportPlan, tensors: Tensors) -> tuple[ImportPlan, list[str]]:
    """Leave out of a plan what the folder does not have, and of the tensors what has no place."""
    notes = list(plan.notes)
    rules = [
        rule
        for rule in plan.table.rules
        if not rule.ours.startswith(plan.new) or any(name in tensors for name in rule.theirs)
    ]
    wanted = {name for rule in rules for name in rule.theirs} | plan.table.theirs_tied.keys()
    for beginning, what in plan.dropped.items():
        left = [name for name in tensors if name.startswith(beginning) and name not in wanted]
        for name in left:
            del tensors[name]
        if left:
            notes.append(f"left out: {what} ({beginning}*), as a {plan.task} has none")
    return replace(plan, table=replace(plan.table, rules=rules)), notes


def build_task(settings: Arguments, *, trust: str | Iterable[str] = ()) -> LightningModule:
    """Build the task; what stays new is the same each time.

    Args:
        settings: Its class path and arguments.
        trust: Packages whose classes they may name.
    """
    where = "a task of these settings cannot be built"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return build(approve_task(settings, Trust.of(trust), where), where)
        except SettingsError as error:
            raise WeightsError(str(error)) from error
        except ArgumentError as error:
            raise WeightsError(f"{where}: {' '.join(str(error).split())}") from error


def _state(
    task: LightningModule, ours: Tensors, plan: ImportPlan, trust: str | Iterable[str]
) -> tuple[Tensors, list[str]]:
    """Build the state dict of a task; return the names of newly initialized tensors as well."""
    own = task.get_submodule("network").state_dict()
    new = [name for name in own if name not in ours]
    assert all(name.startswith(plan.new) for name in new), new
    if new:
        initial = build_task(plan.settings, trust=trust).get_submodule("network").state_dict()
        ours = {**ours, **{name: initial[name] for name in new}}
    # float32 copies that share no memory with the file; tied tensors stay tied.
    copies = {
        id(tensor): tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for tensor in ours.values()
    }
    state = {f"network.{name}": copies[id(ours[name])] for name in own}
    assert state.keys() == task.state_dict().keys()
    return state, new
