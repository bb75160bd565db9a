"""GPT-2 (Radford et al. 2019) of Hugging Face and `LanguageModel`: settings and tensors."""

from tx_lightning.data.tokenizers import SpecialIds
from tx_lightning.models import LanguageModel
from tx_lightning.nn import LearnedPositions
from tx_lightning.weights.configuration import (
    MOST_LAYERS,
    Configuration,
    feed_forward_of,
    layer_norm,
    norm_eps,
)
from tx_lightning.weights.plans import (
    ExportPlan,
    Family,
    ImportPlan,
    TokenId,
    check_task,
    not_representable,
)
from tx_lightning.weights.rules import Rule, Same, Table, Transposed, affine, same


def plan(config: Configuration, architecture: str, task: str | None) -> ImportPlan:
    """How a folder of GPT-2 becomes a language model.

    Raises:
        WeightsError: The configuration cannot be represented.
    """
    check_task(task, "LanguageModeling", architecture)
    config.only("scale_attn_weights", True)
    config.only("scale_attn_by_inverse_layer_idx", False)
    config.only("add_cross_attention", False)
    width, tied = config.integer("n_embd"), config.flag("tie_word_embeddings")
    n_layers = config.integer("n_layer", most=MOST_LAYERS)
    dropout = config.share("resid_pdrop")
    network = {
        "d_model": width,
        "n_heads": config.heads("n_head", "n_embd"),
        "n_layers": n_layers,
        "d_ff": config.optional("n_inner") or 4 * width,
        "context_length": config.integer("n_positions"),
        "dropout": dropout,
        "attention_dropout": config.share("attn_pdrop"),
        "norm": layer_norm(config.epsilon("layer_norm_epsilon")),
        "feed_forward": config.feed_forward("activation_function"),
        "tie_output": tied,
    }
    notes = []
    if config.share("embd_pdrop") != dropout:
        notes.append(
            f"embd_pdrop is {config['embd_pdrop']} and resid_pdrop {dropout}: in training, both "
            f"will be {dropout}"
        )
    return ImportPlan(
        task="LanguageModeling",
        arguments={
            "vocab_size": config.integer("vocab_size"),
            "network": {"class_path": "tx_lightning.models.LanguageModel", "init_args": network},
        },
        table=table(n_layers, tied=tied),
        notes=tuple(notes),
    )


def special_ids(config: Configuration, token_id: TokenId) -> SpecialIds:
    """The end of a text is whatever has no token of its own."""
    eos = config.token_id("eos_token_id")
    bos, unk, pad = (token_id(f"{name}_token") for name in ("bos", "unk", "pad"))
    return SpecialIds(
        pad=eos if pad is None else pad,
        bos=eos if bos is None else bos,
        eos=eos,
        unk=eos if unk is None else unk,
    )


FAMILY = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 50256,
    },
    base="transformer",
    parts=frozenset({"wte", "wpe", "h", "ln_f"}),
    special_tokens=dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    plan=plan,
    special_ids=special_ids,
    overridden=("eos_token_id",),
)


def describe(network: LanguageModel) -> ExportPlan:
    """How a language model becomes a folder of GPT-2.

    Raises:
        WeightsError: GPT-2 has no such network.
    """
    first, positions = network.layers[0], network.positions
    residuals = (first.attention_residual, first.feed_forward_residual)
    eps = norm_eps([*(residual.norm for residual in residuals), network.final_norm])
    feed_forward = feed_forward_of(first.feed_forward)
    if type(positions) is not LearnedPositions:
        raise not_representable("GPT-2", "positions", type(positions).__name__, "LearnedPositions")
    if not first.attention_residual.pre_norm:
        raise not_representable("GPT-2", "pre_norm", "false", "true")
    if eps is None:
        name = type(network.final_norm).__name__
        raise not_representable("GPT-2", "norm", name, "torch.nn.LayerNorm")
    if feed_forward is None:
        name = type(first.feed_forward).__name__
        raise not_representable("GPT-2", "feed_forward", name, "GELU, ReLU or Swish")
    tied = network.output.weight is network.embedding.tokens.weight
    return ExportPlan(
        FAMILY.model_type,
        config={
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": network.vocab_size,
            "n_positions": positions.max_length,
            "n_embd": network.d_model,
            "n_layer": len(network.layers),
            "n_head": first.self_attention.n_heads,
            "n_inner": feed_forward.d_ff,
            "activation_function": feed_forward.activation,
            "resid_pdrop": first.attention_residual.dropout.p,
            "embd_pdrop": network.embedding.dropout.p,
            "attn_pdrop": first.self_attention.dropout,
            "layer_norm_epsilon": eps,
            "tie_word_embeddings": tied,
        },
        table=table(len(network.layers), tied=tied),
        longest=network.context_length,
    )


def table(n_layers: int, *, tied: bool) -> Table:
    """The tensors of both; GPT-2 keeps matrices as (inputs, outputs)."""
    rules: list[Rule] = [
        same("embedding.tokens.weight", "transformer.wte.weight"),
        same("positions.table", "transformer.wpe.weight"),
        *affine(Same, "final_norm", "transformer.ln_f"),
    ]
    for i in range(n_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        rules += [
            *affine(Same, f"{ours}.attention_residual.norm", f"{theirs}.ln_1"),
            *affine(Transposed, f"{ours}.self_attention.input", f"{theirs}.attn.c_attn"),
            *affine(Transposed, f"{ours}.self_attention.output", f"{theirs}.attn.c_proj"),
            *affine(Same, f"{ours}.feed_forward_residual.norm", f"{theirs}.ln_2"),
            *affine(Transposed, f"{ours}.feed_forward.inner", f"{theirs}.mlp.c_fc"),
            *affine(Transposed, f"{ours}.feed_forward.outer", f"{theirs}.mlp.c_proj"),
        ]
    if not tied:
        rules.append(same("output.weight", "lm_head.weight"))
    return Table(
        rules,
        ours_tied={"output.weight": "embedding.tokens.weight"} if tied else {},
        theirs_tied={"lm_head.weight": "transformer.wte.weight"} if tied else {},
        ignored=(".attn.bias", ".attn.masked_bias"),
    )
