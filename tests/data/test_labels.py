import pytest

from jaxsae.artifacts import InputError
from jaxsae.data.labels import is_hallucinated, normalise


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
    ],
)
def test_is_hallucinated__is_true_where_none_does(answer, answers):
    assert is_hallucinated(answer, answers)


def test_is_hallucinated__refuses_what_nothing_could_match():
    with pytest.raises(InputError, match="no right answers to compare 'Paris' with"):
        is_hallucinated("Paris", [])
    with pytest.raises(InputError, match=r"the right answer '\?' holds no letter or digit"):
        is_hallucinated("Rome", ["Paris", "?"])
