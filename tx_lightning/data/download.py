"""Named files with checksums: found locally, or downloaded once, whole or not at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from tx_lightning.data.errors import DataError
from tx_lightning.data.fingerprints import file_sha256
from tx_lightning.data.folders import cache_folder, data_folder


class RemoteFiles:
    """Files of one folder on the network.

    They are looked for in `$TX_LIGHTNING_DATA/<name>/`, then in `<name>/` of the cache folder, then
    on the network.

    Args:
        name: Name of the dataset.
        url: The folder that the files are served from.
        sha256: The checksum of each file, in hexadecimal.
    """

    def __init__(self, name: str, url: str, sha256: Mapping[str, str]) -> None:
        self.name = name
        self.url = url.rstrip("/")
        self.sha256 = dict(sha256)

    def find(self, file: str) -> Path | None:
        """The local copy of a file, not verified; None if there is none."""
        assert file in self.sha256
        for folder in self._folders():
            if (folder / file).exists():
                return folder / file
        return None

    def fetch(self, files: Iterable[str]) -> list[Path]:
        """Verified local copies of the files, downloaded where needed.

        A download that is cut or wrong leaves nothing behind; files already there are not fetched
        again.

        Raises:
            DataError: A file has the wrong checksum, or is neither here nor reachable.
        """
        wanted = list(files)
        for file in wanted:
            if (path := self.find(file)) is not None:
                self._verify(path)
        for file in wanted:
            if self.find(file) is None:
                self._download(file, missing=[name for name in wanted if self.find(name) is None])
        return [self.local(file) for file in wanted]

    def local(self, file: str) -> Path:
        """The local copy of a file that `fetch` has brought."""
        path = self.find(file)
        if path is None:
            raise DataError(f"there is no {self.name}/{file} here; {self._remedy([file])}")
        return path

    def _folders(self) -> list[Path]:
        roots = [root for root in (data_folder(), cache_folder()) if root is not None]
        return [root / self.name for root in roots]

    def _verify(self, path: Path) -> None:
        found, expected = file_sha256(path), self.sha256[path.name]
        if found != expected:
            raise DataError(
                f"{path} is not the file that was published: its SHA-256 is {found}, not "
                f"{expected}; delete it, or replace it by {self.url}/{path.name}"
            )

    def _download(self, file: str, missing: list[str]) -> None:
        import pooch  # here, because few runs need the network
        import requests

        url, folder = f"{self.url}/{file}", cache_folder() / self.name
        known_hash = f"sha256:{self.sha256[file]}"
        try:
            pooch.retrieve(url, known_hash, file, folder, downloader=pooch.HTTPDownloader())
        except requests.RequestException as error:
            if error.response is not None:
                error.response.close()  # pooch leaves it open
            raise DataError(
                f"cannot download {url} ({_reason(error)}); {self._remedy(missing)}"
            ) from error
        except OSError as error:
            raise DataError(f"cannot write {folder / file}: {error.strerror or error}") from error
        except ValueError as error:
            raise DataError(
                f"{url} is not the file that was published, its SHA-256 is not "
                f"{self.sha256[file]}; nothing was kept; {self._remedy(missing)}"
            ) from error

    def _remedy(self, missing: list[str]) -> str:
        return (
            f"try again, or put {', '.join(missing)} from {self.url} into "
            f"{cache_folder() / self.name} or into the folder {self.name} of $TX_LIGHTNING_DATA"
        )


def _reason(error: Exception) -> str:
    """The cause in a few words; the message of the library names its objects in memory."""
    from requests import exceptions

    if isinstance(error, exceptions.HTTPError) and error.response is not None:
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, exceptions.Timeout):
        return "the server did not answer in time"
    if isinstance(error, exceptions.ChunkedEncodingError):
        return "the connection was cut"
    if isinstance(error, exceptions.ConnectionError):
        return "no connection"
    return str(error)
