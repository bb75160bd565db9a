"""True = may attend."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tx_lightning.models
import tx_lightning.nn
from tx_lightning.models import EncoderDecoder
from tx_lightning.models.classifier import pool
from tx_lightning.models.encoder_decoder import DecoderState, Memory
from tx_lightning.nn import (
    DecoderLayer,
    EncoderLayer,
    MultiHeadAttention,
    ReLUFeedForward,
    naive_attention,
)
from tx_lightning.nn.attention import _Recorder, fused_attention, short_attention
from tx_lightning.nn.cache import KeyValueCache
from tx_lightning.nn.masks import additive_mask, causal_mask, check_mask, combine, padding_mask

CPU = torch.device("cpu")


def test_padding_mask() -> None:
    mask = padding_mask(torch.tensor([[5, 6, 9], [5, 9, 9], [9, 9, 9]]), pad_id=9)
    assert mask.shape == (3, 1, 1, 3)
    assert mask[:, 0, 0].tolist() == [[True, True, False], [True, False, False], [False] * 3]


def test_causal_mask() -> None:
    assert causal_mask(3, 3, CPU).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_causal_mask_after_earlier_keys() -> None:
    assert causal_mask(2, 4, CPU).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(1, 4, CPU).all()
    assert torch.equal(causal_mask(2, 6, CPU), causal_mask(6, 6, CPU)[-2:])


def test_additive_mask() -> None:
    bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    mask = torch.tensor([[True, False]])
    inf = float("inf")
    assert additive_mask(mask, bias)[0, 0].tolist() == [[1, -inf], [3, -inf]]
    assert additive_mask(None, bias) is bias


def test_additive_mask_broadcasts_batch_and_heads() -> None:
    mask = padding_mask(torch.tensor([[5, 0], [5, 5], [0, 0]]), pad_id=0)  # (3, 1, 1, 2)
    combined = additive_mask(mask, torch.ones(1, 4, 2, 2))
    assert combined.shape == (3, 4, 2, 2)
    assert torch.equal(combined.isfinite(), mask.expand(3, 4, 2, 2))


# What may be passed as a mask --------------------------------------------------------------------


def callables() -> dict[str, Any]:
    """All functions and methods of nn and models that take a mask, by module and name."""
    found = {}
    for package in (tx_lightning.nn, tx_lightning.models):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, value in vars(module).items():
                methods = vars(value) if inspect.isclass(value) else {"": value}
                for method, function in methods.items():
                    if inspect.isfunction(function) and function.__module__ == module.__name__:
                        for parameter in inspect.signature(function).parameters:
                            if "mask" in parameter or parameter == "real":
                                key = f"{info.name}.{name}.{method}".rstrip(".")
                                found[f"{key}({parameter})"] = function
    return found


def layer(kind: type[EncoderLayer] | type[DecoderLayer]) -> Any:
    options: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "pre_norm": True}
    return kind(8, 2, 8, norm=nn.LayerNorm, feed_forward=ReLUFeedForward, **options)


T, Q, X = 3, torch.randn(2, 2, 3, 4), torch.randn(2, 3, 8)


def step(memory_mask: Tensor) -> Tensor:
    memory = NETWORK.decoder.layers[0].cross_attention.keys_values(X)
    return NETWORK.step(
        torch.tensor([1, 1]), DecoderState([KeyValueCache()], [memory], memory_mask)
    )


NETWORK = EncoderDecoder(9, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=8)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "attention.fused_attention(mask)": lambda m: fused_attention(Q, Q, Q, m, False, 0.0),
    "attention.short_attention(mask)": lambda m: short_attention(Q, Q, Q, m, False, 0.0),
    "attention.naive_attention(mask)": lambda m: naive_attention(Q, Q, Q, m),
    "attention._Recorder.__call__(mask)": lambda m: _Recorder("", {})(Q, Q, Q, m, False, 0.0),
    "attention.MultiHeadAttention.forward(mask)": lambda m: MultiHeadAttention(8, 2)(X, mask=m),
    "layers.EncoderLayer.forward(mask)": lambda m: layer(EncoderLayer)(X, mask=m),
    "layers.DecoderLayer.forward(mask)": lambda m: layer(DecoderLayer)(X, X, mask=m),
    "layers.DecoderLayer.forward(memory_mask)": lambda m: layer(DecoderLayer)(X, X, memory_mask=m),
    "masks.check_mask(mask)": check_mask,
    "masks.additive_mask(mask)": lambda m: additive_mask(m, torch.zeros(1, 2, 3, 3)),
    "masks.combine(mask)": lambda m: (combine(m, None, X), combine(m, torch.zeros(1, 2, 3, 3), X)),
    "classifier.pool(real)": lambda m: pool(X, m[:2], "mean"),
    "encoder_decoder.Memory.__init__(mask)": lambda m: NETWORK.decoder(X, Memory(X, m)),
    "encoder_decoder.DecoderState.__init__(memory_mask)": step,
    "encoder_decoder.Encoder.forward(mask)": lambda m: NETWORK.encoder(X, m),
}  # fmt: skip


def test_all_that_take_a_mask_are_here() -> None:
    assert CALLS.keys() == callables().keys()


@pytest.mark.parametrize("name", CALLS)
def test_only_a_boolean_mask_is_taken(name: str) -> None:
    """What tutorials make would be added to the scores, and nothing would be hidden."""
    tutorial = torch.tril(torch.ones(T, T))
    if "step" in name or "DecoderState" in name:
        tutorial = tutorial[:2, None, None]
    CALLS[name](tutorial.bool())
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8):
        with pytest.raises(
            ValueError, match=r"has type torch\.\w+, but a mask is boolean .*\.bool"
        ):
            CALLS[name](tutorial.to(dtype))
    with pytest.raises(ValueError, match=r"\.bool\(\)"):
        CALLS[name](tutorial.to("meta"))  # by its type alone: there are no values


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_a_mask_is_no_score_bias(dtype: torch.dtype) -> None:
    mask = torch.tril(torch.ones(T, T)).to(dtype)
    message = r"score_bias has type torch\.\w+, .*: pass a mask as mask"
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(8, 2)(X, score_bias=mask)
    with pytest.raises(ValueError, match=message):
        fused_attention(Q, Q, Q, None, False, 0.0, mask)
    with pytest.raises(ValueError, match=message):
        naive_attention(Q, Q, Q, score_bias=mask)


def test_a_mask_of_the_wrong_type_is_called_by_its_name() -> None:
    wrong = torch.ones(T, T)
    with pytest.raises(ValueError, match=r"^memory_mask has .* pass memory_mask\.bool\(\)"):
        layer(DecoderLayer)(X, X, memory_mask=wrong)


def test_a_mask_and_a_bias_are_combined_once() -> None:
    mask, bias = causal_mask(T, T, CPU), torch.randn(1, 2, T, T)
    assert combine(mask, None, X) == (mask, None)
    assert combine(None, None, X) == (None, None)
    none, combined = combine(mask, bias, X)
    assert none is None
    assert combined is not None
    assert torch.equal(combined, additive_mask(mask, bias))


@pytest.mark.parametrize(
    ("wide", "autocast", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float64, torch.bfloat16, torch.float64),  # which autocast leaves alone
        (torch.bfloat16, None, torch.bfloat16),
    ],
)
def test_a_bias_has_the_type_of_the_queries(
    wide: torch.dtype, autocast: torch.dtype | None, expected: torch.dtype
) -> None:
    module, x = MultiHeadAttention(8, 2).to(wide), X.to(wide)
    seen = []

    def spy(q: Tensor, *_: Any) -> Tensor:
        seen.append(q.dtype)
        return q

    module.kernel = spy
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        _, bias = combine(None, torch.zeros(1, 2, T, T), x)
        module(x, score_bias=bias)
    assert bias is not None
    assert seen == [bias.dtype] == [expected]
