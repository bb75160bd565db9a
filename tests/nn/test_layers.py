"""The blocks against those of torch.nn with copied weights."""

import pytest
import torch
from torch import Tensor, nn

from tx_lightning.nn import (
    DecoderLayer,
    EncoderLayer,
    GELUFeedForward,
    ReLUFeedForward,
    SwiGLUFeedForward,
)
from tx_lightning.nn.feed_forward import FeedForwardFactory
from tx_lightning.nn.layers import NormFactory, Residual
from tx_lightning.nn.masks import causal_mask

D, H, FF, B, T, S = 16, 4, 24, 3, 5, 7

TARGET = torch.arange(T) < torch.tensor([5, 3, 4])[:, None]
SOURCE = torch.arange(S) < torch.tensor([7, 2, 5])[:, None]

ATTENTION = {
    "in_proj_weight": "input.weight",
    "in_proj_bias": "input.bias",
    "out_proj": "output",
}
ENCODER = {
    "self_attn": "self_attention",
    "linear1": "feed_forward.inner",
    "linear2": "feed_forward.outer",
    "norm1": "attention_residual.norm",
    "norm2": "feed_forward_residual.norm",
} | ATTENTION
DECODER = {
    "self_attn": "self_attention",
    "multihead_attn": "cross_attention",
    "linear1": "feed_forward.inner",
    "linear2": "feed_forward.outer",
    "norm1": "self_residual.norm",
    "norm2": "cross_residual.norm",
    "norm3": "feed_forward_residual.norm",
} | ATTENTION


def encoder_layer(
    *,
    pre_norm: bool = False,
    dropout: float = 0.0,
    norm: NormFactory = nn.LayerNorm,
    feed_forward: FeedForwardFactory = ReLUFeedForward,
) -> EncoderLayer:
    return EncoderLayer(
        D,
        H,
        FF,
        dropout=dropout,
        attention_dropout=0.0,
        pre_norm=pre_norm,
        norm=norm,
        feed_forward=feed_forward,
    )


def decoder_layer(
    *,
    pre_norm: bool = False,
    dropout: float = 0.0,
    norm: NormFactory = nn.LayerNorm,
    feed_forward: FeedForwardFactory = ReLUFeedForward,
) -> DecoderLayer:
    return DecoderLayer(
        D,
        H,
        FF,
        dropout=dropout,
        attention_dropout=0.0,
        pre_norm=pre_norm,
        norm=norm,
        feed_forward=feed_forward,
    )


def copy_weights(theirs: nn.Module, ours: nn.Module, names: dict[str, str]) -> None:
    """Give both the same random weights, biases and norms included."""
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = theirs.state_dict()
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    ours.load_state_dict(state)


def with_gradients(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    factors = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad((y * factors).sum(), inputs)]


@pytest.mark.parametrize(
    ("feed_forward", "activation"), [(ReLUFeedForward, "relu"), (GELUFeedForward, "gelu")]
)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_layer_equals_torch(
    pre_norm: bool, feed_forward: FeedForwardFactory, activation: str
) -> None:
    theirs = nn.TransformerEncoderLayer(
        D, H, FF, dropout=0.0, activation=activation, batch_first=True, norm_first=pre_norm
    )
    ours = encoder_layer(pre_norm=pre_norm, feed_forward=feed_forward)
    copy_weights(theirs, ours, ENCODER)
    x = torch.randn(B, S, D, requires_grad=True)
    torch.testing.assert_close(
        with_gradients(ours(x, mask=SOURCE[:, None, None, :]), x),
        with_gradients(theirs(x, src_key_padding_mask=~SOURCE), x),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("feed_forward", "activation"), [(ReLUFeedForward, "relu"), (GELUFeedForward, "gelu")]
)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_layer_equals_torch(
    pre_norm: bool, feed_forward: FeedForwardFactory, activation: str
) -> None:
    theirs = nn.TransformerDecoderLayer(
        D, H, FF, dropout=0.0, activation=activation, batch_first=True, norm_first=pre_norm
    )
    ours = decoder_layer(pre_norm=pre_norm, feed_forward=feed_forward)
    copy_weights(theirs, ours, DECODER)
    x, memory = (torch.randn(B, n, D, requires_grad=True) for n in (T, S))
    causal = causal_mask(T, T, x.device)
    mask = causal & TARGET[:, None, None, :]
    expected = theirs(
        x,
        memory,
        tgt_mask=~causal,
        tgt_key_padding_mask=~TARGET,
        memory_key_padding_mask=~SOURCE,
    )
    output = ours(x, memory, mask=mask, memory_mask=SOURCE[:, None, None, :])
    torch.testing.assert_close(
        with_gradients(output, x, memory),
        with_gradients(expected, x, memory),
        rtol=1e-5,
        atol=1e-5,
    )


def test_causal_flag_equals_causal_mask() -> None:
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)
    mask = causal_mask(T, T, x.device)
    encoder, decoder = encoder_layer(), decoder_layer()
    torch.testing.assert_close(encoder(x, causal=True), encoder(x, mask=mask))
    torch.testing.assert_close(decoder(x, memory, causal=True), decoder(x, memory, mask=mask))


@pytest.mark.parametrize("feed_forward", [ReLUFeedForward, GELUFeedForward, SwiGLUFeedForward])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_every_combination_trains_all_its_parameters(
    pre_norm: bool, norm: NormFactory, feed_forward: FeedForwardFactory
) -> None:
    encoder = encoder_layer(pre_norm=pre_norm, norm=norm, feed_forward=feed_forward)
    decoder = decoder_layer(pre_norm=pre_norm, norm=norm, feed_forward=feed_forward)
    y = decoder(torch.randn(B, T, D), encoder(torch.randn(B, S, D)), causal=True)
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name


def test_attention_without_biases() -> None:
    layer = EncoderLayer(
        D,
        H,
        FF,
        dropout=0.0,
        attention_dropout=0.0,
        pre_norm=True,
        norm=nn.LayerNorm,
        feed_forward=ReLUFeedForward,
        bias=False,
    )
    missing, unexpected = layer.load_state_dict(encoder_layer().state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["self_attention.input.bias", "self_attention.output.bias"]


def test_residual_equations() -> None:
    x = torch.randn(B, T, D)
    for pre_norm in (False, True):
        residual = Residual(D, norm=nn.RMSNorm, dropout=0.0, pre_norm=pre_norm)
        norm = residual.norm
        expected = x + norm(x).exp() if pre_norm else norm(x + x.exp())
        torch.testing.assert_close(residual(x, torch.exp), expected)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_dropout_is_on_the_output_of_the_sublayer_only(pre_norm: bool) -> None:
    residual = Residual(D, norm=nn.Identity, dropout=0.5, pre_norm=pre_norm)
    x = torch.full((B, T, D), 3.0)
    assert residual(x, torch.ones_like).unique().tolist() == [3, 5]
    assert residual.eval()(x, torch.ones_like).unique().tolist() == [4]


@pytest.mark.parametrize("layer", [encoder_layer, decoder_layer])
def test_dropout_is_off_in_evaluation(layer: type[nn.Module]) -> None:
    module = layer(dropout=0.5)
    inputs = [torch.randn(B, T, D)] * (1 if layer is encoder_layer else 2)
    assert not torch.equal(module(*inputs), module(*inputs))
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))


@pytest.mark.parametrize(
    "norm",
    [
        lambda d: nn.CosineSimilarity(),
        lambda d: nn.GroupNorm(2, 8),
        lambda d: nn.ConstantPad1d(1, 0.0),
        lambda d: nn.Upsample(scale_factor=2),
        lambda d: nn.Linear(d, d + 1),
        lambda d: nn.LSTM(d, d),
    ],
)
def test_what_is_no_norm_is_refused(norm: NormFactory) -> None:
    with pytest.raises(ValueError, match=r"^norm: \w+ (is no norm of|makes) \("):
        Residual(12, norm=norm, dropout=0.0, pre_norm=True)
