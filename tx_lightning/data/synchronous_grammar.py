"""A weighted synchronous grammar: one tree, several languages, exact probabilities.

A rule rewrites a symbol into named children and says, field by field, how the words of the children
are put together. Fields are the forms a phrase can take ("nom", "dat", "english", ...), so agreement
and discontinuous words (a separable verb) are data, and one tree is spelled out in every language.
This is a parallel multiple context-free grammar (Seki et al. 1991) written as in Grammatical
Framework (Ranta 2011).
"""

import json
import math
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product
from typing import NamedTuple


@dataclass(frozen=True)
class Rule:
    """How a symbol is rewritten.

    Args:
        symbol: What is rewritten.
        weight: Probability up to the sum over all rules of the symbol.
        fields: Field name to template: words and slots `{child.field}` separated by blanks. A tuple
            of templates holds free variants: equally likely spellings of the same tree.
        children: Name to symbol.
        sign: Factor of the polarity of the whole, +1 or -1.
    """

    symbol: str
    weight: float
    fields: Mapping[str, str | tuple[str, ...]]
    children: Mapping[str, str] = field(default_factory=dict)
    sign: int = 1


class Slot(NamedTuple):
    """A field of a child, to be spelled out at this place of a template."""

    child: int
    field: str


Template = tuple[str | Slot, ...]


class Production(NamedTuple):
    """A rule made ready: probability normalized, templates split, children by position."""

    probability: float
    names: tuple[str, ...]
    symbols: tuple[str, ...]
    fields: dict[str, tuple[Template, ...]]
    variants: int
    sign: int


class Tree(NamedTuple):
    """A derivation: `variant` selects among the free variants of the production."""

    production: Production
    variant: int
    children: tuple["Tree", ...]

    def words(self, field: str) -> list[str]:
        """The tree spelled out in one field."""
        words: list[str] = []
        _spell(self, field, words)
        return words

    def child(self, name: str) -> "Tree":
        """The child of that name."""
        return self.children[self.production.names.index(name)]

    def log_prob(self) -> float:
        """ln of the probability of the tree, summed over its free variants."""
        return math.log(self.production.probability) + sum(c.log_prob() for c in self.children)


def _spell(tree: Tree, field: str, words: list[str]) -> None:
    templates = tree.production.fields[field]
    for item in templates[tree.variant if len(templates) > 1 else 0]:
        if isinstance(item, str):
            words.append(item)
        else:
            _spell(tree.children[item.child], item.field, words)


class SynchronousGrammar:
    """Samples, enumerates, parses and measures the trees of a finite set of rules.

    Args:
        rules: All rules, in an order that matters to sampling; they must not be recursive.
        start: The symbol of a whole sentence.

    Raises:
        ValueError: A template names a child or a field that is not there, or leaves a child out
            (a tree could then not be read back from its words).
    """

    def __init__(self, rules: Iterable[Rule], start: str = "Sentence") -> None:
        self.start = start
        by_symbol: dict[str, list[Rule]] = {}
        for rule in rules:
            by_symbol.setdefault(rule.symbol, []).append(rule)
        self.productions = {s: _normalized(s, group) for s, group in by_symbol.items()}
        for symbol in by_symbol:
            self._check(symbol)
        self._cumulative = {
            symbol: list(accumulate(p.probability for p in group[:-1]))
            for symbol, group in self.productions.items()
        }

    def sample(self, random: Callable[[], float]) -> Tree:
        """Draw a tree; `random` returns uniform numbers from [0, 1)."""
        return self._sample(self.start, random)

    def _sample(self, symbol: str, random: Callable[[], float]) -> Tree:
        production = self.productions[symbol][bisect(self._cumulative[symbol], random())]
        variant = int(random() * production.variants) if production.variants > 1 else 0
        children = tuple([self._sample(child, random) for child in production.symbols])
        return Tree(production, variant, children)

    def trees(self, symbol: str | None = None) -> Iterator[Tree]:
        """Every tree of a symbol; only for small grammars."""
        for production in self.productions[symbol or self.start]:
            for children in product(*(list(self.trees(s)) for s in production.symbols)):
                for variant in range(production.variants):
                    yield Tree(production, variant, children)

    def count(self) -> int:
        """The number of trees, free variants not counted."""

        def value(production: Production, below: list[float]) -> float:
            return math.prod(below)

        return int(self._total(value))

    def entropy(self) -> float:
        """The entropy of the trees in nats, free variants not counted.

        H(symbol) = sum over its productions of p (-ln p + sum over children of H(child)).
        """

        def value(production: Production, below: list[float]) -> float:
            return production.probability * (sum(below) - math.log(production.probability))

        return self._total(value)

    def _total(self, value: Callable[[Production, list[float]], float]) -> float:
        """Sum `value(production, values of the children)` over the productions, bottom up."""
        known: dict[str, float] = {}

        def total(symbol: str) -> float:
            if symbol not in known:
                known[symbol] = sum(
                    value(p, [total(child) for child in p.symbols])
                    for p in self.productions[symbol]
                )
            return known[symbol]

        return total(self.start)

    def parse(self, words: Sequence[str], field: str) -> list[Tree]:
        """Every tree whose words in `field` are `words`; free variants count as different trees."""
        spans = _Parser(self.productions, words).spans(self.start, field, 0)
        return [tree for end, tree in spans if end == len(words)]

    def description(self) -> str:
        """The whole grammar as text: equal for equal grammars, different for different ones."""
        return json.dumps(self.productions, ensure_ascii=False)

    def _check(self, symbol: str) -> None:
        for production in self.productions[symbol]:
            for name, templates in production.fields.items():
                for template in templates:
                    slots = [item for item in template if isinstance(item, Slot)]
                    if {slot.child for slot in slots} != set(range(len(production.symbols))):
                        raise ValueError(
                            f"rule of {symbol}, field {name}: the template must use every child, "
                            f"{', '.join(production.names)}; add the missing slots"
                        )
                    for slot in slots:
                        child = production.symbols[slot.child]
                        lacking = [
                            p for p in self.productions[child] if slot.field not in p.fields
                        ]
                        if lacking:
                            raise ValueError(
                                f"rule of {symbol}, field {name}: a rule of {child} has no field "
                                f"{slot.field}, only {', '.join(lacking[0].fields)}"
                            )


def _normalized(symbol: str, rules: Sequence[Rule]) -> list[Production]:
    total = sum(rule.weight for rule in rules)
    productions = []
    for rule in rules:
        names = tuple(rule.children)
        fields = {
            name: tuple(
                _template(symbol, text, names)
                for text in ((texts,) if isinstance(texts, str) else texts)
            )
            for name, texts in rule.fields.items()
        }
        variants = max(len(templates) for templates in fields.values())
        productions.append(
            Production(
                probability=rule.weight / total,
                names=names,
                symbols=tuple(rule.children.values()),
                fields=fields,
                variants=variants,
                sign=rule.sign,
            )
        )
    return productions


def _template(symbol: str, text: str, names: Sequence[str]) -> Template:
    items: list[str | Slot] = []
    for word in text.split():
        slot = re.fullmatch(r"\{(\w+)\.(\w+)\}", word)
        if slot is None:
            items.append(word)
        elif slot[1] in names:
            items.append(Slot(names.index(slot[1]), slot[2]))
        else:
            raise ValueError(f"rule of {symbol}: {word} names no child; there are {list(names)}")
    return tuple(items)


class _Parser:
    """Top-down parsing with memory; a child used twice must be the same tree both times."""

    def __init__(self, productions: dict[str, list[Production]], words: Sequence[str]) -> None:
        self.productions = productions
        self.words = list(words)
        self.known: dict[tuple[str, str, int], list[tuple[int, Tree]]] = {}

    def spans(self, symbol: str, field: str, start: int) -> list[tuple[int, Tree]]:
        """All (end, tree) such that the tree spells words[start:end]."""
        key = (symbol, field, start)
        if key not in self.known:
            self.known[key] = [
                (end, Tree(production, variant, tuple(found[i] for i in range(len(found)))))
                for production in self.productions[symbol]
                for variant, template in enumerate(production.fields[field])
                for end, found in self.match(production, template, start, {})
            ]
        return self.known[key]

    def match(
        self, production: Production, template: Template, position: int, found: dict[int, Tree]
    ) -> Iterator[tuple[int, dict[int, Tree]]]:
        """All (end, children by position) of a template from `position` on."""
        if not template:
            yield position, found
            return
        item, rest = template[0], template[1:]
        if isinstance(item, str) or item.child in found:
            literal = [item] if isinstance(item, str) else found[item.child].words(item.field)
            end = position + len(literal)
            if self.words[position:end] == literal:
                yield from self.match(production, rest, end, found)
            return
        for end, tree in self.spans(production.symbols[item.child], item.field, position):
            yield from self.match(production, rest, end, {**found, item.child: tree})
