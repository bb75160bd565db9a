"""The tokenizer files of a folder as tokenizers of ours, and ours as files."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tx_lightning.data.tokenizers import SpecialIds, Tokenizer, Tokenizers
from tx_lightning.weights.configuration import Configuration
from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.folders import contents, damaged, read_json, read_text
from tx_lightning.weights.plans import Family, TokenError
from tx_lightning.weights.renumbering import PAD, padded_last
from tx_lightning.weights.sentencepieces import (
    as_tokenizer,
    check_charsmap,
    read_pieces,
    unreachable,
)

TOKENIZER = "tokenizer.json"
TARGET = "target_tokenizer.json"  # of folders written here, where the target side has its own
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FOREIGN = "tx_lightning"  # the entry with which `Tokenizer.foreign` marks the JSON

Names = Mapping[str, str]  # unk_token -> <unk>
Document = tuple[str, dict[str, Any]]
Source = tuple[Path, str]  # the file that errors name, and the tokenizer as JSON

_TEXTS = ["The café — Straße 漢字 \U0001f600\u0301 a\tb\n  9", "", " "]  # to try tokenizers out


def read_tokenizers(folder: Path, config: Configuration, family: Family) -> Tokenizers:
    """Make tokenizers of the files of a folder.

    Raises:
        WeightsError: There are none, they are damaged, or have more entries than the network.
    """
    options = _json_if_there(folder / TOKENIZER_CONFIG)
    given = [_special_tokens(folder / file) for file in (SPECIAL_TOKENS, TOKENIZER_CONFIG)]
    names = {**family.special_tokens, **given[0], **given[1]}
    found = [
        _tokenizer(text, path, config, family, names)
        for path, text in dict.fromkeys(_texts(folder, options, names))
    ]
    return Tokenizers(found[0], found[-1])


def _json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(path: Path) -> dict[str, str]:
    """Read the names of special tokens, given as string or as object with `content`."""
    given, names = _json_if_there(path), {}
    for key in (f"{role}_token" for role in _ROLES):
        value = given.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            names[key] = content
        elif value is not None:
            raise WeightsError(f"{path}: {key} is {value!r}; supported: the text of a token")
    return names


def _texts(folder: Path, options: Mapping[str, Any], names: Names) -> list[Source]:
    """Read the tokenizers of both sides as JSON, each with its path."""

    def there(*files: str) -> bool:
        return all((folder / file).is_file() for file in files)

    if there(TOKENIZER):
        sides = [folder / TOKENIZER, folder / TARGET] if there(TARGET) else [folder / TOKENIZER]
        return [(path, read_text(path)) for path in sides]
    if there("vocab.txt"):
        return [(folder / "vocab.txt", _word_pieces(folder / "vocab.txt", options, names))]
    if there("source.spm", "target.spm", "vocab.json"):
        own = "target_vocab.json" if there("target_vocab.json") else "vocab.json"
        return [
            (folder / file, _sentence_pieces(folder / file, folder / vocabulary, names))
            for file, vocabulary in (("source.spm", "vocab.json"), ("target.spm", own))
        ]
    if there("vocab.json", "merges.txt"):
        return [(folder / "vocab.json", _byte_pairs(folder, options))]
    raise WeightsError(
        f"{folder} has no tokenizer: neither {TOKENIZER} nor vocab.json and merges.txt, vocab.txt, "
        f"or source.spm, target.spm and vocab.json; {contents(folder)}"
    )


def _flag(options: Mapping[str, Any], name: str, default: bool | None) -> Any:
    """Return a boolean option of tokenizer_config.json, or its default."""
    value = options.get(name)
    if value is not None and not isinstance(value, bool):
        raise WeightsError(f"{TOKENIZER_CONFIG}: {name} is {value!r}; supported: true or false")
    return default if value is None else value


def _word_pieces(path: Path, options: Mapping[str, Any], names: Names) -> str:
    """BERT's tokenizer: words, in pieces of a vocabulary with one entry a line."""
    lines = read_text(path).split("\n")
    entries = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    last = {entry: i for i, entry in enumerate(entries)}
    # Of equal lines the last one counts; the others get names that do not occur in text.
    vocabulary = {
        entry if last[entry] == i else f" {i} {entry}": i for i, entry in enumerate(entries)
    }
    with damaged(path, "is no vocabulary of word pieces"):
        model = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk_token"]))
    model.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_flag(options, "tokenize_chinese_chars", True),
        strip_accents=_flag(options, "strip_accents", None),
        lowercase=_flag(options, "do_lower_case", True),
    )
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece(prefix="##")
    return str(model.to_str())


def _byte_pairs(folder: Path, options: Mapping[str, Any]) -> str:
    """GPT-2's and BART's tokenizer: byte pairs with a vocabulary and the merges."""
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    with damaged(folder / "vocab.json", "and merges.txt are no vocabulary of byte pairs"):
        vocabulary, merges = models.BPE.read_file(*files)
        model = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    space = _flag(options, "add_prefix_space", False)
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    model.decoder = decoders.ByteLevel()
    return str(model.to_str())


def _sentence_pieces(pieces: Path, vocabulary: Path, names: Names) -> str:
    """Marian's tokenizer of a side: its SentencePiece model, with the ids of a vocabulary."""
    ids = read_json(vocabulary)
    whole = all(type(i) is int for i in ids.values())
    if not whole or sorted(ids.values()) != list(range(len(ids))):
        raise WeightsError(f"{vocabulary}: its ids are not 0 to {len(ids) - 1}")
    unknown = names["unk_token"]
    if unknown not in ids:
        raise WeightsError(f"{vocabulary} has no {unknown}")
    codes = [entry for entry in ids if entry.startswith(">>") and entry.endswith("<<")]
    read = read_pieces(pieces)
    if not read.scores.keys() & ids.keys():
        raise WeightsError(f"{pieces}: none of its pieces has an id in {vocabulary.name}")
    with damaged(pieces, "is no usable SentencePiece model"):
        text = str(as_tokenizer(read, ids, unknown=unknown, codes=codes).to_str())
    last = len(ids) - 1
    return json.dumps(padded_last(json.loads(text), range(last))) if ids.get(PAD) == last else text


def _tokenizer(
    text: str, path: Path, config: Configuration, family: Family, names: Names
) -> Tokenizer:
    with damaged(path, "is no tokenizer in JSON"):
        model = tokenizers.Tokenizer.from_str(text)
        entries = model.get_vocab(with_added_tokens=True)
    rows = config.integer("vocab_size")
    if not entries or max(entries.values()) >= rows:
        raise WeightsError(
            f"{path}: the tokenizer has ids up to {max(entries.values(), default=-1)}, but by "
            f"config.json vocab_size is {rows}"
        )
    if max(entries.values()) >= len(entries):
        largest = max(entries.values())
        raise WeightsError(
            f"{path}: its ids have gaps: {len(entries)} entries, ids up to {largest}"
        )

    def token_id(name: str) -> int | None:
        content = names.get(name, "")
        return entries.get(content, entries.get(unreachable(content)))

    try:
        ids = family.special_ids(config, token_id)
    except TokenError as error:
        raise WeightsError(f"{path}: {error}") from error
    special = {i: names[name].strip() for name in names if (i := token_id(name)) is not None}
    for i in _numbers(ids):
        special.setdefault(i, (model.id_to_token(i) or f"<{i}>").strip())
    with damaged(path, "is no usable tokenizer"):
        _check_charsmaps(json.loads(model.to_str())["normalizer"])
        _put_around(model, ids, family.model_type)
        found = Tokenizer.foreign(str(model.to_str()), ids, dict(sorted(special.items())))
        _try_out(found)
    return found


def _check_charsmaps(normalizer: dict[str, Any] | None) -> None:
    """Refuse a normalizer that panics on some text, also inside a sequence."""
    for part in [] if normalizer is None else normalizer.get("normalizers", [normalizer]):
        if part.get("type") == "Precompiled":
            check_charsmap(base64.b64decode(part["precompiled_charsmap"]))
        elif part is not normalizer:
            _check_charsmaps(part)


def _try_out(tokenizer: Tokenizer) -> None:
    """Use a tokenizer once: the library accepts some that fail on every text."""
    rows = tokenizer.encode_batch(_TEXTS)
    if any(not 0 <= i < tokenizer.vocab_size for row in rows for i in row):
        raise ValueError("it gives ids beyond its entries")
    tokenizer.decode_batch([*rows, range(tokenizer.vocab_size)])


def _numbers(ids: SpecialIds) -> set[int]:
    single = (ids.pad, ids.bos, ids.eos, ids.unk, ids.mask)
    return {*(i for i in single if i is not None), *ids.prefix}


# Ours as files


def special_ids_of(tokenizer: Tokenizer) -> SpecialIds:
    """The special ids of a tokenizer of ours."""
    marked = json.loads(tokenizer.to_json()).get(_FOREIGN)
    prefix = tuple(marked["ids"]["prefix"]) if marked else ()
    return SpecialIds(
        tokenizer.pad_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.unk_id,
        tokenizer.mask_id,
        prefix,
    )


def plain_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the JSON of a tokenizer without our own entry."""
    settings: dict[str, Any] = json.loads(tokenizer.to_json())
    settings.pop(_FOREIGN, None)
    return settings


def tokenizer_documents(
    found: Tokenizers, model_type: str, longest: int, *, literal: bool = False
) -> list[Document]:
    """Build the tokenizer files of transformers: names and contents.

    Special tokens have the names that they have in the vocabulary.

    Args:
        found: The tokenizers.
        model_type: Of the network.
        longest: Maximum number of tokens of a text.
        literal: Whether names of special tokens in a text are ordinary text.
    """
    ids = special_ids_of(found.source)
    model, settings = _for_transformers(found.source, ids, model_type)
    roles = {"pad": ids.pad, "bos": ids.bos, "eos": ids.eos, "unk": ids.unk, "mask": ids.mask}
    if model_type == "bert":
        roles |= {"cls": ids.bos, "sep": ids.eos}
    if ids.prefix:
        roles["bos"] = ids.prefix[0]
    elif ids.bos == ids.pad:  # no token of a text
        del roles["bos"]
    names = {
        f"{role}_token": model.id_to_token(i)
        for role, i in roles.items()
        if i is not None and model.id_to_token(i) is not None
    }
    options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    options["clean_up_tokenization_spaces"] = False
    if model_type != "bert":  # GPT-2 would add the embedding of a token
        options["model_input_names"] = ["input_ids", "attention_mask"]
    options["model_max_length"] = longest
    if literal:
        options["split_special_tokens"] = True
    documents = [(TOKENIZER, settings), (TOKENIZER_CONFIG, options), (SPECIAL_TOKENS, names)]
    if found.source.sha256 != found.target.sha256:
        target = special_ids_of(found.target)
        documents.append((TARGET, _for_transformers(found.target, target, model_type)[1]))
    return documents


def _for_transformers(
    tokenizer: Tokenizer, ids: SpecialIds, model_type: str
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A tokenizer without our entry, and with the special tokens that are put around a text."""
    model = tokenizers.Tokenizer.from_str(json.dumps(plain_settings(tokenizer)))
    _put_around(model, ids, model_type)
    return model, json.loads(model.to_str())


def _put_around(model: tokenizers.Tokenizer, ids: SpecialIds, model_type: str) -> None:
    """Add a post-processor that puts special tokens around a text, if there is none."""
    before = [ids.bos] if model_type == "bert" else list(ids.prefix)
    known = all(model.id_to_token(i) is not None for i in (*before, ids.eos))
    if model.post_processor is None and model_type != "gpt2" and known:
        model.post_processor = _around(model, before, [ids.eos])


def _around(
    model: tokenizers.Tokenizer, before: Sequence[int], behind: Sequence[int]
) -> processors.TemplateProcessing:
    first = [model.id_to_token(i) for i in before]
    last = [model.id_to_token(i) for i in behind]
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[(model.id_to_token(i), i) for i in {*before, *behind}],
    )
