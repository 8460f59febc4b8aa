"""Nothing of a held-out fold is known before it is scored; leaks are seen; the numbers follow from the predictions."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from jaxsae.artifacts import InputError
from jaxsae.detection import DETECTORS, ProtocolConfig, evaluate, nesting
from jaxsae.detection.baselines import STACKS, make_baselines, parts_of
from jaxsae.detection.nesting import (
    NO_FOLD,
    STACK_CHOICES,
    Fitter,
    fit_stack,
    inner_folds,
    judge,
    nest_baseline,
    nest_stack,
    quiet_single_threaded_blas,
)
from jaxsae.detection.specs import Baseline, Choice
from jaxsae.detection.splits import make_folds, permute_within_groups
from jaxsae.detection.tables import TRACK_FAMILIES
from jaxsae.detection.tracks import FAMILIES, METHOD_CHOICES


@pytest.fixture(scope="module")
def results(tables, config):
    return evaluate(tables, config)


def row_of(results, name):
    return next(row for row in results.detection if row["name"] == name)


def mean_over_repeats(results, name, column):
    mine = results.predictions["detector"] == name
    return results.predictions[column][mine].reshape(2, 120).mean(axis=0)


def changed(tables, **changes):
    return dataclasses.replace(tables, **changes)


# Nesting


class SeenBefore(BaseEstimator):
    """Score 1 for a row that was in the training rows, which hold their own number."""

    def fit(self, inputs, labels):
        self.seen_ = set(inputs[:, 0].tolist())
        return self

    def decision_function(self, inputs):
        return np.array([float(number in self.seen_) for number in inputs[:, 0]])


@pytest.mark.parametrize("scheme", ["neighbours", "all"])
def test_nest_baseline__never_scores_a_row_by_an_estimator_that_saw_it(tables, config, scheme):
    numbers = np.arange(120.0)[:, None]
    spy = Baseline("spy", "", lambda tables, choice: numbers, lambda choice, n_rows, n_columns: SeenBefore())
    fold = make_folds(tables, config)[0]
    nested = nest_baseline(spy, tables, fold, scheme=scheme)
    assert (nested.scores == 0).all()
    for outer in range(4):
        scored = np.isin(fold, inner_folds(4, outer, scheme=scheme))
        assert (nested.inner[outer, scored] == 0).all()
        assert np.isnan(nested.inner[outer, ~scored]).all()


@pytest.mark.parametrize("scheme", ["neighbours", "all"])
def test_labels_of_a_fold__do_not_move_its_own_verdicts(make_inputs, config, scheme):
    tables = make_inputs(seed=4).tables()
    fold = make_folds(tables, config)[0]
    poisoned = changed(tables, labels=np.where(fold == 1, 1 - tables.labels, tables.labels))
    baselines = make_baselines(config.settings, tables.n_layers)
    with quiet_single_threaded_blas():
        nested = [
            {name: nest_baseline(baseline, each, fold, scheme=scheme) for name, baseline in baselines.items()}
            for each in (tables, poisoned)
        ]
    for each, labels in zip(nested, (tables.labels, poisoned.labels), strict=True):
        for name in STACKS:
            each[name] = nest_stack([each[part] for part in parts_of(name, FAMILIES)], labels, fold)
    for name in DETECTORS:
        honest, other = (
            judge(each[name], labels, fold, objective="youden")
            for each, labels in zip(nested, (tables.labels, poisoned.labels), strict=True)
        )
        np.testing.assert_array_equal(honest.probabilities[fold == 1], other.probabilities[fold == 1], err_msg=name)
        np.testing.assert_array_equal(honest.decisions[fold == 1], other.decisions[fold == 1], err_msg=name)
    # The poison is real: the other folds, which learn from it, do move.
    assert (nested[0]["tracks_logistic"].scores != nested[1]["tracks_logistic"].scores)[fold != 1].all()


@pytest.mark.parametrize("choice", STACK_CHOICES)
def test_fit_stack__scores_each_inner_fold_by_a_stack_that_did_not_learn_its_labels(choice, monkeypatch):
    monkeypatch.setattr(nesting, "STACK_CHOICES", (choice,))  # the choice between kinds does read them
    rng = np.random.default_rng(0)
    inputs, labels, fold = rng.normal(size=(90, 2)), rng.integers(2, size=90), np.arange(90) % 3
    inputs[fold == 2] = np.nan
    poisoned = np.where(fold == 0, 1 - labels, labels)
    honest, other = fit_stack(inputs, labels, fold), fit_stack(inputs, poisoned, fold)
    np.testing.assert_array_equal(honest.inner[fold == 0], other.inner[fold == 0])
    assert (honest.inner[fold == 1] != other.inner[fold == 1]).any()
    assert np.isnan(honest.inner[fold == 2]).all()


def test_inner_folds__neighbours_are_mutual():
    assert inner_folds(5, 0, scheme="neighbours") == [1, 4]
    assert inner_folds(5, 2, scheme="all") == [0, 1, 3, 4]
    assert inner_folds(5, NO_FOLD, scheme="neighbours") == [0, 1, 2, 3, 4]
    for outer in range(5):
        assert all(
            outer in inner_folds(5, inner, scheme="neighbours") for inner in inner_folds(5, outer, scheme="neighbours")
        )


def test_nest_baseline__shares_the_estimator_of_each_pair_of_folds(tables, config):
    baseline = make_baselines(config.settings, 3)["length"]
    fold = make_folds(tables, config)[0]
    assert nest_baseline(baseline, tables, fold, scheme="all").n_fits == 6 + 4
    assert nest_baseline(baseline, tables, fold, scheme="neighbours").n_fits == 4 + 4


def test_select__chooses_the_layer_that_tells(tables, config):
    resid = tables.resid.astype(np.float32)
    resid[:, 1, 0, 2] += 3 * tables.labels
    planted = changed(tables, resid=resid)
    baselines = make_baselines(config.settings, 3)
    fold = make_folds(planted, config)[0]
    nested = nest_baseline(baselines["probe_last_prompt"], planted, fold, scheme="neighbours")
    assert nested.chosen == (Choice(1, 0.03),) * 4
    assert roc_auc_score(planted.labels, nested.scores) > 0.9


def test_sae_detectors__choose_the_layer_of_a_planted_latent(tables, config):
    ids, activations = tables.feature_ids.copy(), tables.activations.copy()
    ids[:, 2, 1][ids[:, 2, 1] == 7] = 8
    ids[tables.labels == 1, 2, 1, 0] = 7
    activations[tables.labels == 1, 2, 1, 0] = 5
    planted = changed(tables, feature_ids=ids, activations=activations)
    fold = make_folds(planted, config)[0]
    for name in ("sae_logistic", "sae_best_latent"):
        nested = nest_baseline(make_baselines(config.settings, 3)[name], planted, fold, scheme="neighbours")
        assert {choice.layer for choice in nested.chosen} == {2}
        assert roc_auc_score(planted.labels, nested.scores) > 0.95


def test_fitter__counts_fits_that_did_not_converge(tables):
    def hasty(choice, n_rows, n_columns):
        return LogisticRegression(max_iter=1, C=1e6)

    fitter = Fitter(Baseline("hasty", "", lambda tables, choice: tables.track_metrics, hasty), tables.labels)
    with pytest.warns(UserWarning, match="failed to converge"):
        fitter.fit(tables.track_metrics, np.ones(120, dtype=bool), Choice())
    assert (fitter.n_fits, fitter.n_unconverged) == (1, 1)


# Splits and leaks


def test_make_folds__keep_groups_whole_and_classes_balanced(tables, config):
    folds = make_folds(tables, config)
    assert folds.shape == (2, 120)
    assert (folds[0] != folds[1]).any()
    for fold in folds:
        of_group = {}
        for group, number in zip(tables.groups, fold, strict=True):
            assert of_group.setdefault(group, number) == number
        rates = [tables.labels[fold == number].mean() for number in range(4)]
        assert max(rates) - min(rates) < 0.15


def test_splits__carry_the_hash_of_ids_and_folds(results):
    predictions = results.predictions
    for split in results.splits:
        mine = (predictions["detector"] == "length") & (predictions["repeat"] == split["repeat"])
        lines = sorted(f"{n}\t{f}\n" for n, f in zip(predictions["id"][mine], predictions["fold"][mine], strict=True))
        assert split["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
        assert sum(split["rows"]) == 120
        assert sum(split["groups"]) == 60


def test_canary__sees_texts_in_two_folds_and_grouping_ends_it(make_inputs):
    inputs = make_inputs(n_groups=40, per_group=6)
    first = {answer.group: answer for answer in reversed(inputs.answers)}
    inputs.answers = [
        dataclasses.replace(
            answer, question=answer.group, answer=first[answer.group].answer, label=first[answer.group].label
        )
        for answer in inputs.answers
    ]
    tables = inputs.tables()
    config = ProtocolConfig(repeats=1, bootstrap=300, trees=30, detectors=("class_prior",), method="class_prior")
    leaky = evaluate(changed(tables, groups=tables.ids), config)
    honest = evaluate(tables, config)
    assert leaky.canary["ci_low"] > 0.9
    assert leaky.controls["text_overlap"]["texts"] == 40
    assert leaky.controls["text_overlap"]["rows"] > 200
    assert honest.canary["ci_low"] < 0.5 < honest.canary["ci_high"]
    assert honest.controls["text_overlap"]["texts"] == honest.controls["text_overlap"]["rows"] == 0


def test_evaluate__finds_nothing_in_noise(make_inputs):
    """Scores of 600 rows vary by .024, cross-validated ones on noise by sqrt(2) more: .1 is three deviations."""
    tracks = ("tracks_best", "tracks_forest", "tracks_logistic", *(f"tracks_{name}" for name in TRACK_FAMILIES))
    names = ("length", "answer_tfidf", "probe_last_prompt", "sae_logistic", *tracks, "stack")
    config = ProtocolConfig(repeats=1, bootstrap=100, trees=10, detectors=names, probe_c=(0.03,))
    found = evaluate(make_inputs(n_groups=300).tables(), config)
    for row in found.detection:
        assert abs(row["auroc"] - 0.5) < 0.1, row["name"]
    assert found.canary["ci_low"] < 0.5 < found.canary["ci_high"]


def test_evaluate__finds_a_planted_signal(tables, config):
    metrics = tables.track_metrics.copy()
    metrics[:, 3] = tables.labels + 0.1 * metrics[:, 3]
    found = evaluate(changed(tables, track_metrics=metrics), dataclasses.replace(config, repeats=1))
    for name in ("tracks_best", "tracks_forest", "tracks_logistic", "stack_tracks"):
        row = row_of(found, name)
        assert row["auroc"] > 0.99, name
        assert row["accuracy"] > 0.95, name
        assert row["brier"] < 0.1, name
    gain = next(each for each in found.differences if each["name"] == "stack_tracks_over_stack")
    assert gain["ci_low"] > 0.2
    assert found.controls["within_group_permutation"]["auroc"] < 0.9


def test_permute_within_groups__keeps_each_groups_labels():
    group = np.repeat(np.arange(50), 4)[np.random.default_rng(0).permutation(200)]
    labels = np.random.default_rng(1).integers(2, size=200)
    permuted = permute_within_groups(labels, group, seed=0)
    assert (permuted != labels).any()
    np.testing.assert_array_equal(np.bincount(group, weights=permuted), np.bincount(group, weights=labels))


# The table


def test_detection__follows_from_the_predictions(tables, results):
    labels = tables.labels
    assert [row["name"] for row in results.detection] == list(DETECTORS)
    for row in results.detection:
        scores = mean_over_repeats(results, row["name"], "score")
        probabilities = mean_over_repeats(results, row["name"], "probability")
        assert row["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert row["pr_auc"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        assert row["brier"] == pytest.approx(brier_score_loss(labels, probabilities), abs=1e-12)
        assert row["ci_low"] <= row["auroc"] <= row["ci_high"]
        assert (row["n"], row["n_groups"], row["base_rate"]) == (120, 60, labels.mean())
        assert 0 < probabilities.min() <= probabilities.max() < 1
        assert len(row["auroc_by_repeat"]) == 2


def test_logprob_rows__are_the_auroc_of_the_plain_logprob(tables, results):
    for index, name in enumerate(["logprob_mean", "logprob_min", "logprob_sum", "logprob_first"]):
        expected = roc_auc_score(tables.labels, -tables.logprobs[:, index])
        assert row_of(results, name)["auroc"] == pytest.approx(expected, abs=1e-12)


def test_class_prior__is_the_rate_of_the_other_folds(tables, results):
    mine = (results.predictions["detector"] == "class_prior") & (results.predictions["repeat"] == 0)
    fold, scores = results.predictions["fold"][mine], results.predictions["score"][mine]
    for number in range(4):
        np.testing.assert_allclose(scores[fold == number], tables.labels[fold != number].mean())


def test_predictions__hold_every_row_once_per_detector_and_repeat(tables, results):
    predictions = results.predictions
    assert list(predictions)[:7] == ["id", "group", "repeat", "fold", "label", "detector", "score"]
    keys = set(zip(predictions["id"], predictions["repeat"], predictions["detector"], strict=True))
    assert len(keys) == len(predictions["score"]) == 120 * 2 * len(DETECTORS)


def test_differences__are_paired_and_against_the_best_baseline(results):
    auroc = {row["name"]: row["auroc"] for row in results.detection}
    plain = ["length", "logprob_mean", "logprob_min", "logprob_sum", "logprob_first"]
    names = [row["name"] for row in results.differences]
    plain += ["entropy_mean", "entropy_max"]
    assert names == [
        "tracks_best_over_best_baseline",
        "stack_over_best_baseline",
        "stack_tracks_over_best_baseline",
        "stack_tracks_over_stack",
        "tracks_best_over_tracks_forest",
        "tracks_logistic_over_none",
        "tracks_logistic_over_shuffled",
        "tracks_logistic_over_random_decoders",
        "tracks_logistic_over_neurons",
    ]
    for row in results.differences:
        assert row["difference"] == pytest.approx(auroc[row["a"]] - auroc[row["b"]], abs=1e-12)
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]
    assert auroc[results.differences[0]["b"]] == max(auroc[name] for name in plain)


def test_differences__of_equal_scores_have_no_width(tables, config):
    twins = changed(tables, logprobs=np.repeat(tables.logprobs[:, :1], 4, axis=1))
    names = ("logprob_mean", "logprob_sum")
    chosen = dataclasses.replace(config, detectors=names, method="logprob_sum", repeats=1)
    (row,) = evaluate(twins, chosen).differences
    assert (row["a"], row["b"]) == ("logprob_sum", "logprob_mean")
    assert (row["difference"], row["ci_low"], row["ci_high"]) == (0, 0, 0)


def test_by_category__sets_its_hallucinated_answers_against_all_right_ones(tables, results):
    scores = -tables.logprobs[:, 0]
    member = np.array(tables.categories) == "misconception"
    (row,) = (r for r in results.by_category if (r["category"], r["detector"]) == ("misconception", "logprob_mean"))
    used = member | (tables.labels == 0)
    assert row["auroc"] == pytest.approx(roc_auc_score(tables.labels[used], scores[used]))
    assert row["within_auroc"] == pytest.approx(roc_auc_score(tables.labels[member], scores[member]))
    assert row["ci_low"] < row["auroc"] < row["ci_high"]
    assert row["within_ci_low"] < row["within_auroc"] < row["within_ci_high"]
    assert row["n_wrong"] == tables.labels[member].sum()
    assert row["n_right"] == (tables.labels[member] == 0).sum()
    assert {row["detector"] for row in results.by_category} == {
        "logprob_mean", "logprob_min", "logprob_sum", "logprob_first", "entropy_mean", "entropy_max", "tracks_best",
        "stack", "stack_tracks",
    }  # fmt: skip


def test_by_category__says_none_where_rows_are_too_few(tables, config):
    right = np.flatnonzero(tables.labels == 0)[:3]
    wrong = np.flatnonzero(tables.labels == 1)[:9]
    categories = np.full(120, "rest", dtype=object)
    categories[right], categories[wrong] = "no_error", "few"
    chosen = dataclasses.replace(config, detectors=("logprob_mean",), method="logprob_mean", repeats=1)
    found = evaluate(changed(tables, categories=tuple(categories)), chosen)
    rows = {row["category"]: row for row in found.by_category}
    assert rows["no_error"]["auroc"] is rows["no_error"]["ci_low"] is None
    assert rows["few"]["auroc"] is not None
    assert rows["few"]["within_auroc"] is rows["few"]["within_ci_low"] is None
    assert evaluate(changed(tables, categories=("",) * 120), chosen).by_category == []


def test_counts__add_up(tables, results):
    counts = results.counts
    assert counts["rows"] == counts["right"] + counts["hallucinated"] == 120
    assert counts["groups"] == 60
    assert counts["empty_answers"] == tables.n_empty
    assert sum(sum(category.values()) for category in counts["categories"].values()) == 120
    assert counts["unconverged_fits"] == 0
    # Single ones, three probes and two SAE detectors of three layers, three families, the method, two stacks.
    assert counts["choices_tried"] == 18 + 3 * 3 + 2 * 3 + 3 * 3 + len(METHOD_CHOICES) + 2 * 2
    # Per repeat with 4 folds: 4 inner + 4 outer for one setting, 3 x 4 + 4 for three layers; the L1 detector's inner
    # fits depend on the layers chosen.
    assert counts["fits"] > 2 * (16 * 8 + 4 * 16)


def test_summary__is_json(results):
    text = json.dumps(results.summary(), allow_nan=False)
    assert json.loads(text)["config"]["folds"] == 4


def test_evaluate__gives_the_same_bits_again_on_any_number_of_threads(tables, config, results):
    again = evaluate(tables, dataclasses.replace(config, n_jobs=1))
    for column, values in results.predictions.items():
        np.testing.assert_array_equal(values, again.predictions[column], err_msg=column)
    once, twice = results.summary(), again.summary()
    assert once.pop("config") != twice.pop("config")
    assert once == twice


def test_evaluate__reports_each_step(tables, config):
    seen = []
    chosen = dataclasses.replace(config, detectors=("length", "logprob_mean"), method="length", repeats=2)
    evaluate(tables, chosen, progress=lambda done, total, what: seen.append((done, total, what)))
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total, _ in seen} == {len(seen)}
    assert {"length 1", "control noise 0", "interval of length"} <= {what for _, _, what in seen}


def test_evaluate__passes_on_an_error_of_a_step(tables, config):
    chosen = dataclasses.replace(config, sae_position="pooled")
    with pytest.raises(InputError, match="asks for pooled"):
        evaluate(tables, chosen)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": 2}, r"detection.folds is 2, expected at least 3"),
        ({"repeats": 0}, r"detection.repeats is 0, expected at least 1"),
        ({"bootstrap": 0}, r"detection.bootstrap is 0"),
        ({"trees": 0}, r"detection.trees is 0"),
        ({"seed": -1}, r"detection.seed is -1"),
        ({"n_jobs": 0}, r"detection.n_jobs is 0"),
        ({"probe_c": ()}, r"detection.probe_c is \(\)"),
        ({"probe_c": (0.1, 0.0)}, r"detection.probe_c is \(0.1, 0.0\)"),
        ({"sae_penalty": 0.0}, r"detection.sae_penalty is 0.0"),
        ({"threshold": "best"}, r"detection.threshold is 'best', expected one of youden, f1, accuracy"),
        ({"inner": "none"}, r"detection.inner is 'none', expected one of neighbours, all"),
        ({"detectors": ("lenght",)}, r"detection.detectors is 'lenght', expected one of class_prior, length"),
        ({"method": "tracks"}, r"detection.method is 'tracks'"),
        ({"deploy": "answer_tfidf"}, r"detection.deploy is 'answer_tfidf'"),
    ],
)
def test_config__refuses_values_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        ProtocolConfig(**changes)


def test_evaluate__refuses_rows_without_label(tables, config):
    labels = tables.labels.copy()
    labels[[8, 30]] = -1
    with pytest.raises(InputError, match=r"2 of 120 answers, first 'row8', have no label"):
        evaluate(changed(tables, labels=labels), config)


def test_evaluate__refuses_one_class(tables, config):
    with pytest.raises(InputError, match=r"got 0 hallucinated and 120 right in 120"):
        evaluate(changed(tables, labels=np.zeros(120, dtype=np.int64)), config)


def test_evaluate__refuses_fewer_groups_than_folds(tables, config):
    groups = tuple(f"g{row % 3}" for row in range(120))
    with pytest.raises(InputError, match=r"120 answers lie in 3 groups, expected at least detection.folds=4"):
        evaluate(changed(tables, groups=groups), config)


def test_evaluate__refuses_a_class_in_too_few_groups(tables, config):
    labels = (np.arange(120) < 5).astype(np.int64)
    with pytest.raises(InputError, match=r"the 5 hallucinated answers lie in 3 of 60 groups, expected at least"):
        evaluate(changed(tables, labels=labels), config)


def test_evaluate__refuses_a_fold_without_one_class(tables, config, monkeypatch):
    class OneSided:
        def __init__(self, *args, **kwargs):
            pass

        def split(self, inputs, labels, groups):
            wrong = np.flatnonzero(labels == 1)
            rest = np.flatnonzero(labels == 0)
            for part in (rest[:20], wrong[:20], rest[20:], wrong[20:]):
                yield None, part

    monkeypatch.setattr("jaxsae.detection.splits.StratifiedGroupKFold", OneSided)
    with pytest.raises(InputError, match=r"fold 0 got 0 hallucinated and 20 right answers of 120"):
        evaluate(tables, config)
