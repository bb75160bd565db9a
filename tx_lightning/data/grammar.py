"""The embedded data: sentence pairs of a small language whose best possible scores are known.

German to English has one right translation for each sentence (BLEU 100). An English sentence has
one tree, so its probability is a product of rule probabilities and the optimum of a language model
is exact. Whether a sentence says something positive follows from its main verb and its negation.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

from tx_lightning.data.errors import DataError, check_at_least
from tx_lightning.data.grammar_rules import rules
from tx_lightning.data.sources import ParallelSource
from tx_lightning.data.synchronous_grammar import SynchronousGrammar, Tree

Language = Literal["de", "en"]
Polarity = Literal["positive", "negative"]

_FIELDS = {"de": "german", "en": "english"}
MOST_SENTENCES = 10**9
_VERSION = 1  # raise it when the same rules and seed give other sentences
# The share of all sentences, by probability, that may appear in a split.
_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Example:
    """One sentence in both languages.

    Args:
        german: The German sentence.
        english: Its only translation.
        tree: The derivation of both.
    """

    german: str
    english: str
    tree: Tree

    @property
    def polarity(self) -> Polarity:
        """What the main clause says: the sign of its verb, turned by a negation."""
        return _polarity(self.tree)

    @property
    def english_log_prob(self) -> float:
        """ln P(english) under the grammar."""
        return math.log(self.tree.probability())


class Grammar(ParallelSource):
    """Sentence pairs of the embedded language, drawn independently from a weighted grammar.

    A sentence belongs to one split for good, by a hash of its English side: train, val and test
    share no sentence in either language, whatever their sizes and seeds. A split is a function of
    its seed, and a smaller one is the beginning of a larger one.

    Args:
        source_language: Translate from `de` (each sentence has one right translation) or from
            `en` (the German word order is then sometimes free, and BLEU 100 out of reach).
        target_language: The other of `de` and `en`.
        n_train: Pairs in the training split; a short sentence may occur more than once.
        n_val: Pairs in the validation split.
        n_test: Pairs in the test split.
        seed: Another seed draws other sentences from the same grammar.
    """

    def __init__(
        self,
        source_language: Language = "de",
        target_language: Language = "en",
        *,
        n_train: int = 200_000,
        n_val: int = 1_000,
        n_test: int = 1_000,
        seed: int = 0,
    ) -> None:
        for option, language in (("source", source_language), ("target", target_language)):
            if language not in _FIELDS:
                raise DataError(
                    f"Grammar: {option}_language is {language!r}; there are 'de' and 'en'"
                )
        if source_language == target_language:
            raise DataError(f"Grammar: both languages are {source_language!r}; name two")
        self.sizes = {"train": n_train, "val": n_val, "test": n_test}
        for split, size in self.sizes.items():
            check_at_least(f"Grammar: n_{split}", size, 1, most=MOST_SENTENCES)
        check_at_least("Grammar: seed", seed, 0)
        self.source_language = source_language
        self.target_language = target_language
        self.seed = seed

    def splits(self) -> list[str]:
        return list(self.sizes)

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        forward = self.source_language == "de"
        for example in self.examples(split):
            german, english = example.german, example.english
            yield (german, english) if forward else (english, german)

    def examples(self, split: str) -> Iterator[Example]:
        """The sentences of a split with their trees, in the order of `pairs`.

        Raises:
            DataError: There is no such split.
        """
        self.check_split(split)
        grammar = language()
        # Documented to give the same numbers on every platform and version of Python.
        random = Random(f"{self.seed} {split}").random
        drawn = 0
        while drawn < self.sizes[split]:
            tree = grammar.sample(random)
            english = _sentence(tree, "en")
            if _split_of(english) == split:
                drawn += 1
                yield Example(_sentence(tree, "de"), english, tree)

    def fingerprint(self, split: str) -> str:
        self.check_split(split)
        identity = (
            _VERSION,
            _SHARES,
            language().description,
            split,
            self.sizes[split],
            self.seed,
            self.source_language,
        )
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def optimum_log_loss(self, split: str) -> float:
        """The sum of -ln P(english) over a split, in nats: the best a language model can expect.

        P is the probability in the whole language, not given the split. A split is told by a hash
        that no model can learn; one that knew it could gain ln(1 / share of the split) a sentence.
        """
        return -sum(example.english_log_prob for example in self.examples(split))

    def optimum_perplexity(self, split: str, tokens: int) -> float:
        """The best perplexity of the English side of a split, per token.

        Args:
            split: The split.
            tokens: What the model predicts in the whole split, in its own units, end of sentence
                included; its perplexity is exp(its loss / tokens).
        """
        return math.exp(self.optimum_log_loss(split) / tokens)


@cache
def language() -> SynchronousGrammar:
    """The grammar of the embedded language."""
    return SynchronousGrammar(rules())


def parse(sentence: str, language_of_sentence: Language = "en") -> list[Tree]:
    """The trees of a sentence: none when it is not in the language, never more than one.

    Args:
        sentence: The sentence with its capital letter and full stop.
        language_of_sentence: `de` or `en`.
    """
    text = f"{sentence[:1].lower()}{sentence[1:]}".removesuffix(".").replace(",", " ,")
    if language_of_sentence == "en":
        text = re.sub(r"\ban\b", "a", text)
    trees = language().parse(text, _FIELDS[language_of_sentence])
    # What was forgiven so far (a missing full stop, "a apple") is not in the language.
    return [tree for tree in trees if _sentence(tree, language_of_sentence) == sentence]


def translate(german: str) -> str:
    """The English translation of a German sentence.

    Raises:
        ValueError: The sentence is not in the language.
    """
    return _sentence(_the_tree(german, "de"), "en")


def english_log_prob(sentence: str) -> float:
    """ln P(sentence) in the English side of the language; minus infinity outside of it."""
    trees = parse(sentence, "en")
    return math.log(trees[0].probability()) if trees else -math.inf


def polarity(sentence: str, language_of_sentence: Language = "en") -> Polarity:
    """What the main clause says: the sign of its verb, turned by a negation.

    Args:
        sentence: The sentence with its capital letter and full stop.
        language_of_sentence: `de` or `en`.

    Raises:
        ValueError: The sentence is not in the language.
    """
    return _polarity(_the_tree(sentence, language_of_sentence))


def english_entropy() -> float:
    """The entropy of the English side of the language, exact, in nats a sentence."""
    return language().entropy()


def _the_tree(sentence: str, language_of_sentence: Language) -> Tree:
    trees = parse(sentence, language_of_sentence)
    if not trees:
        raise ValueError(
            f"{sentence!r} is not a sentence of the embedded language in "
            f"{language_of_sentence!r}; see `Grammar` for some"
        )
    return trees[0]


def _polarity(tree: Tree) -> Polarity:
    return "positive" if _sign(tree) > 0 else "negative"


def _sign(tree: Tree) -> int:
    """The sign of the main clause; verbs of reasons and relative clauses do not count."""
    names = tree.production.names
    sign = tree.production.sign
    for name in ("clause", "verb"):
        if name in names:
            sign *= _sign(tree.child(name))
    return sign


def _split_of(english: str) -> str:
    place = int.from_bytes(hashlib.blake2b(english.encode(), digest_size=8).digest(), "big") / 2**64
    for split, share in _SHARES.items():
        if place < share:
            return split
        place -= share
    return "test"


def _sentence(tree: Tree, language_of_sentence: Language) -> str:
    """The tree with a capital letter, commas and a full stop; English "a" is "an" at a vowel."""
    text = tree.text(_FIELDS[language_of_sentence]).replace(" ,", ",")
    if language_of_sentence == "en":
        text = re.sub(r"\ba(?= [aeiou])", "an", text)
    return f"{text[0].upper()}{text[1:]}."
