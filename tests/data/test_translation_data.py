import errno
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from tx_lightning.data.batches import TranslationBatch
from tx_lightning.data.errors import DataError
from tx_lightning.data.sources import ParallelSource, TextPairs
from tx_lightning.data.tokenizers import (
    BOS,
    EOS,
    PAD,
    ByteLevelBPE,
    Characters,
    Tokenizer,
    Unigram,
    Words,
)
from tx_lightning.data.translation import TranslationData

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]
WORTE = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben"]


class InMemory(ParallelSource):
    """Pairs given to it; counts how often they are read."""

    def __init__(self, **splits: list[tuple[str, str]]) -> None:
        self._splits = splits
        self.read: Counter[str] = Counter()
        self.prepared = 0

    def splits(self) -> list[str]:
        return list(self._splits)

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        self.check_split(split)
        self.read[split] += 1
        yield from self._splits[split]

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        return repr(hash(tuple(self._splits[split])))

    def prepare(self) -> None:
        self.prepared += 1


def sentences(n: int, first: int = 0) -> list[tuple[str, str]]:
    """Sentences of different lengths, no two alike."""
    pairs = []
    for i in range(first, first + n):
        digits = [(i // 7**k) % 7 for k in range(3 + i % 4)]
        words = [" ".join(names[d] for d in digits) for names in (WORDS, WORTE)]
        pairs.append((words[0], words[1]))
    return pairs


def at_stage(module: TranslationData, stage: str) -> None:
    """Lets the module think that a trainer runs this stage."""
    state = SimpleNamespace(fn=TrainerFn(stage))
    trainer = SimpleNamespace(state=state, world_size=1, limit_val_batches=1.0)
    module.trainer = trainer  # type: ignore[assignment]


TRAIN, VAL, TEST = sentences(200), sentences(23, 1000), sentences(11, 2000)


def source(**changed: list[tuple[str, str]]) -> InMemory:
    return InMemory(**{"train": TRAIN, "val": VAL, "test": TEST, **changed})


def ready(data: TranslationData, stage: str | None = None) -> TranslationData:
    data.prepare_data()
    data.setup(stage)
    return data


def data(pairs: InMemory | None = None, **changed: Any) -> TranslationData:
    arguments = {"tokenizer": Words(), "batch_tokens": 100, **changed}
    return TranslationData(source() if pairs is None else pairs, 300, **arguments)


def test_training_batches_hold_the_pairs_of_the_source() -> None:
    module = ready(data())
    vocabulary = module.tokenizers
    seen = {}
    for batch in module.train_dataloader():
        assert batch.source.numel() <= 100
        for i, x, y in zip(
            batch.indices, batch.source.tolist(), batch.target.tolist(), strict=True
        ):
            assert y[0] == BOS
            assert x[x.index(EOS) :].count(PAD) == len(x) - x.index(EOS) - 1
            seen[i] = (
                vocabulary.source.decode_batch([x])[0],
                vocabulary.target.decode_batch([y])[0],
            )
    assert [seen[i] for i in range(200)] == TRAIN


def test_a_step_counts_its_target_tokens() -> None:
    for batch in ready(data()).train_dataloader():
        assert batch.step_tokens == batch.target_tokens == int((batch.target[:, 1:] != PAD).sum())
        assert batch.parts == 1


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_has_every_pair_once_with_its_text(split: str) -> None:
    # The filter of training drops these.
    odd = [("", "nichts"), ("one " * 300, "eins"), ("one", "")]
    module = ready(data(source(**{split: VAL + odd}), max_length=10))
    loader = module.val_dataloader() if split == "val" else module.test_dataloader()
    texts: dict[int, tuple[str, str]] = {}
    for batch in loader:
        pairs = zip(batch.source_text, batch.target_text, strict=True)
        texts.update(zip(batch.indices, pairs, strict=True))
    assert [texts[i] for i in range(len(VAL) + 3)] == VAL + odd


def test_evaluation_has_a_budget_of_its_own() -> None:
    module = ready(data(eval_batch_tokens=30))
    assert max(batch.source.numel() for batch in module.val_dataloader()) <= 30


def test_dropped_pairs_are_counted_printed_and_in_the_statistics(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = [
        ("", "eins"),
        (" ".join(["one"] * 20), " ".join(["eins"] * 20)),
        ("one one one one one", "eins"),
    ]
    module = data(source(train=TRAIN + bad), max_length=15, max_length_ratio=3.0)
    ready(module)
    assert capsys.readouterr().err == (
        "train: 200 pairs kept, 3 dropped (1 empty, 1 too_long, 1 ratio)\n"
    )
    numbers = module.statistics
    assert (numbers["train_pairs"], numbers["val_pairs"], numbers["test_pairs"]) == (200, 23, 11)
    assert numbers["train_dropped_empty"] == 1
    assert numbers["train_dropped_too_long"] == 1
    assert numbers["train_dropped_ratio"] == 1
    assert numbers["train_source_tokens"] == int(module.train_store.source_lengths.sum())
    assert numbers["source_tokenizer_sha256"] == module.tokenizers.source.sha256
    assert numbers["source_vocabulary"] == module.tokenizers.source.vocab_size == 4 + 14


def test_nothing_is_made_twice() -> None:
    pairs = source()
    first = ready(data(pairs))
    assert pairs.read == {"train": 2, "val": 1, "test": 1}  # Training: tokenizer, then ids.
    second = ready(data(pairs))
    assert pairs.read == {"train": 2, "val": 1, "test": 1}
    assert second.train_store.folder == first.train_store.folder


def test_a_stored_tokenizer_is_never_trained_again() -> None:
    class Counting(Unigram):
        trained = 0

        def train(self, texts: Iterable[str], vocab_size: int) -> Tokenizer:
            Counting.trained += 1
            return super().train(texts, vocab_size)

    shas = [
        ready(data(tokenizer=Counting(), max_length=n)).tokenizers.source.sha256 for n in (90, 91)
    ]
    assert Counting.trained == 1
    assert shas[0] == shas[1]


def test_what_changes_the_data_changes_its_place() -> None:
    modules = [
        data(),
        data(tokenizer=Characters()),
        data(tokenizer=Words(lowercase=True)),
        data(shared_vocabulary=False),
        data(max_length=200),
        data(max_length_ratio=3.0),
        data(source(train=TRAIN[:-1])),
    ]
    folders = [ready(module, "fit").train_store.folder for module in modules]
    assert len(set(folders)) == len(modules)


def test_separate_vocabularies() -> None:
    shared, separate = ready(data()), ready(data(shared_vocabulary=False))
    assert shared.tokenizers.shared
    assert not separate.tokenizers.shared
    assert separate.tokenizers.source.encode_batch(["eins"]) == [[3]]
    assert separate.tokenizers.target.encode_batch(["one"]) == [[3]]


@pytest.mark.parametrize(
    ("stage", "read"),
    [
        ("fit", {"train": 2, "val": 1}),
        ("validate", {"train": 1, "val": 1}),
        ("test", {"train": 1, "test": 1}),
        ("predict", {"train": 1, "test": 1}),
    ],
)
def test_a_stage_reads_what_it_needs(stage: str, read: dict[str, int]) -> None:
    pairs = source()
    module = data(pairs)
    at_stage(module, stage)
    ready(module, stage)
    assert pairs.read == read
    assert pairs.prepared == 1


def test_prediction_reads_the_sources_of_the_test_split() -> None:
    batches = list(ready(data()).predict_dataloader())
    texts = {i: t for b in batches for i, t in zip(b.indices, b.source_text, strict=True)}
    assert [texts[i] for i in range(len(TEST))] == [x for x, _ in TEST]


def test_prediction_reads_a_file(tmp_path: Path) -> None:
    lines = ["two one", "", "three one seven unheard-of", "two one"]
    (tmp_path / "input").write_text("\n".join(lines) + "\n")
    pairs = InMemory(train=TRAIN)
    batches = list(ready(data(pairs, predict_file=str(tmp_path / "input"))).predict_dataloader())
    texts = {i: t for b in batches for i, t in zip(b.indices, b.source_text, strict=True)}
    assert [texts[i] for i in range(4)] == lines
    assert {text for batch in batches for text in batch.target_text} == {""}


def test_the_largest_batch_is_the_largest() -> None:
    module = ready(data())
    sizes = [
        batch.rows * max(batch.source.shape[1], batch.target.shape[1] - 1)
        for batch in module.train_dataloader()
    ]
    largest = module.largest_batch()
    assert largest.rows * max(largest.source.shape[1], largest.target.shape[1] - 1) == max(sizes)


def test_a_missing_split_is_named_with_those_that_exist() -> None:
    module = data(val_split="valid")
    at_stage(module, "fit")
    with pytest.raises(DataError, match="no split 'valid'; it has 'val'"):
        module.prepare_data()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_tokens", 0),
        ("eval_batch_tokens", 0),
        ("max_length", 0),
        ("max_length_ratio", 0.5),
        ("num_workers", -1),
        ("seed", -1),
    ],
)
def test_arguments_out_of_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(DataError, match=f"{argument} is {value}; it must be at least"):
        data(None, **{argument: value})


def test_a_budget_below_the_longest_pair_is_refused() -> None:
    with pytest.raises(DataError, match=r"batch_tokens is 6, .* has 7 tokens .*max_length"):
        ready(data(batch_tokens=6))


def test_a_filter_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="has no pairs: 0 pairs kept, 200 dropped"):
        ready(data(max_length=1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_pairs_is_refused(split: str) -> None:
    with pytest.raises(DataError, match=f"split '{split}' has no pairs"):
        ready(data(source(**{split: []})))


class Oversized(Words):
    """Ignores the capacity it is given."""

    def train(self, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        return super().train(texts, 10 * vocab_size)


def test_a_vocabulary_above_its_capacity_is_refused_and_not_stored(tmp_path: Path) -> None:
    module = TranslationData(source(), 10, tokenizer=Oversized(), cache_dir=str(tmp_path / "c"))
    for _ in range(2):
        with pytest.raises(DataError, match="vocab_size is 10, but the tokenizer has 18 entries"):
            module.prepare_data()
    assert not [path for path in (tmp_path / "c" / "tokenizers").iterdir() if path.is_dir()]


def test_a_damaged_tokenizer_is_refused() -> None:
    module = ready(data())
    (file,) = (module.cache / "tokenizers").glob("*/target.json")
    file.write_text("{")
    with pytest.raises(DataError, match=r"is damaged .*; delete that folder"):
        module.setup("fit")


def test_a_full_disk_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    module = data()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"^cache_dir: no space left .*free some space"):
            module.prepare_data()
    assert len(ready(module).train_store) == 200


def test_other_machines_must_have_the_same_tokenizer() -> None:
    module = ready(data())
    strategy = SimpleNamespace(
        broadcast=lambda shas: ["another", "another"], reduce_boolean_decision=lambda same: same
    )
    module.trainer = SimpleNamespace(world_size=2, strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(DataError, match="not all machines have the same tokenizer"):
        module.setup("fit")


def test_a_checkpoint_of_another_tokenizer_is_refused() -> None:
    module, other = ready(data()), ready(data(tokenizer=Characters()))
    module.load_state_dict(module.state_dict())
    with pytest.raises(DataError, match="another tokenizer"):
        module.load_state_dict(other.state_dict())


def test_text_files_and_bytes_work_from_end_to_end(tmp_path: Path) -> None:
    for name, side in (("en", 0), ("de", 1)):
        (tmp_path / name).write_text("".join(f"{pair[side]}\n" for pair in TRAIN))
    files = (str(tmp_path / "en"), str(tmp_path / "de"))
    module = ready(
        TranslationData(TextPairs(train=files, val=files), 300, tokenizer=ByteLevelBPE())
    )
    texts = {
        i: t for b in module.val_dataloader() for i, t in zip(b.indices, b.target_text, strict=True)
    }
    assert [texts[i] for i in range(200)] == [y for _, y in TRAIN]


# Under a Trainer.


class Recorder(LightningModule):
    """Trains nothing to speak of, and writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, int, tuple[int, ...]]] = []

    def training_step(self, batch: TranslationBatch, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, tuple(batch.indices)))
        return self.weight.sum()

    def validation_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stopped(Exception):
    pass


class SaveAndStop(Callback):
    """Saves a checkpoint after so many micro-batches, and ends the run."""

    def __init__(self, after: int, path: Path) -> None:
        self.left, self.path = after, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            raise Stopped


def fit(
    folder: Path,
    *,
    stop: int | None = None,
    resume: bool = False,
    num_workers: int = 0,
    accumulate: int = 1,
    **options: Any,
) -> Recorder:
    checkpoint = folder / "some.ckpt"
    model = Recorder()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        callbacks=[] if stop is None else [SaveAndStop(stop, checkpoint)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )
    module = data(batch_tokens=300, num_workers=num_workers)
    if stop is None:
        trainer.fit(model, module, ckpt_path=checkpoint if resume else None, weights_only=True)
        return model
    with pytest.raises(Stopped):
        trainer.fit(model, module)
    return model


def steps(seen: list[tuple[int, int, tuple[int, ...]]], accumulate: int) -> list[set[int]]:
    """The examples of each optimizer step."""
    return [
        set(itertools.chain.from_iterable(indices for _, _, indices in seen[i : i + accumulate]))
        for i in range(0, len(seen), accumulate)
    ]


def test_every_epoch_sees_all_pairs_in_an_order_of_its_own(tmp_path: Path) -> None:
    seen = fit(tmp_path).seen
    epochs = [[indices for e, _, indices in seen if e == epoch] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain.from_iterable(epoch)) == list(range(200))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {len(epoch) for epoch in epochs} == {len(epochs[0])}


def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    seen = fit(tmp_path, overfit_batches=2).seen
    assert [indices for _, _, indices in seen] == [indices for _, _, indices in seen[:2]] * 3


N = 5  # Optimizer steps of an epoch.


@pytest.mark.parametrize(
    ("num_workers", "accumulate", "stop"),
    [
        *itertools.product([0], [1], [1, 4, N, N + 1, 2 * N]),
        *itertools.product([0], [2], [1, 4, 5, 2 * N - 1, 2 * N, 2 * N + 3]),
        *itertools.product([2], [1], [N, N + 2]),
    ],
)
def test_a_resumed_run_goes_on_exactly_there(
    tmp_path: Path, num_workers: int, accumulate: int, stop: int
) -> None:
    whole = fit(tmp_path, accumulate=accumulate).seen
    assert len(whole) == 3 * N * accumulate
    fit(tmp_path, accumulate=accumulate, num_workers=num_workers, stop=stop)
    resumed = fit(tmp_path, accumulate=accumulate, num_workers=num_workers, resume=True).seen
    # Half a step is lost with its gradients; the step is taken from its start.
    assert resumed == whole[stop - stop % accumulate :]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("stop", [4, 5, N, 2 * N, 2 * N + 2])
def test_a_run_may_resume_with_its_steps_split_differently(
    tmp_path: Path, before: int, after: int, stop: int
) -> None:
    whole = steps(fit(tmp_path).seen, 1)
    fit(tmp_path, accumulate=before, stop=stop)
    resumed = fit(tmp_path, accumulate=after, resume=True).seen
    assert steps(resumed, after) == whole[stop // before :]


def test_a_run_resumes_after_an_epoch_cut_short(tmp_path: Path) -> None:
    whole = fit(tmp_path, limit_train_batches=3).seen
    fit(tmp_path, limit_train_batches=3, stop=3)
    assert fit(tmp_path, limit_train_batches=3, resume=True).seen == whole[3:]


def test_fewer_evaluation_batches_than_processes_is_no_error() -> None:
    assert data().allow_zero_length_dataloader_with_multiple_devices


def short_and_long(folder: Path, split: str, extra: list[str]) -> tuple[str, str]:
    """Write the two files of a split, with further lines on both sides."""
    for side in ("de", "en"):
        lines = [f"Satz {i} {side}" for i in range(20)] + extra
        text = "".join(f"{line}\n" for line in lines)
        (folder / f"{split}.{side}").write_text(text, encoding="utf-8")
    return str(folder / f"{split}.de"), str(folder / f"{split}.en")


def test_a_line_of_a_million_characters_is_dropped_and_holds_nothing_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = short_and_long(tmp_path, "train", ["x" * 1_000_000])
    data = TranslationData(TextPairs(train=train, val=short_and_long(tmp_path, "val", [])), 300)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_store) == 20
    assert "1 dropped" in capsys.readouterr().err


def test_a_million_characters_in_evaluation_are_one_clear_line(tmp_path: Path) -> None:
    val = short_and_long(tmp_path, "val", ["y " * 500_000])
    data = TranslationData(TextPairs(train=short_and_long(tmp_path, "train", []), val=val), 300)
    data.prepare_data()
    with pytest.raises(DataError, match=r"split 'val': sentence 21 has [\d,]+ tokens, more than"):
        data.setup("fit")
