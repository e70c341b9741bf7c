"""A generated translation task: English sentences into a German with an order of its own.

What has to be learned: the verb comes last; adjectives follow their noun, in mirrored order;
the adverb of time moves from the end to the front of its clause; prepositions become
postpositions; determiners, adjectives and relative pronouns agree with the noun's gender;
negation has two parts, ``en`` before the object and ``nicht`` after the verb; the future's
``will`` goes behind its infinitive. For instance

    the  small dog   does not see the house near a  tree today
    heute  der Hund kleiner  en  das Haus ein Baum nahe  sieht nicht

A phrase is said from left to right in English, and returns its translation: words with the
positions they are linked to. A word that translates another is a Sure link. Where a noun decides
the form of a word, or ``does not`` only helps, the link is Possible.

The lexicon has 110 types of English and 155 of German. Every English word has one German lemma, so
that a sentence has one correct translation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple, TypeVar

from experiments.data.corpus import Pair

T = TypeVar("T")
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


class Word(NamedTuple):
    """A word of the translation and the source positions it is linked to."""

    text: str
    sure: tuple[int, ...] = ()
    possible: tuple[int, ...] = ()


Phrase = list[Word]


class Speaker:
    """Generates one sentence; ``elaboration`` scales the probability of optional parts."""

    def __init__(self, random: Random, elaboration: float = 1.0):
        self.random = random
        self.elaboration = elaboration
        self.source: list[str] = []

    def say(self, word: str) -> int:
        self.source.append(word)
        return len(self.source) - 1

    def pick(self, choices: Sequence[T]) -> T:
        # Only `random()` is promised to give the same numbers in every version of Python.
        return choices[int(self.random.random() * len(choices))]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def optionally(self, probability: float) -> bool:
        return self.chance(min(0.95, probability * self.elaboration))

    def particle(self, choices: Sequence[Particle]) -> Phrase:
        english, german = self.pick(choices)
        return [Word(german, (self.say(english),))]

    def sentence(self) -> Phrase:
        """S: clause [conjunction clause]."""
        phrase = self.clause()
        while self.optionally(0.2):
            phrase += self.particle(CONJUNCTIONS) + self.clause()
        return phrase

    def clause(self) -> Phrase:
        """C: subject predicate [time] -> [time] subject predicate."""
        subject = self.particle(PRONOUNS) if self.chance(0.2) else self.noun_phrase(BEINGS)
        predicate = self.predicate()
        time = self.particle(TIMES) if self.chance(0.5) else []
        return time + subject + predicate

    def predicate(self, *, simple: bool = False) -> Phrase:
        """VP: verb (NP | [PP]) -> negation (NP | [PP]) verb."""
        if self.chance(0.65):
            before, after = self.verb(self.pick(TRANSITIVE))
            return before + self.noun_phrase(BEINGS + THINGS, simple=simple) + after
        before, after = self.verb(self.pick(INTRANSITIVE))
        return before + (self.place() if self.optionally(0.5) else []) + after

    def verb(self, verb: Verb) -> tuple[Phrase, Phrase]:
        """V: [does not | will [not]] [manner] verb -> en ... [manner] verb [wird] [nicht]."""
        english, german_before, german_after = NEGATION
        future, negative = self.chance(0.25), self.chance(0.25)
        support = (self.say(SUPPORT),) if negative and not future else ()
        auxiliary = [Word(FUTURE.german, (self.say(FUTURE.english),))] if future else []
        negation = (self.say(english),) if negative else ()
        manner = self.particle(MANNERS) if self.chance(0.25) else []
        position = (self.say(verb.base if future or negative else verb.english),)
        form = verb.infinitive if future else verb.german
        before = [Word(german_before, (), negation + support)] if negative else []
        after = [*manner, Word(form, position, support), *auxiliary]
        return before, after + ([Word(german_after, negation)] if negative else [])

    def noun_phrase(self, nouns: Sequence[Noun], *, simple: bool = False) -> Phrase:
        """NP: determiner [adjectives] noun [PP] [RC] -> determiner noun [adjectives] [PP] [RC]."""
        determiner, noun = self.pick(DETERMINERS), self.pick(nouns)
        adjectives = [self.pick(ADJECTIVES)] if self.chance(0.4) else []
        if adjectives and self.chance(0.2):
            second = self.pick(ADJECTIVES)
            adjectives += [second] if second not in adjectives else []
        article = self.say(determiner.english)
        said = [(self.say(adjective.english), adjective) for adjective in adjectives]
        head = self.say(noun.english)
        phrase = [
            Word(determiner.forms[noun.gender], (article,), (head,)),
            Word(noun.german, (head,)),
            *(Word(word.forms[noun.gender], (at,), (head,)) for at, word in reversed(said)),
        ]
        if not simple and self.optionally(0.2):
            phrase += self.place()
        if not simple and self.optionally(0.25):
            phrase += self.relative(noun.gender, head)
        return phrase

    def place(self) -> Phrase:
        """PP: preposition simple-NP -> simple-NP postposition."""
        postposition = self.particle(PLACES)
        return self.noun_phrase(THINGS, simple=True) + postposition

    def relative(self, gender: int, head: int) -> Phrase:
        """RC: that (VP | simple-NP verb); that its phrases are simple keeps it unambiguous."""
        pronoun = Word(RELATIVE.forms[gender], (self.say(RELATIVE.english),), (head,))
        if self.chance(0.7):
            return [pronoun, *self.predicate(simple=True)]
        subject = self.noun_phrase(BEINGS, simple=True)
        before, after = self.verb(self.pick(TRANSITIVE))
        return [pronoun, *subject, *before, *after]


def sentences(random: Random, elaboration: float = 1.0) -> Iterator[Pair]:
    """Random sentences with their translations and gold alignments, without end; some repeat."""
    while True:
        speaker = Speaker(random, elaboration)
        phrase = speaker.sentence()
        sure = {(i, j) for j, word in enumerate(phrase) for i in word.sure}
        possible = {(i, j) for j, word in enumerate(phrase) for i in word.possible}
        yield Pair(
            tuple(speaker.source),
            tuple(word.text for word in phrase),
            frozenset(sure),
            frozenset(sure | possible),
        )
