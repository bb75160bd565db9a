"""The verb `generate`: prompts in, texts out, with nothing but the checkpoint."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tx_lightning.__main__ import main
from tx_lightning.checkpoints import checkpoint_record, load_task, write_atomically
from tx_lightning.data.tokenizers import ByteLevelBPE, Tokenizers
from tx_lightning.decoding import Beam, Decoding, Sampling
from tx_lightning.generate import SAMPLING
from tx_lightning.models import LanguageModel
from tx_lightning.tasks import LanguageModeling
from tx_lightning.tasks.continuation import continue_texts

NETWORK = {"d_model": 8, "n_heads": 2, "n_layers": 1, "context_length": 16, "dropout": 0.0}
SEARCH = {
    "class_path": "tx_lightning.decoding.Sampling",
    "init_args": {"temperature": 0.8, "seed": 3},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained task; its texts are nonsense, but always the same."""
    torch.manual_seed(2)
    task = LanguageModeling(264, lambda n: LanguageModel(n, **NETWORK))  # type: ignore[arg-type]
    for parameter in task.network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.5)
    tokenizer = ByteLevelBPE().train([], 264)
    settings = {
        "class_path": "tx_lightning.tasks.LanguageModeling",
        "init_args": {
            "vocab_size": 264,
            "network": {"class_path": "tx_lightning.models.LanguageModel", "init_args": NETWORK},
            "decoding": SEARCH,
        },
    }
    record = checkpoint_record(settings, Tokenizers.one(tokenizer).to_dict())
    path = tmp_path_factory.mktemp("run") / "model.ckpt"
    content = {"state_dict": task.state_dict(), "global_step": 1, "tx_lightning": record}
    write_atomically(content, path)
    return path


@pytest.fixture
def verb(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run the verb; its status, what it wrote and what it complained of."""

    def run(*words: str, given: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
        status = main(["generate", str(checkpoint), *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def expected(checkpoint: Path, prompts: list[str], decoding: Decoding, n: int) -> list[list[str]]:
    """The whole texts."""
    task = load_task(checkpoint)
    assert isinstance(task, LanguageModeling)
    found = continue_texts(
        task.network, task.tokenizer, prompts, decoding, max_new_tokens=n, past_context="slide"
    )
    return [[prompt + c.text for c in group] for prompt, group in zip(prompts, found, strict=True)]


def test_one_prompt_is_one_text_of_the_checkpoints_own_search(verb: Any, checkpoint: Path) -> None:
    status, out, _ = verb("--prompt", "Once: upon", "--max_new_tokens", "30")
    ((text,),) = expected(checkpoint, ["Once: upon"], Sampling(temperature=0.8, seed=3), 30)
    assert (status, out) == (0, text + "\n")
    assert len(text) > 20
    assert verb("--prompt=Once: upon", "--max_new_tokens=30", "--seed", "4")[1] != out
    assert verb("--prompt=Once: upon", "--max_new_tokens=30", "--temperature=0.8")[1] == out


def test_where_a_checkpoint_names_no_search_it_is_the_tasks() -> None:
    task = LanguageModeling(8, lambda n: LanguageModel(n, **NETWORK))  # type: ignore[arg-type]
    assert SAMPLING["class_path"] == "tx_lightning.decoding.Sampling"
    assert vars(task.decoding) == vars(Sampling(**SAMPLING["init_args"]))  # type: ignore[arg-type]


def test_a_single_text_is_written_while_it_comes(
    verb: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            pieces.append(self.getvalue())

    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        assert verb("--prompt", "ab", "--max_new_tokens", "30")[0] == 0
    ((text,),) = expected(checkpoint, ["ab"], Sampling(temperature=0.8, seed=3), 30)
    assert pieces[0] == "ab"
    assert len(set(pieces)) > 4
    assert pieces == sorted(pieces, key=len)
    assert terminal.getvalue() == text + "\n"


def test_several_texts_have_headers(verb: Any, checkpoint: Path) -> None:
    prompts = ["one two", "three"]
    words = ["--prompt", prompts[0], "--prompt", prompts[1], "--max_new_tokens", "6"]
    (one,), (two,) = expected(checkpoint, prompts, Sampling(temperature=0.8, seed=3), 6)
    several = f"--- prompt 1, sample 1 ---\n{one}\n--- prompt 2, sample 1 ---\n{two}\n"
    assert verb(*words)[1] == several
    samples = expected(checkpoint, prompts, Sampling(temperature=0.8, n_samples=2, seed=3), 6)
    out = verb(*words, "--n_samples", "2")[1]
    assert out == "".join(
        f"--- prompt {i + 1}, sample {j + 1} ---\n{samples[i][j]}\n"
        for i in range(2)
        for j in range(2)
    )
    lines = "\n".join(prompts).encode()
    assert verb(*words[4:], given=lines)[1] == several
    assert verb(*words[4:], "--batch_size", "1", given=lines)[1] == several
    assert verb(given=b"")[:2] == (0, "")


def test_json_has_one_object_a_line(verb: Any, checkpoint: Path) -> None:
    words = ["--prompt", "a: é", "--prompt", "b", "--beam_size=3", "--n_best=2", "--json", "true"]
    status, out, _ = verb(*words, "--max_new_tokens", "5")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        ("a: é", 1), ("a: é", 2), ("b", 1), ("b", 2)
    ]  # fmt: skip
    found = expected(checkpoint, ["a: é", "b"], Beam(beam_size=3, n_best=2), 5)
    assert [row["prompt"] + row["text"] for row in rows] == [*found[0], *found[1]]
    assert {type(row["log_prob"]) for row in rows} == {float}
    assert {row["finished"] for row in rows} <= {True, False}
    assert set(rows[0]) == {"prompt", "sample", "text", "log_prob", "finished"}
    # The best of a beam alone is one text, and one prompt alone has no header.
    assert verb("--prompt=b", "--beam_size=3", "--max_new_tokens=5")[1] == found[1][0] + "\n"


def test_a_new_document_may_begin_with_nothing(verb: Any) -> None:
    status, out, _ = verb("--prompt", "", "--new_document", "true", "--max_new_tokens", "4")
    assert status == 0
    assert out.strip()
    assert verb("--prompt=a", "--new_document=true")[1] != verb("--prompt=a")[1]


def test_all_tokens_come_where_the_text_may_not_end(verb: Any) -> None:
    words = ["--prompt=a", "--n_samples=30", "--max_new_tokens=40", "--json=true"]

    def finished(*more: str) -> set[bool]:
        return {json.loads(line)["finished"] for line in verb(*words, *more)[1].splitlines()}

    assert finished() == {True, False}
    assert finished("--stop_at_end", "false") == {False}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temprature", "3"], "there is no 'temprature' (did you mean 'temperature'?)"),
        (["--max_tokens", "3"], "there is no 'max_tokens' (did you mean 'max_new_tokens'?)"),
        (["--frobnicate", "3"], "--frobnicate: there is no 'frobnicate'"),
        (["--decoding", "Gredy"], "there is no class 'Gredy' (did you mean 'Greedy'?)"),
        (["--top_k", "many"], "many is not int"),
        (["--top_k=0"], "top_k must be at least 1; it is 0"),
        (["--temperature=0"], "temperature must be above 0; it is 0.0"),
        (["--top_k=2", "--beam_size=2"], "--beam_size (Beam) and --top_k (Sampling) belong to"),
        (["--past_context", "forget"], "past_context: forget is not one of 'refuse', 'slide'"),
        (["--stride", "17"], "stride must be between 1 and the 16 tokens of the context; it is 17"),
        (["--max_new_tokens", "0"], "max_new_tokens must be at least 1; it is 0"),
        (["--device", "abacus"], "--device abacus: there is no such device"),
        (["--prompt", ""], "error: prompt 2: it is empty, and there is nothing to continue"),
        (["--prompt", "\udcff"], "error: prompt 2: not UTF-8"),
        (
            ["--past_context=refuse", "--prompt=a text longer than that", "--max_new_tokens=2"],
            "error: prompt 2: it has 24 tokens, and the context of the network 16: shorten it",
        ),
        (
            ["--past_context=refuse", "--max_new_tokens", "20"],
            "prompt 1: its 4 tokens and 20 new ones are more than the context of 16 tokens: set ",
        ),
    ],
)
def test_a_wrong_option_is_one_line(verb: Any, words: list[str], says: str) -> None:
    status, out, said = verb("--prompt", "one", *words)
    assert status in (1, 2)
    assert out == ""
    assert says in said
    assert len(said.splitlines()) == 1


def test_a_wrong_line_is_named_after_those_before_it(verb: Any) -> None:
    words = ["--max_new_tokens", "3", "--batch_size", "1"]
    status, out, said = verb(*words, given=b"one\ntwo\n\nfour\n")
    assert status == 1
    assert out.count("---\n") == 2
    assert said.startswith("error: standard input, line 3: it is empty")
    status, out, said = verb(*words, given=b"one\ntwo\n\xff\n")
    assert status == 1
    assert out.count("---\n") == 2
    assert said.startswith("error: standard input, line 3: not UTF-8")


def test_a_reader_that_leaves_and_an_interrupt_end_it_quietly(
    verb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", closed)
        status, _, said = verb("--prompt", "one")
    assert (status, said) == (0, "")

    def interrupted(*words: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tx_lightning.generate.continue_texts", interrupted)
    assert verb("--prompt", "one") == (130, "", "")


def test_a_checkpoint_of_another_task_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.stand_ins import TinyTask

    settings = {"class_path": "tests.stand_ins.TinyTask", "init_args": {"vocab_size": 6}}
    record = checkpoint_record(settings, {"source": "{}"})
    content = {"state_dict": TinyTask(6).state_dict(), "global_step": 1, "tx_lightning": record}
    write_atomically(content, tmp_path / "tiny.ckpt")
    assert main(["generate", str(tmp_path / "tiny.ckpt"), "--trust", "tests"]) == 2
    assert "holds a TinyTask, not a LanguageModeling" in capsys.readouterr().err
    assert main(["generate"]) == 2
    assert "tx-lightning generate" in capsys.readouterr().out
