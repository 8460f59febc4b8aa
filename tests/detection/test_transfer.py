"""Each set's detector is applied to the others' new answers alone; its own entry is cross-validated."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jaxsae.artifacts import InputError
from jaxsae.detection import fit_detector
from jaxsae.detection.transfer import transfer_matrix, unseen


def with_signal(tables, sign, prefix):
    metrics = tables.track_metrics.copy()
    metrics[:, 2] += sign * 3 * tables.labels
    names = {field: tuple(prefix + text for text in getattr(tables, field)) for field in ("ids", "groups", "questions")}
    return dataclasses.replace(tables, track_metrics=metrics, **names)


@pytest.fixture
def sets(make_inputs):
    """Three sets: the first two agree on what tells, the third says the opposite."""
    return {
        "here": with_signal(make_inputs(seed=1).tables(), 1, "a "),
        "there": with_signal(make_inputs(seed=2, n_groups=50).tables(), 1, "b "),
        "opposite": with_signal(make_inputs(seed=3, n_groups=40).tables(), -1, "c "),
    }


def test_transfer_matrix__finds_what_holds_elsewhere_and_what_does_not(sets, config):
    done = []
    names = ("tracks_logistic", "logprob_mean")
    rows = transfer_matrix(sets, config, detectors=names, on_pair=lambda train, test: done.append((train, test)))
    found = {(row["train"], row["test"], row["detector"]): row for row in rows}
    assert len(found) == len(rows) == 3 * 3 * 2
    assert len(set(done)) == 9
    for train in sets:
        assert found[train, train, "tracks_logistic"]["auroc"] > 0.9
    assert found["here", "there", "tracks_logistic"]["auroc"] > 0.9
    assert found["here", "opposite", "tracks_logistic"]["auroc"] < 0.1
    assert found["opposite", "here", "tracks_logistic"]["auroc"] < 0.1
    for test, tables in sets.items():
        plain = roc_auc_score(tables.labels, -tables.logprobs[:, 0])
        for train in sets:
            assert found[train, test, "logprob_mean"]["auroc"] == pytest.approx(plain)  # nothing is learned
    for row in rows:
        assert row["ci_low"] <= row["auroc"] <= row["ci_high"]
        assert row["n"] == len(sets[row["test"]].ids)


def test_transfer_matrix__applies_the_detector_that_a_run_would_keep(sets, config):
    rows = transfer_matrix(sets, config, detectors=("tracks_logistic",))
    row = next(row for row in rows if (row["train"], row["test"]) == ("here", "there"))
    detector = fit_detector(sets["here"], dataclasses.replace(config, deploy="tracks_logistic"))
    other = sets["there"]
    assert row["auroc"] == roc_auc_score(other.labels, detector.scores(other))
    assert row["brier"] == pytest.approx(np.mean((detector.predict_proba(other)[:, 1] - other.labels) ** 2))
    assert row["accuracy"] == np.mean(detector.predict(other) == other.labels)


def test_transfer_matrix__leaves_out_answers_that_the_training_set_has(sets, config):
    """A set tested on itself under other group names would find its own texts again."""
    here = sets["here"]
    groups = tuple(f"other {group}" for group in here.groups)
    half = tuple(f"new {text}" if row % 2 else text for row, text in enumerate(here.questions))
    twin = dataclasses.replace(here, groups=groups, questions=half)
    is_new = unseen(here, twin)
    np.testing.assert_array_equal(is_new, np.arange(120) % 2 == 1)
    rows = transfer_matrix({"here": here, "twin": twin}, config, detectors=("tracks_logistic",))
    row = next(row for row in rows if (row["train"], row["test"]) == ("here", "twin"))
    assert (row["n"], row["n_left_out"]) == (60, 60)
    assert unseen(here, dataclasses.replace(here, questions=tuple(f"new {q}" for q in here.questions))).sum() == 0
    elsewhere = dataclasses.replace(here, groups=groups, answers=tuple(f"not {text}" for text in here.answers))
    assert unseen(here, elsewhere).sum() == 0  # a question it has learned from, whatever the answer


def test_transfer_matrix__says_none_where_nothing_is_left(sets, config):
    rows = transfer_matrix({"here": sets["here"], "again": sets["here"]}, config, detectors=("tracks_logistic",))
    row = next(row for row in rows if (row["train"], row["test"]) == ("here", "again"))
    assert (row["n"], row["n_left_out"], row["n_groups"]) == (0, 120, 0)
    assert row["auroc"] is row["ci_low"] is row["brier"] is None


def test_transfer_matrix__refuses_sets_of_different_models(sets, config):
    other = dataclasses.replace(sets["there"], resid=np.zeros((100, 3, 3, 9), np.float16))
    with pytest.raises(InputError, match=r"fitted on rows with width 5, these have 9"):
        transfer_matrix({"here": sets["here"], "there": other}, config, detectors=("tracks_logistic",))
