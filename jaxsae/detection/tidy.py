"""Everything that was measured as one long table: a row per number, with its interval, its rows and its definition."""

from collections.abc import Iterator
from typing import Any

from jaxsae.detection.protocol import Results

COLUMNS = (
    *("table", "detector", "against", "setting", "measure", "value", "ci_low", "ci_high", "n", "n_groups"),
    "definition",
)
MEASURES = {
    "auroc": "area under the ROC curve of the mean out-of-fold score; interval: 95 %, resampled groups",
    "p_value": "share of label permutations whose AUROC is at least this one's, scores held fixed: for fitted ones too "
    "small (0.05 may stand for 0.12), and not corrected for the number of detectors",
    "pr_auc": "average precision of the same score; without information it is base_rate",
    "base_rate": "share hallucinated",
    "brier": "mean squared error of the probability by Platt's line, fitted in inner validation",
    "ece": "its expected calibration error, bins of equal mass",
    "brier_isotonic": "mean squared error of the probability by isotonic regression, fitted in inner validation",
    "ece_isotonic": "its expected calibration error, bins of equal mass",
    "aurc": "mean over coverages of the share hallucinated among the answers kept, lowest scores first",
    "aurc_best": "the same of a ranking without an error",
    "accuracy": "at the threshold chosen in inner validation",
    "precision": "at the threshold chosen in inner validation",
    "recall": "at the threshold chosen in inner validation",
    "f1": "at the threshold chosen in inner validation",
}


def tidy(results: Results) -> list[dict[str, Any]]:
    """Return a row per number with the keys `COLUMNS`; what does not apply to it is None.

    `setting` is the category, the curve's share, the coverage or the family.
    """
    n, n_groups = results.counts["rows"], results.counts["groups"]
    size = {"n": n, "n_groups": n_groups}
    blank = dict.fromkeys(COLUMNS)
    makers = (_detection, _controls, _differences, _ablations, _curves)
    tables = [make(results) for make in makers]
    rows = [blank | size | row for table in tables for row in table]
    return rows + [blank | row for row in _by_category(results)]


def _interval(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {key: row[f"{prefix}{key}"] for key in ("ci_low", "ci_high")}


def _detection(results: Results) -> Iterator[dict[str, Any]]:
    for row in results.detection:
        for measure, words in MEASURES.items():
            found = {"table": "detection", "detector": row["name"], "measure": measure, "value": row[measure]}
            interval = _interval(row) if measure == "auroc" else {}
            yield found | interval | {"definition": f"{row['definition']}: {words}"}
        for point in row["risk_coverage"]:
            yield {
                "table": "risk_coverage",
                "detector": row["name"],
                "setting": point["coverage"],
                "measure": "risk",
                "value": point["risk"],
                "definition": f"{row['definition']}: share hallucinated among this share of the answers, lowest scores "
                "first",
            }


def _controls(results: Results) -> Iterator[dict[str, Any]]:
    permutation = results.controls["within_group_permutation"]
    rows = (
        ("noise_canary", results.canary, "one-sided t-test of its draws against 0.5"),
        ("within_group_permutation", permutation, MEASURES["p_value"]),
    )
    for name, row, test in rows:
        yield {
            "table": "controls",
            "detector": name,
            "measure": "auroc",
            "value": row["auroc"],
            **_interval(row),
            "definition": row["definition"],
        }
        yield {
            "table": "controls",
            "detector": name,
            "measure": "p_value",
            "value": row["p_value"],
            "definition": f"{row['definition']}: {test}",
        }
    overlap = results.controls["text_overlap"]
    for measure in ("texts", "rows"):
        found = {"table": "controls", "detector": "text_overlap", "measure": measure, "value": overlap[measure]}
        yield found | {"definition": overlap["definition"]}


def _differences(results: Results) -> Iterator[dict[str, Any]]:
    for row in results.differences:
        yield {
            "table": "differences",
            "detector": row["a"],
            "against": row["b"],
            "measure": "auroc_difference",
            "value": row["difference"],
            **_interval(row),
            "definition": f"{row['definition']}; paired on the same resamples",
        }


def _ablations(results: Results) -> Iterator[dict[str, Any]]:
    for row in results.ablations:
        yield {
            "table": f"family_{row['kind']}",
            "detector": "stack_tracks",
            "setting": row["family"],
            "measure": "auroc_difference",
            "value": row["difference"],
            **_interval(row),
            "definition": f"{row['definition']}; paired on the same resamples",
        }


def _curves(results: Results) -> Iterator[dict[str, Any]]:
    for row in results.curves:
        yield {
            "table": row["kind"],
            "detector": row["detector"],
            "setting": row["share"],
            "measure": "auroc",
            "value": row["auroc"],
            **_interval(row),
            "definition": row["definition"],
        }


def _by_category(results: Results) -> Iterator[dict[str, Any]]:
    kinds = (
        ("auroc", "", "the category's hallucinated answers against all right ones"),
        ("within_auroc", "within_", "the category's hallucinated answers against its right ones"),
    )
    for row in results.by_category:
        for measure, prefix, words in kinds:
            yield {
                "table": "by_category",
                "detector": row["detector"],
                "setting": row["category"],
                "measure": measure,
                "value": row[measure],
                **_interval(row, prefix),
                "n": row["n_wrong"] + row["n_right"],
                "definition": f"AUROC of {words}; n counts the category's answers",
            }
