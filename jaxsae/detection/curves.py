"""What a detector still knows when it learned from fewer labels, or from labels some of which are wrong.

Every point is fitted, chosen and scored out of fold like the full detector, on the first split; only the labels that it
learns from differ, and all answers are judged by their true ones.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxsae.detection.nesting import Nested, folds_of
from jaxsae.detection.resampling import Bootstrap
from jaxsae.detection.tables import UNKNOWN_LABEL, Tables

FEW_LABELS, LABEL_NOISE = "few_labels", "label_noise"
LABELLED_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)  # of the groups
FLIPPED_SHARES = (0.1, 0.2, 0.3)  # of the labels; at 0.5 nothing is left to learn
LEAST_LABELLED = 2  # answers of each label in each fold: fewer leave an inner validation nothing to rank
DEFINITIONS = {
    FEW_LABELS: "AUROC where only this share of the groups has labels; choices, too, are made with those alone",
    LABEL_NOISE: "AUROC where this share of the labels learned from is flipped; choices, too, are made with those",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of a curve: the labels to learn from, -1 for an answer without."""

    kind: str
    share: float
    labels: Int[np.ndarray, " N"]


def label_points(tables: Tables, fold: Int[np.ndarray, " N"], *, seed: int) -> dict[str, Point]:
    """Return the points of both curves by name.

    Fewer labels are a part of more labels, and so with flipped ones. A share that leaves some fold with less than
    `LEAST_LABELLED` answers of a label has no point.
    """
    rng = np.random.default_rng([seed, 3])
    rank_of_group = rng.permutation(int(tables.group_index.max()) + 1) / (int(tables.group_index.max()) + 1)
    rank, draw = rank_of_group[tables.group_index], rng.random(len(tables.labels))
    points = [
        Point(FEW_LABELS, share, np.where(rank < share, tables.labels, UNKNOWN_LABEL)) for share in LABELLED_SHARES
    ]
    points += [
        Point(LABEL_NOISE, share, np.where(draw < share, 1 - tables.labels, tables.labels)) for share in FLIPPED_SHARES
    ]
    return {f"{point.kind} {point.share:g}": point for point in points if _can_learn(point.labels, fold)}


def _can_learn(labels: Int[np.ndarray, " N"], fold: Int[np.ndarray, " N"]) -> bool:
    counts = [np.sum(labels[fold == number] == label) for number in folds_of(fold) for label in (0, 1)]
    return int(min(counts)) >= LEAST_LABELLED


def curve_rows(
    points: Mapping[str, Point],
    fitted: Mapping[tuple[str, str], Nested],
    whole: Mapping[str, np.ndarray],
    labels: Int[np.ndarray, " N"],
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    """Return a row per (kind, detector, share) with AUROC, interval and the number of labels.

    Args:
        fitted: by (detector, point).
        whole: each detector's scores with all labels as they are, which end both curves.
    """
    settings = [(name, points[point], each.scores) for (name, point), each in fitted.items()]
    settings += [(name, Point(FEW_LABELS, 1.0, labels), scores) for name, scores in whole.items()]
    settings += [(name, Point(LABEL_NOISE, 0.0, labels), scores) for name, scores in whole.items()]
    rows = [
        {
            "kind": point.kind,
            "detector": name,
            "share": point.share,
            "n_labelled": int(np.sum(point.labels != UNKNOWN_LABEL)),
            **bootstrap.curve_point(scores),
            "definition": DEFINITIONS[point.kind],
        }
        for name, point, scores in settings
    ]
    return sorted(rows, key=lambda row: (row["kind"], row["detector"], row["share"]))
