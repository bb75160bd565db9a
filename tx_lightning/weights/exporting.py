"""`export_weights`: a checkpoint becomes a folder that transformers loads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import nn

from tx_lightning.checkpoints import RECORD, load_task, read_checkpoint, require_finite
from tx_lightning.data.tokenizers import Tokenizers
from tx_lightning.decoding import Decoding, Greedy
from tx_lightning.models import (
    Classifier,
    EncoderDecoder,
    LanguageModel,
    MaskedLanguageModel,
    Tagger,
)
from tx_lightning.weights import bert, gpt2, marian, seq2seq
from tx_lightning.weights.configuration import Arguments, same_activation
from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.folders import CONFIG, GENERATION, check_free, write_folder
from tx_lightning.weights.generation import write_continuation, write_translation
from tx_lightning.weights.importing import FAMILIES, IMPORTED
from tx_lightning.weights.plans import ExportPlan
from tx_lightning.weights.rules import Tensors
from tx_lightning.weights.tokenizer_files import special_ids_of, tokenizer_documents


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Args:
        architecture: The class of transformers that loads the folder.
        notes: What the folder cannot express, one line each.
    """

    architecture: str
    notes: list[str]


@runtime_checkable
class Searches(Protocol):
    """A task that continues texts."""

    decoding: Decoding


@runtime_checkable
class Translates(Protocol):
    """A task that translates."""

    test_decoding: Decoding


def export_weights(
    checkpoint: str | Path, folder: str | Path, *, trust: str | Iterable[str] = ()
) -> str:
    """Write a checkpoint as a folder of Hugging Face; return the architecture it became.

    Args:
        checkpoint: Of `fit`, `average` or `import`.
        folder: It must not exist, or be empty.
        trust: Packages whose classes the checkpoint may name, as in `load_task`.

    Raises:
        CheckpointError: The checkpoint cannot be read, or its weights are not finite.
        WeightsError: No architecture there is what the network is, or the folder is not free.
    """
    return export_checkpoint(checkpoint, folder, trust=trust).architecture


def export_checkpoint(
    checkpoint: str | Path, folder: str | Path, *, trust: str | Iterable[str] = ()
) -> Exported:
    """Export as `export_weights` does; return notes as well."""
    folder = Path(folder)
    check_free(folder)
    task = load_task(checkpoint, trust=trust)
    saved = read_checkpoint(checkpoint, lazily=True)
    record, imported = saved[RECORD], _imported(saved)
    network = _network(task)
    plan = describe(network)
    tokenizers = Tokenizers.from_dict(record["tokenizers"])
    own_tokenizer = tokenizers.source.trained_here
    state: Tensors = network.state_dict()
    require_finite(state, f"checkpoint {checkpoint}")
    places: Mapping[int, int] = {i: i for i in range(plan.rows)}
    if imported["config"] and plan.model_type == "marian":
        tokenizers = marian.with_plain_padding(tokenizers, plan.rows) or tokenizers
    elif isinstance(task, Translates) and isinstance(network, EncoderDecoder):
        plan, state, tokenizers, places = seq2seq.lay_out(plan, network, state, tokenizers)
    tensors = plan.table.write(state, imported["kept"])
    for name, shape in plan.zeros.items():
        tensors[name] = torch.zeros(shape)
    config = _config(plan, tokenizers, record["labels"], imported["config"])
    longest = plan.longest
    if longest is None:
        longest = int({**plan.unsaid, **config}["max_position_embeddings"])
    documents: dict[str, dict[str, Any]] = {CONFIG: config}
    generation, notes = _generation(task, plan, tokenizers, imported["generation"], longest, places)
    if generation:
        documents[GENERATION] = generation
    literal = own_tokenizer and plan.model_type != "bert"
    documents.update(tokenizer_documents(tokenizers, plan.model_type, longest, literal=literal))
    write_folder(folder, tensors, documents)
    architecture = str(config["architectures"][0])
    return Exported(architecture, notes + _for_ctranslate2(plan, tokenizers, state))


def _imported(saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `import` kept of a folder in order to write it again; empty for other checkpoints."""
    entry = saved.get(IMPORTED, {})
    return {name: entry.get(name, {}) for name in ("config", "generation", "kept")}


def _network(task: LightningModule) -> nn.Module:
    try:
        return task.get_submodule("network")
    except AttributeError:
        raise WeightsError(
            f"a {type(task).__name__} has no network that could be written"
        ) from None


def describe(network: nn.Module) -> ExportPlan:
    """What a network becomes.

    Raises:
        WeightsError: Nothing.
    """
    if type(network) is LanguageModel:
        return gpt2.describe(network)
    if isinstance(network, MaskedLanguageModel | Classifier | Tagger) and type(network) in (
        MaskedLanguageModel,
        Classifier,
        Tagger,
    ):
        return bert.describe(network)
    if type(network) is EncoderDecoder:
        return seq2seq.describe(network)
    raise WeightsError(
        f"a {type(network).__name__} cannot be written; supported: LanguageModel, "
        "MaskedLanguageModel, Classifier, Tagger, EncoderDecoder"
    )


def _config(
    plan: ExportPlan, tokenizers: Tokenizers, labels: list[str] | None, imported: Arguments
) -> Arguments:
    """Build config.json; keep the imported one except for values that differ."""
    said = {
        "model_type": plan.model_type,
        "dtype": "float32",
        **plan.config,
        **_special_ids(tokenizers, plan),
        **_labels(labels, imported),
    }
    if not imported:
        return {**plan.unsaid, **_unsaid_ids(tokenizers, plan), **said}
    defaults = FAMILIES[plan.model_type].defaults
    config = {name: value for name, value in imported.items() if name != "torch_dtype"}
    for name, value in said.items():
        known = name in imported or name not in defaults or defaults[name] != value
        if known and not same_activation(imported.get(name), value):
            config[name] = value
    return config


def _special_ids(tokenizers: Tokenizers, plan: ExportPlan) -> Arguments:
    ids = special_ids_of(tokenizers.target)
    if plan.model_type == "bert":
        return {"pad_token_id": ids.pad}
    if plan.model_type == "gpt2":
        return {"eos_token_id": ids.eos}
    return {
        "pad_token_id": ids.pad,
        "eos_token_id": ids.eos,
        "decoder_start_token_id": ids.bos,
    }


def _unsaid_ids(tokenizers: Tokenizers, plan: ExportPlan) -> Arguments:
    """Special ids for which transformers would otherwise use those of a published model."""
    ids = special_ids_of(tokenizers.target)
    if plan.model_type == "bert":
        return {}
    if plan.model_type == "gpt2":
        return {"bos_token_id": ids.bos, "pad_token_id": ids.pad}
    first = ids.prefix[0] if ids.prefix else None
    return {"bos_token_id": first, "forced_eos_token_id": None}


def _labels(labels: list[str] | None, imported: Arguments) -> Arguments:
    if labels is None:
        return {}
    named = {str(i): label for i, label in enumerate(labels)}
    unnamed = {str(i): f"LABEL_{i}" for i in range(len(labels))}
    if imported and named == (imported.get("id2label") or unnamed):
        return {}
    return {
        "id2label": named,
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _generation(
    task: LightningModule,
    plan: ExportPlan,
    tokenizers: Tokenizers,
    imported: Arguments,
    longest: int,
    places: Mapping[int, int],
) -> tuple[Arguments, list[str]]:
    """Build generation_config.json, empty for encoders, and notes on what it cannot express."""
    if plan.model_type == "bert":
        return {}, []
    if imported:
        limited = imported.get("max_length") or imported.get("max_new_tokens")
        note = (
            f"{GENERATION} was imported and has no max_length: transformers stops after 20 tokens "
            "by default"
        )
        return imported, [] if limited else [note]
    target = tokenizers.target
    unused = range(target.vocab_size, plan.rows)
    if plan.model_type == "gpt2":
        search = task.decoding if isinstance(task, Searches) else Greedy()
        return write_continuation(search, special_ids_of(target), unused, longest)
    search = task.test_decoding if isinstance(task, Translates) else Greedy()
    return write_translation(search, special_ids_of(target), unused, longest, places)


def _for_ctranslate2(plan: ExportPlan, tokenizers: Tokenizers, state: Tensors) -> list[str]:
    """Explain in a note why CTranslate2 cannot run the folder, if it cannot."""
    entries, ids = tokenizers.target.vocab_size, special_ids_of(tokenizers.target)
    if plan.model_type == "bert":
        return []
    if not tokenizers.shared:
        why = "source and target have separate vocabularies, its converter supports one"
    elif entries != plan.rows:
        why = f"the embedding table has {plan.rows} rows, the tokenizer {entries} entries"
    elif plan.model_type == "marian" and ids.pad != plan.rows - 1:
        why = "its converter requires padding to be the last token"
    elif plan.model_type == "marian" and state["target_embedding.tokens.weight"][ids.bos].any():
        why = "it starts decoding from zeros, but the embedding of the start token is not 0"
    else:
        return []
    return [f"CTranslate2 cannot run this model: {why}"]
