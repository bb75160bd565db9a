"""Documents to a stream, and the numbers that belong to it."""

import math
from collections.abc import Iterator
from typing import Any

import pytest

from tx_lightning.data.errors import DataError
from tx_lightning.data.language_modeling import LanguageModelingData, pieces
from tx_lightning.data.text_sources import GrammarText, TextSource
from tx_lightning.data.tokenizers import EOS, Characters, Words

TRAIN = ["one two three\n", "two two", "three one two one"] * 4
HELD_OUT = ["two one", "three"]


class Documents(TextSource):
    def __init__(self, **changed: list[str]) -> None:
        self._texts = {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT[::-1], **changed}

    def splits(self) -> list[str]:
        return list(self._texts)

    def texts(self, split: str) -> Iterator[str]:
        yield from self._texts[split]

    def fingerprint(self, split: str) -> str:
        return repr(hash(tuple(self._texts[split])))


def data(source: TextSource | None = None, **changed: Any) -> LanguageModelingData:
    arguments = {"tokenizer": Words(), "block_length": 4, "batch_tokens": 16, **changed}
    module = LanguageModelingData(source or Documents(), 50, **arguments)
    module.prepare_data()
    module.setup()
    return module


def test_an_end_token_follows_each_document() -> None:
    module = data()
    tokenizer = module.tokenizers.source
    stream = module.val_store.stream("text").tolist()
    words = [tokenizer.encode_batch([text])[0] for text in HELD_OUT]
    assert stream == [*words[0], EOS, *words[1], EOS]
    batches = list(module.val_dataloader())
    assert [t for b in batches for row in b.targets.tolist() for t in row if t >= 0] == stream


def test_bits_per_byte_count_the_bytes_of_the_text() -> None:
    module = data(Documents(val=["zwölf", ""]), tokenizer=Characters())
    # 5 characters and two ends, of a text of 6 bytes
    assert module.bytes_per_token("val") == 6 / 7
    assert module.bytes_per_token("test") == len("".join(HELD_OUT)) / (
        len("".join(HELD_OUT)) + len(HELD_OUT)
    )


def test_the_optimum_is_that_of_the_grammar() -> None:
    source = GrammarText(n_train=50, n_val=20, n_test=20)
    module = data(source)
    tokens = len(module.val_store.stream("text"))
    expected = source.optimum_log_loss("val")
    assert expected is not None
    assert module.optimum("val") == pytest.approx(expected / tokens)
    assert module.optimum("test") != module.optimum("val")
    assert data().optimum("val") is None


def test_test_has_a_second_pass_with_a_sliding_window() -> None:
    module = data(Documents(test=TRAIN), sliding_stride=2)
    loader = module.test_dataloader()
    side_by_side, sliding = loader.loaders
    assert sum(b.predicted for b in side_by_side) == sum(b.predicted for b in sliding)
    assert sum(b.positions for b in sliding) > sum(b.positions for b in side_by_side)
    assert [batch.sliding for batch in loader] == [False] * len(side_by_side) + [True] * len(
        sliding
    )
    assert len(loader) == len(side_by_side) + len(sliding)
    assert len(data(sliding_stride=None).test_dataloader().loaders) == 1


def test_an_example_is_a_validation_block_without_padding() -> None:
    module = data()
    assert module.n_examples == math.ceil(len(module.val_store.stream("text")) / 4)
    last = module.example(module.n_examples - 1)
    assert last.ids.shape[0] == 1
    assert last.ids.shape[1] == len(module.val_store.stream("text")) - 4 * (module.n_examples - 1)


def test_the_largest_batch_is_a_full_one() -> None:
    assert data().largest_batch().rows == 4


def test_a_long_document_is_learned_from_in_pieces_that_are_the_whole() -> None:
    text = "".join(f"line {i} " + "x" * (i % 90) + "\n" for i in range(500)) + "y" * 9000
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert len(parts) > 3
    assert max(map(len, parts)) <= 2 * 4096
    assert list(pieces("short")) == ["short"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sliding_stride": 5}, r"sliding_stride is 5; it must be from 1 to block_length \(4\)"),
        ({"block_length": 0}, "block_length is 0; it must be at least 1"),
    ],
)
def test_impossible_numbers_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data(**changed)
