"""Every number of the results stands in the long table once, with its interval and a definition."""

import dataclasses

import pytest

from jaxsae.detection import evaluate, tidy
from jaxsae.detection.tidy import COLUMNS


@pytest.fixture(scope="module")
def results(tables, config):
    names = ("length", "logprob_sum", "tracks_logistic", "tracks_none")
    chosen = {"repeats": 1, "detectors": names, "method": "tracks_logistic", "curves": ("tracks_logistic",)}
    return evaluate(tables, dataclasses.replace(config, **chosen))


def test_tidy__gives_every_row_its_columns_and_a_definition(results):
    rows = tidy(results)
    assert all(tuple(row) == COLUMNS for row in rows)
    assert all(row["definition"] and row["table"] and row["measure"] for row in rows)
    keys = [(row["table"], row["detector"], row["against"], row["setting"], row["measure"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row["table"] for row in rows} == {
        *("detection", "risk_coverage", "controls", "differences", "few_labels", "label_noise", "by_category"),
    }


def test_tidy__holds_the_numbers_of_the_results(results):
    rows = tidy(results)
    found = {(row["table"], row["detector"], row["setting"], row["measure"]): row for row in rows}
    for row in results.detection:
        auroc = found["detection", row["name"], None, "auroc"]
        assert [auroc[key] for key in ("value", "ci_low", "ci_high", "n", "n_groups")] == [
            *(row["auroc"], row["ci_low"], row["ci_high"], 120, 60),
        ]
        for measure in ("p_value", "brier", "ece_isotonic", "aurc", "f1"):
            assert found["detection", row["name"], None, measure]["value"] == row[measure]
            assert found["detection", row["name"], None, measure]["ci_low"] is None
        for point in row["risk_coverage"]:
            assert found["risk_coverage", row["name"], point["coverage"], "risk"]["value"] == point["risk"]
    compared = {(row["detector"], row["against"]): row["value"] for row in rows if row["table"] == "differences"}
    assert compared == {(row["a"], row["b"]): row["difference"] for row in results.differences}
    for row in results.curves:
        assert found[row["kind"], row["detector"], row["share"], "auroc"]["value"] == row["auroc"]
    for row in results.by_category:
        within = found["by_category", row["detector"], row["category"], "within_auroc"]
        assert (within["value"], within["ci_high"]) == (row["within_auroc"], row["within_ci_high"])
        assert within["n"] == row["n_right"] + row["n_wrong"]
    assert found["controls", "noise_canary", None, "auroc"]["value"] == results.canary["auroc"]
