"""Fit inside, score outside: every score of a row comes from estimators that saw neither its label nor its fold.

The rows lie in folds, no group in two. An outer fold k is scored by an estimator fitted on all other rows. What is
chosen for it (layer, penalty, calibration, threshold, a stack's weights) is read from inner scores: the rows of another
fold j are scored by an estimator fitted without j and k. That estimator serves k and j alike. j is every other fold, or
only the two neighbours of k on a ring, which halves the fits.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit
from sklearn.base import BaseEstimator
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from jaxsae.detection import statistics
from jaxsae.detection.estimators import Matrix
from jaxsae.detection.specs import Baseline, Choice
from jaxsae.detection.tables import UNKNOWN_LABEL, Tables

INNER = ("neighbours", "all")
STACK_CHOICES = (Choice(model="logistic"), Choice(model="boosting"))  # the first wins a tie
NO_FOLD = -1  # the outer "fold" when nothing is held out

_MakeEstimator = Callable[[Choice, int, int], BaseEstimator]
_Cache = dict[frozenset[int], np.ndarray]  # scores by the folds left out


@dataclasses.dataclass(frozen=True)
class Nested:
    """One detector's scores under one split.

    Attributes:
        scores: of each row, by an estimator that saw neither its fold's rows nor their labels.
        inner: per outer fold, the scores of its inner folds' rows, NaN elsewhere.
        chosen: per outer fold, the setting that inner validation chose.
    """

    scores: Float[np.ndarray, " N"]
    inner: Float[np.ndarray, "folds N"]
    chosen: tuple[Choice, ...]
    n_fits: int
    n_unconverged: int


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """One detector's calibrated probabilities and decisions (1 = hallucinated) under one split.

    Attributes:
        probabilities: by Platt's line; the decisions are of these.
        isotonic: the same scores' probabilities by isotonic regression, fitted on the same rows.
    """

    probabilities: Float[np.ndarray, " N"]
    decisions: Int[np.ndarray, " N"]
    isotonic: Float[np.ndarray, " N"]


class Fitter:
    """Fit and score one baseline, counting fits and those that ran out of iterations.

    Rows of label -1 are scored, and neither fitted on nor used to choose.
    """

    def __init__(self, baseline: Baseline, labels: Int[np.ndarray, " N"], *, scheme: str = "all") -> None:
        self.baseline = baseline
        self.labels = labels
        self.scheme = scheme
        self.n_fits = 0
        self.n_unconverged = 0

    def fit(
        self, inputs: Matrix, rows: np.ndarray, choice: Choice, *, make: _MakeEstimator | None = None
    ) -> BaseEstimator:
        """Fit on the rows of a boolean mask, with the baseline's estimator or another one."""
        make = make or self.baseline.estimator
        rows = rows & (self.labels != UNKNOWN_LABEL)
        estimator = make(choice, int(rows.sum()), inputs.shape[1])
        estimator.fit(inputs[rows], self.labels[rows])
        self.n_fits += 1
        self.n_unconverged += not _converged(estimator)
        return estimator

    def inner(
        self,
        inputs: Matrix,
        fold: Int[np.ndarray, " N"],
        outer: int,
        choice: Choice,
        *,
        cache: _Cache,
        make: _MakeEstimator | None = None,
    ) -> Float[np.ndarray, " N"]:
        """Score each row of the inner folds by an estimator that saw neither its fold nor `outer`; NaN elsewhere.

        Args:
            cache: scores by the folds left out, shared between the two outer folds that leave out the same pair.
        """
        scores = np.full(len(fold), np.nan)
        for held_out in inner_folds(int(fold.max()) + 1, outer, scheme=self.scheme):
            left_out = frozenset({held_out, outer})
            if left_out not in cache:
                outside = np.isin(fold, list(left_out))
                cache[left_out] = np.full(len(fold), np.nan)
                estimator = self.fit(inputs, ~outside, choice, make=make)
                cache[left_out][outside] = raw_scores(estimator, inputs[outside])
            scores[fold == held_out] = cache[left_out][fold == held_out]
        return scores

    def select(
        self, tables: Tables, fold: Int[np.ndarray, " N"], outers: Sequence[int]
    ) -> tuple[tuple[Choice, ...], Float[np.ndarray, "folds N"]]:
        """Choose, per outer fold, the setting whose inner scores have the highest AUROC; return those scores too."""
        choices, make = self.baseline.choices, self.baseline.selector
        inner = np.empty((len(choices), len(outers), len(fold)))
        for index, choice in enumerate(choices):
            inputs = self.baseline.inputs(tables, choice)
            cache: _Cache = {}
            for place, outer in enumerate(outers):
                inner[index, place] = self.inner(inputs, fold, outer, choice, cache=cache, make=make)
        best = [
            int(np.argmax([_inner_auroc(scores[place], self.labels) for scores in inner])) if len(choices) > 1 else 0
            for place in range(len(outers))
        ]
        chosen = tuple(choices[index] for index in best)
        if make is None:
            return chosen, inner[best, np.arange(len(outers))]
        return chosen, self._inner_of_chosen(tables, fold, outers, chosen)

    def _inner_of_chosen(
        self, tables: Tables, fold: Int[np.ndarray, " N"], outers: Sequence[int], chosen: Sequence[Choice]
    ) -> Float[np.ndarray, "folds N"]:
        """Return the inner scores of the baseline's own estimator, where another one made the choice."""
        inner = np.empty((len(outers), len(fold)))
        for choice in dict.fromkeys(chosen):
            inputs = self.baseline.inputs(tables, choice)
            cache: _Cache = {}
            for place, outer in enumerate(outers):
                if chosen[place] == choice:
                    inner[place] = self.inner(inputs, fold, outer, choice, cache=cache)
        return inner

    def hold_out(
        self, tables: Tables, fold: Int[np.ndarray, " N"], chosen: Sequence[Choice]
    ) -> Float[np.ndarray, " N"]:
        """Score each fold by an estimator with the fold's setting, fitted on all other rows."""
        scores = np.empty(len(fold))
        for choice in dict.fromkeys(chosen):
            inputs = self.baseline.inputs(tables, choice)
            for outer in (number for number, made in enumerate(chosen) if made == choice):
                estimator = self.fit(inputs, fold != outer, choice)
                scores[fold == outer] = raw_scores(estimator, inputs[fold == outer])
        return scores


def raw_scores(estimator: BaseEstimator, inputs: Matrix) -> Float[np.ndarray, " N"]:
    """Return the decision function of an estimator or, where it has none, its probability of label 1.

    Dense inputs are read in float64, so that a row's score does not depend on the rows beside it by more than 1e-12.
    """
    if isinstance(inputs, np.ndarray):
        inputs = inputs.astype(np.float64)
    if hasattr(estimator, "decision_function"):
        return np.asarray(estimator.decision_function(inputs), dtype=np.float64)
    return np.asarray(estimator.predict_proba(inputs)[:, 1], dtype=np.float64)


def inner_folds(n_folds: int, outer: int, *, scheme: str) -> list[int]:
    """Return the inner folds of an outer one; where nothing is held out (-1), every fold.

    Neighbourhood on a ring is mutual, so that leaving out {k, k + 1} serves both.
    """
    if outer == NO_FOLD or scheme == "all":
        return [number for number in range(n_folds) if number != outer]
    return sorted({(outer - 1) % n_folds, (outer + 1) % n_folds})


def nest_baseline(
    baseline: Baseline,
    tables: Tables,
    fold: Int[np.ndarray, " N"],
    *,
    scheme: str,
    labels: Int[np.ndarray, " N"] | None = None,
) -> Nested:
    """Choose, fit and score one detector under one split, with the tables' labels or with others."""
    fitter = Fitter(baseline, tables.labels if labels is None else labels, scheme=scheme)
    chosen, inner = fitter.select(tables, fold, folds_of(fold))
    scores = fitter.hold_out(tables, fold, chosen)
    return Nested(scores, inner, chosen, fitter.n_fits, fitter.n_unconverged)


def hold_out_baseline(
    baseline: Baseline, labels: Int[np.ndarray, " N"], tables: Tables, fold: Int[np.ndarray, " N"]
) -> Nested:
    """Fit and score, with given labels, a detector that has nothing to choose; there are no inner scores."""
    fitter = Fitter(baseline, labels)
    chosen = baseline.choices * len(folds_of(fold))
    scores = fitter.hold_out(tables, fold, chosen)
    return Nested(scores, np.empty((0, len(fold))), chosen, fitter.n_fits, fitter.n_unconverged)


def make_stack(model: str = "logistic") -> Pipeline:
    """Return the estimator of a stack, on its parts' scores, of the kind that one of `STACK_CHOICES` names."""
    if model == "boosting":
        boosting = HistGradientBoostingClassifier(max_iter=100, max_depth=3, early_stopping=False, random_state=0)
        return make_pipeline(StandardScaler(), boosting)
    return make_pipeline(StandardScaler(), LogisticRegression(C=1.0, solver="newton-cholesky", max_iter=1000))


def nest_stack(parts: Sequence[Nested], labels: Int[np.ndarray, " N"], fold: Int[np.ndarray, " N"]) -> Nested:
    """Fit a stack per outer fold on its parts' inner scores; apply it to their out-of-fold scores."""
    held_out = np.stack([part.scores for part in parts], axis=1)
    scores, inner, chosen, n_fits, n_unconverged = np.empty(len(fold)), [], [], 0, 0
    for outer in folds_of(fold):
        fitted = fit_stack(np.stack([part.inner[outer] for part in parts], axis=1), labels, fold)
        scores[fold == outer] = raw_scores(fitted.estimator, held_out[fold == outer])
        inner.append(fitted.inner)
        chosen.append(fitted.choice)
        n_fits += fitted.n_fits
        n_unconverged += fitted.n_unconverged
    return Nested(scores, np.stack(inner), tuple(chosen), n_fits, n_unconverged)


@dataclasses.dataclass(frozen=True)
class FittedStack:
    """A stack fitted on all inner scores, and each inner fold's rows scored by one fitted on the other inner folds."""

    choice: Choice
    estimator: Pipeline
    inner: Float[np.ndarray, " N"]
    n_fits: int
    n_unconverged: int


def fit_stack(
    inputs: Float[np.ndarray, "N parts"], labels: Int[np.ndarray, " N"], fold: Int[np.ndarray, " N"]
) -> FittedStack:
    """Fit a stack on the rows that have scores, of the kind whose inner scores rank best; NaN marks the others."""
    scored = ~np.isnan(inputs).any(axis=1)
    inner, made = np.full((len(STACK_CHOICES), len(fold)), np.nan), []
    for index, choice in enumerate(STACK_CHOICES):
        for held_out in np.unique(fold[scored]):
            seen, rows = scored & (fold != held_out), scored & (fold == held_out)
            made.append(make_stack(str(choice.model)).fit(inputs[seen], labels[seen]))
            inner[index, rows] = raw_scores(made[-1], inputs[rows])
    best = int(np.argmax([_inner_auroc(scores, labels) for scores in inner]))
    made.append(make_stack(str(STACK_CHOICES[best].model)).fit(inputs[scored], labels[scored]))
    n_unconverged = sum(not _converged(each) for each in made)
    return FittedStack(STACK_CHOICES[best], made[-1], inner[best], len(made), n_unconverged)


def judge(nested: Nested, labels: Int[np.ndarray, " N"], fold: Int[np.ndarray, " N"], *, objective: str) -> Verdicts:
    """Calibrate each outer fold's scores and decide on its rows, by its inner scores alone."""
    probabilities, decisions = np.empty(len(fold)), np.empty(len(fold), dtype=np.int64)
    isotonic = np.empty(len(fold))
    for outer in folds_of(fold):
        rows = fold == outer
        slope, intercept, threshold = calibrate(nested.inner[outer], labels, objective=objective)
        probabilities[rows] = expit(slope * nested.scores[rows] + intercept)
        decisions[rows] = probabilities[rows] >= threshold
        inner, known = nested.inner[outer], ~np.isnan(nested.inner[outer])
        isotonic[rows] = statistics.fit_isotonic(inner[known], labels[known]).predict(nested.scores[rows])
    return Verdicts(probabilities, decisions, isotonic)


def calibrate(
    scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], *, objective: str
) -> tuple[float, float, float]:
    """Return (slope, intercept, threshold): Platt's line from score to log-odds, and the probability to decide at.

    Rows whose score is NaN are left out.
    """
    scores, labels = scores[~np.isnan(scores)], labels[~np.isnan(scores)]
    slope, intercept = statistics.fit_platt(scores, labels)
    probabilities = expit(slope * scores + intercept)
    return slope, intercept, statistics.choose_threshold(probabilities, labels, objective=objective)


@contextlib.contextmanager
def quiet_single_threaded_blas() -> Iterator[None]:
    """Keep BLAS to one thread (the steps have their own) and ConvergenceWarning off the terminal (they are counted)."""
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def folds_of(fold: Int[np.ndarray, " N"]) -> range:
    """Return the numbers of the folds."""
    return range(int(fold.max()) + 1)


def _inner_auroc(scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float:
    scored = ~np.isnan(scores) & (labels != UNKNOWN_LABEL)
    return float(roc_auc_score(labels[scored], scores[scored]))


def _converged(estimator: BaseEstimator) -> bool:
    last = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    is_linear = hasattr(last, "coef_") and hasattr(last, "n_iter_")  # boosting makes all its iterations by intent
    return not is_linear or bool(np.all(last.n_iter_ < last.max_iter))
