"""Audit the labelled answers of a benchmark before any model is asked: what a detector must beat to have learned truth.

In: `AuditRows`. Out: one JSON-ready mapping with every figure, its definition and its interval. The measurements that
take scores and splits are in `leaks`; counts and sizes are taken here.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxsae.artifacts import InputError
from jaxsae.detection import leaks, statistics
from jaxsae.detection.baselines import CANARY_DRAWS, text_noise
from jaxsae.detection.leaks import AuditRows
from jaxsae.detection.nesting import quiet_single_threaded_blas

LEAST_GROUPS = 20  # of all rows; below, an interval over groups means nothing
LEAST_GROUPS_OF_LABEL = 10

Progress = Callable[[int, int, str], None]


def audit(rows: AuditRows, *, seed: int = 0, bootstrap: int = 2000, progress: Progress | None = None) -> dict[str, Any]:
    """Measure what tells the labels apart without any knowledge of what is true.

    Args:
        seed: of splits, forests, noise and resamples; the same seed gives the same numbers.
        bootstrap: resamples of groups behind every interval.
        progress: called with (steps done, steps in all, what was done).

    Returns:
        JSON-ready: `sizes`, `duplicates`, `lengths`, `categories`, `checks` (a row per score, `FINDING_RULE` says what
        its `finding` means), `splits` (a row per way to split: texts on both sides, and the noise canary),
        `minimum_detectable_difference`, `settings`.

    Raises:
        InputError: labels of one kind only, or too few groups for an interval.
    """
    check_rows(rows)
    weights = statistics.draw_group_weights(int(rows.group_index.max()) + 1, resamples=bootstrap, seed=seed)
    splits = leaks.make_splits(rows, seed=seed)
    draws = range(seed * CANARY_DRAWS, (seed + 1) * CANARY_DRAWS)
    noise = [text_noise(rows.texts, n_columns=leaks.NOISE_COLUMNS, seed=draw) for draw in draws]
    clues = leaks.make_clues(rows, seed)
    steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("class prior by question", lambda: leaks.check_question_prior(rows, splits[0], weights)),
        *((each.name, functools.partial(leaks.check_clue, each, rows, splits[1], weights)) for each in clues),
    ]
    canaries: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"noise, split by {split.name}", functools.partial(leaks.judge_split, split, rows, noise, weights, seed))
        for split in splits
    ]
    total = len(steps) + len(canaries) + 1
    done: list[dict[str, Any]] = []
    with quiet_single_threaded_blas():
        for number, (name, step) in enumerate([*steps, *canaries], start=1):
            done.append(step())
            if progress is not None:
                progress(number, total, name)
        detectable = leaks.minimum_detectable(rows, noise[0], weights, seed)
    if progress is not None:
        progress(total, total, "minimum detectable difference")
    return {
        "sizes": _sizes(rows),
        "duplicates": _duplicates(rows),
        "lengths": _lengths(rows),
        "categories": _categories(rows),
        "finding_rule": leaks.FINDING_RULE,
        "checks": [*done[: len(steps)], *leaks.list_unmeasured(rows)],
        "splits": done[len(steps) :],
        "minimum_detectable_difference": detectable,
        "settings": {
            "seed": seed,
            "bootstrap": bootstrap,
            "rotations": leaks.ROTATIONS,
            "train_share": leaks.TRAIN_SHARE,
            "noise_columns": leaks.NOISE_COLUMNS,
            "noise_draws": CANARY_DRAWS,
            "trees": leaks.TREES,
        },
    }


def check_rows(rows: AuditRows) -> None:
    """Raise InputError unless there are both labels and groups enough for an interval."""
    n_wrong, n_right = int(rows.labels.sum()), int((rows.labels == 0).sum())
    if not n_wrong or not n_right:
        raise InputError(
            f"the audit needs answers of both kinds, got {n_wrong} hallucinated (label 1) and {n_right} right (label 0)"
        )
    n_groups = len(np.unique(rows.group_index))
    if n_groups < LEAST_GROUPS:
        raise InputError(
            f"{len(rows.labels)} rows lie in {n_groups} groups (questions), expected at least {LEAST_GROUPS}; with "
            "fewer no interval over questions means anything"
        )
    for label, kind in ((1, "hallucinated"), (0, "right")):
        count = len(np.unique(rows.group_index[rows.labels == label]))
        if count < LEAST_GROUPS_OF_LABEL:
            raise InputError(
                f"the {kind} answers lie in {count} of {n_groups} groups (questions), expected at least "
                f"{LEAST_GROUPS_OF_LABEL}"
            )


def _sizes(rows: AuditRows) -> dict[str, int]:
    n_rows = np.bincount(rows.group_index)
    n_wrong = np.bincount(rows.group_index, weights=rows.labels)
    return {
        "rows": len(rows.labels),
        "groups": len(n_rows),
        "units": len(np.unique(rows.units)),
        "hallucinated": int(rows.labels.sum()),
        "right": int((rows.labels == 0).sum()),
        "mixed_groups": int(np.sum((n_wrong > 0) & (n_wrong < n_rows))),
        "largest_group": int(n_rows.max()),
        "categories": len(set(rows.categories) - {""}),
        "empty_answers": sum(not text for text in rows.normalised(rows.answers)),
        "empty_hallucinated": sum(
            not text for text, label in zip(rows.normalised(rows.answers), rows.labels, strict=True) if label == 1
        ),
    }


def _duplicates(rows: AuditRows) -> dict[str, Any]:
    text = rows.text_index
    n_rows, n_wrong = np.bincount(text), np.bincount(text, weights=rows.labels)
    contradictory = (n_wrong > 0) & (n_wrong < n_rows)
    question = leaks.number_of(rows.normalised(rows.questions))
    return {
        "repeated_texts": int(np.sum(n_rows > 1)),
        "repeated_rows": int(n_rows[n_rows > 1].sum()),
        "contradictory_texts": int(contradictory.sum()),
        "contradictory_rows": int(n_rows[contradictory].sum()),
        "texts_in_two_groups": _in_two(text, rows.group_index),
        "questions_in_two_groups": _in_two(question, rows.group_index),
        "definition": "texts are question and answer, compared in lower case without punctuation; repeated: in more "
        "than one row; contradictory: with both labels",
    }


def _lengths(rows: AuditRows) -> list[dict[str, Any]]:
    """Return the quartiles of words and characters of right and hallucinated answers."""
    measures = {"words": [len(answer.split()) for answer in rows.answers], "characters": list(map(len, rows.answers))}
    return [
        {
            "label": label,
            **{
                f"{name}_{quantile}": float(np.quantile(np.array(values)[rows.labels == label], share))
                for name, values in measures.items()
                for quantile, share in (("p25", 0.25), ("median", 0.5), ("p75", 0.75))
            },
        }
        for label in (0, 1)
    ]


def _categories(rows: AuditRows) -> list[dict[str, Any]]:
    """Return rows and share hallucinated of each category, the largest first; none where there are none."""
    if not any(rows.categories):
        return []
    index = leaks.number_of(rows.categories)
    n_rows, n_wrong = np.bincount(index), np.bincount(index, weights=rows.labels)
    found = [
        {"category": name, "n": int(n), "hallucinated": float(wrong / n)}
        for name, n, wrong in zip(sorted(set(rows.categories)), n_rows, n_wrong, strict=True)
    ]
    return sorted(found, key=lambda row: -row["n"])


def _in_two(index: Int[np.ndarray, " N"], group: Int[np.ndarray, " N"]) -> int:
    """Count the values of `index` whose rows lie in more than one group."""
    pairs = np.unique(np.stack([index, group], axis=1), axis=0)
    return int(np.sum(np.bincount(pairs[:, 0]) > 1))
