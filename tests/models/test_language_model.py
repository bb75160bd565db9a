"""The language model against GPT-2 and torch.nn, and what must hold of any of it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tx_lightning.decoding import Greedy
from tx_lightning.models import LanguageModel, LanguageModelState
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

V, D, H, FF, C = 19, 16, 4, 24, 8

SCHEMES = [
    NoPositions,
    SinusoidalPositions,
    LearnedPositions,
    RotaryPositions,
    AlibiPositions,
    T5RelativePositions,
]
FEED_FORWARDS = [ReLUFeedForward, GELUFeedForward, SwishFeedForward, SwiGLUFeedForward]

IDS = torch.tensor(
    [[7, 5, 9, 4, 2, 11, 3, 8], [3, 8, 2, 6, 6, 1, 0, 12], [6, 2, 0, 1, 18, 4, 4, 9]]
)


def network(**changes: Any) -> LanguageModel:
    """A small network without dropout whose weights are all random, biases and norms included."""
    settings: dict[str, Any] = {
        "d_model": D,
        "n_heads": H,
        "n_layers": 2,
        "d_ff": FF,
        "context_length": C,
        "dropout": 0.0,
    }
    model = LanguageModel(V, **(settings | changes))
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Equal to other implementations -----------------------------------------------------------------


def gpt2(activation: str) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=V,
        n_embd=D,
        n_layer=2,
        n_head=H,
        n_inner=FF,
        n_positions=C,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def like_gpt2(theirs: GPT2LMHeadModel, feed_forward: FeedForwardFactory) -> LanguageModel:
    """Build our network with GPT-2's weights; its matrices are (inputs, outputs)."""
    names = {
        "transformer.wte.": "embedding.tokens.",
        "transformer.wpe.weight": "positions.table",
        "transformer.h.": "layers.",
        "transformer.ln_f.": "final_norm.",
        "lm_head.": "output.",
        "attn.c_attn.": "self_attention.input.",
        "attn.c_proj.": "self_attention.output.",
        "ln_1.": "attention_residual.norm.",
        "ln_2.": "feed_forward_residual.norm.",
        "mlp.c_fc.": "feed_forward.inner.",
        "mlp.c_proj.": "feed_forward.outer.",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        transposed = ".c_" in key and key.endswith("weight")
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value.t() if transposed else value
    ours = network(feed_forward=feed_forward)
    ours.load_state_dict(state)
    return ours


@pytest.mark.parametrize(
    ("activation", "feed_forward"),
    [("gelu_new", partial(GELUFeedForward, approximate="tanh")), ("gelu", GELUFeedForward)],
    ids=["gelu_new", "gelu"],
)
def test_logits_equal_gpt2(activation: str, feed_forward: FeedForwardFactory) -> None:
    theirs = gpt2(activation)
    ours = like_gpt2(theirs, feed_forward)
    assert_close(ours(IDS), theirs(input_ids=IDS).logits)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_hidden_states_equal_torch_transformer(pre_norm: bool) -> None:
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, H, FF, 0.0, batch_first=True, norm_first=pre_norm),
        num_layers=2,
        norm=nn.LayerNorm(D) if pre_norm else None,
        enable_nested_tensor=False,
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = network(pre_norm=pre_norm, positions=NoPositions, feed_forward=ReLUFeedForward)
    names = {
        "self_attn.in_proj_": "self_attention.input.",
        "self_attn.out_proj": "self_attention.output",
        "linear1": "feed_forward.inner",
        "linear2": "feed_forward.outer",
        "norm1": "attention_residual.norm",
        "norm2": "feed_forward_residual.norm",
    }
    state = {"embedding.tokens.weight": ours.output_weight, "output.weight": ours.output_weight}
    for key, value in theirs.state_dict().items():
        key = f"final_{key}" if key.startswith("norm.") else key
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    ours.load_state_dict(state)
    future = nn.Transformer.generate_square_subsequent_mask(C, dtype=torch.bool)
    assert_close(ours.hidden(IDS), theirs(ours.embedding.tokens(IDS), mask=future))


# What attention may see -------------------------------------------------------------------------


@pytest.mark.parametrize("positions", SCHEMES)
def test_future_tokens_change_nothing(positions: type[Positions]) -> None:
    model = network(positions=positions)
    before = model(IDS)
    for t in range(C):
        changed = IDS.clone()
        changed[:, t] = 17
        after = model(changed)
        assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-3)


@pytest.mark.parametrize("positions", SCHEMES)
def test_rows_and_lengths_are_independent(positions: type[Positions]) -> None:
    model = network(positions=positions)
    together = model(IDS)
    for row in range(3):
        for length in (1, 5, C):
            assert_close(model(IDS[row : row + 1, :length])[0], together[row, :length])


@pytest.mark.parametrize("positions", SCHEMES)
def test_earlier_tokens_matter_and_their_place(positions: type[Positions]) -> None:
    """Two layers know the order without positions too: each token sees what stood before it."""
    model = network(positions=positions)
    before = model(IDS)[:, -1]
    for t in range(C - 1):
        changed = IDS.clone()
        changed[:, t] = 17
        assert not torch.allclose(model(changed)[:, -1], before, atol=1e-4)
    swapped = IDS[:, [1, 0, *range(2, C)]]
    assert not torch.allclose(model(swapped)[:, -1], before, atol=1e-4)


# Continuing text --------------------------------------------------------------------------------


def stepped(model: LanguageModel, ids: Tensor, state: LanguageModelState) -> Tensor:
    """The logits after each of the ids (N, T), one step each: (N, T, V)."""
    return torch.stack([model.step(tokens, state) for tokens in ids.t()], dim=1)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("positions", SCHEMES)
def test_steps_equal_forward(positions: type[Positions], pre_norm: bool) -> None:
    model = network(positions=positions, pre_norm=pre_norm)
    with torch.inference_mode():
        state = model.start(3)
        assert_close(stepped(model, IDS, state), model(IDS))
        assert state.ids.equal(IDS)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_steps_equal_forward_for_every_block(
    feed_forward: FeedForwardFactory, norm: NormFactory
) -> None:
    model = network(norm=norm, feed_forward=feed_forward, bias=False, tie_output=False)
    with torch.inference_mode():
        assert_close(stepped(model, IDS, model.start(3)), model(IDS))


@pytest.mark.parametrize("parts", [[8], [5, 3], [1, 6, 1], [2, 2, 4], [3, 1, 1, 3]])
@pytest.mark.parametrize("positions", SCHEMES)
def test_prefill_in_parts_equals_forward(positions: type[Positions], parts: list[int]) -> None:
    model = network(positions=positions)
    with torch.inference_mode():
        logits, state, end = model(IDS), model.start(3), 0
        for length in parts:
            end += length
            after = model.prefill(IDS[:, end - length : end], state)
            assert_close(after, logits[:, end - 1])
            assert state.window == end


@pytest.mark.parametrize("positions", SCHEMES)
def test_steps_and_prefill_mix(positions: type[Positions]) -> None:
    model = network(positions=positions)
    with torch.inference_mode():
        logits, state = model(IDS), model.start(3)
        assert_close(model.prefill(IDS[:, :3], state), logits[:, 2])
        assert_close(stepped(model, IDS[:, 3:5], state), logits[:, 3:5])
        assert_close(model.prefill(IDS[:, 5:7], state), logits[:, 6])
        assert_close(model.step(IDS[:, 7], state), logits[:, 7])


def test_many_steps() -> None:
    """Longer than the first buffer of the cache."""
    model, ids = network(context_length=80), torch.randint(V, (2, 80))
    with torch.inference_mode():
        state, logits = model.start(2), model(ids)
        assert_close(model.prefill(ids[:, :20], state), logits[:, 19], 1e-4)
        assert_close(stepped(model, ids[:, 20:], state), logits[:, 20:], 1e-4)


@pytest.mark.parametrize("positions", SCHEMES)
def test_steps_equal_forward_in_bfloat16(positions: type[Positions]) -> None:
    wide = network(positions=positions)
    with torch.inference_mode():
        expected = wide(IDS)
        for model, autocast in ((wide, True), (network(positions=positions), False)):
            if not autocast:
                model.load_state_dict(wide.state_dict())
                model.bfloat16()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                state = model.start(3)
                first = model.prefill(IDS[:, :4], state)
                rest = stepped(model, IDS[:, 4:], state)
            assert rest.dtype == torch.bfloat16
            actual = torch.cat((first[:, None], rest), dim=1)
            assert (actual - expected[:, 3:]).norm() < 0.06 * expected[:, 3:].norm()


def test_prefill_projects_the_last_position_only() -> None:
    model, shapes = network(), []
    model.output.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    model.prefill(IDS, model.start(3))
    assert shapes == [(3, D)]


@pytest.mark.parametrize("positions", SCHEMES)
def test_selected_rows_continue_as_the_rows_they_were(positions: type[Positions]) -> None:
    """Rows are repeated before the first step, reordered after some, and dropped later."""
    model = network(positions=positions)
    with torch.inference_mode():
        state, history = model.start(2), torch.empty(2, 0, dtype=torch.long)
        for choice in ([0, 0, 1, 1], None, [3, 0, 2, 2], None, [2, 1], [0], None):
            if choice is not None:
                state.select(torch.tensor(choice))
                history = history[choice]
            tokens = torch.randint(V, (len(history),))
            history = torch.cat((history, tokens[:, None]), dim=1)
            assert_close(model.step(tokens, state), model(history)[:, -1])
            assert state.ids.equal(history)


def test_selected_rows_slide_as_the_rows_they_were() -> None:
    model = network()
    with torch.inference_mode():
        state = model.start(3, slide=3)
        model.prefill(IDS, state)
        state.select(torch.tensor([2, 0, 0, 1]))
        logits = model.step(torch.tensor([1, 2, 3, 4]), state)
        window = torch.cat((IDS[[2, 0, 0, 1], 3:], torch.tensor([[1], [2], [3], [4]])), dim=1)
        assert_close(logits, model(window)[:, -1])


@pytest.mark.parametrize("slide", [1, 3, C - 1, C])
@pytest.mark.parametrize("positions", SCHEMES)
def test_a_full_context_slides(positions: type[Positions], slide: int) -> None:
    """Every step is the network on the window: C tokens, then C - slide + 1 of them, growing."""
    model, ids = network(positions=positions), torch.randint(V, (2, 3 * C))
    held = 0
    with torch.inference_mode():
        state = model.start(2, slide)
        for t in range(ids.shape[1]):
            held = C - slide + 1 if held == C else held + 1
            expected = model(ids[:, t + 1 - held : t + 1])[:, -1]
            assert_close(model.step(ids[:, t], state), expected)
            assert state.window == held
        assert state.ids.equal(ids)


@pytest.mark.parametrize("parts", [[12], [5, 4], [8, 1], [8, 20], [3, 3, 3, 3]])
def test_a_long_prefill_keeps_the_latest_tokens(parts: list[int]) -> None:
    model, end = network(), 0
    ids = torch.randint(V, (2, sum(parts)))
    with torch.inference_mode():
        state = model.start(2, slide=4)
        for length in parts:
            end += length
            after = model.prefill(ids[:, end - length : end], state)
            assert_close(after, model(ids[:, max(0, end - C) : end])[:, -1])
            assert state.window == min(end, C)


def test_a_full_context_without_slide() -> None:
    model = network()
    with torch.inference_mode():
        state = model.start(3)
        logits = model.prefill(IDS[:, :7], state)
        with pytest.raises(ValueError, match="context of 8 tokens is full: it holds 7, and 2 more"):
            model.prefill(IDS[:, :2], state)
        assert_close(logits, model(IDS[:, :7])[:, -1])
        assert_close(model.step(IDS[:, 7], state), model(IDS)[:, -1])  # the refusal left no trace
        with pytest.raises(ValueError, match="context of 8 tokens is full: it holds 8, and 1 more"):
            model.step(IDS[:, 0], state)
        assert state.ids.equal(IDS)


@pytest.mark.parametrize("slide", [0, -1, C + 1])
def test_impossible_slides(slide: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and context_length=8; it is {slide}"):
        network().start(1, slide)


def test_prefill_of_nothing() -> None:
    model = network()
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(IDS[:, :0], model.start(3))


@pytest.mark.parametrize("positions", SCHEMES)
@torch.inference_mode()
def test_masks_and_states_are_made_on_the_device_of_the_model(positions: type[Positions]) -> None:
    model, ids = network(positions=positions).to("meta"), IDS.to("meta")
    state = model.start(3, slide=1)
    assert model.prefill(ids[:, :5], state).device.type == "meta"
    assert model.prefill(ids[:, 5:], state).device.type == "meta"
    state.select(torch.tensor([2, 0], device="meta"))
    assert model.step(ids[:2, 0], state).shape == (2, V)
    assert model(ids).device.type == state.ids.device.type == "meta"


def test_decoding_strategies_drive_it() -> None:
    """Greedy search over the step function is the argmax of the network, token by token."""
    model = network(context_length=16)
    found = Greedy()(model.step, model.start(2), max_lengths=torch.tensor([6, 6]), eos_id=18)
    tokens = found[0][0].tokens
    ids = torch.tensor([[1, *tokens]])
    expected = model(ids)[0, :-1]
    expected[:, :2] = -math.inf  # padding and the beginning of a text are never generated
    assert expected.argmax(-1).tolist() == tokens
    assert len(tokens) > 1


# Attention maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", SCHEMES)
def test_recorded_attention(positions: type[Positions]) -> None:
    model = network(positions=positions)
    before = model(IDS)
    with record_attention(model) as maps:
        assert_close(model(IDS), before)
    assert set(maps) == {"layers.0.self_attention", "layers.1.self_attention"}
    for weights in maps.values():
        assert weights.shape == (3, H, C, C)
        assert_close(weights.sum(-1), torch.ones(3, H, C))
        assert weights.triu(1).count_nonzero() == 0


@pytest.mark.parametrize(("positions", "fast"), [(None, True), (AlibiPositions, False)])
def test_the_kernel_masks_the_future_where_it_can(
    positions: Callable[[int, int, bool], Positions] | None, fast: bool
) -> None:
    model = network(positions=positions)
    calls = []
    for layer in model.layers:
        kernel = layer.self_attention.kernel

        def spy(*arguments: Any, kernel: Any = kernel) -> Tensor:
            mask, causal, _, score_bias = arguments[3:]
            assert mask is None or score_bias is None
            calls.append((mask is score_bias is None, causal))
            return kernel(*arguments)

        layer.self_attention.kernel = spy
    model(IDS)
    model.prefill(IDS, model.start(3))
    assert calls == [(fast, fast)] * 4


# Parameters -------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("n_layers", "d_model", "n_heads", "parameters"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_the_sizes_of_gpt2(n_layers: int, d_model: int, n_heads: int, parameters: int) -> None:
    """The counts of the published checkpoints: gpt2, gpt2-medium, gpt2-large and gpt2-xl."""
    with torch.device("meta"):
        model = LanguageModel(50_257, n_layers=n_layers, d_model=d_model, n_heads=n_heads)
    assert count(model) == parameters


def test_the_defaults_are_gpt2() -> None:
    with torch.device("meta"):
        model = LanguageModel(50_257)
    assert count(model) == 124_439_808
    assert (model.d_model, model.vocab_size, model.context_length) == (768, 50_257, 1024)


def test_options_change_the_parameters_as_they_should() -> None:
    plain = count(network())
    assert count(network(tie_output=False)) == plain + V * D
    assert count(network(bias=False)) == plain - 2 * 4 * D
    assert count(network(pre_norm=False)) == plain - 2 * D
    assert count(network(positions=RotaryPositions)) == plain - C * D
    assert count(network(d_ff=None)) == plain + 2 * (4 * D - FF) * (2 * D + 1)


@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("init_std", [0.02, 0.05])
def test_initialization(init_std: float, tie: bool, feed_forward: FeedForwardFactory) -> None:
    """Radford et al. 2019, section 2.3: what is added to the residual stream is scaled down."""
    model = LanguageModel(
        500,
        d_model=64,
        n_heads=4,
        n_layers=8,
        context_length=100,
        feed_forward=feed_forward,
        tie_output=tie,
        init_std=init_std,
    )
    matrices = 0
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.unique().tolist() == [float(name.endswith("weight"))], name
        elif name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        else:
            matrices += 1
            last = name.endswith(("self_attention.output.weight", "feed_forward.outer.weight"))
            std = init_std / math.sqrt(2 * 8) if last else init_std
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * std, name
    in_a_layer = 5 if feed_forward is SwiGLUFeedForward else 4
    assert matrices == 8 * in_a_layer + (2 if tie else 3)


def test_a_new_model_knows_nothing() -> None:
    model = LanguageModel(500, d_model=32, n_heads=4, n_layers=4, context_length=16, dropout=0.0)
    ids = torch.randint(500, (8, 16))
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), torch.randint(500, (128,)))
    assert loss.item() == pytest.approx(math.log(500), rel=0.01)


def test_tied_embeddings_are_one_parameter_also_after_loading() -> None:
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    assert other.output_weight is other.embedding.tokens.weight
    assert_close(other(IDS), model(IDS))
    assert network(tie_output=False).output_weight is not model.embedding.tokens.weight


@pytest.mark.parametrize("positions", SCHEMES)
def test_every_parameter_learns(positions: type[Positions]) -> None:
    model = network(positions=positions)
    (model(IDS) * torch.randn(3, C, V)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name


# The rest ---------------------------------------------------------------------------------------


def test_forward_is_hidden_times_output_weight() -> None:
    model = network()
    hidden = model.hidden(IDS)
    assert hidden.shape == (3, C, D)
    assert_close(model(IDS), hidden @ model.output_weight.t())


def test_embeddings_are_not_scaled() -> None:
    model = network(positions=NoPositions)
    embedded = model.embedding(IDS, model.positions)
    assert torch.equal(embedded, model.embedding.tokens(IDS))


def test_dropout_acts_in_training_only() -> None:
    model = network(dropout=0.5)
    embedded = model.embedding(IDS, model.positions)
    assert 0.3 < (embedded == 0).float().mean() < 0.7
    assert not torch.equal(model(IDS), model(IDS))
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


def test_attention_dropout_reaches_every_layer() -> None:
    model = network(attention_dropout=0.25)
    assert [layer.self_attention.dropout for layer in model.layers] == [0.25, 0.25]
    assert not torch.equal(model(IDS), model(IDS))


def test_positions_see_one_direction() -> None:
    assert not network(positions=T5RelativePositions).positions.bidirectional


@pytest.mark.parametrize("positions", [None, AlibiPositions])
def test_longer_than_the_context(positions: Any) -> None:
    model = network(positions=positions)
    with pytest.raises(ValueError, match="9 tokens exceeds context_length=8"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_positions_shorter_than_the_context() -> None:
    short = partial(LearnedPositions, max_length=7)
    with pytest.raises(ValueError, match="max_length=7, less than context_length=8"):
        network(positions=short)
    network(positions=partial(LearnedPositions, max_length=9))


def test_width_not_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match="d_model=16 is not divisible by n_heads=3"):
        network(n_heads=3)
