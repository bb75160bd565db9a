"""Training throughput of Transformer-Tiny on Multi30k, in target tokens a second, side by side.

    python benchmarks/throughput.py --python joeynmt=PATH --python eole=PATH

PATH is the Python of an environment that holds the toolkit; a toolkit without one is left out.
Each is run through its own command line, in turns (ours, JoeyNMT, eole, ours, ...), on the same ids
of our tokenizer, handed to the others as words; the figure is the one each writes to its own log.
README.md says how each counts.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tx_lightning.data import ByteLevelBPE, Multi30k, TranslationData
from tx_lightning.loggers import read_metrics

HERE = Path(__file__).resolve().parent
CONFIG = "experiments/translation/multi30k_en_de.yaml"
VOCAB_SIZE = 10_000
FIRST_ID = 4  # below are padding and the like, which every toolkit adds itself
NEVER = 10**9


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        python: The interpreter that has the toolkit.
        corpus: Folder with train.source, train.target, dev.source, dev.target and vocabulary.
        folder: New folder for the run.
        steps: Optimizer steps.
        window: Steps of one line in the log.
        device: cpu or cuda.
    """

    python: str
    corpus: Path
    folder: Path
    steps: int
    window: int
    device: str


def write_corpus(folder: Path) -> None:
    """Write Multi30k as ids of our tokenizer, one word `t<id>` for each, to be split at spaces."""
    data = TranslationData(Multi30k("en", "de"), VOCAB_SIZE, tokenizer=ByteLevelBPE(lowercase=True))
    data.prepare_data()
    data.setup("fit")
    for split, store in (("train", data.train_store), ("dev", data.val_store)):
        for side, ids in (("source", store.source), ("target", store.target)):
            with (folder / f"{split}.{side}").open("w", encoding="utf-8") as file:
                file.writelines(" ".join(f"t{i}" for i in ids(n)) + "\n" for n in range(len(store)))
    words = (f"t{i}" for i in range(FIRST_ID, VOCAB_SIZE))
    (folder / "vocabulary").write_text("\n".join(words) + "\n", encoding="utf-8")


def tx_lightning_command(job: Job) -> list[str]:
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[job.device]
    return [
        *(job.python, "-m", "tx_lightning", "fit", "--config", CONFIG),
        *("--trainer.max_steps", str(job.steps)),
        *("--trainer.log_every_n_steps", str(job.window)),
        *("--trainer.limit_val_batches", "0"),
        *("--trainer.accelerator", accelerator, "--trainer.devices", "1"),
        *("--trainer.default_root_dir", str(job.folder / "run")),
    ]


def tx_lightning_figures(job: Job, output: str) -> list[float]:
    rows = read_metrics(job.folder / "run" / "metrics.jsonl")
    name = "train/tokens_per_second"
    return [row[name] for row in rows if name in row]


def joeynmt_command(job: Job) -> list[str]:
    config = _template("joeynmt.yaml")
    config["model_dir"] = str(job.folder / "run")
    config["use_cuda"] = job.device == "cuda"
    data, training = config["data"], config["training"]
    data["train"], data["dev"] = str(job.corpus / "train"), str(job.corpus / "dev")
    for side in ("src", "trg"):
        data[side]["voc_file"] = str(job.corpus / "vocabulary")
    training["updates"], training["logging_freq"] = job.steps, job.window
    training["validation_freq"] = job.window * NEVER
    return [job.python, "-m", "joeynmt", "train", _written(config, job), "--skip-test"]


def joeynmt_figures(job: Job, output: str) -> list[float]:
    log = (job.folder / "run" / "train.log").read_text("utf-8")
    return [float(figure) for figure in re.findall(r"Tokens per Sec: *([0-9]+)", log)]


def eole_command(job: Job) -> list[str]:
    config = _template("eole.yaml")
    config["src_vocab"] = str(job.corpus / "vocabulary")
    config["report_every"] = job.window
    for name, split in (("train", "train"), ("valid", "dev")):
        config["data"][name]["path_src"] = str(job.corpus / f"{split}.source")
        config["data"][name]["path_tgt"] = str(job.corpus / f"{split}.target")
    gpus = [0] if job.device == "cuda" else []
    config["training"] |= {
        "model_path": str(job.folder / "run"),
        "world_size": len(gpus),
        "gpu_ranks": gpus,
        "train_steps": job.steps,
        "valid_steps": NEVER,
        "save_checkpoint_steps": NEVER,
    }
    return [job.python, "-m", "eole.bin.main", "train", "--config", _written(config, job)]


def eole_figures(job: Job, output: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"/ *([0-9]+) tok/s;", output)]


@dataclass(frozen=True)
class Toolkit:
    """How to start a toolkit and what it wrote: target tokens a second of each window."""

    command: Callable[[Job], list[str]]
    figures: Callable[[Job, str], list[float]]


TOOLKITS = {
    "tx_lightning": Toolkit(tx_lightning_command, tx_lightning_figures),
    "joeynmt": Toolkit(joeynmt_command, joeynmt_figures),
    "eole": Toolkit(eole_command, eole_figures),
}


def _template(name: str) -> dict[str, Any]:
    config = yaml.safe_load((HERE / "baselines" / name).read_text("utf-8"))
    assert isinstance(config, dict)
    return config


def _written(config: dict[str, Any], job: Job) -> str:
    path = job.folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def measure(toolkit: Toolkit, job: Job, threads: int) -> float:
    """Run a toolkit once; return target tokens a second over all windows but the first.

    The first window holds start-up: reading the corpus, warming up the allocator.
    """
    job.folder.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
    done = subprocess.run(
        toolkit.command(job),
        env=environment,
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    (job.folder / "output.txt").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise SystemExit(f"error: exit status {done.returncode}, {job.folder}/output.txt:\n{last}")
    figures = toolkit.figures(job, done.stdout)[1:]
    if not figures:
        raise SystemExit(f"error: no figures after the first in {job.folder}")
    return statistics.harmonic_mean(figures)  # windows have about equal numbers of tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="TOOLKIT=PATH",
        help="the Python of joeynmt or eole; may be given for both",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--window", type=int, default=20, help="steps of one figure in the logs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    pythons = {"tx_lightning": sys.executable}
    pythons |= dict(word.split("=", 1) for word in arguments.python)
    if unknown := pythons.keys() - TOOLKITS.keys():
        parser.error(f"--python: {', '.join(unknown)} is none of {', '.join(TOOLKITS)}")

    work = Path(tempfile.mkdtemp(prefix="throughput_"))
    print(f"logs in {work}", flush=True)
    write_corpus(work)
    results: dict[str, list[float]] = {name: [] for name in pythons}
    for round_ in range(arguments.rounds):
        for name, python in pythons.items():
            folder = work / f"{name}-{round_}"
            sizes = (arguments.steps, arguments.window)
            job = Job(python, work, folder, *sizes, arguments.device)
            results[name].append(measure(TOOLKITS[name], job, arguments.threads))
            print(f"round {round_ + 1}  {name:<14}{results[name][-1]:8,.0f}", flush=True)

    ours = statistics.median(results["tx_lightning"])
    on = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    print(f"\n{on}, {arguments.threads} threads, torch {torch.__version__}")
    print("target tokens a second, median of the rounds (lowest to highest)")
    for name, figures in results.items():
        median = statistics.median(figures)
        spread = f"({min(figures):,.0f} to {max(figures):,.0f})"
        print(f"{name:<14}{median:8,.0f}  {spread:<20} ours / it {ours / median:5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
