"""import -> export -> import: the same checkpoint, whatever the family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    GenerationConfig,
)

from tests.weights import hugging_face as hf
from tests.weights.test_seq2seq import save as save_seq2seq
from tx_lightning.checkpoints import RECORD, CheckpointError, read_checkpoint
from tx_lightning.weights import export_weights, import_weights
from tx_lightning.weights.exporting import export_checkpoint
from tx_lightning.weights.importing import IMPORTED

Build = Callable[[Path], Any]
LABELS = {0: "so so", 1: "Straße", 2: "é!"}


def bert(kind: Any) -> Build:
    def build(folder: Path) -> None:
        config = hf.bert_config(id2label=LABELS, hidden_act="gelu", classifier_dropout=0.3)
        hf.save(folder, hf.randomized(kind(config)), hf.bert_tokenizer(folder.with_name("words")))

    return build


def gpt2(folder: Path) -> None:
    model = hf.gpt2(activation_function="gelu_fast", n_inner=40, layer_norm_epsilon=1e-4)
    hf.save(folder, model, hf.gpt2_tokenizer(folder.with_name("pairs")))


def vocabulary(folder: Path) -> None:
    """GPT-2 with a vocabulary and merges in place of tokenizer.json."""
    gpt2(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    for path in folder.with_name("pairs").iterdir():
        path.rename(folder / path.name)


def bart(folder: Path) -> None:
    model = hf.bart(scale_embedding=True)
    model.generation_config = GenerationConfig(
        num_beams=3, max_length=40, length_penalty=0.0, no_repeat_ngram_size=3, min_length=4,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_bos_token_id=0,
    )  # fmt: skip
    save_seq2seq(folder, model)


def marian(folder: Path) -> None:
    rows = hf.sentence_pieces(folder)
    hf.marian(rows, activation_function="swish", max_position_embeddings=64).save_pretrained(folder)
    hf.change_json(folder / "config.json", bos_token_id=0)


def wide_marian(folder: Path) -> None:
    """Of more rows than its tokenizer has entries, padding beyond them, and a short config.json."""
    save_seq2seq(folder, hf.marian(share_encoder_decoder_embeddings=False))
    path = folder / "config.json"
    values = json.loads(path.read_text("utf-8"))
    for name in ("max_position_embeddings", "scale_embedding", "dropout", "decoder_vocab_size"):
        del values[name]
    path.write_text(json.dumps(values), "utf-8")


BUILDS: dict[str, Build] = {
    "masked": bert(BertForMaskedLM),
    "classifier": bert(BertForSequenceClassification),
    "vocabulary": vocabulary,
    "bart": bart,
    "marian": marian,
    "wide marian": wide_marian,
}


def check_equal(one: Any, other: Any, where: str) -> None:
    """Compare what two checkpoints hold, tensors bit by bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            check_equal(value, other[key], f"{where}.{key}")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("name", BUILDS)
def test_the_same_checkpoint_comes_back(name: str, tmp_path: Path) -> None:
    BUILDS[name](tmp_path / "theirs")
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    import_weights(str(tmp_path / "theirs"), first)
    export_weights(first, tmp_path / "ours")
    import_weights(str(tmp_path / "ours"), second)
    before, after = read_checkpoint(first), read_checkpoint(second)
    check_equal(before, after, name)
    assert before[IMPORTED]["config"] == json.loads(
        (tmp_path / "theirs" / "config.json").read_text("utf-8")
    )
    if name == "classifier":
        assert after[RECORD]["labels"] == list(LABELS.values())


def test_a_checkpoint_of_half_precision_says_what_it_became(tmp_path: Path) -> None:
    gpt2(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    values = json.loads(config.read_text("utf-8"))
    del values["dtype"]
    config.write_text(json.dumps({**values, "torch_dtype": "float16"}), "utf-8")
    import_weights(str(tmp_path / "theirs"), tmp_path / "m.ckpt")
    export_weights(tmp_path / "m.ckpt", tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text("utf-8"))
    assert written == {**values, "dtype": "float32"}


def test_what_another_file_says_of_ids_is_taken_over(tmp_path: Path) -> None:
    """transformers generates with the ids of generation_config.json."""
    bart(tmp_path / "theirs")
    hf.change_json(tmp_path / "theirs" / "generation_config.json", decoder_start_token_id=0)
    import_weights(str(tmp_path / "theirs"), tmp_path / "m.ckpt")
    assert hf.load(tmp_path / "m.ckpt").tokenizer.bos_id == 0
    hf.change_json(tmp_path / "theirs" / "generation_config.json", eos_token_id=[2, 5])
    imported = import_weights(str(tmp_path / "theirs"), tmp_path / "n.ckpt")
    assert imported.notes == [
        "generation_config.json has several eos_token_id, [2, 5]: only that of config.json is used"
    ]


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    path, name = tmp_path / "m.ckpt", "encoder.layers.1.feed_forward.outer.bias"
    hf.trained(path, "bart", steps=0)
    for value in (float("nan"), float("inf"), float("-inf")):

        def spoil(checkpoint: Any, value: float = value) -> None:
            checkpoint["state_dict"][f"network.{name}"][7] = value

        hf.change_checkpoint(path, spoil)
        with pytest.raises(CheckpointError) as caught:
            export_weights(path, tmp_path / "ours")
        line = f"checkpoint {path}: {name} has 1 of 16 values that are not finite, "
        assert str(caught.value).startswith(line)
        assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("entry", [3, [], {"config": 3}, {"kept": []}, {"generation": "x"}])
def test_a_damaged_entry_of_an_import_is_refused(entry: Any, tmp_path: Path) -> None:
    hf.trained(tmp_path / "m.ckpt", "bart", steps=0)

    def spoil(checkpoint: Any) -> None:
        checkpoint[IMPORTED] = entry

    hf.change_checkpoint(tmp_path / "m.ckpt", spoil)
    with pytest.raises(CheckpointError, match=r"m\.ckpt is damaged: 'imported' is not"):
        export_weights(tmp_path / "m.ckpt", tmp_path / "ours")


def test_an_old_import_of_marian_is_written_with_plain_padding(tmp_path: Path) -> None:
    """Earlier versions kept <pad> among the pieces, out of reach behind spaces."""
    marian(tmp_path / "theirs")
    import_weights(str(tmp_path / "theirs"), tmp_path / "m.ckpt")

    def age(checkpoint: Any) -> None:
        for side, text in checkpoint[RECORD]["tokenizers"].items():
            settings = json.loads(text)
            assert settings["added_tokens"].pop()["content"] == "<pad>"
            settings["model"]["vocab"].append([" <pad>  ", -1.0])
            checkpoint[RECORD]["tokenizers"][side] = json.dumps(settings)

    hf.change_checkpoint(tmp_path / "m.ckpt", age)
    before = hf.load(tmp_path / "m.ckpt")
    exported = export_checkpoint(tmp_path / "m.ckpt", tmp_path / "ours")
    assert not [note for note in exported.notes if "last token" in note]
    names = json.loads((tmp_path / "ours" / "special_tokens_map.json").read_text("utf-8"))
    assert names["pad_token"] == "<pad>"
    import_weights(str(tmp_path / "ours"), tmp_path / "n.ckpt")
    after = hf.load(tmp_path / "n.ckpt")
    for side in ("source", "target"):
        old, new = (vars(task.require_tokenizers())[side] for task in (before, after))
        assert new.entries() == old.entries()
        assert new.entries()[-1] == "<pad>"
        assert hf.encoded(new) == hf.encoded(old)
        assert (new.pad_id, new.bos_id, new.eos_id) == (old.pad_id, old.bos_id, old.eos_id)
