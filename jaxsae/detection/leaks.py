"""What gives a label away without knowing what is true: clues in the rows, and memory across a split.

Every score is of rows that its estimator did not see. Rows are split in rotations: units (questions, pairs or rows)
stand on a circle in random order; in each of seven turns 70 % of it trains, a seventh is tested and the rest, what a
published split keeps for validation, is left out, so that every row is tested once. Split by question, what a clue
tells is in the rows; split by pair or row, memory of texts and questions that stand on both sides comes on top.

Intervals are 95 %, over resampled groups with the scores held fixed; those of noise are over its draws.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int, Num
from scipy.stats import norm
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxsae.detection import statistics
from jaxsae.detection.estimators import Matrix, TrainVocabulary
from jaxsae.detection.nesting import raw_scores
from jaxsae.detection.tables import count_words, normalise_text

ROTATIONS = 7
TRAIN_SHARE = 0.7
FOUND, UNCLEAR, NONE, UNMEASURED = FINDINGS = ("found", "unclear", "none", "unmeasured")
MATERIAL_AUROC = 0.55  # less than that over chance is no shortcut worth a warning; ours, by convention
MATERIAL_SHARE = 0.01  # of the tested texts in training; ours, by convention
# One-sided level of 1 in 200 a check; of 60 clean files of 320 rows one was accused, by one of its nine scores.
FOUND_DEVIATIONS, FOUND_P = 2.6, 0.005
# Pairs of rows serve once in each direction, so that a fitted score varies more than resampled groups say (`Results`).
FITTED_INFLATION = math.sqrt(2)
NOISE_COLUMNS = 8
TREES = 30
POWER, ALPHA = 0.8, 0.05
FINDING_RULE = (
    f"found: AUROC at least {MATERIAL_AUROC} and above 0.5 by {FOUND_DEVIATIONS} standard errors (of resampled groups, "
    f"times sqrt(2) for scores that are fitted; of noise, p at most {FOUND_P} by a t-test over its draws); unclear: "
    "not found, but the interval lies above 0.5; none: neither. "
    "Of class_prior_by_question alone, an AUROC below 0.5 counts like one above."
)


@dataclasses.dataclass(frozen=True)
class AuditRows:
    """N labelled answers, column by column.

    Attributes:
        labels: 1 hallucinated, 0 right.
        groups: the question behind each row, or what else no split may divide.
        units: what a split that knows no groups draws: the pair's number, or the row's place in its file.
        is_paired: units are pairs, whose rows were made from a question; else their place is that in the file.
        splits: "train", "validation" or "test" where the file says so, else "".
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    labels: Int[np.ndarray, " N"]
    groups: tuple[str, ...]
    units: Int[np.ndarray, " N"]
    is_paired: bool
    categories: tuple[str, ...]
    splits: tuple[str, ...]

    @functools.cached_property
    def group_index(self) -> Int[np.ndarray, " N"]:
        """Number the groups from 0 and return each row's."""
        return number_of(self.groups)

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """Join each row's normalised question and answer."""
        pairs = zip(self.normalised(self.questions), self.normalised(self.answers), strict=True)
        return tuple(f"{question}\n{answer}" for question, answer in pairs)

    @functools.cached_property
    def text_index(self) -> Int[np.ndarray, " N"]:
        """Number the different texts from 0 and return each row's."""
        return number_of(self.texts)

    @staticmethod
    def normalised(texts: Sequence[str]) -> list[str]:
        """Return each text's words as `normalise_text` leaves them, each different text normalised once."""
        once = {text: normalise_text(text) for text in set(texts)}
        return [once[text] for text in texts]


class Rotation(NamedTuple):
    """Which rows train and which are tested; the others are neither."""

    train: Bool[np.ndarray, " N"]
    test: Bool[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True)
class Clue:
    """One thing that might give the label away: what is read, and the estimator that reads it."""

    name: str
    definition: str
    inputs: Matrix
    estimator: Callable[[], BaseEstimator]


@dataclasses.dataclass(frozen=True)
class Split:
    """One way to split the rows, as rotations.

    Attributes:
        name: "pair" or "row", "group", or "file".
    """

    name: str
    definition: str
    rotations: tuple[Rotation, ...]


def make_splits(rows: AuditRows, *, seed: int) -> tuple[Split, ...]:
    """Return the split by pair or row, the split by group, and the file's own where it has training and test rows."""
    unit = "pair" if rows.is_paired else "row"
    turned = (
        f"{TRAIN_SHARE:.0%} train, {1 / ROTATIONS:.0%} are tested, the rest is left out as for validation; {ROTATIONS} "
        "turns, so that each row is tested once"
    )
    splits = [
        Split(unit, f"by {unit}, whatever the question: {turned}", rotate(rows.units, rows.labels, seed=seed)),
        Split("group", f"by question (group): {turned}", rotate(rows.group_index, rows.labels, seed=seed)),
    ]
    of_row = np.array(rows.splits, dtype=object)
    own = Rotation(train=of_row == "train", test=of_row == "test")
    if all(len(np.unique(rows.labels[part])) == 2 for part in own):
        splits.append(Split("file", "the file's own training and test rows", (own,)))
    return tuple(splits)


def rotate(units: Int[np.ndarray, " N"], labels: Int[np.ndarray, " N"], *, seed: int) -> tuple[Rotation, ...]:
    """Return seven splits: each unit is tested in one and trains in about 70 % of them.

    Units stand on a circle in random order, those of right rows, of hallucinated rows and of both spread evenly, so
    that every arc holds each kind.
    """
    index = np.unique(units, return_inverse=True)[1]
    n = int(index.max()) + 1
    rate = np.bincount(index, weights=labels) / np.bincount(index)
    kind = np.where(rate == 0, 0, np.where(rate == 1, 2, 1))
    draw = np.random.default_rng([seed, 2]).random(n)
    spread = np.empty(n)
    for each in np.unique(kind):
        members = np.flatnonzero(kind == each)
        spread[members[np.argsort(draw[members])]] = (np.arange(len(members)) + draw[members]) / len(members)
    place = np.argsort(np.argsort(spread))[index]
    starts = [number * n // ROTATIONS for number in range(ROTATIONS + 1)]
    turns = []
    for start, end in itertools.pairwise(starts):
        after = (place - start) % n
        turns.append(Rotation(train=after >= (1 - TRAIN_SHARE) * n, test=after < end - start))
    return tuple(turns)


def make_clues(rows: AuditRows, seed: int) -> Iterator[Clue]:
    """Yield the clues that these rows have."""
    counts = [count_words(rows.normalised(texts)) for texts in (rows.questions, rows.answers)]
    lengths = np.array([[len(answer.split()), len(answer)] for answer in rows.answers], dtype=np.float64)

    def text() -> BaseEstimator:
        return make_pipeline(TrainVocabulary(), TfidfTransformer(), LogisticRegression(C=1.0, max_iter=1000))

    words = "logistic regression on TF-IDF of the words and word pairs of the {}; no model is read"
    yield Clue(
        "length",
        "logistic regression on the answer's number of words and of characters",
        lengths,
        lambda: make_pipeline(StandardScaler(), LogisticRegression(C=1.0, solver="newton-cholesky", max_iter=1000)),
    )
    yield Clue("question_tfidf", words.format("question"), counts[0], text)
    yield Clue("answer_tfidf", words.format("answer"), counts[1], text)
    both = words.format("question and, in columns of their own, the answer")
    yield Clue("question_answer_tfidf", both, sp.hstack(counts, format="csr"), text)
    if any(rows.categories):
        yield Clue(
            "category",
            "logistic regression on the category's name alone",
            _one_hot(number_of(rows.categories)),
            lambda: LogisticRegression(C=1.0, max_iter=1000),
        )
    if not rows.is_paired:
        leaf = max(5, len(rows.labels) // 50)  # wide enough to see order, not to remember neighbours
        yield Clue(
            "position",
            f"a random forest of {TREES} trees on the row's place in the file, its place within its group, and whether "
            "its number is odd",
            _positions(rows),
            lambda: RandomForestClassifier(TREES, min_samples_leaf=leaf, random_state=seed),
        )


def list_unmeasured(rows: AuditRows) -> list[dict[str, Any]]:
    """Return a row for each check that the file gives nothing for, with the reason."""
    reasons = {
        "category": None if any(rows.categories) else "the file has no category",
        "position": "the rows are made from pairs, their order says nothing" if rows.is_paired else None,
    }
    return [
        {"name": name, "finding": UNMEASURED, "reason": reason}
        for name, reason in reasons.items()
        if reason is not None
    ]


def check_clue(
    clue: Clue, rows: AuditRows, split: Split, weights: Num[np.ndarray, "resamples groups"]
) -> dict[str, Any]:
    scores = np.empty(len(rows.labels))
    for train, test in split.rotations:
        fitted = clue.estimator().fit(clue.inputs[train], rows.labels[train])
        scores[test] = raw_scores(fitted, clue.inputs[test])
    return _score_row(clue.name, clue.definition, split, rows, scores, weights)


def check_question_prior(rows: AuditRows, split: Split, weights: Num[np.ndarray, "resamples groups"]) -> dict[str, Any]:
    """Score each row with the share hallucinated among the training rows of its question."""
    base = float(rows.labels.mean())
    scores = np.empty(len(rows.labels))
    n = int(rows.group_index.max()) + 1
    for train, test in split.rotations:
        group = rows.group_index[train]
        wrong, seen = np.bincount(group, weights=rows.labels[train], minlength=n), np.bincount(group, minlength=n)
        scores[test] = ((wrong + base) / (seen + 1))[rows.group_index[test]]
    definition = (
        "the share hallucinated among the training rows of the same question, with one row of the base rate added; "
        "no text is read"
    )
    name = "class_prior_by_question"
    return _score_row(name, definition, split, rows, scores, weights, is_fitted=False, is_two_sided=True)


def _score_row(
    name: str,
    definition: str,
    split: Split,
    rows: AuditRows,
    scores: Float[np.ndarray, " N"],
    weights: Num[np.ndarray, "resamples groups"],
    *,
    is_fitted: bool = True,
    is_two_sided: bool = False,
) -> dict[str, Any]:
    """Return AUROC, interval, standard error and finding of the rows' scores."""
    auroc = float(roc_auc_score(rows.labels, scores))
    drawn = statistics.resample_auroc(scores, rows.labels, group=rows.group_index, weights=weights)[:, 0]
    error = float(np.nanstd(drawn)) * (FITTED_INFLATION if is_fitted else 1.0)
    row = {
        "name": name,
        "definition": definition,
        "split": split.name,
        **_count(rows, slice(None)),
        **statistics.with_interval(auroc, drawn, name="auroc"),
        "standard_error": error,
    }
    mirrored = auroc < 0.5 and is_two_sided
    above, low = (0.5 - auroc, 1 - row["ci_high"]) if mirrored else (auroc - 0.5, row["ci_low"])
    return row | {"finding": _finding(above, low, is_sure=above > FOUND_DEVIATIONS * error)}


def _count(rows: AuditRows, tested: Bool[np.ndarray, " N"] | slice) -> dict[str, int]:
    return {"n": len(rows.labels[tested]), "n_groups": len(np.unique(rows.group_index[tested]))}


def _finding(above: float, low: float, *, is_sure: bool) -> str:
    """Say what an AUROC that is `above` 0.5 by so much, in an interval from `low` on, comes to."""
    if above >= MATERIAL_AUROC - 0.5 and is_sure:
        return FOUND
    return UNCLEAR if low > 0.5 else NONE


def judge_split(
    split: Split,
    rows: AuditRows,
    noise: Sequence[Float[np.ndarray, "N columns"]],
    weights: Num[np.ndarray, "resamples groups"],
    seed: int,
) -> dict[str, Any]:
    """Count tested texts and questions that also train, and score draws of noise keyed by text."""
    n = len(rows.labels)
    tested, text_seen, group_seen = (np.zeros(n, dtype=bool) for _ in range(3))
    for train, test in split.rotations:
        text_seen[test] = np.isin(rows.text_index[test], rows.text_index[train])
        group_seen[test] = np.isin(rows.group_index[test], rows.group_index[train])
        tested |= test
    share = functools.partial(_share, group=rows.group_index, weights=weights)
    right, wrong = tested & (rows.labels == 0), tested & (rows.labels == 1)
    row: dict[str, Any] = {
        "name": split.name,
        "definition": split.definition,
        "right_texts_in_train": share(text_seen, right),
        "hallucinated_texts_in_train": share(text_seen, wrong),
        "rows_with_question_in_train": share(group_seen, tested),
        "canary": _score_noise(split, rows, noise, tested, seed),
    }
    largest = max(float(text_seen[part].mean()) for part in (right, wrong))
    return row | {"overlap_finding": FOUND if largest >= MATERIAL_SHARE else UNCLEAR if largest else NONE}


def _score_noise(
    split: Split,
    rows: AuditRows,
    draws: Sequence[Float[np.ndarray, "N columns"]],
    tested: Bool[np.ndarray, " N"],
    seed: int,
) -> dict[str, Any]:
    """Return the row of the noise canary: the mean over its draws, with an interval over them."""
    by_draw = []
    for noise in draws:
        scores = np.empty(len(rows.labels))
        for train, test in split.rotations:
            forest = RandomForestClassifier(TREES, random_state=seed, n_jobs=-1).fit(noise[train], rows.labels[train])
            forest.set_params(n_jobs=1)  # threads would add the trees' votes in any order
            scores[test] = raw_scores(forest, noise[test])
        by_draw.append(scores[tested])
    row = statistics.over_draws(np.array(by_draw), rows.labels[tested])
    finding = _finding(row["auroc"] - 0.5, row["ci_low"], is_sure=row["p_value"] <= FOUND_P)
    definition = (
        f"a random forest of {TREES} trees on {NOISE_COLUMNS} Gaussian numbers drawn for each text of (question, "
        f"answer): 0.5 unless it has seen the text; the mean of {len(draws)} draws, with a t-interval over them"
    )
    return {
        "name": "noise_canary",
        "definition": definition,
        "split": split.name,
        **_count(rows, tested),
        **row,
        "finding": finding,
    }


def _share(
    holds: Bool[np.ndarray, " N"],
    among: Bool[np.ndarray, " N"],
    *,
    group: Int[np.ndarray, " N"],
    weights: Num[np.ndarray, "resamples groups"],
) -> dict[str, Any]:
    """Return the share of some rows for which something holds, with its interval over groups."""
    n = weights.shape[1]
    of_group = np.stack(
        [np.bincount(group[among & holds], minlength=n), np.bincount(group[among], minlength=n)], axis=1
    )
    drawn = weights.astype(np.float64) @ of_group
    with np.errstate(invalid="ignore"):
        shares = drawn[:, 0] / drawn[:, 1]
    point = float(holds[among].mean())
    return {"n": int(among.sum()), **statistics.with_interval(point, shares, name="share")}


def minimum_detectable(
    rows: AuditRows, noise: Float[np.ndarray, "N columns"], weights: Num[np.ndarray, "resamples groups"], seed: int
) -> dict[str, Any]:
    """Return the AUROC differences that rows of this number and grouping show with 80 % power at two-sided 5 %."""
    by_group = np.random.default_rng([seed, 3]).standard_normal((weights.shape[1], 3))[rows.group_index]
    fewer = weights[:500]  # a standard deviation from 500 resamples is within 7 % (95 % interval)

    def deviation(columns: Float[np.ndarray, "N columns"]) -> float:
        drawn = [
            statistics.resample_auroc(column, rows.labels, group=rows.group_index, weights=fewer)[:, 0]
            for column in columns.T
        ]
        return float(np.sqrt(np.mean([np.nanvar(each) for each in drawn])))

    error = max(deviation(noise[:, :3]), deviation(by_group))
    needed = float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER))
    return {
        "standard_error": error,
        "from_chance": needed * error,
        "between_detectors": needed * math.sqrt(2) * error,
        "power": POWER,
        "alpha": ALPHA,
        "definition": f"{needed:.2f} (two-sided {ALPHA:.0%}, power {POWER:.0%}) times the standard error of AUROC over "
        "resampled groups of a score that knows nothing, drawn per text or per group, whichever varies more "
        "(from_chance: one detector against 0.5), and times sqrt(2) for two detectors that err independently "
        "(between_detectors); two that agree on most rows need less",
    }


def _positions(rows: AuditRows) -> Float[np.ndarray, "N 3"]:
    """Return each row's place in the file (0 to 1), its number within its group, and whether its place is odd."""
    order = np.lexsort((rows.units, rows.group_index))
    group = rows.group_index[order]
    first = np.searchsorted(group, group, side="left")
    within = np.empty(len(order))
    within[order] = np.arange(len(order)) - first
    return np.stack([rows.units / (rows.units.max() + 1), within, rows.units % 2], axis=1)


def number_of(names: Sequence[str]) -> Int[np.ndarray, " N"]:
    return np.unique(np.array(names, dtype=object), return_inverse=True)[1]


def _one_hot(index: Int[np.ndarray, " N"]) -> sp.csr_matrix:
    return sp.csr_matrix((np.ones(len(index)), (np.arange(len(index)), index)))
