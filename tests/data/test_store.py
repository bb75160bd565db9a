import errno
import fcntl
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from tx_lightning.data import writing
from tx_lightning.data.cache import CacheError, Progress, build_once
from tx_lightning.data.errors import DataError
from tx_lightning.data.store import PairStore, store_key
from tx_lightning.data.tokenizers import Characters, Tokenizer, Tokenizers, Words
from tx_lightning.data.writing import PairFilter, write_pairs

LETTERS = Characters().train(["abcdefgh ÄÖ☃"], 50)
BOTH = Tokenizers(LETTERS, LETTERS)
PAIRS = [("abc", "ab"), ("", "a"), ("Ä☃", "Ö b  "), ("abcdefgh", "h"), ("", "")]


def written(
    folder: Path,
    pairs: list[tuple[str, str]] = PAIRS,
    pair_filter: PairFilter | None = None,
    tokenizers: Tokenizers = BOTH,
) -> PairStore:
    folder.mkdir(parents=True)
    write_pairs(folder, iter(pairs), tokenizers, pair_filter)
    return PairStore(folder)


@pytest.mark.parametrize("chunk", [1, 2, 8192])
def test_a_store_gives_back_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(writing, "CHUNK", chunk)
    store = written(tmp_path / "store")
    assert len(store) == len(PAIRS)
    for i, (source, target) in enumerate(PAIRS):
        assert (store.source_text(i), store.target_text(i)) == (source, target)
        assert store.source(i).tolist() == LETTERS.encode_batch([source])[0]
        assert store.target(i).tolist() == LETTERS.encode_batch([target])[0]
    assert store.source_lengths.tolist() == [3, 0, 2, 8, 0]
    assert store.target_lengths.tolist() == [2, 1, 5, 1, 0]
    assert store.tokens == {"source": 13, "target": 9}
    assert store.source_lengths.dtype == store.target_lengths.dtype == np.int32


def test_the_two_sides_have_their_own_tokenizers(tmp_path: Path) -> None:
    words = Words().train(["two words"], 50)
    store = written(tmp_path / "s", [("ab", "two words")], tokenizers=Tokenizers(LETTERS, words))
    assert store.source(0).tolist() == LETTERS.encode_batch(["ab"])[0]
    assert store.target(0).tolist() == words.encode_batch(["two words"])[0]


def test_ids_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    names = [f"w{i}" for i in range(66_000)]
    many = Words().train([" ".join(names)], 80_000)
    assert many.vocab_size > 2**16
    small = written(tmp_path / "small")
    large = written(tmp_path / "large", [(" ".join(names), "a")], tokenizers=Tokenizers(many, many))
    assert small.source(0).dtype == np.uint16
    assert large.source(0).dtype == np.uint32
    assert large.source(0).tolist() == many.encode_batch([" ".join(names)])[0]
    assert large.source(0).max() >= 2**16


def test_an_empty_split_is_an_empty_store(tmp_path: Path) -> None:
    store = written(tmp_path / "store", [])
    assert len(store) == 0
    assert store.source_lengths.tolist() == []


def test_a_pickled_store_is_a_path(tmp_path: Path) -> None:
    store = written(tmp_path / "store", PAIRS * 500)
    message = pickle.dumps(store)
    assert len(message) < 500
    assert pickle.loads(message).target_text(2) == "Ö b  "


def resident(folder: Path) -> int:
    """Bytes of the files of a folder that this process has mapped and in memory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            counts = str(folder) in line
        elif counts and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc")
def test_what_is_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    rows = [("abcdefgh" * (30 + i % 3), "h") for i in range(20_000)]
    written(folder, rows)
    size = (folder / "source.ids").stat().st_size

    store = PairStore(folder)
    assert sum(int(store.source(i).max()) for i in range(len(store))) > 0
    assert store.row_lengths("source", extra=1).max() == 8 * 32 + 1
    assert store.source_text(7) == rows[7][0]
    assert resident(folder) < size / 4
    mapped = np.memmap(folder / "source.ids", mode="r")  # what it does not do
    assert mapped.max() > 0
    assert resident(folder) >= size


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's /proc")
def test_a_store_closes_its_files(tmp_path: Path) -> None:
    written(tmp_path / "store")
    before = open_files()
    store = PairStore(tmp_path / "store")
    assert open_files() > before
    del store
    gc.collect()
    assert open_files() == before


def test_lengths_and_slices_are_those_of_the_rows(tmp_path: Path) -> None:
    store = written(tmp_path / "store")
    lengths = store.row_lengths("source", extra=1)
    assert lengths[1:4].tolist() == [1, 3, 9]
    assert lengths[np.array([4, 0])].tolist() == [1, 4]
    assert (len(lengths), lengths.max()) == (len(PAIRS), 9)
    slices = store.slices("source")
    assert len(slices) == store.tokens["source"]
    assert slices[3:13].tolist() == [*store.source(2).tolist(), *store.source(3).tolist()]
    assert written(tmp_path / "empty", []).row_lengths("source").max() == 0


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (0, 3, "empty"),
        (3, 0, "empty"),
        (0, 11, "empty"),
        (10, 10, None),
        (11, 10, "too_long"),
        (10, 11, "too_long"),
        (1, 11, "too_long"),
        (2, 6, None),
        (6, 2, None),
        (2, 7, "ratio"),
        (7, 2, "ratio"),
    ],
)
def test_filter(source: int, target: int, reason: str | None) -> None:
    assert PairFilter(max_length=10, max_length_ratio=3.0).reason(source, target) == reason


def test_without_a_ratio_only_length_counts() -> None:
    assert PairFilter(max_length=10).reason(1, 10) is None


def test_dropped_pairs_are_counted_and_gone(tmp_path: Path) -> None:
    store = written(tmp_path / "store", PAIRS, PairFilter(max_length=5, max_length_ratio=2.0))
    assert [store.source_text(i) for i in range(len(store))] == ["abc"]
    assert store.counts.dropped == {"empty": 2, "too_long": 1, "ratio": 1}
    assert str(store.counts) == "1 pairs kept, 4 dropped (2 empty, 1 too_long, 1 ratio)"
    assert str(written(tmp_path / "all").counts) == "5 pairs kept, 0 dropped"


def test_a_line_of_a_million_characters_is_dropped_as_too_long(tmp_path: Path) -> None:
    store = written(tmp_path / "store", [("a" * 10**6, "a"), ("a", "a")], PairFilter(256))
    assert len(store) == 1
    assert store.counts.dropped["too_long"] == 1


def test_a_key_depends_on_all_that_the_content_depends_on() -> None:
    other = Tokenizers(LETTERS, Characters().train(["xyz"], 50))
    keys = [
        store_key("f", BOTH, None),
        store_key("g", BOTH, None),
        store_key("f", other, None),
        store_key("f", BOTH, asdict(PairFilter(5))),
        store_key("f", BOTH, asdict(PairFilter(6))),
        store_key("f", BOTH, asdict(PairFilter(5, 2.0))),
    ]
    assert len(set(keys)) == len(keys)
    assert store_key("f", BOTH, asdict(PairFilter(5))) == keys[3]


@pytest.mark.parametrize(
    ("name", "content"),
    [("meta.json", b"{"), ("meta.json", b"{}"), ("source.ids", b""), ("target.text", None)],
)
def test_a_damaged_store_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = tmp_path / "store"
    written(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CacheError, match=r"is damaged .*; delete that folder"):
        PairStore(folder)


def build(folder: Path) -> None:
    (folder / "content").write_text("whole")


def left_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if not path.name.endswith(".lock")}


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    build_once(folder, build)
    build_once(folder, Path.unlink)  # Not called.
    assert (folder / "content").read_text() == "whole"
    assert left_in(folder.parent) == {"key"}


@pytest.mark.parametrize("locks", [True, False])
def test_many_may_build_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    def no_locks(file: IO[bytes], operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = tmp_path / "key"
    n = 4
    ready = threading.Barrier(n)
    together = threading.Barrier(1 if locks else n)
    builds: list[Path] = []
    errors: list[BaseException] = []

    def slowly(temporary: Path) -> None:
        builds.append(temporary)
        build(temporary)
        together.wait(timeout=10)
        time.sleep(0.1)  # Whoever does not wait for the lock comes by now.

    def process() -> None:
        try:
            ready.wait(timeout=10)
            build_once(folder, slowly)
            assert (folder / "content").read_text() == "whole"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=process) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(builds) == (1 if locks else n)
    assert left_in(tmp_path) == {"key"}


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "key", interrupted)
    assert left_in(tmp_path) == set()


def test_a_killed_build_is_cleared_away_and_done_again(tmp_path: Path) -> None:
    killed = (
        "import os, pathlib, signal, sys\n"
        "from tx_lightning.data.cache import build_once\n"
        "def build(folder):\n"
        "    (folder / 'content').write_text('ha')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_once(pathlib.Path(sys.argv[1]), build)\n"
    )
    folder = tmp_path / "key"
    done = subprocess.run([sys.executable, "-c", killed, str(folder)], check=False)
    assert done.returncode == -9
    assert len(left_in(tmp_path)) == 1
    assert not folder.exists()
    build_once(folder, build)
    assert (folder / "content").read_text() == "whole"
    assert left_in(tmp_path) == {"key"}


MANY = [(f"abc {i % 7 * 'd'}", i % 5 * "h") for i in range(50)]


def interrupted_at(record: int, error: BaseException) -> Iterator[tuple[str, str]]:
    for i, pair in enumerate(MANY):
        if i == record:
            raise error
        yield pair


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_many(folder: Path, pairs: Iterator[tuple[str, str]]) -> None:
    write_pairs(folder, pairs, BOTH, PairFilter(max_length=8))


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("record", [0, 1, 13, 49])
def test_an_interrupted_writing_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: int, torn: bool
) -> None:
    monkeypatch.setattr(writing, "CHUNK", 4)
    monkeypatch.setattr(writing, "NOTE_EVERY", 0.0)
    (tmp_path / "whole").mkdir()
    write_many(tmp_path / "whole", iter(MANY))
    cache, begun = tmp_path / "cache", tmp_path / "cache" / "key.begun"

    def stopped(folder: Path) -> None:
        write_many(folder, interrupted_at(record, KeyboardInterrupt()))

    with pytest.raises(KeyboardInterrupt):
        build_once(cache / "key", stopped, resumable=True)
    assert left_in(cache) == {"key.begun"}
    noted = begun / "progress.json"
    done = json.loads(noted.read_text())["done"] if noted.exists() else 0
    assert done == max(0, record // 4 - 2) * 4  # two chunks are ahead
    if torn:  # a machine that goes down leaves more, or half, of what was written after the note
        with (begun / "target.ids").open("ab") as file:
            file.write(b"half of it")
    encoded: list[str] = []
    real = Tokenizer.encode_batch

    def counting(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        encoded.extend(texts)
        return real(tokenizer, texts)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", counting)
        build_once(cache / "key", lambda folder: write_many(folder, iter(MANY)), resumable=True)
    assert len(encoded) == 2 * (len(MANY) - done)
    assert contents(cache / "key") == contents(tmp_path / "whole")
    assert left_in(cache) == {"key"}


def test_a_killed_writing_goes_on(tmp_path: Path) -> None:
    killed = (
        "import os, pathlib, signal, sys\n"
        "from tests.data import test_store\n"
        "from tx_lightning.data import cache, writing\n"
        "writing.CHUNK, writing.NOTE_EVERY = 4, 0.0\n"
        "def pairs():\n"
        "    yield from test_store.MANY[:40]\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.build_once(pathlib.Path(sys.argv[1]),\n"
        "    lambda folder: test_store.write_many(folder, pairs()), resumable=True)\n"
    )
    folder = tmp_path / "key"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", killed, str(folder)],
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == -9
    assert json.loads((tmp_path / "key.begun" / "progress.json").read_text())["done"] == 32
    build_once(folder, lambda temporary: write_many(temporary, iter(MANY)), resumable=True)
    (tmp_path / "whole").mkdir()
    write_many(tmp_path / "whole", iter(MANY))
    assert contents(folder) == contents(tmp_path / "whole")


def test_wrong_data_leave_nothing_to_go_on_with(tmp_path: Path) -> None:
    def refused(folder: Path) -> None:
        write_many(folder, interrupted_at(9, DataError("not text")))

    with pytest.raises(DataError, match="not text"):
        build_once(tmp_path / "key", refused, resumable=True)
    assert left_in(tmp_path) == set()


@pytest.mark.parametrize("note", ["", "{", None])
def test_without_a_whole_note_writing_begins_anew(tmp_path: Path, note: str | None) -> None:
    begun = tmp_path / "key.begun"
    begun.mkdir()
    (begun / "source.ids").write_bytes(b"left")
    if note is not None:
        (begun / "progress.json").write_text(note)
    build_once(tmp_path / "key", lambda folder: write_many(folder, iter(MANY)), resumable=True)
    (tmp_path / "whole").mkdir()
    write_many(tmp_path / "whole", iter(MANY))
    assert contents(tmp_path / "key") == contents(tmp_path / "whole")


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on the file of this name lies on a full disk."""
    real = Path.open

    def full(path: Path, *args: Any, **options: Any) -> IO[Any]:
        return real(Path("/dev/full") if path.name == name else path, *args, **options)

    monkeypatch.setattr(Path, "open", full)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["source.ids", "target.text", "target.starts"])
@pytest.mark.parametrize("n_pairs", [5, 10_000])
def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, n_pairs: int
) -> None:
    folder = tmp_path / "key"
    build_once(tmp_path / "other", build)
    with monkeypatch.context() as patch:
        fill_disk(patch, name)
        with pytest.raises(CacheError, match=r"no space left .*cache_dir") as caught:
            build_once(
                folder, lambda temporary: write_pairs(temporary, [("a", "b")] * n_pairs, BOTH, None)
            )
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == {"other"}
    build_once(folder, lambda temporary: write_pairs(temporary, PAIRS, BOTH, None))
    assert len(PairStore(folder)) == len(PAIRS)


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CacheError, match=r"cannot be written .*set cache_dir"):
        build_once(tmp_path / "file" / "pairs" / "key", build)


def test_errors_of_the_build_itself_are_not_blamed_on_the_cache(tmp_path: Path) -> None:
    def missing(folder: Path) -> None:
        (tmp_path.parent / "no such text").read_text()

    with pytest.raises(FileNotFoundError):
        build_once(tmp_path / "cache" / "key", missing)


def test_files_reach_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    store = written(tmp_path / "store")
    sizes = json.loads((store.folder / "meta.json").read_text())["bytes"].values()
    assert sorted(synced) == sorted(sizes)


def numbers() -> Iterator[int]:
    return iter(range(3000))


def test_progress_is_silent_when_short_and_speaks_when_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(Progress("reading")(numbers())) == list(range(3000))
    assert capsys.readouterr().err == ""
    assert list(Progress("reading", every=0.0)(numbers())) == list(range(3000))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["reading: 1", "reading: 2"]


def test_tokenizer_of_the_tests_knows_its_letters() -> None:
    assert isinstance(LETTERS, Tokenizer)
    assert LETTERS.decode_batch(LETTERS.encode_batch(["Ä☃ h"])) == ["Ä☃ h"]
