"""Every number, id and flag of a configuration that cannot be is refused before it is used."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification

from tests.weights import hugging_face as hf
from tests.weights.test_seq2seq import save as save_seq2seq
from tx_lightning.weights import WeightsError, import_weights
from tx_lightning.weights.configuration import Configuration
from tx_lightning.weights.importing import FAMILIES
from tx_lightning.weights.plans import Family

SIZES = {
    "gpt2": {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head"},
    "bert": {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    },
    "bart": {
        "vocab_size",
        "max_position_embeddings",
        "encoder_layers",
        "encoder_ffn_dim",
        "encoder_attention_heads",
        "decoder_layers",
        "decoder_ffn_dim",
        "decoder_attention_heads",
        "d_model",
    },
}
SIZES["marian"] = SIZES["bart"]
# Fields whose wrong value changes nothing, or which may be null.
FREE = {"num_labels", "id2label", "decoder_vocab_size", "n_inner", "classifier_dropout"}
NO_SIZE: list[Any] = [None, True, -1, 0, 1.0, 2.5, "16", [16], {}, 10**8, 10**30]
NO_SHARE: list[Any] = [None, True, -0.1, 1.0, 2, 10**400, "0.1", [], {}, float("inf"), float("nan")]
NO_ID: list[Any] = [
    True,
    -1,
    320,
    99999,
    10**30,
    1.0,
    "2",
    [],
    {},
    [99999],
    [2, 99999],
    float("nan"),
]
NO_FLAG: list[Any] = [None, 0, 1, "true", [], {}, 0.0]


def base(family: Family) -> dict[str, Any]:
    """The values of a small model."""
    small = {"vocab_size": hf.ROWS, "eos_token_id": 2, "pad_token_id": 1}
    if "decoder_start_token_id" in family.defaults:
        small["decoder_start_token_id"] = 2
    return {**family.defaults, **small}


def plan(family: Family, values: dict[str, Any]) -> None:
    """Read a configuration as far as it goes without other files."""
    config = Configuration(values, family.defaults, "F/config.json")
    config.check_token_ids()
    architecture = family.architectures[2 if family.model_type == "bert" else 0]
    family.plan(config, architecture, None)


def plan_and_ids(family: Family, values: dict[str, Any], tokens: dict[str, int]) -> None:
    """Read a configuration, and the special ids beside those of a tokenizer."""
    plan(family, values)
    family.special_ids(Configuration(values, family.defaults, "F/config.json"), tokens.get)


def wrong_values() -> Iterator[tuple[str, str, Any]]:
    """Each field of each family, with each value that it cannot have."""
    for name, family in FAMILIES.items():
        for field, value in base(family).items():
            if field in SIZES[name]:
                wrong: list[Any] = NO_SIZE
            elif field.endswith("_token_id"):
                wrong = NO_ID
            elif isinstance(value, bool):
                wrong = NO_FLAG
            elif isinstance(value, float):
                wrong = NO_SHARE
            elif isinstance(value, str):
                wrong = [None, 1, True, [], {}, "tanh", "", "GELU"]
            else:
                assert field in FREE or value is None, field
                continue
            yield from ((name, field, one) for one in wrong)


WRONG = list(wrong_values())


def test_every_field_is_tried() -> None:
    assert len(WRONG) > 500
    assert {name for name, _, _ in WRONG} == FAMILIES.keys()
    for family in FAMILIES.values():
        plan(family, base(family))


@pytest.mark.parametrize("name", FAMILIES)
def test_values_that_cannot_be_are_refused_in_one_line_that_names_them(name: str) -> None:
    family = FAMILIES[name]
    for _, field, value in (one for one in WRONG if one[0] == name):
        other = base(family)
        other[field] = value
        with pytest.raises(WeightsError) as caught:
            plan(family, other)
        line = str(caught.value)
        assert line.startswith("F/config.json: "), (field, value, line)
        assert " is " in line, (field, value, line)
        assert "supported: " in line, (field, value, line)
        assert "\n" not in line
        assert len(line) < 250, (field, value, line)
        paired = field.removeprefix("encoder").removeprefix("decoder")  # the other may be named
        assert paired in line, (field, value, line)


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("gpt2", {"n_head": 5}, "n_head is 5; supported: a divisor of n_embd, 768"),
        ("bert", {"num_attention_heads": 7}, "a divisor of hidden_size, 768"),
        ("bart", {"d_model": 1000}, "encoder_attention_heads is 16; supported: a divisor of"),
        ("bart", {"pad_token_id": 2}, "pad_token_id is 2; supported: an id that no other token"),
        ("bart", {"pad_token_id": 0}, "pad_token_id is 0; supported: an id that no other token"),
        ("marian", {"pad_token_id": 2}, "an id that no other token of a text has"),
        ("bart", {"eos_token_id": 3}, "3; supported: 2, the id of the tokenizer's eos_token"),
        ("bert", {"pad_token_id": 5}, "5; supported: 1, the id of the tokenizer's pad_token"),
        ("gpt2", {"eos_token_id": None}, "eos_token_id is null; supported: 0 to 319"),
        ("marian", {"decoder_start_token_id": None}, "decoder_start_token_id is null; supported"),
        ("marian", {"decoder_vocab_size": True}, "decoder_vocab_size is true; supported: 320"),
        ("marian", {"is_decoder": True}, "is_decoder is true; supported: false"),
    ],
)
def test_values_must_suit_each_other(name: str, changes: dict[str, Any], line: str) -> None:
    tokens = {"eos_token": 2, "unk_token": 3, "pad_token": 1, "cls_token": 4, "sep_token": 2}
    family = FAMILIES[name]
    with pytest.raises(WeightsError) as caught:
        plan_and_ids(family, {**base(family), **changes}, tokens)
    assert line in str(caught.value)


def test_a_default_that_does_not_suit_is_called_one() -> None:
    """Marian's default is the start token of a published model."""
    values = base(FAMILIES["marian"])
    del values["decoder_start_token_id"]
    with pytest.raises(WeightsError, match="decoder_start_token_id is 58100 by default; supported"):
        plan(FAMILIES["marian"], values)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family."""
    root = tmp_path_factory.mktemp("folders")
    model = hf.randomized(BertForSequenceClassification(hf.bert_config(num_labels=3)))
    hf.save(root / "bert", model, hf.bert_tokenizer(root / "words"))
    hf.save(root / "gpt2", hf.gpt2(), hf.gpt2_tokenizer(root / "pairs"))
    save_seq2seq(root / "bart", hf.bart())
    save_seq2seq(root / "marian", hf.marian())
    return {name: root / name for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_are_refused_before_anything_is_written(
    name: str, file: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = folders[name] / file
    before = path.read_text("utf-8") if path.is_file() else None
    values = {} if before is None else json.loads(before)
    try:
        for field in ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"):
            for value in (99999, -1, True, "2", [3, 99999]):
                path.write_text(json.dumps({**values, field: value}), "utf-8")
                with pytest.raises(WeightsError) as caught:
                    import_weights(str(folders[name]), tmp_path / "m.ckpt")
                assert str(caught.value).startswith(f"{path}: {field} is ")
                assert "supported: 0 to 319, as vocab_size is 320" in str(caught.value)
    finally:
        path.unlink() if before is None else path.write_text(before, "utf-8")
    assert list(tmp_path.iterdir()) == []


def test_huge_sizes_take_no_memory(folders: dict[str, Path], tmp_path: Path) -> None:
    """The file is compared before a network is built."""
    changes = [
        {"n_embd": 8_000_000, "n_head": 1},
        {"vocab_size": 9_999_999, "n_positions": 9_999_999},
        {"n_layer": 9_999},
        {"n_inner": 10_000_000},
    ]
    path = folders["gpt2"] / "config.json"
    before = path.read_text("utf-8")
    try:
        for change in changes:
            hf.change_json(path, **change)
            with pytest.raises(WeightsError, match="by config.json it would be|has no tensor"):
                import_weights(str(folders["gpt2"]), tmp_path / "m.ckpt")
            path.write_text(before, "utf-8")
    finally:
        path.write_text(before, "utf-8")


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "a", "1": "a"},
        {"0": "a", "1": 3},
        {"0": "a", "1": None},
        {"0": "a", "1": "b\nc"},
        {"0": "a", "1": "b\tc"},
        {"0": "a", "1": ""},
        {"0": "a", "1": ["b"]},
        {"0": "a", "2": "b"},
        {"1": "a", "-1": "b"},
        ["a", "b"],
        "ab",
        {},
    ],
)
def test_labels_are_names_of_one_line(labels: Any) -> None:
    values = {**base(FAMILIES["bert"]), "id2label": labels}
    with pytest.raises(WeightsError, match="id2label is .*; supported: "):
        plan(FAMILIES["bert"], values)


@pytest.mark.parametrize("number", [True, 0, 1, -3, 2.0, "2", None, 10**6])
def test_the_number_of_labels_is_a_size(number: Any) -> None:
    values = {**base(FAMILIES["bert"]), "num_labels": number}
    with pytest.raises(WeightsError, match="num_labels is .*; supported: "):
        plan(FAMILIES["bert"], values)
