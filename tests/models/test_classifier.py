"""Classifier and tagger against BERT's, and what must hold of any pooling."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertForTokenClassification

from tests.models import bert
from tx_lightning.models import Classifier, Tagger, TextEncoder
from tx_lightning.models.classifier import Pooling, pool
from tx_lightning.nn import record_attention

V, D, H, FF, MAX, CLASSES = 19, 16, 4, 24, 12, 5
PAD = 0
POOLINGS: list[Pooling] = ["cls", "mean", "max"]

IDS = torch.tensor([[1, 5, 9, 4, 2, 11, 3], [1, 8, 2, 6, 6, 0, 0], [1, 2, 0, 0, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0]])
REAL = IDS != PAD


def encoder(vocab_size: int, **changes: Any) -> TextEncoder:
    settings: dict[str, Any] = {
        "d_model": D,
        "n_heads": H,
        "n_layers": 2,
        "d_ff": FF,
        "max_length": MAX,
        "dropout": 0.0,
    }
    return TextEncoder(vocab_size, **(settings | changes))


def randomized(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))


def classifier(pooling: Pooling = "cls", dropout: float = 0.0, **changes: Any) -> Classifier:
    """A small network whose weights are all random, biases and norms included."""
    build = partial(encoder, **changes)
    model = Classifier(V, CLASSES, encoder=build, pooling=pooling, dropout=dropout)
    randomized(model)
    return model


def tagger(dropout: float = 0.0, **changes: Any) -> Tagger:
    model = Tagger(V, CLASSES, encoder=partial(encoder, **changes), dropout=dropout)
    randomized(model)
    return model


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Equal to other implementations -----------------------------------------------------------------


def test_logits_equal_bert() -> None:
    theirs, ours = BertForSequenceClassification(bert.config(n_labels=CLASSES)), classifier()
    ours.load_state_dict(bert.randomized(theirs))
    expected = theirs(input_ids=IDS, attention_mask=REAL.long(), token_type_ids=SEGMENTS).logits
    assert_close(ours(IDS, SEGMENTS), expected)


def test_tags_equal_bert() -> None:
    theirs, ours = BertForTokenClassification(bert.config(n_labels=CLASSES)), tagger()
    ours.load_state_dict(bert.randomized(theirs))
    expected = theirs(input_ids=IDS, attention_mask=REAL.long(), token_type_ids=SEGMENTS).logits
    assert_close(ours(IDS, SEGMENTS)[REAL], expected[REAL])


# Pooling ----------------------------------------------------------------------------------------


def test_pooling_by_hand() -> None:
    x = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [50.0, 60.0]]])
    real = torch.tensor([[True, True, False]])
    assert pool(x, real, "cls").tolist() == [[1, -4]]
    assert pool(x, real, "mean").tolist() == [[2, -3]]
    assert pool(x, real, "max").tolist() == [[3, -2]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing(pooling: Pooling) -> None:
    model = classifier(pooling)
    together = model(IDS, SEGMENTS)
    assert together.shape == (3, CLASSES)
    wider = model(nn.functional.pad(IDS, (0, 5)), nn.functional.pad(SEGMENTS, (0, 5)))
    assert_close(wider, together)
    for row, real in enumerate(REAL):
        assert_close(model(IDS[row, real][None], SEGMENTS[row, real][None])[0], together[row])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_head_stands_on_the_tanh_of_the_pooled_text(pooling: Pooling) -> None:
    model = classifier(pooling)
    x = model.encoder(IDS)
    rows = [x[row, real] for row, real in enumerate(REAL)]
    reduced = {
        "cls": [row[0] for row in rows],
        "mean": [row.mean(0) for row in rows],
        "max": [row.amax(0) for row in rows],
    }[pooling]
    hidden = torch.tanh(torch.stack(reduced) @ model.pooler.weight.t() + model.pooler.bias)
    assert_close(model(IDS), hidden @ model.head.weight.t() + model.head.bias)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_of_padding_only_gives_no_nan(pooling: Pooling) -> None:
    model, ids = classifier(pooling), IDS.clone()
    ids[1] = PAD
    logits = model(ids)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_an_unknown_pooling() -> None:
    with pytest.raises(ValueError, match="one of cls, mean, max; it is 'sum'"):
        classifier("sum")  # type: ignore[arg-type]


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
    """The counts of the published checkpoints bert-base-uncased and bert-large-uncased."""
    with torch.device("meta"):
        model = Classifier(30_522, 2, encoder=partial(TextEncoder, **settings))  # type: ignore[arg-type]
    assert count(model) - count(model.head) == parameters


def test_the_default_encoder_is_bert_base() -> None:
    with torch.device("meta"):
        model, tags = Classifier(30_522, 3), Tagger(30_522, 9)
    assert count(model) == 109_482_240 + 3 * 769
    assert count(tags) == 109_482_240 - (768 * 768 + 768) + 9 * 769


@pytest.mark.parametrize("init_std", [0.02, 0.05])
@pytest.mark.parametrize("build", [Classifier, Tagger])
def test_initialization(build: type[Classifier] | type[Tagger], init_std: float) -> None:
    model = build(50, 200, encoder=partial(encoder, d_model=64, init_std=init_std))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif not name.startswith("encoder"):
            assert parameter.std().item() == pytest.approx(init_std, rel=0.05), name


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_parameter_learns(pooling: Pooling) -> None:
    model = classifier(pooling)
    (model(IDS, SEGMENTS) * torch.randn(3, CLASSES)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name


def test_pretrained_weights_match_by_name() -> None:
    model, other = classifier("mean"), tagger()
    part = {key: value for key, value in model.state_dict().items() if key.startswith("encoder.")}
    missing, unexpected = other.load_state_dict(part, strict=False)
    assert missing == ["head.weight", "head.bias"]
    assert unexpected == []
    assert_close(other.encoder(IDS), model.encoder(IDS))


# The rest ---------------------------------------------------------------------------------------


def test_tags_are_a_linear_map_of_each_token() -> None:
    model = tagger()
    logits = model(IDS, SEGMENTS)
    assert logits.shape == (3, 7, CLASSES)
    expected = model.encoder(IDS, SEGMENTS) @ model.head.weight.t() + model.head.bias
    assert_close(logits, expected)


@pytest.mark.parametrize("build", [classifier, tagger])
def test_dropout_of_the_head_acts_in_training_only(build: Any) -> None:
    model = build(dropout=0.5)
    assert not torch.equal(model(IDS), model(IDS))
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


def test_recorded_attention() -> None:
    with record_attention(classifier()) as maps:
        assert maps == {}
    model = classifier()
    with record_attention(model) as maps:
        model(IDS)
    assert set(maps) == {"encoder.layers.0.self_attention", "encoder.layers.1.self_attention"}


def test_the_encoder_knows_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="13 tokens exceeds max_length=12"):
        tagger()(torch.ones(1, 13, dtype=torch.long))
