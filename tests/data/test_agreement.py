import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from jaxsae.artifacts import InputError
from jaxsae.data.agreement import RULES, compare_labels, label_by_every_rule


@pytest.mark.parametrize(
    ("answer", "right", "wrong_by"),
    [
        ("Paris", ["Paris"], ()),
        ("It is Paris", ["Paris"], ("exact",)),
        ("It is surely Paris", ["Paris"], ("exact", "token_f1")),
        ("party", ["art"], ("alias", "exact", "token_f1")),
        ("the river Rhine", ["the river Rhone"], ("alias", "substring", "exact")),
        ("U.S.", ["US"], ("substring",)),
        ("", ["Paris"], ("alias", "substring", "exact", "token_f1")),
        ("London", ["Paris", "London"], ()),
        ("Paris Paris", ["Paris"], ("exact",)),  # a word is shared as often as both have it: F1 2/3
    ],
)
def test_rules__differ_where_they_should(answer, right, wrong_by):
    labels = label_by_every_rule([answer], [right])
    assert {name for name, (label,) in labels.items() if label} == set(wrong_by)
    assert list(labels) == list(RULES) == ["alias", "substring", "exact", "token_f1"]


@pytest.mark.parametrize("seed", range(5))
def test_compare_labels__is_cohens_kappa_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels = {
        name: (rng.random(23) < share).astype(int).tolist() for name, share in zip("abc", (0.3, 0.6, 0.9), strict=True)
    }
    rows = compare_labels(labels)
    assert [(row["a"], row["b"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in rows:
        one, other = labels[row["a"]], labels[row["b"]]
        assert row["n"] == 23
        assert row["agreement"] == np.mean(np.equal(one, other))
        assert math.isclose(row["kappa"], cohen_kappa_score(one, other), abs_tol=1e-12)


def test_compare_labels__has_no_kappa_where_both_say_one_thing():
    (row,) = compare_labels({"a": [1, 1, 1], "b": [1, 1, 1]})
    assert (row["agreement"], row["kappa"]) == (1.0, None)
    (row,) = compare_labels({"a": [1, 1, 1], "b": [0, 1, 1]})
    assert row["kappa"] == 0.0


def test_compare_labels__refuses_what_cannot_be_compared():
    with pytest.raises(
        InputError, match=r"agreement needs labels of the same answers, at least one, got \{'a': 2, 'b': 1\}"
    ):
        compare_labels({"a": [1, 0], "b": [1]})
    with pytest.raises(InputError, match=r"got \{'a': 0, 'b': 0\}"):
        compare_labels({"a": [], "b": []})
