"""Multi30k by name: the published files where they are at hand, and what is said where not."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from tx_lightning.data.errors import DataError
from tx_lightning.data.multi30k import Language, Multi30k
from tx_lightning.data.text import read_lines

LANGUAGES: tuple[Language, ...] = get_args(Language)
SIZES = {"train": 29_000, "val": 1_014, "test_2016_flickr": 1_000, "test_2017_flickr": 1_000}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TX_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files; no network."""
    monkeypatch.setenv("TX_LIGHTNING_DATA", str(real_data))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nobody listens."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def refusal(action: Callable[[], Any]) -> str:
    """The message of the DataError that the action ends with: always one line."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("corpus")
@pytest.mark.parametrize("source_language", LANGUAGES)
@pytest.mark.parametrize("target_language", LANGUAGES)
def test_every_pair_and_direction(source_language: Language, target_language: Language) -> None:
    if source_language == target_language:
        assert "name two" in refusal(lambda: Multi30k(source_language, target_language))
        return
    source = Multi30k(source_language, target_language)
    source.prepare()
    assert {split: sum(1 for _ in source.pairs(split)) for split in source.splits()} == SIZES


@pytest.mark.usefixtures("corpus")
def test_texts_are_as_published() -> None:
    expected = (
        "A group of men are loading cotton onto a truck",
        "Eine Gruppe von Männern lädt Baumwolle auf einen Lastwagen",
    )
    assert next(Multi30k().pairs("val")) == expected
    assert next(Multi30k("de", "en").pairs("val")) == expected[::-1]


@pytest.mark.usefixtures("corpus")
@pytest.mark.parametrize("language", ["de", "en"])
def test_tokenized_reference_belongs_to_the_test_set(language: Language) -> None:
    """Its words, put together again, are those of the raw text, lower-cased."""
    source = Multi30k("fr", language)
    tokenized = read_lines(source.tokenized_reference())
    raw = [target for _, target in source.pairs("test_2016_flickr")]

    def letters(text: str) -> str:
        return "".join(character for character in text.lower() if character.isalpha())

    same = [
        letters(line.replace("&quot;", '"').replace("&apos;", "'")) == letters(text)
        for line, text in zip(tokenized, raw, strict=True)
    ]
    assert sum(same) >= 990  # upstream corrected a few lines of one, not of the other


def test_there_is_no_tokenized_reference_in_french() -> None:
    assert refusal(Multi30k("en", "fr").tokenized_reference).startswith(
        "Multi30k: there is no tokenized reference in 'fr'; there are 'test_2016_flickr.lc.norm.tok"
    )


def test_splits_and_fingerprints_need_no_file() -> None:
    prints = {
        (source, target, split): Multi30k(source, target).fingerprint(split)
        for source in LANGUAGES
        for target in LANGUAGES
        if source != target
        for split in Multi30k(source, target).splits()
    }
    assert len(prints) == 6 * 4
    assert len(set(prints.values())) == len(prints)
    assert Multi30k().fingerprint("val") == prints["en", "de", "val"]


def test_unknown_split_lists_the_nearest_first() -> None:
    expected = "Multi30k has no split 'test_2016'; it has 'test_2016_flickr', 'test_2017_flickr', "
    assert refusal(lambda: Multi30k().pairs("test_2016")).startswith(expected)
    assert refusal(lambda: Multi30k().fingerprint("test_2016")).startswith(expected)


def test_unknown_language_lists_those_there_are() -> None:
    czech: Any = "cs"
    assert refusal(lambda: Multi30k("en", czech)) == (
        "Multi30k: target_language is 'cs'; there are 'de', 'en', 'fr'"
    )


def test_no_network_and_no_copy_says_which_files_to_put_where(
    no_network: str, own_cache: Path
) -> None:
    files = ", ".join(f"{split}.{language}.gz" for split in SIZES for language in ("de", "fr"))
    source = Multi30k("de", "fr", url=no_network)
    assert refusal(source.prepare) == (
        f"cannot download {no_network}/raw/train.de.gz (no connection); try again, or put {files} "
        f"from {no_network}/raw into {own_cache}/multi30k or into the folder multi30k of "
        "$TX_LIGHTNING_DATA"
    )
    assert refusal(lambda: source.pairs("val")).startswith("there is no multi30k/val.de.gz here; ")
    english = Multi30k("de", "en", url=no_network)
    assert f"{no_network}/tok/test_2016_flickr.lc.norm.tok.en" in refusal(
        english.tokenized_reference
    )
