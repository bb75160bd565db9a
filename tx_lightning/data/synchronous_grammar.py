"""A weighted synchronous grammar: one tree, several languages, exact probabilities.

A rule rewrites a symbol into named children and says, field by field, how the words of the
children are put together. Fields are the forms a phrase can take ("nom", "dat", "english", ...),
so agreement and discontinuous words (a separable verb) are data, and one tree is spelled out in
every language. This is a parallel multiple context-free grammar (Seki et al. 1991, "On multiple
context-free grammars") written as in Grammatical Framework (Ranta 2004).
"""

import json
import math
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, product
from typing import NamedTuple

# Symbols with at most so many trees are drawn in one step; another number draws other sentences.
_LISTED = 1000


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


class Template(NamedTuple):
    """Words and slots in order, and the same as a text with a "%s" for each slot."""

    items: tuple[str | Slot, ...]
    text: str
    slots: tuple[Slot, ...]


class Production(NamedTuple):
    """A rule made ready: probability normalized, templates split, children by position."""

    probability: float
    names: tuple[str, ...]
    symbols: tuple[str, ...]
    fields: dict[str, tuple[Template, ...]]
    variants: int
    sign: int


@dataclass(slots=True)
class Tree:
    """A derivation; `variant` selects among the free variants of the production."""

    production: Production
    variant: int
    children: tuple["Tree", ...]
    # What was spelled out before, kept in trees that are used again and again.
    spelled: dict[str, str] | None = field(default=None, compare=False, repr=False)

    def text(self, field: str) -> str:
        """The words of a field, separated by blanks; a comma is a word.

        A comma before another comma or at the end is absorbed, so that a rule may put a phrase
        between commas wherever it stands.
        """
        text = " ".join(_spell(self, field).split())
        return text.replace(", ,", ",").removesuffix(" ,") if "," in text else text

    def child(self, name: str) -> "Tree":
        """The child of that name."""
        return self.children[self.production.names.index(name)]

    def probability(self) -> float:
        """The probability of the tree, all its free variants together."""
        return self.production.probability * math.prod(c.probability() for c in self.children)

    def free_variants(self) -> int:
        """The number of trees that differ from this one in free variants alone, with itself."""
        return self.production.variants * math.prod(c.free_variants() for c in self.children)


def _spell(tree: Tree, field: str) -> str:
    spelled = tree.spelled
    if spelled is not None and field in spelled:
        return spelled[field]
    templates = tree.production.fields[field]
    _, text, slots = templates[tree.variant if len(templates) > 1 else 0]
    if slots:
        children = tree.children
        text %= tuple([_spell(children[child], name) for child, name in slots])
    if spelled is not None:
        spelled[field] = text
    return text


class SynchronousGrammar:
    """Samples, enumerates, parses and measures the trees of a finite set of rules.

    Args:
        rules: All rules; their order matters to `sample` alone. They must not be recursive.
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
        self._urns: dict[str, _Urn] = {}
        self._tries: dict[tuple[str, str], _Trie] = {}

    def sample(self, random: Callable[[], float]) -> Tree:
        """Draw a tree; `random` returns uniform numbers from [0, 1)."""
        return self._sample(self.start, random)

    def _sample(self, symbol: str, random: Callable[[], float]) -> Tree:
        cumulative, trees, productions = self._urns.get(symbol) or self._urn(symbol)
        place = bisect(cumulative, random())
        if trees:
            return trees[place]
        production = productions[place]
        variant = int(random() * production.variants) if production.variants > 1 else 0
        children = tuple([self._sample(child, random) for child in production.symbols])
        return Tree(production, variant, children)

    def _urn(self, symbol: str) -> "_Urn":
        productions = self.productions[symbol]
        weights = [production.probability for production in productions]
        trees: list[Tree] = []
        if self.count(symbol) <= _LISTED:
            trees = list(self.trees(symbol))
            weights = [tree.probability() / tree.free_variants() for tree in trees]
        self._urns[symbol] = _Urn(list(accumulate(weights[:-1])), trees, productions)
        return self._urns[symbol]

    def trees(self, symbol: str | None = None) -> Iterator[Tree]:
        """Every tree of a symbol (of a sentence by default), free variants one by one."""
        return self._trees(symbol or self.start, {})

    def _trees(self, symbol: str, known: dict[str, list[Tree]]) -> Iterator[Tree]:
        for production in self.productions[symbol]:
            for child in production.symbols:
                if child not in known:
                    known[child] = list(self._trees(child, known))
            for children in product(*(known[child] for child in production.symbols)):
                for variant in range(production.variants):
                    yield Tree(production, variant, children, spelled={})

    def count(self, symbol: str | None = None) -> int:
        """The number of trees of a symbol (of a sentence by default), free variants not counted."""

        def value(production: Production, below: list[float]) -> float:
            return math.prod(below)

        return int(self._total(value, symbol or self.start))

    def entropy(self) -> float:
        """The entropy of the trees in nats, free variants not counted.

        H(symbol) = sum over its productions of p (-ln p + sum over children of H(child)).
        """

        def value(production: Production, below: list[float]) -> float:
            return production.probability * (sum(below) - math.log(production.probability))

        return self._total(value, self.start)

    def _total(self, value: Callable[[Production, list[float]], float], symbol: str) -> float:
        """Sum `value(production, values of the children)` over the productions, bottom up."""
        known: dict[str, float] = {}

        def total(symbol: str) -> float:
            if symbol not in known:
                known[symbol] = sum(
                    value(p, [total(child) for child in p.symbols])
                    for p in self.productions[symbol]
                )
            return known[symbol]

        return total(symbol)

    def parse(self, text: str, field: str) -> list[Tree]:
        """Every tree with this text in `field`; free variants count as different trees."""
        words = text.split()
        spans = _Parser(self, words).spans(self.start, field, 0)
        return [t for end, t in spans if end == len(words) and t.text(field) == text]

    def trie(self, symbol: str, field: str) -> "_Trie":
        """The templates of a field of a symbol, those with the same beginning together."""
        if (symbol, field) not in self._tries:
            trie = self._tries[symbol, field] = _Trie({}, {}, [])
            for production in self.productions[symbol]:
                for variant, template in enumerate(production.fields[field]):
                    trie.add(production, variant, template)
        return self._tries[symbol, field]

    @cached_property
    def description(self) -> str:
        """The whole grammar as text: equal for equal grammars, different for different ones."""
        return json.dumps([_LISTED, self.start, self.productions], ensure_ascii=False)

    def _check(self, symbol: str) -> None:
        for production in self.productions[symbol]:
            for name, templates in production.fields.items():
                where = f"rule of {symbol}, field {name}"
                if len(templates) not in (1, production.variants):
                    raise ValueError(f"{where}: fields must have as many free variants, or none")
                for template in templates:
                    if {slot.child for slot in template.slots} != set(range(len(production.names))):
                        raise ValueError(
                            f"{where}: the template {' '.join(template.text.split())!r} must use "
                            f"every child, {', '.join(production.names)}; add the missing slots"
                        )
                    for child, wanted in template.slots:
                        for below in self.productions[production.symbols[child]]:
                            if wanted not in below.fields:
                                raise ValueError(
                                    f"{where}: a rule of {production.symbols[child]} has no field "
                                    f"{wanted!r}, only {', '.join(below.fields)}"
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
        productions.append(
            Production(
                probability=rule.weight / total,
                names=names,
                symbols=tuple(rule.children.values()),
                fields=fields,
                variants=max(len(templates) for templates in fields.values()),
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
    spelled = " ".join(item if isinstance(item, str) else "%s" for item in items)
    return Template(tuple(items), spelled, tuple(i for i in items if isinstance(i, Slot)))


class _Urn(NamedTuple):
    """What is drawn for a symbol: whole trees where there are few, productions otherwise."""

    cumulative: list[float]
    trees: list[Tree]
    productions: list[Production]


class _Trie(NamedTuple):
    """Templates by their first item: a word, or (name of the child, its symbol, its field)."""

    words: dict[str, "_Trie"]
    slots: dict[tuple[str, str, str], "_Trie"]
    ends: list[tuple[Production, int]]  # (production, variant) of the templates that end here

    def add(self, production: Production, variant: int, template: Template) -> None:
        trie = self
        for item in template.items:
            new = _Trie({}, {}, [])
            if isinstance(item, str):
                trie = trie.words.setdefault(item, new)
            else:
                name, symbol = production.names[item.child], production.symbols[item.child]
                trie = trie.slots.setdefault((name, symbol, item.field), new)
        trie.ends.append((production, variant))


class _Parser:
    """Top-down parsing with memory; a child used twice must be the same tree both times."""

    def __init__(self, grammar: SynchronousGrammar, words: list[str]) -> None:
        self.grammar = grammar
        self.words = words
        self.known: dict[tuple[str, str, int], list[tuple[int, Tree]]] = {}

    def spans(self, symbol: str, field: str, start: int) -> list[tuple[int, Tree]]:
        """All (end, tree) such that the tree spells words[start:end]."""
        key = (symbol, field, start)
        if key not in self.known:
            self.known[key] = list(self.match(self.grammar.trie(symbol, field), start, {}))
        return self.known[key]

    def match(
        self, trie: _Trie, position: int, found: dict[str, Tree]
    ) -> Iterator[tuple[int, Tree]]:
        """All (end, tree) of the templates below `trie`, whose children so far are `found`."""
        for production, variant in trie.ends:
            yield position, Tree(production, variant, tuple(found[n] for n in production.names))
        for word in dict.fromkeys([*self.words[position : position + 1], ","]):
            if word in trie.words and (end := self.after(word, position)) is not None:
                yield from self.match(trie.words[word], end, found)
        for (name, symbol, form), rest in trie.slots.items():
            if name not in found:
                for end, tree in self.spans(symbol, form, position):
                    yield from self.match(rest, end, {**found, name: tree})
            else:
                again: int | None = position
                for word in _spell(found[name], form).split():
                    again = None if again is None else self.after(word, again)
                if again is not None:
                    yield from self.match(rest, again, found)

    def after(self, word: str, position: int) -> int | None:
        """Where the text goes on after this word; None if another word stands there."""
        if self.words[position : position + 1] == [word]:
            return position + 1
        at_end = position == len(self.words)
        absorbed = word == "," and position > 0 and (at_end or self.words[position - 1] == ",")
        return position if absorbed else None
