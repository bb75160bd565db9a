"""`export_weights`: a checkpoint becomes a folder that transformers loads."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tx_lightning.checkpoints import RECORD, load_task, read_checkpoint
from tx_lightning.data.tokenizers import Tokenizers
from tx_lightning.models import (
    Classifier,
    EncoderDecoder,
    LanguageModel,
    MaskedLanguageModel,
    Tagger,
)
from tx_lightning.weights import bert, gpt2, seq2seq
from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.folders import CONFIG, GENERATION, check_free, write_folder
from tx_lightning.weights.importing import IMPORTED
from tx_lightning.weights.plans import ExportPlan
from tx_lightning.weights.tokenizer_files import special_ids_of, tokenizer_documents


def export_weights(
    checkpoint: str | Path, folder: str | Path, *, trust: str | Iterable[str] = ()
) -> str:
    """Write a checkpoint as a folder of Hugging Face; return the architecture it became.

    Args:
        checkpoint: Of `fit`, `average` or `import`.
        folder: It must not exist, or be empty.
        trust: Packages whose classes the checkpoint may name, as in `load_task`.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        WeightsError: No architecture there is what the network is, or the folder is not free.
    """
    folder = Path(folder)
    check_free(folder)
    task = load_task(checkpoint, trust=trust)
    saved = read_checkpoint(checkpoint, lazily=True)
    record, imported = saved[RECORD], saved.get(IMPORTED, {})
    network = task.get_submodule("network")
    plan = describe(network)
    tokenizers = Tokenizers.from_dict(record["tokenizers"])
    state = network.state_dict()
    tensors = plan.table.write(state, imported.get("kept", {}))
    for name, shape in plan.zeros.items():
        tensors[name] = torch.zeros(shape)
    config = {
        **imported.get("config", {}),
        "model_type": plan.model_type,
        "dtype": "float32",
        **plan.config,
        **_special_ids(tokenizers, plan),
        **_labels(record["labels"]),
    }
    documents: dict[str, dict[str, Any]] = {CONFIG: config}
    if imported.get("generation"):
        documents[GENERATION] = imported["generation"]
    documents.update(tokenizer_documents(tokenizers, plan.model_type, plan.longest))
    write_folder(folder, tensors, documents)
    return str(plan.config["architectures"][0])


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


def _special_ids(tokenizers: Tokenizers, plan: ExportPlan) -> dict[str, Any]:
    ids = special_ids_of(tokenizers.target)
    if plan.model_type == "bert":
        return {"pad_token_id": ids.pad}
    if plan.model_type == "gpt2":
        return {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    return {
        "pad_token_id": ids.pad,
        "bos_token_id": ids.prefix[0] if ids.prefix else None,
        "eos_token_id": ids.eos,
        "forced_eos_token_id": ids.eos,
        "decoder_start_token_id": ids.bos,
    }


def _labels(labels: list[str] | None) -> dict[str, Any]:
    if labels is None:
        return {}
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
