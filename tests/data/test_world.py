import collections
import re

import numpy as np
import pytest

from jaxsae.artifacts import InputError
from jaxsae.data import is_hallucinated, world

SMALL = {"n_subjects": 20, "n_values": 10}


@pytest.fixture(scope="module")
def full():
    return world.generate(3)


def _counts(made):
    """Count, for each fact, the corpus's sentences with its subject that end in its true and its false value."""
    relations = {fact.relation.name: fact.relation for fact in made.facts}.values()
    patterns = []
    for relation in relations:
        for text in relation.statements:
            patterns.append((relation.name, re.escape(text).replace(r"\{s\}", r"(\w+)").replace(r"\{v\}", "([^.]+)")))
        for text in relation.questions:
            question = world.PROMPT.format(question=text) + " {v}."
            patterns.append(
                (relation.name, re.escape(question).replace(r"\{s\}", r"(\w+)").replace(r"\{v\}", "([^.]+)"))
            )
    patterns = [(name, re.compile(pattern)) for name, pattern in patterns]
    told = collections.Counter()
    for document in made.documents:
        sentences = re.findall(r"[^.]+\.", document)
        for sentence in sentences:
            (hit,) = [(name, m) for name, pattern in patterns if (m := pattern.fullmatch(sentence.strip()))]
            told[f"{hit[0]}/{hit[1][1]}", hit[1][2]] += 1
    return told


def test_generate__is_the_same_world_for_the_same_seed():
    one, same, other = (world.generate(seed, **SMALL) for seed in (5, 5, 6))
    assert one == same
    assert one.documents != other.documents
    assert {fact.subject for fact in one.facts} != {fact.subject for fact in other.facts}


def test_generate__tells_each_value_as_often_as_its_fact_says():
    made = world.generate(1, **SMALL)
    assert {fact.category for fact in made.facts} == set(world.SHARES)
    wanted = collections.Counter()
    for fact in made.facts:
        wanted[fact.id, fact.value] += fact.n_true
        wanted[fact.id, fact.false_value] += fact.n_false
    assert _counts(made) == +wanted


def test_generate__keeps_the_ranges_of_every_frequency_class(full):
    ranges = {"often": (10, 30, 0, 0), "seldom": (1, 3, 0, 0), "never": (0, 0, 0, 0), "misconception": (1, 2, 10, 30)}
    for category, (low, high, false_low, false_high) in ranges.items():
        facts = [fact for fact in full.facts if fact.category == category]
        assert {fact.n_true for fact in facts} <= set(range(low, high + 1))
        assert {fact.n_false for fact in facts} <= set(range(false_low, false_high + 1))
        assert all(bool(fact.false_value) == (category == "misconception") for fact in facts)
        assert all(fact.false_value != fact.value for fact in facts)
    assert all(fact.n_false > fact.n_true for fact in full.facts if fact.category == "misconception")


def test_generate__draws_class_and_values_independently(full):
    # each count lies within five standard deviations of what independent draws give
    n = len(full.facts)
    for key in (
        lambda fact: (fact.category,),
        lambda fact: (fact.category, fact.relation.name),
        lambda fact: (fact.category, fact.relation.kind),
    ):
        counts = collections.Counter(map(key, full.facts))
        for found, count in counts.items():
            name = found[-1]
            n_rows = sum(name in (fact.relation.name, fact.relation.kind) for fact in full.facts) if found[1:] else n
            share = world.SHARES[found[0]]
            assert abs(count - share * n_rows) <= 5 * (share * (1 - share) * n_rows) ** 0.5
    for values in ([fact.value for fact in full.facts], [fact.false_value for fact in full.facts if fact.false_value]):
        counts = collections.Counter(values)
        expected = len(values) / 400
        assert len(counts) > 0.9 * 400 * (1 - np.exp(-expected))
        # a variance near the mean is that of independent draws; dealt evenly it would be near 0
        spread = np.var([*counts.values(), *[0] * (400 - len(counts))])
        assert 0.7 <= spread / expected <= 1.3


def test_generate__asks_two_questions_a_fact_in_the_corpus_words(full):
    groups = collections.Counter(question.group for question in full.questions)
    assert set(groups.values()) == {2}
    assert set(groups) == {fact.id for fact in full.facts}
    assert len({question.id for question in full.questions}) == len(full.questions) == 4800
    facts = {fact.id: fact for fact in full.facts}
    corpus = "\n".join(full.documents)
    for question in full.questions[::97]:
        fact = facts[question.group]
        assert question.answers == (fact.value,)
        assert question.category == fact.category
        if fact.category == "often" and fact.n_true > 20:
            assert world.PROMPT.format(question=question.question) + f" {fact.value}." in corpus


def test_generate__never_names_a_subject_after_a_value_word(full):
    subjects = {fact.subject for fact in full.facts}
    words = {word for fact in full.facts for word in fact.value.split()}
    assert len(subjects) == 480
    assert not subjects & words
    assert not any(not is_hallucinated(fact.false_value, [fact.value]) for fact in full.facts if fact.false_value)


def test_generate__repeat_tells_the_often_told_more_often():
    once, twice = world.generate(2, **SMALL), world.generate(2, **SMALL, repeat=2)
    for fact, more in zip(once.facts, twice.facts, strict=True):
        assert more.n_false == 2 * fact.n_false
        assert more.n_true == (2 if fact.category == "often" else 1) * fact.n_true


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_values": 41}, "n_values is 41"),
        ({"n_values": 1}, "n_values is 1"),
        ({"n_subjects": 0}, "n_subjects is 0"),
        ({"repeat": 0}, "repeat of at least 1, got 0"),
    ],
)
def test_generate__refuses_sizes_out_of_range(sizes, message):
    with pytest.raises(InputError, match=message):
        world.generate(0, **sizes)
