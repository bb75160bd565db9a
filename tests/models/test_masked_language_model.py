"""The masked language model against BERT's, and what its loss needs."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForMaskedLM

from tests.models import bert
from tx_lightning.losses import linear_cross_entropy
from tx_lightning.models import Classifier, MaskedLanguageModel, TextEncoder
from tx_lightning.nn import record_attention
from tx_lightning.nn.layers import NormFactory

V, D, H, FF, MAX = 19, 16, 4, 24, 12
PAD = 0

IDS = torch.tensor([[1, 5, 9, 4, 2, 11, 3], [1, 8, 2, 6, 6, 0, 0], [1, 2, 0, 0, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0]])
REAL = IDS != PAD


def encoder(vocab_size: int, norm: NormFactory = nn.LayerNorm) -> TextEncoder:
    return TextEncoder(
        vocab_size,
        d_model=D,
        n_heads=H,
        n_layers=2,
        d_ff=FF,
        max_length=MAX,
        dropout=0.0,
        norm=norm,
    )


def network(**changes: Any) -> MaskedLanguageModel:
    """A small network without dropout whose weights are all random, biases and norms included."""
    model = MaskedLanguageModel(V, encoder=encoder, **changes)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_logits_equal_bert(eps: float) -> None:
    theirs = BertForMaskedLM(bert.config(eps=eps))
    norm = partial(nn.LayerNorm, eps=eps)
    ours = MaskedLanguageModel(V, encoder=partial(encoder, norm=norm), norm=norm)
    ours.load_state_dict(bert.randomized(theirs))
    expected = theirs(input_ids=IDS, attention_mask=REAL.long(), token_type_ids=SEGMENTS).logits
    assert_close(ours(IDS, SEGMENTS)[REAL], expected[REAL])


def test_forward_is_hidden_times_output_weight_plus_bias() -> None:
    model = network()
    hidden = model.hidden(IDS, SEGMENTS)
    assert hidden.shape == (3, 7, D)
    assert_close(model(IDS, SEGMENTS), hidden @ model.output_weight.t() + model.output_bias)


def test_the_fused_loss_is_that_of_the_logits() -> None:
    """Of the masked places only, with every gradient."""
    model, masked = network(), torch.zeros_like(REAL)
    masked[0, 2] = masked[0, 5] = masked[1, 3] = True
    gradients = []
    for fused in (True, False):
        model.zero_grad()
        if fused:
            loss = linear_cross_entropy(
                model.hidden(IDS)[masked],
                model.output_weight,
                IDS[masked],
                0.1,
                bias=model.output_bias,
            ).loss
        else:
            loss = F.cross_entropy(
                model(IDS)[masked], IDS[masked], label_smoothing=0.1, reduction="sum"
            )
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing() -> None:
    model = network()
    together = model(IDS)
    assert_close(model(nn.functional.pad(IDS, (0, 5)))[:, :7], together)
    for row, real in enumerate(REAL):
        assert_close(model(IDS[row, real][None])[0], together[row, real])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_size_of_bert() -> None:
    """BERT base with the head of its masked language model, the embeddings counted once."""
    with torch.device("meta"):
        model = MaskedLanguageModel(30_522)
    encoder = 109_482_240 - (768 * 768 + 768)
    assert count(model) == encoder + (768 * 768 + 768) + 2 * 768 + 30_522 == 109_514_298


def test_the_projection_is_the_embedding_table_also_after_loading() -> None:
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    assert other.output_weight is other.encoder.embedding.tokens.weight
    assert_close(other(IDS), model(IDS))


@pytest.mark.parametrize("init_std", [0.02, 0.05])
def test_initialization(init_std: float) -> None:
    encoder = partial(TextEncoder, d_model=64, n_heads=4, n_layers=1, pad_id=3, init_std=init_std)
    model = MaskedLanguageModel(500, encoder=encoder)
    assert model.transform.weight.std().item() == pytest.approx(init_std, rel=0.05)
    assert model.output_weight.std().item() == pytest.approx(init_std, rel=0.05)
    assert model.output_weight[3].count_nonzero() == 0
    assert model.transform.bias.count_nonzero() == model.output_bias.count_nonzero() == 0


def test_every_parameter_learns() -> None:
    model = network()
    (model(IDS, SEGMENTS) * torch.randn(3, 7, V)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name


def test_a_classifier_begins_with_its_encoder() -> None:
    model = network()
    other = Classifier(V, 2, encoder=encoder)
    part = {key: value for key, value in model.state_dict().items() if key.startswith("encoder.")}
    missing, unexpected = other.load_state_dict(part, strict=False)
    assert not [key for key in missing if key.startswith("encoder.")]
    assert unexpected == []
    assert_close(other.encoder(IDS, SEGMENTS), model.encoder(IDS, SEGMENTS))


def test_recorded_attention() -> None:
    model = network()
    with record_attention(model) as maps:
        model(IDS)
    assert set(maps) == {"encoder.layers.0.self_attention", "encoder.layers.1.self_attention"}


def test_longer_than_the_maximum() -> None:
    with pytest.raises(ValueError, match="13 tokens exceeds max_length=12"):
        network()(torch.ones(1, 13, dtype=torch.long))
