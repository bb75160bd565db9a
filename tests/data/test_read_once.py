"""Pipes, sockets and devices: data files cannot be one, what is to be predicted can."""

import gc
import inspect
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_constructors import classes
from tx_lightning.data import Grammar, TextFiles, TranslationData
from tx_lightning.data.errors import DataError
from tx_lightning.data.fingerprints import file_sha256
from tx_lightning.data.folders import cache_folder
from tx_lightning.data.sources import FileSource
from tx_lightning.data.text import read_lines
from tx_lightning.data.tokenizers import Characters


def pipe(folder: Path) -> Path:
    path = folder / "pipe"
    os.mkfifo(path)
    return path


def unix_socket(folder: Path) -> Path:
    # A socket's path is short, and that of a test's folder is not.
    before = Path.cwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket")
    finally:
        os.chdir(before)
    return folder / "socket"


def device(folder: Path) -> Path:
    return Path("/dev/null")


KINDS = {pipe: "pipe", unix_socket: "socket", device: "device"}


@pytest.fixture(params=KINDS)
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Something that is no file, behind a symbolic link, and what it is called."""
    link = tmp_path / "link.txt"
    link.symlink_to(request.param(tmp_path))
    return link, KINDS[request.param]  # type: ignore[return-value]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def file_sources() -> list[type[FileSource]]:
    found = [cls for cls in classes() if issubclass(cls, FileSource) and cls is not FileSource]
    assert len(found) > 6
    return found


@pytest.mark.parametrize("cls", file_sources())
def test_no_source_waits_for_a_pipe(cls: type[FileSource], special: tuple[Path, str]) -> None:
    """Opening a pipe that nobody writes to waits for ever."""
    path, kind = special
    pairs = "tuple" in str(inspect.signature(cls).parameters["train"].annotation)
    source = cls(train=(str(path), str(path)) if pairs else str(path))  # type: ignore[call-arg]
    says = f"{path} is a {kind}, but data files are read more than once; write its content to a"
    assert refusal(source.prepare).startswith(says)
    assert refusal(lambda: source.fingerprint("train")).startswith(says)


def test_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    assert refusal(lambda: list(read_lines(tmp_path))) == f"cannot read {tmp_path}: Is a directory"
    assert refusal(lambda: file_sha256(tmp_path)) == f"cannot read {tmp_path}: Is a directory"


def test_special_files_below_a_folder_are_passed_over(tmp_path: Path) -> None:
    pipe(tmp_path).rename(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("text")
    source = TextFiles(train=str(tmp_path))
    source.prepare()
    assert list(source.texts("train")) == ["text"]


def module(predict_file: Path | str) -> TranslationData:
    source = Grammar(n_train=20, n_val=2, n_test=2)
    return TranslationData(source, 100, tokenizer=Characters(), predict_file=str(predict_file))


def predicted(data: TranslationData) -> list[str]:
    data.prepare_data()
    data.setup()
    return [text for batch in data.predict_dataloader() for text in batch.source_text]


def test_what_is_predicted_may_be_a_pipe(tmp_path: Path) -> None:
    content = "Das Kind tanzt.\n\nDer Arzt\r\nlacht.\n"
    path = pipe(tmp_path)
    writer = threading.Thread(target=path.write_text, args=(content,))
    writer.start()
    found = predicted(module(path))
    writer.join()
    (tmp_path / "file").write_text(content, newline="")
    assert sorted(found) == sorted(predicted(module(tmp_path / "file")))
    assert sorted(found) == ["", "Das Kind tanzt.", "Der Arzt", "lacht."]
    gc.collect()
    assert not [entry for entry in cache_folder().iterdir() if entry.is_file()]  # nor a copy


def test_faults_of_a_pipe_are_named_as_it_is(tmp_path: Path) -> None:
    path = pipe(tmp_path)
    writer = threading.Thread(target=path.write_bytes, args=(b"one\ntw\0o\n",))
    writer.start()
    assert refusal(module(path).prepare_data).startswith(f"{path}, line 2 holds a NUL byte")
    writer.join()
    assert refusal(module("/dev/null").prepare_data) == "/dev/null is empty: it has no lines"
    says = f"cannot read {tmp_path}: Is a directory"
    assert refusal(module(tmp_path).prepare_data) == says
    assert "there is no file" in refusal(module(tmp_path / "none").prepare_data)
    if hasattr(socket, "AF_UNIX"):
        says = refusal(module(unix_socket(tmp_path)).prepare_data)
        assert says.startswith(f"cannot read {tmp_path}/socket: ")


def test_several_processes_cannot_share_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = module(pipe(tmp_path))
    monkeypatch.setattr(data, "place", lambda: data.__class__.place(data)._replace(world_size=2))
    assert "there are several processes" in refusal(data.prepare_data)
