import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from tx_lightning.data import grammar
from tx_lightning.data.errors import DataError
from tx_lightning.data.grammar import Example, Grammar
from tx_lightning.data.grammar_lexicon import number_words
from tx_lightning.data.grammar_rules import rules
from tx_lightning.data.sources import ParallelSource
from tx_lightning.data.synchronous_grammar import Rule, SynchronousGrammar


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(Grammar(n_train=12_000).examples("train"))


# The source


def test_it_is_a_source_with_three_splits() -> None:
    source = Grammar(n_train=30, n_val=20, n_test=10)
    assert isinstance(source, ParallelSource)
    assert {s: len(list(source.pairs(s))) for s in source.splits()} == {
        "train": 30,
        "val": 20,
        "test": 10,
    }


def test_a_split_is_a_function_of_the_seed() -> None:
    first, again, other = (list(Grammar(n_val=200, seed=s).pairs("val")) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_sentences_of_seed_zero_do_not_change() -> None:
    # Results are compared across machines and years: new sentences need a new `_VERSION`.
    assert list(Grammar(n_test=2).pairs("test")) == [
        (
            "Vierundfünfzig Ärztinnen haben vier Männern geholfen.",
            "Fifty-four doctors helped four men.",
        ),
        (
            "Meinen Mann lacht das Mädchen, das diesen Ärztinnen nicht dankt, aus.",
            "The girl that does not thank these doctors laughs at my man.",
        ),
    ]


def test_a_smaller_split_is_the_beginning_of_a_larger_one() -> None:
    small, large = Grammar(n_train=50, n_val=3), Grammar(n_train=200)
    assert list(small.pairs("train")) == list(islice(large.pairs("train"), 50))


def test_splits_share_no_sentence_whatever_their_sizes_and_seeds() -> None:
    sides: dict[str, tuple[set[str], set[str]]] = {}
    for split in ("train", "val", "test"):
        sides[split] = (set(), set())
        for seed, size in ((0, 300), (1, 600)):
            source = Grammar(n_train=size, n_val=size, n_test=size, seed=seed)
            for german, english in source.pairs(split):
                sides[split][0].add(german)
                sides[split][1].add(english)
    for side in (0, 1):
        train, val, test = (sides[split][side] for split in ("train", "val", "test"))
        assert len(train) > 800
        assert not train & val
        assert not train & test
        assert not val & test


def test_directions_are_the_same_pairs_turned_around() -> None:
    forward = Grammar("de", "en", n_test=50).pairs("test")
    backward = Grammar("en", "de", n_test=50).pairs("test")
    assert [(english, german) for german, english in forward] == list(backward)


def test_the_fingerprint_changes_with_the_pairs() -> None:
    base = Grammar(n_train=10, n_val=10)
    assert base.fingerprint("train") == Grammar(n_train=10, n_val=11).fingerprint("train")
    others = [
        base.fingerprint("val"),
        Grammar(n_train=11).fingerprint("train"),
        Grammar(n_train=10, seed=1).fingerprint("train"),
        Grammar("en", "de", n_train=10).fingerprint("train"),
    ]
    assert len({base.fingerprint("train"), *others}) == 5
    assert re.fullmatch("[0-9a-f]{64}", base.fingerprint("train"))


def test_the_fingerprint_changes_with_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Grammar().fingerprint("train")
    fewer = [rule for rule in rules() if rule.fields.get("english") != "twenty-one"]
    monkeypatch.setattr(grammar, "language", lambda: SynchronousGrammar(fewer))
    assert Grammar().fingerprint("train") != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_train": 0}, "n_train is 0; it must be at least 1"),
        ({"n_test": -1}, "n_test is -1; it must be at least 1"),
        ({"source_language": "fr"}, "source_language is 'fr'; there are 'de' and 'en'"),
        ({"source_language": "en"}, "both languages are 'en'; name two"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError) as error:
        Grammar(**options)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(DataError, match=r"'valid'.*'val'"):
        list(Grammar().pairs("valid"))
    with pytest.raises(DataError, match=r"'valid'.*'val'"):
        Grammar().fingerprint("valid")


# The translation is unique


def test_a_sample_has_one_translation_and_one_reading(examples: list[Example]) -> None:
    translations: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        translations[example.german].add(example.english)
    assert all(len(english) == 1 for english in translations.values())
    for example in examples[:300]:
        (german,) = grammar.parse(example.german, "de")
        (english,) = grammar.parse(example.english, "en")
        assert german.probability() == english.probability() == example.tree.probability()
        assert grammar.translate(example.german) == example.english


def few_words() -> Iterator[Rule]:
    """The grammar without clauses inside clauses and with the words that look alike kept."""
    words = {
        "Noun.animate.m": ["boy"],
        "Noun.animate.f": ["woman"],
        "Noun.animate.n": ["girl"],
        "Noun.animate.pl": ["boys", "girls"],
        "Noun.thing.m": ["key"],
        "Noun.thing.f": ["flower"],
        "Noun.thing.n": ["book"],
        "Noun.thing.pl": ["keys"],
        "Verb.accusative": ["betray"],
        "Verb.dative": ["distrust"],
        "Verb.thing": ["accept"],
        "Verb.intransitive": ["run away"],
        "Verb.ditransitive": ["take"],
        "Number": ["two"],
        "Pronoun.acc": ["you"],
        "Pronoun.dat": ["her"],
        "Adverb.present": ["today"],
        "Adverb.perfect": ["today"],
        "Adverb.future": ["tomorrow"],
    }
    left_out = ("Reason", "Relative", "Adjective", "Any.")
    for rule in rules():
        english = rule.fields.get("base") or rule.fields["english"]
        if rule.symbol in words and english not in words[rule.symbol]:
            continue
        if rule.symbol.startswith("Definite") and str(english).startswith(("this", "these", "my")):
            continue
        if not any(s.startswith(left_out) for s in (rule.symbol, *rule.children.values())):
            yield rule


def test_every_sentence_of_a_smaller_language_has_one_reading() -> None:
    small = SynchronousGrammar(few_words())
    english_of: dict[str, str] = {}
    probability: dict[str, float] = {}
    for tree in small.trees():
        english = tree.text("english")
        assert english_of.setdefault(tree.text("german"), english) == english
        probability[english] = tree.probability()
    assert len(english_of) > len(probability) > 10_000  # some have an object first
    assert len(probability) == small.count()  # no two trees have the same English
    # The optimum of a language model, by brute force and from the rules.
    assert sum(probability.values()) == pytest.approx(1)
    entropy = -sum(p * math.log(p) for p in probability.values())
    assert small.entropy() == pytest.approx(entropy)


# The English side's optimum


def test_the_entropy_is_the_mean_log_loss(examples: list[Example]) -> None:
    losses = [-example.english_log_prob for example in examples]
    error = float(np.std(losses)) / math.sqrt(len(losses))
    assert abs(float(np.mean(losses)) - grammar.english_entropy()) < 4 * error
    assert error < 0.1


def test_the_log_prob_of_a_text_is_that_of_its_tree(examples: list[Example]) -> None:
    for example in examples[300:400]:
        assert grammar.english_log_prob(example.english) == example.english_log_prob


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "The man helps child.",
        "the man helps the child.",
        "The man helps the child",
        "The man help the child.",
        "The men helps the child.",
        "The man helps a old child.",
        "The man helps an child.",
        "The man helps the child tomorrow.",
        "The man will help the child yesterday.",
        "This men help the child.",
        "The man helped twenty-one child.",
    ],
)
def test_what_is_not_in_the_language_has_probability_zero(sentence: str) -> None:
    assert grammar.english_log_prob(sentence) == -math.inf


def test_the_optimum_perplexity_of_a_split() -> None:
    source = Grammar(n_val=20)
    losses = [-grammar.english_log_prob(english) for _, english in source.pairs("val")]
    assert source.optimum_log_loss("val") == pytest.approx(sum(losses))
    assert source.optimum_perplexity("val", 300) == pytest.approx(math.exp(sum(losses) / 300))


# German as it should be

NOUN_PHRASES = """
der alte Mann | den alten Mann | dem alten Mann | the old man
dieser Hund | diesen Hund | diesem Hund | this dog
mein kluger Junge | meinen klugen Jungen | meinem klugen Jungen | my clever boy
ein junger Junge | einen jungen Jungen | einem jungen Jungen | a young boy
die kleine Frau | die kleine Frau | der kleinen Frau | the small woman
diese Ärztin | diese Ärztin | dieser Ärztin | this doctor
meine alte Katze | meine alte Katze | meiner alten Katze | my old cat
eine alte Ärztin | eine alte Ärztin | einer alten Ärztin | an old doctor
das kluge Kind | das kluge Kind | dem klugen Kind | the clever child
dieses junge Mädchen | dieses junge Mädchen | diesem jungen Mädchen | this young girl
mein altes Pferd | mein altes Pferd | meinem alten Pferd | my old horse
ein Pferd | ein Pferd | einem Pferd | a horse
"""
PLURALS = """
die alten Männer | die alten Männer | den alten Männern | the old men
diese Jungen | diese Jungen | diesen Jungen | these boys
meine klugen Ärztinnen | meine klugen Ärztinnen | meinen klugen Ärztinnen | my clever doctors
zwei kleine Kinder | zwei kleine Kinder | zwei kleinen Kindern | two small children
elf Mädchen | elf Mädchen | elf Mädchen | eleven girls
keine alten Pferde | keine alten Pferde | keinen alten Pferden | no old horses
"""


@pytest.mark.parametrize("line", NOUN_PHRASES.strip().split("\n") + PLURALS.strip().split("\n"))
def test_noun_phrases_agree_in_gender_case_and_number(line: str) -> None:
    nominative, accusative, dative, english = (part.strip() for part in line.split("|"))
    plural = line in PLURALS
    lies, german = ("lie", "lügen") if plural else ("lies", "lügt")
    capital = nominative[0].upper() + nominative[1:]
    subject = f"{english[0].upper()}{english[1:]} {lies}."
    assert grammar.translate(f"{capital} {german}.") == subject
    assert grammar.translate(f"Er liebt {accusative}.") == f"He loves {english}."
    assert grammar.translate(f"Er hilft {dative}.") == f"He helps {english}."
    # A wrong form is no German, or means something else: "Er hilft meinen Jungen" helps boys.
    for wrong in {nominative, dative} - {accusative}:
        trees = grammar.parse(f"Er liebt {wrong}.", "de")
        assert f"he loves {english}" not in [tree.text("english") for tree in trees]
    for wrong in {nominative, accusative} - {dative}:
        trees = grammar.parse(f"Er hilft {wrong}.", "de")
        assert f"he helps {english}" not in [tree.text("english") for tree in trees]


TRANSLATIONS = """
verb second
Der Mann liebt heute die Frau. | The man loves the woman today.
Heute liebt der Mann die Frau. | Today the man loves the woman.
Sie lobt ihn. | She praises him.
Sie loben ihn. | They praise him.
Gestern haben wir dich gelobt. | Yesterday we praised you.
Er lobt mich jetzt nicht. | He does not praise me now.

a pronoun before the subject, but not before another pronoun
Heute liebt ihn keine Frau. | Today no woman loves him.
Heute liebt keine Frau ihn. | -
Heute lieben wir ihn. | Today we love him.
Heute lieben ihn wir. | -
Er lügt, weil ihr der Hund den Apfel wegnimmt. | He lies because the dog takes the apple from her.
Weil er dir hilft, dankt ihm die Frau nicht. | Because he helps you, the woman does not thank him.

an object first, told by its case
Den Mann liebt die Frau. | The woman loves the man.
Dem Kind hilft die Frau heute nicht. | The woman does not help the child today.
Der Frau hat das Kind geholfen. | The child helped the woman.
Den Jungen lobt das Kind. | The child praises the boy.
Den Jungen hilft das Kind. | The child helps the boys.
Der Katze stiehlt der Hund den Apfel. | The dog steals the apple from the cat.

perfect with the participle at the end
Das Kind hat gestern den roten Apfel gekauft. | The child bought the red apple yesterday.
Die Frauen sind angekommen. | The women arrived.
Er hat dem Kind letzte Woche das Buch geschenkt. | -
Er hat letzte Woche dem Kind das Buch geschenkt. | He gave the book to the child last week.
Er hat ihr das Bild nicht zurückgegeben. | He did not return the picture to her.
Der Hund ist gelogen. | -
Der Hund ist nicht weggelaufen. | The dog did not run away.

separable verbs
Der Mann lacht das kleine Mädchen an. | The man smiles at the small girl.
Der Mann lacht das kleine Mädchen aus. | The man laughs at the small girl.
Der Mann lacht das kleine Mädchen. | -
Die Ärztin lädt uns ein. | -
Die Ärztin lädt ihn ein. | The doctor invites him.
Die Hunde nehmen den Katzen keinen Apfel weg. | The dogs take no apple from the cats.
Wir haben den Brief weggeworfen. | We threw away the letter.

a future told by its adverb
Morgen kommt sie an. | Tomorrow she will arrive.
Nächste Woche stimmt er dem Mann nicht zu. | Next week he will not agree with the man.
Wir tanzen morgen. | We will dance tomorrow.

verb-final subordinate clauses
Er lügt, weil sie das Kind nicht auslacht. | He lies because she does not laugh at the child.
Weil der Hund den Mann geholfen hat, dankt er ihm. | -
Weil der Hund dem Mann geholfen hat, dankt er ihm. | Because the dog helped the man, he thanks him.
Obwohl sie weggelaufen ist, lieben wir die Katze. | Although she ran away, we love the cat.
Er lügt, während die Kinder morgen ankommen. | He lies while the children will arrive tomorrow.
Er lügt, weil sie tanzt das Kind. | -

relative clauses, commas absorbed
Der Mann, der den Hund nicht liebt, lügt. | The man that does not love the dog lies.
Der Mann, den die Frau liebt, lügt. | The man that the woman loves lies.
Die Frau, der mein Kind geholfen hat, lügt. | The woman that my child helped lies.
Das Kind, das lügt, lügt. | The child that lies lies.
Die Hunde, denen der Mann hilft, lügen. | The dogs that the man helps lie.
Heute lügt der Mann, der tanzt. | Today the man that dances lies.
Weil der Mann, der tanzt, lügt, läuft sie weg. | Because the man that dances lies, she runs away.
Dem Mann hilft sie, weil er lügt. | She helps the man because he lies.
Weil der Mann, der tanzt, lügt, lüge ich. | -

with a thing
Das Kind mit dem roten Apfel lügt. | The child with the red apple lies.
Dem Kind mit zwei alten Briefen hilft er. | He helps the child with two old letters.

negation
Der Hund liebt keine Katze. | The dog loves no cat.
Kein Hund liebt diese Katze. | No dog loves this cat.
Keine Hunde lieben diese Katze. | No dogs love this cat.
Kein Hund liebt keine Katze. | -
Der Hund liebt nicht diese Katze. | -
Der Hund schadet dieser Katze nicht. | The dog does not harm this cat.
"""
PAIRS = [line.split(" | ") for line in TRANSLATIONS.split("\n") if " | " in line]


@pytest.mark.parametrize(("german", "english"), PAIRS)
def test_word_order(german: str, english: str) -> None:
    if english == "-":
        assert grammar.parse(german, "de") == []
    else:
        assert grammar.translate(german) == english


def test_two_commas_are_one() -> None:
    german = "Dem Kind hilft die Frau, die tanzt, weil er lügt."
    english = "The woman that dances helps the child because he lies."
    assert grammar.translate(german) == english
    assert grammar.parse(german.replace("tanzt,", "tanzt"), "de") == []
    assert grammar.parse(german.replace("tanzt,", "tanzt,,"), "de") == []


def test_a_sentence_outside_the_language_cannot_be_translated() -> None:
    with pytest.raises(ValueError, match="is not a sentence of the embedded language in 'de'"):
        grammar.translate("Guten Tag.")


def test_every_word_is_used(examples: list[Example]) -> None:
    german, english = (
        {w.strip(".,") for e in examples for w in (e.german, e.english)[side].lower().split()}
        for side in (0, 1)
    )
    numbers = range(2, 100)
    assert {number_words(n)[0] for n in numbers} < german
    assert {number_words(n)[1] for n in numbers} < english
    assert 190 <= len(german) - len(numbers) <= 220
    assert 140 <= len(english) - len(numbers) <= 160


# Numbers


@pytest.mark.parametrize(
    ("n", "german", "english"),
    [
        (1, "eins", "one"),
        (7, "sieben", "seven"),
        (11, "elf", "eleven"),
        (12, "zwölf", "twelve"),
        (13, "dreizehn", "thirteen"),
        (16, "sechzehn", "sixteen"),
        (17, "siebzehn", "seventeen"),
        (20, "zwanzig", "twenty"),
        (21, "einundzwanzig", "twenty-one"),
        (30, "dreißig", "thirty"),
        (36, "sechsunddreißig", "thirty-six"),
        (40, "vierzig", "forty"),
        (60, "sechzig", "sixty"),
        (67, "siebenundsechzig", "sixty-seven"),
        (70, "siebzig", "seventy"),
        (77, "siebenundsiebzig", "seventy-seven"),
        (88, "achtundachtzig", "eighty-eight"),
        (91, "einundneunzig", "ninety-one"),
        (99, "neunundneunzig", "ninety-nine"),
    ],
)
def test_numbers_by_hand(n: int, german: str, english: str) -> None:
    assert number_words(n) == (german, english)


def test_numbers_are_composed_in_each_language_its_own_way() -> None:
    names = {n: number_words(n) for n in range(1, 100)}
    assert len(set(names.values())) == len({g for g, _ in names.values()}) == 99
    for n in range(21, 100):
        if n % 10:
            (ten_de, ten_en), (one_de, one_en) = names[n - n % 10], names[n % 10]
            one_de = "ein" if n % 10 == 1 else one_de
            assert names[n] == (f"{one_de}und{ten_de}", f"{ten_en}-{one_en}")


@pytest.mark.parametrize("n", [2, 10, 21, 66, 99])
def test_numbers_count_things(n: int) -> None:
    german, english = number_words(n)
    assert grammar.translate(f"Er kauft {german} Äpfel.") == f"He buys {english} apples."


@pytest.mark.parametrize("n", [0, 100, -1])
def test_numbers_beyond_two_digits_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 99"):
        number_words(n)


# Polarity


@pytest.mark.parametrize(
    ("english", "polarity"),
    [
        ("He loves the dog.", "positive"),
        ("He does not love the dog.", "negative"),
        ("He loves no dog.", "negative"),
        ("No man loves the dog.", "negative"),
        ("He hates the dog.", "negative"),
        ("He will not hate the dog tomorrow.", "positive"),
        ("No man hated the dog.", "positive"),
        ("He loves the dog because she does not hate him.", "positive"),
        ("He does not love the dog because she hates him.", "negative"),
        ("Because she does not hate him, he loves the dog.", "positive"),
        ("The man that does not love the dog helps her.", "positive"),
        ("The man that harms the dog laughs at him.", "negative"),
    ],
)
def test_polarity_is_that_of_the_main_clause(english: str, polarity: str) -> None:
    assert grammar.polarity(english) == polarity


def test_polarity_is_the_same_from_either_language(examples: list[Example]) -> None:
    for example in examples[400:500]:
        assert grammar.polarity(example.english) == example.polarity
        assert grammar.polarity(example.german, "de") == example.polarity
    with pytest.raises(ValueError, match="is not a sentence of the embedded language in 'en'"):
        grammar.polarity("He does.")


def test_the_same_words_in_another_order_have_another_polarity() -> None:
    one = "He loves the dog because she does not harm him."
    other = "She does not harm the dog because he loves him."
    third = "He harms the dog because she does not love him."
    fourth = "She does not love the dog because he harms him."
    assert Counter(third.lower().split()) == Counter(fourth.lower().split())
    assert grammar.polarity(third) == grammar.polarity(fourth) == "negative"
    assert Counter(one.lower().split()) == Counter(other.lower().split())
    assert grammar.polarity(one) == grammar.polarity(other) == "positive"


@pytest.mark.parametrize("side", ["german", "english"])
def test_no_word_tells_the_polarity(examples: list[Example], side: str) -> None:
    positive: dict[str, list[bool]] = defaultdict(list)
    for example in examples:
        text = example.german if side == "german" else example.english
        for word in set(re.findall(r"[\w-]+", text.lower())):
            positive[word].append(example.polarity == "positive")
    shares = {word: np.mean(labels) for word, labels in positive.items() if len(labels) > 150}
    assert len(shares) > 100
    assert 0.2 < min(shares.values()) < max(shares.values()) < 0.8


def test_a_bag_of_words_cannot_learn_the_polarity(examples: list[Example]) -> None:
    texts = [re.findall(r"[\w-]+", example.english.lower()) for example in examples]
    column = {word: i for i, word in enumerate(sorted({w for text in texts for w in text}))}
    counts = np.zeros((len(texts), len(column) + 1), dtype=np.float32)
    counts[:, -1] = 1
    for row, text in zip(counts, texts, strict=True):
        for word in text:
            row[column[word]] += 1
    labels = np.array([e.polarity == "positive" for e in examples], dtype=np.float32)
    weights = np.zeros(len(column) + 1, dtype=np.float32)
    train = slice(0, 9000)
    for _ in range(200):
        error = 1 / (1 + np.exp(-counts[train] @ weights)) - labels[train]
        weights -= 0.5 * (counts[train].T @ error / 9000 + 1e-4 * weights)
    accuracy = np.mean((counts[9000:] @ weights > 0) == (labels[9000:] > 0.5))
    assert 0.5 < accuracy < 0.8
