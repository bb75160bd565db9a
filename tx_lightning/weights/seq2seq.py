"""BART (Lewis et al. 2020) and Marian (Junczys-Dowmunt et al. 2018) and our `EncoderDecoder`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from tx_lightning.data.tokenizers import SpecialIds, Tokenizers
from tx_lightning.models import EncoderDecoder
from tx_lightning.nn import EncoderLayer, LearnedPositions, Positions, SinusoidalPositions
from tx_lightning.nn.positions import sinusoids
from tx_lightning.weights import marian
from tx_lightning.weights.configuration import (
    MOST_LAYERS,
    Arguments,
    Configuration,
    feed_forward_of,
    norm_eps,
)
from tx_lightning.weights.generation import SEARCH, read_search
from tx_lightning.weights.plans import (
    ExportPlan,
    Family,
    ImportPlan,
    TokenId,
    check_task,
    not_representable,
    required,
)
from tx_lightning.weights.rules import (
    Flat,
    LaterRows,
    Rule,
    Same,
    Stacked,
    Table,
    Tensors,
    affine,
    same,
)

_BIAS = "final_logits_bias"
_POSITIONS = 1024  # ours have no limit, transformers needs one
_BART_BLOCKS = {  # fields of older versions that CTranslate2's converter reads
    "normalize_before": False,
    "add_final_layer_norm": False,
    "normalize_embedding": True,
}
_COMPARED = 16  # positions


def plan_bart(config: Configuration, architecture: str, task: str | None) -> ImportPlan:
    """How a folder of BART becomes a translation task.

    Raises:
        WeightsError: The configuration cannot be represented.
    """
    for flag, value in {**_BART_BLOCKS, "static_position_embeddings": False}.items():
        config.only(flag, value)
    positions = {
        "class_path": "tx_lightning.nn.LearnedPositions",
        "init_args": {"max_length": config.integer("max_position_embeddings")},
    }
    changes = {"positions": positions, "embedding_norm": {"class_path": "torch.nn.LayerNorm"}}
    return _plan(config, architecture, task, changes, learned=True, shared=True)


def plan_marian(config: Configuration, architecture: str, task: str | None) -> ImportPlan:
    """How a folder of Marian becomes a translation task.

    Raises:
        WeightsError: The configuration cannot be represented.
    """
    for flag in ("normalize_before", "add_final_layer_norm", "normalize_embedding"):
        config.only(flag, False)
    config.only("static_position_embeddings", True)
    config.only("decoder_vocab_size", config["vocab_size"], None)
    positions = {
        "class_path": "tx_lightning.nn.SinusoidalPositions",
        "init_args": {"layout": "halves", "scale": 1.0},
    }
    shared = config.flag("share_encoder_decoder_embeddings")
    changes = {"positions": positions, "share_embeddings": shared}
    return _plan(config, architecture, task, changes, learned=False, shared=shared)


def _plan(
    config: Configuration,
    architecture: str,
    task: str | None,
    changes: Arguments,
    *,
    learned: bool,
    shared: bool,
) -> ImportPlan:
    check_task(task, "Translation", architecture)
    config.only("tie_word_embeddings", True)
    config.only("is_encoder_decoder", True)
    config.only("is_decoder", False)
    encoder_layers, decoder_layers = (
        config.integer(f"{stack}_layers", most=MOST_LAYERS) for stack in ("encoder", "decoder")
    )
    config.equal("encoder_attention_heads", "decoder_attention_heads")
    network = {
        "d_model": config.integer("d_model"),
        "n_heads": config.heads("encoder_attention_heads", "d_model"),
        "n_encoder_layers": encoder_layers,
        "n_decoder_layers": decoder_layers,
        "d_ff": config.equal("encoder_ffn_dim", "decoder_ffn_dim"),
        "dropout": config.share("dropout"),
        "attention_dropout": config.share("attention_dropout"),
        "feed_forward": config.feed_forward(
            "activation_function", config.share("activation_dropout")
        ),
        "scale_embeddings": config.flag("scale_embedding"),
        "output_bias": True,
        "pad_id": config.token_id("pad_token_id"),
        **changes,
    }
    notes = [
        f"{stack}_layerdrop is {config[f'{stack}_layerdrop']}: in training, it will be 0"
        for stack in ("encoder", "decoder")
        if config.share(f"{stack}_layerdrop") != 0
    ]
    longest = config.integer("max_position_embeddings")
    search, more = read_search(config, longest if learned else None)
    arguments = {
        "vocab_size": config.integer("vocab_size"),
        "network": {"class_path": "tx_lightning.models.EncoderDecoder", "init_args": network},
        **search,
    }
    return ImportPlan(
        task="Translation",
        arguments=arguments,
        table=_table(encoder_layers, decoder_layers, learned=learned, shared=shared),
        notes=(*notes, *more),
    )


def special_ids_of_bart(config: Configuration, token_id: TokenId) -> SpecialIds:
    """Decoding starts with the end of a text; every text starts with <s>, where there is one."""
    prefix = () if config["bos_token_id"] is None else (config.token_id("bos_token_id"),)
    return _special_ids(config, token_id, token_id("mask_token"), prefix)


def special_ids_of_marian(config: Configuration, token_id: TokenId) -> SpecialIds:
    """Decoding starts with padding."""
    return _special_ids(config, token_id, None, ())


def _special_ids(
    config: Configuration, token_id: TokenId, mask: int | None, prefix: tuple[int, ...]
) -> SpecialIds:
    eos, own = config.token_id("eos_token_id"), token_id("eos_token")
    if own not in (None, eos):
        raise config.refused("eos_token_id", f"{own}, the id of the tokenizer's eos_token")
    ids = SpecialIds(
        pad=config.token_id("pad_token_id"),
        bos=config.token_id("decoder_start_token_id"),
        eos=eos,
        unk=required(token_id, "unk_token"),
        mask=mask,
        prefix=prefix,
    )
    if ids.pad in (ids.eos, ids.unk, ids.mask, *prefix):  # attention masks padding
        raise config.refused("pad_token_id", "an id that no other token of a text has")
    return ids


_OVERRIDDEN = (*SEARCH, "decoder_start_token_id", "eos_token_id")
_DEFAULTS: Arguments = {
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "activation_function": "gelu",
    "d_model": 1024,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "scale_embedding": False,
    "tie_word_embeddings": True,
    **dict.fromkeys(SEARCH),
}
_BASE = "model"
_PARTS = frozenset({"shared", "encoder", "decoder"})

BART = Family(
    model_type="bart",
    architectures=("BartForConditionalGeneration", "BartModel"),
    defaults={
        **_DEFAULTS,
        "vocab_size": 50265,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
    base=_BASE,
    parts=_PARTS,
    special_tokens={
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    },
    plan=plan_bart,
    special_ids=special_ids_of_bart,
    overridden=_OVERRIDDEN,
)
MARIAN = Family(
    model_type="marian",
    architectures=("MarianMTModel", "MarianModel"),
    defaults={
        **_DEFAULTS,
        "vocab_size": 58101,
        "decoder_vocab_size": None,
        "pad_token_id": 58100,
        "eos_token_id": 0,
        "decoder_start_token_id": 58100,
        "share_encoder_decoder_embeddings": True,
    },
    base=_BASE,
    parts=_PARTS,
    special_tokens={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    plan=plan_marian,
    special_ids=special_ids_of_marian,
    overridden=_OVERRIDDEN,
)


def describe(network: EncoderDecoder) -> ExportPlan:
    """How an encoder-decoder becomes a folder of BART, or of Marian where positions are sinusoids.

    Raises:
        WeightsError: Neither has such a network.
    """
    for stack, depth in (("encoder", network.encoder), ("decoder", network.decoder)):
        if not depth.layers:
            raise not_representable("BART or Marian", f"n_{stack}_layers", "0", "1 and more")
    positions = network.encoder.positions
    learned = type(positions) is LearnedPositions
    kind = "BART" if learned else "Marian"
    if not learned and type(positions) is not SinusoidalPositions:
        supported = "LearnedPositions, and Marian SinusoidalPositions"
        raise not_representable("BART", "positions", type(positions).__name__, supported)
    if isinstance(positions, SinusoidalPositions) and positions.layout != "halves":
        raise not_representable("Marian", "layout of positions", positions.layout, "halves")
    if not learned and not _are_plain(positions, network.output.in_features):
        raise not_representable("Marian", "positions", "scaled", "those of scale 1")
    first = cast(EncoderLayer, network.encoder.layers[0])
    residuals = (first.attention_residual, first.feed_forward_residual)
    if first.attention_residual.pre_norm:
        raise not_representable(kind, "pre_norm", "true", "false")
    norms = [residual.norm for residual in residuals]
    embedding_norm = network.target_embedding.norm
    if learned:
        norms.append(embedding_norm)
    elif type(embedding_norm) is not nn.Identity:
        raise not_representable(kind, "embedding_norm", type(embedding_norm).__name__, "none")
    if norm_eps(norms) != nn.LayerNorm(1).eps:
        kinds = " and ".join(dict.fromkeys(map(repr, norms)))
        raise not_representable(kind, "norm", kinds, "torch.nn.LayerNorm with its default eps")
    feed_forward = feed_forward_of(first.feed_forward)
    if feed_forward is None:
        name = type(first.feed_forward).__name__
        raise not_representable(kind, "feed_forward", name, "GELU, ReLU or Swish")
    if learned and not network.share_embeddings:
        raise not_representable(kind, "share_embeddings", "false", "true")
    if network.output.weight is not network.target_embedding.tokens.weight:
        raise not_representable(kind, "tie_output", "false", "true")
    config: dict[str, Any] = {
        "vocab_size": network.output.out_features,
        "d_model": network.output.in_features,
        "dropout": first.attention_residual.dropout.p,
        "attention_dropout": first.self_attention.dropout,
        "activation_function": feed_forward.activation,
        "activation_dropout": feed_forward.dropout,
        "scale_embedding": network.target_embedding.scale != 1,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "pad_token_id": network.pad_id,
    }
    for stack, layers in (("encoder", network.encoder.layers), ("decoder", network.decoder.layers)):
        config[f"{stack}_layers"] = len(layers)
        config[f"{stack}_attention_heads"] = first.self_attention.n_heads
        config[f"{stack}_ffn_dim"] = feed_forward.d_ff
    if isinstance(positions, LearnedPositions):
        config["architectures"] = ["BartForConditionalGeneration"]
        config["max_position_embeddings"] = positions.max_length
    else:
        config["architectures"] = ["MarianMTModel"]
        config["share_encoder_decoder_embeddings"] = network.share_embeddings
    table = _table(
        len(network.encoder.layers),
        len(network.decoder.layers),
        learned=learned,
        shared=network.share_embeddings,
    )
    family = BART if learned else MARIAN
    unsaid = _BART_BLOCKS if learned else {"max_position_embeddings": _POSITIONS}
    return ExportPlan(family.model_type, config, table, unsaid, longest=positions.max_length)


def lay_out(
    plan: ExportPlan, network: EncoderDecoder, state: Tensors, tokenizers: Tokenizers
) -> tuple[ExportPlan, Tensors, Tokenizers, Mapping[int, int]]:
    """Rewrite a translation model in Marian's layout, if it is exported as Marian.

    Returns:
        Plan, state dict and tokenizers to export, and a map from our token ids to theirs.
    """
    if plan.model_type != MARIAN.model_type or not marian.has_layout(tokenizers):
        return plan, state, tokenizers, {i: i for i in range(plan.rows)}
    state, tokenizers, places = marian.with_layout(
        state,
        tokenizers,
        shared=network.share_embeddings,
        scale=network.target_embedding.scale,
    )
    rows = tokenizers.target.vocab_size
    config = {**plan.config, "vocab_size": rows}
    return replace(plan, config=config), state, tokenizers, places


def _are_plain(positions: Positions, width: int) -> bool:
    """Return whether the position scheme adds exactly what Marian adds."""
    added = positions.embed(torch.zeros(1, _COMPARED, width))[0]
    return torch.allclose(added, sinusoids(torch.arange(float(_COMPARED)), width, "halves"))


def _table(n_encoder_layers: int, n_decoder_layers: int, *, learned: bool, shared: bool) -> Table:
    """The tensors of both; we keep queries, keys and values in one matrix.

    Args:
        n_encoder_layers: Layers of the encoder.
        n_decoder_layers: Layers of the decoder.
        learned: Whether positions are learned, and embeddings have a norm.
        shared: Whether there is one table of embeddings.
    """
    source, target = "source_embedding.tokens.weight", "target_embedding.tokens.weight"
    theirs_source, theirs_target = (
        f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")
    )
    table = "model.shared.weight" if shared else theirs_target
    rules: list[Rule] = [same(target, table)]
    ours_tied = {"output.weight": target}
    theirs_tied = {"lm_head.weight": table}
    if shared:
        ours_tied[source] = target
        theirs_tied |= {theirs_source: table, theirs_target: table}
    else:
        rules.append(same(source, theirs_source))
    rules.append(Flat("output.bias", (_BIAS,)))  # mandatory there
    for stack, side in (("encoder", "source"), ("decoder", "target")):
        if learned:
            name = f"model.{stack}.layernorm_embedding"
            rules += affine(Same, f"{side}_embedding.norm", name)
            table_of_positions = f"model.{stack}.embed_positions.weight"
            rules.append(LaterRows(f"{stack}.positions.table", (table_of_positions,)))
    for stack, n_layers, residual in (
        ("encoder", n_encoder_layers, "attention_residual"),
        ("decoder", n_decoder_layers, "self_residual"),
    ):
        for i in range(n_layers):
            layer = f"{stack}.layers.{i}"
            rules += _attention(layer, "self_attention", "self_attn", residual)
            if stack == "decoder":
                rules += _attention(layer, "cross_attention", "encoder_attn", "cross_residual")
            rules += [
                *affine(Same, f"{layer}.feed_forward.inner", f"model.{layer}.fc1"),
                *affine(Same, f"{layer}.feed_forward.outer", f"model.{layer}.fc2"),
                *affine(
                    Same, f"{layer}.feed_forward_residual.norm", f"model.{layer}.final_layer_norm"
                ),
            ]
    return Table(
        rules,
        ours_tied=ours_tied,
        theirs_tied=theirs_tied,
        zero_if_absent=frozenset({_BIAS}),
        ignored=("coder.version",) if learned else ("coder.embed_positions.weight",),
    )


def _attention(layer: str, ours: str, theirs: str, residual: str) -> list[Rule]:
    projections = [f"model.{layer}.{theirs}.{part}_proj" for part in "qkv"]
    return [
        *affine(Stacked, f"{layer}.{ours}.input", *projections),
        *affine(Same, f"{layer}.{ours}.output", f"model.{layer}.{theirs}.out_proj"),
        *affine(Same, f"{layer}.{residual}.norm", f"model.{layer}.{theirs}_layer_norm"),
    ]
