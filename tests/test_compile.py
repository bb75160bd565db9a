"""`torch.compile`: what is compiled computes the same, and really is compiled."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small import MAKERS, make, make_trainer
from tests.tasks.test_translation import SaveAt
from tx_lightning.losses import linear_cross_entropy
from tx_lightning.models import EncoderDecoder, LanguageModel
from tx_lightning.nn import (
    RotaryPositions,
    record_attention,
)
from tx_lightning.nn.layers import DecoderLayer, EncoderLayer

pytestmark = [  # of what torch's compiler does to torch
    pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated"),
]

V = 19
STACK: dict[str, Any] = {"d_model": 16, "n_heads": 2, "d_ff": 16, "dropout": 0.0}
SOURCE = torch.tensor([[7, 5, 9, 4, 2], [3, 8, 2, 0, 0], [6, 2, 0, 0, 0]])
TARGET = torch.tensor([[1, 9, 4, 12], [1, 6, 6, 0], [1, 11, 3, 5]])


class Compiler:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.graphs: list[str] = []
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        self.graphs.append("".join(part.code for part in parts))

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Of the module, so that layers of the same sizes are compiled once for all tests.
COMPILER = Compiler()
FULL: dict[str, Any] = {"backend": COMPILER, "dynamic": True, "fullgraph": True}


def layers(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, EncoderLayer | DecoderLayer)]


def gradients(y: Tensor, network: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad((y * y.detach()).sum(), list(network.parameters())))


def encoder_decoder() -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(
        V, **STACK, n_encoder_layers=2, n_decoder_layers=2, positions=RotaryPositions
    )


def test_a_compiled_encoder_decoder_computes_the_same() -> None:
    plain, compiled = encoder_decoder(), encoder_decoder()
    compiled.compile(**FULL)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    before = COMPILER.runs
    outputs = [network.hidden(SOURCE, TARGET) for network in (plain, compiled)]  # as tasks call it
    torch.testing.assert_close(outputs[1], outputs[0])
    grads = [gradients(y, n) for y, n in zip(outputs, (plain, compiled), strict=True)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    assert COMPILER.runs - before == len(layers(compiled))  # not one ran uncompiled
    # Attention is recorded without the compiled code, which is there afterwards.
    before, graphs, maps = COMPILER.runs, len(COMPILER.graphs), []
    for network in (plain, compiled):
        with record_attention(network) as recorded:
            network(SOURCE, TARGET)
        maps.append(recorded)
    assert len(maps[0]) == 6
    torch.testing.assert_close(maps[1], maps[0])
    assert COMPILER.runs == before
    compiled(SOURCE, TARGET)
    assert COMPILER.runs - before == len(layers(compiled))
    assert len(COMPILER.graphs) == graphs
    # Decoding, beyond the first buffer of the cache.
    before = COMPILER.runs
    with torch.no_grad():
        states = [network.start(SOURCE) for network in (plain, compiled)]
        tokens = torch.tensor([1, 1, 1])
        for step in range(36):
            if step == 34:  # rows move, as they do in a beam
                for state in states:
                    state.select(torch.tensor([2, 0, 0]))
            logits = [
                n.step(tokens, state) for n, state in zip((plain, compiled), states, strict=True)
            ]
            torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
            tokens = logits[0].argmax(-1)
    assert COMPILER.runs - before == 2 * (1 + 36)


def test_a_compiled_language_model_computes_the_same() -> None:
    def network() -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(V, **STACK, n_layers=2, context_length=8, positions=RotaryPositions)

    plain, compiled = network(), network()
    compiled.compile(**FULL)
    outputs = [n(SOURCE) for n in (plain, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0])
    grads = [gradients(y, n) for y, n in zip(outputs, (plain, compiled), strict=True)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    before = COMPILER.runs
    with torch.no_grad():
        pairs = [(n, n.start(3)) for n in (plain, compiled)]
        for tokens in TARGET.unbind(1):
            read = [n.step(tokens, state) for n, state in pairs]
            torch.testing.assert_close(read[1], read[0])
    assert COMPILER.runs - before == 2 * 4


@pytest.mark.parametrize("product", ["_ONEDNN", "_rounded"])
def test_compiled_code_has_no_product_of_ours(
    product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor knows neither oneDNN's nor those of rounded factors."""
    monkeypatch.setattr(f"tx_lightning.nn.linear.{product}", True)
    compiler, weight = Compiler(), torch.randn(V, 16, requires_grad=True)
    layer = EncoderLayer(
        16, 2, 16, dropout=0.0, attention_dropout=0.0, pre_norm=True, norm=nn.LayerNorm,
        feed_forward=lambda d, f: nn.Identity(),
    )  # fmt: skip

    def loss(x: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(layer(x).flatten(0, 1), weight, targets).loss

    x, targets = torch.randn(4, 64, 16), torch.randint(V, (256,))
    torch.compile(loss, backend=compiler)(x, targets).backward()
    (code,) = compiler.graphs
    assert "bfloat16" not in code
    assert "mkldnn" not in code
    assert weight.grad is not None


# Tasks -------------------------------------------------------------------------------------------


class Counting:
    """In the place of `torch.compile`: counts how often each function runs that it compiled."""

    def __init__(self) -> None:
        self.runs: dict[Any, int] = {}

    def __call__(self, function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        self.runs[function] = 0

        def run(*arguments: Any, **named: Any) -> Any:
            self.runs[function] += 1
            return function(*arguments, **named)

        return run


@pytest.mark.parametrize("name", MAKERS)
def test_the_layers_of_every_task_are_compiled_and_nothing_else(name: str, tmp_path: Path) -> None:
    (task, data), compiler = make(name), Counting()
    given: Any = torch.compile(task)
    given.dynamo_ctx = compiler
    limits = {"limit_val_batches": 1, "val_check_interval": 2}
    trainer = make_trainer(tmp_path, max_steps=2, **limits)
    trainer.fit(given, datamodule=data)
    assert "val/loss" in trainer.callback_metrics
    ours = {layer._call_impl for layer in layers(task)}
    assert {function for function, runs in compiler.runs.items() if runs} == ours
    assert all(compiler.runs[layer] >= 3 for layer in ours)  # two steps and a validation


@pytest.mark.parametrize("name", MAKERS)
def test_a_task_and_its_network_compile_the_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("task", "network"):
        (task, _), compiler = make(name), Counting()
        monkeypatch.setattr(torch, "compile", compiler)
        (task if part == "task" else task.network).compile()
        assert compiler.runs.keys() == {layer._call_impl for layer in layers(task)}
        compiled = {m for m in task.modules() if m._compiled_call_impl is not None}
        assert compiled == set(layers(task))


def test_checkpoints_of_compiled_runs_are_those_of_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, then not, then compiled: the same as all of it without."""
    monkeypatch.setattr(torch, "compile", Counting())

    def fit(steps: int, start: Path | None, *, compiled: bool) -> Path:
        task, data = make("LanguageModeling")
        if compiled:
            task.network.compile()
        path = tmp_path / f"{steps}-{compiled}.ckpt"
        trainer = make_trainer(tmp_path, max_steps=steps + 1, callbacks=[SaveAt(steps, path)])
        trainer.fit(task, datamodule=data, ckpt_path=start)
        return path

    whole = fit(4, None, compiled=False)
    parts = fit(4, fit(3, fit(2, None, compiled=True), compiled=False), compiled=True)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (whole, parts)]
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


@pytest.mark.parametrize("name", MAKERS)
def test_a_wrapped_network_is_refused(name: str) -> None:
    task, _ = make(name)
    with pytest.raises(ValueError, match=r"call task\.network\.compile\(\)"):
        setattr(task, "network", torch.compile(task.network))  # noqa: B010
    assert all(not key.startswith("network._orig_mod") for key in task.state_dict())


@pytest.mark.parametrize("part", ["encoder", "decoder.layers.0", "output"])
def test_a_wrapped_part_of_a_network_is_refused(part: str, tmp_path: Path) -> None:
    task, data = make("Translation")
    parent, _, name = part.rpartition(".")
    wrapped: Any = torch.compile(task.network.get_submodule(part))
    task.network.get_submodule(parent).register_module(name, wrapped)
    with pytest.raises(ValueError, match=rf"call network\.{part}\.compile\(\) instead"):
        make_trainer(tmp_path).fit(task, datamodule=data)
