"""`tx-lightning import` and `export`, and the verbs that use what they write."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from tests.weights import hugging_face as hf
from tx_lightning.__main__ import main
from tx_lightning.checkpoints import read_checkpoint
from tx_lightning.pretrained import Pretrained, initialize
from tx_lightning.tasks import Classification, LanguageModeling
from tx_lightning.weights import WeightsError, import_weights
from tx_lightning.weights.importing import IMPORTED, build_task


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    return hf.save(tmp_path / "theirs", hf.gpt2(), hf.gpt2_tokenizer(tmp_path / "tokenizer"))


def words_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")
    monkeypatch.setattr(sys, "stdin", stream)


def test_import_generate_export(
    gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models" / "gpt2.ckpt"
    assert main(["import", gpt2, "--output", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("GPT2LMHeadModel of ")
    assert said[0].endswith(" parameters, as LanguageModeling")
    assert said[-1].endswith("gpt2.ckpt")
    prompt = "the quick fox"
    words = ["generate", str(path), "--prompt", prompt, "--decoding", "Greedy"]
    assert main([*words, "--max_new_tokens", "8", "--json", "true"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    task = hf.load(path)
    assert isinstance(task, LanguageModeling)
    ids = torch.tensor(task.tokenizer.encode_batch([prompt]))
    theirs = AutoModelForCausalLM.from_pretrained(gpt2)
    unused = list(range(task.tokenizer.vocab_size, hf.ROWS))
    found = theirs.generate(
        ids, max_new_tokens=8, do_sample=False, suppress_tokens=unused, pad_token_id=0
    )
    assert text == task.tokenizer.decode_batch(found[:, ids.shape[1] :].tolist())[0]
    capsys.readouterr()
    assert main(["export", str(path), str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().out.startswith("GPT2LMHeadModel\n")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_the_checkpoint_is_a_whole_one_of_ours(gpt2: str, tmp_path: Path) -> None:
    assert main(["import", gpt2, "--output", str(tmp_path / "m.ckpt")]) == 0
    checkpoint = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 0
    assert checkpoint["tx_lightning"]["task"]["class_path"] == "tx_lightning.tasks.LanguageModeling"
    assert checkpoint["tx_lightning"]["versions"].keys() >= {"tx_lightning", "torch"}
    assert all(name.startswith("network.") for name in checkpoint["state_dict"])
    assert read_checkpoint(tmp_path / "m.ckpt").keys() == checkpoint.keys()
    assert checkpoint[IMPORTED]["config"]["model_type"] == "gpt2"


def test_a_classifier_classifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {0: "good", 1: "bad", 2: "so so"}
    model = hf.randomized(BertForSequenceClassification(hf.bert_config(id2label=labels)))
    tokenizer = hf.bert_tokenizer(tmp_path / "tokenizer")
    folder = hf.save(tmp_path / "theirs", model, tokenizer)
    path = tmp_path / "m.ckpt"
    assert main(["import", folder, "--output", str(path)]) == 0
    capsys.readouterr()
    texts = ["the quick fox", "Hello, lazy dog!", "unheard word"]
    words_in(monkeypatch, "\n".join(texts) + "\n")
    assert main(["classify", str(path)]) == 0
    found = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    for text, (label, probability) in zip(texts, found, strict=True):
        expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].detach()
        assert label == labels[int(expected.argmax())]
        assert float(probability) == pytest.approx(float(expected.max()), abs=1e-3)


def test_a_tagger_tags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {0: "O", 1: "NAME", 2: "PLACE"}
    model = hf.randomized(BertForTokenClassification(hf.bert_config(id2label=labels)))
    tokenizer = hf.bert_tokenizer(tmp_path / "tokenizer")
    folder = hf.save(tmp_path / "theirs", model, tokenizer)
    assert main(["import", folder, "--output", str(tmp_path / "m.ckpt")]) == 0
    capsys.readouterr()
    words_in(monkeypatch, "the quick fox jumps\n")
    assert main(["classify", str(tmp_path / "m.ckpt")]) == 0
    given = tokenizer("the quick fox jumps", return_tensors="pt")
    best = model(**given).logits[0].argmax(-1).tolist()
    first = [given.word_to_tokens(word).start for word in range(4)]
    assert capsys.readouterr().out == "\t".join(labels[best[i]] for i in first) + "\n"


def test_a_translator_translates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = hf.sentence_pieces(tmp_path / "theirs")
    model = hf.marian(rows)
    model.save_pretrained(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), "--output", str(tmp_path / "m.ckpt")]) == 0
    capsys.readouterr()
    words_in(monkeypatch, "the quick fox\n\nHello world!\n")
    assert main(["translate", str(tmp_path / "m.ckpt"), "--beam_size", "2"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 4
    assert lines[0]
    assert lines[2]
    assert lines[1] == lines[3] == ""


def test_a_task_may_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = hf.bert_tokenizer(tmp_path / "tokenizer")
    folder = hf.save(tmp_path / "theirs", BertModel(hf.bert_config()), tokenizer)
    words = ["import", folder, "--output", str(tmp_path / "m.ckpt")]
    assert main(words) == 1
    assert "error: a BertModel has no head: say with --task" in capsys.readouterr().err
    assert main([*words, "--task", "Classification", "--n_texts", "2"]) == 0
    assert "new, and to be trained: head.weight, head.bias" in capsys.readouterr().out
    task = hf.load(tmp_path / "m.ckpt")
    assert isinstance(task, Classification)
    assert (task.labels, task.n_texts) == (["LABEL_0", "LABEL_1"], 2)


def test_errors_are_one_line(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) in (1, 2)
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    out = str(tmp_path / "m.ckpt")
    assert "there is no such folder" in said("import", "./nowhere", "--output", out)
    assert "required: output" in said("import", gpt2)
    assert "did you mean" in said("import", gpt2, "--outptu", out)
    assert main(["import", gpt2, "--output", out]) == 0
    assert "exists already" in said("import", gpt2, "--output", out)
    assert "exists already" in said("export", out, gpt2)
    assert "there is no such file" in said("export", out + "x", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("import x", 2, "required: output"),
        ("import --output m.ckpt", 2, "required: source"),
        ("import x y --output m.ckpt", 2, "unrecognized arguments: y"),
        ("import x --output", 2, "expected one argument"),
        ("import x --output m.ckpt --n_texts 3", 2, "3 is not one of 1, 2"),
        ("import x --output m.ckpt --n_texts two", 2, "n_texts"),
        ("import x --output .", 1, ". is a folder: give the name of a file"),
        ("import x --output file/m.ckpt", 1, "file/m.ckpt cannot be written: "),
        ("import file --output m.ckpt", 1, "file is a file; give the folder that it is in"),
        ("import ~nobody-here/x --output m.ckpt", 1, "there is no such folder"),
        (f"import {'a' * 300} --output m.ckpt", 1, "there is no such folder"),
        ("import a/b/c --output m.ckpt", 1, "a/b/c: there is no such folder"),
        ("import a\x0bb --output m.ckpt", 1, "there is no such folder"),
        ("import empty --output m.ckpt", 1, "empty has no config.json; it is empty"),
        ("export x", 2, "required: folder"),
        ("export x y z", 2, "unrecognized arguments: z"),
        ("export x y --z 3", 2, "there is no 'z'"),
        ("export x y", 1, "checkpoint x: there is no such file"),
        ("export file y", 1, "checkpoint file"),
        ("export x file", 1, "file exists already: choose a new folder"),
        ("export x file/y", 1, "file/y cannot be written: "),
        (f"export x {'a' * 300}", 1, "cannot be written: "),
    ],
)
def test_missing_surplus_and_impossible_words(
    words: str,
    status: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert main(words.split(" ")) == status
    error = capsys.readouterr().err
    assert line in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_pairs_of_texts_are_for_classifiers(gpt2: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--n_texts 2: a LanguageModeling takes one text"):
        import_weights(gpt2, tmp_path / "m.ckpt", n_texts=2)
    with pytest.raises(WeightsError, match="--n_texts 3: a classifier takes 1 or 2 texts"):
        import_weights(gpt2, tmp_path / "m.ckpt", n_texts=3)


def test_what_a_folder_cannot_say_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf.trained(tmp_path / "m.ckpt", "marian", steps=0)
    assert main(["export", str(tmp_path / "m.ckpt"), str(tmp_path / "out")]) == 0
    first, *notes, last = capsys.readouterr().out.splitlines()
    assert first == "MarianMTModel"
    assert notes[0].startswith("length_penalty 0.6 is written as 0.48: ")
    assert notes[1].startswith("the length limit is 1,024 tokens: ")
    assert len(notes) == 2
    assert last.endswith("out")


@pytest.mark.parametrize("verb", ["import", "export"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"tx-lightning {verb}" in capsys.readouterr().out
    assert main([verb]) == 2


def test_transformers_is_not_needed(tmp_path: Path, gpt2: str) -> None:
    program = (
        "import sys, tx_lightning.tasks\n"  # torchmetrics imports transformers where it is there
        "sys.modules['transformers'] = sys.modules['sentencepiece'] = None\n"
        "from tx_lightning.__main__ import main\n"
        f"assert main(['import', {gpt2!r}, '--output', 'm.ckpt']) == 0\n"
        "assert main(['export', 'm.ckpt', 'out']) == 0\n"
        "assert main(['import', 'marian', '--output', 'n.ckpt']) == 0\n"
    )
    rows = hf.sentence_pieces(tmp_path / "marian")
    hf.marian(rows).save_pretrained(tmp_path / "marian")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_training_goes_on_from_it(tmp_path: Path) -> None:
    """Fine-tuning takes all weights, and what was trained on is exported again."""
    tokenizer = hf.bert_tokenizer(tmp_path / "tokenizer")
    model: Any = hf.randomized(BertForMaskedLM(hf.bert_config()))
    folder = hf.save(tmp_path / "theirs", model, tokenizer)
    assert main(["import", folder, "--output", str(tmp_path / "m.ckpt")]) == 0
    settings = read_checkpoint(tmp_path / "m.ckpt")["tx_lightning"]["task"]
    task: Any = build_task(settings)
    loaded = initialize(task, Pretrained.read(tmp_path / "m.ckpt"))
    assert (loaded.new, loaded.unused, loaded.share) == ({}, [], 1.0)
