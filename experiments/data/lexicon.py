"""The words of the generated grammar: 110 types of English and 155 of a German with its own order.

Every English word has one German lemma, so that a sentence has one correct translation; the
form of a determiner, adjective or relative pronoun follows the gender of its noun.
"""

from __future__ import annotations

from typing import NamedTuple

MASCULINE, FEMININE, NEUTER = range(3)


class Noun(NamedTuple):
    """A word with a gender of its own."""

    english: str
    german: str
    gender: int


class Agreeing(NamedTuple):
    """A word with one German form for each gender."""

    english: str
    forms: tuple[str, str, str]


class Verb(NamedTuple):
    """Third person and base form in English, finite form and infinitive in German."""

    english: str
    base: str
    german: str
    infinitive: str


class Particle(NamedTuple):
    """A word that never changes its form."""

    english: str
    german: str


def _nouns(masculine: str, feminine: str, neuter: str) -> tuple[Noun, ...]:
    return tuple(
        Noun(english, german, gender)
        for gender, entries in enumerate((masculine, feminine, neuter))
        for english, german in (entry.split("/") for entry in entries.split())
    )


def _agreeing(entries: str, endings: tuple[str, str, str]) -> tuple[Agreeing, ...]:
    words = (entry.split("/") for entry in entries.split())
    return tuple(
        Agreeing(english, (stem + endings[0], stem + endings[1], stem + endings[2]))
        for english, stem in words
    )


def _verbs(entries: str) -> tuple[Verb, ...]:
    return tuple(Verb(*entry.split("/")) for entry in entries.split())


def _particles(entries: str) -> tuple[Particle, ...]:
    return tuple(Particle(*entry.split("/")) for entry in entries.split())


BEINGS = _nouns(
    "man/Mann boy/Junge teacher/Lehrer king/König dog/Hund",
    "woman/Frau nurse/Pflegerin queen/Königin cat/Katze mouse/Maus",
    "child/Kind girl/Mädchen horse/Pferd sheep/Schaf pig/Schwein",
)
THINGS = _nouns(
    "table/Tisch chair/Stuhl tree/Baum garden/Garten letter/Brief",
    "bridge/Brücke lamp/Lampe flower/Blume clock/Uhr door/Tür",
    "house/Haus book/Buch boat/Boot window/Fenster bed/Bett",
)
DETERMINERS = (
    Agreeing("the", ("der", "die", "das")),
    *_agreeing("this/dies every/jed", ("er", "e", "es")),
    *_agreeing("a/ein my/mein your/dein our/unser their/ihr", ("", "e", "")),
)
ADJECTIVES = _agreeing(
    "small/klein big/groß wise/weis young/jung red/rot green/grün blue/blau black/schwarz "
    "white/weiß new/neu quiet/still happy/froh strong/stark poor/arm round/rund cold/kalt",
    ("er", "e", "es"),
)
(RELATIVE,) = _agreeing("that/welch", ("er", "e", "es"))
PRONOUNS = _particles("he/er she/sie it/es")
TRANSITIVE = _verbs(
    "sees/see/sieht/sehen finds/find/findet/finden paints/paint/malt/malen likes/like/mag/mögen "
    "hears/hear/hört/hören seeks/seek/sucht/suchen carries/carry/trägt/tragen "
    "buys/buy/kauft/kaufen knows/know/kennt/kennen"
)
INTRANSITIVE = _verbs(
    "sleeps/sleep/schläft/schlafen sings/sing/singt/singen waits/wait/wartet/warten "
    "dances/dance/tanzt/tanzen stands/stand/steht/stehen"
)
PLACES = _particles("near/nahe under/unter behind/hinter beside/neben above/über before/vor")
TIMES = _particles(
    "today/heute now/jetzt tomorrow/morgen soon/bald often/oft always/immer later/später "
    "sometimes/manchmal"
)
MANNERS = _particles("quickly/schnell slowly/langsam gladly/gern quietly/leise secretly/heimlich")
CONJUNCTIONS = _particles("and/und because/weil")
FUTURE = Particle("will", "wird")
NEGATION = ("not", "en", "nicht")
SUPPORT = "does"
