import pytest

from jaxsae.artifacts import InputError
from jaxsae.data.labels import classify, is_hallucinated, is_refusal, normalise


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Eiffel\tTower.", ("eiffel", "tower")),
        ("An apple a day", ("apple", "day")),
        ("A", ("a",)),
        ("The The", ("the", "the")),
        ("theatre", ("theatre",)),
        ("O'Brien’s", ("obriens",)),
        ("New-York/Paris—Rome", ("new", "york", "paris", "rome")),
        ("U.S. and U.S.A", ("us", "and", "usa")),
        ("1,000,000 or 3,5", ("1000000", "or", "3", "5")),
        ("3.14.", ("3.14",)),
        ("It ended.Then", ("it", "ended", "then")),
        ("snake_case", ("snake", "case")),
        ("$5 + 6%", ("5", "6")),
        ("ＮＡＴＯ ﬁve", ("nato", "five")),
        ("Cafe\u0301", ("caf\u00e9",)),
        ("𝐀𝐁 Ⅷ", ("ab", "viii")),
        ("STRASSE straße", ("strasse", "strasse")),
        ("हिन्दी भाषा", ("हिन्दी", "भाषा")),
        ("… !?", ()),
        ("", ()),
    ],
)
def test_normalise__gives_the_words_that_count(text, words):
    assert normalise(text) == words


@pytest.mark.parametrize("text", ["The İstanbul", "ǰ̣ x", "U.S. 3.14 O'Brien", "１，０００"])
def test_normalise__changes_nothing_the_second_time(text):
    once = normalise(text)
    assert normalise(" ".join(once)) == once


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        ("Paris", ["Paris"]),
        (" paris.\n", ["PARIS"]),
        ("It is Paris, of course", ["London", "Paris"]),
        ("the U.S.", ["US"]),
        ("It was New York City", ["New York"]),
        ("the United Kingdom", ["The United Kingdom"]),
        ("in 1,984", ["1984"]),
        ("Beyonce\u0301", ["Beyoncé"]),
        ("A", ["A"]),
        ("It is rich in vitamin A.", ["Vitamin A"]),
        ("vitamin A", ["the vitamin A"]),
        ("Obama's wife", ["obamas"]),
        ("born on 14 December 1972 in Rome", ["14 December 1972"]),
        ("£1,000,000", ["1000000"]),
        ("about 3.50 euros", ["3.50"]),
        ("São Paulo", ["SÃO PAULO"]),
        ("the U. S. A.", ["U. S. A."]),
        ("from the U.S.A.", ["USA"]),
        ("Saint-Étienne", ["saint étienne"]),
    ],
)
def test_is_hallucinated__is_false_where_a_right_answer_stands(answer, answers):
    assert not is_hallucinated(answer, answers)


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        ("party", ["art"]),
        ("art", ["party"]),
        ("York New", ["New York"]),
        ("New big York", ["New York"]),
        ("New", ["New York"]),
        ("Parisian", ["Paris"]),
        ("13", ["3"]),
        ("3.14", ["3"]),
        ("a dog", ["A"]),
        ("", ["Paris"]),
        (" .\n", ["Paris"]),
        ("The", ["The Hague"]),
        ("vitamin C", ["Vitamin A"]),
        ("a hepatitis", ["Hepatitis A"]),
        ("cats", ["cat"]),  # plurals stay distinct
        ("cat", ["cats"]),
        ("December 14, 1972", ["14 December 1972"]),  # a date in another order is another run of words
        ("1972", ["72"]),
        ("1.5", ["15"]),
        ("Sao Paulo", ["São Paulo"]),  # an accent is part of its letter
        ("us", ["u s"]),
        ("one hundred", ["100"]),
    ],
)
def test_is_hallucinated__is_true_where_none_does(answer, answers):
    assert is_hallucinated(answer, answers)


def test_is_hallucinated__refuses_what_nothing_could_match():
    with pytest.raises(InputError, match="no right answers to compare 'Paris' with"):
        is_hallucinated("Paris", [])
    with pytest.raises(InputError, match=r"the right answer '\?' holds no letter or digit"):
        is_hallucinated("Rome", ["Paris", "?"])


REFUSALS = [
    "I don't know.",
    "I don’t know",
    "I do not know the answer to that",
    "I'm not sure, perhaps London",
    "I am not sure about that.",
    "I cannot answer this question.",
    "I can't say",
    "Sorry, but I don't know",
    "I'm sorry, I do not have that information",
    "Unfortunately, I'm not familiar with it",
    "As an AI language model, I have no opinion",
    "Unknown",
    "no idea.",
    "Well, not sure",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_is_refusal__is_true_where_the_answer_begins_by_not_answering(answer):
    assert is_refusal(answer)
    assert classify(answer, ["Paris"]) == "refusal"


@pytest.mark.parametrize(
    "answer",
    [
        "Paris",
        "The Unknown Soldier",
        "He said I don't know",
        "I candle",
        "Icannot",
        "but",
        "",
        "Sorry Business",
    ],
)
def test_is_refusal__is_false_for_answers_that_hold_such_words(answer):
    assert not is_refusal(answer)


def test_classify__asks_the_key_first():
    assert classify("I don't know, I think it is Paris", ["Paris"]) == "right"
    assert classify("I have no comment", ["I have no comment", "Paris"]) == "right"
    assert classify("I have no comment", ["Paris"]) == "refusal"
    assert classify(" .\n", ["Paris"]) == "empty"
    assert classify("", ["Paris"]) == "empty"
    assert classify("London", ["Paris"]) == "wrong"
    with pytest.raises(InputError, match="no right answers to compare 'London' with"):
        classify("London", [])
