"""Frozen splits: folds that keep groups whole, their hashes, and what would leak across them."""

import hashlib
from typing import Any

import numpy as np
from jaxtyping import Int
from sklearn.model_selection import StratifiedGroupKFold

from jaxsae.artifacts import InputError
from jaxsae.detection.config import ProtocolConfig
from jaxsae.detection.nesting import folds_of
from jaxsae.detection.tables import Tables


def check_rows(tables: Tables, config: ProtocolConfig) -> None:
    """Raise InputError unless every row has a label and each class lies in at least `folds` groups."""
    labels = tables.labels
    unknown = np.flatnonzero((labels != 0) & (labels != 1))
    if unknown.size:
        raise InputError(
            f"{unknown.size} of {len(labels)} answers, first {tables.ids[unknown[0]]!r}, have no label, expected 1 "
            "(hallucinated) or 0 (right) for all; run jaxsae answer"
        )
    n_wrong, n_right = int(labels.sum()), int((labels == 0).sum())
    if not n_wrong or not n_right:
        raise InputError(
            f"detection needs answers of both kinds, got {n_wrong} hallucinated and {n_right} right in {len(labels)}; "
            "add questions of which the model gets some right and some wrong (questions.path)"
        )
    n_groups = len(set(tables.groups))
    if n_groups < config.folds:
        raise InputError(
            f"{len(labels)} answers lie in {n_groups} groups, expected at least detection.folds={config.folds}; add "
            "questions or lower detection.folds (at least 3)"
        )
    for label, kind in ((1, "hallucinated"), (0, "right")):
        count = len(np.unique(tables.group_index[labels == label]))
        if count < config.folds:
            raise InputError(
                f"the {int((labels == label).sum())} {kind} answers lie in {count} of {n_groups} groups, expected at "
                f"least detection.folds={config.folds}; add questions or lower detection.folds (at least 3)"
            )


def make_folds(tables: Tables, config: ProtocolConfig) -> Int[np.ndarray, "repeats N"]:
    """Split the rows `repeats` times into folds, no group in two, the classes in about equal shares.

    Raises:
        InputError: a fold lacks one class.
    """
    folds = np.empty((config.repeats, len(tables.ids)), dtype=np.int64)
    blank = np.zeros((len(tables.ids), 1))
    for repeat in range(config.repeats):
        splitter = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed + repeat)
        for number, (_, held_out) in enumerate(splitter.split(blank, tables.labels, tables.group_index)):
            folds[repeat, held_out] = number
        _check_folds(tables, folds[repeat])
    return folds


def _check_folds(tables: Tables, fold: Int[np.ndarray, " N"]) -> None:
    """Raise unless both classes lie in every fold: each may be all that a choice, a calibration or a stack sees."""
    for number in folds_of(fold):
        rows = tables.labels[fold == number]
        if len(np.unique(rows)) < 2:
            raise InputError(
                f"fold {number} got {int(rows.sum())} hallucinated and {int((rows == 0).sum())} right answers of "
                f"{len(tables.ids)}, expected some of both; add questions or lower detection.folds (at least 3)"
            )


def describe_splits(tables: Tables, folds: Int[np.ndarray, "repeats N"]) -> list[dict[str, Any]]:
    """Return a row per repeat: the sha256 of the sorted lines "id<TAB>fold", and each fold's rows and groups."""
    rows = []
    for repeat, fold in enumerate(folds):
        lines = sorted(f"{name}\t{number}\n" for name, number in zip(tables.ids, fold.tolist(), strict=True))
        rows.append(
            {
                "repeat": repeat,
                "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
                "rows": np.bincount(fold).tolist(),
                "groups": [len(np.unique(tables.group_index[fold == number])) for number in folds_of(fold)],
            }
        )
    return rows


def shared_texts(tables: Tables, fold: Int[np.ndarray, " N"]) -> tuple[int, int]:
    """Count the texts that lie in more than one fold, and their rows."""
    by_text: dict[str, set[int]] = {}
    for text, number in zip(tables.texts, fold.tolist(), strict=True):
        by_text.setdefault(text, set()).add(number)
    shared = {text for text, numbers in by_text.items() if len(numbers) > 1}
    return len(shared), sum(text in shared for text in tables.texts)


def mixed_groups(tables: Tables) -> int:
    """Count the groups that hold both labels."""
    n_rows = np.bincount(tables.group_index)
    n_wrong = np.bincount(tables.group_index, weights=tables.labels)
    return int(np.sum((n_wrong > 0) & (n_wrong < n_rows)))


def permute_within_groups(
    labels: Int[np.ndarray, " N"], group: Int[np.ndarray, " N"], *, seed: int
) -> Int[np.ndarray, " N"]:
    """Shuffle the labels among the rows of each group; a group of one label stays as it is."""
    order = np.argsort(group, kind="stable")
    shuffled = np.lexsort((np.random.default_rng([seed, 1]).random(len(labels)), group))
    permuted = np.empty_like(labels)
    permuted[order] = labels[shuffled]
    return permuted
