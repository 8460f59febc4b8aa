"""Numbers from scores: rates at a threshold, calibration, risk at a coverage, AUROC on resampled groups, p-values."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, Num
from scipy import stats
from scipy.stats import rankdata
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

THRESHOLDS = ("youden", "f1", "accuracy")
_BLOCK_BYTES = 2**25  # of one work array in the bootstrap: a few of them stay in cache-friendly reach of any machine


def fit_platt(scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> tuple[float, float]:
    """Return (slope, intercept) of the log-odds as a line in the score.

    Logistic regression on the standardised score with a standard normal prior on its slope, which keeps it finite when
    the score separates the classes. A constant score gives slope 0 and the log-odds of the base rate.
    Source: Platt 1999, "Probabilistic outputs for support vector machines"; the prior replaces his smoothed targets.
    """
    mean, deviation = float(np.mean(scores)), float(np.std(scores))
    if deviation <= 1e-12 * abs(mean):
        rate = float(np.mean(labels))
        return 0.0, math.log(rate / (1 - rate))
    standard = ((scores - mean) / deviation)[:, None]
    line = LogisticRegression(C=1.0, solver="newton-cholesky").fit(standard, labels)
    slope = float(line.coef_[0, 0]) / deviation
    return slope, float(line.intercept_[0]) - slope * mean


def fit_isotonic(scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> IsotonicRegression:
    """Fit the rising curve from score to rate that has the least squared error; beyond the scores seen it is flat.

    Source: Zadrozny and Elkan 2002, "Transforming classifier scores into accurate multiclass probability estimates".
    """
    return IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(scores, labels)


def choose_threshold(
    probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], *, objective: str = "youden"
) -> float:
    """Return the probability from which on a row counts as hallucinated, midway between two rows' values.

    Args:
        objective: what is largest there: "youden" (true minus false positive rate), "f1" or "accuracy". Ties go to the
            higher accuracy.
    """
    values, tp, fp = _cuts(probabilities, labels)
    n_wrong, n_right = int(labels.sum()), int(len(labels) - labels.sum())
    accuracy = (tp + n_right - fp) / len(labels)
    gain = {
        "youden": tp / n_wrong - fp / n_right,
        "f1": 2 * tp / (tp + fp + n_wrong),
        "accuracy": accuracy,
    }[objective]
    best = int(np.lexsort((accuracy, gain))[-1])
    edges = np.concatenate([[1.0], values, [0.0]])
    return float((edges[best] + edges[best + 1]) / 2)


def _cuts(
    scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " cuts"], Int[np.ndarray, " cuts+1"], Int[np.ndarray, " cuts+1"]]:
    """Return the distinct scores, falling, and true and false positives when the first 0, 1, ... of them count."""
    values, index = np.unique(-scores, return_inverse=True)
    wrong = np.bincount(index, weights=labels, minlength=len(values)).astype(np.int64)
    right = np.bincount(index, minlength=len(values)) - wrong
    return -values, np.concatenate([[0], np.cumsum(wrong)]), np.concatenate([[0], np.cumsum(right)])


def calibration_curve(
    probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], *, bins: int
) -> list[dict[str, Any]]:
    """Return mean probability, observed rate and rows of each bin of about equal mass; equal values share a bin."""
    edges = np.quantile(probabilities, np.linspace(0, 1, bins + 1)[1:-1])
    index = np.searchsorted(edges, probabilities, side="right")
    curve = []
    for bin_number in np.unique(index):
        inside = index == bin_number
        curve.append(
            {
                "mean_probability": float(probabilities[inside].mean()),
                "observed": float(labels[inside].mean()),
                "n": int(inside.sum()),
            }
        )
    return curve


def calibration_error(curve: list[dict[str, Any]]) -> float:
    """Return the expected calibration error: |mean probability - observed rate|, averaged over rows."""
    n = sum(point["n"] for point in curve)
    return sum(point["n"] * abs(point["mean_probability"] - point["observed"]) for point in curve) / n


def ranking_metrics(scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> dict[str, float]:
    """Return AUROC, PR-AUC (average precision) and the base rate, which is what PR-AUC is without information."""
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "pr_auc": float(average_precision_score(labels, scores)),
        "base_rate": float(np.mean(labels)),
    }


def calibration_metrics(
    probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], *, bins: int
) -> dict[str, Any]:
    """Return the Brier score, the expected calibration error over `bins` bins of equal mass, and the bins."""
    curve = calibration_curve(probabilities, labels, bins=bins)
    return {
        "brier": float(brier_score_loss(labels, probabilities)),
        "ece": calibration_error(curve),
        "calibration": curve,
    }


def risk_coverage(
    scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], *, points: int = 20
) -> dict[str, Any]:
    """Return how many of the answers kept are hallucinated when those of the highest scores are withheld.

    Risk at coverage c is the share hallucinated among the c N answers of the lowest scores; answers of one score are
    kept in random order, whose expectation this is. AURC is the mean of the risk over coverages 1/N, 2/N, ..., 1.
    Source: Geifman et al. 2019, "Bias-reduced uncertainty estimation for deep neural classifiers", arXiv:1805.08206.

    Args:
        points: of the curve, evenly from 1 / points to 1.

    Returns:
        aurc; aurc_best, of a ranking without an error (a ranking by chance has the base rate); risk_coverage: a row per
        point with coverage and risk.
    """
    _, wrong, right = _cuts(-scores, labels)
    kept_at = (wrong + right).astype(np.float64)
    n_rows, n_right = len(labels), int(right[-1])
    kept = np.arange(1, n_rows + 1)
    coverage = np.arange(1, points + 1) / points
    return {
        "aurc": float(np.mean(np.interp(kept, kept_at, wrong) / kept)),
        "aurc_best": float(np.mean(np.maximum(kept - n_right, 0) / kept)),
        "risk_coverage": [
            {"coverage": float(share), "risk": float(np.interp(share * n_rows, kept_at, wrong) / (share * n_rows))}
            for share in coverage
        ],
    }


def decision_metrics(decisions: Int[np.ndarray, "repeats N"], labels: Int[np.ndarray, " N"]) -> dict[str, float]:
    """Return accuracy, precision, recall and F1 of all decisions together; a ratio over nothing is 0."""
    tp = int(np.sum((decisions == 1) & (labels == 1)))
    fp = int(np.sum((decisions == 1) & (labels == 0)))
    fn = int(np.sum((decisions == 0) & (labels == 1)))
    return {
        "accuracy": float(np.mean(decisions == labels)),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
    }


def draw_group_weights(n_groups: int, *, resamples: int, seed: int) -> Integer[np.ndarray, "resamples {n_groups}"]:
    """Draw `resamples` bootstrap samples of groups and return how often each holds each group."""
    rng = np.random.default_rng([seed, n_groups])
    weights = np.empty((resamples, n_groups), dtype=np.uint16)
    for row in weights:
        row[:] = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
    return weights


def resample_auroc(
    scores: Float[np.ndarray, " N"],
    labels: Int[np.ndarray, " N"],
    *,
    group: Int[np.ndarray, " N"],
    weights: Num[np.ndarray, "resamples groups"],
    positives: Float[np.ndarray, "N sets"] | None = None,
) -> Float[np.ndarray, "resamples sets"]:
    """Return the AUROC of each resample, for each set of hallucinated rows against all right rows.

    A row weighs as often as its group was drawn:
    AUROC = sum over hallucinated i of w_i (W_below(s_i) + W_tied(s_i) / 2) / (W_hallucinated W_right),
    the W being sums of weights of right rows. These are differences of one cumulative sum per resample along the sorted
    right rows, whose places do not depend on the resample.

    Args:
        group: each row's column in `weights`.
        weights: how often each group counts.
        positives: 1 where a hallucinated row belongs to a set, one column per set; without it, one set of all.

    Returns:
        NaN where a resample has no row of a class.
    """
    wrong, right = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    right = right[np.argsort(scores[right], kind="stable")]
    below = np.searchsorted(scores[right], scores[wrong], side="left")
    to_tied = np.searchsorted(scores[right], scores[wrong], side="right")
    sets = np.ones((len(wrong), 1)) if positives is None else positives[wrong]
    aurocs = np.empty((len(weights), sets.shape[1]))
    step = max(1, _BLOCK_BYTES // (8 * max(len(labels), 1)))
    for start in range(0, len(weights), step):
        # Groups along the first axis: gathering a row copies contiguous memory and the sum runs over vectors.
        drawn = np.ascontiguousarray(weights[start : start + step].T, dtype=np.float64)
        cumulative = np.zeros((len(right) + 1, drawn.shape[1]))
        np.cumsum(drawn[group[right]], axis=0, out=cumulative[1:])
        of_wrong = drawn[group[wrong]]
        beaten = cumulative[below]
        beaten += cumulative[to_tied]
        beaten *= of_wrong
        pairs = (sets.T @ of_wrong) * cumulative[-1]
        with np.errstate(invalid="ignore"):
            aurocs[start : start + step] = (sets.T @ beaten / 2 / pairs).T
    return aurocs


def permutation_p(
    scores: Float[np.ndarray, "N sets"],
    labels: Int[np.ndarray, " N"],
    *,
    group: Int[np.ndarray, " N"],
    permutations: int,
    seed: int,
) -> Float[np.ndarray, " sets"]:
    """Return the share of label permutations whose AUROC is at least the one found, the data as found among them.

    The null is that scores know nothing of labels that come in groups: groups of one size exchange their labels whole,
    and each group then shuffles them among its rows. Scores are held fixed; those that were fitted on these labels out
    of fold vary up to about sqrt(2) times more under the null than their permutations do (see `Results` in
    `detection.protocol`), so that theirs are too small: of linear detectors that know nothing about 12 in 100, not 5,
    would have 0.05 or less.
    Source: Phipson and Smyth 2010, "Permutation p-values should never be zero", eq. (2).

    Args:
        scores: one column per detector; all are judged on the same permutations.
    """
    ranks = rankdata(scores, axis=0)  # their sum over label 1 orders the AUROCs; multiples of 1/2, so sums are exact
    found = ranks.T @ labels
    reached = np.ones(scores.shape[1])
    step = max(1, _BLOCK_BYTES // (8 * max(len(labels), 1)))
    for start in range(0, permutations, step):
        drawn = permute_labels(labels, group, permutations=min(step, permutations - start), seed=(seed, start))
        reached += np.sum(drawn.astype(np.float64) @ ranks >= found, axis=0)
    return reached / (1 + permutations)


def permute_labels(
    labels: Int[np.ndarray, " N"], group: Int[np.ndarray, " N"], *, permutations: int, seed: tuple[int, ...]
) -> Int[np.ndarray, "{permutations} N"]:
    """Let groups of one size exchange their labels, and each group shuffle its own, `permutations` times."""
    rng = np.random.default_rng([*seed, 2])
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    permuted = np.empty((permutations, len(labels)), dtype=labels.dtype)
    for size in np.unique(sizes[sizes > 0]):
        rows = order[starts[sizes == size][:, None] + np.arange(size)]
        own = np.repeat(labels[rows][None], permutations, axis=0)
        is_mixed = labels[rows].min(axis=1) < labels[rows].max(axis=1)
        own[:, is_mixed] = rng.permuted(own[:, is_mixed], axis=2)
        exchanged = rng.permuted(np.tile(np.arange(len(rows)), (permutations, 1)), axis=1)
        permuted[:, rows.ravel()] = np.take_along_axis(own, exchanged[:, :, None], axis=1).reshape(permutations, -1)
    return permuted


def interval(values: Float[np.ndarray, " resamples"]) -> tuple[float | None, float | None]:
    """Return the 2.5th and 97.5th percentiles of the values that are not NaN, or (None, None) where all are."""
    defined = values[~np.isnan(values)]
    if not defined.size:
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def with_interval(point: float | None, resampled: Float[np.ndarray, " resamples"], *, name: str) -> Mapping[str, Any]:
    """Return {name: point, "ci_low", "ci_high"}: a 95 % percentile interval."""
    low, high = interval(resampled)
    return {name: point, "ci_low": low, "ci_high": high}


def over_draws(scores: Float[np.ndarray, "draws N"], labels: Int[np.ndarray, " N"]) -> dict[str, Any]:
    """Return the mean AUROC of scores that are drawn at random, a 95 % t-interval, and a one-sided t-test above 0.5."""
    aurocs = np.array([roc_auc_score(labels, draw) for draw in scores])
    mean, error = float(aurocs.mean()), max(stats.sem(aurocs), np.finfo(float).tiny)  # 0 where all draws rank perfectly
    t = stats.t(len(aurocs) - 1)
    half = float(t.ppf(0.975) * error)
    return {
        "auroc": mean,
        "ci_low": mean - half,
        "ci_high": mean + half,
        "p_value": float(t.sf((mean - 0.5) / error)),
        "auroc_by_draw": aurocs.tolist(),
    }
