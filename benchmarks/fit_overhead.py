"""What `tx-lightning fit` costs over a bare PyTorch loop on the same model and batches.

    python benchmarks/fit_overhead.py
    python benchmarks/fit_overhead.py --turns 100 -- --config experiments/trainer/gpu.yaml

One process runs the command line's `fit`, with the task, data, callbacks and loggers of the
configuration, and the bare loop of bare_loop.py in turns. Words after `--` are handed to `fit`.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tx_lightning.__main__ import main as tx_lightning

CONFIG = "experiments/translation/multi30k_en_de.yaml"


def overhead(fit: Sequence[float], bare: Sequence[float]) -> float:
    """How much longer fit took than the bare loop, as a share of the latter."""
    return sum(fit) / sum(bare) - 1


def interval(fit: Sequence[float], bare: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the overhead over pairs of turns."""
    pairs = list(zip(fit, bare, strict=True))
    draw = random.Random(0)
    draws = sorted(
        overhead(*zip(*draw.choices(pairs, k=len(pairs)), strict=True)) for _ in range(2000)
    )
    return draws[50], draws[-51]


def measure(
    config: str,
    turn: int,
    turns: int,
    words: Sequence[str],
    *,
    callback: str = "bare_loop.BareLoop",
    options: Mapping[str, str] | None = None,
) -> tuple[int, Path]:
    """Run fit with another loop among its callbacks; return its status and the results' file."""
    os.environ.setdefault("WANDB_MODE", "offline")
    folder = Path(tempfile.mkdtemp(prefix="fit_overhead_"))
    results = folder / "turns.json"
    init_args = {"turn": turn, "results": str(results), **(options or {})}
    status = tx_lightning(
        [
            *("fit", "--config", config, *words),
            *("--trainer.max_steps", str(turn * (turns + 1) + 1)),
            *("--trainer.limit_val_batches", "0"),
            *("--trainer.default_root_dir", str(folder / "run")),
            f"--trainer.callbacks+={json.dumps({'class_path': callback, 'init_args': init_args})}",
        ]
    )
    return status, results


def read_turns(results: Path) -> tuple[list[float], list[float]]:
    """The seconds of each turn of fit, and of the other loop."""
    seconds = json.loads(results.read_text("utf-8"))
    fit, bare = seconds["fit"], seconds["bare"]
    if len(fit) < 2:
        raise SystemExit("error: fewer than two turns lie inside an epoch: lower --turn")
    return fit, bare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--turn", type=int, default=10, help="steps of one turn")
    parser.add_argument("--turns", type=int, default=20, help="turns of fit, and of the bare loop")
    parser.add_argument("words", nargs="*", help="further words for fit, after --")
    arguments = parser.parse_args()
    status, results = measure(arguments.config, arguments.turn, arguments.turns, arguments.words)
    if status:
        return status
    fit, bare = read_turns(results)
    low, high = interval(fit, bare)
    ratios = [f / b - 1 for f, b in zip(fit, bare, strict=True)]
    milliseconds = 1e3 / (len(fit) * arguments.turn)
    print(f"turns of {arguments.turn} steps, {len(fit)} of each")
    print(f"fit                {sum(fit) * milliseconds:8.2f} ms a step")
    print(f"bare loop          {sum(bare) * milliseconds:8.2f} ms a step")
    print(f"overhead           {overhead(fit, bare):8.2%}  (95 % interval {low:.2%} to {high:.2%})")
    print(f"median over turns  {statistics.median(ratios):8.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
