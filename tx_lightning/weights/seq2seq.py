"""BART (Lewis et al. 2020) and Marian (Junczys-Dowmunt et al. 2018) and our `EncoderDecoder`."""

from typing import Any, cast

from torch import nn

from tx_lightning.data.tokenizers import SpecialIds
from tx_lightning.models import EncoderDecoder
from tx_lightning.nn import EncoderLayer, LearnedPositions, SinusoidalPositions
from tx_lightning.weights.configuration import (
    Arguments,
    Configuration,
    feed_forward_of,
    norm_eps,
)
from tx_lightning.weights.plans import (
    ExportPlan,
    Family,
    ImportPlan,
    TokenId,
    check_task,
    not_representable,
    required,
)
from tx_lightning.weights.rules import Flat, LaterRows, Rule, Same, Stacked, Table, affine, same

_BIAS = "final_logits_bias"


def plan_bart(config: Configuration, architecture: str, task: str | None) -> ImportPlan:
    """How a folder of BART becomes a translation task.

    Raises:
        WeightsError: The configuration cannot be represented.
    """
    for flag in ("normalize_before", "add_final_layer_norm", "static_position_embeddings"):
        config.only(flag, False)
    config.only("normalize_embedding", True)
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
    encoder_layers, decoder_layers = (
        config.integer(f"{stack}_layers") for stack in ("encoder", "decoder")
    )
    network = {
        "d_model": config.integer("d_model"),
        "n_heads": config.equal("encoder_attention_heads", "decoder_attention_heads"),
        "n_encoder_layers": encoder_layers,
        "n_decoder_layers": decoder_layers,
        "d_ff": config.equal("encoder_ffn_dim", "decoder_ffn_dim"),
        "dropout": config.number("dropout"),
        "attention_dropout": config.number("attention_dropout"),
        "feed_forward": config.feed_forward(
            "activation_function", config.number("activation_dropout")
        ),
        "scale_embeddings": config.flag("scale_embedding"),
        "output_bias": True,
        "pad_id": config.integer("pad_token_id"),
        **changes,
    }
    notes = [
        f"{stack}_layerdrop is {config[f'{stack}_layerdrop']}: in training, it will be 0"
        for stack in ("encoder", "decoder")
        if config.number(f"{stack}_layerdrop") != 0
    ]
    arguments = {
        "vocab_size": config.integer("vocab_size"),
        "network": {"class_path": "tx_lightning.models.EncoderDecoder", "init_args": network},
        **_decoding(config, config.integer("max_position_embeddings") if learned else None),
    }
    return ImportPlan(
        task="Translation",
        arguments=arguments,
        table=_table(encoder_layers, decoder_layers, learned=learned, shared=shared, bias=True),
        notes=tuple(notes),
    )


def _decoding(config: Configuration, longest: int | None) -> Arguments:
    """How to search, as far as the files say it in terms that are also ours.

    Args:
        config: Their terms.
        longest: Positions of the decoder, None for no limit.
    """
    filters = []
    if config["forced_bos_token_id"] is not None:
        first = [config.integer("forced_bos_token_id")]
        filters.append(_filter("BeginWith", ids=first))
    if config["no_repeat_ngram_size"]:
        filters.append(_filter("NoRepeatNgram", size=config.integer("no_repeat_ngram_size")))
    if config["min_length"]:  # where theirs counts the token that decoding starts with
        filters.append(_filter("MinLength", length=config.integer("min_length") - 1))
    beams = config["num_beams"]
    searches = {"decoding": "Greedy", "test_decoding": "Beam"}
    options: dict[str, Arguments] = {name: {"filters": filters} for name in searches}
    if config["max_length"] is not None or longest is not None:
        limits = [longest] if longest is not None else []
        if config["max_length"] is not None:  # theirs, likewise
            limits.append(config.integer("max_length") - 1)
        for option in options.values():
            option.update(max_length_ratio=0.0, max_length_offset=min(limits))
    if beams is not None and beams > 1:
        options["test_decoding"]["beam_size"] = config.integer("num_beams")
    return {
        name: {"class_path": f"tx_lightning.decoding.{search}", "init_args": options[name]}
        for name, search in searches.items()
    }


def _filter(name: str, **arguments: Any) -> Arguments:
    return {"class_path": f"tx_lightning.decoding.{name}", "init_args": arguments}


def special_ids_of_bart(config: Configuration, token_id: TokenId) -> SpecialIds:
    """Decoding starts with the end of a text; every text starts with <s>, where there is one."""
    return SpecialIds(
        pad=config.integer("pad_token_id"),
        bos=config.integer("decoder_start_token_id"),
        eos=config.integer("eos_token_id"),
        unk=required(token_id, "unk_token"),
        mask=token_id("mask_token"),
        prefix=() if config["bos_token_id"] is None else (config.integer("bos_token_id"),),
    )


def special_ids_of_marian(config: Configuration, token_id: TokenId) -> SpecialIds:
    """Decoding starts with padding."""
    return SpecialIds(
        pad=config.integer("pad_token_id"),
        bos=config.integer("decoder_start_token_id"),
        eos=config.integer("eos_token_id"),
        unk=required(token_id, "unk_token"),
    )


_SEARCH = (
    "forced_bos_token_id",
    "no_repeat_ngram_size",
    "min_length",
    "max_length",
    "num_beams",
)
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
    **dict.fromkeys(_SEARCH),
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
    search=_SEARCH,
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
    search=_SEARCH,
)


def describe(network: EncoderDecoder) -> ExportPlan:
    """How an encoder-decoder becomes a folder of BART, or of Marian where positions are sinusoids.

    Raises:
        WeightsError: Neither has such a network.
    """
    positions = network.encoder.positions
    learned = type(positions) is LearnedPositions
    kind = "BART" if learned else "Marian"
    if not learned and type(positions) is not SinusoidalPositions:
        supported = "LearnedPositions, and Marian SinusoidalPositions"
        raise not_representable("BART", "positions", type(positions).__name__, supported)
    if isinstance(positions, SinusoidalPositions) and positions.layout != "halves":
        raise not_representable("Marian", "layout of positions", positions.layout, "halves")
    if isinstance(positions, SinusoidalPositions) and positions.amplitude != 1:
        raise not_representable("Marian", "scale of positions", str(positions.amplitude), "1")
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
        config["decoder_vocab_size"] = config["vocab_size"]
        config["share_encoder_decoder_embeddings"] = network.share_embeddings
    table = _table(
        len(network.encoder.layers),
        len(network.decoder.layers),
        learned=learned,
        shared=network.share_embeddings,
        bias=network.output_bias is not None,
    )
    family = BART if learned else MARIAN
    return ExportPlan(family.model_type, config, table, longest=positions.max_length)


def _table(
    n_encoder_layers: int, n_decoder_layers: int, *, learned: bool, shared: bool, bias: bool
) -> Table:
    """The tensors of both; we keep queries, keys and values in one matrix.

    Args:
        n_encoder_layers: Layers of the encoder.
        n_decoder_layers: Layers of the decoder.
        learned: Whether positions are learned, and embeddings have a norm.
        shared: Whether there is one table of embeddings.
        bias: Whether our logits have a bias; theirs always do.
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
    if bias:
        rules.append(Flat("output.bias", (_BIAS,)))
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
