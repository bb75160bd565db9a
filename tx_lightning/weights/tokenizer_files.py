"""The tokenizer files of a folder as tokenizers of ours, and ours as files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tx_lightning.data.tokenizers import SpecialIds, Tokenizer, Tokenizers
from tx_lightning.weights.configuration import Configuration
from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.folders import contents, read_json
from tx_lightning.weights.plans import Family
from tx_lightning.weights.sentencepieces import as_tokenizer, read_pieces, unreachable

TOKENIZER = "tokenizer.json"
TARGET = "target_tokenizer.json"  # of folders written here, where the target side has its own
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
_FOREIGN = "tx_lightning"  # the entry with which `Tokenizer.foreign` marks the JSON

Names = Mapping[str, str]  # unk_token -> <unk>
Document = tuple[str, dict[str, Any]]


def read_tokenizers(folder: Path, config: Configuration, family: Family) -> Tokenizers:
    """Make tokenizers of the files of a folder.

    Raises:
        WeightsError: There are none, they are damaged, or have more entries than the network.
    """
    options = _json_if_there(folder / TOKENIZER_CONFIG)
    given = {**_json_if_there(folder / SPECIAL_TOKENS), **options}
    names = {**family.special_tokens, **_special_tokens(given)}
    texts = _texts(folder, options, names)
    found = [_tokenizer(text, config, family, names) for text in dict.fromkeys(texts)]
    return Tokenizers(found[0], found[-1])


def _json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(given: Mapping[str, Any]) -> dict[str, str]:
    """What the special tokens are called: entries such as "eos_token", as text or as an object."""
    names: dict[str, str] = {}
    for key, value in given.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            names[key] = content
    return names


def _texts(folder: Path, options: Mapping[str, Any], names: Names) -> tuple[str, str]:
    """The tokenizers of both sides as JSON, from whichever files there are."""

    def there(*files: str) -> bool:
        return all((folder / file).is_file() for file in files)

    if there(TOKENIZER):
        source = (folder / TOKENIZER).read_text("utf-8")
        return source, (folder / TARGET).read_text("utf-8") if there(TARGET) else source
    if there("vocab.txt"):
        text = _word_pieces(folder / "vocab.txt", options, names)
        return text, text
    if there("source.spm", "target.spm", "vocab.json"):
        own = "target_vocab.json" if there("target_vocab.json") else "vocab.json"
        return (
            _sentence_pieces(folder / "source.spm", folder / "vocab.json", names),
            _sentence_pieces(folder / "target.spm", folder / own, names),
        )
    if there("vocab.json", "merges.txt"):
        text = _byte_pairs(folder, options)
        return text, text
    raise WeightsError(
        f"{folder} has no tokenizer: neither {TOKENIZER} nor vocab.json and merges.txt, vocab.txt, "
        f"or source.spm, target.spm and vocab.json; {contents(folder)}"
    )


def _word_pieces(path: Path, options: Mapping[str, Any], names: Names) -> str:
    """BERT's tokenizer: words, in pieces of a vocabulary with one entry a line."""
    lines = path.read_text("utf-8").split("\n")
    entries = lines[:-1] if lines[-1] == "" else lines
    vocabulary = {entry.rstrip("\r"): i for i, entry in enumerate(entries)}
    model = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk_token"]))
    model.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece(prefix="##")
    return str(model.to_str())


def _byte_pairs(folder: Path, options: Mapping[str, Any]) -> str:
    """GPT-2's and BART's tokenizer: byte pairs with a vocabulary and the merges."""
    try:
        vocabulary, merges = models.BPE.read_file(
            str(folder / "vocab.json"), str(folder / "merges.txt")
        )
        model = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(
            f"{folder / 'vocab.json'} and merges.txt are no vocabulary of byte pairs: {error}"
        ) from error
    space = options.get("add_prefix_space", False)
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    model.decoder = decoders.ByteLevel()
    return str(model.to_str())


def _sentence_pieces(pieces: Path, vocabulary: Path, names: Names) -> str:
    """Marian's tokenizer of a side: its SentencePiece model, with the ids of a vocabulary."""
    ids = read_json(vocabulary)
    if sorted(ids.values(), key=str) != sorted(range(len(ids)), key=str):
        raise WeightsError(f"{vocabulary}: its ids are not 0 to {len(ids) - 1}")
    unknown = names["unk_token"]
    if unknown not in ids:
        raise WeightsError(f"{vocabulary} has no {unknown}")
    codes = [entry for entry in ids if entry.startswith(">>") and entry.endswith("<<")]
    model = as_tokenizer(read_pieces(pieces), ids, unknown=unknown, codes=codes)
    return str(model.to_str())


def _tokenizer(text: str, config: Configuration, family: Family, names: Names) -> Tokenizer:
    try:
        model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(f"{TOKENIZER} is no tokenizer in JSON: {error}") from error
    entries = model.get_vocab(with_added_tokens=True)
    rows = config.integer("vocab_size")
    if len(entries) == 0 or max(entries.values()) >= rows:
        raise WeightsError(
            f"the tokenizer has ids up to {max(entries.values(), default=-1)}, but by config.json "
            f"vocab_size is {rows}"
        )

    def token_id(name: str) -> int | None:
        content = names.get(name, "")
        return entries.get(content, entries.get(unreachable(content)))

    ids = family.special_ids(config, token_id)
    special = {i: names[name].strip() for name in names if (i := token_id(name)) is not None}
    for i in _numbers(ids):
        special.setdefault(i, (model.id_to_token(i) or f"<{i}>").strip())
    return Tokenizer.foreign(text, ids, special)


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


def tokenizer_documents(found: Tokenizers, model_type: str, longest: int | None) -> list[Document]:
    """The files of tokenizers, by name, as transformers reads them.

    Its special tokens are written as they stand in the vocabulary.

    Args:
        found: The tokenizers.
        model_type: Of the network.
        longest: Most tokens of a text, None for no limit.
    """
    ids = special_ids_of(found.source)
    model, settings = _for_transformers(found.source, ids, model_type)
    roles = {"pad": ids.pad, "bos": ids.bos, "eos": ids.eos, "unk": ids.unk, "mask": ids.mask}
    if model_type == "bert":
        roles |= {"cls": ids.bos, "sep": ids.eos}
    if ids.prefix:
        roles["bos"] = ids.prefix[0]
    names = {
        f"{role}_token": model.id_to_token(i)
        for role, i in roles.items()
        if i is not None and model.id_to_token(i) is not None
    }
    options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    options["clean_up_tokenization_spaces"] = False
    if model_type != "bert":  # GPT-2 would add the embedding of a token
        options["model_input_names"] = ["input_ids", "attention_mask"]
    if longest is not None:
        options["model_max_length"] = longest
    documents = [(TOKENIZER, settings), (TOKENIZER_CONFIG, options), (SPECIAL_TOKENS, names)]
    if found.source.sha256 != found.target.sha256:
        target = special_ids_of(found.target)
        documents.append((TARGET, _for_transformers(found.target, target, model_type)[1]))
    return documents


def _for_transformers(
    tokenizer: Tokenizer, ids: SpecialIds, model_type: str
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A tokenizer without our entry, and with the special tokens that are put around a text."""
    settings = json.loads(tokenizer.to_json())
    settings.pop(_FOREIGN, None)
    model = tokenizers.Tokenizer.from_str(json.dumps(settings))
    if model.post_processor is None and model_type != "gpt2":
        before = [ids.bos] if model_type == "bert" else list(ids.prefix)
        model.post_processor = _around(model, before, [ids.eos])
    return model, json.loads(model.to_str())


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
