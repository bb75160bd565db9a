"""Nothing in networks and losses makes the host wait for a GPU, or asks for what Apple's lack."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.device_guard import DeviceError, device_guard
from tests.models.test_size_of_positions import NETWORKS, SCHEMES, V, build
from tx_lightning.decoding import Beam, Decoding, Greedy, Sampling
from tx_lightning.losses import linear_cross_entropy
from tx_lightning.models import EncoderDecoder, LanguageModel, MaskedLanguageModel
from tx_lightning.nn import Positions
from tx_lightning.nn.dropout import Dropout

X = torch.randn(3, 4)
M = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
N = 7  # of M

# The guard itself --------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[], Any]] = {
    "item": X[0, 0].item,
    "bool": lambda: bool(X[0, 0] > 0),
    "if": lambda: 1 if M.any() else 0,
    "int": lambda: int(X[0, 0]),
    "float": lambda: float(X.sum()),
    "tolist": X.tolist,
    "numpy": X.numpy,
    "cpu": X.cpu,
    "to cpu": lambda: X.to("cpu"),
    "to cpu by name": lambda: X.to(device="cpu"),
    "nonzero": M.nonzero,
    "where": lambda: torch.where(M),
    "masked_select": lambda: X.masked_select(M),
    "index by a mask": lambda: X[M],
    "index by a mask of rows": lambda: X[M[:, 0]],
    "assignment by a mask": lambda: X.clone().__setitem__(M, X[0, :1].expand(N)),
    "equal": lambda: torch.equal(X, X),
    "unique": X.unique,
    "bincount": lambda: M.long().flatten().bincount(),
    "float64": X.double,
    "float64 sum": lambda: X.sum(dtype=torch.float64),
    "zeros": lambda: torch.zeros(3),
    "arange": lambda: torch.arange(3),
    "tensor": lambda: torch.tensor([1.0]),
    "as_tensor": lambda: torch.as_tensor([1.0]),
    "ones in a backward pass": lambda: apply(X.clone().requires_grad_()).sum().backward(),
}
ACCEPTED: dict[str, Callable[[], Any]] = {
    "arithmetic": lambda: (X @ X.t()).softmax(-1),
    "masked_fill": lambda: X.masked_fill(M, 0.0),
    "one value by a mask": lambda: X.clone().__setitem__(M, 0.0),
    "index by places": lambda: X[torch.arange(2, device=X.device)],
    "index_select": lambda: X.index_select(0, torch.zeros(2, dtype=torch.long, device=X.device)),
    "zeros there": lambda: torch.zeros(3, device=X.device),
    "new_zeros": lambda: X.new_zeros(3),
    "zeros_like": lambda: torch.zeros_like(X),
    "bfloat16": lambda: X.bfloat16().float(),
    "to a device": lambda: X.to(X.device),
    "rows": lambda: [row.sum() for row in X.unbind()],
}


class MakesTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.ones(4)


def apply(x: Tensor) -> Tensor:
    y: Tensor = MakesTensor.apply(x)  # type: ignore[no-untyped-call]
    return y


@pytest.mark.parametrize("name", REFUSED)
def test_the_guard_refuses(name: str) -> None:
    REFUSED[name]()
    with pytest.raises(DeviceError, match=r"test_device_guard\.py:\d+"), device_guard():
        REFUSED[name]()


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_guard_accepts(name: str) -> None:
    with device_guard() as guard:
        ACCEPTED[name]()
    assert guard.waits == []


def test_one_wait_brings_all_of_a_tensor() -> None:
    with device_guard(allowed_waits=1) as guard:
        alive, sound = torch.stack((M[0], M[1])).cpu()
        bool(alive.any()), sound.tolist(), int(alive.sum())
    assert len(guard.waits) == 1
    with pytest.raises(DeviceError, match=r"cpu at .*; tolist at "), device_guard(1):
        (X.cpu(), X.tolist())


# Networks ----------------------------------------------------------------------------------------

IDS = torch.randint(1, V, (3, 7), generator=torch.Generator().manual_seed(0))
IDS[1, 4:] = 0
NEWEST, ROWS, TARGETS = IDS[:, 0], torch.tensor([2, 0, 1, 1]), IDS.flatten()


def train(network: nn.Module, ids: Tensor, targets: Tensor, *, padded: bool) -> Tensor:
    """One step of training, up to the gradients; as the task of each network does it."""
    bias = None
    if isinstance(network, EncoderDecoder):
        hidden = network.hidden(ids, ids, padded=padded)
    elif isinstance(network, LanguageModel):
        hidden = network.hidden(ids)
    elif isinstance(network, MaskedLanguageModel):
        hidden, bias = network.hidden(ids, padded=padded), network.output_bias
    else:
        loss: Tensor = network(ids, padded=padded).float().square().sum()
        loss.backward()
        return loss
    weight, hidden = network.output_weight, hidden.flatten(0, 1)
    loss = linear_cross_entropy(hidden, weight, targets, 0.1, bias).loss
    loss.backward()
    return loss


@torch.no_grad()
def decode(network: nn.Module, ids: Tensor, newest: Tensor, rows: Tensor) -> Tensor | None:
    """Some steps of decoding, with rows that move."""
    if isinstance(network, EncoderDecoder):
        state: Any = network.start(ids)
    elif isinstance(network, LanguageModel):
        state = network.start(3, slide=4)
        network.prefill(ids, state)
    else:
        return None
    network.step(newest, state)
    state.select(rows)
    logits = newest
    for _ in range(3):
        logits = network.step(rows, state)
    return logits


def dropping(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, Dropout):
            module.p = 0.1
    return network


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_networks_make_nobody_wait(scheme: type[Positions], kind: type[nn.Module]) -> None:
    network = dropping(build(kind, scheme))
    for gpu in (True, False):  # with the kernel of torch and autocast, as there; or those of CPUs
        with pytest.MonkeyPatch.context() as patch, device_guard():
            patch.setattr("tx_lightning.nn.attention._SHORT", 0 if gpu else 128)
            with torch.autocast("cpu", torch.bfloat16, enabled=gpu):
                train(network.train(), IDS, TARGETS, padded=gpu)
                decode(network.eval(), IDS, NEWEST, ROWS)
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_networks_run_on_another_device(scheme: type[Positions], kind: type[nn.Module]) -> None:
    """On one without values: none of the host's tensors may get in, and nobody may look."""
    with torch.device("meta"):
        network = dropping(build(kind, scheme))
        ids = torch.ones(3, 7, dtype=torch.long)
        rows = torch.ones(4, dtype=torch.long)
    loss = train(network.train(), ids, ids.flatten(), padded=True)
    assert (loss.device.type, loss.dtype) == ("meta", torch.float32)
    logits = decode(network.eval(), ids, ids[:, 0], rows)
    if logits is not None:
        assert logits.device.type == "meta"
        assert logits.shape == (4, V)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.device == parameter.device


@pytest.mark.parametrize("strategy", [Greedy(), Beam(beam_size=3), Sampling()])
@pytest.mark.parametrize("kind", [EncoderDecoder, LanguageModel], ids=lambda kind: kind.__name__)
def test_a_search_waits_once_a_step(kind: type[nn.Module], strategy: Decoding) -> None:
    network: Any = build(kind, None).eval()
    limits = torch.full((3,), 12, device=IDS.device)
    with (
        torch.no_grad(),
        device_guard(allowed_waits=12 + 2) as guard,
    ):  # limits before, answers after
        state = network.start(3 if kind is LanguageModel else IDS)
        found = strategy(network.step, state, max_lengths=limits, eos_id=2)
    assert max(len(best.tokens) for best, *_ in found) == 12
    assert len(guard.waits) >= 12
