"""The fused kernel against the naive one, and the module against torch.nn.MultiheadAttention."""

import math

import pytest
import torch
from torch import Tensor, nn

from tx_lightning.nn import MultiHeadAttention, RotaryPositions, naive_attention, record_attention
from tx_lightning.nn.attention import fused_attention
from tx_lightning.nn.cache import KeyValueCache
from tx_lightning.nn.masks import causal_mask

B, H, T, S, K = 3, 2, 5, 7, 4

PADDING = torch.arange(S) < torch.tensor([7, 4, 0])[:, None]  # the last row is padding only
BOOLEAN = torch.rand(B, H, T, S, generator=torch.Generator().manual_seed(0)) > 0.4
ADDITIVE = torch.randn(B, H, T, S, generator=torch.Generator().manual_seed(0))
SQUARE = (torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(0)) > 0.4).logical_or(
    torch.eye(T, dtype=torch.bool)
)

CASES: dict[str, tuple[int, Tensor | None, bool]] = {  # keys, mask or score bias, causal
    "no mask": (T, None, False),
    "cross": (S, None, False),
    "causal": (T, None, True),
    "padding": (S, PADDING[:, None, None, :], False),
    "boolean": (S, BOOLEAN, False),
    "additive": (S, ADDITIVE, False),
    "additive padding": (S, ADDITIVE.masked_fill(~PADDING[:, None, None, :], -math.inf), False),
    "causal as a mask": (S, causal_mask(T, S, torch.device("cpu")), False),
    "boolean causal": (T, SQUARE & causal_mask(T, T, torch.device("cpu")), False),
    # The kernels of torch have these not at all, or with another meaning.
    "causal and a mask": (T, SQUARE, True),
    "causal and additive": (T, ADDITIVE[..., :T], True),
    "causal after earlier keys": (S, None, True),
    "causal after earlier keys and additive": (S, ADDITIVE, True),
}


def attend(kernel: str, case: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the result and the gradients of q, k and v."""
    keys, mask, causal = CASES[case]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(B, H, n, K, generator=generator).to(dtype).requires_grad_()
        for n in (T, keys, keys)
    )
    bias: Tensor | None = None
    if mask is not None and mask.is_floating_point():
        bias, mask = mask.to(dtype), None
    if kernel == "fused":
        y = fused_attention(q, k, v, mask, causal, 0.0, bias)
    else:
        y, _ = naive_attention(q, k, v, mask, causal, score_bias=bias)
    factors = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)
    return [y, *torch.autograd.grad((y * factors).sum(), (q, k, v))]


@pytest.mark.parametrize("short", [0, 128], ids=["torch", "batched"])
@pytest.mark.parametrize("case", CASES)
def test_fused_equals_naive(case: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Which kernel: torch's for what is longer.
    monkeypatch.setattr("tx_lightning.nn.attention._SHORT", short)
    fused, naive = (attend(kernel, case, torch.float32) for kernel in ("fused", "naive"))
    torch.testing.assert_close(fused, naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["fused", "naive"])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_close_to_float32(case: str, kernel: str) -> None:
    narrow, wide = attend(kernel, case, torch.bfloat16), attend("naive", case, torch.float32)
    for x, y in zip(narrow, wide, strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.float(), y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kernel", ["fused", "naive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["padding", "additive padding"])
def test_attending_to_nothing_gives_zero(case: str, dtype: torch.dtype, kernel: str) -> None:
    y, *gradients = attend(kernel, case, dtype)
    assert y[2].count_nonzero() == 0
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient[2].count_nonzero() == 0
        assert gradient[0].count_nonzero() > 0


def test_naive_weights_by_hand() -> None:
    q = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]]]])
    k = torch.tensor([[[[math.log(3), 0, 0, 0], [0, 1, 0, 0], [5, 5, 5, 5]]]])
    v = torch.tensor([[[[1.0], [2.0], [7.0]]]])
    y, weights = naive_attention(q, k, v, torch.tensor([True, True, False]))
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.75, 0.25, 0.0]))
    assert y.item() == pytest.approx(1.25)


def reference(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    """Build torch's module with the weights of ours."""
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, bias=ours.bias)
    names = {"input.": "in_proj_", "output.": "out_proj."}
    state = ours.state_dict()
    for name, torch_name in names.items():
        state = {key.replace(name, torch_name, 1): value for key, value in state.items()}
    theirs.load_state_dict(state)
    return theirs


def attention(*, bias: bool = True) -> MultiHeadAttention:
    module = MultiHeadAttention(16, 4, bias=bias)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_equals_torch(bias: bool) -> None:
    ours, x = attention(bias=bias), torch.randn(B, T, 16)
    forbidden = ~causal_mask(T, T, x.device)
    expected, weights = reference(ours)(x, x, x, attn_mask=forbidden, average_attn_weights=False)
    torch.testing.assert_close(ours(x, causal=True), expected, rtol=1e-5, atol=1e-5)
    with record_attention(ours) as maps:
        torch.testing.assert_close(ours(x, causal=True), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps[""], weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_equals_torch(bias: bool) -> None:
    ours, x, memory = attention(bias=bias), torch.randn(2, T, 16), torch.randn(2, S, 16)
    expected, _ = reference(ours)(x, memory, memory, key_padding_mask=~PADDING[:2])
    mask = PADDING[:2, None, None, :]
    torch.testing.assert_close(ours(x, memory, mask=mask), expected, rtol=1e-5, atol=1e-5)
    once = ours.keys_values(memory)
    torch.testing.assert_close(ours(x, once, mask=mask), expected, rtol=1e-5, atol=1e-5)


def test_order_of_keys_does_not_matter_without_positions() -> None:
    module, x, memory = attention(), torch.randn(1, T, 16), torch.randn(1, S, 16)
    torch.testing.assert_close(module(x, memory), module(x, memory.flip(1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * T, [2, 3], [T]])
def test_cache_equals_the_whole_sequence(chunks: list[int]) -> None:
    module, x, cache = attention(), torch.randn(2, T, 16), KeyValueCache()
    positions = RotaryPositions(16, 4, False)
    outputs = []
    with torch.no_grad():
        for part in x.split(chunks, dim=1):
            mask = causal_mask(part.shape[1], cache.length + part.shape[1], x.device)
            outputs.append(module(part, mask=mask, positions=positions, cache=cache))
        whole = module(x, causal=True, positions=positions)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)


def test_xavier_treats_the_projections_as_separate_matrices() -> None:
    module, bound = MultiHeadAttention(64, 4), math.sqrt(6 / 128)
    for matrix in (*module.input.weight.chunk(3), module.output.weight):
        assert 0.99 * bound < matrix.abs().max().item() <= bound
    assert module.input.bias.count_nonzero() == module.output.bias.count_nonzero() == 0


def test_dropout_on_the_weights_only_in_training() -> None:
    module, x = MultiHeadAttention(16, 4, dropout=0.5), torch.randn(1, T, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"d_model=16 .* n_heads=5: .* is 4"):
        MultiHeadAttention(16, 5)


def pair() -> nn.Sequential:
    return nn.Sequential(attention(), nn.Sequential(attention()))


def test_recording_changes_no_output_and_names_the_modules() -> None:
    module, x = pair(), torch.randn(B, T, 16)
    before = module(x)
    with record_attention(module) as maps:
        during = module(x)
    torch.testing.assert_close(during, before, rtol=1e-5, atol=1e-5)
    assert list(maps) == ["0", "1.0"]
    for weights in maps.values():
        assert weights.shape == (B, 4, T, T)
        assert not weights.requires_grad
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, 4, T))


def test_recording_in_training_shows_weights_before_dropout() -> None:
    module, x = MultiHeadAttention(16, 4, dropout=0.5), torch.randn(1, T, 16)
    with record_attention(module) as maps:
        assert not torch.equal(module(x), module(x))
    torch.testing.assert_close(maps[""].sum(-1), torch.ones(1, 4, T))


def test_recording_keeps_the_latest_call_only() -> None:
    module = attention()
    with record_attention(module) as maps:
        module(torch.randn(1, 3, 16))
        module(torch.randn(2, 4, 16))
    assert maps[""].shape == (2, 4, 4, 4)


def test_nothing_is_recorded_outside() -> None:
    module, x = pair(), torch.randn(1, T, 16)
    with record_attention(module) as maps:
        pass
    module(x)
    assert not maps


def test_kernels_come_back_after_an_exception() -> None:
    module = pair()
    attentions = [m for m in module.modules() if isinstance(m, MultiHeadAttention)]
    with pytest.raises(RuntimeError), record_attention(module):
        module(torch.randn(1, T, 3))  # a wrong width
    assert all(m.kernel is fused_attention for m in attentions)


def test_recording_nests() -> None:
    module, x = attention(), torch.randn(1, T, 16)
    with record_attention(module) as outer:
        with record_attention(module) as inner:
            module(x)
        assert list(inner) == [""]
        assert not outer
        module(x)
    torch.testing.assert_close(outer[""], inner[""])
