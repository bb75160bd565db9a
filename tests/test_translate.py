"""The verb `translate`: lines in, lines out, with nothing but the checkpoint."""

import io
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tx_lightning.__main__ import main
from tx_lightning.checkpoints import checkpoint_record, load_task, write_atomically
from tx_lightning.data.tokenizers import Tokenizers, Words
from tx_lightning.models import EncoderDecoder
from tx_lightning.nn import LearnedPositions
from tx_lightning.tasks import Translation
from tx_lightning.text_verbs import read_lines

WORDS = "null eins zwei drei vier fünf sechs sieben acht neun".split()
NETWORK = {"d_model": 8, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 8}
LINES = ["eins zwei", "", "drei fünf sieben", "neun"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained task; its translations are nonsense, but always the same."""
    torch.manual_seed(2)
    task = Translation(16, lambda n: EncoderDecoder(n, **NETWORK))  # type: ignore[arg-type]
    tokenizer = Words().train(WORDS, 16)
    settings = {
        "class_path": "tx_lightning.tasks.Translation",
        "init_args": {
            "vocab_size": 16,
            "network": {"class_path": "tx_lightning.models.EncoderDecoder", "init_args": NETWORK},
            "test_decoding": {
                "class_path": "tx_lightning.decoding.Beam",
                "init_args": {"beam_size": 3, "length_penalty": 0.0},
            },
        },
    }
    record = checkpoint_record(settings, Tokenizers(tokenizer, tokenizer).to_dict())
    path = tmp_path_factory.mktemp("run") / "model.ckpt"
    content = {"state_dict": task.state_dict(), "global_step": 1, "tx_lightning": record}
    write_atomically(content, path)
    return path


@pytest.fixture
def verb(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run the verb on bytes; its status, the lines it wrote and what it complained of."""

    def run(given: bytes, *words: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
        status = main(["translate", str(checkpoint), *words])
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err

    return run


def test_each_line_has_its_translation_in_its_place(verb: Any, checkpoint: Path) -> None:
    text = "\n".join(LINES) + "\n"
    status, lines, _ = verb(text.encode())
    task = load_task(checkpoint)
    assert isinstance(task, Translation)
    assert status == 0
    assert lines == [hypotheses[0].text for hypotheses in task.translate(LINES)]
    assert lines[1] == ""
    assert all(lines[i] for i in (0, 2, 3))
    windows = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").rstrip().encode()
    assert verb(windows)[1] == lines
    assert verb(text.encode(), "--batch_size", "1")[1] == lines
    assert verb(b"")[:2] == (0, [])


def test_the_checkpoints_own_search_is_changed_by_words(verb: Any) -> None:
    text = "\n".join(LINES).encode()
    status, lines, _ = verb(text, "--beam_size", "3", "--n_best=2")
    rows = [line.split("\t") for line in lines]
    assert status == 0
    assert [row[0] for row in rows] == ["1", "1", "2", "3", "3", "4", "4"]
    assert [row[2] for row in rows if row[0] != "2"][::2] == [
        line for line in verb(text)[1] if line
    ]
    scores = [float(row[1]) for row in rows]
    assert scores[0] >= scores[1]
    penalized = verb(text, "--n_best=2", "--length_penalty", "1")[1]
    assert [row.split("\t")[1] for row in penalized] != [row[1] for row in rows]


def test_another_search_is_named_by_its_class(verb: Any) -> None:
    words = ["--decoding", "Sampling", "--decoding.n_samples", "2", "--decoding.seed=4"]
    status, lines, _ = verb(b"eins zwei\n", *words)
    assert (status, len(lines)) == (0, 2)
    assert verb(b"eins zwei\n", *words)[1] == lines
    text = b"eins zwei\n" * 4
    together, apart = (
        [row.split("\t")[2] for row in verb(text, *words, "--batch_size", size)[1]]
        for size in ("256", "1")
    )
    assert together == apart
    assert len(set(together)) > 2  # each line has draws of its own


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--beam_sise", "3"], "--beam_sise: there is no 'beam_sise' (did you mean 'beam_size'?)"),
        (["--decoding", "Beem"], "there is no class 'Beem' (did you mean 'Beam'?)"),
        (["--beam_size", "many"], "many is not int"),
        (["--device", "abacus"], "--device abacus: there is no such device"),
        (["--beam_size", "2", "--n_best", "3"], "n_best must be at most beam_size"),
    ],
)
def test_a_wrong_option_is_one_line(verb: Any, words: list[str], says: str) -> None:
    status, lines, said = verb(b"eins\n", *words)
    assert status in (1, 2)
    assert lines == []
    assert says in said
    assert len(said.splitlines()) == 1


def test_a_line_that_is_not_utf8_is_named_after_those_before_it(verb: Any) -> None:
    status, lines, said = verb(b"eins\nzwei\n\xff\nvier\n")
    assert status == 1
    assert len(lines) == 2
    assert said.startswith("error: standard input, line 3: not UTF-8")


def test_a_checkpoint_of_another_task_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.stand_ins import TinyTask

    settings = {"class_path": "tests.stand_ins.TinyTask", "init_args": {"vocab_size": 6}}
    record = checkpoint_record(settings, {"source": "{}"})
    content = {"state_dict": TinyTask(6).state_dict(), "global_step": 1, "tx_lightning": record}
    write_atomically(content, tmp_path / "tiny.ckpt")
    assert main(["translate", str(tmp_path / "tiny.ckpt"), "--trust", "tests"]) == 2
    assert "holds a TinyTask, not a Translation" in capsys.readouterr().err
    assert main(["translate"]) == 2
    assert "tx-lightning translate" in capsys.readouterr().out


def test_a_line_is_handed_on_before_the_next_one_comes() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as source:
        batches = read_lines(stream, most=3)
        source.write(b"one\n")
        assert next(batches) == ["one"]
        writer = threading.Thread(target=source.write, args=(b"two\nthree\nfour\nfive\n",))
        writer.start()
        writer.join()
        rest = next(batches)
        while len(rest) < 4:
            more = next(batches)
            assert len(more) <= 3
            rest += more
        assert rest == ["two", "three", "four", "five"]
        source.close()
        assert list(batches) == []


def test_a_line_beyond_the_positions_is_named_with_the_limit(
    verb: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = partial(LearnedPositions, max_length=4)
    task = Translation(16, partial(EncoderDecoder, positions=positions, **NETWORK))  # type: ignore[arg-type]
    tokenizer = Words().train(WORDS, 16)
    task.attach(Tokenizers(tokenizer, tokenizer))
    monkeypatch.setattr("tx_lightning.translate.load_task", lambda *_, **__: task)
    status, lines, said = verb(b"eins zwei drei\n\neins zwei drei vier\n", "--batch_size", "1")
    assert (status, len(lines)) == (1, 2)
    assert said == (
        "error: standard input, line 3: 4 tokens are too many for a sentence, at most 3 fit; the "
        "lines before this batch are translated\n"
    )


def test_numbers_in_the_settings_of_a_checkpoint_are_finite(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    search = content["tx_lightning"]["task"]["init_args"]["test_decoding"]["init_args"]
    for value, says in ((float("nan"), "nan"), (float("-inf"), "-inf"), (10**400, "1000000000")):
        search["length_penalty"] = value
        write_atomically(content, tmp_path / "forged.ckpt")
        assert main(["translate", str(tmp_path / "forged.ckpt")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"length_penalty: {says}" in line.replace('"length_penalty"', "length_penalty")
        assert "is not a finite number" in line
