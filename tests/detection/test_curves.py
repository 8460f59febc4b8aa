"""A point of a curve learns from its labels alone and is judged by the true ones; a curve ends at the full detector."""

import dataclasses
import itertools

import numpy as np
import pytest
from sklearn.base import BaseEstimator

from jaxsae.detection import evaluate
from jaxsae.detection.baselines import make_baselines
from jaxsae.detection.curves import FEW_LABELS, LABEL_NOISE, label_points
from jaxsae.detection.nesting import nest_baseline, quiet_single_threaded_blas
from jaxsae.detection.specs import Baseline, Choice
from jaxsae.detection.splits import make_folds


@pytest.fixture(scope="module")
def planted(tables):
    """Tables whose track metrics tell the label, with noise."""
    metrics = tables.track_metrics.copy()
    metrics[:, 3] += 2.5 * tables.labels
    return dataclasses.replace(tables, track_metrics=metrics)


@pytest.fixture(scope="module")
def points(tables, config):
    return label_points(tables, make_folds(tables, config)[0], seed=0)


def test_label_points__fewer_labels_are_whole_groups_and_a_part_of_more(make_inputs, config):
    tables = make_inputs(n_groups=160).tables()
    points = label_points(tables, make_folds(tables, config)[0], seed=0)
    few = [point for point in points.values() if point.kind == FEW_LABELS]
    assert len(few) >= 3
    for point in few:
        known = point.labels != -1
        np.testing.assert_array_equal(point.labels[known], tables.labels[known])
        by_group = {group: known[tables.group_index == group] for group in np.unique(tables.group_index)}
        assert all(rows.all() or not rows.any() for rows in by_group.values())
        assert sum(rows.all() for rows in by_group.values()) == pytest.approx(point.share * 160, abs=1)
    for less, more in itertools.pairwise(few):
        assert less.share < more.share
        assert ((less.labels == -1) | (less.labels == more.labels)).all()


def test_label_points__flip_a_share_of_the_labels(tables, points):
    noisy = [point for point in points.values() if point.kind == LABEL_NOISE]
    assert [point.share for point in noisy] == [0.1, 0.2, 0.3]
    for point in noisy:
        flipped = point.labels != tables.labels
        assert set(point.labels) == {0, 1}
        assert flipped.mean() == pytest.approx(point.share, abs=0.12)  # 120 rows: three deviations of .04


def test_label_points__leave_out_shares_too_small_to_learn_from(tables, config, points):
    assert not any(point.kind == FEW_LABELS and point.share < 0.1 for point in points.values())
    for point in points.values():
        for number in range(4):
            rows = point.labels[make_folds(tables, config)[0] == number]
            assert min(np.sum(rows == 0), np.sum(rows == 1)) >= 2


class Spy(BaseEstimator):
    """A classifier that remembers the labels it was fitted on."""

    seen: list[np.ndarray] = []  # noqa: RUF012

    def fit(self, inputs, labels):
        Spy.seen.append(labels)
        return self

    def decision_function(self, inputs):
        return inputs[:, 0]


def test_nest_baseline__never_fits_on_a_row_without_a_label(tables, config, points):
    point = next(point for point in points.values() if point.kind == FEW_LABELS)
    spy = Baseline("spy", "", lambda tables, choice: tables.track_metrics, lambda choice, n_rows, n_columns: Spy())
    fold = make_folds(tables, config)[0]
    Spy.seen.clear()
    nest_baseline(spy, tables, fold, scheme="all", labels=point.labels)
    n_known = np.sum(point.labels != -1)
    assert len(Spy.seen) == 6 + 4
    assert all(set(labels) == {0, 1} and len(labels) < n_known for labels in Spy.seen)


def test_nest_baseline__chooses_by_the_labels_it_has(tables, config, points):
    """Layer 0 tells the labels that are known, layer 2 those that are not: the choice must fall on layer 0."""
    point = next(point for point in points.values() if point.kind == FEW_LABELS and point.share == 0.5)
    known = point.labels != -1
    resid = tables.resid.astype(np.float32)
    resid[known, 0, 0, 1] += 4 * tables.labels[known]
    resid[~known, 2, 0, 1] += 40 * tables.labels[~known]
    baseline = make_baselines(config.settings, 3)["probe_last_prompt"]
    fold = make_folds(tables, config)[0]
    with quiet_single_threaded_blas():
        nested = nest_baseline(
            baseline, dataclasses.replace(tables, resid=resid), fold, scheme="all", labels=point.labels
        )
    assert nested.chosen == (Choice(0, 0.03),) * 4


def test_curves__end_at_the_full_detector_and_fall_with_worse_labels(planted, config):
    chosen = dataclasses.replace(config, repeats=1, curves=("tracks_logistic", "logprob_sum"))
    found = evaluate(planted, chosen)
    full = {row["name"]: row for row in found.detection}
    for name in chosen.curves:
        ends = [row for row in found.curves if row["detector"] == name and row["share"] in (0.0, 1.0)]
        assert {row["kind"] for row in ends} == {FEW_LABELS, LABEL_NOISE}
        for row in ends:
            assert (row["auroc"], row["ci_low"]) == (full[name]["auroc"], full[name]["ci_low"])
            assert row["n_labelled"] == 120
    noise = [row["auroc"] for row in found.curves if (row["kind"], row["detector"]) == (LABEL_NOISE, "tracks_logistic")]
    few = [row["auroc"] for row in found.curves if (row["kind"], row["detector"]) == (FEW_LABELS, "tracks_logistic")]
    assert noise[0] > 0.9 > noise[-1] > 0.6
    assert few[0] < few[-1]
    assert len({row["auroc"] for row in found.curves if row["detector"] == "logprob_sum"}) == 1  # nothing is learned


def test_curves__are_measured_for_named_detectors_alone(tables, config):
    chosen = dataclasses.replace(config, repeats=1, detectors=("length",), method="length")
    assert evaluate(tables, chosen).curves == []
