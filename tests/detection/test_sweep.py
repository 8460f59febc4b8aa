"""Choosing between settings: inside validation it is worth what it says, on the test rows it is not."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from jaxsae.artifacts import InputError
from jaxsae.detection import ProtocolConfig, evaluate
from jaxsae.detection.splits import make_folds
from jaxsae.detection.statistics import draw_group_weights
from jaxsae.detection.sweep import ANY, MEASURES, Point, Resamples, Rows, fit_point, judge_points, published_error

DETECTORS = ("tracks_logistic", "length")


def with_metrics(tables, *, seed, signal=0.0):
    """Return the tables with other track metrics: noise, and in the first column the label times `signal` besides."""
    metrics = np.random.default_rng([seed, 9]).normal(size=tables.track_metrics.shape)
    metrics[:, 0] += signal * tables.labels
    return dataclasses.replace(tables, track_metrics=metrics)


@pytest.fixture(scope="module")
def protocol():
    return ProtocolConfig(
        folds=4, repeats=2, bootstrap=400, detectors=DETECTORS, method=DETECTORS[0], trees=5, n_jobs=1
    )


@pytest.fixture(scope="module")
def many(make_inputs):
    """400 answers of 200 groups."""
    return make_inputs(n_groups=200, seed=3).tables()


def sweep(tables, protocol, settings):
    """Return rows and points of track metrics that differ in their seed and signal, by name."""
    folds, known = make_folds(tables, protocol), {}
    points = {
        name: fit_point(with_metrics(tables, **changes), protocol, folds=folds, known=known)
        for name, changes in settings.items()
    }
    return Rows(tables.labels, tables.group_index, folds), points


@pytest.fixture(scope="module")
def noise(many, protocol):
    return sweep(many, protocol, {f"noise {seed}": {"seed": seed} for seed in range(30)})


@pytest.fixture(scope="module")
def planted(many, protocol):
    settings = {f"noise {seed}": {"seed": seed} for seed in range(6)} | {"signal": {"seed": 6, "signal": 1.5}}
    return sweep(many, protocol, settings)


def test_fit_point__gives_the_scores_and_measures_of_evaluate(tables, protocol):
    results = evaluate(tables, protocol)
    folds = make_folds(tables, protocol)
    point = fit_point(tables, protocol, folds=folds)
    rows = Rows(tables.labels, tables.group_index, folds)
    judged = judge_points(rows, {"one": point}, DETECTORS, resamples=protocol.bootstrap, seed=protocol.seed)
    for place, name in enumerate(DETECTORS):
        mine = results.predictions["detector"] == name
        np.testing.assert_array_equal(point.scores[place].ravel(), results.predictions["score"][mine])
        np.testing.assert_array_equal(point.probabilities[place].ravel(), results.predictions["probability"][mine])
        (theirs,) = (row for row in results.detection if row["name"] == name)
        (ours,) = (row for row in judged["settings"] if row["detector"] == name)
        keys = {**{key: key for key in MEASURES}, "auroc_ci_low": "ci_low", "auroc_ci_high": "ci_high"}
        assert {key: ours[key] for key in keys} == pytest.approx(
            {key: theirs[of] for key, of in keys.items()}, abs=1e-15
        )
        choice = judged["choices"][place]
        assert choice["nested"]["auroc"]["value"] == pytest.approx(theirs["auroc"], abs=1e-15)
        assert (choice["optimism"]["value"], choice["optimism"]["ci_high"]) == (0, 0)


def test_fit_point__keeps_what_does_not_read_tracks_and_gives_the_same_with_and_without(tables, protocol):
    folds, known = make_folds(tables, protocol), {}
    first = fit_point(tables, protocol, folds=folds, known=known)
    assert {key[0] for key in known} == {"length"}
    again = fit_point(tables, protocol, folds=folds, known=known)
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)


def test_point__comes_back_from_its_arrays(planted):
    point = planted[1]["signal"]
    again = Point.from_arrays({**point.arrays(), "identity": np.array("x")})
    for field in dataclasses.fields(Point):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(point, field.name))


def test_choice__takes_the_setting_that_knows_something_and_says_what_it_is_worth(planted):
    rows, points = planted
    choice = judge_points(rows, points, DETECTORS, resamples=400, reference="noise 0")["choices"][0]
    assert {row["setting"] for row in choice["chosen"]} == {"signal"}
    truth = roc_auc_score(rows.labels, points["signal"].scores[0].mean(axis=0))
    assert choice["nested"]["auroc"]["value"] == truth
    assert truth == pytest.approx(0.856, abs=0.04)  # two normals 1.5 apart; on 400 rows with a standard error of 0.018
    assert choice["naive"]["setting"] == choice["to_use"]["setting"] == "signal"
    assert choice["optimism"]["value"] == 0
    assert choice["gain"]["over"] == "noise 0"
    assert choice["gain"]["ci_low"] > 0.2


def test_choice__on_noise_is_worth_nothing_where_the_naive_pick_looks_like_something(noise):
    rows, points = noise
    judged = judge_points(rows, points, DETECTORS, resamples=400)
    choice = judged["choices"][0]
    nested, naive, optimism = choice["nested"]["auroc"], choice["naive"], choice["optimism"]
    assert choice["n_candidates"] == 30
    assert nested["ci_low"] < 0.5 < nested["ci_high"]
    assert naive["value"] > 0.55
    (picked,) = (
        row for row in judged["settings"] if (row["setting"], row["detector"]) == (naive["setting"], "tracks_logistic")
    )
    assert picked["auroc_ci_low"] > 0.5  # what a table of 30 settings would have shown as a finding
    assert optimism["value"] == naive["value"] - nested["value"]
    assert optimism["value"] > 0.03
    assert optimism["ci_low"] > 0


def test_choice__has_not_seen_the_labels_of_its_fold(many, protocol):
    """With the labels of one fold turned over, what is chosen for that fold stays, to the last digit of its reasons."""
    folds = make_folds(many, protocol)
    settings = {f"noise {seed}": with_metrics(many, seed=seed) for seed in range(5)}
    of_fold = folds[0] == 2
    turned = np.where(of_fold, 1 - many.labels, many.labels)

    def chosen(labels):
        points = {
            name: fit_point(dataclasses.replace(table, labels=labels), protocol, folds=folds)
            for name, table in settings.items()
        }
        choices = judge_points(Rows(labels, many.group_index, folds), points, DETECTORS, resamples=100)["choices"]
        return [row for choice in choices for row in choice["chosen"] if (row["repeat"], row["fold"]) == (0, 2)]

    before, after = chosen(many.labels), chosen(turned)
    assert before == after
    assert len(before) == 3  # two detectors, and either of them


def test_choice__of_any_detector_is_among_all_and_ranks_probabilities(planted):
    rows, points = planted
    judged = judge_points(rows, points, DETECTORS, resamples=100)
    choice = judged["choices"][-1]
    assert choice["detector"] == ANY
    assert choice["n_candidates"] == 14
    assert {(row["detector"], row["setting"]) for row in choice["chosen"]} == {("tracks_logistic", "signal")}
    expected = roc_auc_score(rows.labels, points["signal"].probabilities[0].mean(axis=0))
    assert choice["nested"]["auroc"]["value"] == expected


def test_choice__takes_no_setting_for_a_fold_it_is_not_allowed_in(planted):
    rows, points = planted
    allowed = {name: np.ones((2, 4), dtype=bool) for name in points}
    allowed["signal"][1, 3] = False
    choice = judge_points(rows, points, DETECTORS, resamples=100, allowed=allowed)["choices"][0]
    others = [row["setting"] for row in choice["chosen"] if (row["repeat"], row["fold"]) != (1, 3)]
    (kept_out,) = (row for row in choice["chosen"] if (row["repeat"], row["fold"]) == (1, 3))
    assert set(others) == {"signal"}
    assert kept_out["setting"] != "signal"
    assert kept_out["n_candidates"] == 6


def test_naive_pick__is_made_anew_in_each_resample(noise):
    rows, points = noise
    judged = judge_points(rows, points, ("tracks_logistic", "length"), resamples=200, seed=5)
    weights = draw_group_weights(int(rows.group.max()) + 1, resamples=200, seed=5)[:, rows.group]
    drawn = [
        max(roc_auc_score(rows.labels, p.scores[0].mean(axis=0), sample_weight=each) for p in points.values())
        for each in weights[:15]
    ]
    resamples = Resamples(rows, resamples=200, seed=5)
    ours = np.max([resamples.measure("auroc", p.scores[0], p.decisions[0])[1] for p in points.values()], axis=0)
    np.testing.assert_allclose(ours[:15], drawn, rtol=1e-12)
    assert judged["choices"][0]["naive"]["ci_low"] == np.percentile(ours, 2.5)


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_resamples__of_decisions_equal_a_plain_loop(noise, metric):
    rows, points = noise
    decisions = points["noise 4"].decisions[0]
    value, drawn = Resamples(rows, resamples=150, seed=2).measure(metric, points["noise 4"].scores[0], decisions)
    weights = draw_group_weights(int(rows.group.max()) + 1, resamples=150, seed=2)[:, rows.group]
    labels, said = np.tile(rows.labels, 2), decisions.ravel().astype(int)

    def plain(weight):
        if metric == "f1":
            return f1_score(labels, said, sample_weight=weight)
        return np.average(labels == said, weights=weight)

    assert value == pytest.approx(plain(None), abs=1e-14)
    np.testing.assert_allclose(drawn, [plain(np.tile(each, 2)) for each in weights], rtol=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_choice__goes_by_the_metric_asked_for(planted, metric):
    rows, points = planted
    choice = judge_points(rows, points, DETECTORS, metric=metric, resamples=100)["choices"][0]
    assert {row["setting"] for row in choice["chosen"]} == {"signal"}
    assert choice["metric"] == metric
    assert choice["naive"]["value"] == choice["nested"][metric]["value"]


def test_judge_points__refuses_a_sweep_of_nothing(noise):
    with pytest.raises(InputError, match=r"tried no setting; name some in sweep\.settings or sweep\.axes"):
        judge_points(noise[0], {}, DETECTORS)


def test_published_error__of_chance_is_that_of_the_rank_sum():
    n = 20
    assert published_error("auroc", 0.5, 2 * n) == pytest.approx(np.sqrt((2 * n + 1) / (12 * n * n)), rel=1e-12)


def test_published_error__is_that_of_the_published_run_and_none_without_a_formula():
    assert published_error("auroc", 0.7122, 45) == pytest.approx(0.0773, abs=5e-5)
    assert published_error("accuracy", 33 / 45, 45) == pytest.approx(0.0659, abs=5e-5)
    assert published_error("f1", 0.57, 45) is None
