"""BERT (Devlin et al. 2019) of Hugging Face and the networks on a `TextEncoder`."""

from typing import Any

from torch import nn

from tx_lightning.data.tokenizers import SpecialIds
from tx_lightning.models import Classifier, MaskedLanguageModel, Tagger
from tx_lightning.nn import LearnedPositions
from tx_lightning.weights.configuration import (
    MOST_LAYERS,
    Arguments,
    Configuration,
    feed_forward_of,
    layer_norm,
    norm_eps,
)
from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.plans import (
    ExportPlan,
    Family,
    ImportPlan,
    TokenError,
    TokenId,
    not_representable,
    required,
)
from tx_lightning.weights.rules import Rule, Same, Stacked, Table, affine, same

_MOST_LABELS = 65_536
# The task that each architecture has a head for.
_TASKS: dict[str, str | None] = {
    "BertForMaskedLM": "MaskedLanguageModeling",
    "BertForPreTraining": "MaskedLanguageModeling",
    "BertForSequenceClassification": "Classification",
    "BertForTokenClassification": "Tagging",
    "BertModel": None,
}
_NETWORKS = {
    "MaskedLanguageModeling": MaskedLanguageModel,
    "Classification": Classifier,
    "Tagging": Tagger,
}
_CLASSES = {"Classification": "n_classes", "Tagging": "n_tags"}
# What each network has besides the encoder: our name, and BERT's.
_PARTS = {
    MaskedLanguageModel: {
        "transform": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
    },
    Classifier: {"pooler": "bert.pooler.dense", "head": "classifier"},
    Tagger: {"head": "classifier"},
}
# What a network may not have a place for.
_DROPPED = {
    "cls.predictions.": "the head that guesses hidden tokens",
    "cls.seq_relationship.": "the head that predicts the next sentence",
    "bert.pooler.": "the pooler",
    "classifier.": "the head of a classifier",
}


def plan(config: Configuration, architecture: str, task: str | None) -> ImportPlan:
    """How a folder of BERT becomes a task; a head that it has not stays new.

    Raises:
        WeightsError: The configuration cannot be represented, or it is open what to make of it.
    """
    config.only("position_embedding_type", "absolute", None)
    config.only("is_decoder", False)
    config.only("add_cross_attention", False)
    config.only("tie_word_embeddings", True)
    own = _TASKS[architecture]
    chosen = task or own
    if chosen is None:
        raise WeightsError(
            f"a {architecture} has no head: say with --task what it is to be fine-tuned to, "
            f"{', '.join(_NETWORKS)}"
        )
    if chosen not in _NETWORKS:
        raise WeightsError(f"--task {chosen}: a {architecture} can become {', '.join(_NETWORKS)}")
    arguments: Arguments = {"vocab_size": config.integer("vocab_size")}
    options: Arguments = {"encoder": _encoder(config)}
    labels = None
    if chosen in _CLASSES:
        config.only("problem_type", "single_label_classification", None)
        labels = _labels(config)
        arguments[_CLASSES[chosen]] = len(labels)
        own_dropout = config["classifier_dropout"] is not None
        dropout = "classifier_dropout" if own_dropout else "hidden_dropout_prob"
        options["dropout"] = config.share(dropout)
    else:
        config.only("hidden_act", "gelu", "gelu_python")  # that of its head
        options["norm"] = layer_norm(config.epsilon("layer_norm_eps"))
    network = _NETWORKS[chosen]
    arguments["network"] = {
        "class_path": f"tx_lightning.models.{network.__name__}",
        "init_args": options,
    }
    parts = dict(_PARTS[network])
    if chosen != own and chosen in _CLASSES:
        del parts["head"]  # a head for something else has the same name
    names = _table(network, config.integer("num_hidden_layers", most=MOST_LAYERS), parts)
    return ImportPlan(
        task=chosen,
        arguments=arguments,
        table=names,
        new=() if chosen == own else (*(f"{part}." for part in _PARTS[network]), "output.bias"),
        dropped=_DROPPED,
        labels=labels,
    )


def _encoder(config: Configuration) -> Arguments:
    settings = {
        "d_model": config.integer("hidden_size"),
        "n_heads": config.heads("num_attention_heads", "hidden_size"),
        "n_layers": config.integer("num_hidden_layers", most=MOST_LAYERS),
        "d_ff": config.integer("intermediate_size"),
        "max_length": config.integer("max_position_embeddings"),
        "dropout": config.share("hidden_dropout_prob"),
        "attention_dropout": config.share("attention_probs_dropout_prob"),
        "norm": layer_norm(config.epsilon("layer_norm_eps")),
        "feed_forward": config.feed_forward("hidden_act"),
        "n_segments": config.integer("type_vocab_size"),
        "pad_id": _pad_id(config),
    }
    return {"class_path": "tx_lightning.models.TextEncoder", "init_args": settings}


def _pad_id(config: Configuration) -> int:
    return 0 if config["pad_token_id"] is None else config.token_id("pad_token_id")


def _labels(config: Configuration) -> list[str]:
    """The labels in the order of their classes; LABEL_0 and so on where they have no names."""
    named = config["id2label"]
    labels: list[Any]
    if named is None:
        labels = [f"LABEL_{i}" for i in range(config.integer("num_labels", most=_MOST_LABELS))]
    elif isinstance(named, dict) and named.keys() == set(map(str, range(len(named)))):
        labels = [named[str(i)] for i in range(len(named))]
    else:
        raise config.refused("id2label", "a name for each class from 0 on")
    if len(labels) < 2:
        raise config.refused("num_labels" if named is None else "id2label", "two classes or more")
    usable = all(isinstance(label, str) and label and label.isprintable() for label in labels)
    if not usable or len(set(labels)) < len(labels) or len(labels) > _MOST_LABELS:
        raise config.refused("id2label", f"up to {_MOST_LABELS:,} distinct single-line names")
    return labels


def special_ids(config: Configuration, token_id: TokenId) -> SpecialIds:
    """[CLS] stands before a text, [SEP] behind it."""
    ids = SpecialIds(
        pad=required(token_id, "pad_token"),
        bos=required(token_id, "cls_token"),
        eos=required(token_id, "sep_token"),
        unk=required(token_id, "unk_token"),
        mask=token_id("mask_token"),
    )
    if ids.pad != _pad_id(config):
        raise config.refused("pad_token_id", f"{ids.pad}, the id of the tokenizer's pad_token")
    if ids.pad in (ids.bos, ids.eos, ids.unk, ids.mask):
        raise TokenError("the tokenizer's pad_token is one of its other special tokens as well")
    return ids


FAMILY = Family(
    model_type="bert",
    architectures=tuple(_TASKS),
    defaults={
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "id2label": None,
        "num_labels": 2,
    },
    base="bert",
    parts=frozenset({"embeddings", "encoder", "pooler"}),
    special_tokens={
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    plan=plan,
    special_ids=special_ids,
)


def describe(network: MaskedLanguageModel | Classifier | Tagger) -> ExportPlan:
    """How a network on a text encoder becomes a folder of BERT.

    Raises:
        WeightsError: BERT has no such network.
    """
    encoder = network.encoder
    first, positions = encoder.layers[0], encoder.positions
    norms = [
        encoder.embedding.norm,
        *(residual.norm for residual in (first.attention_residual, first.feed_forward_residual)),
    ]
    feed_forward = feed_forward_of(first.feed_forward)
    if isinstance(network, MaskedLanguageModel):
        norms.append(network.norm)
        if feed_forward is not None and feed_forward.activation != "gelu":
            name = f"{type(first.feed_forward).__name__} ({feed_forward.activation})"
            raise not_representable("BERT", "feed_forward", name, "exact GELU, as its head has")
    if isinstance(network, Classifier) and network.pooling != "cls":
        raise not_representable("BERT", "pooling", network.pooling, "cls")
    if type(positions) is not LearnedPositions:
        raise not_representable("BERT", "positions", type(positions).__name__, "LearnedPositions")
    if first.attention_residual.pre_norm:
        raise not_representable("BERT", "pre_norm", "true", "false")
    if type(encoder.embedding.norm) is nn.Identity:
        raise not_representable("BERT", "embedding_norm", "false", "true")
    eps = norm_eps(norms)
    if eps is None:
        kinds = " and ".join(dict.fromkeys(map(repr, norms)))
        raise not_representable("BERT", "norm", kinds, "LayerNorm with the same eps everywhere")
    if feed_forward is None:
        name = type(first.feed_forward).__name__
        raise not_representable("BERT", "feed_forward", name, "GELU, ReLU or Swish")
    segments = encoder.embedding.segments
    width = encoder.d_model
    architectures = {task: name for name, task in reversed(_TASKS.items())}
    task = next(name for name, kind in _NETWORKS.items() if kind is type(network))
    return ExportPlan(
        FAMILY.model_type,
        config={
            "architectures": [architectures[task]],
            "vocab_size": encoder.vocab_size,
            "hidden_size": width,
            "num_hidden_layers": len(encoder.layers),
            "num_attention_heads": first.self_attention.n_heads,
            "intermediate_size": feed_forward.d_ff,
            "hidden_act": feed_forward.activation,
            "hidden_dropout_prob": first.attention_residual.dropout.p,
            "attention_probs_dropout_prob": first.self_attention.dropout,
            **_head_dropout(network),
            "max_position_embeddings": positions.max_length,
            "type_vocab_size": 1 if segments is None else segments.num_embeddings,
            "layer_norm_eps": eps,
            "pad_token_id": encoder.pad_id,
        },
        table=_table(
            type(network), len(encoder.layers), _PARTS[type(network)], segments=bool(segments)
        ),
        zeros={} if segments else {"bert.embeddings.token_type_embeddings.weight": (1, width)},
        longest=encoder.max_length,
    )


def _head_dropout(network: MaskedLanguageModel | Classifier | Tagger) -> Arguments:
    if isinstance(network, MaskedLanguageModel):
        return {}
    return {"classifier_dropout": network.dropout.p}


def _table(
    network: type[nn.Module], n_layers: int, parts: dict[str, str], *, segments: bool = True
) -> Table:
    """The tensors of both; we keep queries, keys and values in one matrix."""
    embeddings = "bert.embeddings"
    rules: list[Rule] = [
        same("encoder.embedding.tokens.weight", f"{embeddings}.word_embeddings.weight"),
        same("encoder.positions.table", f"{embeddings}.position_embeddings.weight"),
        *affine(Same, "encoder.embedding.norm", f"{embeddings}.LayerNorm"),
    ]
    if segments:
        theirs = f"{embeddings}.token_type_embeddings.weight"
        rules.append(same("encoder.embedding.segments.weight", theirs))
    for i in range(n_layers):
        ours, theirs = f"encoder.layers.{i}", f"bert.encoder.layer.{i}"
        self_attention = [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")]
        output, ended = f"{theirs}.attention.output", f"{theirs}.output"
        rules += [
            *affine(Stacked, f"{ours}.self_attention.input", *self_attention),
            *affine(Same, f"{ours}.self_attention.output", f"{output}.dense"),
            *affine(Same, f"{ours}.attention_residual.norm", f"{output}.LayerNorm"),
            *affine(Same, f"{ours}.feed_forward.inner", f"{theirs}.intermediate.dense"),
            *affine(Same, f"{ours}.feed_forward.outer", f"{ended}.dense"),
            *affine(Same, f"{ours}.feed_forward_residual.norm", f"{ended}.LayerNorm"),
        ]
    for part, name in parts.items():
        rules += affine(Same, part, name)
    guesses = network is MaskedLanguageModel
    tied = {
        "cls.predictions.decoder.weight": f"{embeddings}.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    if guesses:
        rules.append(same("output.bias", "cls.predictions.bias"))
    return Table(
        rules,
        ours_tied={"output.weight": "encoder.embedding.tokens.weight"} if guesses else {},
        theirs_tied=tied if guesses else {},
        ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
    )
