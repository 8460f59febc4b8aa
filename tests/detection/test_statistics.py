"""Every number equals scikit-learn's or scipy's, weights and ties included."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from jaxsae.detection import statistics


@pytest.fixture
def rows():
    """90 rows in 40 groups with many ties between the classes."""
    rng = np.random.default_rng(3)
    labels = (rng.random(90) < 0.4).astype(np.int64)
    scores = np.round(rng.normal(size=90) + 0.7 * labels, 1)
    return scores, labels, rng.integers(40, size=90)


def test_resample_auroc__equals_scikit_learn_without_weights(rows):
    scores, labels, group = rows
    found = statistics.resample_auroc(scores, labels, group=group, weights=np.ones((1, 40)))
    assert found[0, 0] == pytest.approx(roc_auc_score(labels, scores), abs=1e-14)


def test_resample_auroc__equals_scikit_learn_with_group_weights(rows, monkeypatch):
    scores, labels, group = rows
    monkeypatch.setattr(statistics, "_BLOCK_BYTES", 8 * 90 * 7)  # blocks of 7 resamples: 25 do not divide evenly
    weights = statistics.draw_group_weights(40, resamples=25, seed=1)
    found = statistics.resample_auroc(scores, labels, group=group, weights=weights)[:, 0]
    expected = [roc_auc_score(labels, scores, sample_weight=drawn[group]) for drawn in weights]
    np.testing.assert_allclose(found, expected, atol=1e-13)


def test_resample_auroc__takes_each_set_of_hallucinated_rows_against_all_right_ones(rows):
    scores, labels, group = rows
    positives = np.stack([group < 13, group >= 13, np.ones(90)], axis=1).astype(np.float64)
    weights = statistics.draw_group_weights(40, resamples=5, seed=2)
    found = statistics.resample_auroc(scores, labels, group=group, weights=weights, positives=positives)
    for column in range(3):
        rows_used = (labels == 0) | (positives[:, column] == 1)
        for drawn, value in zip(weights, found[:, column], strict=True):
            weight = drawn[group][rows_used]
            assert value == pytest.approx(roc_auc_score(labels[rows_used], scores[rows_used], sample_weight=weight))


def test_risk_coverage__equals_a_plain_loop_over_the_kept_answers():
    rng = np.random.default_rng(5)
    scores, labels = rng.permutation(80).astype(np.float64), (rng.random(80) < 0.4).astype(np.int64)
    found = statistics.risk_coverage(scores, labels, points=16)
    ordered = labels[np.argsort(scores)]
    risks = [ordered[:n].mean() for n in range(1, 81)]
    assert found["aurc"] == pytest.approx(np.mean(risks), abs=1e-14)
    assert found["aurc_best"] == pytest.approx(np.mean([np.sort(labels)[:n].mean() for n in range(1, 81)]), abs=1e-14)
    for point in found["risk_coverage"]:
        assert point["risk"] == pytest.approx(risks[round(point["coverage"] * 80) - 1], abs=1e-14)
    assert found["risk_coverage"][-1] == {"coverage": 1.0, "risk": pytest.approx(labels.mean())}


def test_risk_coverage__of_ties_is_the_mean_over_their_orders(rows):
    scores, labels, _ = rows
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        ordered = labels[np.lexsort((rng.random(90), scores))]
        drawn.append(np.mean(np.cumsum(ordered) / np.arange(1, 91)))
    # The standard error of the mean of the draws is the only error.
    error = 4 * np.std(drawn) / np.sqrt(4000)
    assert statistics.risk_coverage(scores, labels)["aurc"] == pytest.approx(np.mean(drawn), abs=error)
    constant = statistics.risk_coverage(np.zeros(90), labels)
    assert constant["aurc"] == pytest.approx(labels.mean())


def test_permutation_p__is_exact_where_all_permutations_can_be_listed():
    scores, labels = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 0.0]), np.array([1, 0, 0, 1, 1, 0])
    sums = [sum(scores[list(chosen)]) for chosen in itertools.combinations(range(6), 3)]
    share = np.mean(np.array(sums) >= scores[labels == 1].sum())
    found = statistics.permutation_p(scores[:, None], labels, group=np.arange(6), permutations=20_000, seed=0)
    assert found[0] == pytest.approx(share, abs=0.006)  # four standard errors


def test_permutation_p__is_uniform_under_the_null_of_grouped_labels():
    """Whole groups share label and, nearly, score: permuting rows would call every second draw significant."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(30), 6)
    found = []
    for seed in range(150):
        labels = rng.permutation(np.arange(30) % 2)[group]
        scores = rng.normal(size=30)[group] + 0.1 * rng.normal(size=180)
        found += statistics.permutation_p(scores[:, None], labels, group=group, permutations=99, seed=seed).tolist()
    assert 0.01 <= np.mean(np.array(found) <= 0.05) <= 0.12
    assert 0.4 <= np.mean(found) <= 0.6


def test_permutation_p__judges_detectors_on_the_same_permutations_whatever_the_blocks(rows, monkeypatch):
    scores, labels, group = rows
    both = np.stack([scores, scores, -scores], axis=1)
    found = statistics.permutation_p(both, labels, group=group, permutations=60, seed=3)
    assert found[0] == found[1] < 0.1 < 0.9 < found[2]
    assert found.min() >= 1 / 61


def test_permute_labels__exchanges_groups_of_one_size_whole():
    group = np.array([0, 0, 1, 1, 2, 2, 3, 4])
    labels = np.array([1, 1, 0, 0, 1, 0, 1, 0])
    drawn = statistics.permute_labels(labels, group, permutations=400, seed=(0,))
    counts = np.stack([drawn[:, group == g].sum(axis=1) for g in range(5)], axis=1)
    assert (np.sort(counts[:, :3], axis=1) == [0, 1, 2]).all()
    assert (np.sort(counts[:, 3:], axis=1) == [0, 1]).all()
    assert set(map(tuple, counts[:, :3])) == set(itertools.permutations((0, 1, 2)))
    assert 0.4 < drawn[counts[:, 0] == 1, 0].mean() < 0.6  # and a mixed group shuffles its own


def test_fit_isotonic__rises_and_is_calibrated_on_its_own_rows(rows):
    scores, labels, _ = rows
    fitted = statistics.fit_isotonic(scores, labels)
    grid = fitted.predict(np.linspace(-9, 9, 50))
    assert (np.diff(grid) >= 0).all()
    assert 0 <= grid.min() <= grid.max() <= 1
    probabilities = fitted.predict(scores)
    for value in np.unique(probabilities):
        assert labels[probabilities == value].mean() == pytest.approx(value)


def test_resample_auroc__is_nan_where_a_class_is_lost():
    weights = np.array([[1, 1], [2, 0], [0, 2]])
    found = statistics.resample_auroc(np.array([0.1, 0.9]), np.array([0, 1]), group=np.array([0, 1]), weights=weights)
    np.testing.assert_array_equal(found[:, 0], [1.0, np.nan, np.nan])
    assert statistics.interval(found[:, 0]) == (1.0, 1.0)
    assert statistics.interval(found[1:, 0]) == (None, None)


def test_interval__agrees_with_scipy_where_each_group_is_one_row():
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], [130, 70])
    scores = rng.normal(size=200) + labels
    weights = statistics.draw_group_weights(200, resamples=4000, seed=0)
    found = statistics.interval(statistics.resample_auroc(scores, labels, group=np.arange(200), weights=weights)[:, 0])
    expected = scipy.stats.bootstrap(
        (labels, scores), roc_auc_score, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=rng
    ).confidence_interval
    # A percentile of 2,000 draws with deviation .03 is itself uncertain by about .03 * 2.7 / sqrt(2000) = .002.
    assert found == pytest.approx((expected.low, expected.high), abs=0.007)


def test_draw_group_weights__draws_as_many_groups_as_there_are_the_same_for_a_seed():
    weights = statistics.draw_group_weights(37, resamples=11, seed=4)
    assert (weights.sum(axis=1) == 37).all()
    np.testing.assert_array_equal(weights, statistics.draw_group_weights(37, resamples=11, seed=4))
    assert (weights != statistics.draw_group_weights(37, resamples=11, seed=5)).any()


def test_metrics__equal_scikit_learn(rows):
    scores, labels, _ = rows
    probabilities = expit(scores)
    ranking = statistics.ranking_metrics(scores, labels)
    assert ranking == {
        "auroc": roc_auc_score(labels, scores),
        "pr_auc": average_precision_score(labels, scores),
        "base_rate": labels.mean(),
    }
    calibration = statistics.calibration_metrics(probabilities, labels, bins=15)
    assert calibration["brier"] == brier_score_loss(labels, probabilities)


def test_decision_metrics__count_all_repeats_together(rows):
    scores, labels, _ = rows
    decisions = np.stack([scores > 0, scores > 0.5]).astype(np.int64)
    found = statistics.decision_metrics(decisions, labels)
    precision, recall, f1, _ = precision_recall_fscore_support(np.tile(labels, 2), decisions.ravel(), average="binary")
    expected = {"accuracy": (decisions == labels).mean(), "precision": precision, "recall": recall, "f1": f1}
    assert found == pytest.approx(expected, abs=1e-15)


def test_decision_metrics__are_zero_where_nothing_is_called_hallucinated():
    found = statistics.decision_metrics(np.zeros((1, 4), dtype=np.int64), np.array([0, 1, 0, 0]))
    assert found == {"accuracy": 0.75, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_calibration_error__by_hand():
    probabilities = np.array([0.1, 0.1, 0.6, 0.6, 0.6])
    labels = np.array([0, 1, 1, 1, 0])
    curve = statistics.calibration_curve(probabilities, labels, bins=2)
    assert [point["n"] for point in curve] == [2, 3]
    assert [point["observed"] for point in curve] == pytest.approx([1 / 2, 2 / 3])
    assert statistics.calibration_error(curve) == pytest.approx((2 * 0.4 + 3 * (2 / 3 - 0.6)) / 5)


def test_calibration_curve__has_bins_of_equal_mass_and_does_not_split_ties():
    values = np.random.default_rng(0).random(600)
    labels = np.arange(600) % 2
    assert [point["n"] for point in statistics.calibration_curve(values, labels, bins=15)] == [40] * 15
    assert [point["n"] for point in statistics.calibration_curve(np.full(600, 0.5), labels, bins=15)] == [600]


def test_fit_platt__approaches_unpenalised_logistic_regression():
    rng = np.random.default_rng(7)
    labels = (rng.random(20000) < 0.3).astype(np.int64)
    scores = 40 * (rng.normal(size=20000) + labels) - 100
    slope, intercept = statistics.fit_platt(scores, labels)
    line = LogisticRegression(C=np.inf, tol=1e-8).fit((scores[:, None] + 100) / 40, labels)
    assert slope * 40 == pytest.approx(line.coef_[0, 0], rel=2e-3)
    assert intercept - 100 * slope == pytest.approx(line.intercept_[0], rel=2e-3)


def test_fit_platt__gives_the_base_rate_for_a_constant_score():
    slope, intercept = statistics.fit_platt(np.full(10, -3.3), np.array([1] * 2 + [0] * 8))
    assert slope == 0
    assert expit(intercept) == pytest.approx(0.2)


def test_fit_platt__stays_finite_where_the_score_separates():
    slope, intercept = statistics.fit_platt(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 0, 1, 1]))
    assert 0 < slope < 10
    assert math.isfinite(intercept)


@pytest.mark.parametrize("objective", statistics.THRESHOLDS)
def test_choose_threshold__is_as_good_as_any_cut(rows, objective):
    scores, labels, _ = rows
    probabilities = expit(scores)

    def gain(threshold):
        called = probabilities >= threshold
        tp, fp = (called & (labels == 1)).sum(), (called & (labels == 0)).sum()
        return {
            "youden": tp / labels.sum() - fp / (labels == 0).sum(),
            "f1": 2 * tp / (called.sum() + labels.sum()),
            "accuracy": (called == labels).mean(),
        }[objective]

    threshold = statistics.choose_threshold(probabilities, labels, objective=objective)
    assert gain(threshold) == pytest.approx(max(gain(cut) for cut in [*probabilities, 1.1]))
    assert threshold not in probabilities


def test_choose_threshold__follows_the_majority_where_all_rows_are_alike():
    mostly_right = statistics.choose_threshold(np.full(5, 0.2), np.array([0, 0, 0, 0, 1]))
    mostly_wrong = statistics.choose_threshold(np.full(5, 0.8), np.array([1, 1, 1, 1, 0]))
    assert mostly_right > 0.2
    assert mostly_wrong < 0.8


def test_interval__holds_the_truth_where_rows_of_a_group_are_alike():
    """Four copies of each row add no knowledge: intervals from rows would hold 0.5 about two times in three."""
    rng = np.random.default_rng(11)
    group = np.repeat(np.arange(50), 4)
    weights = statistics.draw_group_weights(50, resamples=300, seed=0)
    held = 0
    for _ in range(200):
        labels = np.repeat(rng.permutation(50) % 2, 4)
        scores = np.repeat(rng.normal(size=50), 4)
        low, high = statistics.interval(statistics.resample_auroc(scores, labels, group=group, weights=weights)[:, 0])
        held += low < 0.5 < high
    assert 0.9 <= held / 200 <= 0.99


def test_over_draws__equals_scipys_t_interval_and_test(rows):
    _, labels, _ = rows
    draws = np.random.default_rng(5).normal(size=(10, 90)) + 0.2 * labels
    aurocs = [roc_auc_score(labels, scores) for scores in draws]
    found = statistics.over_draws(draws, labels)
    test = scipy.stats.ttest_1samp(aurocs, 0.5, alternative="greater")
    two_sided = scipy.stats.ttest_1samp(aurocs, 0.5).confidence_interval(0.95)
    assert found["auroc_by_draw"] == aurocs
    assert found["auroc"] == pytest.approx(np.mean(aurocs), abs=1e-14)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((two_sided.low, two_sided.high), abs=1e-12)
    assert found["p_value"] == pytest.approx(test.pvalue, rel=1e-9)


@pytest.mark.parametrize(("towards", "auroc", "p_value"), [(1, 1.0, 0.0), (0, 0.5, 0.5), (-1, 0.0, 1.0)])
def test_over_draws__that_agree_have_an_interval_of_no_width(rows, towards, auroc, p_value):
    _, labels, _ = rows
    found = statistics.over_draws(np.tile(towards * labels.astype(float), (10, 1)), labels)
    assert (found["auroc"], found["ci_low"], found["ci_high"]) == pytest.approx((auroc, auroc, auroc), abs=1e-12)
    assert found["p_value"] == pytest.approx(p_value, abs=1e-12)
