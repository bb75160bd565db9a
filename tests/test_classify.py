"""The verb `classify`: lines in, labels out, with nothing but the checkpoint."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tasks.test_classification import Threes, make_data, make_task
from tests.tasks.test_classification import ready as attach
from tests.tasks.test_classification import settings as classifier
from tests.tasks.test_tagging import make_data as tagging_data
from tests.tasks.test_tagging import make_task as tagging_task
from tests.tasks.test_tagging import ready as attach_tags
from tests.tasks.test_tagging import settings as tagger
from tx_lightning import cli
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import checkpoint_record, load_task, write_atomically
from tx_lightning.tasks import Classification, Tagging
from tx_lightning.tasks.labels import LabelTask

LINES = ["three five", "", "one two three four", "nine"]


def write(task: LabelTask[Any], settings: dict[str, Any], path: Path) -> Path:
    """Write the checkpoint of an untrained task; its labels are nonsense, but always the same."""
    record = checkpoint_record(
        settings, task.require_tokenizers().to_dict(), labels=task.labels, n_texts=task.n_texts
    )
    content = {"state_dict": task.state_dict(), "global_step": 1, "tx_lightning": record}
    write_atomically(content, path)
    return path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    task = make_task()
    attach(make_data(), task)
    return write(task, classifier(), tmp_path / "single.ckpt")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    task = make_task()
    attach(make_data(Threes(pairs=True)), task)
    return write(task, classifier(), tmp_path / "pairs.ckpt")


@pytest.fixture
def tags(tmp_path: Path) -> Path:
    task = tagging_task()
    attach_tags(tagging_data(), task)
    return write(task, tagger(), tmp_path / "tags.ckpt")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the verb on bytes; its status, the lines it wrote and what it complained of."""

    def run(checkpoint: Path, given: bytes, *words: str) -> tuple[int, list[str], str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
        status = main(["classify", str(checkpoint), *words])
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err

    return run


def test_each_line_has_its_label_in_its_place(verb: Any, single: Path) -> None:
    text = "".join(f"{line}\n" for line in LINES).encode()
    status, lines, said = verb(single, text)
    task = load_task(single)
    assert isinstance(task, Classification)
    found = task.classify([line for line in LINES if line])
    expected = [f"{labels[0][0]}\t{labels[0][1]:.4f}" for labels in found]
    assert (status, said) == (0, "")
    assert lines == [expected[0], "", *expected[1:]]
    assert verb(single, text, "--batch_size", "1")[1] == lines
    assert verb(single, text.replace(b"\n", b"\r\n"))[1] == lines
    assert verb(single, b"")[:2] == (0, [])


def test_all_labels_and_json(verb: Any, single: Path) -> None:
    text = "\n".join(LINES).encode()
    _, best, _ = verb(single, text)
    _, lines, _ = verb(single, text, "--all", "true")
    assert [line.split("\t")[:2] for line in lines if line] == [
        line.split("\t") for line in best if line
    ]
    for line in lines:
        fields = line.split("\t")
        assert len(fields) == (6 if line else 1)
        probabilities = [float(p) for p in fields[1::2]]
        assert probabilities == sorted(probabilities, reverse=True)
    _, lines, _ = verb(single, text, "--all=true", "--json=true")
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in rows] == LINES
    assert rows[1] == {"text": "", "label": None, "probability": None, "probabilities": {}}
    for row, line in zip(rows, best, strict=True):
        if line:
            assert f"{row['label']}\t{row['probability']:.4f}" == line
            assert row["probabilities"][row["label"]] == row["probability"]
            assert sum(row["probabilities"].values()) == pytest.approx(1)
    (line,) = verb(single, b"one\n", "--json", "true")[1]
    assert list(json.loads(line)) == ["text", "label", "probability"]


def test_pairs_stand_between_tabs(verb: Any, pairs: Path) -> None:
    status, lines, _ = verb(pairs, b"three\tfive\n\nfive\tthree\n")
    task = load_task(pairs)
    assert isinstance(task, Classification)
    found = task.classify(["three", "five"], ["five", "three"])
    expected = [f"{labels[0][0]}\t{labels[0][1]:.4f}" for labels in found]
    assert (status, lines) == (0, [expected[0], "", expected[1]])
    (line,) = verb(pairs, b"three\tfive\n", "--json", "true")[1]
    assert list(json.loads(line)) == ["text", "second", "label", "probability"]
    for text, tabs in ((b"one\ttwo\nalone\n", 0), (b"one\ttwo\n1\t2\t3\n", 2)):
        status, lines, said = verb(pairs, text)
        assert status == 1
        assert said == (
            f"error: standard input, line 2 has {tabs} tabs; exactly one separates the two texts "
            "of a pair\n"
        )


def test_a_tagger_writes_the_tags_of_each_line(verb: Any, tags: Path) -> None:
    status, lines, said = verb(tags, b"1 21 2\n\n7\n")
    task = load_task(tags)
    assert isinstance(task, Tagging)
    found = task.tag([["1", "21", "2"], ["7"]])
    assert (status, said) == (0, "")
    assert lines == ["\t".join(found[0]), "", "\t".join(found[1])]
    _, lines, _ = verb(tags, b"1 21 2\n\n", "--json", "true")
    assert [json.loads(line) for line in lines] == [
        {"words": ["1", "21", "2"], "tags": found[0]},
        {"words": [], "tags": []},
    ]
    status, lines, said = verb(tags, b"1\n", "--all", "true")
    assert (status, lines) == (2, [])
    assert said == "error: --all true: a tagger gives each word one tag; leave it out\n"


def test_what_is_too_long_is_cut_and_said(verb: Any, single: Path, tags: Path) -> None:
    long = " ".join(["three"] * 40)
    text = f"one\n\n{long}\n{long} one\n".encode()
    for size in ("256", "1"):
        status, lines, said = verb(single, text, "--batch_size", size)
        assert status == 0
        assert len(lines) == 4
        assert said == (
            "too long for the network, and cut: 2 lines, the first of them line 3 with 42 tokens\n"
        )
    status, lines, said = verb(tags, b"1\n" + b"12 " * 30 + b"\n")
    assert len(lines[1].split("\t")) == 30
    assert said.startswith("too long for the network, and tagged in parts: 1 lines, the first of")


def test_a_line_that_is_not_utf8_is_named_after_those_before_it(verb: Any, single: Path) -> None:
    status, lines, said = verb(single, b"one\ntwo\n\xff\nfour\n")
    assert status == 1
    assert len(lines) == 2
    assert said.startswith("error: standard input, line 3: not UTF-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch_sise", "3"], "--batch_sise: there is no 'batch_sise' (did you mean 'batch_size"),
        (["--json", "perhaps"], "perhaps is not bool"),
        (["--device", "abacus"], "--device abacus: there is no such device"),
    ],
)
def test_a_wrong_option_is_one_line(verb: Any, single: Path, words: list[str], says: str) -> None:
    status, lines, said = verb(single, b"one\n", *words)
    assert status == 2
    assert lines == []
    assert says in said
    assert len(said.splitlines()) == 1


def test_a_checkpoint_of_another_task_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.stand_ins import TinyTask

    settings = {"class_path": "tests.stand_ins.TinyTask", "init_args": {"vocab_size": 6}}
    record = checkpoint_record(settings, {"source": "{}"})
    content = {"state_dict": TinyTask(6).state_dict(), "global_step": 1, "tx_lightning": record}
    write_atomically(content, tmp_path / "tiny.ckpt")
    assert main(["classify", str(tmp_path / "tiny.ckpt"), "--trust", "tests"]) == 2
    assert "holds a TinyTask, not a Classification or a Tagging" in capsys.readouterr().err
    torch.save({}, tmp_path / "empty.ckpt")
    assert main(["classify", str(tmp_path / "empty.ckpt")]) == 1
    assert "it is not a checkpoint" in capsys.readouterr().err
    assert main(["classify"]) == 2
    assert "tx-lightning classify" in capsys.readouterr().out


def experiment(folder: Path, data: str, source: str, model: str, network: str, **n: int) -> str:
    """Write a YAML file of a tiny run over the embedded language and return its path."""
    size = {"d_model": 8, "n_heads": 2, "n_layers": 1, "max_length": 64}
    encoder = {"class_path": "tx_lightning.models.TextEncoder", "init_args": size}
    sizes = {"n_train": 60, "n_val": 8, "n_test": 8}
    made_up = {"class_path": f"tx_lightning.data.{source}", "init_args": sizes}
    init_args = {"source": made_up, "vocab_size": 300, "batch_tokens": 256, "max_length": 64, **n}
    build = {"class_path": f"tx_lightning.models.{network}", "init_args": {"encoder": encoder}}
    config = {
        "data": {"class_path": f"tx_lightning.data.{data}", "init_args": init_args},
        "model": {"class_path": f"tx_lightning.tasks.{model}", "init_args": {"network": build}},
        "test_after": True,
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "val_check_interval": 2,
            "callbacks": [
                {"class_path": f"tx_lightning.callbacks.{name}"}
                for name in ("AttentionLogger", "ClassReport", "LongestBatch", "SampleLogger")
            ],
        },
    }
    path = folder / f"{model}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.mark.parametrize(
    ("data", "source", "model", "network", "link"),
    [
        ("ClassificationData", "GrammarPolarity", "Classification", "Classifier", "n_classes"),
        ("TaggingData", "GrammarTags", "Tagging", "Tagger", "n_tags"),
    ],
)
def test_from_yaml_to_labels(
    data: str,
    source: str,
    model: str,
    network: str,
    link: str,
    verb: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    n_labels = {"n_classes": 2, "n_tags": 5}[link]
    config = experiment(tmp_path, data, source, model, network, **{link: n_labels})
    assert main(["fit", "--config", config, "--name", "tiny"]) == 0
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "confusion/test.png", "confusion/val.png", "reports/test.json", "reports/val.json",
        "samples/val.jsonl", "samples/test.jsonl",
    }  # fmt: skip
    assert any(name.startswith("attention/encoder_self") for name in names)
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    status, lines, _ = verb(checkpoint, b"Die Frau lacht.\n\n")
    assert status == 0
    assert len(lines) == 2
    assert len(lines[0].split("\t")) == (2 if link == "n_classes" else 3)
    task = load_task(checkpoint)
    assert isinstance(task, LabelTask)
    assert task.n_classes == n_labels
    # A value that follows from the data's cannot be set apart from it.
    assert main(["fit", "--config", config, f"--model.{link}", "9"]) == 2


def test_tasks_without_classes_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiments = Path(__file__).resolve().parents[1] / "experiments"
    words = ["--config", str(experiments / "quickstart" / "translation.yaml")]
    with cli.process_restored():
        line = cli.CommandLine([*words, "--trainer.accelerator", "cpu"], run=False)
    assert "n_classes" not in line.config.model.init_args
    assert "n_tags" not in line.config.data.init_args
