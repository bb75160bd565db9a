"""Tagged sentences as batches: the tag of a word at its first token, nothing at the others."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from tx_lightning.data.blocks import IGNORED
from tx_lightning.data.errors import DataError
from tx_lightning.data.sampler import Share
from tx_lightning.data.tagged_sources import GrammarTags, TaggedSentence, TaggedSource
from tx_lightning.data.tagging import TaggingData
from tx_lightning.data.tokenizers import BOS, EOS, PAD, ByteLevelBPE, Characters

TRAIN = ["ab/N c/V", "c/V a/N bb/N a/N", "abc/N"]


class InMemory(TaggedSource):
    """Sentences given to it as word/tag."""

    def __init__(self, **splits: list[str]) -> None:
        self._splits = splits

    def splits(self) -> list[str]:
        return list(self._splits)

    def sentences(self, split: str) -> Iterator[TaggedSentence]:
        self.check_split(split)
        for number, sentence in enumerate(self._splits[split], start=1):
            pairs = [pair.split("/") for pair in sentence.split()]
            words, tags = [word for word, _ in pairs], [tag for _, tag in pairs]
            yield TaggedSentence(words, tags, f"{split}.conll, line {number}")

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        return repr(self._splits[split])


def data(source: TaggedSource | None = None, n_tags: int = 2, **changed: Any) -> TaggingData:
    source = InMemory(train=TRAIN, val=TRAIN[:2], test=TRAIN[2:]) if source is None else source
    arguments = {"tokenizer": Characters(), "batch_tokens": 100, **changed}
    return TaggingData(source, 40, n_tags, **arguments)


def ready(module: TaggingData, stage: str | None = None) -> TaggingData:
    module.prepare_data()
    module.setup(stage)
    return module


def test_a_batch_value_by_value() -> None:
    module = ready(data())
    a, b, c = (module.tokenizers.source.encode_batch([word])[0][0] for word in "abc")
    (batch,) = module.train_dataloader()
    order = np.argsort(batch.indices).tolist()
    assert batch.ids[order].tolist() == [
        [BOS, a, b, c, EOS, PAD, PAD],
        [BOS, c, a, b, b, a, EOS],
        [BOS, a, b, c, EOS, PAD, PAD],
    ]
    no, noun, verb = IGNORED, 0, 1
    assert module.labels == ["N", "V"]
    assert batch.labels[order].tolist() == [
        [no, noun, no, verb, no, no, no],
        [no, verb, noun, noun, no, noun, no],
        [no, noun, no, no, no, no, no],
    ]
    assert (batch.step_tokens, batch.labelled, batch.loss_tokens) == (7, 7, 7)
    assert (batch.n_tokens, batch.positions) == (5 + 7 + 5, 21)
    assert batch.words == []
    (evaluated,) = module.val_dataloader()
    words = [["ab", "c"], ["c", "a", "bb", "a"]]
    assert evaluated.words == [words[i] for i in evaluated.indices]


def test_the_embedded_cases_come_back_word_by_word() -> None:
    source = GrammarTags(n_train=80, n_val=20, n_test=5)
    module = TaggingData(source, 300, 5, tokenizer=ByteLevelBPE(), batch_tokens=200)
    ready(module)
    sentences = list(source.sentences("val"))
    tokenizer = module.tokenizers.source
    for batch in module.val_dataloader():
        assert batch.positions <= 200
        for row, labels, words, i in zip(
            batch.ids, batch.labels, batch.words, batch.indices, strict=True
        ):
            assert words == sentences[i].words
            tags = [module.labels[label] for label in labels.tolist() if label != IGNORED]
            assert tags == sentences[i].tags
            starts = (labels != IGNORED).nonzero().flatten().tolist()
            bounds = [*starts, int((row != PAD).sum()) - 1]
            for word, start, end in zip(words, bounds, bounds[1:], strict=False):
                assert tokenizer.decode_batch([row[start:end].tolist()]) == [word]
    for step in module.train_dataloader():
        assert step.step_tokens == step.labelled == int((step.labels != IGNORED).sum())


def test_a_share_that_is_not_real_counts_nothing() -> None:
    share = Share(np.array([1]), step_tokens=7, parts=8, real=False)
    batch = ready(data()).train_batches().__getitems__(share)
    assert set(batch.labels.flatten().tolist()) == {IGNORED}
    assert (batch.labelled, batch.n_tokens, batch.step_tokens) == (0, 0, 7)


def test_what_is_too_long_is_cut_dropped_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    module = ready(data(max_length=5))
    (batch,) = module.train_dataloader()
    order = np.argsort(batch.indices).tolist()
    assert batch.labels[order].tolist()[1] == [IGNORED, 1, 0, 0, IGNORED]
    assert batch.labelled == 2 + 3 + 1
    assert module.statistics["train_cut"] == 1
    assert "train: 1 sentences cut: more than 5 tokens (max_length)" in capsys.readouterr().err
    module = ready(data(max_length=5, too_long="drop"))
    assert (len(module.train_store), len(module.val_store)) == (2, 2)
    assert module.train_store.counts.dropped == {"too_long": 1}
    assert module.val_store.counts.cut == 1
    with pytest.raises(DataError, match=r"train\.conll, line 2: 7 tokens, .* max_length \(5\)"):
        data(max_length=5, too_long="refuse").prepare_data()


def test_tags_are_known_or_refused() -> None:
    says = "n_tags is 3, but the training split has 2 tags: 'N', 'V'; set n_tags to 2"
    with pytest.raises(DataError, match=says):
        data(n_tags=3).prepare_data()
    with pytest.raises(DataError, match=r"val\.conll, line 2: there is no tag 'X'; the training"):
        data(InMemory(train=TRAIN, val=["a/N", "b/X"])).prepare_data()
    module = data(n_tags=3)
    module.given_labels = ["V", "X", "N"]
    (batch,) = ready(module).train_dataloader()
    assert set(batch.labels.flatten().tolist()) == {IGNORED, 0, 2}


def test_lines_to_predict(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("ab  c\n\na b a\n")
    module = data(predict_file=str(file))
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        state=SimpleNamespace(fn=TrainerFn.PREDICTING),
        world_size=1,
        global_rank=0,
        accumulate_grad_batches=1,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    ready(module, "predict")
    (batch,) = module.predict_dataloader()
    words = [["ab", "c"], [], ["a", "b", "a"]]
    assert batch.words == [words[i] for i in batch.indices]
    assert sorted(batch.indices) == [0, 1, 2]
    assert set(batch.labels.flatten().tolist()) == {IGNORED}


def test_refused_arguments() -> None:
    with pytest.raises(DataError, match="n_tags is 1; it must be at least 2"):
        data(n_tags=1)
    with pytest.raises(DataError, match="max_length is 2; it must be at least 3"):
        data(max_length=2)
    with pytest.raises(
        DataError, match="batch_tokens is 6, but the longest training example has 7"
    ):
        ready(data(batch_tokens=6))
