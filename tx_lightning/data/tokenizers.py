"""Text to token ids and back: byte-level BPE, unigram, words, characters.

Ids 0 to 3 are the same in every tokenizer trained here and can be reached by no text. Their entries
in the vocabulary contain a space, and no tokenizer here lets a space through to its model:
byte-level BPE writes it ``Ġ``, unigram and words write it ``▁``, and an entry of characters is one
character long. So a sentence about "<eos>" or "[PAD]" is a sentence like any other.

A tokenizer that came with weights from elsewhere keeps the ids it has: `SpecialIds` says which
they are, and its special entries are not searched for in text either.
"""

import contextlib
import hashlib
import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from tx_lightning.data.errors import DataError, check_at_least, check_texts

PAD, BOS, EOS, UNK = 0, 1, 2, 3
MOST_ENTRIES = 10_000_000  # of a vocabulary; learning reserves memory for as many
SPECIAL_NAMES = ("<pad>", "<s>", "</s>", "<unk>")
_SPECIAL_ENTRIES = [f"{name} " for name in SPECIAL_NAMES]
_ONE_AT_A_TIME = threading.Lock()  # or one thread would restore what another has redirected
_MOST_GROWTH = 100  # of a text, by the replacements of a normalizer
_OURS = (
    "tx_lightning"  # the entry of a tokenizer's JSON that holds the special ids of a foreign one
)


@dataclass(frozen=True)
class SpecialIds:
    """The ids with a meaning of their own, where they are not those of a tokenizer trained here.

    Args:
        pad: Fills rows.
        bos: Stands before the first token of what is decoded, and before a text to classify.
        eos: Ends a text, and separates two.
        unk: Stands for what the tokenizer does not know.
        mask: Stands for what a masked language model has to guess; None where there is none.
        prefix: Put before every text that is encoded.
    """

    pad: int
    bos: int
    eos: int
    unk: int
    mask: int | None = None
    prefix: tuple[int, ...] = ()


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Report what the library fails on; it raises bare exceptions, and panics of Rust.

    Raises:
        DataError: It failed.
    """
    try:
        yield
    except BaseException as error:
        wrong = isinstance(error, ValueError | TypeError | AttributeError | RecursionError)
        if not (wrong or type(error) is Exception or type(error).__name__ == "PanicException"):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"tokenizer: {what} ({reason})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what the library's panics print besides being raised."""
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # of a process without standard error
            terminal = os.dup(2)
            stack.callback(os.close, terminal)
            stack.callback(os.dup2, terminal, 2)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 2)
            os.close(nothing)
        yield


def _check_growth(normalizer: Any) -> None:
    """Refuse replacements that make a short text so long that no memory holds it.

    Raises:
        ValueError: They do.
    """
    growth, waiting = 1, [normalizer]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            waiting += step.get("normalizers") or []
            pattern, content = step.get("pattern"), step.get("content")
            if isinstance(pattern, dict) and isinstance(content, str):
                shortest = len(pattern["String"]) if isinstance(pattern.get("String"), str) else 1
                growth *= max(1, math.ceil(len(content) / max(1, shortest)))
    if growth > _MOST_GROWTH:
        raise ValueError(f"its replacements make a text {growth:,} times as long")


def _special_ids(foreign: Any) -> tuple[SpecialIds, dict[int, str]]:
    """The special ids of a tokenizer that was trained elsewhere, and their names.

    Raises:
        DataError: They are not written as `Tokenizer.foreign` writes them.
    """
    try:
        special = SpecialIds(**{**foreign["ids"], "prefix": tuple(foreign["ids"]["prefix"])})
        names = {int(i): name for i, name in foreign["names"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"tokenizer: its special ids are damaged ({error})") from error
    known = [special.pad, special.bos, special.eos, special.unk, *special.prefix, *names]
    known += [] if special.mask is None else [special.mask]
    if not all(type(i) is int and i >= 0 for i in known) or not all(
        isinstance(name, str) for name in names.values()
    ):
        raise DataError("tokenizer: its special ids are damaged (not all of them are ids)")
    return special, names


class Tokenizer:
    """A trained tokenizer; pickles, and may be shared by threads.

    Args:
        text: The tokenizer as JSON, as `to_json` gives it.

    Attributes:
        vocab_size: Number of entries, special ones included.
        sha256: Of the JSON; equal for equal tokenizers.
        trained_here: Whether a class of this module learned it.
        pad_id, bos_id, eos_id, unk_id, mask_id: See `SpecialIds`.

    Raises:
        DataError: The text is not a tokenizer of this project.
    """

    def __init__(self, text: str) -> None:
        foreign: dict[str, Any] | None = None
        model = text
        with _failures("the text is not a tokenizer in JSON"):
            settings = json.loads(text)
            if _OURS in settings:
                foreign = settings.pop(_OURS)
                model = json.dumps(settings, ensure_ascii=False)
            _check_growth(settings.get("normalizer"))
            with _quiet():
                self._model = tokenizers.Tokenizer.from_str(model)
            self._model.no_padding()  # batches are padded and cut here
            self._model.no_truncation()
        if foreign is None:
            self._check_own_ids()
            special = SpecialIds(PAD, BOS, EOS, UNK)
            self.vocab_size: int = self._model.get_vocab_size(with_added_tokens=False)
            self._names = dict(enumerate(SPECIAL_NAMES))
        else:
            special, self._names = _special_ids(foreign)
            self._model.encode_special_tokens = True
            self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)
        self.trained_here = foreign is None
        self.pad_id, self.bos_id, self.eos_id = special.pad, special.bos, special.eos
        self.unk_id, self.mask_id = special.unk, special.mask
        self.prefix = special.prefix
        self._json = text
        self._bytes = '"ByteLevel"' in text and isinstance(self._model.model, models.BPE)
        self._word_starts: npt.NDArray[np.bool_] | None = None
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def foreign(cls, text: str, ids: SpecialIds, names: dict[int, str]) -> "Tokenizer":
        """A tokenizer of the `tokenizers` library that was trained elsewhere.

        Args:
            text: Its JSON (tokenizer.json).
            ids: Its special ids.
            names: All its special ids with their names; they are left out of decoded text.
        """
        settings = json.loads(text)
        settings["truncation"] = settings["padding"] = None
        settings[_OURS] = {"ids": asdict(ids), "names": {str(i): n for i, n in names.items()}}
        return cls(json.dumps(settings, ensure_ascii=False, separators=(",", ":")))

    def _check_own_ids(self) -> None:
        entries = [self._model.id_to_token(i) for i in range(len(_SPECIAL_ENTRIES))]
        if entries != _SPECIAL_ENTRIES:
            raise DataError(
                f"tokenizer: ids 0 to 3 are {entries}, not {_SPECIAL_ENTRIES}; "
                "train it with a class of tx_lightning.data.tokenizers"
            )

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The inverse of `to_json`."""
        return cls(text)

    def to_json(self) -> str:
        """All of the tokenizer in one string, for checkpoints and files."""
        return self._json

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str]]:
        return Tokenizer, (self._json,)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without BOS and EOS."""
        check_texts(texts)
        with _failures("a text cannot be encoded"):
            encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        if self.prefix:
            return [[*self.prefix, *encoding.ids] for encoding in encodings]
        return [encoding.ids for encoding in encodings]

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of each word of each sentence; a word of nothing is one unknown token."""
        check_texts(sentences)
        for words in sentences:
            check_texts(words)
        flat_words = [word for words in sentences for word in words]
        with _failures("a word cannot be encoded"):
            flat = self._model.encode_batch_fast(flat_words, add_special_tokens=False)
        ids = iter([encoding.ids or [self.unk_id] for encoding in flat])
        return [[next(ids) for _ in words] for words in sentences]

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids; special ids are left out."""
        rows = [[int(i) for i in row if int(i) not in self._names] for row in ids]
        with _failures("tokens cannot be decoded"):
            return list(self._model.decode_batch(rows, skip_special_tokens=False))

    def entries(self) -> list[str]:
        """What stands for each id, without the spaces that keep some out of reach of text."""
        found = (self._model.id_to_token(i) for i in range(self.vocab_size))
        return [(entry or "").replace(" ", "") for entry in found]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Each token as a reader would write it, ``▁`` for a space; for axes and tables."""
        return [self._readable(int(i)) for i in ids]

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text."""
        return frozenset(self._names)

    def word_starts(self) -> npt.NDArray[np.bool_]:
        """Which tokens begin a word, (vocab_size,).

        Those that begin with a blank do, and the special ones; of WordPiece those without ``##``.
        Where no token begins with a blank, each is a word of its own.
        """
        if self._word_starts is None:
            self._word_starts = self._find_word_starts()
        return self._word_starts

    def _find_word_starts(self) -> npt.NDArray[np.bool_]:
        word_pieces = isinstance(self._model.model, models.WordPiece)
        special = self.special_ids
        ordinary = [i for i in range(self.vocab_size) if i not in special]
        starts = np.ones(self.vocab_size, dtype=np.bool_)
        for i in ordinary:
            text = self._readable(i)
            blank = text[:1] == "▁" or text[:1].isspace()
            starts[i] = not text.startswith("##") if word_pieces else blank
        return starts if starts[ordinary].any() else np.ones_like(starts)

    def _readable(self, token_id: int) -> str:
        if token_id in self._names:
            return self._names[token_id]
        token = self._model.id_to_token(token_id)
        if token is None:
            raise DataError(f"token id {token_id} is not below vocab_size ({self.vocab_size})")
        if self._bytes:
            token = decoders.ByteLevel().decode([token])
        return str(token).replace(" ", "▁")


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of the two sides; one object twice when the vocabulary is shared.

    A task with one text has the same tokenizer on both sides.

    Args:
        source: Tokenizer of the source side.
        target: Tokenizer of the target side.
    """

    source: Tokenizer
    target: Tokenizer

    @property
    def shared(self) -> bool:
        """Whether both sides use the same vocabulary."""
        if self.source.sha256 == self.target.sha256:
            return True
        return self.source.entries() == self.target.entries()

    def to_dict(self) -> dict[str, str]:
        """Plain strings, for checkpoints."""
        return {"source": self.source.to_json(), "target": self.target.to_json()}

    @classmethod
    def from_dict(cls, texts: dict[str, str]) -> "Tokenizers":
        """The inverse of `to_dict`."""
        source = Tokenizer.from_json(texts["source"])
        if texts["source"] == texts["target"]:
            return cls(source, source)
        return cls(source, Tokenizer.from_json(texts["target"]))

    @classmethod
    def one(cls, tokenizer: Tokenizer) -> "Tokenizers":
        """The same tokenizer on both sides."""
        return cls(tokenizer, tokenizer)


class TokenizerTrainer(ABC):
    """How a vocabulary is learned from text. Subclass it for another kind of tokenizer.

    Args:
        lowercase: Fold the text to lower case. What is decoded is then lower case too, while
            scores are still taken against the untouched reference.
    """

    def __init__(self, lowercase: bool = False) -> None:
        self.lowercase = lowercase

    @abstractmethod
    def train(self, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` entries, special ones included."""

    def fingerprint(self) -> str:
        """Names the kind of tokenizer and its settings; part of the key it is stored under."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return json.dumps({"class": kind, **vars(self)}, sort_keys=True)

    def _train(
        self,
        model: tokenizers.Tokenizer,
        trainer: trainers.Trainer,
        texts: Iterable[str],
    ) -> Tokenizer:
        check_texts(texts)
        model.train_from_iterator(texts, trainer=trainer)
        settings = json.loads(model.to_str())
        # The trainer also lists the special tokens as "added", to be searched for in all text.
        settings["added_tokens"] = []
        return Tokenizer(json.dumps(settings, ensure_ascii=False, separators=(",", ":")))

    def _normalizer(self, *steps: normalizers.Normalizer) -> normalizers.Normalizer:
        lower = [normalizers.Lowercase()] if self.lowercase else []
        return normalizers.Sequence([*lower, *steps])


def check_capacity(tokenizer: Tokenizer, vocab_size: int, reserved: int = 0) -> None:
    """Refuse a tokenizer that has more entries than the embedding table has rows.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the table.
        reserved: Rows at its end that the task needs; a tokenizer with a mask of its own needs one
            less.

    Raises:
        DataError: The entries and the reserved rows are more than `vocab_size`.
    """
    own = min(reserved, 1) if tokenizer.mask_id is not None else 0
    needed = tokenizer.vocab_size + reserved - own
    if needed > vocab_size:
        more = f" and this task needs {reserved - own} more" if reserved - own else ""
        raise DataError(
            f"vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} entries"
            f"{more}; set vocab_size to at least {needed} or train a smaller tokenizer"
        )


def check_rows(tokenizer: Tokenizer, n_rows: int) -> None:
    """Refuse a tokenizer that has ids beyond the rows of the embedding table.

    Raises:
        DataError: It has some.
    """
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, *tokenizer.special_ids}
    special |= set(tokenizer.prefix)
    most = max(tokenizer.vocab_size - 1, *special)
    if min(special) < 0 or most >= n_rows:
        raise DataError(
            f"the tokenizer has ids up to {most}, but the network's vocab_size is {n_rows}"
        )


class ByteLevelBPE(TokenizerTrainer):
    """Byte-pair encoding over UTF-8 bytes: no text is unknown, and every text comes back exactly.

    Sennrich et al., 2016 (https://arxiv.org/abs/1508.07909), on bytes. A space is put before the
    sentence and taken away again, so that a word is the same token at its start and within it.

    Args:
        lowercase: Fold the text to lower case first.
    """

    def train(self, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        smallest = len(alphabet) + len(_SPECIAL_ENTRIES)
        if vocab_size < smallest:
            raise DataError(
                f"vocab_size is {vocab_size}, but ByteLevelBPE needs at least {smallest} "
                "(256 bytes and 4 special tokens); set vocab_size higher or use Characters"
            )
        check_at_least("vocab_size", vocab_size, smallest, most=MOST_ENTRIES)
        model = tokenizers.Tokenizer(models.BPE())
        model.normalizer = self._normalizer(normalizers.Prepend(" "))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=_SPECIAL_ENTRIES,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        return self._train(model, trainer, texts)


class Unigram(TokenizerTrainer):
    """Unigram language model over pieces of words; unseen characters are unknown.

    Kudo, 2018 (https://arxiv.org/abs/1804.10959). Training it twice on the same text may give
    different scores, so a run must keep the stored file: nothing here trains it again by itself.

    Args:
        lowercase: Fold the text to lower case first.
    """

    def train(self, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        check_at_least("vocab_size", vocab_size, len(_SPECIAL_ENTRIES) + 1, most=MOST_ENTRIES)
        model = tokenizers.Tokenizer(models.Unigram())
        model.normalizer = self._normalizer(normalizers.Prepend(" "))
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        model.decoder = _metaspace_decoder()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=_SPECIAL_ENTRIES,
            unk_token=_SPECIAL_ENTRIES[UNK],
            show_progress=False,
        )
        try:
            return self._train(model, trainer, texts)
        except Exception as error:
            if "not large enough to contain all chars" not in str(error):
                raise
            raise DataError(
                f"vocab_size is {vocab_size}, but the text has more different characters than "
                "that, and Unigram keeps each of them; raise vocab_size or use ByteLevelBPE"
            ) from error


class Words(TokenizerTrainer):
    """Whole words and punctuation marks; the most frequent are kept, the others are unknown.

    Args:
        lowercase: Fold the text to lower case first.
    """

    def train(self, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        model = _word_level(vocab_size)
        model.normalizer = self._normalizer(normalizers.Prepend(" "))
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="never"),
                pre_tokenizers.Punctuation("isolated"),
            ]
        )
        model.decoder = _metaspace_decoder()
        return self._train(model, _word_level_trainer(vocab_size), texts)


class Characters(TokenizerTrainer):
    """One token for each character; the most frequent are kept, the others are unknown.

    Args:
        lowercase: Fold the text to lower case first.
    """

    def train(self, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        model = _word_level(vocab_size)
        model.normalizer = self._normalizer()
        model.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        model.decoder = decoders.Fuse()
        return self._train(model, _word_level_trainer(vocab_size), texts)


def _metaspace_decoder() -> decoders.Decoder:
    metaspace = decoders.Metaspace(prepend_scheme="never")
    return decoders.Sequence([metaspace, decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def _word_level(vocab_size: int) -> tokenizers.Tokenizer:
    if vocab_size <= len(_SPECIAL_ENTRIES):
        raise DataError(
            f"vocab_size is {vocab_size}; it must be above {len(_SPECIAL_ENTRIES)}, "
            "the number of special tokens"
        )
    check_at_least("vocab_size", vocab_size, len(_SPECIAL_ENTRIES) + 1, most=MOST_ENTRIES)
    return tokenizers.Tokenizer(models.WordLevel(unk_token=_SPECIAL_ENTRIES[UNK]))


def _word_level_trainer(vocab_size: int) -> Any:
    return trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=_SPECIAL_ENTRIES, show_progress=False
    )
