"""Short trainings on one GPU, in turn: precisions, compiled or not, as a table in Markdown.

    .venv/bin/python benchmarks/gpu.py [--steps 200] [--recipe NAME ...]

Each is `tx-lightning fit` with a shipped experiment and experiments/trainer/gpu.yaml in a process
of its own. The figures are medians over the logged intervals without the first, which has the
start-up and the compilation: target tokens a second, milliseconds a step, and the largest memory
that torch allocated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
RECIPES = {
    "translation, grammar": ["quickstart/translation.yaml"],
    "language model, grammar": ["quickstart/language_modeling.yaml"],
    "classifier, grammar": ["quickstart/classification.yaml"],
    "tinyshakespeare, nanoGPT's GPU size": [
        "language_modeling/tinyshakespeare_char.yaml",
        "language_modeling/tinyshakespeare_char_gpu.yaml",
    ],
}
NEEDS = {"tinyshakespeare, nanoGPT's GPU size": "tinyshakespeare"}
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--recipe", choices=RECIPES, action="append")
    parser.add_argument("--accelerator", default="gpu", help="cpu rehearses the script")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.accelerator == "gpu" else "CPU"
    chip = f"{device}, torch {torch.__version__}, {date.today()}"
    print(f"\n{chip}, {options.steps} steps\n")
    print("| recipe | precision | compiled | tokens a second | ms a step | GiB | loss |")
    print("|---|---|---|---|---|---|---|")
    failed = 0
    for recipe in options.recipe or RECIPES:
        if recipe in NEEDS and not _has(NEEDS[recipe]):
            print(f"| {recipe} | | | not run: TX_LIGHTNING_DATA has no {NEEDS[recipe]} | | | |")
            continue
        for precision in PRECISIONS:
            for compiled in (False, True) if precision == "bf16-mixed" else (False,):
                cells = _run(recipe, precision, compiled, options.steps, options.accelerator)
                failed += cells is None
                shown = cells or "failed, see above | | |"
                print(f"| {recipe} | {precision} | {'yes' if compiled else 'no'} | {shown} |")
                sys.stdout.flush()
    return int(failed > 0)


def _has(dataset: str) -> bool:
    folder = os.environ.get("TX_LIGHTNING_DATA")
    return folder is not None and (Path(folder) / dataset).is_dir()


def _run(recipe: str, precision: str, compiled: bool, steps: int, accelerator: str) -> str | None:
    """Train in a process of its own; return the cells of the figures, None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        files = [EXPERIMENTS / name for name in RECIPES[recipe]]
        words = [word for file in [*files, EXPERIMENTS / "trainer/gpu.yaml"]
                 for word in ("--config", str(file))]  # fmt: skip
        words += [
            "--trainer.accelerator", accelerator,
            "--trainer.precision", precision,
            "--trainer.max_steps", str(steps),
            "--trainer.log_every_n_steps", str(max(1, steps // 10)),
            "--trainer.limit_val_batches", "0",
            "--trainer.logger", "false",
            "--trainer.callbacks", json.dumps(["tx_lightning.callbacks.Throughput"]),
            "--trainer.default_root_dir", str(run),
            "--trainer.enable_progress_bar", "false",
            "--test_after", "false",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(int(compiled)), *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return None
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        memory = float((run / "memory").read_text())
    speeds = [row for row in rows if "train/step_time" in row][1:]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    tokens = statistics.median(row["train/tokens_per_second"] for row in speeds)
    time = statistics.median(row["train/step_time"] for row in speeds)
    return f"{tokens:,.0f} | {1000 * time:.1f} | {memory:.2f} | {losses[0]:.3f} → {losses[-1]:.3f}"


def child(words: list[str]) -> int:
    """What the process of one training does."""
    from lightning.pytorch import Callback

    from tx_lightning import cli
    from tx_lightning.commands import run

    compiled = words[0] == "1"

    class Measured(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            if compiled:
                pl_module.network.compile()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            gpu = torch.cuda.is_available()
            gib = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
            (Path(trainer.default_root_dir) / "memory").write_text(str(gib))

    build = cli.CommandLine.instantiate_trainer

    def instantiate_trainer(self: Any, **options: Any) -> Any:
        trainer: Any = build(self, **options)
        trainer.callbacks.append(Measured())
        return trainer

    cli.CommandLine.instantiate_trainer = instantiate_trainer  # type: ignore[method-assign]
    return run(["fit", *words[1:]])


if __name__ == "__main__":
    sys.exit(child(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
