from pathlib import Path

import numpy as np
import pytest
import torch

from tx_lightning.data.batches import PairBatches, padded
from tx_lightning.data.loader import BatchLoader
from tx_lightning.data.sampler import ShardSampler, Share
from tx_lightning.data.store import PairStore
from tx_lightning.data.tokenizers import BOS, EOS, PAD, Characters, Tokenizers
from tx_lightning.data.writing import write_pairs

LETTERS = Characters().train(["a" * 9 + "b" * 8 + "c" * 7], 7)
A, B, C = 4, 5, 6
PAIRS = [("abc", "b"), ("", "ca"), ("c", "")]


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    write_pairs(tmp_path, PAIRS, Tokenizers(LETTERS, LETTERS), None)
    return PairStore(tmp_path)


def share(*indices: int, real: bool = True) -> Share:
    return Share(np.array(indices), step_tokens=9, parts=2, real=real)


def test_a_batch_value_by_value(store: PairStore) -> None:
    batch = PairBatches(store, with_text=True).__getitems__(share(1, 0, 2))
    assert batch.source.tolist() == [
        [EOS, PAD, PAD, PAD],
        [A, B, C, EOS],
        [C, EOS, PAD, PAD],
    ]
    assert batch.target.tolist() == [
        [BOS, C, A, EOS],
        [BOS, B, EOS, PAD],
        [BOS, EOS, PAD, PAD],
    ]
    assert batch.source.dtype == batch.target.dtype == torch.int64
    assert batch.indices == [1, 0, 2]
    assert batch.source_text == ["", "abc", "c"]
    assert batch.target_text == ["ca", "b", ""]
    assert (batch.step_tokens, batch.parts, batch.rows) == (9, 2, 3)


def test_token_counts_are_those_of_the_tensors(store: PairStore) -> None:
    batch = PairBatches(store, with_text=False).__getitems__(share(1, 0, 2))
    assert batch.source_tokens == int((batch.source != PAD).sum())
    assert batch.target_tokens == int((batch.target[:, 1:] != PAD).sum())


def test_training_batches_carry_no_text(store: PairStore) -> None:
    batch = PairBatches(store, with_text=False).__getitems__(share(0))
    assert batch.source_text == batch.target_text == []


def test_a_share_that_is_not_real_has_no_labels(store: PairStore) -> None:
    batch = PairBatches(store, with_text=False).__getitems__(share(0, real=False))
    assert batch.source.tolist() == [[A, B, C, EOS]]
    assert batch.target.tolist() == [[BOS, PAD]]
    assert (batch.source_tokens, batch.target_tokens) == (0, 0)
    assert (batch.step_tokens, batch.parts) == (9, 2)


def test_a_batch_moves_to_a_device_whole(store: PairStore) -> None:
    batch = PairBatches(store, with_text=True).__getitems__(share(0))
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert moved.source.device.type == moved.target.device.type == "meta"
    assert moved.source_text == batch.source_text
    assert batch.source.device.type == "cpu"


def test_padded() -> None:
    assert padded([[7, 8], []]).tolist() == [[7, 8, EOS], [EOS, PAD, PAD]]
    assert padded([[7, 8], []], start=True).tolist() == [[BOS, 7, 8, EOS], [BOS, EOS, PAD, PAD]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_batches_of_its_sampler(store: PairStore, num_workers: int) -> None:
    sampler = ShardSampler(store.source_lengths + 1, store.target_lengths + 1, batch_tokens=6)
    loader = BatchLoader(
        PairBatches(store, with_text=True), sampler, num_workers=num_workers, pin_memory=False
    )
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        assert [batch.indices for batch in batches] == [[0], [2, 1]]
        assert batches[0].source_text == ["abc"]


def test_a_loader_leaves_the_global_generator_alone(store: PairStore) -> None:
    sampler = ShardSampler(store.source_lengths, store.target_lengths, batch_tokens=6)
    data = PairBatches(store, with_text=True)
    before = torch.get_rng_state()
    list(BatchLoader(data, sampler, num_workers=0, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)
