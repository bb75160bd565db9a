"""Positions and tokens start at comparable size, whatever the scheme and the network."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tx_lightning.models
from tx_lightning.models import (
    Classifier,
    EncoderDecoder,
    LanguageModel,
    MaskedLanguageModel,
    Tagger,
    TextEncoder,
)
from tx_lightning.models.embeddings import Embedding
from tx_lightning.nn import LearnedPositions, Positions, SinusoidalPositions
from tx_lightning.nn.layers import LayeredNetwork
from tx_lightning.nn.positions import sinusoids

V, D = 200, 64
STACK: dict[str, Any] = {"d_model": D, "n_heads": 4, "d_ff": 8}
Scheme = Callable[[int, int, bool], Positions]


def subclasses(kind: type[Any]) -> list[type[Any]]:
    """A class of this package and all below it."""
    found = [kind] if kind.__module__.startswith("tx_lightning.") else []
    return found + [below for child in kind.__subclasses__() for below in subclasses(child)]


SCHEMES = subclasses(Positions)
STDS = [0.005, 0.02, 0.05, 0.3]


def text_encoders(scheme: Scheme) -> Iterator[TextEncoder]:
    for std in STDS:
        for norm in (True, False):
            yield TextEncoder(
                V, **STACK, n_layers=1, positions=scheme, init_std=std, embedding_norm=norm
            )


def holding(encoder: TextEncoder) -> Callable[[int], TextEncoder]:
    return lambda vocab_size: encoder


def encoder_decoders(scheme: Scheme) -> Iterator[EncoderDecoder]:
    for scale in (True, False):
        for norm in (None, nn.LayerNorm):
            for share in (True, False):
                yield EncoderDecoder(
                    V,
                    **STACK,
                    n_encoder_layers=1,
                    n_decoder_layers=1,
                    positions=scheme,
                    scale_embeddings=scale,
                    embedding_norm=norm,
                    share_embeddings=share,
                )


# The networks of each class, over all options that decide how large something starts.
NETWORKS: dict[type[nn.Module], Callable[[Scheme], Iterator[nn.Module]]] = {
    EncoderDecoder: encoder_decoders,
    LanguageModel: lambda scheme: (
        LanguageModel(V, **STACK, n_layers=1, positions=scheme, init_std=std) for std in STDS
    ),
    TextEncoder: text_encoders,
    Classifier: lambda scheme: (
        Classifier(V, 2, encoder=holding(encoder)) for encoder in text_encoders(scheme)
    ),
    Tagger: lambda scheme: (
        Tagger(V, 2, encoder=holding(encoder)) for encoder in text_encoders(scheme)
    ),
    MaskedLanguageModel: lambda scheme: (
        MaskedLanguageModel(V, encoder=holding(encoder)) for encoder in text_encoders(scheme)
    ),
}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def added(network: nn.Module) -> Iterator[tuple[float, float]]:
    """The size of tokens, and of what positions add, of each stack of a network."""
    modules = list(network.modules())
    embeddings = [module for module in modules if isinstance(module, Embedding)]
    schemes = [module for module in modules if isinstance(module, Positions)]
    assert len(embeddings) == len(schemes) > 0
    for embedding, scheme in zip(embeddings, schemes, strict=True):
        ids = torch.arange(1, V)[None, :50]  # 0 is padding
        tokens = embedding.tokens(ids) * embedding.scale
        yield rms(tokens), rms(scheme.embed(torch.zeros_like(tokens)))


def test_all_networks_are_here() -> None:
    exported = {vars(tx_lightning.models)[name] for name in tx_lightning.models.__all__}
    networks = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert NETWORKS.keys() == networks == {*subclasses(LayeredNetwork)} - {LayeredNetwork}
    assert len(SCHEMES) >= 6


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_positions_and_tokens_start_at_comparable_size(
    scheme: type[Positions], network: type[nn.Module]
) -> None:
    adds = scheme.embed is not Positions.embed
    for built in NETWORKS[network](scheme):
        for tokens, positions in added(built):
            assert tokens > 0
            assert (1 / 3 < positions / tokens < 3) if adds else positions == 0


def build(network: type[nn.Module], scheme: Scheme | None) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {} if scheme is None else {"positions": scheme}
    if network is EncoderDecoder:
        return EncoderDecoder(V, **STACK, n_encoder_layers=1, n_decoder_layers=1, **options)
    encoder = partial(TextEncoder, **STACK, n_layers=1, **options)
    if network in (Classifier, Tagger):
        return network(V, 2, encoder=encoder)
    if network is MaskedLanguageModel:
        return MaskedLanguageModel(V, encoder=encoder)
    return network(V, **STACK, n_layers=1, **options)


@pytest.mark.parametrize("network", NETWORKS)
def test_defaults_start_as_published_to_the_last_bit(
    network: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2, BERT, and the network of 2017 with its sinusoids, which are as large as 1."""
    ours = build(network, None)
    for scheme in SCHEMES:
        monkeypatch.setattr(scheme, "match_tokens", lambda self, rms: None)
    published = build(network, None)
    states = ours.state_dict(), published.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    for module in ours.modules():
        if isinstance(module, LearnedPositions):
            assert rms(module.table) == pytest.approx(0.02, rel=0.02)
        if isinstance(module, SinusoidalPositions):
            table = sinusoids(torch.arange(9.0), D)
            assert torch.equal(module.embed(torch.zeros(1, 9, D))[0], table)


@pytest.mark.parametrize("std", STDS)
def test_learned_positions_are_rescaled_and_not_drawn_anew(std: float) -> None:
    torch.manual_seed(0)
    usual = LanguageModel(V, **STACK, n_layers=1)
    torch.manual_seed(0)
    other = LanguageModel(V, **STACK, n_layers=1, init_std=std)
    tables = [model.get_parameter("positions.table") for model in (usual, other)]
    torch.testing.assert_close(tables[1], tables[0] * (std / 0.02))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_scale_that_is_given_holds(network: type[nn.Module]) -> None:
    built = build(network, partial(SinusoidalPositions, scale=1.0))
    for module in built.modules():
        if isinstance(module, SinusoidalPositions):
            table = sinusoids(torch.arange(9.0), D)
            assert torch.equal(module.embed(torch.zeros(1, 9, D))[0], table)


def test_sinusoids_follow_the_tokens_also_after_they_were_used() -> None:
    scheme, x = SinusoidalPositions(D, 4, True), torch.zeros(1, 5, D)
    before = scheme.embed(x)
    scheme.match_tokens(0.25)
    torch.testing.assert_close(scheme.embed(x), 0.25 * before)
    scheme.match_tokens(2.0)
    torch.testing.assert_close(scheme.embed(x), 2 * before)


def test_learned_positions_follow_the_tokens_more_than_once() -> None:
    scheme = LearnedPositions(D, 4, True, max_length=50)
    scheme.match_tokens(1.0)
    assert rms(scheme.table) == pytest.approx(1, rel=0.05)
    scheme.match_tokens(0.1)
    assert rms(scheme.table) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_is_a_positive_number(scale: float) -> None:
    with pytest.raises(ValueError, match=f"must be positive and finite; it is {scale}"):
        SinusoidalPositions(D, 4, True, scale=scale)
