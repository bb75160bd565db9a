"""Position schemes against closed forms, the papers' published values and other implementations."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from tx_lightning.nn import (
    AlibiPositions,
    LearnedPositions,
    NoPositions,
    Positions,
    RotaryPositions,
    SinusoidalPositions,
    T5RelativePositions,
    naive_attention,
)

SCHEMES = [
    NoPositions,
    SinusoidalPositions,
    LearnedPositions,
    RotaryPositions,
    AlibiPositions,
    T5RelativePositions,
]


def test_no_positions_do_nothing() -> None:
    scheme, x, q = NoPositions(8, 2, True), torch.randn(1, 3, 8), torch.randn(1, 2, 3, 4)
    assert scheme.embed(x) is x
    assert scheme.rotate(q) is q
    assert scheme.bias(3, 3) is None


def test_sinusoids_by_hand() -> None:
    table = SinusoidalPositions(6, 2, True).embed(torch.zeros(1, 60, 6))[0]
    for position in (0, 1, 7, 59):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(
                table[position, 2 * i : 2 * i + 2], expected, atol=1e-5, rtol=0
            )


def test_sinusoids_of_odd_width() -> None:
    odd = SinusoidalPositions(7, 1, True).embed(torch.zeros(1, 9, 7))[0]
    assert odd.shape == (9, 7)
    assert odd[0].tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_sinusoids_in_halves() -> None:
    """All sines, then all cosines: the same columns in another order."""
    x = torch.zeros(1, 60, 8)
    interleaved = SinusoidalPositions(8, 2, True).embed(x)
    halves = SinusoidalPositions(8, 2, True, layout="halves").embed(x)
    assert torch.equal(halves, interleaved[..., [0, 2, 4, 6, 1, 3, 5, 7]])
    odd = SinusoidalPositions(7, 1, True, layout="halves").embed(x[..., :7])[0]
    assert odd[0].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_sinusoids_in_halves_equal_marian() -> None:
    for width in (8, 7):
        theirs = MarianSinusoidalPositionalEmbedding(60, width)
        ours = SinusoidalPositions(width, 1, True, layout="halves").embed(torch.zeros(1, 60, width))
        torch.testing.assert_close(ours[0], theirs.create_weight(), rtol=0, atol=1e-5)


def test_an_unknown_layout_of_sinusoids() -> None:
    with pytest.raises(ValueError, match="interleaved or halves; it is 'mixed'"):
        SinusoidalPositions(8, 2, True, layout="mixed")  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_learned_positions_have_a_longest_length(scheme: type[Positions]) -> None:
    assert scheme(8, 2, True).max_length == (1024 if scheme is LearnedPositions else None)
    assert LearnedPositions(8, 2, True, max_length=5).max_length == 5


def test_sinusoids_have_no_longest_length() -> None:
    scheme = SinusoidalPositions(8, 2, True)
    short = scheme.embed(torch.zeros(1, 5, 8))
    long = scheme.embed(torch.zeros(1, 3000, 8))
    assert torch.equal(long[:, :5], short)
    assert long.abs().max() <= 1
    assert not scheme.state_dict()


def test_learned_positions_are_the_rows_of_their_table() -> None:
    scheme, x = LearnedPositions(8, 2, True, max_length=5), torch.randn(2, 3, 8)
    assert torch.equal(scheme.embed(x, start=2), x + scheme.table[2:5])


@pytest.mark.parametrize(("length", "start"), [(6, 0), (1, 5)])
def test_learned_positions_end(length: int, start: int) -> None:
    scheme = LearnedPositions(8, 2, True, max_length=5)
    scheme.embed(torch.zeros(1, 5, 8))
    with pytest.raises(ValueError, match="6 tokens exceeds max_length=5"):
        scheme.embed(torch.zeros(1, length, 8), start)


def test_rotary_is_complex_multiplication() -> None:
    x = torch.randn(2, 3, 300, 8, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.arange(300.0, dtype=torch.float64)[:, None] * 10000 ** (-torch.arange(4.0) / 4)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    ours = RotaryPositions(24, 3, True).rotate(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)  # angles are float32


def test_rotary_scores_depend_on_the_distance_only() -> None:
    scheme = RotaryPositions(16, 2, True)
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)

    def score(query: int, key: int) -> Tensor:
        return (scheme.rotate(q, query) * scheme.rotate(k, key)).sum(-1)

    for shift in (1, 10, 200):
        torch.testing.assert_close(score(7, 3), score(7 + shift, 3 + shift), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-3)
    torch.testing.assert_close(score(5, 5), (q * k).sum(-1))


def test_rotary_keeps_lengths_and_the_first_position() -> None:
    x = torch.randn(1, 2, 20, 8)
    y = RotaryPositions(16, 2, True).rotate(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, :, 0], x[:, :, 0])


def test_rotary_base() -> None:
    y = RotaryPositions(8, 2, True, base=9.0).rotate(
        torch.tensor([[[[0.0, 1.0, 0.0, 0.0]]]]), start=2
    )
    expected = torch.tensor([[[[0, math.cos(2 / 3), 0, math.sin(2 / 3)]]]])
    torch.testing.assert_close(y, expected)


def test_rotary_needs_an_even_head_width() -> None:
    with pytest.raises(ValueError, match="d_model=12 / n_heads=4 is 3"):
        RotaryPositions(12, 4, True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inference_first_and_training_afterwards(scheme: type[Positions]) -> None:
    positions = scheme(8, 2, True)
    x, q = torch.randn(1, 3, 8, requires_grad=True), torch.randn(1, 2, 3, 4, requires_grad=True)
    with torch.inference_mode():
        positions.embed(x)
        positions.rotate(q)
        positions.bias(3, 3)
    outputs = [positions.embed(x), positions.rotate(q)]
    bias = positions.bias(3, 3)
    sum(
        (y.square().sum() for y in outputs), torch.zeros(()) if bias is None else bias.sum()
    ).backward()
    assert x.grad is not None
    assert q.grad is not None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_start_continues_the_sequence(scheme: type[Positions]) -> None:
    positions, x, q = scheme(8, 2, False), torch.randn(2, 9, 8), torch.randn(2, 2, 9, 4)
    torch.testing.assert_close(positions.embed(x[:, 4:], 4), positions.embed(x)[:, 4:])
    torch.testing.assert_close(positions.rotate(q[:, :, 4:], 4), positions.rotate(q)[:, :, 4:])
    bias, newest = positions.bias(9, 9), positions.bias(5, 9)
    if bias is not None and newest is not None:
        torch.testing.assert_close(newest, bias[:, :, 4:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16_stays_bfloat16(scheme: type[Positions]) -> None:
    positions = scheme(8, 2, True).bfloat16()
    assert positions.embed(torch.randn(1, 3, 8).bfloat16()).dtype == torch.bfloat16
    assert positions.rotate(torch.randn(1, 2, 3, 4).bfloat16()).dtype == torch.bfloat16


def test_alibi_slopes_of_the_paper() -> None:
    """Press et al. 2022, section 3: 1/2, 1/4, ..., 1/256 for 8 heads; a factor 2^-1/2 for 16."""
    assert AlibiPositions(64, 8, False).slopes.tolist() == [2.0**-i for i in range(1, 9)]
    expected = torch.tensor([2 ** (-i / 2) for i in range(1, 17)])
    torch.testing.assert_close(AlibiPositions(64, 16, False).slopes, expected)


def test_alibi_slopes_between_powers_of_two() -> None:
    """As in the authors' code: those of the power below, then every other one of its double."""
    eight, sixteen = (AlibiPositions(48, n, False).slopes.tolist() for n in (8, 16))
    assert AlibiPositions(48, 12, False).slopes.tolist() == pytest.approx(eight + sixteen[0:8:2])
    assert AlibiPositions(6, 3, False).slopes.tolist() == pytest.approx([2**-4, 2**-8, 2**-2])
    assert AlibiPositions(6, 1, False).slopes.tolist() == [2**-8]


def test_alibi_bias_by_hand() -> None:
    bias = AlibiPositions(16, 2, True).bias(2, 4)  # queries at positions 2 and 3
    distances = torch.tensor([[2, 1, 0, 1], [3, 2, 1, 0]])
    slopes = torch.tensor([2**-4, 2**-8])
    torch.testing.assert_close(bias, -(slopes[:, None, None] * distances)[None])
    scheme = AlibiPositions(16, 2, True)
    assert not list(scheme.parameters())
    assert not scheme.state_dict()


def test_alibi_prefers_the_near() -> None:
    q = k = torch.ones(1, 2, 6, 4)
    bias = AlibiPositions(8, 2, False).bias(6, 6)
    _, weights = naive_attention(q, k, torch.randn(1, 2, 6, 4), causal=True, score_bias=bias)
    last = weights[0, :, -1]
    assert (last.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (16, 64), (8, 20), (64, 500)])
def test_t5_buckets(bidirectional: bool, n_buckets: int, max_distance: int) -> None:
    scheme = T5RelativePositions(16, 2, bidirectional, n_buckets, max_distance)
    relative = torch.arange(-700, 701)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, n_buckets, max_distance)
    assert torch.equal(scheme._buckets(relative), theirs)


def test_t5_bias_is_a_row_of_the_table_per_distance() -> None:
    scheme = T5RelativePositions(16, 2, True)
    bias = scheme.bias(2, 4)  # queries at positions 2 and 3
    assert bias.shape == (1, 2, 2, 4)
    assert torch.equal(bias[0, :, 0, 0], scheme.table[2])  # two to the left
    assert torch.equal(bias[0, :, 0, 3], scheme.table[16 + 1])  # one to the right
    assert torch.equal(bias[0, :, 1, 2], scheme.table[1])
    bias.sum().backward()
    assert scheme.table.grad is not None
    assert scheme.table.grad.sum() == bias.numel()
