"""Whatever bytes a file holds: it is read, or one line names it; never another error.

A fuzzer with a seed: each file of a folder is changed in many ways and read again by the function
that `import` reads it with.
"""

import base64
import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import BertTokenizer

from tests.weights import hugging_face as hf
from tests.weights.test_folders import Payload, shard
from tx_lightning.weights import WeightsError, import_weights
from tx_lightning.weights.configuration import Configuration
from tx_lightning.weights.folders import read_config, read_json, read_tensors
from tx_lightning.weights.importing import FAMILIES
from tx_lightning.weights.sentencepieces import check_charsmap, read_pieces
from tx_lightning.weights.tokenizer_files import read_tokenizers

TRIES = 60  # of each file
WORDS = [
    *b'null -1 1e999 NaN -Infinity [] {} true 99999 4294967296 0 1.5 "x" "" "\\ud800"'.split(),
    *(b"\xff\xfe", b"\0", b"\xef\xbb\xbf", b"[" * 3000, b"9" * 5000, b"\n\n", b"\r"),
]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Other bytes: cut, changed, with something put in, taken out or copied, or all random."""
    found, place = bytearray(data), chance.randrange(len(data))
    kind, length = chance.randrange(8), chance.choice([1, 2, 8, 60])
    if kind == 0:
        return data[:place]
    if kind == 1:
        return chance.randbytes(chance.choice([0, 1, 8, 300]))
    if kind == 2:
        del found[place : place + length]
    elif kind == 3:
        found[place:place] = chance.randbytes(length)
    elif kind == 4:
        other = chance.randrange(len(data))
        found[place : place + length] = data[other : other + length]
    elif kind == 5:
        for _ in range(length):
            found[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == 6:
        found[place : place + chance.choice([0, 1, 4])] = chance.choice(WORDS)
    else:
        spans = [number.span() for number in re.finditer(rb"-?\d+(\.\d+)?", data[:4000])]
        begin, end = chance.choice(spans or [(place, place)])
        found[begin:end] = chance.choice(WORDS)
    return bytes(found)


def check(path: Path, read: Callable[[], object], seed: int, tries: int = TRIES) -> None:
    """Damage a file again and again and read it."""
    data, chance = path.read_bytes(), random.Random(f"{path.name} {seed}")
    refused = 0
    for _ in range(tries):
        content = mutated(data, chance)
        path.write_bytes(content)
        try:
            read()
        except WeightsError as error:
            refused += 1
            line = str(error)
            assert str(path.parent) in line, (line, content[:200])  # it, or what does not suit it
            assert line.isprintable(), line
            assert len(line) < 1100, line
        except BaseException as error:
            raise AssertionError(f"{path.name}: {error!r} of {content!r}") from error
    path.write_bytes(data)
    read()
    assert refused > tries / 5


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of GPT-2 with its vocabulary beside it."""
    folder = tmp_path_factory.mktemp("damaged") / "gpt2"
    hf.save(folder, hf.gpt2(), hf.gpt2_tokenizer(folder.with_name("pairs")))
    return folder


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "marian"
    rows = hf.sentence_pieces(folder)
    ids = {"pad_token_id": rows - 1, "decoder_start_token_id": rows - 1}
    values = {"model_type": "marian", "vocab_size": rows, **ids}
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return folder


def configuration(folder: Path, family: str) -> Configuration:
    values = read_config(folder)
    return Configuration(values, FAMILIES[family].defaults, str(folder / "config.json"))


def tokenizers(folder: Path, family: str) -> Callable[[], object]:
    """A reading of the tokenizers of a folder, whose configuration is whole."""
    config = configuration(folder, family)
    return lambda: read_tokenizers(folder, config, FAMILIES[family])


@pytest.mark.parametrize("kind", ["safetensors", "bin", "legacy"])
def test_weights(kind: str, gpt2: Path, tmp_path: Path) -> None:
    tensors = load_file(gpt2 / "model.safetensors")
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "bin")
    check(path, lambda: read_tensors(tmp_path), seed=1, tries=2 * TRIES)
    begin = 2000 if kind == "bin" else 900  # where names, shapes and opcodes are
    whole = path.read_bytes()
    path.write_bytes(whole[:begin])

    def read() -> None:
        head = path.read_bytes()
        path.write_bytes(head + whole[begin:])
        try:
            read_tensors(tmp_path)
        finally:
            path.write_bytes(head)

    check(path, read, seed=2, tries=2 * TRIES)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index(suffix: str, gpt2: Path, tmp_path: Path) -> None:
    shutil.copy(gpt2 / "model.safetensors", tmp_path)
    shard(tmp_path, suffix)
    [index] = tmp_path.glob("*.index.json")
    check(index, lambda: read_tensors(tmp_path), seed=2)


@pytest.mark.parametrize(
    "shards", [None, 3, [], {}, {"x": 3}, {"x": ["y"]}, {"x": None}, {"x": ""}, {"x": "."}]
)
def test_an_index_that_names_no_files(shards: Any, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}), "utf-8")
    with pytest.raises(WeightsError, match="weight_map|must lie beside its index"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("place", ["../{}", "{}/../x.bin", "sub/{}", "/{}", "./../{}"])
def test_a_shard_lies_beside_its_index(place: str, gpt2: Path, tmp_path: Path) -> None:
    """It may be a link to elsewhere, as in the hub's cache, but it is named without a folder."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for outside in (tmp_path / "x.bin", folder / "sub" / "x.bin"):
        torch.save({"x": torch.ones(1)}, outside)
    name = place.format("x.bin") if place != "/{}" else str(tmp_path / "x.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}), "utf-8")
    with pytest.raises(WeightsError, match="missing in its folder: a shard must lie beside"):
        read_tensors(folder)
    (folder / "x.bin").symlink_to(tmp_path / "x.bin")
    index.write_text(json.dumps({"weight_map": {"x": "x.bin"}}), "utf-8")
    assert torch.equal(read_tensors(folder)[0]["x"], torch.ones(1))


def test_a_tensor_comes_from_the_shard_that_the_index_names(tmp_path: Path) -> None:
    for shard_, number in (("a.bin", 1.0), ("b.bin", 2.0)):
        torch.save({"x": torch.tensor(number), "y": torch.tensor(number)}, tmp_path / shard_)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.bin", "y": "b.bin"}}), "utf-8")
    tensors, _ = read_tensors(tmp_path)
    assert (float(tensors["x"]), float(tensors["y"])) == (1.0, 2.0)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json(name: str, gpt2: Path) -> None:
    check(gpt2 / name, lambda: read_json(gpt2 / name), seed=3, tries=4 * TRIES)


def test_a_configuration(gpt2: Path) -> None:
    """What is JSON still has to be what a configuration is."""
    family = FAMILIES["gpt2"]

    def read() -> None:
        config = configuration(gpt2, "gpt2")
        config.check_token_ids()
        family.plan(config, "GPT2LMHeadModel", None)

    check(gpt2 / "config.json", read, seed=4, tries=4 * TRIES)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_tokenizer(name: str, gpt2: Path) -> None:
    if not (gpt2 / name).is_file():
        (gpt2 / name).write_text(json.dumps({"eos_token": "<|endoftext|>"}), "utf-8")
    check(gpt2 / name, tokenizers(gpt2, "gpt2"), seed=5)


def test_a_vocabulary_and_its_merges(gpt2: Path, tmp_path: Path) -> None:
    shutil.copy(gpt2 / "config.json", tmp_path)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(gpt2.with_name("pairs") / name, tmp_path)
    read = tokenizers(tmp_path, "gpt2")
    check(tmp_path / "vocab.json", read, seed=6)
    check(tmp_path / "merges.txt", read, seed=7)


def test_word_pieces(tmp_path: Path) -> None:
    hf.bert_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 320}', "utf-8")
    check(tmp_path / "vocab.txt", tokenizers(tmp_path, "bert"), seed=8)


def spm(path: Path, rule: str) -> None:
    """Write a SentencePiece model with a normalization of characters."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(hf.TEXTS),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def test_sentence_pieces(marian: Path) -> None:
    check(marian / "vocab.json", tokenizers(marian, "marian"), seed=9, tries=TRIES // 3)
    spm(marian / "source.spm", "identity")
    check(marian / "source.spm", tokenizers(marian, "marian"), seed=10, tries=3 * TRIES)


def test_a_normalization_of_characters(tmp_path: Path) -> None:
    """The library follows its pointers without a check: at some texts the program would end."""
    path = tmp_path / "source.spm"
    spm(path, "nmt_nfkc")
    charsmap, chance = read_pieces(path).charsmap, random.Random(11)
    check_charsmap(charsmap)
    every = "".join(map(chr, [*range(1, 0x3000), *range(0xF900, 0x10000)]))
    accepted = 0
    for _ in range(TRIES):
        data = bytearray(charsmap)
        for _ in range(chance.choice([1, 1, 10, 100])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            check_charsmap(bytes(data))
        except ValueError:
            continue
        accepted += 1
        normalizers.Precompiled(bytes(data)).normalize_str(every)
    assert accepted > 5


def test_each_fault_of_a_normalization_is_found(tmp_path: Path) -> None:
    path = tmp_path / "source.spm"
    spm(path, "nmt_nfkc")
    charsmap = read_pieces(path).charsmap
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap[4 : 4 + size], "<u4").copy()
    strings = charsmap[4 + size :]
    value = int(np.flatnonzero(units >> 31)[7])
    has_leaf = (units >> 31 == 0) & (units >> 8 & 1 == 0)
    longer = int(np.flatnonzero(has_leaf & (units >> 10 > 0))[3])

    def refused(line: str, **changes: Any) -> None:
        other = units.copy()
        for place, unit in changes.get("units", {}).items():
            other[place] = unit
        tail = changes.get("strings", strings)
        with pytest.raises(ValueError, match=line):
            check_charsmap(charsmap[:4] + other.tobytes() + tail)

    refused("points into a string", units={value: units[value] + 1})
    refused("points into a string", units={value: (1 << 31) + len(strings)})
    refused("points beyond its end", units={longer: 0x7FFFFC00})
    refused("lacks a value", units={longer: units[longer] | 1 << 8})
    refused("is incomplete", strings=strings[:-1])
    refused("is incomplete", strings=b"")
    refused("can't decode", strings=b"\xff" + strings[1:])


def test_a_normalization_is_checked_inside_a_tokenizer_as_well(
    marian: Path, tmp_path: Path
) -> None:
    for file in marian.iterdir():
        shutil.copy(file, tmp_path)
    spm(tmp_path / "source.spm", "nmt_nfkc")
    whole = read_tokenizers(tmp_path, configuration(tmp_path, "marian"), FAMILIES["marian"])
    settings = json.loads(whole.source.to_json())
    del settings["tx_lightning"]
    for file in tmp_path.glob("*.spm"):
        file.unlink()
    path = tmp_path / "tokenizer.json"
    [precompiled] = [
        part for part in settings["normalizer"]["normalizers"] if part["type"] == "Precompiled"
    ]
    data = bytearray(base64.b64decode(precompiled["precompiled_charsmap"]))
    path.write_text(json.dumps(settings), "utf-8")
    tokenizers(tmp_path, "marian")()
    data[4:8] = b"\xff\xff\xff\x7f"  # the root of the trie
    precompiled["precompiled_charsmap"] = base64.b64encode(data).decode()
    path.write_text(json.dumps(settings), "utf-8")
    with pytest.raises(WeightsError, match="tokenizer.json is no usable tokenizer: its normaliz"):
        tokenizers(tmp_path, "marian")()


# What is whole, and not weights


@pytest.mark.parametrize("place", ["value", "key", "list", "whole"])
@pytest.mark.parametrize("new", [True, False])
def test_no_pickle_runs_code(place: str, new: bool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    payload = Payload(f"touch {ran}")
    content: dict[str, Any] = {
        "value": {"x": torch.ones(1), "y": payload},
        "key": {(payload, 1): torch.ones(1)},
        "list": {"x": [torch.ones(1), {"z": payload}]},
        "whole": payload,
    }
    path = tmp_path / "pytorch_model.bin"
    torch.save(content[place], path, _use_new_zipfile_serialization=new)
    with pytest.raises(WeightsError, match="pytorch_model.bin is refused: it is damaged, or holds"):
        read_tensors(tmp_path)
    path.write_bytes(pickle.dumps(content[place]))
    with pytest.raises(WeightsError, match="pytorch_model.bin is "):
        read_tensors(tmp_path)
    assert not ran.exists()


def test_names_of_tensors_cannot_break_a_line(tmp_path: Path) -> None:
    torch.save({"a\n\x1b[31mb": torch.ones(1), "c": 1}, tmp_path / "pytorch_model.bin")
    torch.save({"a\n\x1b[31mb": 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError) as caught:
        read_tensors(tmp_path)
    assert "holds more than tensors: a\\n\\x1b[31mb" in str(caught.value)
    torch.save({1: torch.ones(1), None: torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="holds more than tensors: 1, None"):
        read_tensors(tmp_path)


WEIGHT = "transformer.h.0.mlp.c_fc.weight"


def with_tensor(folder: Path, tensor: torch.Tensor, name: str = WEIGHT) -> str:
    """What import says of a folder in which one tensor is another."""
    tensors = load_file(folder / "model.safetensors")
    path = folder / "pytorch_model.bin"
    torch.save({**tensors, name: tensor}, path)
    (folder / "model.safetensors").rename(folder / "aside")
    output = folder.with_name("m.ckpt")
    try:
        with pytest.raises(WeightsError) as caught:
            import_weights(str(folder), output)
    finally:
        (folder / "aside").rename(folder / "model.safetensors")
        path.unlink()
    assert not output.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "line"),
    [
        (torch.zeros(16, 64, dtype=torch.int8), "has type int8; supported: float32, float16, bf"),
        (torch.zeros(16, 64, dtype=torch.bool), "has type bool"),
        (torch.zeros(16, 64, dtype=torch.complex64), "has type complex64"),
        (torch.zeros(16, 64, dtype=torch.float8_e4m3fn), "has type float8_e4m3fn"),
        (torch.zeros(16, 64).to_sparse(), "does not store all its elements"),
        (torch.zeros(1).expand(16, 64), "does not store all its elements"),
        (torch.zeros(1).expand(10**7, 10**7), "does not store all its elements"),
        (torch.zeros(16, 64, device="meta"), "does not store all its elements"),
        (torch.zeros(64, 16), "is (64, 16), but by config.json it would be (16, 64)"),
    ],
)
def test_tensors_of_another_kind_are_refused(tensor: torch.Tensor, line: str, gpt2: Path) -> None:
    assert f"{WEIGHT} {line}" in with_tensor(gpt2, tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_with_their_name(value: float, gpt2: Path) -> None:
    tensor = torch.zeros(16, 64, dtype=torch.float64)
    tensor[3, 5:7] = value
    line = with_tensor(gpt2, tensor)
    assert f"pytorch_model.bin: {WEIGHT} has 2 of 1,024 values that are not finite" in line


def test_a_name_may_not_come_twice(gpt2: Path) -> None:
    line = with_tensor(gpt2, torch.zeros(hf.ROWS, 16), "wte.weight")
    assert "has transformer.wte.weight twice" in line


def test_equal_lines_of_a_vocabulary_do_not_move_the_others(tmp_path: Path) -> None:
    """The last one counts, as in transformers."""
    lines = [*hf.WORDS, *"abc", "fox", "over"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (tmp_path / "config.json").write_text('{"vocab_size": 320}', "utf-8")
    config = configuration(tmp_path, "bert")
    tokenizer = read_tokenizers(tmp_path, config, FAMILIES["bert"]).source
    assert tokenizer.vocab_size == len(lines)
    theirs = BertTokenizer.from_pretrained(tmp_path)
    texts = ["the fox jumps over a lazy dog"]
    assert hf.encoded(tokenizer, texts) == hf.theirs(theirs, texts)
    assert tokenizer.encode_batch(["fox over"]) == [[len(lines) - 2, len(lines) - 1]]
