"""The encoder-decoder against Marian and torch.nn.Transformer, and what must hold of any of it."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
)

from tx_lightning.models import EncoderDecoder
from tx_lightning.nn import (
    AlibiPositions,
    GELUFeedForward,
    LearnedPositions,
    NoPositions,
    Positions,
    ReLUFeedForward,
    RotaryPositions,
    SinusoidalPositions,
    SwiGLUFeedForward,
    SwishFeedForward,
    T5RelativePositions,
    record_attention,
)
from tx_lightning.nn.feed_forward import FeedForwardFactory
from tx_lightning.nn.layers import NormFactory

V, D, H, FF = 19, 16, 4, 24
PAD = 0

SCHEMES = [
    NoPositions,
    SinusoidalPositions,
    LearnedPositions,
    RotaryPositions,
    AlibiPositions,
    T5RelativePositions,
]
NORMS = [nn.LayerNorm, nn.RMSNorm]
FEED_FORWARDS = [ReLUFeedForward, GELUFeedForward, SwishFeedForward, SwiGLUFeedForward]

SOURCE = torch.tensor([[7, 5, 9, 4, 2], [3, 8, 2, 0, 0], [6, 2, 0, 0, 0]])
TARGET = torch.tensor([[1, 9, 4, 12, 8, 3], [1, 6, 6, 0, 0, 0], [1, 11, 3, 5, 0, 0]])


def network(**changes: Any) -> EncoderDecoder:
    """A small network without dropout whose weights are all random, biases and norms included."""
    settings: dict[str, Any] = {
        "d_model": D,
        "n_heads": H,
        "n_encoder_layers": 2,
        "n_decoder_layers": 2,
        "d_ff": FF,
        "dropout": 0.0,
    }
    model = EncoderDecoder(V, **(settings | changes))
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


# Equal to other implementations -----------------------------------------------------------------


def marian(*, shared: bool, activation: str) -> MarianMTModel:
    config = MarianConfig(
        vocab_size=V,
        decoder_vocab_size=V,
        d_model=D,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=H,
        decoder_attention_heads=H,
        encoder_ffn_dim=FF,
        decoder_ffn_dim=FF,
        activation_function=activation,
        dropout=0.0,
        scale_embedding=True,
        share_encoder_decoder_embeddings=shared,
        max_position_embeddings=32,
        pad_token_id=PAD,
        decoder_start_token_id=1,
        eos_token_id=2,
        forced_eos_token_id=None,
    )
    model = MarianMTModel(config)
    for name, parameter in model.named_parameters():
        if "embed_positions" not in name:
            nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(model.final_logits_bias)
    return model


def like_marian(model: MarianMTModel, feed_forward: FeedForwardFactory) -> EncoderDecoder:
    """Build our network with Marian's weights; its table of positions is sines, then cosines."""
    state = from_hugging_face(model)
    for stack in ("encoder", "decoder"):
        del state[f"{stack}.embed_positions.weight"]
    ours = network(
        n_decoder_layers=3,
        positions=partial(SinusoidalPositions, layout="halves"),
        feed_forward=feed_forward,
        share_embeddings=model.config.share_encoder_decoder_embeddings,
        output_bias=True,
    )
    ours.load_state_dict(state)
    return ours


def from_hugging_face(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a Marian or BART model under our names."""
    state = rename(
        {key.removeprefix("model."): value for key, value in model.state_dict().items()},
        {
            "encoder.embed_tokens": "source_embedding.tokens",
            "decoder.embed_tokens": "target_embedding.tokens",
            "encoder.layernorm_embedding": "source_embedding.norm",
            "decoder.layernorm_embedding": "target_embedding.norm",
            "lm_head": "output",
            "self_attn.out_proj": "self_attention.output",
            "encoder_attn.out_proj": "cross_attention.output",
            "decoder.layers": "DECODER.layers",
            "encoder.layers": "ENCODER.layers",
            "fc1": "feed_forward.inner",
            "fc2": "feed_forward.outer",
            "final_layer_norm": "feed_forward_residual.norm",
            "encoder_attn_layer_norm": "cross_residual.norm",
        },
    )
    state = {
        key.replace(
            "self_attn_layer_norm",
            "attention_residual.norm" if key.startswith("ENCODER") else "self_residual.norm",
        ): value
        for key, value in state.items()
    }
    for key in [key for key in state if ".q_proj." in key]:
        parts = [state.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        joint = key.replace("q_proj", "input").replace("self_attn", "self_attention")
        state[joint.replace("encoder_attn", "cross_attention")] = torch.cat(parts)
    state.pop("shared.weight", None)
    state["output.bias"] = state.pop("final_logits_bias")[0]
    return rename(state, {"DECODER": "decoder", "ENCODER": "encoder"})


@pytest.mark.parametrize(
    ("activation", "feed_forward"),
    [("relu", ReLUFeedForward), ("gelu", GELUFeedForward), ("swish", SwishFeedForward)],
)
@pytest.mark.parametrize("shared", [True, False])
def test_logits_equal_marian(
    shared: bool, activation: str, feed_forward: FeedForwardFactory
) -> None:
    theirs = marian(shared=shared, activation=activation)
    ours = like_marian(theirs, feed_forward)
    expected = theirs(
        input_ids=SOURCE, attention_mask=(SOURCE != PAD).long(), decoder_input_ids=TARGET
    ).logits
    real = TARGET != PAD
    torch.testing.assert_close(ours(SOURCE, TARGET)[real], expected[real], rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        state, logits = ours.start(SOURCE), ours(SOURCE, TARGET)
        for t, tokens in enumerate(TARGET.t()):
            stepped = ours.step(tokens, state)
            torch.testing.assert_close(stepped, logits[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [True, False])
def test_logits_equal_bart(scale: bool) -> None:
    """BART has a norm on each stack's embeddings, a bias on the logits, and leaves scaling open."""
    config = BartConfig(
        vocab_size=V,
        d_model=D,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=H,
        decoder_attention_heads=H,
        encoder_ffn_dim=FF,
        decoder_ffn_dim=FF,
        activation_function="gelu",
        dropout=0.0,
        scale_embedding=scale,
        max_position_embeddings=32,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    theirs = BartForConditionalGeneration(config)
    for parameter in [*theirs.parameters(), theirs.final_logits_bias]:
        nn.init.normal_(parameter, std=0.3)
    state = from_hugging_face(theirs)
    for stack in ("encoder", "decoder"):  # the first two rows are never used
        state[f"{stack}.positions.table"] = state.pop(f"{stack}.embed_positions.weight")[2:]
    ours = network(
        positions=partial(LearnedPositions, max_length=32),
        feed_forward=GELUFeedForward,
        scale_embeddings=scale,
        embedding_norm=nn.LayerNorm,
        output_bias=True,
    )
    ours.load_state_dict(state)
    expected = theirs(
        input_ids=SOURCE, attention_mask=(SOURCE != PAD).long(), decoder_input_ids=TARGET
    ).logits
    torch.testing.assert_close(ours(SOURCE, TARGET), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_hidden_states_equal_torch_transformer(pre_norm: bool) -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, H, FF, 0.0, batch_first=True, norm_first=pre_norm),
        num_layers=2,
        norm=nn.LayerNorm(D),
        enable_nested_tensor=False,
    )
    theirs = nn.Transformer(
        D, H, 2, 2, FF, 0.0, custom_encoder=encoder, batch_first=True, norm_first=pre_norm
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    if not pre_norm:  # torch ends both stacks in a norm that the paper does not have
        theirs.encoder.norm = theirs.decoder.norm = None
    ours = network(pre_norm=pre_norm, positions=NoPositions)
    state = rename(
        theirs.state_dict(),
        {
            "in_proj_weight": "input.weight",
            "in_proj_bias": "input.bias",
            "out_proj": "output",
            "self_attn": "self_attention",
            "multihead_attn": "cross_attention",
            "linear1": "feed_forward.inner",
            "linear2": "feed_forward.outer",
            "coder.norm": "coder.final_norm",
            "norm3": "feed_forward_residual.norm",
        },
    )
    norms = {
        "encoder": {"norm1": "attention_residual.norm", "norm2": "feed_forward_residual.norm"},
        "decoder": {"norm1": "self_residual.norm", "norm2": "cross_residual.norm"},
    }
    for stack, names in norms.items():
        part = {key: state[key] for key in state if key.startswith(stack)}
        getattr(ours, stack).load_state_dict(
            {key.removeprefix(f"{stack}."): value for key, value in rename(part, names).items()}
        )
    table = ours.target_embedding.tokens
    expected = theirs(
        4 * table(SOURCE),  # sqrt(D)
        4 * table(TARGET),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.bool),
        src_key_padding_mask=SOURCE == PAD,
        memory_key_padding_mask=SOURCE == PAD,
    )
    torch.testing.assert_close(ours.hidden(SOURCE, TARGET), expected, rtol=1e-5, atol=1e-5)


# What attention may see -------------------------------------------------------------------------


@pytest.mark.parametrize("positions", SCHEMES)
def test_future_tokens_change_nothing(positions: type[Positions]) -> None:
    model = network(positions=positions)
    before = model(SOURCE, TARGET)
    for t in range(1, TARGET.shape[1]):
        changed = TARGET.clone()
        changed[:, t] = 17
        after = model(SOURCE, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-5)
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-3)


@pytest.mark.parametrize("positions", SCHEMES)
def test_padding_changes_nothing(positions: type[Positions]) -> None:
    model = network(positions=positions)
    together = model(SOURCE, TARGET)
    wider = model(nn.functional.pad(SOURCE, (0, 9)), nn.functional.pad(TARGET, (0, 9)))
    torch.testing.assert_close(wider[:, : TARGET.shape[1]], together, rtol=0, atol=1e-5)
    for row, (source, target) in enumerate(zip(SOURCE, TARGET, strict=True)):
        source, target = source[source != PAD], target[target != PAD]
        alone = model(source[None], target[None])[0]
        torch.testing.assert_close(alone, together[row, : len(target)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", SCHEMES)
def test_the_embedding_of_padding_changes_nothing(positions: type[Positions]) -> None:
    model, real = network(positions=positions, tie_output=False), TARGET != PAD
    before = model(SOURCE, TARGET)
    model.target_embedding.tokens.weight.data[PAD] = 100
    after = model(SOURCE, TARGET)
    torch.testing.assert_close(after[real], before[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", SCHEMES)
def test_every_source_token_matters_and_its_place(positions: type[Positions]) -> None:
    model = network(positions=positions)
    source, target = SOURCE[:1], TARGET[:1]
    before = model(source, target)
    for s in range(source.shape[1]):
        changed = source.clone()
        changed[0, s] = 17
        assert not torch.allclose(model(changed, target), before, atol=1e-3)
    backwards = torch.tensor([[4, 9, 5, 7, 2]])  # the end-of-sequence token stays at the end
    ignores_order = torch.allclose(model(backwards, target), before, atol=1e-4)
    assert ignores_order == (positions is NoPositions)


def test_symmetric_alibi_knows_left_from_right_by_the_last_token_only() -> None:
    model = network(positions=AlibiPositions)
    mirrored = model(SOURCE[:1].flip(1), TARGET[:1])
    torch.testing.assert_close(mirrored, model(SOURCE[:1], TARGET[:1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", SCHEMES)
def test_a_row_of_padding_only_gives_no_nan(positions: type[Positions], dtype: torch.dtype) -> None:
    model = network(positions=positions).to(dtype)
    source, target = SOURCE.clone(), TARGET.clone()
    source[1] = target[1] = PAD
    logits = model(source, target)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# Types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("positions", SCHEMES)
def test_bfloat16_is_close_to_float32(positions: type[Positions], autocast: bool) -> None:
    model, real = network(positions=positions), TARGET != PAD
    wide = model(SOURCE, TARGET)[real]
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        narrow = model(SOURCE, TARGET)[real]
    assert narrow.dtype == torch.bfloat16
    assert (narrow - wide).norm() < 0.06 * wide.norm()
    narrow.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Decoding step by step --------------------------------------------------------------------------


def assert_steps_equal_forward(
    model: EncoderDecoder, tolerance: float = 1e-5, dtype: torch.dtype | None = None
) -> None:
    autocast = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    with torch.inference_mode(), autocast:
        logits = model(SOURCE, TARGET)
        state = model.start(SOURCE)
        for t, tokens in enumerate(TARGET.t()):
            stepped = model.step(tokens, state)
            torch.testing.assert_close(stepped, logits[:, t], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("positions", SCHEMES)
def test_steps_equal_forward(positions: type[Positions], pre_norm: bool) -> None:
    assert_steps_equal_forward(network(positions=positions, pre_norm=pre_norm))


@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_steps_equal_forward_for_every_block(
    pre_norm: bool, norm: NormFactory, feed_forward: FeedForwardFactory
) -> None:
    assert_steps_equal_forward(network(pre_norm=pre_norm, norm=norm, feed_forward=feed_forward))


@pytest.mark.parametrize("positions", SCHEMES)
def test_steps_equal_forward_in_bfloat16(positions: type[Positions]) -> None:
    assert_steps_equal_forward(network(positions=positions).bfloat16(), tolerance=0.25)
    assert_steps_equal_forward(network(positions=positions), tolerance=0.25, dtype=torch.bfloat16)


@pytest.mark.parametrize("positions", SCHEMES)
def test_many_steps(positions: type[Positions]) -> None:
    """Longer than the first buffer of the cache."""
    model = network(positions=positions)
    target = torch.randint(1, V, (3, 70))
    with torch.inference_mode():
        state = model.start(SOURCE)
        steps = torch.stack([model.step(tokens, state) for tokens in target.t()], dim=1)
        torch.testing.assert_close(steps, model(SOURCE, target), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", SCHEMES)
def test_selected_rows_continue_as_the_rows_they_were(positions: type[Positions]) -> None:
    """Rows are repeated before the first step, reordered after some, and dropped later."""
    model = network(positions=positions)
    with torch.inference_mode():
        state = model.start(SOURCE)
        rows = torch.arange(3)
        history = torch.empty(3, 0, dtype=torch.long)
        for choice in ([0, 0, 1, 1, 2, 2], None, [5, 0, 3, 3], None, [2, 1], [0], None):
            if choice is not None:
                state.select(torch.tensor(choice))
                rows, history = rows[choice], history[choice]
            tokens = torch.randint(1, V, (len(rows),))
            history = torch.cat((history, tokens[:, None]), dim=1)
            expected = model(SOURCE[rows], history)[:, -1]
            torch.testing.assert_close(model.step(tokens, state), expected, rtol=1e-5, atol=1e-5)


def test_longer_than_the_learned_positions() -> None:
    class Short(LearnedPositions):
        def __init__(self, d_model: int, n_heads: int, bidirectional: bool) -> None:
            super().__init__(d_model, n_heads, bidirectional, max_length=5)

    model = network(positions=Short)
    with pytest.raises(ValueError, match="6 tokens exceeds max_length=5"):
        model(SOURCE, TARGET)
    with torch.inference_mode():
        state = model.start(SOURCE)
        for tokens in TARGET.t()[:5]:
            model.step(tokens, state)
        with pytest.raises(ValueError, match="6 tokens exceeds max_length=5"):
            model.step(TARGET[:, 5], state)


# Attention maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", SCHEMES)
def test_recorded_attention(positions: type[Positions]) -> None:
    model = network(positions=positions)
    before = model(SOURCE, TARGET)
    with record_attention(model) as maps:
        torch.testing.assert_close(model(SOURCE, TARGET), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(SOURCE, TARGET), before, rtol=0, atol=0)
    kinds = {"encoder": ["self_attention"], "decoder": ["self_attention", "cross_attention"]}
    assert set(maps) == {
        f"{stack}.layers.{layer}.{kind}"
        for stack, names in kinds.items()
        for layer in range(2)
        for kind in names
    }
    for name, weights in maps.items():
        is_cross = name.endswith("cross_attention")
        queries = SOURCE if name.startswith("encoder") else TARGET
        keys = SOURCE if is_cross else queries
        assert weights.shape == (3, H, queries.shape[1], keys.shape[1])
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        if keys is SOURCE:
            assert weights.masked_select((SOURCE == PAD)[:, None, None]).count_nonzero() == 0
        else:
            assert weights.triu(1).count_nonzero() == 0


# Parameters -------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def closed_form(vocab_size: int, d: int, ff: int, encoder_layers: int, decoder_layers: int) -> int:
    attention = 4 * (d * d + d)
    feed_forward = 2 * d * ff + ff + d
    norm = 2 * d
    encoder = encoder_layers * (attention + feed_forward + 2 * norm)
    decoder = decoder_layers * (2 * attention + feed_forward + 3 * norm)
    return vocab_size * d + encoder + decoder


def test_base_model_has_the_size_of_the_paper() -> None:
    """Vaswani et al. 2017, table 3, rounds it to 65 million."""
    with torch.device("meta"):
        model = EncoderDecoder(37_000)
    assert count(model) == closed_form(37_000, 512, 2048, 6, 6) == 63_082_496


def test_big_model_has_the_size_of_the_paper() -> None:
    """Vaswani et al. 2017, table 3, says 213 million for "about 37,000" word pieces."""
    with torch.device("meta"):
        model = EncoderDecoder(37_000, d_model=1024, n_heads=16, d_ff=4096)
    assert count(model) == closed_form(37_000, 1024, 4096, 6, 6) == 214_245_376


def test_tiny_model() -> None:
    with torch.device("meta"):
        model = EncoderDecoder(
            10_000, d_model=128, n_heads=4, n_encoder_layers=4, n_decoder_layers=4, d_ff=256
        )
    assert count(model) == closed_form(10_000, 128, 256, 4, 4) == 2_605_056


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_are_one_parameter(share: bool, tie: bool) -> None:
    model = network(share_embeddings=share, tie_output=tie)
    source, target = model.source_embedding.tokens.weight, model.target_embedding.tokens.weight
    assert (source is target) == share
    assert (model.output_weight is target) == tie
    tables = 3 - share - tie
    assert count(model) == closed_form(V, D, FF, 2, 2) + (tables - 1) * V * D
    model(SOURCE, TARGET).square().sum().backward()
    assert len({id(w.grad) for w in (source, target, model.output_weight)}) == tables


def test_tying_survives_a_state_dict() -> None:
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    assert other.output_weight is other.source_embedding.tokens.weight
    torch.testing.assert_close(other(SOURCE, TARGET), model(SOURCE, TARGET), rtol=0, atol=0)


@pytest.mark.parametrize(("pre_norm", "extra"), [(False, 0), (True, 2 * 2 * D)])
def test_pre_norm_stacks_end_in_a_norm(pre_norm: bool, extra: int) -> None:
    assert count(network(pre_norm=pre_norm)) == closed_form(V, D, FF, 2, 2) + extra


def test_initialization() -> None:
    """Xavier uniform matrices, embeddings of variance 1 / d_model, nothing in the padding's row."""
    model = EncoderDecoder(
        500, d_model=64, n_heads=4, n_encoder_layers=1, n_decoder_layers=1, d_ff=96, pad_id=3
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.unique().tolist() == [float(name.endswith("weight"))], name
        elif name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif "embedding" not in name:
            for matrix in parameter.chunk(3) if name.endswith("input.weight") else [parameter]:
                bound = math.sqrt(6 / sum(matrix.shape))
                assert 0.99 * bound < matrix.abs().max().item() <= bound, name
    table = model.target_embedding.tokens.weight
    assert table[3].count_nonzero() == 0
    assert table.std().item() == pytest.approx(64**-0.5, rel=0.02)


def test_untied_output_is_scaled_like_the_embeddings() -> None:
    model = EncoderDecoder(
        500, d_model=64, n_heads=4, n_encoder_layers=0, n_decoder_layers=0, tie_output=False
    )
    assert model.output_weight.std().item() == pytest.approx(64**-0.5, rel=0.02)


def test_stacks_know_their_direction() -> None:
    model = network(positions=T5RelativePositions)
    assert model.encoder.positions.bidirectional
    assert not model.decoder.positions.bidirectional


# The rest ---------------------------------------------------------------------------------------


def test_forward_is_hidden_times_output_weight() -> None:
    model = network()
    hidden = model.hidden(SOURCE, TARGET)
    assert hidden.shape == (3, 6, D)
    expected = hidden @ model.output_weight.t()
    torch.testing.assert_close(model(SOURCE, TARGET), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "factor"), [(True, 4), (False, 1)])  # sqrt(D)
def test_embeddings_are_scaled(scale: bool, factor: int) -> None:
    model = network(positions=NoPositions, scale_embeddings=scale)
    ids = torch.tensor([[4]])
    for embedding in (model.source_embedding, model.target_embedding):
        embedded = embedding(ids, model.decoder.positions)
        torch.testing.assert_close(embedded, factor * embedding.tokens(ids))


@pytest.mark.parametrize("share", [True, False])
def test_each_stack_has_its_own_embedding_norm(share: bool) -> None:
    """After the positions and before dropout."""
    settings: dict[str, Any] = {"share_embeddings": share, "positions": LearnedPositions}
    model = network(embedding_norm=nn.RMSNorm, **settings)
    assert count(model) == count(network(**settings)) + 2 * D
    for embedding, stack in (
        (model.source_embedding, model.encoder),
        (model.target_embedding, model.decoder),
    ):
        summed = stack.positions.embed(4 * embedding.tokens(SOURCE))
        expected = embedding.norm(summed)
        torch.testing.assert_close(embedding(SOURCE, stack.positions), expected)
        embedding.dropout.p = 0.5
        dropped = embedding(SOURCE, stack.positions)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], 2 * expected[kept], rtol=1e-4, atol=1e-4)
        assert 0.3 < kept.float().mean() < 0.7


def test_the_bias_of_the_logits() -> None:
    model = network(output_bias=True)
    assert count(model) == count(network()) + V
    hidden = model.hidden(SOURCE, TARGET)
    assert model.output_bias is not None
    expected = hidden @ model.output_weight.t() + model.output_bias
    torch.testing.assert_close(model(SOURCE, TARGET), expected, rtol=1e-5, atol=1e-5)
    assert network().output_bias is None
    assert EncoderDecoder(
        V, d_model=D, n_heads=H, output_bias=True
    ).output.bias.unique().tolist() == [0]


def test_dropout_acts_in_training_only() -> None:
    model = network(dropout=0.5, n_encoder_layers=0, n_decoder_layers=0)
    embedded = model.target_embedding(TARGET, model.decoder.positions)
    assert 0.3 < (embedded == 0).float().mean() < 0.7
    model = network(dropout=0.5)
    assert not torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))
    model.eval()
    assert torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))


def test_attention_dropout_reaches_every_attention() -> None:
    model = network(attention_dropout=0.25)
    with record_attention(model) as maps:
        first = model(SOURCE, TARGET)
        assert not torch.equal(model(SOURCE, TARGET), first)
    assert {model.get_submodule(name).dropout for name in maps} == {0.25}


def test_pad_id() -> None:
    model, zero = network(pad_id=18), network(pad_id=0)
    every, real = model.encode(SOURCE).mask, zero.encode(SOURCE).mask
    assert every is not None
    assert every.all()
    assert real is not None
    assert real[:, 0, 0].equal(SOURCE != 0)


def test_width_not_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match="d_model=16 is not divisible by n_heads=3"):
        network(n_heads=3)
