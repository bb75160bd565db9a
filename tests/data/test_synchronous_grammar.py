import math
import random
import re
from collections import Counter, defaultdict

import pytest

from tx_lightning.data.synchronous_grammar import Rule, SynchronousGrammar

# A verb in two pieces, a free word order, a phrase between commas.
RULES = [
    Rule(
        "Sentence",
        3,
        {
            "german": ("{who.de} {verb.sg} {verb.prefix}", "so {verb.sg} {who.de} {verb.prefix}"),
            "english": "{who.en} {verb.en}",
        },
        {"who": "Who", "verb": "Verb"},
    ),
    Rule(
        "Sentence",
        1,
        {"german": "jetzt tanzt {who.de}", "english": "{who.en} dances now"},
        {"who": "Who"},
    ),
    Rule("Who", 2, {"de": "er", "en": "he"}),
    Rule("Who", 1, {"de": "die Frau , die lügt ,", "en": "the woman that lies"}),
    Rule("Who", 1, {"de": "sie", "en": "she"}),
    Rule("Verb", 1, {"sg": "lacht", "prefix": "", "en": "laughs"}),
    Rule("Verb", 4, {"sg": "läuft", "prefix": "weg", "en": "runs away"}),
]


@pytest.fixture
def grammar() -> SynchronousGrammar:
    return SynchronousGrammar(RULES)


def test_trees_are_spelled_out_in_every_language(grammar: SynchronousGrammar) -> None:
    sentences = {(tree.text("german"), tree.text("english")) for tree in grammar.trees()}
    assert ("er läuft weg", "he runs away") in sentences
    assert ("so läuft er weg", "he runs away") in sentences
    assert ("sie lacht", "she laughs") in sentences
    assert len(sentences) == 3 * 2 * 2 + 3


def test_a_comma_is_absorbed_at_the_end_and_by_another(grammar: SynchronousGrammar) -> None:
    texts = {tree.text("german") for tree in grammar.trees()}
    assert "jetzt tanzt die Frau , die lügt" in texts
    assert "so läuft die Frau , die lügt , weg" in texts
    two = Rule("Sentence", 1, {"de": "{who.de} , weil {who.de}"}, {"who": "Who"})
    twice = SynchronousGrammar([two, *(rule for rule in RULES if rule.symbol == "Who")])
    text = "die Frau , die lügt , weil die Frau , die lügt"
    assert text in {tree.text("de") for tree in twice.trees()}
    assert len(twice.parse(text, "de")) == 1


def test_parsing_finds_exactly_the_trees_with_that_text(grammar: SynchronousGrammar) -> None:
    trees = list(grammar.trees())
    for field in ("german", "english"):
        for tree in trees:
            text = tree.text(field)
            same = [other for other in trees if other.text(field) == text]
            if field == "english":  # its template has no variants to tell apart
                same = [other for other in same if other.variant == 0]
            assert grammar.parse(text, field) == same


@pytest.mark.parametrize(
    "text",
    [
        "",
        "er",
        "er läuft",
        "er lacht weg",
        "er läuft weg weg",
        "er läuft weg ,",
        ", er läuft weg",
        "die Frau , die lügt läuft weg",
        "er  läuft weg",
    ],
)
def test_parsing_refuses_what_no_tree_spells(grammar: SynchronousGrammar, text: str) -> None:
    assert grammar.parse(text, "german") == []


def test_an_ambiguous_text_has_several_trees() -> None:
    rules = [
        Rule("Sentence", 1, {"de": "{a.de} {b.de}"}, {"a": "A", "b": "A"}),
        Rule("A", 1, {"de": "x"}),
        Rule("A", 1, {"de": "x x"}),
    ]
    assert len(SynchronousGrammar(rules).parse("x x x", "de")) == 2


def test_a_child_used_twice_is_the_same_tree_twice() -> None:
    rules = [
        Rule("Sentence", 1, {"de": "{a.de} und {a.de}"}, {"a": "A"}),
        Rule("A", 1, {"de": "x"}),
        Rule("A", 1, {"de": "y"}),
    ]
    grammar = SynchronousGrammar(rules)
    assert len(grammar.parse("x und x", "de")) == 1
    assert grammar.parse("x und y", "de") == []


def test_count_entropy_and_probabilities_agree_with_enumeration(
    grammar: SynchronousGrammar,
) -> None:
    trees = [tree for tree in grammar.trees() if tree.variant == 0]
    assert grammar.count() == len(trees)
    assert sum(tree.probability() for tree in trees) == pytest.approx(1)
    entropy = -sum(tree.probability() * math.log(tree.probability()) for tree in trees)
    assert grammar.entropy() == pytest.approx(entropy)


def test_a_probability_by_hand(grammar: SynchronousGrammar) -> None:
    (tree,) = grammar.parse("he runs away", "english")
    assert tree.probability() == pytest.approx(3 / 4 * 2 / 4 * 4 / 5)


@pytest.mark.parametrize("listed", [0, 4, 1000])
def test_samples_follow_the_probabilities(listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tx_lightning.data.synchronous_grammar._LISTED", listed)
    grammar = SynchronousGrammar(RULES)
    draw, n = random.Random(0).random, 20_000
    counts = Counter(grammar.sample(draw).text("german") for _ in range(n))
    expected: dict[str, float] = defaultdict(float)
    for tree in grammar.trees():
        expected[tree.text("german")] += tree.probability() / tree.free_variants()
    assert counts.keys() == expected.keys()
    # 14 degrees of freedom: beyond 36 once in a thousand.
    assert sum((counts[t] - n * p) ** 2 / (n * p) for t, p in expected.items()) < 36


def test_the_description_tells_grammars_apart(grammar: SynchronousGrammar) -> None:
    assert SynchronousGrammar(RULES).description == grammar.description
    heavier = [*RULES[:-1], Rule("Verb", 5, RULES[-1].fields)]
    other_word = [*RULES[:-1], Rule("Verb", 4, {**RULES[-1].fields, "en": "flees"})]
    for rules in (heavier, other_word):
        assert SynchronousGrammar(rules).description != grammar.description


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"de": "{she.de} tanzt"}, "{she.de} names no child"),
        ({"de": "tanzt"}, "must use every child, who"),
        ({"de": "{who.dat} tanzt"}, "a rule of Who has no field 'dat', only de, en"),
        ({"de": ("{who.de} a", "{who.de} b"), "en": ("{who.en}",) * 3}, "as many free variants"),
    ],
)
def test_a_template_that_cannot_be_spelled_is_refused(
    fields: dict[str, str | tuple[str, ...]], message: str
) -> None:
    who = [rule for rule in RULES if rule.symbol == "Who"]
    with pytest.raises(ValueError, match=rf"^rule of Sentence.*{re.escape(message)}.*$"):
        SynchronousGrammar([Rule("Sentence", 1, fields, {"who": "Who"}), *who])
