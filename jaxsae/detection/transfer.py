"""Train on one set of answers, test on another: does what a detector learned hold where the questions differ?"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from sklearn.metrics import roc_auc_score

from jaxsae.detection import statistics
from jaxsae.detection.config import ProtocolConfig
from jaxsae.detection.detector import fit_detector
from jaxsae.detection.protocol import ECE_BINS, evaluate
from jaxsae.detection.tables import Tables, normalise_text

TRANSFERRED = (
    *("length", "logprob_mean", "logprob_sum", "entropy_mean"),
    *("probe_last_prompt", "probe_last_answer", "sae_logistic", "tracks_best", "tracks_forest", "tracks_logistic"),
    *("stack", "stack_tracks"),
)
_WITHIN = "grouped cross-validation within the set, one split, out of fold"
_ACROSS = (
    "fitted, chosen, calibrated and its threshold taken on all answers of the one set, and applied to those of the "
    "other whose group and question the first has not"
)


def transfer_matrix(
    tables: Mapping[str, Tables],
    config: ProtocolConfig,
    *,
    detectors: Sequence[str] = TRANSFERRED,
    on_pair: Callable[[str, str], None] = lambda train, test: None,
) -> list[dict[str, Any]]:
    """Return a row per (train, test, detector), the sets by name; a set's own row is cross-validated.

    Args:
        detectors: such as `ProtocolConfig.deploy` takes.
        on_pair: called when a pair of sets is done.

    Returns:
        train, test, detector, n, n_groups, n_left_out (answers of the test set that share group or question with the
        train set), base_rate, auroc, ci_low, ci_high (None where a class is missing), brier, ece, accuracy, definition.

    Raises:
        InputError: a set cannot be learned from, or two sets are of different models, SAEs or track metrics.
    """
    rows = []
    for train, learned in tables.items():
        rows += _within(train, learned, config, detectors)
        on_pair(train, train)
        fitted = {name: fit_detector(learned, dataclasses.replace(config, deploy=name)) for name in detectors}
        for test, other in tables.items():
            if test == train:
                continue
            is_new = unseen(learned, other)
            for name, detector in fitted.items():
                scores, probabilities = detector.scores(other), detector.predict_proba(other)[:, 1]
                decisions = detector.predict(other)
                found = _across(other, is_new, scores, probabilities, decisions, config)
                rows.append({"train": train, "test": test, "detector": name, **found, "definition": _ACROSS})
            on_pair(train, test)
    return rows


def unseen(learned: Tables, other: Tables) -> Bool[np.ndarray, " N"]:
    """Mark the rows of `other` whose group and whose normalised question `learned` has not, whatever the answer."""
    groups, questions = set(learned.groups), set(map(normalise_text, learned.questions))
    return np.array(
        [
            group not in groups and normalise_text(question) not in questions
            for group, question in zip(other.groups, other.questions, strict=True)
        ]
    )


def _within(name: str, tables: Tables, config: ProtocolConfig, detectors: Sequence[str]) -> list[dict[str, Any]]:
    once = dataclasses.replace(config, repeats=1, detectors=tuple(detectors), method=detectors[0], curves=())
    keys = ("n", "n_groups", "base_rate", "auroc", "ci_low", "ci_high", "brier", "ece", "accuracy")
    return [
        {"train": name, "test": name, "detector": row["name"], "n_left_out": 0}
        | {key: row[key] for key in keys}
        | {"definition": _WITHIN}
        for row in evaluate(tables, once).detection
    ]


def _across(
    tables: Tables,
    is_new: Bool[np.ndarray, " N"],
    scores: np.ndarray,
    probabilities: np.ndarray,
    decisions: np.ndarray,
    config: ProtocolConfig,
) -> dict[str, Any]:
    labels = tables.labels[is_new]
    group = np.unique(tables.group_index[is_new], return_inverse=True)[1]
    n_groups = int(group.max(initial=-1)) + 1
    found = {"n": len(labels), "n_groups": n_groups, "n_left_out": int(np.sum(~is_new))}
    blank = dict.fromkeys(("base_rate", "auroc", "ci_low", "ci_high", "brier", "ece", "accuracy"))
    if len(np.unique(labels)) < 2:
        return found | blank
    weights = statistics.draw_group_weights(n_groups, resamples=config.bootstrap, seed=config.seed)
    resampled = statistics.resample_auroc(scores[is_new], labels, group=group, weights=weights)[:, 0]
    calibration = statistics.calibration_metrics(probabilities[is_new], labels, bins=ECE_BINS)
    return {
        **found,
        "base_rate": float(labels.mean()),
        **statistics.with_interval(float(roc_auc_score(labels, scores[is_new])), resampled, name="auroc"),
        **{key: calibration[key] for key in ("brier", "ece")},
        "accuracy": float(np.mean(decisions[is_new] == labels)),
    }
