"""Reading text: what counts as a line, and what is refused in one clear line."""

import gzip
import tracemalloc
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx_lightning.data import text as text_module
from tx_lightning.data.errors import DataError
from tx_lightning.data.text import checked, count_lines, read_aligned, read_lines


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refusal(action: Callable[[], Any]) -> str:
    """The message of the DataError that the action ends with: always one line."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(params=["corpus.en", "corpus.en.gz"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A path for a plain file, then for a gzip file: `write` does the rest."""
    return tmp_path / str(request.param)


def test_lines_without_their_ends(file: Path) -> None:
    write(file, b"eins\nzwei drei\n")
    assert list(read_lines(file)) == ["eins", "zwei drei"]


def test_windows_line_ends_are_not_text(file: Path) -> None:
    write(file, b"one\r\ntwo\r\r\n\r\nfour\r\n")
    assert list(read_lines(file)) == ["one", "two", "", "four"]


def test_byte_order_mark_is_not_text_but_only_at_the_start(file: Path) -> None:
    write(file, b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert list(read_lines(file)) == ["one", "\ufefftwo"]


def test_empty_lines_are_texts_and_the_last_line_need_not_end(file: Path) -> None:
    write(file, b"\n\none\n\nlast")
    assert list(read_lines(file)) == ["", "", "one", "", "last"]


def test_other_separators_end_no_line(file: Path) -> None:
    text = "a\u2028b\x85c\x0bd\x0ce\x1cf"
    write(file, f"{text}\nnext\n".encode())
    assert list(read_lines(file)) == [text, "next"]


def test_spaces_and_unicode_forms_stay_as_they_are(file: Path) -> None:
    texts = ["  two  spaces ", "\ttab\t", "u\u0308 \u00fc", "\u200bzero\u00a0width", "🙂"]
    write(file, "\n".join(texts).encode())
    assert list(read_lines(file)) == texts


def test_a_carriage_return_within_a_line_is_a_space(file: Path) -> None:
    write(file, b"one\rtwo\nthree\n")
    assert list(read_lines(file)) == ["one two", "three"]


def test_a_line_of_a_million_characters_passes(file: Path) -> None:
    long = "ä" * 1_000_000
    write(file, f"short\n{long}\nshort\n".encode())
    assert list(read_lines(file)) == ["short", long, "short"]


def test_a_file_that_is_one_endless_line_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "LONGEST_LINE", 2**20)
    write(file, b"a" * (2**20 - 1) + b"\n" + b"b" * 2**24)
    tracemalloc.start()
    try:
        message = refusal(lambda: deque(read_lines(file), maxlen=0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message.startswith(f"{file}, line 2 is longer than 1 MiB")
    assert peak < 2**23  # of the 2**24 bytes of the line


def test_bytes_that_are_not_utf8_are_refused_by_file_and_line(file: Path) -> None:
    write(file, b"one\ntwo\nGr\xfc\xdfe\n")
    lines = read_lines(file)
    assert list(islice(lines, 2)) == ["one", "two"]
    message = refusal(lambda: list(lines))
    assert message.startswith(f"{file}, line 3: byte 3 (0xfc) is not UTF-8")
    assert "iconv -f LATIN1" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_recognized(encoding: str, file: Path) -> None:
    write(file, "one\ntwo\n".encode(encoding))
    message = refusal(lambda: list(read_lines(file)))
    assert message.startswith(f"{file}, line 1")
    assert "UTF-16" in message


def test_surrogates_encoded_as_utf8_are_refused(file: Path) -> None:
    write(file, b"\xed\xa0\x80\n")
    assert "line 1: byte 1 (0xed) is not UTF-8" in refusal(lambda: list(read_lines(file)))


def test_nul_bytes_are_refused_by_file_and_line(file: Path) -> None:
    write(file, b"one\nt\0wo\n")
    message = refusal(lambda: list(read_lines(file)))
    assert message.startswith(f"{file}, line 2 holds a NUL byte")
    assert r"tr -d '\000'" in message


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"], ids=["no bytes", "only a BOM"])
def test_an_empty_file_is_refused(content: bytes, file: Path) -> None:
    write(file, content)
    assert refusal(lambda: list(read_lines(file))) == f"{file} is empty: it has no lines"


def test_gzip_is_known_by_content_not_name(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.gz", tmp_path / "packed.txt"
    plain.write_bytes(b"one\ntwo\n")
    packed.write_bytes(gzip.compress(b"one\ntwo\n"))
    assert list(read_lines(plain)) == list(read_lines(packed)) == ["one", "two"]


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_gzip_file_cut_in_half_is_refused(keep: float, tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(f"line {n * n}" for n in range(1000)).encode())
    cut = tmp_path / "cut.gz"
    cut.write_bytes(whole[: int(len(whole) * keep)])
    message = refusal(lambda: list(read_lines(cut)))
    assert message.startswith(f"{cut} is a damaged gzip file, perhaps cut in half")


def test_a_gzip_file_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b"one\ntwo\n" * 100))
    content[-6] ^= 1  # in the checksum at the end
    file = tmp_path / "flipped.gz"
    file.write_bytes(content)
    assert "is a damaged gzip file" in refusal(lambda: list(read_lines(file)))


def test_a_missing_file_lists_what_the_folder_has_nearest_first(tmp_path: Path) -> None:
    for name in ("alpha", "beta", "train.en"):
        (tmp_path / name).touch()
    message = refusal(lambda: list(read_lines(tmp_path / "trian.en")))
    assert message == (
        f"there is no file {tmp_path}/trian.en; the folder has 'train.en', 'alpha', 'beta'"
    )


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    message = refusal(lambda: list(read_lines(tmp_path / "corpora" / "train.en")))
    assert message.endswith(f"the folder {tmp_path}/corpora does not exist")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert refusal(lambda: list(read_lines(tmp_path))) == f"cannot read {tmp_path}: Is a directory"


def test_the_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "corpus.en", b"one\n")
    assert list(read_lines("~/corpus.en")) == ["one"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"))))
def test_any_text_comes_back(texts: list[str]) -> None:
    decoded = [
        text_module._decoded(f"{text}\n".encode(), "corpus", number)
        for number, text in enumerate(texts)
    ]
    assert decoded == texts


@pytest.mark.parametrize(
    "content", [b"one", b"one\n", b"one\ntwo", b"\n", b"\n\n", b"a\n\n", b"a\r\nb\r\n"]
)
def test_lines_are_counted_as_they_are_read(content: bytes, file: Path) -> None:
    write(file, content)
    assert count_lines(file) == len(list(read_lines(file)))


def test_aligned_lines_are_pairs(file: Path, tmp_path: Path) -> None:
    write(file, b"one\n\nthree\n")
    target = write(tmp_path / "corpus.de", b"eins\nzwei\n\n")
    assert list(read_aligned(file, target)) == [("one", "eins"), ("", "zwei"), ("three", "")]


@pytest.mark.parametrize(("source_lines", "target_lines"), [(1200, 1000), (1000, 1200), (3, 2)])
def test_different_line_counts_are_both_said(
    source_lines: int, target_lines: int, file: Path, tmp_path: Path
) -> None:
    write(file, b"one\n" * source_lines)
    target = write(tmp_path / "corpus.de", b"eins\n" * target_lines)
    pairs = read_aligned(file, target)
    common = min(source_lines, target_lines)
    assert len(list(islice(pairs, common))) == common
    assert refusal(lambda: list(pairs)).startswith(
        f"{file} has {source_lines:,} lines but {target} has {target_lines:,}:"
    )


def test_one_empty_file_of_two_is_said(file: Path, tmp_path: Path) -> None:
    write(file, b"one\n")
    target = write(tmp_path / "corpus.de", b"")
    assert (
        refusal(lambda: list(read_aligned(file, target))) == f"{target} is empty: it has no lines"
    )


def test_memory_does_not_grow_with_the_file(file: Path, tmp_path: Path) -> None:
    write(file, b"a sentence of some words\n" * 30_000)
    target = write(tmp_path / "corpus.de", b"ein Satz aus ein paar Worten\n" * 30_001)
    tracemalloc.start()
    try:
        refusal(lambda: deque(read_aligned(file, target), maxlen=0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 400_000  # buffers; the text is 1.6 MB


def test_text_of_other_formats_follows_the_same_rules() -> None:
    assert checked("one\r\ntwo\nthree\rfour", "here") == "one two three four"
    assert refusal(lambda: checked("a\0b", "f, line 3")).startswith("f, line 3 holds a NUL byte")
    message = refusal(lambda: checked("ab\ud83d", "f, line 3"))
    assert message.startswith("f, line 3: character 3 is U+D83D")
