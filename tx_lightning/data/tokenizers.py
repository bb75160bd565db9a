"""Text to token ids and back: byte-level BPE, unigram, words, characters.

Ids 0 to 3 are the same in every tokenizer and can be reached by no text. Their entries in the
vocabulary contain a space, and no tokenizer here lets a space through to its model: byte-level BPE
writes it ``Ġ``, unigram and words write it ``▁``, and an entry of characters is one character long.
So a sentence about "<eos>" or "[PAD]" is a sentence like any other.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from tx_lightning.data.errors import DataError

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_NAMES = ("<pad>", "<s>", "</s>", "<unk>")
_SPECIAL_ENTRIES = [f"{name} " for name in SPECIAL_NAMES]


class Tokenizer:
    """A trained tokenizer; pickles, and may be shared by threads.

    Args:
        text: The tokenizer as JSON, as `to_json` gives it.

    Raises:
        DataError: The text is not a tokenizer of this project.
    """

    def __init__(self, text: str) -> None:
        try:
            self._model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises bare Exception.
            raise DataError(f"tokenizer: the text is not a tokenizer in JSON ({error})") from error
        entries = [self._model.id_to_token(i) for i in range(len(_SPECIAL_ENTRIES))]
        if entries != _SPECIAL_ENTRIES:
            raise DataError(
                f"tokenizer: ids 0 to 3 are {entries}, not {_SPECIAL_ENTRIES}; "
                "train it with a class of tx_lightning.data.tokenizers"
            )
        self._json = text
        self._bytes = '"ByteLevel"' in text and isinstance(self._model.model, models.BPE)
        self.vocab_size: int = self._model.get_vocab_size(with_added_tokens=False)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

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
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids; special ids are left out."""
        rows = [[int(i) for i in row if i > UNK] for row in ids]
        return list(self._model.decode_batch(rows, skip_special_tokens=False))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Each token as a reader would write it, ``▁`` for a space; for axes and tables."""
        return [self._readable(int(i)) for i in ids]

    def _readable(self, token_id: int) -> str:
        if token_id <= UNK:
            return SPECIAL_NAMES[token_id]
        token = self._model.id_to_token(token_id)
        if token is None:
            raise DataError(f"token id {token_id} is not below vocab_size ({self.vocab_size})")
        if self._bytes:
            token = decoders.ByteLevel().decode([token])
        return str(token).replace(" ", "▁")


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of the two sides; one object twice when the vocabulary is shared.

    Args:
        source: Tokenizer of the source side.
        target: Tokenizer of the target side.
    """

    source: Tokenizer
    target: Tokenizer

    @property
    def shared(self) -> bool:
        """Whether both sides use the same vocabulary."""
        return self.source.sha256 == self.target.sha256

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
        model.train_from_iterator(texts, trainer=trainer)
        settings = json.loads(model.to_str())
        # The trainer also lists the special tokens as "added", to be searched for in all text.
        settings["added_tokens"] = []
        return Tokenizer(json.dumps(settings, ensure_ascii=False, separators=(",", ":")))

    def _normalizer(self, *steps: normalizers.Normalizer) -> normalizers.Normalizer:
        lower = [normalizers.Lowercase()] if self.lowercase else []
        return normalizers.Sequence([*lower, *steps])


def check_capacity(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that has more entries than the embedding table has rows.

    Raises:
        DataError: `tokenizer.vocab_size` is above `vocab_size`.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} entries; "
            f"set vocab_size to at least {tokenizer.vocab_size} or train a smaller tokenizer"
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
    return tokenizers.Tokenizer(models.WordLevel(unk_token=_SPECIAL_ENTRIES[UNK]))


def _word_level_trainer(vocab_size: int) -> Any:
    return trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=_SPECIAL_ENTRIES, show_progress=False
    )
