"""What a large corpus costs: tokenizing, memory, start-up and planning, as it grows.

    python -m benchmarks.scale --folder FOLDER
    python -m benchmarks.scale --folder FOLDER --pairs 1000000 10000000 --steps 300

Synthetic sentence pairs are written into FOLDER (10 million take 1.5 GB, what is made of them 3 GB)
and trained on with a small model, so that memory and time are those of the data. Of each corpus the
first start is killed when half of it is tokenized, and started again; then the cache is ready. All
numbers are of whole commands of `tx-lightning fit`, but those of planning and reading an epoch.
"""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tx_lightning.loggers import read_metrics

TINY = 1000  # pairs of the corpus that start-up is compared with
MOST_READ = 20_000  # batches that are read of an epoch
_WORDS = 20_000
_AT_ONCE = 100_000


def write_sentences(path: Path, n: int, seed: int) -> None:
    """Write sentences of about a dozen made-up words, a few of them frequent, as in a language."""
    draw = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(draw.choice(letters, k)) for k in draw.integers(2, 10, _WORDS)]
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, n, _AT_ONCE):
            lengths = draw.gamma(3.0, 3.3, min(_AT_ONCE, n - start)).astype(int) + 2
            chosen = (_WORDS * draw.random(lengths.sum()) ** 3).astype(int).tolist()
            ends = np.cumsum(lengths).tolist()
            for first, end in zip([0, *ends[:-1]], ends, strict=True):
                file.write(" ".join([words[i] for i in chosen[first:end]]) + "\n")


def write_corpus(folder: Path, n: int) -> list[str]:
    """Write n pairs into two files, unless they are there; return their names."""
    files = [folder / f"{n}.{side}" for side in ("source", "target")]
    for seed, file in enumerate(files):
        if not file.exists():
            begun = file.with_suffix(".begun")
            write_sentences(begun, n, seed)
            begun.replace(file)
    return [str(file) for file in files]


def configuration(folder: Path, cache: Path, n: int, *, steps: int) -> dict[str, Any]:
    """A run of a small model on n pairs."""
    held_out = write_corpus(folder, 100)
    sources = {"train": write_corpus(folder, n), "val": held_out, "test": held_out}
    sizes = {"d_model": 64, "n_heads": 2, "d_ff": 128}
    layers = {"n_encoder_layers": 1, "n_decoder_layers": 1}
    return {
        "data": {
            "class_path": "tx_lightning.data.TranslationData",
            "init_args": {
                "source": {"class_path": "tx_lightning.data.TextPairs", "init_args": sources},
                "vocab_size": 4000,
                "batch_tokens": 2048,
                "cache_dir": str(cache),
            },
        },
        "model": {
            "class_path": "tx_lightning.tasks.Translation",
            "init_args": {
                "network": {
                    "class_path": "tx_lightning.models.EncoderDecoder",
                    "init_args": {**sizes, **layers},
                }
            },
        },
        "trainer": {
            "max_steps": steps,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "tx_lightning.callbacks.LongestBatch"}],
        },
    }


@dataclass
class Fit:
    """A run of fit.

    Attributes:
        seconds: From its start to its first optimizer step.
        mebibytes: The most memory it had, pages of files that it reads included.
        output: What it said.
    """

    seconds: float
    mebibytes: float
    output: str


def fit(config: dict[str, Any], folder: Path, *, kill_after: int | None = None) -> Fit | int:
    """Run fit; or kill it when so many pairs are tokenized, and return how many were noted."""
    run = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    file = run / "given.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "tx_lightning", "fit", "--config", str(file)]
    command += ["--trainer.default_root_dir", str(run / "run")]
    cache = Path(config["data"]["init_args"]["cache_dir"])
    environment = {**os.environ, "WANDB_MODE": "offline", "TX_LIGHTNING_CACHE": str(cache)}
    began = time.time()
    most = 0.0
    with (run / "output").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        while process.poll() is None:
            time.sleep(0.05)
            most = max(most, peak_memory(process.pid))
            if kill_after is not None and (done := noted(cache)) >= kill_after:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return done
    said = (run / "output").read_text(encoding="utf-8")
    if process.returncode or kill_after is not None:
        raise SystemExit(f"error: fit ended with status {process.returncode}:\n{said[-3000:]}")
    first = read_metrics(run / "run" / "metrics.jsonl")[0]
    return Fit(first["time"] - began, most, said)


def peak_memory(pid: int) -> float:
    """The most memory that a process had so far in MiB, pages of files included; 0 at its end."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def noted(cache: Path) -> int:
    """Pairs that are tokenized, by the note that the next start would go on from."""
    notes = list(cache.glob("pairs/*.begun/progress.json"))
    return json.loads(notes[0].read_text(encoding="utf-8"))["done"] if notes else 0


def read_epoch(data: dict[str, Any], batches: int) -> dict[str, float]:
    """Plan an epoch and read its batches, alone in a process: seconds and the most memory."""
    from tx_lightning.data import TextPairs, TranslationData

    arguments = dict(data["init_args"])
    source = TextPairs(**arguments.pop("source")["init_args"])
    module = TranslationData(source, **arguments)
    module.prepare_data()
    module.setup("fit")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    sampler = module.train_sampler()
    sampler.set_epoch(1)
    rows = sum(len(share.indices) for share in sampler)
    planning = time.perf_counter() - began
    assert rows == len(module.train_store), "an epoch has every pair once"
    began = time.perf_counter()
    read = 0
    for read, _ in enumerate(module.train_dataloader(), start=1):
        if read == batches:
            break
    return {
        "planning": planning,
        "reading": 1000 * (time.perf_counter() - began) / read,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "memory before": before,
    }


def in_own_process(data: dict[str, Any], batches: int) -> dict[str, float]:
    """`read_epoch` where nothing else has used memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(read_epoch, (data, batches))


@dataclass
class Measured:
    """What a corpus of so many pairs costs.

    Attributes:
        killed_at: Pairs that were noted as done when the first start was killed.
        went_on: Whether the next start said that it went on from there.
        rate: Pairs a second that were tokenized after it.
        first_memory: Most memory of a start that tokenizes and then trains, in MiB.
        memory: Most memory of a training process on a ready cache, in MiB.
        start_up: Seconds to the first step on a ready cache, over those on a tiny corpus.
        epoch: What `read_epoch` found.
    """

    killed_at: int
    went_on: bool
    rate: float
    first_memory: float
    memory: float
    start_up: float
    epoch: dict[str, float]


def measure(folder: Path, n: int, *, steps: int, starts: int = 3) -> Measured:
    """Kill a first start on n pairs, go on, and start again and again on the ready cache."""
    cache = Path(tempfile.mkdtemp(prefix="cache-", dir=folder))
    large = configuration(folder, cache, n, steps=steps)
    tiny = configuration(folder, cache, TINY, steps=1)
    killed_at = fit(large, folder, kill_after=n // 2)
    again = fit(large, folder)
    fit(tiny, folder)  # makes its cache
    ready, small = [], []
    for _ in range(starts):
        ready.append(fit(large, folder))
        small.append(fit(tiny, folder))
    assert isinstance(killed_at, int)
    assert isinstance(again, Fit)
    runs = [run for run in ready if isinstance(run, Fit)]
    tiny_seconds = [run.seconds for run in small if isinstance(run, Fit)]
    usual = statistics.median(run.seconds for run in runs)
    return Measured(
        killed_at=killed_at,
        went_on=f"going on after {killed_at:,} pairs" in again.output,
        rate=(n - killed_at) / (again.seconds - usual),
        first_memory=again.mebibytes,
        memory=max(run.mebibytes for run in runs),
        start_up=usual - statistics.median(tiny_seconds),
        epoch=in_own_process(large["data"], MOST_READ),
    )


def told(n: int, found: Measured) -> str:
    """The lines of a corpus."""
    epoch = found.epoch
    lines = {
        "killed when so many were tokenized": f"{found.killed_at:,} pairs",
        "the next start went on there": "yes" if found.went_on else "NO",
        "tokenizing, pairs a second": f"{found.rate:,.0f}",
        "memory, tokenizing and training": f"{found.first_memory:,.0f} MiB",
        "memory, training": f"{found.memory:,.0f} MiB",
        "start-up, over a tiny corpus": f"{found.start_up:.2f} s",
        "planning an epoch": f"{epoch['planning']:.2f} s",
        "reading a batch": f"{epoch['reading']:.2f} ms",
        "memory, reading": f"{epoch['memory']:,.0f} MiB, {epoch['memory before']:,.0f} before it",
    }
    return "\n".join([f"{n:,} pairs", *(f"  {name:36}{text}" for name, text in lines.items())])


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the corpora are written")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for n in arguments.pairs:
        found = measure(arguments.folder.absolute(), n, steps=arguments.steps)
        print(told(n, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
