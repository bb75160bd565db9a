"""SentencePiece models (.spm) as tokenizers of the `tokenizers` library; read without its package.

A model is a protocol buffer: https://github.com/google/sentencepiece, sentencepiece_model.proto.
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.folders import damaged

SPACE = "▁"
_NORMAL = 1
_SKIPPED = (2, 3, 5)  # unknown, control, unused
_TYPES = {4: "user-defined", 6: "byte"}
_UNIGRAM = 1
_LONGEST_VARINT = 64  # bits
_BEFORE, _BEHIND = " ", "  "  # around what the model does not know
_AROUND = r"\A +| +\z"  # spaces around a text


@dataclass(frozen=True)
class Pieces:
    """A unigram model.

    Args:
        scores: The log probability of each piece that text can be cut into.
        charsmap: The normalization of characters, in SentencePiece's own form; empty for none.
        add_space: Whether a space is put before the text.
        single_spaces: Whether spaces around the text, and all but one between words, are removed.
    """

    scores: dict[str, float]
    charsmap: bytes
    add_space: bool
    single_spaces: bool


def read_pieces(path: Path) -> Pieces:
    """Read a .spm file.

    Raises:
        WeightsError: It is damaged, or not a unigram model of plain pieces.
    """
    scores: dict[str, float] = {}
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    broken = "is truncated or no SentencePiece model"
    with damaged(path, "cannot be read"):
        content = path.read_bytes()
    with damaged(path, broken):
        for number, value in _fields(content):
            if number == 1:
                piece = dict(_fields(value))
                kind, text = piece.get(3, _NORMAL), bytes(piece[1]).decode()
                score = struct.unpack("<f", piece.get(2, b"\0" * 4))[0]
                if kind == _NORMAL and text and math.isfinite(score):
                    scores[text] = score
                elif kind not in _SKIPPED:
                    raise WeightsError(
                        f"{path}: the piece {text!r} is {_TYPES.get(kind, 'odd')}; supported: "
                        "plain pieces"
                    )
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        charsmap = normalizer.get(2, b"")
        if not scores or not isinstance(charsmap, bytes):
            raise WeightsError(f"{path} {broken}")
    if trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise WeightsError(f"{path}: model_type is {trainer[3]}; supported: {_UNIGRAM}, unigram")
    if trainer.get(24, 0):
        raise WeightsError(f"{path}: treat_whitespace_as_suffix is true; supported: false")
    if not normalizer.get(5, 1):
        raise WeightsError(f"{path}: escape_whitespaces is false; supported: true")
    return Pieces(
        scores,
        charsmap=charsmap,
        add_space=bool(normalizer.get(3, 1)),
        single_spaces=bool(normalizer.get(4, 1)),
    )


def check_charsmap(charsmap: bytes) -> None:
    """Refuse a character map on which the tokenizers library panics for some text.

    The format: size of a trie in bytes, the trie as a double array of 32-bit units (Aoe 1989, the
    layout of darts-clone), and zero-terminated strings, to which the values of the trie point. The
    library follows all offsets unchecked.
    """
    size = int.from_bytes(charsmap[:4], "little")
    strings = charsmap[4 + size :]
    strings.decode()
    units = np.frombuffer(charsmap[4 : 4 + size], "<u4").astype(np.int64)
    if len(units) == 0 or not strings.endswith(b"\0"):
        raise ValueError("its normalization is incomplete")
    values = units >= 1 << 31
    children = np.arange(len(units)) ^ ((units >> 10) << ((units & 1 << 9) >> 6))
    inner = ~values
    if (children[inner] | 255).max() >= len(units):
        raise ValueError("its normalization points beyond its end")
    if not values[children[inner & (units >> 8 & 1 == 1)]].all():
        raise ValueError("its normalization lacks a value")
    starts = np.frombuffer(b"\0" + strings, np.uint8)[:-1] == 0
    targets = units[values] & (1 << 31) - 1
    if (targets >= len(starts)).any() or not starts[targets].all():
        raise ValueError("its normalization points into a string")


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: number, and integer or bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        else:
            length = {1: 8, 5: 4}[kind]
        if place + length > len(message):
            raise IndexError
        yield number, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """An integer in groups of 7 bits, and the place behind it."""
    value = shift = 0
    while shift < _LONGEST_VARINT:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("an integer has more than 64 bits")


def as_tokenizer(
    pieces: Pieces, ids: Mapping[str, int], *, unknown: str, codes: list[str]
) -> tokenizers.Tokenizer:
    """A tokenizer that cuts as the model does, and numbers the pieces as a vocabulary does.

    A run of characters that the model does not know is one token: that of the vocabulary, where it
    has the whole run, or else unknown. For this the normalizer puts a space before such a run and
    two behind it, the model sees spaces nowhere else, and entries that are no pieces of the model
    are written in the same way. So text does not reach the others, such as "</s>". A piece that
    the vocabulary lacks is cut into pieces that it has.

    Args:
        pieces: The model.
        ids: The id of each entry: 0, 1, 2 and so on.
        unknown: The entry of what is unknown.
        codes: Entries that are found in text as they stand, such as ">>fr<<".
    """
    scores = {piece: score for piece, score in pieces.scores.items() if piece in ids}
    lowest = min(scores.values())
    vocabulary = [
        (
            entry if entry in scores or entry in codes else unreachable(entry),
            scores.get(entry, lowest),
        )
        for entry in sorted(ids, key=ids.__getitem__)
    ]
    model = tokenizers.Tokenizer(models.Unigram(vocabulary, ids[unknown], False))
    model.normalizer = normalizers.Sequence(_normalizers(pieces, "".join(scores)))
    if not any(SPACE in piece[1:] for piece in scores):  # no token crosses a space
        model.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    model.decoder = decoders.Sequence(
        [
            decoders.Replace(" ", ""),
            decoders.Replace(SPACE, " "),
            decoders.Fuse(),
            decoders.Replace(Regex(_AROUND), ""),
        ]
    )
    model.add_tokens([tokenizers.AddedToken(code, normalized=False) for code in codes])
    return model


def unreachable(entry: str) -> str:
    """How an entry that is no piece of the model is written in its vocabulary."""
    return f"{_BEFORE}{entry}{_BEHIND}"


def _normalizers(pieces: Pieces, known: str) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.single_spaces:
        steps.append(normalizers.Replace(Regex(_AROUND), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if pieces.add_space:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", SPACE))
    characters = "".join(re.escape(character) for character in sorted({*known, SPACE}))
    inside, outside = f"[{characters}]", f"[^{characters}]"
    begins = rf"(?<={inside})(?={outside})|\A(?={outside})"
    ends = rf"(?<={outside})(?={inside})|(?<={outside})\z"
    steps.append(normalizers.Replace(Regex(begins), _BEFORE))
    steps.append(normalizers.Replace(Regex(ends), _BEHIND))
    return steps
