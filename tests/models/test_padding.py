"""Where nothing is padded, no mask reaches the kernels, and the result is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.test_size_of_positions import NETWORKS, SCHEMES, STACK, V, build, subclasses
from tests.small import MAKERS, make, make_trainer
from tx_lightning.data.batches import Batch
from tx_lightning.models import (
    Classifier,
    EncoderDecoder,
    LanguageModel,
    MaskedLanguageModel,
    TextEncoder,
)
from tx_lightning.models.classifier import Pooling, pool
from tx_lightning.nn import AlibiPositions, MultiHeadAttention, Positions, T5RelativePositions
from tx_lightning.nn.layers import DecoderLayer, EncoderLayer
from tx_lightning.tasks.labels import LabelTask

IDS = torch.randint(1, V, (3, 7), generator=torch.Generator().manual_seed(0))
SEGMENTS = (torch.arange(7) > 3).long().expand(3, -1)
PADDED = IDS.masked_fill(torch.arange(7) >= torch.tensor([7, 4, 6])[:, None], 0)
WITH_PADDING = [network for network in NETWORKS if network is not LanguageModel]
BIASED = [AlibiPositions, T5RelativePositions]


class Spy:
    """Keeps what reaches the kernels of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.calls: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        for module in network.modules():
            if isinstance(module, MultiHeadAttention):
                module.kernel = self._around(module.kernel)

    def _around(self, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
            self.calls.append((q, mask, rest[2]))
            return kernel(q, k, v, mask, *rest)

        return spy


def outputs(network: nn.Module, **padded: bool) -> list[Tensor]:
    """All that a network computes of ids without padding: whole sequences, and steps."""
    if isinstance(network, EncoderDecoder):
        state = network.start(IDS, **padded)
        steps = [network.step(IDS[:, 0], state)]
        state.select(torch.tensor([2, 0, 1, 1, 0]))
        steps.append(network.step(IDS[[0, 1, 2, 0, 1], 1], state))
        memory = network.encode(IDS, **padded)
        return [
            network(IDS, IDS, **padded),
            network.hidden(IDS, IDS, **padded),
            memory.states,
            *steps,
        ]
    if isinstance(network, MaskedLanguageModel):
        return [network(IDS, SEGMENTS, **padded), network.hidden(IDS, SEGMENTS, **padded)]
    return [network(IDS, SEGMENTS, **padded)]


@pytest.mark.parametrize("network", WITH_PADDING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("short", [0, 128], ids=["torch", "batched"])
def test_no_mask_reaches_the_kernels_where_nothing_is_padded(
    short: int, scheme: type[Positions], network: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tx_lightning.nn.attention._SHORT", short)
    built = build(network, scheme).eval()
    spy = Spy(built)
    with torch.no_grad():
        usual = outputs(built)
        if scheme not in BIASED:
            assert any(mask is not None for _, mask, _ in spy.calls)
        spy.calls.clear()
        found = outputs(built, padded=False)
    assert spy.calls
    for _, mask, bias in spy.calls:
        assert mask is None
        assert bias is None or scheme in BIASED
    for one, other in zip(found, usual, strict=True):
        assert torch.equal(one, other)


def outputs_of(network: nn.Module, ids: Tensor) -> Tensor:
    y: Tensor = (
        network(ids, IDS[: len(ids)]) if isinstance(network, EncoderDecoder) else network(ids)
    )
    return y


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pooling_without_padding(pooling: Pooling, dtype: torch.dtype) -> None:
    x, real = torch.randn(3, 300, 4).to(dtype), torch.ones(3, 300, dtype=torch.bool)
    found = pool(x, None, pooling)
    assert found.dtype == dtype
    assert torch.equal(found, pool(x, real, pooling))


def test_a_mean_of_bfloat16_counts_all_tokens() -> None:
    """257 is no bfloat16."""
    x, real = torch.ones(1, 514, 4, dtype=torch.bfloat16), torch.arange(514)[None] < 257
    assert pool(x, real, "mean").unique().tolist() == [1]


def test_a_classifier_pools_the_same() -> None:
    for pooling in ("cls", "mean", "max"):
        network = Classifier(
            V, 2, encoder=lambda v: TextEncoder(v, **STACK, n_layers=1), pooling=pooling
        ).eval()
        assert torch.equal(network(IDS, padded=False), network(IDS))


# Tasks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_tasks_say_whether_their_batches_are_padded(
    name: str, padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that claim to have no padding, or some, in training, validation and test."""
    for kind in subclasses(Batch):
        monkeypatch.setattr(kind, "padded", property(lambda batch: padded))
    task, data = make(name)
    spy = Spy(task.network)
    masked = padded and name != "LanguageModeling"
    limits = {"limit_val_batches": 1, "limit_test_batches": 1, "val_check_interval": 1}
    trainer = make_trainer(tmp_path, max_steps=1, **limits)
    for run in (trainer.fit, trainer.test):
        run(task, datamodule=data)
        assert spy.calls
        assert any(mask is not None for _, mask, _ in spy.calls) is masked
        spy.calls.clear()


def test_text_of_equal_lengths_is_not_masked() -> None:
    for name, answer, texts in (
        ("Translation", "translate", ["a b", "c d"]),
        ("Classification", "classify", ["a b", "c d"]),
        ("Tagging", "tag", [["a", "b"], ["c", "d"]]),
    ):
        task, data = make(name)
        data.prepare_data()
        data.setup("fit")
        task.attach(data.tokenizers)
        if isinstance(task, LabelTask):
            labels: Any = data
            task.attach_labels(labels.labels, 1)
        spy = Spy(task.network)
        method: Callable[[Any], Any] = getattr(task, answer)
        method(texts)
        assert spy.calls
        assert all(mask is None for _, mask, _ in spy.calls)
        method([*texts, texts[0][:1]])
        assert any(mask is not None for _, mask, _ in spy.calls)


# Score biases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scheme", BIASED)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_bias_is_cast_once_a_forward_to_the_type_of_the_queries(
    autocast: torch.dtype | None, scheme: type[Positions], network: type[nn.Module]
) -> None:
    built = deeper(build(network, scheme)).eval()
    spy = Spy(built)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        outputs_of(built, PADDED)
    biases = [bias for _, mask, bias in spy.calls if bias is not None]
    for q, mask, bias in spy.calls:
        assert mask is None or bias is None
        assert bias is None or bias.dtype == q.dtype == (autocast or torch.float32)
    stacks = 2 if network is EncoderDecoder else 1
    assert len(biases) == 3 * stacks
    assert len({id(bias) for bias in biases}) == stacks  # one tensor for all layers of a stack


def deeper(network: nn.Module) -> nn.Module:
    """The same layer three times in each stack."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and isinstance(module[0], EncoderLayer | DecoderLayer):
            module.extend([module[0], module[0]])
    return network
