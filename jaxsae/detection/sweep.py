"""Which of many settings to take, and what the choice is worth: chosen by inner validation, scored on the outer fold.

A candidate is a detector under one setting. For each outer fold the candidate of the best inner value is taken, and its
scores of the fold's rows are kept: no row's label had a say in the choice that scores it. Beside this stands what one
reports who picks the best candidate by the very rows that it is judged on; the difference is the optimism.

Folds of different settings of one detector are ranked together by raw scores, as `evaluate` ranks those of different
layers and penalties; folds of different detectors, whose scores have different units, by calibrated probabilities.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from jaxsae.artifacts import InputError
from jaxsae.detection import statistics
from jaxsae.detection.baselines import LOGPROB_DETECTORS, PROBES, STACKS, TEXT_DETECTORS, make_baselines, parts_of
from jaxsae.detection.config import ProtocolConfig
from jaxsae.detection.nesting import (
    Nested,
    calibrate,
    folds_of,
    judge,
    nest_baseline,
    nest_stack,
    quiet_single_threaded_blas,
)
from jaxsae.detection.steps import Steps
from jaxsae.detection.tables import Tables

MEASURES = ("auroc", "accuracy", "f1")
ANY = "any"  # the "detector" of a choice between all detectors
# These read nothing of the tracks: under all settings of the tracker they are the same.
_WITHOUT_TRACKS = frozenset(
    ("class_prior", "length", *TEXT_DETECTORS, *LOGPROB_DETECTORS, *PROBES, "sae_logistic", "sae_best_latent")
)

Known = dict[tuple[Any, ...], Nested]


@dataclasses.dataclass(frozen=True)
class Point:
    """What a setting's detectors reached.

    Attributes:
        scores: out of fold, in the detector's own unit; higher = more likely hallucinated.
        probabilities: the same scores, calibrated in inner validation by Platt's line.
        decisions: 1 where the probability reaches the threshold that inner validation chose.
        inner: by measure of `MEASURES`, what inner validation says of each outer fold, whose rows are not in it.
    """

    scores: Float[np.ndarray, "detectors repeats N"]
    probabilities: Float[np.ndarray, "detectors repeats N"]
    decisions: Integer[np.ndarray, "detectors repeats N"]
    inner: Float[np.ndarray, "measures detectors repeats folds"]
    n_fits: int
    n_unconverged: int

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every field as an array, for an .npz; `from_arrays` is the way back."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Point":
        """Build a point from what `arrays` gave; other names are left alone."""
        fields: dict[str, Any] = {field.name: arrays[field.name] for field in dataclasses.fields(cls)}
        return cls(**fields | {name: int(fields[name]) for name in ("n_fits", "n_unconverged")})


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the answers are judged by: labels, the group of each, and its fold in each repeat."""

    labels: Int[np.ndarray, " N"]
    group: Int[np.ndarray, " N"]
    folds: Int[np.ndarray, "repeats N"]


def fit_point(
    tables: Tables, config: ProtocolConfig, *, folds: Int[np.ndarray, "repeats N"], known: Known | None = None
) -> Point:
    """Fit, choose, calibrate and score the config's detectors on frozen folds, as `evaluate` does on its own.

    Args:
        folds: of each row in each repeat, as `make_folds` gives.
        known: keeps what does not depend on the tracks from one point of the same answers to the next.
    """
    known = {} if known is None else known
    with quiet_single_threaded_blas():
        nested = [_nest_all(tables, config, fold, repeat, known) for repeat, fold in enumerate(folds)]
        by_detector = [[of_repeat[name] for of_repeat in nested] for name in config.detectors]
        verdicts = [
            [
                judge(each, tables.labels, fold, objective=config.threshold)
                for each, fold in zip(row, folds, strict=True)
            ]
            for row in by_detector
        ]
        inner = [
            [
                _inner_values(each, tables.labels, fold, objective=config.threshold)
                for each, fold in zip(row, folds, strict=True)
            ]
            for row in by_detector
        ]
    fitted = [each for of_repeat in nested for each in of_repeat.values()]
    return Point(
        scores=np.array([[each.scores for each in row] for row in by_detector]),
        probabilities=np.array([[each.probabilities for each in row] for row in verdicts]),
        decisions=np.array([[each.decisions for each in row] for row in verdicts], dtype=np.int8),
        inner=np.moveaxis(np.array(inner), 2, 0),
        n_fits=sum(each.n_fits for each in fitted),
        n_unconverged=sum(each.n_unconverged for each in fitted),
    )


def _nest_all(
    tables: Tables, config: ProtocolConfig, fold: Int[np.ndarray, " N"], repeat: int, known: Known
) -> dict[str, Nested]:
    baselines = make_baselines(config.settings, tables.n_layers)
    nested = {}
    for name in config.parts:
        key = (name, repeat, config.settings, config.inner)
        nested[name] = known[key] if key in known else nest_baseline(baselines[name], tables, fold, scheme=config.inner)
        if name in _WITHOUT_TRACKS:
            known[key] = nested[name]
    for name in (name for name in STACKS if name in config.detectors):
        parts = [nested[part] for part in parts_of(name, config.families)]
        nested[name] = nest_stack(parts, tables.labels, fold)
    return nested


def _inner_values(
    nested: Nested, labels: Int[np.ndarray, " N"], fold: Int[np.ndarray, " N"], *, objective: str
) -> Float[np.ndarray, "measures folds"]:
    """Return AUROC, accuracy and F1 of each outer fold's inner scores, at the threshold that is chosen on them."""
    columns = []
    for outer in folds_of(fold):
        scored = ~np.isnan(nested.inner[outer])
        scores, known = nested.inner[outer][scored], labels[scored]
        slope, intercept, threshold = calibrate(scores, known, objective=objective)
        decisions = (expit(slope * scores + intercept) >= threshold).astype(np.int64)
        metrics = statistics.decision_metrics(decisions[None], known)
        columns.append([float(roc_auc_score(known, scores)), metrics["accuracy"], metrics["f1"]])
    return np.array(columns).T


class Resamples:
    """AUROC, accuracy and F1 of any scores and decisions, on all rows and on the same resamples of groups."""

    def __init__(self, rows: Rows, *, resamples: int, seed: int) -> None:
        self.rows = rows
        self.n_groups = int(rows.group.max()) + 1
        self.weights = statistics.draw_group_weights(self.n_groups, resamples=resamples, seed=seed)

    def measure(
        self, name: str, scores: Float[np.ndarray, "repeats N"], decisions: Integer[np.ndarray, "repeats N"]
    ) -> tuple[float, Float[np.ndarray, " resamples"]]:
        """Return a measure of `MEASURES`, and what it is on each resample.

        AUROC ranks each answer by the mean of its scores over the repeats; the others count a decision per (repeat,
        answer).
        """
        labels, group = self.rows.labels, self.rows.group
        if name == "auroc":
            mean = scores.mean(axis=0)
            drawn = statistics.resample_auroc(mean, labels, group=group, weights=self.weights)[:, 0]
            return float(roc_auc_score(labels, mean)), drawn
        point = statistics.decision_metrics(decisions.astype(np.int64), labels)[name]
        hit, flagged = (decisions == labels).sum(axis=0), (decisions == 1).sum(axis=0)
        if name == "accuracy":
            over, under = hit, np.full(len(labels), len(decisions))
        else:  # F1 = 2 tp / (flagged + hallucinated)
            over, under = 2 * (hit * (labels == 1)), flagged + len(decisions) * (labels == 1)
        return point, self._sum(over) / np.maximum(self._sum(under), 1)

    def _sum(self, of_row: np.ndarray) -> Float[np.ndarray, " resamples"]:
        return self.weights @ np.bincount(self.rows.group, weights=of_row, minlength=self.n_groups)


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """Detectors under settings: a row each of what a choice needs; `drawn` is the chosen measure on each resample."""

    names: tuple[tuple[str, str], ...]  # setting, detector
    scores: Float[np.ndarray, "candidates repeats N"]
    decisions: Integer[np.ndarray, "candidates repeats N"]
    inner: Float[np.ndarray, "candidates repeats folds"]
    point: Float[np.ndarray, " candidates"]
    drawn: Float[np.ndarray, "candidates resamples"]
    allowed: Bool[np.ndarray, "candidates repeats folds"]


def judge_points(
    rows: Rows,
    points: Mapping[str, Point],
    detectors: Sequence[str],
    *,
    metric: str = "auroc",
    resamples: int = 2000,
    seed: int = 0,
    reference: str | None = None,
    allowed: Mapping[str, Bool[np.ndarray, "repeats folds"]] | None = None,
    steps: Steps | None = None,
) -> dict[str, Any]:
    """Return what each setting reached, what choosing between them reached, and the optimism of picking the best.

    Args:
        points: by setting.
        detectors: what the first axis of the points' arrays counts.
        metric: of `MEASURES`, what inner validation chooses by and the optimism is of.
        reference: the setting that the choice is compared with.
        allowed: by setting, for which outer folds it may be chosen: not where a search that proposed it had seen the
            fold's labels. All where it is not given.

    Returns:
        settings: a row per (setting, detector): each measure with `_ci_low` and `_ci_high`, `inner` (the mean of the
        metric over outer folds), `n_chosen`. choices: a row per detector, and one between all of them ("any"):
        `nested`, `naive`, `optimism` and, with a reference, `gain`, each with interval; `chosen` for each outer fold.

    Raises:
        InputError: there is nothing to choose from.
    """
    if not points:
        raise InputError("the sweep tried no setting; name some in sweep.settings or sweep.axes")
    drawn = Resamples(rows, resamples=resamples, seed=seed)
    steps = steps or Steps(1, None, total=len(points))
    everywhere = np.ones((len(rows.folds), len(folds_of(rows.folds[0]))), dtype=bool)
    measured = steps.run({("interval of", name): functools.partial(_measure, drawn, points[name]) for name in points})
    found = {name: of_setting for (_, name), of_setting in measured.items()}
    names = list(points)
    may = np.stack([everywhere if allowed is None else allowed[name] for name in names])
    by_detector = []
    for place, detector in enumerate(detectors):
        by_detector.append(
            _Candidates(
                names=tuple((name, detector) for name in names),
                scores=np.stack([points[name].scores[place] for name in names]),
                decisions=np.stack([points[name].decisions[place] for name in names]),
                inner=np.stack([points[name].inner[MEASURES.index(metric), place] for name in names]),
                point=np.array([found[name][place][metric][0] for name in names]),
                drawn=np.stack([found[name][place][metric][1] for name in names]),
                allowed=may,
            )
        )
    choices = [
        _choose(rows, candidates, drawn, metric) | {"detector": candidates.names[0][1]} for candidates in by_detector
    ]
    if len(detectors) > 1:
        choices.append(_choose(rows, _pool(by_detector, points, names), drawn, metric) | {"detector": ANY})
    for choice, candidates in zip(choices, by_detector, strict=False):
        choice |= _gain(choice, candidates, reference)
    return {
        "settings": [
            _setting_row(name, detector, found[name][place], by_detector[place], choices[place])
            for place, detector in enumerate(detectors)
            for name in names
        ],
        "choices": [{key: value for key, value in choice.items() if key != "drawn"} for choice in choices],
    }


def _measure(drawn: Resamples, point: Point) -> list[dict[str, tuple[float, np.ndarray]]]:
    """Return, for each detector, each measure and its resamples."""
    return [
        {name: drawn.measure(name, scores, decisions) for name in MEASURES}
        for scores, decisions in zip(point.scores, point.decisions, strict=True)
    ]


def _pool(by_detector: Sequence[_Candidates], points: Mapping[str, Point], names: Sequence[str]) -> _Candidates:
    """Put all detectors' candidates in one; their scores become probabilities, the unit that all have."""
    return _Candidates(
        names=tuple(pair for each in by_detector for pair in each.names),
        scores=np.concatenate(
            [np.stack([points[name].probabilities[place] for name in names]) for place in range(len(by_detector))]
        ),
        **{
            field: np.concatenate([getattr(each, field) for each in by_detector])
            for field in ("decisions", "inner", "point", "drawn", "allowed")
        },
    )


def _choose(rows: Rows, candidates: _Candidates, drawn: Resamples, metric: str) -> dict[str, Any]:
    """Return the nested choice's measures, the naive pick's, and the difference, on the same resamples."""
    inner = np.where(candidates.allowed, candidates.inner, -np.inf)
    best = inner.argmax(axis=0)  # [repeats folds]; the first wins a tie
    of_row = np.take_along_axis(best, rows.folds, axis=1)  # [repeats N]
    repeats, places = np.arange(len(rows.folds))[:, None], np.arange(len(rows.labels))
    scores, decisions = candidates.scores[of_row, repeats, places], candidates.decisions[of_row, repeats, places]
    nested = {name: drawn.measure(name, scores, decisions) for name in MEASURES}
    pick = int(candidates.point.argmax())
    highest = candidates.drawn.max(axis=0)  # in each resample the pick is made anew
    point, resampled = nested[metric]
    setting, detector = candidates.names[pick]
    mean = candidates.inner.mean(axis=(1, 2))
    return {
        "metric": metric,
        "n_candidates": len(candidates.names),
        "nested": {name: _row(*values) for name, values in nested.items()},
        "naive": {"setting": setting, "detector": detector, **_row(candidates.point[pick], highest)},
        "optimism": _row(candidates.point[pick] - point, highest - resampled),
        "to_use": dict(zip(("setting", "detector"), candidates.names[int(mean.argmax())], strict=True)),
        "chosen": [
            {
                "repeat": repeat,
                "fold": fold,
                **dict(zip(("setting", "detector"), candidates.names[best[repeat, fold]], strict=True)),
                "inner": float(inner[best[repeat, fold], repeat, fold]),
                "n_candidates": int(candidates.allowed[:, repeat, fold].sum()),
            }
            for repeat, fold in np.ndindex(*best.shape)
        ],
        "drawn": resampled,
    }


def _gain(choice: Mapping[str, Any], candidates: _Candidates, reference: str | None) -> dict[str, Any]:
    """Return what the nested choice has over the reference setting, paired on the same resamples."""
    names = [setting for setting, _ in candidates.names]
    if reference not in names:
        return {"gain": None}
    place = names.index(reference)
    value = choice["nested"][choice["metric"]]["value"] - candidates.point[place]
    return {"gain": {"over": reference, **_row(value, choice["drawn"] - candidates.drawn[place])}}


def _setting_row(
    name: str,
    detector: str,
    measured: Mapping[str, tuple[float, np.ndarray]],
    candidates: _Candidates,
    choice: Mapping[str, Any],
) -> dict[str, Any]:
    place = candidates.names.index((name, detector))
    row: dict[str, Any] = {"setting": name, "detector": detector}
    for measure, (point, resampled) in measured.items():
        low, high = statistics.interval(resampled)
        row |= {measure: float(point), f"{measure}_ci_low": low, f"{measure}_ci_high": high}
    n_chosen = sum(each["setting"] == name for each in choice["chosen"])
    return row | {"inner": float(candidates.inner[place].mean()), "n_chosen": n_chosen}


def _row(point: float, resampled: Float[np.ndarray, " resamples"]) -> dict[str, Any]:
    return dict(statistics.with_interval(float(point), resampled, name="value"))


def published_error(measure: str, value: float, rows: int) -> float | None:
    """Return the standard error of another project's number on that many test rows; None where it has no formula.

    Of AUROC with rows of both classes in equal shares, where it is smallest or nearly; of accuracy the binomial's. F1
    has none without the counts behind it.
    Source: Hanley and McNeil 1982, "The meaning and use of the area under a receiver operating characteristic curve".
    """
    if measure == "accuracy":
        return math.sqrt(value * (1 - value) / rows)
    if measure != "auroc":
        return None
    n = rows / 2
    above_two = value / (2 - value) - value**2
    below_two = 2 * value**2 / (1 + value) - value**2
    return math.sqrt((value * (1 - value) + (n - 1) * (above_two + below_two)) / n**2)
