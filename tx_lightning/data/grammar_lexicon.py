"""The words of the embedded language: about 200 German and 150 English ones, and the numbers."""

GENDERS = ("m", "f", "n", "pl")
CASES = ("nom", "acc", "dat")

# German singular | plural | dative plural | English singular | plural.
# "Jungen" is weak: the form of the singular's accusative and dative follows the nominative.
NOUNS = {
    "animate": {
        "m": [
            "Mann Männer Männern man men",
            "Hund Hunde Hunden dog dogs",
            "Junge/Jungen Jungen Jungen boy boys",
        ],
        "f": [
            "Frau Frauen Frauen woman women",
            "Katze Katzen Katzen cat cats",
            "Ärztin Ärztinnen Ärztinnen doctor doctors",
        ],
        "n": [
            "Kind Kinder Kindern child children",
            "Mädchen Mädchen Mädchen girl girls",
            "Pferd Pferde Pferden horse horses",
        ],
    },
    "thing": {
        "m": [
            "Brief Briefe Briefen letter letters",
            "Apfel Äpfel Äpfeln apple apples",
            "Schlüssel Schlüssel Schlüsseln key keys",
        ],
        "f": [
            "Blume Blumen Blumen flower flowers",
            "Zeitung Zeitungen Zeitungen newspaper newspapers",
        ],
        "n": [
            "Buch Bücher Büchern book books",
            "Bild Bilder Bildern picture pictures",
        ],
    },
}

ADJECTIVES = {
    "animate": ["alt old", "klein small", "jung young", "klug clever"],
    "thing": ["alt old", "klein small", "rot red", "neu new"],
}

# Nominative, accusative and dative of each determiner by gender.
DETERMINERS = {
    "the": {"m": "der den dem", "f": "die die der", "n": "das das dem", "pl": "die die den"},
    "this": {"m": "dieser diesen diesem", "f": "diese diese dieser", "n": "dieses dieses diesem"},
    "these": {"pl": "diese diese diesen"},
    "a": {"m": "ein einen einem", "f": "eine eine einer", "n": "ein ein einem"},
    "my": {
        "m": "mein meinen meinem",
        "f": "meine meine meiner",
        "n": "mein mein meinem",
        "pl": "meine meine meinen",
    },
    "no": {
        "m": "kein keinen keinem",
        "f": "keine keine keiner",
        "n": "kein kein keinem",
        "pl": "keine keine keinen",
    },
}

# Adjective endings in the nominative, accusative and dative: after der-words, after ein-words, and
# after a number, which has no ending of its own.
WEAK = {"m": "e en en", "f": "e e en", "n": "e e en", "pl": "en en en"}
MIXED = {"m": "er en en", "f": "e e en", "n": "es es en", "pl": "en en en"}
STRONG = {"pl": "e e en"}

# The determiners of a kind of noun phrase with weight and endings.
DETERMINATION = {
    "Definite": [
        (3, "the", WEAK),
        (1, "this", WEAK),
        (1, "these", WEAK),
        (1, "my", MIXED),
    ],
    "Indefinite": [(1, "a", MIXED)],
    "No": [(1, "no", MIXED)],
}

SUBJECT_PRONOUNS = {"sg": ["er he", "sie she"], "pl": ["wir we", "sie they"]}
# "sie" (her, them) is left out of the accusative: it would have two translations.
OBJECT_PRONOUNS = {
    "acc": ["mich me", "dich you", "ihn him"],
    "dat": ["mir me", "dir you", "ihm him", "ihr her", "ihnen them"],
}

# sign prefix|infinitive third-person participle auxiliary | English: base third-person past.
# "_" stands for a blank.
VERBS = {
    "accusative": [
        "+ loben lobt gelobt haben praise praises praised",
        "+ lieben liebt geliebt haben love loves loved",
        "+ an|lachen lacht angelacht haben smile_at smiles_at smiled_at",
        "+ ein|laden lädt eingeladen haben invite invites invited",
        "- hassen hasst gehasst haben hate hates hated",
        "- aus|lachen lacht ausgelacht haben laugh_at laughs_at laughed_at",
        "- an|schreien schreit angeschrien haben shout_at shouts_at shouted_at",
        "- verraten verrät verraten haben betray betrays betrayed",
    ],
    "dative": [
        "+ helfen hilft geholfen haben help helps helped",
        "+ danken dankt gedankt haben thank thanks thanked",
        "+ zu|stimmen stimmt zugestimmt haben agree_with agrees_with agreed_with",
        "- schaden schadet geschadet haben harm harms harmed",
        "- misstrauen misstraut misstraut haben distrust distrusts distrusted",
        "- widersprechen widerspricht widersprochen haben contradict contradicts contradicted",
    ],
    "thing": [
        "+ kaufen kauft gekauft haben buy buys bought",
        "+ an|nehmen nimmt angenommen haben accept accepts accepted",
        "- verlieren verliert verloren haben lose loses lost",
        "- weg|werfen wirft weggeworfen haben throw_away throws_away threw_away",
    ],
    "intransitive": [
        "+ tanzen tanzt getanzt haben dance dances danced",
        "+ an|kommen kommt angekommen sein arrive arrives arrived",
        "- lügen lügt gelogen haben lie lies lied",
        "- weg|laufen läuft weggelaufen sein run_away runs_away ran_away",
    ],
    "ditransitive": [
        "+ schenken schenkt geschenkt haben give gives gave to",
        "+ zurück|geben gibt zurückgegeben haben return returns returned to",
        "- stehlen stiehlt gestohlen haben steal steals stole from",
        "- weg|nehmen nimmt weggenommen haben take takes took from",
    ],
}
AUXILIARIES = {"haben": ("hat", "haben"), "sein": ("ist", "sind")}

# German present tense with a future adverb is an English future; the German perfect is a past.
ADVERBS = {
    "present": ["heute today", "jetzt now"],
    "perfect": ["heute today", "gestern yesterday", "letzte_Woche last_week"],
    "future": ["morgen tomorrow", "nächste_Woche next_week"],
}

CONJUNCTIONS = ["weil because", "obwohl although", "während while"]


_SMALL = (
    "eins one|zwei two|drei three|vier four|fünf five|sechs six|sieben seven|acht eight|neun nine|"
    "zehn ten|elf eleven|zwölf twelve|dreizehn thirteen|vierzehn fourteen|fünfzehn fifteen|"
    "sechzehn sixteen|siebzehn seventeen|achtzehn eighteen|neunzehn nineteen"
).split("|")
_TENS = (
    "zwanzig twenty|dreißig thirty|vierzig forty|fünfzig fifty|sechzig sixty|siebzig seventy|"
    "achtzig eighty|neunzig ninety"
).split("|")


def number_words(n: int) -> tuple[str, str]:
    """German and English for 1 to 99: 21 is ("einundzwanzig", "twenty-one")."""
    if not 1 <= n <= 99:
        raise ValueError(f"number_words: n is {n}; it must be from 1 to 99")
    tens, units = divmod(n, 10)
    if n < 20 or units == 0:
        german, english = (_SMALL[n - 1] if n < 20 else _TENS[tens - 2]).split()
        return german, english
    german_tens, english_tens = _TENS[tens - 2].split()
    german_units, english_units = _SMALL[units - 1].split()
    if units == 1:
        german_units = "ein"
    return f"{german_units}und{german_tens}", f"{english_tens}-{english_units}"
