"""Multi30k: 31,014 image captions in English, German and French."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tx_lightning.data.download import RemoteFiles
from tx_lightning.data.errors import DataError, listed
from tx_lightning.data.sources import ParallelSource
from tx_lightning.data.text import read_aligned

Language = Literal["de", "en", "fr"]

_LANGUAGES = ["de", "en", "fr"]
_SPLITS = ["train", "val", "test_2016_flickr", "test_2017_flickr"]
_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1"
_RAW = {
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.fr.gz": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
    "test_2017_flickr.de.gz": "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee",
    "test_2017_flickr.en.gz": "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074",
    "test_2017_flickr.fr.gz": "3ba671ceb2299f3304ffafefea7a833d08632fbaf0ba18546f8a2ec2391af496",
}
_TOKENIZED = {
    "test_2016_flickr.lc.norm.tok.de": (
        "c6a33d39d48f9f510de147651316cd9d918e09ad0219df734a2f16b6baccacc4"
    ),
    "test_2016_flickr.lc.norm.tok.en": (
        "5b7f32627cf99eced828311b955dae9800bb52bc8b91cf8b6526829e605b29d2"
    ),
}


class Multi30k(ParallelSource):
    """Multi30k, any pair and direction of German, English and French.

    29,000 pairs in `train`, 1,014 in `val`, 1,000 each in `test_2016_flickr` and
    `test_2017_flickr` (Elliott et al. 2016, "Multi30K: Multilingual English-German Image
    Descriptions"; 2017, "Findings of the Second Shared Task on Multimodal Machine Translation").
    The files are looked for in `$TX_LIGHTNING_DATA/multi30k/`, in the cache folder, on the network.

    Args:
        source_language: Translate from `de`, `en` or `fr`.
        target_language: Translate to `de`, `en` or `fr`.
        url: Where the folder data/task1 of github.com/multi30k/dataset is served; name a mirror
            if the original cannot be reached.
    """

    def __init__(
        self,
        source_language: Language = "en",
        target_language: Language = "de",
        *,
        url: str = _URL,
    ) -> None:
        for option, language in (("source", source_language), ("target", target_language)):
            if language not in _LANGUAGES:
                raise DataError(
                    f"Multi30k: {option}_language is {language!r}; there are "
                    f"{listed(_LANGUAGES, language)}"
                )
        if source_language == target_language:
            raise DataError(f"Multi30k: both languages are {source_language!r}; name two")
        self.source_language = source_language
        self.target_language = target_language
        self._raw = RemoteFiles("multi30k", f"{url}/raw", _RAW)
        self._tokenized = RemoteFiles("multi30k", f"{url}/tok", _TOKENIZED)

    def splits(self) -> list[str]:
        return list(_SPLITS)

    def prepare(self) -> None:
        self._raw.fetch(file for split in _SPLITS for file in self._files(split))

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        source, target = map(self._raw.local, self._files(split))
        return read_aligned(source, target)

    def fingerprint(self, split: str) -> str:
        """Made of the published checksums: reads nothing, as `prepare` has verified the files."""
        checksums = [self._raw.sha256[file] for file in self._files(split)]
        return hashlib.sha256("\n".join(checksums).encode()).hexdigest()

    def tokenized_reference(self) -> Path:
        """The tokenized, lower-cased target side of test_2016_flickr, which published scores use.

        Raises:
            DataError: The target language has none, or the file cannot be had.
        """
        file = f"test_2016_flickr.lc.norm.tok.{self.target_language}"
        if file not in _TOKENIZED:
            raise DataError(
                f"Multi30k: there is no tokenized reference in {self.target_language!r}; there are "
                f"{listed(list(_TOKENIZED), file)}"
            )
        return self._tokenized.fetch([file])[0]

    def _files(self, split: str) -> tuple[str, str]:
        self.check_split(split)
        return f"{split}.{self.source_language}.gz", f"{split}.{self.target_language}.gz"
