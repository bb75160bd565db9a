"""Downloads against a server on this machine: whole files under their names, or nothing at all."""

import errno
import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pooch
import pytest

from tx_lightning.data.download import RemoteFiles
from tx_lightning.data.errors import DataError
from tx_lightning.data.folders import cache_folder, data_folder

CONTENT = {"a.txt": b"the file a\n" * 10_000, "b.txt": b"the file b\n"}
SHA256 = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


class Server(ThreadingHTTPServer):
    """Serves `files` under /corpus/, the ones in `cut` only by half, and keeps the `requests`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(CONTENT)
        self.cut: set[str] = set()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/corpus"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/corpus/")
        self.server.requests.append(name)
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if name in self.server.cut else content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name is inherited
        """Keep the test's output clean."""


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, no data folder, no proxy."""
    monkeypatch.setenv("TX_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


def refusal(action: Callable[[], Any]) -> str:
    """The message of the DataError that the action ends with: always one line."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but for the kept hashes, which are no data."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files if path.parent.name != "sha256"}


def test_files_are_downloaded_once(server: Server, cache_dir: Path) -> None:
    files = RemoteFiles("corpus", server.url, SHA256)
    assert files.find("a.txt") is None
    assert files.fetch(["a.txt", "b.txt"]) == [
        cache_dir / "corpus/a.txt",
        cache_dir / "corpus/b.txt",
    ]
    assert contents(cache_dir) == CONTENT
    assert files.fetch(["b.txt", "a.txt"]) == [
        cache_dir / "corpus/b.txt",
        cache_dir / "corpus/a.txt",
    ]
    assert server.requests == ["a.txt", "b.txt"]
    assert files.local("a.txt") == cache_dir / "corpus/a.txt"


def test_only_what_is_asked_for_is_downloaded(server: Server, cache_dir: Path) -> None:
    RemoteFiles("corpus", server.url + "/", SHA256).fetch(["b.txt"])
    assert contents(cache_dir) == {"b.txt": CONTENT["b.txt"]}


def test_the_data_folder_comes_before_cache_and_network(
    server: Server, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RemoteFiles("corpus", server.url, SHA256)
    files.fetch(["a.txt", "b.txt"])
    own = tmp_path / "data/corpus/a.txt"
    own.parent.mkdir(parents=True)
    own.write_bytes(CONTENT["a.txt"])
    monkeypatch.setenv("TX_LIGHTNING_DATA", str(tmp_path / "data"))
    assert files.fetch(["a.txt", "b.txt"]) == [own, cache_dir / "corpus/b.txt"]


def test_a_download_with_the_wrong_checksum_is_not_kept(server: Server, cache_dir: Path) -> None:
    server.files["b.txt"] = b"<html>please log in</html>"
    files = RemoteFiles("corpus", server.url, SHA256)
    message = refusal(lambda: files.fetch(["a.txt", "b.txt"]))
    assert message.startswith(f"{server.url}/b.txt is not the file that was published, its SHA-256")
    assert SHA256["b.txt"] in message
    assert f"put b.txt from {server.url} into {cache_dir}/corpus or into" in message
    assert contents(cache_dir) == {"a.txt": CONTENT["a.txt"]}  # what was right is not lost


def test_a_download_cut_in_half_is_not_kept(server: Server, cache_dir: Path) -> None:
    server.cut.add("a.txt")
    files = RemoteFiles("corpus", server.url, SHA256)
    message = refusal(lambda: files.fetch(["a.txt"]))
    assert message.startswith(f"cannot download {server.url}/a.txt (the connection was cut); try")
    assert contents(cache_dir) == {}
    server.cut.clear()
    assert files.fetch(["a.txt"]) == [cache_dir / "corpus/a.txt"]


def test_a_file_the_server_does_not_have(server: Server, cache_dir: Path) -> None:
    del server.files["a.txt"]
    message = refusal(lambda: RemoteFiles("corpus", server.url, SHA256).fetch(["a.txt"]))
    assert message.startswith(
        f"cannot download {server.url}/a.txt (HTTP status 404); try again, or"
    )
    assert contents(cache_dir) == {}


def test_no_network_says_which_files_to_put_where(cache_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert refusal(lambda: RemoteFiles("corpus", url, SHA256).fetch(["b.txt", "a.txt"])) == (
        f"cannot download {url}/b.txt (no connection); try again, or put b.txt, a.txt from {url} "
        f"into {cache_dir}/corpus or into the folder corpus of $TX_LIGHTNING_DATA"
    )
    assert contents(cache_dir) == {}


def test_an_address_that_is_none_is_said() -> None:
    message = refusal(lambda: RemoteFiles("corpus", "my/mirror", SHA256).fetch(["a.txt"]))
    assert message.startswith("cannot download my/mirror/a.txt (Invalid URL")


@pytest.mark.parametrize("variable", ["TX_LIGHTNING_DATA", "TX_LIGHTNING_CACHE"])
def test_a_damaged_local_file_is_refused_and_left_alone(
    variable: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "here"))
    own = tmp_path / "here/corpus/a.txt"
    own.parent.mkdir(parents=True)
    own.write_bytes(CONTENT["a.txt"][:-1])
    message = refusal(lambda: RemoteFiles("corpus", server.url, SHA256).fetch(["a.txt"]))
    found = hashlib.sha256(CONTENT["a.txt"][:-1]).hexdigest()
    assert message == (
        f"{own} is not the file that was published: its SHA-256 is {found}, not {SHA256['a.txt']}; "
        f"delete it, or replace it by {server.url}/a.txt"
    )
    assert own.read_bytes() == CONTENT["a.txt"][:-1]
    assert server.requests == []


def test_a_full_disk_keeps_nothing(
    server: Server, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: pooch.HTTPDownloader, url: str, output_file: str, pooch: None) -> None:
        Path(output_file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    message = refusal(lambda: RemoteFiles("corpus", server.url, SHA256).fetch(["a.txt"]))
    assert message == f"cannot write {cache_dir}/corpus/a.txt: No space left on device"
    assert contents(cache_dir) == {}


def test_a_cache_that_cannot_be_written_is_said(server: Server, cache_dir: Path) -> None:
    cache_dir.write_text("a file where the folder should be")
    message = refusal(lambda: RemoteFiles("corpus", server.url, SHA256).fetch(["a.txt"]))
    assert message == f"cannot write {cache_dir}/corpus/a.txt: Not a directory"


def test_a_file_that_was_not_fetched_is_said(cache_dir: Path) -> None:
    files = RemoteFiles("corpus", "http://127.0.0.1/corpus", SHA256)
    assert refusal(lambda: files.local("a.txt")).startswith(
        f"there is no corpus/a.txt here; try again, or put a.txt from {files.url} into {cache_dir}"
    )


def test_folders_without_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TX_LIGHTNING_CACHE")
    assert cache_folder() == tmp_path / ".cache/tx_lightning"
    assert data_folder() is None
    monkeypatch.setenv("TX_LIGHTNING_CACHE", "~/scratch")
    monkeypatch.setenv("TX_LIGHTNING_DATA", "~/corpora")
    assert cache_folder() == tmp_path / "scratch"
    assert data_folder() == tmp_path / "corpora"
