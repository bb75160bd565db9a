"""The time of a training iteration beside nanoGPT's, on the same configuration.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.nanogpt --nanogpt nanoGPT

One process runs `fit` with experiments/language_modeling/tinyshakespeare_char.yaml and, in turns,
nanoGPT's model and optimizer in a loop of the steps that its train.py takes: batches drawn at
random from a memory-mapped file, forward, backward, clipping, the optimizer. Neither evaluates.
"""

import argparse
import importlib.util
import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from benchmarks.bare_loop import Turns
from benchmarks.fit_overhead import interval, measure, read_turns
from tx_lightning.data import LanguageModelingData
from tx_lightning.tasks import LanguageModeling

CONFIG = "experiments/language_modeling/tinyshakespeare_char.yaml"


class NanoGPTLoop(Turns):
    """nanoGPT's training, with the sizes of the network that fit trains.

    Args:
        turn: Steps of one turn.
        results: JSON file for the seconds of each turn.
        folder: A checkout of nanoGPT.
    """

    def __init__(self, turn: int, results: str, folder: str) -> None:
        super().__init__(turn, results)
        self.folder = Path(folder)

    def loop(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        assert isinstance(pl_module, LanguageModeling)
        data = trainer.datamodule  # type: ignore[attr-defined]  # set when fit begins
        assert isinstance(data, LanguageModelingData)
        network, length = pl_module.network, data.block_length
        nanogpt = load(self.folder / "model.py")
        settings = nanogpt.GPTConfig(
            block_size=length,
            vocab_size=data.tokenizers.source.vocab_size - 4,  # it has no special entries
            n_layer=len(network.layers),
            n_head=network.layers[0].self_attention.n_heads,
            n_embd=network.d_model,
            dropout=network.embedding.dropout.p,
            bias=False,
        )
        model = nanogpt.GPT(settings).to(pl_module.device)
        device = pl_module.device.type
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
        file = self.results.with_name("tokens.bin")
        (data.train_store.stream("text").astype(np.uint16) - 4).clip(0).tofile(file)
        rows = data.batch_tokens // length
        for step in itertools.count():
            rate = 1e-4 + 0.5 * (1 + math.cos(math.pi * min(1.0, step / 2000))) * 9e-4
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens = np.memmap(file, dtype=np.uint16, mode="r")
            starts = torch.randint(len(tokens) - length, (rows,)).tolist()
            x, y = (
                torch.stack(
                    [
                        torch.from_numpy(tokens[i + shift : i + shift + length].astype(np.int64))
                        for i in starts
                    ]
                ).to(pl_module.device)
                for shift in (0, 1)
            )
            _, loss = model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield


def load(path: Path) -> Any:
    """Import a file as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"error: there is no {path}: --nanogpt names a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nanogpt", required=True, help="a checkout of nanoGPT")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--turn", type=int, default=20, help="steps of one turn")
    parser.add_argument("--turns", type=int, default=20, help="turns of fit, and of nanoGPT")
    parser.add_argument("words", nargs="*", help="further words for fit, after --")
    arguments = parser.parse_args()
    folder = Path(arguments.nanogpt).resolve()
    status, results = measure(
        arguments.config,
        arguments.turn,
        arguments.turns,
        arguments.words,
        callback="benchmarks.nanogpt.NanoGPTLoop",
        options={"folder": str(folder)},
    )
    if status:
        return status
    fit, other = read_turns(results)
    low, high = interval(fit, other)
    milliseconds = 1e3 / (len(fit) * arguments.turn)
    ratios = [f / o for f, o in zip(fit, other, strict=True)]
    print(f"turns of {arguments.turn} steps, {len(fit)} of each, {torch.get_num_threads()} threads")
    print(f"fit                {sum(fit) * milliseconds:8.2f} ms an iteration")
    print(f"nanoGPT            {sum(other) * milliseconds:8.2f} ms an iteration")
    bounds = f"(95 % interval {1 + low:.3f} to {1 + high:.3f})"
    print(f"fit / nanoGPT      {sum(fit) / sum(other):8.3f}  {bounds}")
    print(f"median over turns  {statistics.median(ratios):8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
