"""Whatever a file holds, reading it as a checkpoint ends in one line that names it."""

import gzip
import io
import json
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tx_lightning.checkpoints import CheckpointError, checkpoint_record, load_task, read_checkpoint
from tx_lightning.data.errors import DataError
from tx_lightning.data.tokenizers import (
    ByteLevelBPE,
    Characters,
    SpecialIds,
    Tokenizer,
    Unigram,
    Words,
)
from tx_lightning.errors import one_line
from tx_lightning.tasks import Translation
from tx_lightning.tasks.steps import check_states

FORMAT_1 = Path(__file__).parent / "formats" / "format-1.ckpt"
TEXTS = ["the dog runs", "a cat sleeps .", "dogs and cats"]
Place = tuple[str | int, ...]


def tiny() -> dict[str, Any]:
    """A checkpoint with all entries there are, and few tensors."""
    text = Words().train(TEXTS, 12).to_json()
    settings = {"class_path": "tx_lightning.tasks.Translation", "init_args": {"vocab_size": 12}}
    record = checkpoint_record(settings, {"source": text, "target": text}, labels=["a", "b"])
    progress = {"total": {"ready": 1, "completed": 1}, "current": {"ready": 1, "completed": 1}}
    return {
        "epoch": 0,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"weight": torch.ones(2, 3), "count": torch.tensor(4)},
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}},
                "param_groups": [{"lr": 0.1, "params": [0]}],
            }
        ],
        "lr_schedulers": [{"last_epoch": 3, "_step_count": 4}],
        "callbacks": {"LRWarmup": {"scheduled": None}},
        "loops": {"fit_loop": {"epoch_progress": progress}},
        "metrics": {"val/loss": 1.5},
        "sizes": {"metrics.jsonl": 7},
        "wandb_rows": None,
        "train_sums": [1.0, 2.0],
        "averaged": {"files": ["a.ckpt"], "steps": [3]},
        "imported": {"config": {"layers": [1, 2]}, "generation": {}, "kept": {}},
        "tx_lightning": record,
    }


def saved(checkpoint: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    return stream.getvalue()


def refused(path: Path, content: bytes, *, lazily: bool = False) -> bool:
    """Whether a file is refused, in one line that names it; any other error is one of the test."""
    path.write_bytes(content)
    said = None
    try:
        read_checkpoint(path, lazily=lazily)
    except CheckpointError as error:
        said = str(error)
    assert said is None or (str(path) in said and "\n" not in said)
    return said is not None


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some bytes with something cut, flipped, put in, taken out or overwritten."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(max(1, len(found)))
        match rng.randrange(6):
            case 0:
                found[place : place + 1] = rng.randbytes(1)
            case 1:
                del found[place : place + rng.randint(1, 40)]
            case 2:
                found[place:place] = rng.randbytes(rng.randint(1, 40))
            case 3:
                found[place : place + 40] = bytes(40)
            case 4:
                found[place : place + 1] = bytes(
                    [found[place] ^ (1 << rng.randrange(8))] if found else []
                )
            case _:
                found = found[:place] if rng.random() < 0.5 else found[place:]
    return bytes(found)


def repacked(content: bytes, change: Callable[[dict[str, bytes]], None], *, packed: bool) -> bytes:
    """An archive with other members."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", 8 if packed else 0) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return stream.getvalue()


def test_damaged_bytes(tmp_path: Path) -> None:
    rng = random.Random(1)
    content = saved(tiny())
    assert not refused(tmp_path / "a.ckpt", content)
    n_refused = sum(
        refused(tmp_path / "a.ckpt", damaged(content, rng), lazily=number % 2 == 0)
        for number in range(500)
    )
    assert n_refused > 330


def test_damaged_members_of_the_archive(tmp_path: Path) -> None:
    rng = random.Random(2)
    content = saved(tiny())

    def change(members: dict[str, bytes]) -> None:
        for name in list(members):
            if name.endswith("data.pkl"):
                members[name] = damaged(members[name], rng)
        if rng.random() < 0.2:
            del members[rng.choice(list(members))]
        if rng.random() < 0.1:
            members["archive/constants.pkl"] = b"\x80\x02]."  # as TorchScript has

    n_refused = sum(
        refused(tmp_path / "a.ckpt", repacked(content, change, packed=number % 3 == 0))
        for number in range(500)
    )
    assert n_refused > 330


def junk() -> Iterator[bytes]:
    """Files of other kinds."""
    yield from (b"", b"\n", b"dear diary", b"\x00" * 300, "ä".encode(), b"PK", b"PK\x03\x04", b"P")
    yield json.dumps({"state_dict": {}}).encode()
    yield gzip.compress(saved(tiny()))
    for protocol in range(6):
        yield pickle.dumps(tiny()["callbacks"], protocol)
        yield pickle.dumps(os.getcwd, protocol)
        yield pickle.dumps({"state_dict": Path("x")}, protocol)
    stream = io.BytesIO()
    torch.save(tiny(), stream, _use_new_zipfile_serialization=False)
    yield stream.getvalue()
    stream = io.BytesIO()
    np.savez(stream, weight=np.ones(3))
    yield stream.getvalue()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    yield stream.getvalue()
    yield repacked(saved(tiny()), dict.clear, packed=False)
    yield from map(saved, ([], None, 3, "text", torch.ones(2), {}, {1: 2}, {"state_dict": {}}))
    yield saved({"state_dict": {}, "tx_lightning": {}})
    yield saved({"state_dict": {}, "tx_lightning": {"format": 1}})
    yield saved({"state_dict": {}, "tx_lightning": {"format": 7}})
    yield saved({"state_dict": {}, "tx_lightning": {"format": 7, "versions": 3}})
    yield saved({**tiny(), "path": Path("x")})


def test_files_of_other_kinds(tmp_path: Path) -> None:
    for number, content in enumerate(junk()):
        assert refused(tmp_path / "a.ckpt", content), number
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)


LOOP: list[Any] = []
LOOP.append(LOOP)
# Of the wrong type nearly anywhere.
WRONG: list[Any] = [
    None, -1, 1.5, True, "x", "os.system", b"x", [], {}, [1], {"a": 1}, {1: 2}, {3}, 3 + 4j,
    10**30, float("nan"), LOOP, torch.zeros(3), torch.float32, torch.empty(3, device="meta"),
    torch.zeros(2, 3).to_sparse(), torch.zeros(1).expand(10**9),
]  # fmt: skip


def places(tree: Any, at: Place = ()) -> Iterator[Place]:
    if at:
        yield at
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*at, key))


def with_value(tree: Any, at: Place, value: Any) -> Any:
    """A copy with another value at a place, or nothing there where the value is `places`."""
    if not at:
        return value
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(at) == 1 and value is places:
        del copy[at[0]]
    else:
        copy[at[0]] = with_value(tree[at[0]], at[1:], value)
    return copy


def test_wrong_types_everywhere(tmp_path: Path) -> None:
    tree = tiny()
    assert refused(tmp_path / "a.ckpt", saved({**tree, "state_dict": []}))
    found = {
        at: sum(
            refused(tmp_path / "a.ckpt", saved(with_value(tree, at, value)))
            for value in ((*WRONG, places) if len(at) < 3 else WRONG[number % 3 :: 3])
        )
        for number, at in enumerate(places(tree))
    }
    assert len(found) > 50
    for name in ("state_dict", "global_step"):
        assert found[name,] >= len(WRONG) - 2, name
    for entry in ("format", "versions", "task", "tokenizers", "labels", "n_texts"):
        assert found["tx_lightning", entry] >= len(WRONG) - 4, entry
    assert refused(tmp_path / "a.ckpt", saved({**tree, "global_step": -1}))


def test_what_is_read_is_used_or_refused_in_a_line(tmp_path: Path) -> None:
    """A record with something wrong in it, from the file to the translation."""
    rng = random.Random(3)
    path = tmp_path / "a.ckpt"
    tree = read_checkpoint(FORMAT_1)
    inside = list(places(tree["tx_lightning"]))
    said = 0
    for at in rng.sample(inside, 20):
        path.write_bytes(
            saved({**tree, "tx_lightning": with_value(tree["tx_lightning"], at, rng.choice(WRONG))})
        )
        try:
            task = load_task(path)
            assert isinstance(task, Translation)
            task.translate(["Das Kind tanzt ."])
        except ValueError as error:
            line = one_line(error)
            assert line is not None
            assert "\n" not in line
            said += 1
    assert said > 10


def test_settings_that_ask_for_a_giant_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    tree = read_checkpoint(FORMAT_1)
    for name, value in (("n_encoder_layers", 10**12), ("d_ff", 10**8), ("d_model", 10**18)):
        at: Place = ("tx_lightning", "task", "init_args", "network", "init_args", name)
        path.write_bytes(saved(with_value(tree, at, value)))
        with pytest.raises(CheckpointError, match=r"a\.ckpt: its task cannot be built"):
            load_task(path)


def test_a_tokenizer_with_ids_beyond_the_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    tree = read_checkpoint(FORMAT_1)
    large = Words().train([" ".join(f"word{i}" for i in range(300))], 300).to_json()
    at: Place = ("tx_lightning", "tokenizers")
    path.write_bytes(saved(with_value(tree, at, {"source": large, "target": large})))
    with pytest.raises(CheckpointError, match="ids up to 299, but the network's vocab_size is 120"):
        load_task(path)


def tokenizers() -> list[str]:
    kinds = [(Words(), 30), (Characters(), 30), (Unigram(), 40), (ByteLevelBPE(), 262)]
    texts = [kind.train(TEXTS, size).to_json() for kind, size in kinds]
    names = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>"}
    return [*texts, Tokenizer.foreign(texts[0], SpecialIds(0, 1, 2, 3), names).to_json()]


@pytest.mark.parametrize("text", tokenizers(), ids=lambda text: text[:0])
def test_a_damaged_tokenizer_is_a_data_error(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Bare exceptions and panics of the library included, whatever it is asked to do."""
    tree = json.loads(text)
    wrong = [None, -1, 10**9, 1e300, "x", "", [], {}, [1], {"a": 1}, True, 2**63, "\0", places]
    inside = list(places(tree))
    random.Random(4).shuffle(inside)
    inside.sort(key=lambda at: at[0] != "tx_lightning")
    refusals = [
        used(json.dumps(with_value(tree, at, value))) for at in inside[:50] for value in wrong
    ]
    assert sum(refusal is not None for refusal in refusals) > len(refusals) / 2
    assert not any("\n" in refusal for refusal in refusals if refusal)


def used(text: str) -> str | None:
    """Have a tokenizer do all that it can; what it refuses, if it does."""
    try:
        tokenizer = Tokenizer(text)
        rows = tokenizer.encode_batch(["the dog xyz é", "", "a" * 50])
        tokenizer.decode_batch([*rows, list(range(10))])
        tokenizer.encode_words([["a", ""]])
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp_avg", torch.zeros(2)),
        ("exp_avg_sq", torch.zeros(3, 4)),
        ("exp_avg", 1.0),
        ("step", torch.zeros(0)),
    ],
)
def test_a_fused_kernel_gets_no_state_of_another_shape(name: str, value: Any) -> None:
    """It would write beyond the memory of the state."""
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.sum().backward()
    optimizer.step()
    check_states([optimizer])
    optimizer.state[weight][name] = value
    with pytest.raises(ValueError, match=rf"state {name} of a parameter of shape \(4, 3\)"):
        check_states([optimizer])


def test_a_tensor_beyond_its_memory_is_refused(tmp_path: Path) -> None:
    few = torch.zeros(10)
    tree = tiny()
    for value in (few[9:].expand(10), few[:1].expand(11), torch.zeros(1).expand(2, 3)):
        at: Place = ("optimizer_states", 0, "state", 0, "exp_avg")
        assert refused(tmp_path / "a.ckpt", saved(with_value(tree, at, value)))
    parts: Tensor = few[2:8]
    assert not refused(
        tmp_path / "a.ckpt", saved(with_value(tree, ("state_dict", "weight"), parts))
    )
