"""The text encoder against BERT and torch.nn, and what must hold of any of it."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertModel

from tests.models import bert
from tx_lightning.models import TextEncoder
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

V, D, H, FF, MAX = 19, 16, 4, 24, 12
PAD = 0

SCHEMES = [
    NoPositions,
    SinusoidalPositions,
    LearnedPositions,
    RotaryPositions,
    AlibiPositions,
    T5RelativePositions,
]
FEED_FORWARDS = [ReLUFeedForward, GELUFeedForward, SwishFeedForward, SwiGLUFeedForward]

IDS = torch.tensor([[1, 5, 9, 4, 2, 11, 3], [1, 8, 2, 6, 6, 0, 0], [1, 2, 0, 0, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0]])
REAL = IDS != PAD


def network(**changes: Any) -> TextEncoder:
    """A small network without dropout whose weights are all random, biases and norms included."""
    settings: dict[str, Any] = {
        "d_model": D,
        "n_heads": H,
        "n_layers": 2,
        "d_ff": FF,
        "max_length": MAX,
        "dropout": 0.0,
    }
    model = TextEncoder(V, **(settings | changes))
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Equal to other implementations -----------------------------------------------------------------


@pytest.mark.parametrize("segments", [SEGMENTS, None])
@pytest.mark.parametrize(
    ("activation", "feed_forward"),
    [("gelu", GELUFeedForward), ("relu", ReLUFeedForward)],
)
def test_hidden_states_equal_bert(
    activation: str, feed_forward: FeedForwardFactory, segments: Tensor | None
) -> None:
    theirs = BertModel(bert.config(activation, eps=1e-12), add_pooling_layer=False)
    state = bert.randomized(theirs)
    ours = network(norm=partial(nn.LayerNorm, eps=1e-12), feed_forward=feed_forward)
    ours.load_state_dict(state)
    expected = theirs(
        input_ids=IDS, attention_mask=REAL.long(), token_type_ids=segments
    ).last_hidden_state
    assert_close(ours(IDS, segments)[REAL], expected[REAL])


@pytest.mark.parametrize("pre_norm", [False, True])
def test_hidden_states_equal_torch_transformer(pre_norm: bool) -> None:
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(
            D, H, FF, 0.0, activation="gelu", batch_first=True, norm_first=pre_norm
        ),
        num_layers=2,
        norm=nn.LayerNorm(D) if pre_norm else None,
        enable_nested_tensor=False,
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = network(pre_norm=pre_norm, positions=NoPositions, embedding_norm=False, n_segments=0)
    names = {
        "self_attn.in_proj_": "self_attention.input.",
        "self_attn.out_proj": "self_attention.output",
        "linear1": "feed_forward.inner",
        "linear2": "feed_forward.outer",
        "norm1": "attention_residual.norm",
        "norm2": "feed_forward_residual.norm",
    }
    state = {"embedding.tokens.weight": ours.embedding.tokens.weight}
    for key, value in theirs.state_dict().items():
        key = f"final_{key}" if key.startswith("norm.") else key
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    ours.load_state_dict(state)
    expected = theirs(ours.embedding.tokens(IDS), src_key_padding_mask=~REAL)
    assert_close(ours(IDS)[REAL], expected[REAL])


# What attention may see -------------------------------------------------------------------------


@pytest.mark.parametrize("positions", SCHEMES)
def test_padding_changes_nothing(positions: type[Positions]) -> None:
    model = network(positions=positions)
    together = model(IDS, SEGMENTS)
    wider = model(nn.functional.pad(IDS, (0, 4)), nn.functional.pad(SEGMENTS, (0, 4)))
    assert_close(wider[:, : IDS.shape[1]], together)
    for row, real in enumerate(REAL):
        alone = model(IDS[row, real][None], SEGMENTS[row, real][None])[0]
        assert_close(alone, together[row, real])


@pytest.mark.parametrize("positions", SCHEMES)
def test_what_is_under_the_padding_changes_nothing(positions: type[Positions]) -> None:
    model = network(positions=positions)
    before = model(IDS, SEGMENTS)[REAL]
    model.embedding.tokens.weight.data[PAD] = 100
    assert_close(model(IDS, SEGMENTS.masked_fill(~REAL, 1))[REAL], before)


@pytest.mark.parametrize("positions", SCHEMES)
def test_every_token_sees_every_other_and_its_place(positions: type[Positions]) -> None:
    model = network(positions=positions, n_layers=1)
    ids = IDS[:1]
    before = model(ids)[0]
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, t] = 17
        assert ((model(changed)[0] - before).abs().amax(dim=1) > 1e-4).all()
    swapped = model(ids[:, [0, 2, 1, 3, 4, 5, 6]])[0, 0]
    assert torch.allclose(swapped, before[0], atol=1e-5) == (positions is NoPositions)


@pytest.mark.parametrize("positions", SCHEMES)
def test_a_row_of_padding_only_gives_no_nan(positions: type[Positions]) -> None:
    model, ids = network(positions=positions), IDS.clone()
    ids[1] = PAD
    hidden = model(ids)
    hidden.square().sum().backward()
    assert hidden.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("positions", SCHEMES)
def test_bfloat16_is_close_to_float32(positions: type[Positions], autocast: bool) -> None:
    model = network(positions=positions)
    wide = model(IDS, SEGMENTS)[REAL]
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        narrow = model(IDS, SEGMENTS)[REAL]
    assert (narrow - wide).norm() < 0.06 * wide.norm()


def test_pad_id() -> None:
    model = network(pad_id=18)
    changed = IDS.clone()
    changed[1, 6] = 7  # 0 is a token here
    assert not torch.allclose(model(changed)[1, 0], model(IDS)[1, 0], atol=1e-4)
    changed[1, 6] = 18
    assert_close(model(changed)[1, :6], model(IDS[1:2, :6])[0])


# Segments ---------------------------------------------------------------------------------------


def test_segments_matter_and_are_0_when_not_given() -> None:
    model = network()
    assert_close(model(IDS), model(IDS, torch.zeros_like(IDS)))
    assert not torch.allclose(model(IDS, SEGMENTS)[:, 0], model(IDS)[:, 0], atol=1e-3)


def test_segments_without_a_table() -> None:
    model = network(n_segments=0)
    assert model(IDS).shape == (3, 7, D)
    with pytest.raises(ValueError, match="n_segments is 0"):
        model(IDS, SEGMENTS)


# Attention maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", SCHEMES)
def test_recorded_attention(positions: type[Positions]) -> None:
    model = nn.ModuleDict({"encoder": network(positions=positions)})
    before = model["encoder"](IDS)
    with record_attention(model) as maps:
        assert_close(model["encoder"](IDS), before)
    assert set(maps) == {"encoder.layers.0.self_attention", "encoder.layers.1.self_attention"}
    for weights in maps.values():
        assert weights.shape == (3, H, 7, 7)
        assert_close(weights.sum(-1), torch.ones(3, H, 7))
        assert weights.masked_select(~REAL[:, None, None]).count_nonzero() == 0


# Parameters -------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({}, 109_482_240),
        ({"d_model": 1024, "n_heads": 16, "n_layers": 24}, 335_141_888),
    ],
    ids=["base", "large"],
)
def test_the_sizes_of_bert(settings: dict[str, int], parameters: int) -> None:
    """The counts of the published checkpoints, less their pooler; see the classifier's test."""
    with torch.device("meta"):
        model = TextEncoder(30_522, **settings)  # type: ignore[arg-type]
    pooler = model.d_model**2 + model.d_model
    assert count(model) == parameters - pooler
    assert model.vocab_size == 30_522
    assert model.max_length == 512


def test_options_change_the_parameters_as_they_should() -> None:
    plain = count(network())
    assert count(network(pre_norm=True)) == plain + 2 * D
    assert count(network(embedding_norm=False)) == plain - 2 * D
    assert count(network(n_segments=0)) == plain - 2 * D
    assert count(network(n_segments=5)) == plain + 3 * D
    assert count(network(positions=RotaryPositions)) == plain - MAX * D
    assert count(network(d_ff=None)) == plain + 2 * (4 * D - FF) * (2 * D + 1)


@pytest.mark.parametrize("init_std", [0.02, 0.05])
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_initialization(feed_forward: FeedForwardFactory, init_std: float) -> None:
    """Devlin et al.'s code: normal with one standard deviation, and nothing under the padding."""
    model = TextEncoder(
        500,
        d_model=64,
        n_heads=4,
        n_layers=2,
        n_segments=40,
        pad_id=3,
        feed_forward=feed_forward,
        init_std=init_std,
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.unique().tolist() == [float(name.endswith("weight"))], name
        elif name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        else:
            assert parameter.std().item() == pytest.approx(init_std, rel=0.05), name
    assert model.embedding.tokens.weight[3].count_nonzero() == 0
    assert model.embedding.tokens.weight[0].count_nonzero() == 64


@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_every_parameter_learns(
    pre_norm: bool, norm: NormFactory, feed_forward: FeedForwardFactory
) -> None:
    model = network(pre_norm=pre_norm, norm=norm, feed_forward=feed_forward)
    (model(IDS, SEGMENTS) * torch.randn(3, 7, D)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name
    grad = model.embedding.tokens.weight.grad
    assert grad is not None
    assert grad[PAD].count_nonzero() == 0


# The rest ---------------------------------------------------------------------------------------


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


def test_positions_see_both_directions() -> None:
    assert network(positions=T5RelativePositions).positions.bidirectional


@pytest.mark.parametrize("positions", [None, AlibiPositions])
def test_longer_than_the_maximum(positions: Any) -> None:
    with pytest.raises(ValueError, match="13 tokens exceeds max_length=12"):
        network(positions=positions)(torch.ones(1, 13, dtype=torch.long))


def test_positions_shorter_than_the_maximum() -> None:
    with pytest.raises(ValueError, match="max_length=11, less than max_length=12"):
        network(positions=partial(LearnedPositions, max_length=11))
    network(positions=partial(LearnedPositions, max_length=13))


def test_width_not_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match="d_model=16 is not divisible by n_heads=3"):
        network(n_heads=3)


def test_token_dropout_drops_whole_tokens_in_training() -> None:
    torch.manual_seed(0)
    model = TextEncoder(
        50, d_model=8, n_heads=2, n_layers=1, dropout=0.0, embedding_norm=False, token_dropout=0.25
    )
    ids = torch.randint(1, 50, (100, 40))
    segments = model.embedding.segments
    assert segments is not None
    rest = model.positions.embed(torch.zeros(100, 40, 8), 0) + segments.weight[0]
    tokens = model.embedding.tokens(ids)
    assert_close(model.eval().embedding(ids, model.positions) - rest, tokens)
    found = model.train().embedding(ids, model.positions) - rest
    dropped = found.abs().amax(dim=-1) < 1e-6
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert_close(found[~dropped], tokens[~dropped] / 0.75)
