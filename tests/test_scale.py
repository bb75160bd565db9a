"""What a corpus costs does not grow with it, but for the time to tokenize it."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scale import configuration, measure, peak_memory, read_epoch, told, write_corpus


def test_a_synthetic_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    first, second = (write_corpus(tmp_path / name, 300) for name in ("one", "two"))
    texts = [Path(name).read_text() for name in [*first, *second]]
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]
    assert [text.count("\n") for text in texts] == [300] * 4
    assert 8 < len(texts[0].split()) / 300 < 16


def test_an_epoch_is_planned_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = configuration(tmp_path, tmp_path / "cache", 2000, steps=1)["data"]
    found = read_epoch(data, batches=3)
    assert "train: 2,000 pairs kept" in capsys.readouterr().err
    assert found["planning"] > 0
    assert found["reading"] > 0
    assert found["memory"] >= found["memory before"] > 50


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_is_that_of_a_process() -> None:
    program = "held = bytearray(b'1') * (100 << 20); print(len(held), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        found = peak_memory(process.pid)
        process.communicate(b"\n")
    assert 100 < found < 150
    assert peak_memory(process.pid) == 0


@pytest.mark.slow
def test_ten_million_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokenizing goes on where it was killed; memory, start-up and planning stay in bounds."""
    n = 10_000_000
    found = measure(tmp_path, n, steps=300)
    with capsys.disabled():
        print(f"\n{told(n, found)}")
    assert n / 2 <= found.killed_at < n
    assert found.went_on
    assert max(found.memory, found.first_memory, found.epoch["memory"]) < 1500
    assert found.start_up < 3
    assert found.epoch["planning"] < 10
