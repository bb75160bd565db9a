"""What README says of extending: one class of the user's, and one line of YAML that names it."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_every_task import configuration
from tx_lightning import cli
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import load_task

README = Path(__file__).parents[1] / "README.md"
CLASSES = """
from collections.abc import Iterator

from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from tx_lightning.data import (
    DenoisingData, ParallelSource, TextInfilling, TokenizerTrainer, TranslationData, Words,
)
from tx_lightning.decoding import Decoding, Filter, Greedy
from tx_lightning.models import EncoderDecoder
from tx_lightning.nn import Positions
from tx_lightning.tasks import Translation

USED = set()


class Scheme(Positions):
    def __init__(self, d_model, n_heads, bidirectional):
        super().__init__(d_model, n_heads, bidirectional)
        self.place = nn.Parameter(0.1 * __import__("torch").randn(64, d_model))

    def embed(self, x, start=0):
        USED.add("position scheme")
        return x + self.place[start : start + x.shape[1]]


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_ff: int, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d_model, d_ff), nn.Tanh(), nn.Linear(d_ff, d_model))

    def forward(self, x):
        USED.add("feed-forward, norm")
        return self.layers(x)


class Norm(nn.Module):
    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(__import__("torch").ones(d_model))

    def forward(self, x):
        USED.add("norm")
        return x * self.weight


class Network(EncoderDecoder):
    def hidden(self, source, target, *, padded=True):
        USED.add("network")
        return super().hidden(source, target, padded=padded)


class Schedule(LRScheduler):
    def get_lr(self):
        USED.add("schedule, optimizer")
        return [rate / (1 + self.last_epoch) for rate in self.base_lrs]


class Optimizer(SGD):
    def step(self, closure=None):
        USED.add("optimizer")
        return super().step(closure)


class Search(Decoding):
    def __init__(self, longest: int = 5):
        super().__init__(
            length_penalty=0.0, max_length_ratio=1.0, max_length_offset=longest, filters=()
        )
        self.greedy = Greedy(max_length_ratio=1.0, max_length_offset=longest)

    def search(self, step, state, logits, problem):
        USED.add("decoding strategy, filter")
        return self.greedy.search(step, state, logits, problem)


class NoFirst(Filter):
    def __call__(self, logits, *rest):
        USED.add("filter")
        return logits


class Source(ParallelSource):
    def splits(self) -> list[str]:
        return ["train", "val", "test"]

    def fingerprint(self, split: str) -> str:
        return "ab12"

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        USED.add("data source")
        yield from [("ein Kind", "a child"), ("das Kind tanzt", "the child dances")] * 8


class Tokenizer(TokenizerTrainer):
    def train(self, texts, vocab_size):
        USED.add("tokenizer")
        return Words().train(texts, vocab_size)


class Noise(TextInfilling):
    def corrupt(self, ids, random, sentinels):
        USED.add("pretraining objective")
        return super().corrupt(ids, random, sentinels)


class Task(Translation):
    def forward(self, batch):
        USED.add("task")
        return super().forward(batch)


class Data(TranslationData):
    def setup(self, stage):
        USED.add("data module")
        super().setup(stage)


class Bell(Callback):
    def on_train_batch_end(self, *_):
        USED.add("callback")
"""
# The row of README, the task, the key of its line, and what the line says.
LINES: dict[str, tuple[str, str, Any]] = {
    "position scheme": ("Translation", "model.init_args.network.init_args.positions", "Scheme"),
    "feed-forward, norm": (
        "Translation", "model.init_args.network.init_args.feed_forward", "FeedForward",
    ),
    "norm": ("Translation", "model.init_args.network.init_args.norm", "Norm"),
    "network": ("Translation", "model.init_args.network", "Network"),
    "schedule, optimizer": ("Translation", "model.init_args.scheduler", "Schedule"),
    "optimizer": (
        "Translation",
        "model.init_args.optimizer",
        {"class_path": "mine.Optimizer", "init_args": {"lr": 0.1}},
    ),
    "decoding strategy, filter": ("Translation", "model.init_args.decoding", "Search"),
    "filter": (
        "Translation",
        "model.init_args.decoding",
        {
            "class_path": "tx_lightning.decoding.Greedy",
            "init_args": {"filters": [{"class_path": "mine.NoFirst"}]},
        },
    ),
    "data source": ("Translation", "data.init_args.source", "Source"),
    "tokenizer": ("Translation", "data.init_args.tokenizer", "Tokenizer"),
    "pretraining objective": ("Denoising", "data.init_args.noise", "Noise"),
    "task": ("Translation", "model.class_path", "Task"),
    "data module": ("Translation", "data.class_path", "Data"),
    "callback": ("Translation", "trainer.callbacks", [{"class_path": "mine.Bell"}]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of the user in the folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(CLASSES)
    with cli.process_restored():
        yield
    sys.modules.pop("mine", None)


def with_line(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A configuration with one more line; another class keeps the arguments of the one before."""
    *path, last = key.split(".")
    place = tree
    for name in path:
        place = place[name]
    before = place.get(last)
    if last == "class_path":
        place[last] = f"mine.{value}"
    elif isinstance(value, str):
        kept = before if isinstance(before, dict) and "class_path" not in before else {}
        place[last] = {**kept, "class_path": f"mine.{value}"}
    else:
        place[last] = value
    return tree


# Rows whose lines do not exclude each other share a run.
RUNS = [
    [
        "position scheme", "feed-forward, norm", "norm", "schedule, optimizer", "optimizer",
        "decoding strategy, filter", "data source", "tokenizer", "callback",
    ],
    ["network", "filter", "task", "data module"],
    ["pretraining objective"],
]  # fmt: skip


@pytest.mark.parametrize("rows", RUNS, ids=lambda rows: rows[0])
def test_one_class_and_one_line(rows: list[str]) -> None:
    (task,) = {LINES[row][0] for row in rows}
    tree = copy.deepcopy(configuration(task))
    tree["trainer"] |= {"max_steps": 2, "callbacks": [], "val_check_interval": 2}
    if "data source" in rows:
        tree["data"]["init_args"]["batch_tokens"] = 32
    for row in rows:
        with_line(tree, *LINES[row][1:])
    Path("run.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "--config", "run.yaml"]) == 0
    assert set(rows) == sys.modules["mine"].USED
    (checkpoint,) = Path("runs/run").glob("*/checkpoints/*.ckpt")
    again: Any = load_task(checkpoint, trust="mine")
    if task == "Translation":
        assert len(again.translate(["das Kind"])) == 1


def test_each_row_of_readme_is_tried() -> None:
    table = README.read_text().partition("| a new ... |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert len(rows) == 10
    assert set(rows) <= LINES.keys()
    assert sorted(row for run in RUNS for row in run) == sorted(LINES)
