"""The data of a masked language model: what is in a batch, on any rank, in any epoch."""

import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tx_lightning.data.batches import Batch
from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.errors import DataError
from tx_lightning.data.labelled_sources import GrammarPolarity, LabelledTSV, TextsOf
from tx_lightning.data.masked_language_modeling import (
    MaskedBatch,
    MaskedLanguageModelingData,
    MaskedSampler,
)
from tx_lightning.data.masking import Masking
from tx_lightning.data.sampler import Share, StepSampler
from tx_lightning.data.segments import SegmentData
from tx_lightning.data.text_sources import Piece, TextFiles, TextSource
from tx_lightning.data.tokenizers import BOS, EOS, PAD, ByteLevelBPE, Characters, Words

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def numbers(first: int, last: int) -> list[str]:
    """Texts of different lengths."""
    return [" ".join(NAMES[int(d)] for d in str(i**4)) for i in range(first, last)]


def counting(first: int, last: int) -> list[str]:
    """Texts that count on from some digit: each tells what its neighbours are."""
    return [" ".join(NAMES[(i + k) % 10] for k in range(5 + i % 4)) for i in range(first, last)]


class Documents(TextSource):
    """Documents given to it."""

    def __init__(self, **splits: list[str]) -> None:
        self._splits = splits

    def splits(self) -> list[str]:
        return list(self._splits)

    def texts(self, split: str) -> Iterator[str]:
        self.check_split(split)
        return iter(self._splits[split])

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        return repr((type(self).__name__, hash(tuple(self._splits[split]))))


def documents(**changed: list[str]) -> Documents:
    given = {"train": numbers(2, 200), "val": numbers(200, 230), "test": numbers(230, 240)}
    return Documents(**(given | changed))


V = 4 + len(NAMES) + 1


def data(source: TextSource | None = None, **changed: Any) -> MaskedLanguageModelingData:
    arguments = {"tokenizer": Words(), "batch_tokens": 200, "max_length": 9, "seed": 3, **changed}
    return MaskedLanguageModelingData(documents() if source is None else source, V, **arguments)


def ready(module: MaskedLanguageModelingData, stage: str | None = None) -> Any:
    module.prepare_data()
    module.setup(stage)
    return module


def rows_of(batch: MaskedBatch) -> dict[int, tuple[list[int], list[int]]]:
    """(ids, targets) of each row, without padding."""
    found = {}
    for index, ids, targets in zip(
        batch.indices, batch.ids.tolist(), batch.targets.tolist(), strict=True
    ):
        length = len(ids) - ids.count(PAD)
        assert ids[length:] == [PAD] * (len(ids) - length)
        assert set(targets[length:]) <= {IGNORED}
        found[index] = (ids[:length], targets[:length])
    return found


def epoch_of(
    module: MaskedLanguageModelingData, epoch: int = 0
) -> dict[int, tuple[list[int], list[int]]]:
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
    rows: dict[int, tuple[list[int], list[int]]] = {}
    for batch in loader:
        rows |= rows_of(batch)
    return rows


def original(ids: list[int], targets: list[int]) -> list[int]:
    return [i if target == IGNORED else target for i, target in zip(ids, targets, strict=True)]


def test_batches_hold_the_texts_cut_and_masked() -> None:
    module = ready(data())
    rows = epoch_of(module)
    segments = []
    for text in numbers(2, 200):
        [ids] = module.tokenizers.source.encode_batch([text])
        segments += [ids[start : start + 7] for start in range(0, len(ids), 7)]
    assert max(map(len, segments)) == 7
    assert len(rows) == len(segments) > 198
    for index, segment in enumerate(segments):
        ids, targets = rows[index]
        assert original(ids, targets) == [BOS, *segment, EOS]
        assert targets[0] == targets[-1] == IGNORED
        chosen = sum(target != IGNORED for target in targets)
        assert chosen == max(1, round(0.15 * len(segment)))


def test_batches_count_what_is_in_them() -> None:
    for batch in ready(data()).train_dataloader():
        assert batch.ids.numel() <= 200
        assert batch.positions == batch.ids.numel()
        assert batch.predicted == batch.loss_tokens == int((batch.targets != IGNORED).sum())
        assert batch.step_tokens == batch.predicted
        assert batch.tokens == int((batch.ids != PAD).sum())
        assert (batch.rows, batch.parts) == (len(batch.ids), 1)


def test_the_mask_is_a_row_of_its_own() -> None:
    module = ready(data(masking=Masking(mask_share=1.0, random_share=0.0)))
    assert module.tokenizers.source.vocab_size == V - 1
    for ids, targets in epoch_of(module).values():
        assert all((i == V - 1) == (t != IGNORED) for i, t in zip(ids, targets, strict=True))


def test_empty_texts_are_dropped_and_counted() -> None:
    module = ready(data(documents(train=["", *numbers(2, 200), "  "])))
    assert len(module.train_store) == 199  # to words, blanks are one
    assert module.statistics["train_dropped_empty"] == 1
    assert module.statistics["train_segments"] == len(module.segments(module.train_store)) > 199


def steps_of(module: SegmentData[Any], world_size: int, accumulate: int) -> list[list[Batch]]:
    """The batches of each optimizer step of an epoch, over all ranks."""
    batches = module.train_batches()
    steps: list[list[Batch]] = []
    for rank in range(world_size):
        sampler = sampler_of(module, rank=rank, world_size=world_size, accumulate=accumulate)
        for place, share in enumerate(sampler):
            if rank == 0 and place % accumulate == 0:
                steps.append([])
            steps[place // accumulate].append(batches.__getitems__(share))
    return steps


def sampler_of(module: SegmentData[Any], **place: int) -> StepSampler:
    """The training sampler of another place in the run."""
    sampler = module.train_sampler()
    for name, value in place.items():
        setattr(sampler, name, value)
    return sampler


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize(
    ("world_size", "accumulate"), [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 3), (40, 1)]
)
def test_a_step_is_divided_by_what_all_its_parts_predict(
    whole_words: bool, world_size: int, accumulate: int
) -> None:
    module = ready(data(masking=Masking(rate=0.3, whole_words=whole_words)))
    rows: dict[int, tuple[list[int], list[int]]] = {}
    for batches in steps_of(module, world_size, accumulate):
        assert len(batches) == world_size * accumulate == batches[0].parts
        assert {batch.step_tokens for batch in batches} == {sum(b.loss_tokens for b in batches)}
        for batch in batches:
            assert isinstance(batch, MaskedBatch)
            assert batch.loss_tokens == int((batch.targets != IGNORED).sum())
            if batch.loss_tokens:
                rows |= rows_of(batch)
    assert rows == epoch_of(module)  # no mask depends on rank or batch


def test_a_share_that_is_not_real_predicts_nothing() -> None:
    module = ready(data())
    share = Share(np.array([0]), 7, parts=3, real=False)
    batch = module.train_batches().__getitems__(share)
    assert batch.loss_tokens == batch.tokens == 0
    assert (batch.targets == IGNORED).all()
    assert (batch.step_tokens, batch.parts) == (7, 3)


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_depend_on_seed_and_epoch_and_nothing_else(whole_words: bool) -> None:
    masking = Masking(whole_words=whole_words)
    module = ready(data(masking=masking))
    first = epoch_of(module)
    assert epoch_of(module) == first
    assert epoch_of(ready(data(masking=masking, batch_tokens=90))) == first
    assert epoch_of(ready(data(masking=masking, num_workers=2))) == first
    for other in (epoch_of(module, 1), epoch_of(ready(data(masking=masking, seed=4)))):
        assert other.keys() == first.keys()
        assert sum(other[i] == first[i] for i in first) < len(first) / 2


def test_two_texts_alike_are_masked_differently() -> None:
    text = " ".join(NAMES * 2)
    module = ready(data(documents(train=[text] * 20), max_length=30))
    assert len({tuple(ids) for ids, _ in epoch_of(module).values()}) == 20


def test_evaluation_masks_never_change() -> None:
    def evaluation(**changed: Any) -> dict[int, tuple[list[int], list[int]]]:
        rows: dict[int, tuple[list[int], list[int]]] = {}
        for batch in ready(data(**changed)).val_dataloader():
            assert batch.step_tokens == batch.predicted
            rows |= rows_of(batch)
        return rows

    first = evaluation()
    assert len(first) > 30
    assert evaluation(seed=8, eval_batch_tokens=20) == first
    module = ready(data())
    for index in range(module.n_examples):
        assert rows_of(module.example(index))[index] == first[index]


def test_overfitting_repeats_the_same_masks() -> None:
    module = ready(data())
    sampler = sampler_of(module, reshuffle=False)
    batches = module.train_batches()
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([batches.__getitems__(share).ids for share in sampler])
    assert all(torch.equal(one, other) for one, other in zip(*epochs, strict=True))


def test_whole_words_are_masked_whole() -> None:
    text = "unbelievable boats sink slowly in unbelievable weather"
    masking = Masking(rate=0.4, mask_share=1.0, random_share=0.0, whole_words=True)
    module = MaskedLanguageModelingData(
        documents(train=[text] * 30, val=[text]), 275, tokenizer=ByteLevelBPE(), masking=masking
    )
    module.prepare_data()
    module.setup("fit")
    tokenizer = module.tokenizers.source
    starts = tokenizer.word_starts()
    for ids, targets in epoch_of(module).values():
        whole = original(ids, targets)[1:-1]
        word = np.cumsum(starts[whole])
        hidden = np.array(targets[1:-1]) != IGNORED
        for number in np.unique(word):
            assert len(set(hidden[word == number].tolist())) == 1
        assert 1 <= hidden.sum() <= round(0.4 * len(whole))


def test_the_largest_batch_is_the_largest() -> None:
    module = ready(data())
    sizes = [batch.positions for batch in module.train_dataloader()]
    assert module.largest_batch().positions == max(sizes)


def test_what_travels_to_workers_is_small() -> None:
    module = ready(data(documents(train=numbers(2, 3000))))
    copied = pickle.loads(pickle.dumps(module.train_batches()))
    assert len(pickle.dumps(module.segments(module.train_store))) < 1000
    assert [copied.segments[i].tolist() for i in range(50)] == [
        module.train_batches().segments[i].tolist() for i in range(50)
    ]


def test_the_longest_segment_may_change_without_tokenizing_again() -> None:
    one, other = ready(data()), ready(data(max_length=20))
    assert one.train_store.folder == other.train_store.folder
    assert len(one.segments(one.train_store)) > len(other.segments(other.train_store))


def test_a_document_of_megabytes_becomes_segments(tmp_path: Path) -> None:
    line = " ".join(NAMES) + "\n"
    (tmp_path / "long.txt").write_text(line * 60_000)  # 3 MB
    (tmp_path / "val.txt").write_text(line * 10)
    source = TextFiles(str(tmp_path / "long.txt"), str(tmp_path / "val.txt"))
    module = ready(data(source, max_length=128, batch_tokens=4096))
    segments = module.segments(module.train_store)
    assert int(segments.lengths.sum()) == module.train_store.tokens["text"]
    assert segments.lengths.max() == 126
    assert len(module.train_store) == 3  # pieces
    encoded = module.tokenizers.source.encode_batch([p.text for p in source.pieces("train")])
    ids = [int(i) for index in range(len(segments)) for i in segments[index]]
    assert ids == list(itertools.chain.from_iterable(encoded))
    batch = next(iter(module.train_dataloader()))
    assert batch.ids.shape == (32, 128)


class InPieces(Documents):
    """Its documents come in two pieces each."""

    def pieces(self, split: str) -> Iterator[Piece]:
        for text in self.texts(split):
            middle = text.find(" ", len(text) // 2)
            yield Piece(text[:middle], last=False)
            yield Piece(text[middle:], last=True)


def test_each_piece_of_a_document_is_a_text() -> None:
    text = " ".join(NAMES * 30)
    source = InPieces(train=[text], val=[text])
    module = ready(MaskedLanguageModelingData(source, 30, tokenizer=Characters()))
    assert len(module.train_store) == 2
    assert module.tokenizers.source.decode_batch([module.train_store.stream("text")]) == [text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 2}, "max_length is 2; it must be at least 3"),
        ({"batch_tokens": 8}, r"batch_tokens is 8, less than the longest row \(max_length 9\)"),
        ({"num_workers": -1}, "num_workers is -1; it must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data(**arguments)


def test_a_vocabulary_that_leaves_no_room_for_the_mask_is_refused() -> None:
    module = ready(data())
    other = data()
    other.given_tokenizers = module.tokenizers
    other.vocab_size = module.tokenizers.source.vocab_size
    with pytest.raises(DataError, match=f"vocab_size is {V - 1}, but .* {V - 1} entries and this"):
        other.prepare_data()


def test_a_sampler_counts_a_step_once_for_all_its_parts() -> None:
    module = ready(data(masking=Masking(whole_words=True)))
    sampler = sampler_of(module, accumulate=3)
    assert isinstance(sampler, MaskedSampler)
    asked = []

    def chosen(indices: Any, epoch: int) -> int:
        asked.append(epoch)
        return 1

    sampler.data.chosen = chosen  # type: ignore[method-assign]
    assert len(list(sampler)) == 3 * len(asked)


# The text of a classifier.


def test_the_texts_of_labelled_sources_are_documents(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("one two\tthree\tyes\n\tfour\tno\nfive\t\tno\n")
    labelled = LabelledTSV(str(file), label_column=2, second_column=1)
    source = TextsOf(labelled)
    source.prepare()
    assert source.splits() == ["train"]
    assert list(source.texts("train")) == ["one two", "three", "four", "five"]
    assert source.fingerprint("train") != labelled.fingerprint("train")
    with pytest.raises(DataError, match="no split 'val'"):
        source.texts("val")


def test_a_classifiers_text_can_be_masked() -> None:
    labelled = GrammarPolarity(n_train=60, n_val=10, n_test=10)
    module = MaskedLanguageModelingData(TextsOf(labelled), 300, tokenizer=Words(), max_length=40)
    module.prepare_data()
    module.setup("fit")
    texts = [example.text for example in labelled.examples("train")]
    rows = epoch_of(module)
    decoded = [original(*rows[i]) for i in range(len(rows))]
    assert module.tokenizers.source.decode_batch(decoded) == texts
