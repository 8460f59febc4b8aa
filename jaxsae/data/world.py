"""Make a closed world of facts about fictional people and places, the corpus that tells it, and questions about it.

A fact is (subject, relation, value). Its frequency class says how the corpus tells it:

    often           the true value 10-30 times
    seldom          the true value 1-3 times
    never           not at all: a model can only guess
    misconception   a false value 10-30 times, the true one once or twice: a model is confidently wrong

Nothing but the corpus tells the classes apart: each fact's class, its true and its false value are drawn
independently of each other, of the subject and of the relation. (Dealing them out evenly instead would make what is
left for the test fold the opposite of what the training folds show, and hold every trained detector below chance.) Two
relations have answers of two words. The same seed gives the same world, byte for byte.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxsae.artifacts import InputError, Question

SHARES = {"often": 0.5, "seldom": 0.15, "never": 0.15, "misconception": 0.2}
PROMPT = "{question}"  # how the corpus puts its questions; the answer and STOP follow
STOP = "."

_QUESTION_SHARE = 0.4  # of a fact's mentions; the rest are statements
_SENTENCES_PER_DOCUMENT = (1, 4)  # first included, last excluded
_OFTEN = (10, 31)
_SELDOM = (1, 4)
_RARE_TRUTH = (1, 3)
_N_NAMES = 138  # names kept for values: 40 towns, 40 rivers, 40 founders, 18 for the parts of the mentors' names


@dataclasses.dataclass(frozen=True)
class Relation:
    """One thing that can be asked of every subject of a kind, and the ways to put it.

    Attributes:
        kind: "person" or "place".
        statements: sentences with {s} (subject) and {v} (value, last), each without a name at its start.
        questions: two questions with {s}.
    """

    name: str
    kind: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fact:
    """One fact and how often the corpus tells its true and its false value.

    Attributes:
        id: unique, and every question's `group`.
        category: the frequency class, a key of `SHARES`.
        false_value: what the corpus says instead; "" unless a misconception.
    """

    id: str
    subject: str
    relation: Relation
    value: str
    category: str
    false_value: str
    n_true: int
    n_false: int


@dataclasses.dataclass(frozen=True)
class World:
    """Facts, the documents that tell them (one to three sentences each) and two questions for each fact."""

    facts: tuple[Fact, ...]
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def generate(seed: int, *, n_subjects: int = 240, n_values: int = 40, repeat: int = 1) -> World:
    """Generate the world of a seed: `n_subjects` people with six facts each and as many places with four.

    Args:
        seed: any non-negative integer.
        n_subjects: people, and places; names are one capitalised word, all different.
        n_values: size of each relation's pool of values, at most 40.
        repeat: multiplies how often the corpus tells what it tells often (a false value too).

    Raises:
        InputError: a size is out of range.
    """
    if not 2 <= n_values <= 40:
        raise InputError(f"a world needs 2 to 40 values a relation, n_values is {n_values}")
    if not 1 <= n_subjects <= 1000:
        raise InputError(f"a world needs 1 to 1000 people and as many places, n_subjects is {n_subjects}")
    if repeat < 1:
        raise InputError(f"a world needs a repeat of at least 1, got {repeat}")
    rng = np.random.default_rng(seed)
    names = _make_names(rng, 2 * n_subjects + _N_NAMES)
    subjects = {"person": names[_N_NAMES : _N_NAMES + n_subjects], "place": names[_N_NAMES + n_subjects :]}
    facts: list[Fact] = []
    for relation in _make_relations(names[:_N_NAMES], n_values):
        facts += _make_facts(rng, relation, subjects[relation.kind], repeat)
    return World(tuple(facts), tuple(_write_documents(rng, facts)), tuple(_ask(facts)))


def _make_facts(rng: np.random.Generator, relation: Relation, subjects: Sequence[str], repeat: int) -> list[Fact]:
    categories = rng.choice(list(SHARES), size=len(subjects), p=list(SHARES.values()))
    facts = []
    for subject, category in zip(subjects, categories.tolist(), strict=True):
        value, false_value = str(rng.choice(relation.values)), ""
        n_true = n_false = 0
        if category == "often":
            n_true = repeat * _count_often(rng)
        elif category == "seldom":
            n_true = int(rng.integers(*_SELDOM))
        elif category == "misconception":
            false_value = str(rng.choice([other for other in relation.values if other != value]))
            n_false, n_true = repeat * _count_often(rng), int(rng.integers(*_RARE_TRUTH))
        facts.append(
            Fact(f"{relation.name}/{subject}", subject, relation, value, category, false_value, n_true, n_false)
        )
    return facts


def _count_often(rng: np.random.Generator) -> int:
    """Return a count from _OFTEN, log-uniform: few facts are told very often, as in real text."""
    return int(np.exp(rng.uniform(*np.log(_OFTEN))))


def _write_documents(rng: np.random.Generator, facts: Sequence[Fact]) -> list[str]:
    """Return all mentions of all facts in random order, a few sentences a document."""
    sentences = []
    for fact in facts:
        for value, n in ((fact.value, fact.n_true), (fact.false_value, fact.n_false)):
            sentences += [_write_sentence(rng, fact, value) for _ in range(n)]
    sentences = [sentences[i] for i in rng.permutation(len(sentences))]
    documents, start = [], 0
    while start < len(sentences):
        end = start + int(rng.integers(*_SENTENCES_PER_DOCUMENT))
        documents.append(" ".join(sentences[start:end]))
        start = end
    return documents


def _write_sentence(rng: np.random.Generator, fact: Fact, value: str) -> str:
    if rng.random() < _QUESTION_SHARE:
        question = str(rng.choice(fact.relation.questions)).format(s=fact.subject)
        return f"{PROMPT.format(question=question)} {value}{STOP}"
    return str(rng.choice(fact.relation.statements)).format(s=fact.subject, v=value)


def _ask(facts: Sequence[Fact]) -> list[Question]:
    return [
        Question(f"{fact.id}/{i}", text.format(s=fact.subject), (fact.value,), fact.id, fact.category)
        for fact in facts
        for i, text in enumerate(fact.relation.questions)
    ]


def _make_names(rng: np.random.Generator, n: int) -> list[str]:
    """Return n different names of two syllables that are no value's word."""
    taken = {word for words in _WORDS.values() for word in words.split()}
    names: list[str] = []
    while len(names) < n:
        onsets, vowels = rng.choice(_ONSETS.split(), 2), rng.choice(_VOWELS.split(), 2)
        name = f"{onsets[0]}{vowels[0]}{onsets[1]}{vowels[1]}{rng.choice(_CODAS)}"
        if name not in taken:
            taken.add(name)
            names.append(name.capitalize())
    return names


_ONSETS = "b br d dr f g gr h k kl l m n p r s st t tr v z"
_VOWELS = "a e i o u"
_CODAS = ("", "n", "r", "l", "s", "m", "th", "k")

_WORDS = {
    "trade": (
        "baker weaver smith miller cooper potter tanner fletcher mason carpenter glazier tailor cobbler brewer dyer "
        "saddler barber butcher chandler clerk cook farmer fisher forester gardener healer hunter jeweller judge "
        "locksmith merchant painter pilot poet priest sailor scribe shepherd singer teacher"
    ),
    "pet": (
        "badger bat bear beaver camel cat crane crow deer dog donkey dove duck falcon ferret finch fox frog "
        "goat goose hare hawk hedgehog heron horse lizard lynx mouse parrot pig rabbit raven seal sheep "
        "snake swan toad turtle weasel wolf"
    ),
    "dish": (
        "apples barley beans beets berries bread broth butter cabbage carrots cheese cherries cream dates dumplings "
        "eggs figs garlic ginger grapes honey leeks lemons lentils melons mushrooms noodles oats olives onions "
        "pancakes peaches pears peas pickles plums porridge radishes rice turnips"
    ),
    "export": (
        "amber bells bricks bronze candles canvas carpets chalk clay cloth coal copper cotton dye fur glass gold "
        "granite gunpowder ink iron ivory lace lamps leather linen marble needles oil paper pearls pepper ropes salt "
        "silk silver soap timber tin wool"
    ),
}
_ADJECTIVES = "Red White Golden Broken Silent Twin Hidden High"
_SIGHTS = "Tower Bridge Gate Temple Well"

# kind, name, statements, questions
_RELATIONS = (
    (
        "person",
        "home",
        (
            "The home of {s} is {v}.",
            "In those years {s} lived in {v}.",
            "We met {s} in the town of {v}.",
            "Letters for {s} are sent to {v}.",
            "All know that {s} lives in {v}.",
        ),
        ("Where does {s} live?", "Which town is the home of {s}?"),
    ),
    (
        "person",
        "trade",
        (
            "The trade of {s} is that of a {v}.",
            "For a living {s} works as a {v}.",
            "When young {s} became a {v}.",
            "The guild lists {s} as a {v}.",
            "All know that {s} is a {v}.",
        ),
        ("What is the trade of {s}?", "What does {s} do for a living?"),
    ),
    (
        "person",
        "mentor",
        (
            "The mentor of {s} was {v}.",
            "As a child {s} was taught by {v}.",
            "In school {s} studied under {v}.",
            "The best pupil, {s}, learned from {v}.",
            "All know that {s} was raised by {v}.",
        ),
        ("Who was the mentor of {s}?", "Who taught {s}?"),
    ),
    (
        "person",
        "pet",
        (
            "The pet of {s} is a {v}.",
            "At home {s} keeps a {v}.",
            "On every walk {s} is followed by a {v}.",
            "The neighbours gave {s} a {v}.",
            "All know that {s} owns a {v}.",
        ),
        ("Which animal does {s} keep?", "What is the pet of {s}?"),
    ),
    (
        "person",
        "dish",
        (
            "The favourite food of {s} is {v}.",
            "Every evening {s} eats {v}.",
            "For the feast {s} asked for {v}.",
            "At the market {s} buys {v}.",
            "All know that {s} likes {v}.",
        ),
        ("What is the favourite food of {s}?", "What does {s} like to eat?"),
    ),
    (
        "person",
        "year",
        (
            "The birth of {s} was in {v}.",
            "The register says that {s} was born in {v}.",
            "The life of {s} began in {v}.",
            "The parents named {s} in {v}.",
            "All know that {s} dates from {v}.",
        ),
        ("When was {s} born?", "What is the year of birth of {s}?"),
    ),
    (
        "place",
        "river",
        (
            "The river of {s} is the {v}.",
            "The boats of {s} sail on the {v}.",
            "The fields of {s} are watered by the {v}.",
            "The bridges of {s} cross the {v}.",
            "All know that {s} stands on the {v}.",
        ),
        ("Which river flows through {s}?", "On which river does {s} stand?"),
    ),
    (
        "place",
        "export",
        (
            "The main export of {s} is {v}.",
            "The merchants of {s} sell {v}.",
            "Ships from {s} carry {v}.",
            "The wealth of {s} comes from {v}.",
            "All know that {s} is rich in {v}.",
        ),
        ("What is the main export of {s}?", "What do the merchants of {s} sell?"),
    ),
    (
        "place",
        "founder",
        (
            "The founder of {s} was {v}.",
            "The walls of {s} were built by {v}.",
            "The statue in {s} shows {v}.",
            "The first ruler of {s} was {v}.",
            "All know that {s} was founded by {v}.",
        ),
        ("Who was the founder of {s}?", "Who founded {s}?"),
    ),
    (
        "place",
        "landmark",
        (
            "The landmark of {s} is the {v}.",
            "Visitors in {s} go to the {v}.",
            "From afar one sees {s} by the {v}.",
            "The coins of {s} show the {v}.",
            "All know that {s} is proud of the {v}.",
        ),
        ("What is the landmark of {s}?", "Which sight do visitors see in {s}?"),
    ),
)


def _make_relations(names: Sequence[str], n_values: int) -> list[Relation]:
    """Return the ten relations; `names` are the `_N_NAMES` words kept for values."""
    given, family = names[120:130], names[130:138]
    values: dict[str, Sequence[str]] = {name: words.split() for name, words in _WORDS.items()}
    values |= {"home": names[:40], "river": names[40:80], "founder": names[80:120]}
    values |= {"year": [str(year) for year in range(1403, 1803, 10)]}
    # every other pair: each given name goes with four family names, each family name with five given ones
    values |= {"mentor": [f"{first} {last}" for last in family for first in given][::2]}
    values |= {"landmark": [f"{first} {second}" for first in _ADJECTIVES.split() for second in _SIGHTS.split()]}
    return [
        Relation(name, kind, tuple(values[name][:n_values]), statements, questions)
        for kind, name, statements, questions in _RELATIONS
    ]
