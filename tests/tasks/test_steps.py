"""Parameter groups: decay on matrices, rates by depth, what is frozen."""

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from tx_lightning.models import Classifier, EncoderDecoder, LanguageModel, TextEncoder
from tx_lightning.tasks.steps import configure_optimizers, parameter_depths
from tx_lightning.tasks.task import freeze_parameters


def classifier() -> Classifier:
    def encoder(vocab_size: int) -> TextEncoder:
        return TextEncoder(vocab_size, d_model=8, n_heads=2, n_layers=3, max_length=6)

    return Classifier(10, 2, encoder=encoder)


def sgd(parameters: object) -> SGD:
    return SGD(parameters, lr=0.5, weight_decay=0.1)  # type: ignore[arg-type]


def rates(network: nn.Module, layer_decay: float | None) -> dict[str, tuple[float, float]]:
    built = configure_optimizers(network, sgd, None, layer_decay=layer_decay)["optimizer"]
    found = {}
    for group in built.param_groups:
        for parameter in group["params"]:
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    return {name: found[id(p)] for name, p in network.named_parameters()}


def test_weight_decay_is_for_matrices_only() -> None:
    network = classifier()
    for name, (rate, decay) in rates(network, None).items():
        assert rate == 0.5
        assert decay == (0.1 if network.get_parameter(name).dim() >= 2 else 0.0), name


def test_depths_grow_from_the_embeddings_to_the_head() -> None:
    depths = parameter_depths(classifier())
    assert depths["encoder.embedding.tokens.weight"] == 0
    assert depths["encoder.positions.table"] == 0
    assert depths["encoder.layers.0.self_attention.input.weight"] == 1
    assert depths["encoder.layers.2.feed_forward.outer.bias"] == 3
    assert depths["pooler.weight"] == depths["head.bias"] == 4
    both = parameter_depths(
        EncoderDecoder(
            10, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=2, d_ff=8, pre_norm=True
        )
    )
    assert both["encoder.layers.0.self_attention.input.weight"] == 1
    assert both["decoder.layers.1.cross_attention.input.weight"] == 2
    assert both["encoder.final_norm.weight"] == both["decoder.final_norm.weight"] == 3
    language = parameter_depths(LanguageModel(10, d_model=8, n_heads=2, n_layers=1))
    assert language["embedding.tokens.weight"] == 0
    assert language["final_norm.weight"] == 2


def test_rates_decay_from_the_head_down_and_a_schedule_multiplies_them() -> None:
    network = classifier()
    depths = parameter_depths(network)
    found = rates(network, 0.5)
    for name, (rate, _) in found.items():
        assert rate == pytest.approx(0.5 * 0.5 ** (4 - depths[name])), name
    built = configure_optimizers(
        network, sgd, lambda o: LambdaLR(o, lambda step: 0.5**step), layer_decay=0.5
    )
    before = [group["lr"] for group in built["optimizer"].param_groups]
    built["optimizer"].step()
    built["lr_scheduler"]["scheduler"].step()
    after = [group["lr"] for group in built["optimizer"].param_groups]
    assert after == pytest.approx([rate / 2 for rate in before])
    assert len(set(before)) == 5


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5])
def test_a_layer_decay_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"layer_decay={value} must be above 0 and at most 1"):
        configure_optimizers(classifier(), sgd, None, layer_decay=value)


def test_frozen_parameters_are_left_out_and_stay() -> None:
    network = classifier()
    freeze_parameters(network, ["encoder.embedding.*", "encoder.layers.[01].*"])
    built = configure_optimizers(network, sgd, None)["optimizer"]
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network(torch.randint(1, 9, (2, 5))).sum().backward()
    built.step()
    for name, parameter in network.named_parameters():
        frozen = name.startswith(("encoder.embedding.", "encoder.layers.0", "encoder.layers.1"))
        assert torch.equal(parameter, before[name]) == frozen, name
        assert parameter.requires_grad != frozen


def test_a_pattern_that_names_nothing_or_everything_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no parameter is named 'layers\.0\.\*'; .* encoder, pooler"
    ):
        freeze_parameters(classifier(), ["layers.0.*"])
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        freeze_parameters(classifier(), ["*"])
