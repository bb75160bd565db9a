"""Damaged texts and their targets, by hand and by property; batches on any rank."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from tests.data.test_masked_language_modeling_data import (
    NAMES,
    documents,
    numbers,
    sampler_of,
    steps_of,
)
from tests.data.test_masking import word_pieces
from tx_lightning.data.batches import TranslationBatch
from tx_lightning.data.denoising import (
    Denoise,
    DenoisingData,
    Ids,
    Noise,
    SpanCorruption,
    TextInfilling,
    with_sentinels,
)
from tx_lightning.data.errors import DataError
from tx_lightning.data.sampler import Share
from tx_lightning.data.tokenizers import BOS, EOS, PAD, Tokenizers, Words

SENTINELS = 999 - np.arange(400)
MASK = np.array([999])


def text(length: int) -> Ids:
    """So many tokens, no two alike."""
    return np.arange(4, 4 + length)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# T5.


def test_figure_2_of_the_paper() -> None:
    words = "Thank you for inviting me to your party last week .".split()
    gone = {"for", "inviting", "last"}
    taken = np.array([word in gone for word in words])
    names = [*words, "<X>", "<Y>", "<Z>"]
    found = with_sentinels(np.arange(11), taken, np.array([11, 12, 13]))
    source, target = (" ".join(names[i] for i in ids) for ids in found)
    assert source == "Thank you <X> me to your party <Y> week ."
    assert target == "<X> for inviting <Y> last <Z>"


def test_spans_at_both_ends_and_all_of_a_text() -> None:
    ids = np.array([10, 11, 12, 13])
    found = with_sentinels(ids, np.array([True, False, False, True]), SENTINELS)
    assert found.source.tolist() == [999, 11, 12, 998]
    assert found.target.tolist() == [999, 10, 998, 13, 997]
    found = with_sentinels(ids, np.ones(4, dtype=bool), SENTINELS)
    assert (found.source.tolist(), found.target.tolist()) == ([999], [999, 10, 11, 12, 13, 998])
    found = with_sentinels(ids, np.zeros(4, dtype=bool), SENTINELS)
    assert (found.source.tolist(), found.target.tolist()) == (ids.tolist(), [999])


def repaired(found: Denoise) -> list[int]:
    """The text that a source and a T5 target are made of."""
    spans: dict[int, list[int]] = {}
    for token in found.target.tolist():
        if token in SENTINELS:
            last = spans.setdefault(token, [])
        else:
            last.append(token)
    assert last == []  # after the final sentinel
    whole: list[int] = []
    for token in found.source.tolist():
        whole += spans.pop(token) if token in SENTINELS else [token]
    assert len(spans) == 1
    return whole


@given(st.integers(1, 300), st.floats(0.01, 0.99), st.floats(1, 10), st.integers(0, 1000))
def test_source_and_target_together_are_the_text(
    length: int, rate: float, mean_span: float, seed: int
) -> None:
    noise = SpanCorruption(rate=rate, mean_span=mean_span)
    found = noise.corrupt(text(length), random(seed), SENTINELS)
    assert repaired(found) == text(length).tolist()
    lengths = np.array([length])
    assert noise.source_lengths(lengths).tolist() == [len(found.source)]
    assert noise.target_lengths(lengths).tolist() == [len(found.target)]
    sentinels = [token for token in found.target.tolist() if token in SENTINELS]
    assert sentinels == SENTINELS[: len(sentinels)].tolist()
    assert noise.sentinels_of(lengths).tolist() == [len(sentinels)]


@pytest.mark.parametrize(
    ("length", "taken", "spans"),
    [(1, 0, 0), (2, 1, 1), (4, 1, 1), (10, 2, 1), (30, 4, 1), (100, 15, 5), (512, 77, 26)],
)
def test_as_many_tokens_and_spans_as_t5(length: int, taken: int, spans: int) -> None:
    mask = SpanCorruption().mask(length, random())
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    assert (int(mask.sum()), int(begins.sum())) == (taken, spans)
    if length > 1:
        assert not mask[0]
        assert mask[-1]


def test_spans_are_random() -> None:
    masks = [SpanCorruption().mask(100, random(seed)) for seed in range(500)]
    assert len({mask.tobytes() for mask in masks}) == 500
    first = [int(np.argmax(mask)) for mask in masks]
    assert abs(np.mean(first) - 85 / 5) < 3  # five equal parts of what is kept


# BART.


@given(st.integers(1, 300), st.floats(0.01, 0.99), st.floats(0.1, 10), st.integers(0, 1000))
def test_infilling_keeps_the_order_and_takes_what_it_must(
    length: int, rate: float, poisson: float, seed: int
) -> None:
    noise, ids = TextInfilling(rate=rate, poisson=poisson), text(length)
    found = noise.corrupt(ids, random(seed), MASK)
    assert np.array_equal(found.target, ids)
    kept = found.source[found.source != 999].tolist()
    assert kept == sorted(kept)
    assert length - len(kept) == max(1, round(rate * length))
    spans = noise.spans(length, random(seed))
    assert int(spans.sum()) == length - len(kept)
    assert (found.source == 999).sum() == len(spans)
    lengths = np.array([length])
    assert len(found.source) <= noise.source_lengths(lengths)[0]
    assert noise.target_lengths(lengths).tolist() == [length]


def test_a_span_is_one_mask_and_one_of_no_length_inserts_one() -> None:
    class Given(TextInfilling):
        def spans(self, length: int, random: np.random.Generator) -> Any:
            return np.array([0, 3, 0, 1])

    seen = set()
    for seed in range(2000):
        found = Given().corrupt(text(6), random(seed), MASK)
        seen.add(tuple(found.source.tolist()))
    assert (999, 4, 999, 8, 999, 999) in seen  # 5 6 7 behind 4, and 9 at the end
    assert all(row.count(999) == 4 and len(row) == 6 for row in seen)


def test_span_lengths_are_poisson_distributed() -> None:
    spans = np.concatenate([TextInfilling().spans(300, random(seed))[:-1] for seed in range(300)])
    assert abs(spans.mean() - 3) < 0.1
    assert abs((spans == 0).mean() - np.exp(-3)) < 0.01


# Data.

V = 4 + len(NAMES) + 20


def data(noise: Noise | None = None, **changed: Any) -> DenoisingData:
    arguments: dict[str, Any] = {
        "tokenizer": Words(),
        "noise": noise or SpanCorruption(rate=0.4, mean_span=2, n_sentinels=20),
        "batch_tokens": 200,
        "max_length": 9,
        "seed": 3,
        **changed,
    }
    return DenoisingData(documents(), V, **arguments)


def ready(module: DenoisingData) -> DenoisingData:
    module.prepare_data()
    module.setup()
    return module


NOISES = [SpanCorruption(rate=0.4, mean_span=2, n_sentinels=20), TextInfilling()]
Rows = dict[int, tuple[list[int], list[int]]]


def rows_of(batch: TranslationBatch) -> Rows:
    """(source, target) of each row, without padding."""
    sides = [
        [[i for i in row if i != PAD] for row in side.tolist()]
        for side in (batch.source, batch.target)
    ]
    return dict(zip(batch.indices, zip(*sides, strict=True), strict=True))


def epoch_of(module: DenoisingData, epoch: int = 0) -> Rows:
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
    rows: Rows = {}
    for batch in loader:
        rows |= rows_of(batch)
    return rows


def test_batches_hold_damaged_texts_and_their_targets() -> None:
    module = ready(data())
    segments = module.segments(module.train_store)
    rows = epoch_of(module)
    assert sorted(rows) == list(range(len(segments)))
    sentinels = V - 1 - np.arange(20)
    for index, (source, target) in rows.items():
        assert source[-1] == target[-1] == EOS
        assert target[0] == BOS
        places = {i: k for k, i in enumerate(sentinels.tolist())}
        found = Denoise(
            *(
                np.array([SENTINELS[places[i]] if i in places else i for i in side])
                for side in (source[:-1], target[1:-1])
            )
        )
        assert repaired(found) == segments[index].tolist()


def test_the_target_of_infilling_is_the_text() -> None:
    module = ready(data(TextInfilling()))
    segments = module.segments(module.train_store)
    for index, (source, target) in epoch_of(module).items():
        assert target == [BOS, *segments[index].tolist(), EOS]
        assert source != target[1:]
        assert V - 1 in source


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (1, 2), (1, 3), (2, 1), (3, 2)])
def test_a_step_is_divided_by_the_targets_of_all_its_parts(
    noise: Noise, world_size: int, accumulate: int
) -> None:
    module = ready(data(noise))
    rows: Rows = {}
    for batches in steps_of(module, world_size, accumulate):
        assert len(batches) == world_size * accumulate == batches[0].parts
        assert {batch.step_tokens for batch in batches} == {sum(b.loss_tokens for b in batches)}
        for batch in batches:
            assert isinstance(batch, TranslationBatch)
            assert batch.loss_tokens == int((batch.target[:, 1:] != PAD).sum())
            assert batch.source.numel() <= 200
            if batch.loss_tokens:
                assert batch.read_tokens == int((batch.source != PAD).sum())
                rows |= rows_of(batch)
    assert rows == epoch_of(module)  # no damage depends on rank or batch


@pytest.mark.parametrize("noise", NOISES)
def test_damage_depends_on_seed_and_epoch_and_nothing_else(noise: Noise) -> None:
    module = ready(data(noise))
    first = epoch_of(module)
    assert epoch_of(module) == first
    assert epoch_of(ready(data(noise, batch_tokens=70))) == first
    assert epoch_of(ready(data(noise, num_workers=2))) == first
    for other in (epoch_of(module, 1), epoch_of(ready(data(noise, seed=4)))):
        assert other.keys() == first.keys()
        # Of the shortest there are few ways to damage them.
        longer = [i for i, (source, _) in first.items() if len(source) > 5]
        assert len(longer) > 100
        assert sum(other[i] == first[i] for i in longer) < len(longer) / 2


def test_damage_in_evaluation_never_changes() -> None:
    def evaluation(**changed: Any) -> Rows:
        rows: Rows = {}
        for batch in ready(data(**changed)).val_dataloader():
            assert batch.step_tokens == batch.target_tokens
            rows |= rows_of(batch)
        return rows

    first = evaluation()
    assert evaluation(seed=8, eval_batch_tokens=20) == first
    module = ready(data())
    assert rows_of(module.example(3))[3] == first[3]


@pytest.mark.parametrize("noise", NOISES)
def test_a_share_that_is_not_real_predicts_nothing(noise: Noise) -> None:
    share = Share(np.array([0]), 7, parts=3, real=False)
    batch = ready(data(noise)).train_batches().__getitems__(share)
    assert batch.loss_tokens == batch.read_tokens == 0
    assert torch.equal(batch.target, torch.tensor([[BOS, PAD]]))


def test_overfitting_repeats_the_same_damage() -> None:
    module = ready(data())
    sampler = sampler_of(module, reshuffle=False)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([module.train_batches().__getitems__(share).source for share in sampler])
    assert all(torch.equal(one, other) for one, other in zip(*epochs, strict=True))


def test_a_vocabulary_leaves_the_sentinels_free() -> None:
    assert ready(data()).tokenizers.source.vocab_size == V - 20
    assert ready(data(TextInfilling())).reserved == 1


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, SpanCorruption()),
        ("SpanCorruption", SpanCorruption()),
        ("TextInfilling", TextInfilling()),
    ],
)
def test_noise_named_in_yaml_has_its_own_defaults(named: str | None, expected: Noise) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DenoisingData, "data", fail_untyped=False)
    settings: dict[str, Any] = {
        "source": {"class_path": "tx_lightning.data.GrammarText"},
        "vocab_size": 1000,
    }
    if named:
        settings["noise"] = {"class_path": f"tx_lightning.data.{named}"}
    module = parser.instantiate(parser.parse_object({"data": settings})).data
    assert type(module.noise) is type(expected)
    assert vars(module.noise) == vars(expected)


def test_a_mask_of_the_tokenizer_is_no_sentinel() -> None:
    tokenizer = word_pieces()  # 11 entries, one of them a mask
    assert TextInfilling().sentinel_ids(tokenizer, 11).tolist() == [4]
    assert SpanCorruption(n_sentinels=3).sentinel_ids(tokenizer, 14).tolist() == [13, 12, 11]
    module = data(given := SpanCorruption(n_sentinels=3))
    module.given_tokenizers = Tokenizers.one(tokenizer)
    module.vocab_size, module.reserved = 13, given.n_sentinels
    module.prepare_data()
    with pytest.raises(
        DataError, match="SpanCorruption needs 3 more; set vocab_size to at least 14"
    ):
        module.setup("fit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanCorruption(rate=0), "SpanCorruption: rate is 0; it must be between 0 and 1"),
        (lambda: SpanCorruption(mean_span=0.5), "mean_span is 0.5; it must be at least 1"),
        (lambda: SpanCorruption(n_sentinels=1), "n_sentinels is 1; it must be at least 2"),
        (lambda: TextInfilling(rate=1), "TextInfilling: rate is 1; it must be between 0 and 1"),
        (lambda: TextInfilling(poisson=0), "poisson is 0; it must be above 0"),
        (
            lambda: data(SpanCorruption(rate=0.5, mean_span=1, n_sentinels=3)),
            "noise has 3 sentinels, but a row of max_length 9 needs 4; raise n_sentinels",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_long_texts_become_several_segments() -> None:
    module = ready(data())
    assert (
        len(module.segments(module.train_store)) > len(module.train_store) == len(numbers(2, 200))
    )
