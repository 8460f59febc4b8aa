"""The detector that is kept: fitted on all rows, calibrated on scores it did not fit, saved without pickle."""

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import skops.io
from jaxtyping import Float, Int
from scipy.special import expit
from sklearn.base import BaseEstimator

from jaxsae.artifacts import InputError, atomic_write, read_json, sha256_file, write_json
from jaxsae.detection.baselines import STACKS, make_baselines, parts_of
from jaxsae.detection.config import ProtocolConfig
from jaxsae.detection.nesting import (
    NO_FOLD,
    Fitter,
    calibrate,
    fit_stack,
    quiet_single_threaded_blas,
    raw_scores,
)
from jaxsae.detection.specs import Baseline, Choice, Settings
from jaxsae.detection.splits import check_rows, make_folds
from jaxsae.detection.tables import Tables

JSON_NAME = "detector.json"
ESTIMATORS_NAME = "estimators.skops"
TRUSTED = (  # beyond what skops trusts by itself: most of NumPy, SciPy and scikit-learn
    "jaxsae.detection.estimators.BestLatent",
    "jaxsae.detection.estimators.FixedScore",
    "jaxsae.detection.estimators.L1Logistic",
    "jaxsae.detection.estimators.MeanProbability",
    "jaxsae.detection.estimators.TrainVocabulary",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.tree._tree.Tree",
)
_REBUILD = "run jaxsae detect"


@dataclasses.dataclass(frozen=True)
class Part:
    """One fitted estimator and the inputs it reads."""

    name: str
    choice: Choice
    estimator: BaseEstimator


@dataclasses.dataclass(frozen=True)
class FittedDetector:
    """A fitted detector: `predict_proba` gives calibrated probabilities, column 1 = hallucinated.

    Attributes:
        name: one of `DETECTORS`.
        parts: what is scored; one, or a stack's.
        stack: the estimator on the parts' scores, None where there is one part.
        slope, intercept: log-odds = slope · score + intercept.
        threshold: the probability from which on `predict` says 1.
        layout: what the inputs must be: `n_layers`, `width`, `n_latents`, `positions`, `track_columns`, and the number
            of columns of each of `track_families`.
        settings: what the estimators were made with.
        n_rows, n_groups: what it was fitted on.
    """

    name: str
    parts: tuple[Part, ...]
    stack: BaseEstimator | None
    slope: float
    intercept: float
    threshold: float
    layout: dict[str, Any]
    settings: Settings
    n_rows: int
    n_groups: int

    def scores(self, tables: Tables) -> Float[np.ndarray, " N"]:
        """Return uncalibrated scores, higher = more likely hallucinated; raises as `part_scores` does."""
        return self.combine(self.part_scores(tables))

    def combine(self, part_scores: Float[np.ndarray, "N parts"]) -> Float[np.ndarray, " N"]:
        """Return the uncalibrated scores that the parts' scores amount to."""
        return part_scores[:, 0] if self.stack is None else raw_scores(self.stack, part_scores)

    def calibrated(self, scores: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Return the probabilities of hallucination that uncalibrated scores stand for."""
        return expit(self.slope * scores + self.intercept)

    def part_scores(self, tables: Tables) -> Float[np.ndarray, "N parts"]:
        """Return the score of each of `parts`, in their order.

        Raises:
            InputError: the tables have another layout than the rows the detector was fitted on.
        """
        found = _layout(tables)
        for key in ("n_layers", "width", "positions", "track_columns", "track_families"):
            if found[key] != self.layout[key]:
                raise InputError(
                    f"the detector was fitted on rows with {key} {self.layout[key]}, these have {found[key]}; use the "
                    "model, SAEs and config it was fitted with, or run jaxsae detect"
                )
        # Latents that no training row had carry no weight: the columns end where they did in training.
        tables = dataclasses.replace(tables, n_latents=self.layout["n_latents"])
        baselines = make_baselines(self.settings, tables.n_layers)
        with quiet_single_threaded_blas():  # a tree's threads wait for each other longer than one takes
            columns = [
                raw_scores(part.estimator, baselines[part.name].inputs(tables, part.choice)) for part in self.parts
            ]
        return np.stack(columns, axis=1)

    def predict_proba(self, tables: Tables) -> Float[np.ndarray, "N 2"]:
        """Return the calibrated probabilities of right (column 0) and hallucinated (column 1)."""
        hallucinated = self.calibrated(self.scores(tables))
        return np.stack([1 - hallucinated, hallucinated], axis=1)

    def predict(self, tables: Tables) -> Int[np.ndarray, " N"]:
        """Return 1 (hallucinated) where the probability reaches the threshold, else 0."""
        return (self.predict_proba(tables)[:, 1] >= self.threshold).astype(np.int64)

    def save(self, directory: str | os.PathLike) -> None:
        """Write `estimators.skops` and `detector.json`, which holds its sha256 and everything that is no estimator."""
        directory = Path(directory)
        estimators = [part.estimator for part in self.parts] + ([self.stack] if self.stack is not None else [])
        with atomic_write(directory / ESTIMATORS_NAME) as partial:
            partial.write_bytes(skops.io.dumps(estimators, compression=zipfile.ZIP_DEFLATED))
        content = {
            "name": self.name,
            "parts": [{"name": part.name, **part.choice._asdict()} for part in self.parts],
            "is_stack": self.stack is not None,
            "calibration": {"slope": self.slope, "intercept": self.intercept},
            "threshold": self.threshold,
            "layout": self.layout,
            "settings": dataclasses.asdict(self.settings),
            "n_rows": self.n_rows,
            "n_groups": self.n_groups,
            "estimators_sha256": sha256_file(directory / ESTIMATORS_NAME),
        }
        write_json(directory / JSON_NAME, content)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "FittedDetector":
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing, damaged, or holds a type that a detector has not.
        """
        path = Path(directory) / JSON_NAME
        content = read_json(path, rebuild=_REBUILD)
        try:
            estimators = _load_estimators(Path(directory) / ESTIMATORS_NAME, content["estimators_sha256"])
            stack = estimators.pop() if content["is_stack"] else None
            if len(estimators) != len(content["parts"]):
                raise InputError(
                    f"{path} names {len(content['parts'])} parts, {ESTIMATORS_NAME} holds {len(estimators)}; {_REBUILD}"
                )
            parts = [
                Part(part["name"], Choice(*(part[field] for field in Choice._fields)), estimator)
                for part, estimator in zip(content["parts"], estimators, strict=True)
            ]
            settings = content["settings"] | {
                name: tuple(content["settings"][name]) for name in ("probe_c", "families")
            }
            return cls(
                name=content["name"],
                parts=tuple(parts),
                stack=stack,
                slope=content["calibration"]["slope"],
                intercept=content["calibration"]["intercept"],
                threshold=content["threshold"],
                layout=content["layout"],
                settings=Settings(**settings),
                n_rows=content["n_rows"],
                n_groups=content["n_groups"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is not a detector's description ({error!r}); {_REBUILD}") from None


def fit_detector(tables: Tables, config: ProtocolConfig) -> FittedDetector:
    """Fit the detector `config.deploy` on all rows.

    Layer, penalty, calibration, threshold and a stack's weights come from out-of-fold scores of the first split of
    `evaluate`; the estimators are then fitted on every row.

    Raises:
        InputError: rows without a label, fewer than two classes, or too few groups for the folds.
    """
    check_rows(tables, config)
    fold = make_folds(tables, dataclasses.replace(config, repeats=1))[0]
    baselines = make_baselines(config.settings, tables.n_layers)
    names = parts_of(config.deploy, config.families)
    with quiet_single_threaded_blas():
        fitted = [_fit_part(baselines[name], tables, fold) for name in names]
        stack, inner = None, fitted[0][1]
        if config.deploy in STACKS:
            fitted_stack = fit_stack(np.stack([scores for _, scores in fitted], axis=1), tables.labels, fold)
            stack, inner = fitted_stack.estimator, fitted_stack.inner
        slope, intercept, threshold = calibrate(inner, tables.labels, objective=config.threshold)
    return FittedDetector(
        name=config.deploy,
        parts=tuple(part for part, _ in fitted),
        stack=stack,
        slope=slope,
        intercept=intercept,
        threshold=threshold,
        layout=_layout(tables),
        settings=config.settings,
        n_rows=len(tables.ids),
        n_groups=len(set(tables.groups)),
    )


def _fit_part(baseline: Baseline, tables: Tables, fold: Int[np.ndarray, " N"]) -> tuple[Part, Float[np.ndarray, " N"]]:
    """Return a detector fitted on all rows, and each row's score by one that did not see its fold."""
    fitter = Fitter(baseline, tables.labels)
    (choice,), inner = fitter.select(tables, fold, [NO_FOLD])
    everything = np.ones(len(fold), dtype=bool)
    return Part(baseline.name, choice, fitter.fit(baseline.inputs(tables, choice), everything, choice)), inner[0]


def _layout(tables: Tables) -> dict[str, Any]:
    return {
        "n_layers": tables.n_layers,
        "width": tables.resid.shape[-1],
        "n_latents": tables.n_latents,
        "positions": list(tables.positions),
        "track_columns": list(tables.track_columns),
        "track_families": {name: family.matrix.shape[1] for name, family in sorted(tables.track_families.items())},
    }


def _load_estimators(path: Path, expected: str) -> list[BaseEstimator]:
    """Read estimators of trusted types from a file whose bytes are those that were saved."""
    if not path.is_file():
        raise InputError(f"{path} is missing; {_REBUILD}")
    content = path.read_bytes()
    found = sha256_file(path)
    if found != expected:
        raise InputError(f"{path} has sha256 {found[:12]}, {JSON_NAME} says {str(expected)[:12]}; {_REBUILD}")
    try:
        untrusted = sorted(set(skops.io.get_untrusted_types(data=content)) - set(TRUSTED))
        if untrusted:
            raise InputError(f"{path} holds {', '.join(untrusted)}, which no detector has; {_REBUILD}")
        return skops.io.loads(content, trusted=list(TRUSTED))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{path} is not a file of estimators ({error}); {_REBUILD}") from None
