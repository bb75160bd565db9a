"""The rules of the embedded language, German and English side by side.

Noun phrases have gender, case and adjective endings; main clauses are verb-second, subordinate
clauses verb-final; verbs may be separable, stand in the perfect, govern the accusative or the
dative. Every clause has a positive or a negative verb, and a negation turns it around.

Two things keep the translation unique: a German sentence never has two readings, and an English
sentence has one tree. One English sentence may have two German ones, as German may put an object
first whose case shows on the article ("Dem Kind hilft die Frau").
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from tx_lightning.data.grammar_lexicon import (
    ADJECTIVES,
    ADVERBS,
    AUXILIARIES,
    CASES,
    CONJUNCTIONS,
    DETERMINATION,
    DETERMINERS,
    GENDERS,
    NOUNS,
    OBJECT_PRONOUNS,
    STRONG,
    SUBJECT_PRONOUNS,
    VERBS,
    number_words,
)
from tx_lightning.data.synchronous_grammar import Rule

CASES_AND_ENGLISH = (*CASES, "english")


def rules() -> list[Rule]:
    """All rules; the symbol of a sentence is "Sentence", its fields are german and english."""
    return [
        *_sentences(),
        *_clauses(),
        *_relative_clauses(),
        *_subjects(),
        *_objects(),
        *_noun_phrases(),
        *_words(),
    ]


# Sentences and clauses


def _sentences() -> Iterator[Rule]:
    verb_second = {"german": "{clause.main}", "english": "{clause.english}"}
    yield Rule("Sentence", 4, verb_second, {"clause": "Clause"})
    yield Rule("Sentence", 2, verb_second, {"clause": "TimedClause"})
    yield Rule(
        "Sentence",
        2,
        {"german": "{clause.adverb_first}", "english": "{clause.english_adverb_first}"},
        {"clause": "TimedClause"},
    )
    yield Rule(
        "Sentence",
        1.2,
        {
            "german": "{clause.main} , {reason.german}",
            "english": "{clause.english} {reason.english}",
        },
        {"clause": "AnyClause", "reason": "Reason"},
    )
    yield Rule(
        "Sentence",
        0.8,
        {
            "german": "{reason.german} , {clause.inverted}",
            "english": "{reason.english} , {clause.english}",
        },
        {"clause": "AnyClause", "reason": "Reason"},
    )
    for words in CONJUNCTIONS:
        german, english = words.split()
        yield Rule(
            "Reason",
            1,
            {"german": f"{german} {{clause.final}}", "english": f"{english} {{clause.english}}"},
            {"clause": "AnyClause"},
        )
    for symbol, weight in (("Clause", 2), ("TimedClause", 1)):
        fields = {f: f"{{clause.{f}}}" for f in ("main", "inverted", "final", "english")}
        yield Rule("AnyClause", weight, fields, {"clause": symbol})


class _Predicate(NamedTuple):
    """The verb of a clause in one tense: templates for its parts and for English."""

    finite: str  # in second position
    end: str  # what stands at the end of a main clause
    final: str  # the whole at the end of a subordinate clause
    english: str


def _predicate(number: str, tense: str, negated: bool) -> _Predicate:
    """Present tense, perfect, or "future": a German present, told by the adverb."""
    does = "does" if number == "sg" else "do"
    english = {
        "present": f"{does} not {{verb.base}}" if negated else f"{{verb.english_{number}}}",
        "perfect": "did not {verb.base}" if negated else "{verb.past}",
        "future": "will not {verb.base}" if negated else "will {verb.base}",
    }[tense]
    if tense == "perfect":
        auxiliary = f"{{verb.auxiliary_{number}}}"
        return _Predicate(
            auxiliary, "{verb.participle}", f"{{verb.participle}} {auxiliary}", english
        )
    return _Predicate(f"{{verb.{number}}}", "{verb.prefix}", f"{{verb.final_{number}}}", english)


class _Arguments(NamedTuple):
    """What a verb takes beside its subject."""

    verb: str  # symbol of the verb
    weight: float
    negative: str  # "nicht": the clause is negated by it; "kein": an object is; or ""
    children: dict[str, str]
    english: str = ""
    pronouns: str = ""  # stand before the adverb
    phrases: str = ""  # stand after it
    fronted: str = ""  # the object that may stand first; the other phrases are then the rest
    rest: str = ""


# Shares of clauses without negation and of those negated by "nicht", by "kein" at the object and by
# "kein" at the subject. Nearly half are negated, and no form of a verb gives the polarity away:
# "loves" never stands beside "not", but it does beside "no".
_AFFIRMED, _NICHT, _NO_OBJECT, _NO_SUBJECT = 6.0, 2.0, 1.5, 1.5

# The share of pronouns among the subjects without "kein".
_PERSONAL = 1 / 6


def _all_arguments() -> Iterator[_Arguments]:
    for negative, share in (("", _AFFIRMED), ("nicht", _NICHT), ("kein", _NO_OBJECT)):
        if negative != "kein":
            yield _Arguments("Verb.intransitive", 1.5 * share, negative, {})
        yield from _one_object("Verb.accusative", 3 * share, negative, "animate", "acc")
        yield from _one_object("Verb.dative", 2.5 * share, negative, "animate", "dat")
        yield from _one_object("Verb.thing", 1.5 * share, negative, "thing", "acc")
        yield from _two_objects(1.5 * share, negative)


def _one_object(
    verb: str, share: float, negative: str, kind: str, case: str
) -> Iterator[_Arguments]:
    phrase = f"{{object.{case}}}"
    objects: dict[str, float] = {f"Clear.{kind}.{case}": 3}
    if case == "acc":
        objects[f"Unclear.{kind}.{case}"] = 3
    if kind == "animate":
        objects[f"Pronoun.{case}"] = 2
    if negative == "":
        objects[f"Indefinite.{kind}"] = 2
    if negative == "kein":
        objects = {f"No.{kind}": 1}
    for symbol, weight in objects.items():
        is_pronoun = symbol.startswith("Pronoun")
        yield _Arguments(
            verb,
            share * weight / sum(objects.values()),
            negative,
            {"object": symbol},
            english="{object.english}",
            pronouns=phrase if is_pronoun else "",
            phrases="" if is_pronoun else phrase,
            fronted=phrase if symbol.startswith("Clear") else "",
        )


def _two_objects(share: float, negative: str) -> Iterator[_Arguments]:
    things = {
        "": {"Definite.thing": 0.6, "Indefinite.thing": 0.4},
        "nicht": {"Definite.thing": 1.0},
        "kein": {"No.thing": 1.0},
    }[negative]
    english = "{thing.english} {verb.preposition} {person.english}"
    for symbol, weight in things.items():
        yield _Arguments(
            "Verb.ditransitive",
            0.3 * share * weight,
            negative,
            {"person": "Pronoun.dat", "thing": symbol},
            english=english,
            pronouns="{person.dat}",
            phrases="{thing.acc}",
        )
        yield _Arguments(
            "Verb.ditransitive",
            0.7 * share * weight,
            negative,
            {"person": "Clear.animate.dat", "thing": symbol},
            english=english,
            phrases="{person.dat} {thing.acc}",
            fronted="{person.dat}",
            rest="{thing.acc}",
        )


def _clauses() -> Iterator[Rule]:
    for arguments, (number, share) in product(_all_arguments(), (("sg", 2), ("pl", 1))):
        subjects = {"Subject": 1.0}
        if arguments.pronouns:  # they stand before a noun phrase, but after another pronoun
            subjects = {"Phrase": 1 - _PERSONAL, "Personal": _PERSONAL}
        if arguments.negative == "":
            no_subject = _NO_SUBJECT if arguments.children else _NO_SUBJECT + _NO_OBJECT
            subjects["Nobody"] = no_subject / _AFFIRMED
        for subject, part in subjects.items():
            weight = arguments.weight * share * part
            yield from _clauses_of(arguments, f"{subject}.{number}", number, weight)


def _clauses_of(arguments: _Arguments, subject: str, number: str, weight: float) -> Iterator[Rule]:
    """The clauses with these arguments and this subject: every tense, with adverb and without.

    Fields: main (verb second), inverted (verb first, after a clause), final (verb last), english;
    with an adverb also adverb_first and english_adverb_first.
    """
    nicht = "nicht" if arguments.negative == "nicht" else ""
    sign = -1 if arguments.negative or subject.startswith("Nobody") else 1
    children = {"subject": subject, "verb": arguments.verb, **arguments.children}
    for tense in ("present", "perfect", "future"):
        verb = _predicate(number, tense, negated=nicht != "")
        english = f"{{subject.english}} {verb.english} {arguments.english}"
        if tense != "future":
            fields = _orders(arguments, subject, verb, nicht, "") | {"english": english}
            yield Rule("Clause", weight, fields, children, sign)
        without = _orders(arguments, subject, verb, nicht, "")["inverted"]
        fields = _orders(arguments, subject, verb, nicht, "{adverb.german}") | {
            "adverb_first": f"{{adverb.german}} {without}",
            "english": f"{english} {{adverb.english}}",
            "english_adverb_first": f"{{adverb.english}} {english}",
        }
        timed = {**children, "adverb": f"Adverb.{tense}"}
        yield Rule("TimedClause", weight, fields, timed, sign)


def _orders(
    arguments: _Arguments, subject: str, verb: _Predicate, nicht: str, adverb: str
) -> dict[str, str | tuple[str, ...]]:
    """The German word orders of a clause."""
    who, pronouns = "{subject.nom}", arguments.pronouns
    light = f"{who} {pronouns}" if subject.startswith("Personal") else f"{pronouns} {who}"
    heavy = f"{adverb} {arguments.phrases} {nicht}"
    main = f"{who} {verb.finite} {pronouns} {heavy} {verb.end}"
    object_first = (
        f"{arguments.fronted} {verb.finite} {who} {adverb} {arguments.rest} {nicht} {verb.end}"
    )
    return {
        "main": (main, object_first) if arguments.fronted else main,
        "inverted": f"{verb.finite} {light} {heavy} {verb.end}",
        "final": f"{light} {heavy} {verb.final}",
    }


# The relative pronoun of each gender as the subject, and as an object where its form shows that it
# is one.
_RELATIVE = {
    "m": {"nom": "der", "acc": "den", "dat": "dem"},
    "f": {"nom": "die", "dat": "der"},
    "n": {"nom": "das", "dat": "dem"},
    "pl": {"nom": "die", "dat": "denen"},
}


def _relative_clauses() -> Iterator[Rule]:
    """Fields german and english of Relative.<gender>: the pronoun agrees with its noun."""
    for gender, tense, nicht in product(GENDERS, ("present", "perfect"), ("", "nicht")):
        symbol, pronoun = f"Relative.{gender}", _RELATIVE[gender]
        verb = _predicate("pl" if gender == "pl" else "sg", tense, negated=nicht != "")
        yield Rule(
            symbol,
            1,
            {"german": f"{pronoun['nom']} {nicht} {verb.final}", "english": f"that {verb.english}"},
            {"verb": "Verb.intransitive"},
        )
        for case, verb_symbol in (("acc", "Verb.accusative"), ("dat", "Verb.dative")):
            yield Rule(
                symbol,
                1,
                {
                    "german": f"{pronoun['nom']} {{object.{case}}} {nicht} {verb.final}",
                    "english": f"that {verb.english} {{object.english}}",
                },
                {"verb": verb_symbol, "object": "Definite.animate"},
            )
            if case in pronoun:
                inner = _predicate("sg", tense, negated=nicht != "")
                yield Rule(
                    symbol,
                    1,
                    {
                        "german": f"{pronoun[case]} {{subject.nom}} {nicht} {inner.final}",
                        "english": f"that {{subject.english}} {inner.english}",
                    },
                    {"verb": verb_symbol, "subject": "Definite.animate.sg"},
                )


# Noun phrases


def _subjects() -> Iterator[Rule]:
    """Fields nom and english of Subject.<number>, which is a Phrase or Personal, and of Nobody."""
    plain = {"nom": "{phrase.nom}", "english": "{phrase.english}"}
    with_relative = {
        "nom": "{phrase.nom} , {relative.german} ,",
        "english": "{phrase.english} {relative.english}",
    }
    for number, genders in (("sg", ("m", "f", "n")), ("pl", ("pl",))):
        yield Rule(f"Subject.{number}", 1 - _PERSONAL, plain, {"phrase": f"Phrase.{number}"})
        yield Rule(f"Subject.{number}", _PERSONAL, plain, {"phrase": f"Personal.{number}"})
        symbol, definite = f"Phrase.{number}", f"Definite.animate.{number}"
        yield Rule(symbol, 6, plain, {"phrase": definite})
        yield Rule(symbol, 2, plain, {"phrase": f"Indefinite.animate.{number}"})
        yield _with_thing(symbol, 1, definite, "nom")
        for gender in genders:
            children = {"phrase": f"Definite.animate.{gender}", "relative": f"Relative.{gender}"}
            yield Rule(symbol, 1 / len(genders), with_relative, children)
        for words in SUBJECT_PRONOUNS[number]:
            german, english = words.split()
            yield Rule(f"Personal.{number}", 1, {"nom": german, "english": english})
        yield Rule(f"Nobody.{number}", 1, plain, {"phrase": f"No.animate.{number}"})


def _with_thing(symbol: str, weight: float, phrase: str, case: str) -> Rule:
    """A noun phrase followed by "mit" and a thing."""
    fields = {
        case: f"{{phrase.{case}}} mit {{thing.dat}}",
        "english": "{phrase.english} with {thing.english}",
    }
    return Rule(symbol, weight, fields, {"phrase": phrase, "thing": "Any.thing"})


def _objects() -> Iterator[Rule]:
    """Field <case> and english of Pronoun.<case> and of <Clear, Unclear>.<kind>.<case>.

    Only an object whose article shows its case may stand first: the masculine accusative, and
    every dative. These are the clear ones.
    """
    for case, pronouns in OBJECT_PRONOUNS.items():
        for words in pronouns:
            german, english = words.split()
            yield Rule(f"Pronoun.{case}", 1, {case: german, "english": english})
    for kind, case, gender in product(NOUNS, ("acc", "dat"), GENDERS):
        clear = case == "dat" or gender == "m"
        symbol = f"{'Clear' if clear else 'Unclear'}.{kind}.{case}"
        phrase, weight = f"Definite.{kind}.{gender}", _share(kind, gender)
        fields = {case: f"{{phrase.{case}}}", "english": "{phrase.english}"}
        yield Rule(symbol, 6 * weight, fields, {"phrase": phrase})
        if kind == "animate":
            yield _with_thing(symbol, weight, phrase, case)


def _noun_phrases() -> Iterator[Rule]:
    """<Determination>.<kind>.<m, f, n, sg, pl>, and of either number <Determination>.<kind>."""
    same = {field: f"{{phrase.{field}}}" for field in CASES_AND_ENGLISH}
    for kind in NOUNS:
        for determination, determiners in DETERMINATION.items():
            symbol = f"{determination}.{kind}"
            yield Rule(symbol, 2, same, {"phrase": f"{symbol}.sg"})
            yield Rule(symbol, 1, same, {"phrase": f"{symbol}.pl"})
            for gender in GENDERS:
                if gender != "pl":
                    weight = _share(kind, gender)
                    yield Rule(f"{symbol}.sg", weight, same, {"phrase": f"{symbol}.{gender}"})
                for weight, english, endings in determiners:
                    if gender in DETERMINERS[english]:
                        german = DETERMINERS[english][gender].split()
                        yield from _determined(
                            f"{symbol}.{gender}", weight, german, english, endings[gender]
                        )
        number = {"number": "Number"}
        symbol, german = f"Indefinite.{kind}.pl", ["{number.german}"] * 3
        yield from _determined(symbol, 1, german, "{number.english}", STRONG["pl"], number)
        yield Rule(f"Any.{kind}", 2, same, {"phrase": f"Definite.{kind}"})
        yield Rule(f"Any.{kind}", 1, same, {"phrase": f"Indefinite.{kind}"})


def _determined(
    symbol: str,
    weight: float,
    german: list[str],
    english: str,
    endings: str,
    children: dict[str, str] | None = None,
) -> Iterator[Rule]:
    """A noun after these determiners (nominative, accusative, dative), with an adjective or not."""
    _, kind, gender = symbol.split(".")
    forms = list(zip(CASES, german, endings.split(), strict=True))
    children = {**(children or {}), "noun": f"Noun.{kind}.{gender}"}
    yield Rule(
        symbol,
        2 * weight,
        {
            **{case: f"{determiner} {{noun.{case}}}" for case, determiner, _ in forms},
            "english": f"{english} {{noun.english}}",
        },
        children,
    )
    yield Rule(
        symbol,
        weight,
        {
            **{
                case: f"{determiner} {{adjective.{ending}}} {{noun.{case}}}"
                for case, determiner, ending in forms
            },
            "english": f"{english} {{adjective.english}} {{noun.english}}",
        },
        {**children, "adjective": f"Adjective.{kind}"},
    )


def _share(kind: str, gender: str) -> float:
    """The weight of a gender, so that every noun is equally likely; half of that in the plural."""
    nouns = NOUNS[kind]
    return len(nouns[gender]) if gender != "pl" else sum(map(len, nouns.values())) / 2


# Words


def _words() -> Iterator[Rule]:
    for kind, genders in NOUNS.items():
        for gender, nouns in genders.items():
            for noun in nouns:
                yield from _noun(kind, gender, *noun.split())
    for kind, adjectives in ADJECTIVES.items():
        for words in adjectives:
            stem, english = words.split()
            forms = {ending: stem + ending for ending in ("e", "er", "es", "en")}
            yield Rule(f"Adjective.{kind}", 1, {**forms, "english": english})
    for frame, verbs in VERBS.items():
        for verb in verbs:
            yield _verb(f"Verb.{frame}", verb)
    for tense, adverbs in ADVERBS.items():
        for words in adverbs:
            german, english = (word.replace("_", " ") for word in words.split())
            yield Rule(f"Adverb.{tense}", 1, {"german": german, "english": english})
    for n in range(2, 100):
        german, english = number_words(n)
        yield Rule("Number", 1, {"german": german, "english": english})


def _noun(
    kind: str, gender: str, german: str, plural: str, dative_plural: str, english: str, many: str
) -> Iterator[Rule]:
    nominative, _, oblique = german.partition("/")
    oblique = oblique or nominative
    yield Rule(
        f"Noun.{kind}.{gender}",
        1,
        {"nom": nominative, "acc": oblique, "dat": oblique, "english": english},
    )
    yield Rule(
        f"Noun.{kind}.pl", 1, {"nom": plural, "acc": plural, "dat": dative_plural, "english": many}
    )


def _verb(symbol: str, words: str) -> Rule:
    sign, infinitive, third, participle, auxiliary, base, present, past, *preposition = (
        word.replace("_", " ") for word in words.split()
    )
    prefix, _, plural = infinitive.rpartition("|")
    has, have = AUXILIARIES[auxiliary]
    return Rule(
        symbol,
        1,
        {
            "sg": third,
            "pl": plural,
            "prefix": prefix,
            "final_sg": prefix + third,
            "final_pl": prefix + plural,
            "participle": participle,
            "auxiliary_sg": has,
            "auxiliary_pl": have,
            "base": base,
            "english_sg": present,
            "english_pl": base,
            "past": past,
            "preposition": " ".join(preposition),
        },
        sign=1 if sign == "+" else -1,
    )
