"""Detectors on tracks: each family's finds what its family tells, the method finds which, and neither sees a label."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC

from jaxsae.artifacts import InputError
from jaxsae.detection import Family, ProtocolConfig, evaluate
from jaxsae.detection.baselines import make_baselines, stack_parts, text_noise
from jaxsae.detection.estimators import MeanProbability
from jaxsae.detection.nesting import fit_stack, nest_baseline, nest_stack, quiet_single_threaded_blas
from jaxsae.detection.specs import Choice
from jaxsae.detection.splits import make_folds
from jaxsae.detection.tables import TRACK_FAMILIES
from jaxsae.detection.tracks import FAMILIES, FAMILY_DETECTORS, METHOD_CHOICES, method_choices


def plant(tables, name, signal):
    """Return the tables with a signal in one column of one family, or of the metrics."""
    if name == "metrics":
        metrics = tables.track_metrics.copy()
        metrics[:, 2] += signal
        return dataclasses.replace(tables, track_metrics=metrics)
    matrix = tables.track_families[name].matrix.copy()
    if isinstance(matrix, sp.csr_matrix):
        matrix = matrix.tolil()
        matrix[:, 2] = np.abs(signal)[:, None]
        matrix = matrix.tocsr()
    else:
        matrix[:, 2] += signal
    families = dict(tables.track_families) | {name: Family(matrix, tables.track_families[name].columns)}
    return dataclasses.replace(tables, track_families=families)


def nest(tables, config, name, fold, labels=None):
    with quiet_single_threaded_blas():
        return nest_baseline(
            make_baselines(config.settings, tables.n_layers)[name], tables, fold, scheme="neighbours", labels=labels
        )


@pytest.mark.parametrize("family", TRACK_FAMILIES)
def test_family_detectors__find_a_signal_in_their_family_and_in_no_other(tables, config, family):
    planted = plant(tables, family, 3.0 * tables.labels)
    fold = make_folds(planted, config)[0]
    for name in TRACK_FAMILIES:
        auroc = roc_auc_score(planted.labels, nest(planted, config, f"tracks_{name}", fold).scores)
        assert auroc > 0.9 if name == family else 0.3 < auroc < 0.7, name


@pytest.mark.parametrize("family", ["metrics", "concepts", "late_births"])
def test_method__chooses_configurations_that_read_the_family_that_tells(tables, config, family):
    planted = plant(tables, family, 3.0 * tables.labels)
    fold = make_folds(planted, config)[0]
    nested = nest(planted, config, "tracks_best", fold)
    assert roc_auc_score(planted.labels, nested.scores) > 0.9
    assert all(family in choice.families.split("+") for choice in nested.chosen)


def test_method__chooses_without_the_labels_of_the_fold_it_is_scored_on(tables, config):
    rng = np.random.default_rng(0)
    config = dataclasses.replace(config, families=("metrics", "late_births"))
    fold = make_folds(tables, config)[0]
    honest = nest(tables, config, "tracks_best", fold)
    for outer in range(4):
        labels = tables.labels.copy()
        here = np.flatnonzero(fold == outer)
        labels[here] = rng.permutation(labels[here])
        assert (labels != tables.labels).any()
        other = nest(tables, config, "tracks_best", fold, labels)
        assert other.chosen[outer] == honest.chosen[outer]
        np.testing.assert_array_equal(other.scores[here], honest.scores[here])
        np.testing.assert_array_equal(other.inner[outer], honest.inner[outer])
        assert (other.scores != honest.scores)[fold != outer].any()  # those that learn from the fold do move


def test_method__sees_a_planted_leak_and_grouping_ends_it(make_inputs):
    """Six rows of a group share one text, and the family is noise of the text: only a split of the group tells."""
    inputs = make_inputs(n_groups=40, per_group=6)
    first = {answer.group: answer for answer in reversed(inputs.answers)}
    inputs.answers = [dataclasses.replace(answer, label=first[answer.group].label) for answer in inputs.answers]
    tables = inputs.tables()
    noise = text_noise(tables.groups, n_columns=9, seed=0)
    tables = dataclasses.replace(tables, track_families=dict(tables.track_families) | {"late_births": Family(noise)})
    config = ProtocolConfig(trees=10, families=("late_births",), method="class_prior")
    leaky, honest = (
        nest(each, config, "tracks_best", make_folds(each, config)[0])
        for each in (dataclasses.replace(tables, groups=tables.ids), tables)
    )
    assert roc_auc_score(tables.labels, leaky.scores) > 0.9
    assert 0.2 < roc_auc_score(tables.labels, honest.scores) < 0.8  # 40 groups: a standard error of .09


def test_method_choices__are_those_that_read_nothing_else():
    assert method_choices(FAMILIES) == METHOD_CHOICES
    assert len(set(METHOD_CHOICES)) == len(METHOD_CHOICES)
    assert {choice.families for choice in method_choices(("metrics", "concepts"))} == {"metrics", "concepts"}
    assert {choice.model for choice in METHOD_CHOICES if choice.families == "metrics"} == {
        "forest", "logistic", "boosting", "svm", "mean",
    }  # fmt: skip


def test_families__that_are_off_are_neither_made_nor_chosen(tables, config):
    chosen = dataclasses.replace(config, families=("metrics", "late_births"), repeats=1, bootstrap=100)
    without = dataclasses.replace(tables, track_families={"late_births": tables.track_families["late_births"]})
    found = evaluate(without, chosen)
    names = [row["name"] for row in found.detection]
    assert {"tracks_forest", "tracks_late_births", "tracks_best", "stack_tracks"} <= set(names)
    assert not {"tracks_prompt", "tracks_profiles", "tracks_concepts"} & set(names)
    (method,) = (row for row in found.detection if row["name"] == "tracks_best")
    assert method["n_choices"] == len(method_choices(chosen.families)) == 7
    assert {each["families"] for each in method["chosen"]} <= {"metrics", "late_births"}
    assert [(row["kind"], row["family"]) for row in found.ablations] == [
        ("added", "metrics"), ("added", "late_births"), ("removed", "metrics"), ("removed", "late_births"),
    ]  # fmt: skip


def test_ablations__are_differences_of_stacks_with_and_without_the_family(tables, config):
    planted = plant(tables, "prompt", 1.0 * tables.labels)
    chosen = dataclasses.replace(config, repeats=1, families=("metrics", "prompt", "profiles"), bootstrap=100)
    found = evaluate(planted, chosen)
    fold = make_folds(planted, chosen)[0]
    nested = {name: nest(planted, chosen, name, fold) for name in stack_parts(chosen.families)}

    def auroc(families):
        with quiet_single_threaded_blas():
            stack = nest_stack([nested[part] for part in stack_parts(families)], planted.labels, fold)
        return roc_auc_score(planted.labels, stack.scores)

    rows = {(row["kind"], row["family"]): row for row in found.ablations}
    assert rows["added", "prompt"]["difference"] == pytest.approx(auroc(("prompt",)) - auroc(()), abs=1e-12)
    lost = auroc(chosen.families) - auroc(("metrics", "profiles"))
    assert rows["removed", "prompt"]["difference"] == pytest.approx(lost, abs=1e-12)
    assert rows["added", "prompt"]["ci_low"] > 0 > rows["added", "profiles"]["ci_low"]
    for row in rows.values():
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]
        assert row["difference"] == pytest.approx(row["auroc"] - row["auroc_without"], abs=1e-12)


def test_stack__chooses_boosting_where_no_line_tells():
    rng = np.random.default_rng(0)
    inputs, fold = rng.normal(size=(600, 2)), np.arange(600) % 3
    inputs[fold == 2] = np.nan
    line, ring = inputs[:, 0] + rng.normal(size=600) > 0, np.nan_to_num(np.abs(inputs[:, 0])) > 0.7
    with quiet_single_threaded_blas():
        assert fit_stack(inputs, line.astype(int), fold).choice == Choice(model="logistic")
        fitted = fit_stack(inputs, ring.astype(int), fold)
    assert fitted.choice == Choice(model="boosting")
    known = fold != 2
    assert roc_auc_score(ring[known], fitted.inner[known]) > 0.95


def test_mean_probability__is_the_mean_over_members():
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(80, 3)), rng.integers(2, size=80)
    members = [RandomForestClassifier(5, random_state=0), LogisticRegression(), SVC()]
    mean = MeanProbability(members).fit(inputs, labels).predict_proba(inputs)
    forest, logistic, svm = (member.fit(inputs, labels) for member in members)
    expected = forest.predict_proba(inputs)[:, 1] + logistic.predict_proba(inputs)[:, 1]
    expected += 1 / (1 + np.exp(-svm.decision_function(inputs)))
    np.testing.assert_allclose(mean[:, 1], expected / 3, rtol=1e-12)
    np.testing.assert_allclose(mean.sum(axis=1), 1, rtol=1e-12)


def test_families__are_named_where_they_are_missing(tables, config):
    fold = make_folds(tables, config)[0]
    bare = dataclasses.replace(tables, track_families={})
    with pytest.raises(InputError, match=r"no family 'profiles', of detection.families; run jaxsae track --redo"):
        nest(bare, config, "tracks_profiles", fold)
    with pytest.raises(InputError, match=r"detection.families is 'neurons', expected one of metrics, prompt"):
        dataclasses.replace(config, families=("neurons",))
    with pytest.raises(InputError, match=r"detection.families is empty"):
        dataclasses.replace(config, families=())
    assert set(FAMILY_DETECTORS) == set(FAMILIES)
