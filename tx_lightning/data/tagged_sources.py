"""Where sentences with a tag for each word come from: one interface, one short class per format."""

import hashlib
import re
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from tx_lightning.data.errors import LARGEST, DataError, check_at_least
from tx_lightning.data.grammar import Grammar
from tx_lightning.data.labelled_sources import label_of, sorted_labels
from tx_lightning.data.sources import FileSource, Source, json_objects, kind_of, one_file, value_at
from tx_lightning.data.synchronous_grammar import Tree
from tx_lightning.data.text import checked, read_lines

_CASES = {"nom": "nominative", "acc": "accusative", "dat": "dative"}


class TaggedSentence(NamedTuple):
    """One sentence.

    Args:
        words: Its words, none of them empty.
        tags: The tag of each word.
        where: Where it begins, such as `train.conll, line 3`, to open an error message with.
    """

    words: list[str]
    tags: list[str]
    where: str


class TaggedSource(Source):
    """Sentences with a tag for each word, in named splits."""

    @abstractmethod
    def sentences(self, split: str) -> Iterator[TaggedSentence]:
        """The sentences of a split in file order, streamed; none is empty.

        Raises:
            DataError: There is no such split, or a file of it cannot be read.
        """

    def tags(self, split: str = "train") -> list[str]:
        """The tags in a split, by their number if all are integers and else by the alphabet.

        Args:
            split: The training split.
        """
        return sorted_labels(tag for sentence in self.sentences(split) for tag in sentence.tags)


class CoNLL(FileSource, TaggedSource):
    """A file with a word a line and a blank line after each sentence, plain or gzip.

    Columns stand between tabs in a line that has tabs, and between blanks otherwise. Left out are
    the lines `-DOCSTART-`, comments (`#` and a blank, before the first word of a sentence) and, in
    CoNLL-U, the lines of contracted and of unspoken words (numbered `3-4` and `5.1`).

    Args:
        train: The file of the split `train`.
        val: The file of `val`.
        test: The file of `test`.
        word_column: Column of the word, from 0; -1 is the last.
        tag_column: Column of the tag, likewise.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        word_column: int = 0,
        tag_column: int = -1,
    ) -> None:
        check_at_least("CoNLL: word_column", word_column, -LARGEST)
        check_at_least("CoNLL: tag_column", tag_column, -LARGEST)
        self.columns = (word_column, tag_column)
        files = {"train": one_file(train), "val": one_file(val), "test": one_file(test)}
        super().__init__(files, repr(self.columns))

    def sentences(self, split: str) -> Iterator[TaggedSentence]:
        self.check_split(split)
        return self._read(*self.files[split])

    def _read(self, file: str) -> Iterator[TaggedSentence]:
        width: int | None = None
        sentence = TaggedSentence([], [], "")
        nothing = True
        for number, line in enumerate(read_lines(file), start=1):
            if not line.strip():
                if sentence.words:
                    yield sentence
                sentence = TaggedSentence([], [], "")
                continue
            if self._is_left_out(line, first=not sentence.words):
                continue
            where = f"{file}, line {number}"
            fields = _fields(line)
            width = len(fields) if width is None else width
            word, tag = self._word_and_tag(fields, width, where)
            if not sentence.words:
                sentence = TaggedSentence([], [], where)
            sentence.words.append(word)
            sentence.tags.append(tag)
            nothing = False
        if sentence.words:
            yield sentence
        if nothing:
            raise DataError(f"{file} is empty: it has no words")

    def _is_left_out(self, line: str, first: bool) -> bool:
        if line.startswith("-DOCSTART-") or (first and (line == "#" or line.startswith("# "))):
            return True
        return self.columns[0] != 0 and re.match(r"\d+[-.]\d+\t", line) is not None

    def _word_and_tag(self, fields: list[str], width: int, where: str) -> tuple[str, str]:
        if len(fields) != width:
            raise DataError(
                f"{where} has {len(fields)} columns, but the first word of the file has {width}"
            )
        for option, column in zip(("word_column", "tag_column"), self.columns, strict=True):
            if not -width <= column < width:
                columns = ", ".join(map(str, range(width)))
                raise DataError(f"{where} has no {option} {column}; its columns are {columns}")
            if not fields[column]:
                raise DataError(f"{where}: {option} {column} is empty")
        return fields[self.columns[0]], fields[self.columns[1]]


class TaggedJSONLines(FileSource, TaggedSource):
    """A file with one JSON object a line for each split, plain or gzip; blank lines are skipped.

    An object holds the list of the words and the list, of the same length, of their tags, which may
    be texts or numbers.

    Args:
        train: The file of the split `train`.
        val: The file of `val`.
        test: The file of `test`.
        words_key: Key of the words. Dots reach into nested objects: `sentence.words`.
        tags_key: Key of the tags, likewise.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        words_key: str = "words",
        tags_key: str = "tags",
    ) -> None:
        self.keys = (words_key, tags_key)
        files = {"train": one_file(train), "val": one_file(val), "test": one_file(test)}
        super().__init__(files, repr(self.keys))

    def sentences(self, split: str) -> Iterator[TaggedSentence]:
        self.check_split(split)
        return self._read(*self.files[split])

    def _read(self, file: str) -> Iterator[TaggedSentence]:
        words_key, tags_key = self.keys
        for record, where in json_objects(file):
            words = _list_at(record, words_key, where)
            tags = _list_at(record, tags_key, where)
            if len(words) != len(tags):
                raise DataError(
                    f"{where} has {len(words)} words but {len(tags)} tags: each word must have one"
                )
            if not words:
                raise DataError(f"{where} has no words; remove the line")
            yield TaggedSentence(
                [_word(word, f"{where}, word {n}") for n, word in enumerate(words, start=1)],
                [label_of(tag, f"{where}, word {n}") for n, tag in enumerate(tags, start=1)],
                where,
            )


class GrammarTags(TaggedSource):
    """German sentences of the embedded language; the tag of a word is its grammatical case.

    `nominative`, `accusative` or `dative` for every word of a noun phrase, `verb` for every part of
    a verb, `other` for the rest, relative pronouns included. Tags are certain, but few words tell
    theirs: "die Frau" is a subject or an object, "den Jungen" one boy or several. Words stand
    between blanks, a comma and the full stop at the word before. The sentences are those of
    `Grammar` with this seed.

    Args:
        n_train: Sentences in the training split.
        n_val: Sentences in the validation split.
        n_test: Sentences in the test split.
        seed: Another seed draws other sentences from the same grammar.
    """

    def __init__(
        self,
        *,
        n_train: int = 200_000,
        n_val: int = 1_000,
        n_test: int = 1_000,
        seed: int = 0,
    ) -> None:
        self.grammar = Grammar("de", "en", n_train=n_train, n_val=n_val, n_test=n_test, seed=seed)

    def splits(self) -> list[str]:
        return self.grammar.splits()

    def sentences(self, split: str) -> Iterator[TaggedSentence]:
        self.check_split(split)
        return self._read(split)

    def tags(self, split: str = "train") -> list[str]:
        """All five; reads nothing."""
        self.check_split(split)
        return sorted([*_CASES.values(), "verb", "other"])

    def fingerprint(self, split: str) -> str:
        return hashlib.sha256(f"cases {self.grammar.fingerprint(split)}".encode()).hexdigest()

    def _read(self, split: str) -> Iterator[TaggedSentence]:
        for number, example in enumerate(self.grammar.examples(split), start=1):
            words, tags = example.german.split(), list(_tags(example.tree, "german", "other"))
            assert len(words) == len(tags), example.german
            where = f"{split} of the embedded language, sentence {number}"
            yield TaggedSentence(words, tags, where)


def _tags(tree: Tree, field: str, tag: str) -> Iterator[str]:
    """The tag of each word of a field, from left to right; commas are no words.

    Args:
        tree: The tree of a sentence, or a part of one.
        field: The field.
        tag: What the words are for all that is known above.
    """
    templates = tree.production.fields[field]
    for item in templates[tree.variant if len(templates) > 1 else 0].items:
        if isinstance(item, str):
            if item != ",":
                yield "other" if item == "mit" else tag
            continue
        name = tree.production.names[item.child]
        below = {"verb": "verb", "relative": "other"}.get(name) or _CASES.get(item.field, tag)
        yield from _tags(tree.children[item.child], item.field, below)


def _fields(line: str) -> list[str]:
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return [field for field in line.split(" ") if field]


def _list_at(record: Any, key: str, where: str) -> list[Any]:
    value = value_at(record, key, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: {key!r} is {kind_of(value)}, not a list")
    return value


def _word(word: Any, where: str) -> str:
    if not isinstance(word, str):
        raise DataError(f"{where} is {kind_of(word)}, not a text")
    if not word or word.isspace():
        raise DataError(f"{where} is empty")
    return checked(word, where)
