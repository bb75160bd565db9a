"""The rules of the embedded language, German and English side by side.

Noun phrases have gender, case and adjective endings; main clauses are verb-second, subordinate
clauses verb-final; verbs may be separable, stand in the perfect, govern the accusative or the
dative. Every clause has a positive or a negative verb, and a negation turns it around.

Two things keep the translation unique: a German sentence never has two readings, and an English
sentence has one tree. One English sentence may have two German ones, as German may put an object
first whose case shows on the article ("Dem Kind hilft die Frau").
"""

from collections.abc import Iterator
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
    children: dict[str, str]
    pronouns: str = ""  # stand before the adverb
    phrases: str = ""  # stand after it
    english: str = ""
    fronted: str = ""  # the object that may stand first, and then
    unfronted: str = ""  # the phrases without it
    negative: str = ""  # "nicht": the clause is negated by it; "no": an object is


# Shares of clauses without negation and of those negated by "nicht", by "kein" at the object and by
# "kein" at the subject. They are nearly equal for positive and negative in all, and no form of a
# verb gives the polarity away ("loves" never stands beside "not", but beside "no" it does).
_AFFIRMED, _NOT, _NO_OBJECT, _NO_SUBJECT = 6.0, 2.0, 1.5, 1.5


def _all_arguments() -> Iterator[_Arguments]:
    for negative, share in (("", _AFFIRMED), ("nicht", _NOT), ("no", _NO_OBJECT)):
        if negative != "no":
            yield _Arguments("Verb.intransitive", 1.5 * share, {}, negative=negative)
        yield from _one_object("Verb.accusative", 3 * share, "animate", "acc", negative)
        yield from _one_object("Verb.dative", 2.5 * share, "animate", "dat", negative)
        yield from _one_object("Verb.thing", 1.5 * share, "thing", "acc", negative)
        yield from _two_objects(1.5 * share, negative)


def _one_object(
    verb: str, share: float, kind: str, case: str, negative: str
) -> Iterator[_Arguments]:
    phrase, english = f"{{object.{case}}}", "{object.english}"
    if negative == "no":
        children = {"object": f"No.{kind}"}
        yield _Arguments(verb, share, children, "", phrase, english, negative="no")
        return
    if kind == "animate":
        children = {"object": f"Pronoun.{case}"}
        yield _Arguments(verb, 0.2 * share, children, phrase, "", english, negative=negative)
    children = {"object": f"Clear.{kind}.{case}"}
    yield _Arguments(
        verb, 0.4 * share, children, "", phrase, english, phrase, "", negative=negative
    )
    if case == "acc":
        children = {"object": f"Unclear.{kind}.{case}"}
        yield _Arguments(verb, 0.3 * share, children, "", phrase, english, negative=negative)
    if negative == "":
        children = {"object": f"Indefinite.{kind}"}
        yield _Arguments(verb, 0.2 * share, children, "", phrase, english)


def _two_objects(share: float, negative: str) -> Iterator[_Arguments]:
    verb = "Verb.ditransitive"
    english = "{object.english} {verb.preposition} {person.english}"
    if negative == "no":
        objects = {"No.thing": 1.0}
    elif negative == "nicht":
        objects = {"Definite.thing": 1.0}
    else:
        objects = {"Definite.thing": 0.6, "Indefinite.thing": 0.4}
    person, thing = "{person.dat}", "{object.acc}"
    for symbol, part in objects.items():
        children = {"person": "Pronoun.dat", "object": symbol}
        yield _Arguments(
            verb, 0.3 * part * share, children, person, thing, english, negative=negative
        )
        children = {"person": "Clear.animate.dat", "object": symbol}
        phrases = f"{person} {thing}"
        yield _Arguments(
            verb, 0.7 * part * share, children, "", phrases, english, person, thing, negative
        )


def _clauses() -> Iterator[Rule]:
    for arguments in _all_arguments():
        for number, share in (("sg", 2), ("pl", 1)):
            yield from _clauses_of(arguments, f"Subject.{number}", number, share)
            if arguments.negative == "":
                no = _NO_SUBJECT if arguments.children else _NO_SUBJECT + _NO_OBJECT
                yield from _clauses_of(
                    arguments, f"Nobody.{number}", number, share * no / _AFFIRMED
                )


def _clauses_of(arguments: _Arguments, subject: str, number: str, share: float) -> Iterator[Rule]:
    """The clauses with these arguments and this subject: every tense, with adverb and without."""
    nicht = "nicht" if arguments.negative == "nicht" else ""
    negated = arguments.negative != "" or subject.startswith("Nobody")
    for tense in ("present", "perfect", "future"):
        verb = _predicate(number, tense, negated=nicht != "")
        english = f"{{subject.english}} {verb.english} {arguments.english}"
        for adverb in ("", "{adverb.german}"):
            middle = f"{arguments.pronouns} {adverb} {arguments.phrases} {nicht}"
            first = f"{arguments.pronouns} {arguments.phrases} {nicht}"
            main = f"{{subject.nom}} {verb.finite} {middle} {verb.end}"
            fronted = (
                f"{arguments.fronted} {verb.finite} {{subject.nom}} {adverb} {arguments.unfronted} "
                f"{nicht} {verb.end}"
            )
            fields: dict[str, str | tuple[str, ...]] = {
                "main": (main, fronted) if arguments.fronted else main,
                "inverted": f"{verb.finite} {{subject.nom}} {middle} {verb.end}",
                "final": f"{{subject.nom}} {middle} {verb.final}",
                "english": english,
            }
            children = {"subject": subject, "verb": arguments.verb, **arguments.children}
            symbol = "Clause"
            if adverb:
                symbol = "TimedClause"
                children["adverb"] = f"Adverb.{tense}"
                fields["english"] = f"{english} {{adverb.english}}"
                fields["adverb_first"] = (
                    f"{adverb} {verb.finite} {{subject.nom}} {first} {verb.end}"
                )
                fields["english_adverb_first"] = f"{{adverb.english}} {english}"
            elif tense == "future":
                continue
            sign = -1 if negated else 1
            yield Rule(symbol, arguments.weight * share, fields, children, sign)


def _relative_clauses() -> Iterator[Rule]:
    """Fields german and english of Relative.<gender>: the pronoun agrees with its noun."""
    subjects = {"m": "der", "f": "die", "n": "das", "pl": "die"}
    clear_objects = {"m": {"acc": "den", "dat": "dem"}, "f": {"dat": "der"}, "n": {"dat": "dem"}}
    clear_objects["pl"] = {"dat": "denen"}
    verbs = {"acc": "Verb.accusative", "dat": "Verb.dative"}
    for gender in GENDERS:
        number = "pl" if gender == "pl" else "sg"
        for tense in ("present", "perfect"):
            for nicht in ("", "nicht"):
                verb = _predicate(number, tense, negated=nicht != "")
                yield Rule(
                    f"Relative.{gender}",
                    1,
                    {
                        "german": f"{subjects[gender]} {nicht} {verb.final}",
                        "english": f"that {verb.english}",
                    },
                    {"verb": "Verb.intransitive"},
                )
                for case, symbol in verbs.items():
                    yield Rule(
                        f"Relative.{gender}",
                        1,
                        {
                            "german": f"{subjects[gender]} {{object.{case}}} {nicht} {verb.final}",
                            "english": f"that {verb.english} {{object.english}}",
                        },
                        {"verb": symbol, "object": "Definite.animate"},
                    )
                verb = _predicate("sg", tense, negated=nicht != "")
                for case, pronoun in clear_objects[gender].items():
                    yield Rule(
                        f"Relative.{gender}",
                        1,
                        {
                            "german": f"{pronoun} {{subject.nom}} {nicht} {verb.final}",
                            "english": f"that {{subject.english}} {verb.english}",
                        },
                        {"verb": verbs[case], "subject": "Definite.animate.sg"},
                    )


# Noun phrases


def _subjects() -> Iterator[Rule]:
    """Fields nom and english of Subject.sg, Subject.pl, Nobody.sg, Nobody.pl."""
    for number in ("sg", "pl"):
        plain = {"nom": "{phrase.nom}", "english": "{phrase.english}"}
        symbol = f"Subject.{number}"
        yield Rule(symbol, 6, plain, {"phrase": f"Definite.animate.{number}"})
        yield Rule(symbol, 2, plain, {"phrase": f"Indefinite.animate.{number}"})
        yield Rule(f"Nobody.{number}", 1, plain, {"phrase": f"No.animate.{number}"})
        yield _with_thing(symbol, 1, f"Definite.animate.{number}", ("nom",))
        for gender in GENDERS if number == "sg" else ("pl",):
            if gender == "pl" and number == "sg":
                continue
            yield Rule(
                symbol,
                1 / 3 if number == "sg" else 1,
                {
                    "nom": "{phrase.nom} , {relative.german} ,",
                    "english": "{phrase.english} {relative.english}",
                },
                {"phrase": f"Definite.animate.{gender}", "relative": f"Relative.{gender}"},
            )
        for words in SUBJECT_PRONOUNS[number]:
            german, english = words.split()
            yield Rule(symbol, 1, {"nom": german, "english": english})


def _with_thing(symbol: str, weight: float, phrase: str, cases: tuple[str, ...]) -> Rule:
    """A noun phrase followed by "mit" and a thing."""
    fields = {case: f"{{phrase.{case}}} mit {{thing.dat}}" for case in cases}
    fields["english"] = "{phrase.english} with {thing.english}"
    return Rule(symbol, weight, fields, {"phrase": phrase, "thing": "Any.thing"})


def _objects() -> Iterator[Rule]:
    for case, pronouns in OBJECT_PRONOUNS.items():
        for words in pronouns:
            german, english = words.split()
            yield Rule(f"Pronoun.{case}", 1, {case: german, "english": english})
    # Only an object whose article shows its case may stand first: the masculine accusative, and
    # every dative.
    for kind in NOUNS:
        for gender in GENDERS:
            phrase, weight = f"Definite.{kind}.{gender}", _share(kind, gender)
            acc = f"Clear.{kind}.acc" if gender == "m" else f"Unclear.{kind}.acc"
            for symbol, case in ((acc, "acc"), (f"Clear.{kind}.dat", "dat")):
                fields = {case: f"{{phrase.{case}}}", "english": "{phrase.english}"}
                yield Rule(symbol, 6 * weight, fields, {"phrase": phrase})
                if kind == "animate":
                    yield _with_thing(symbol, weight, phrase, (case,))


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
        yield Rule("Any." + kind, 2, same, {"phrase": f"Definite.{kind}"})
        yield Rule("Any." + kind, 1, same, {"phrase": f"Indefinite.{kind}"})


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
