"""Detectors that read tracks alone: the published classifier, a detector for each family, controls, and the method.

The method (`tracks_best`) is whatever inner validation finds best among classifiers and families of features; each
configuration it may choose is listed in `METHOD_CHOICES`, so that what was tried can be counted.
"""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from jaxsae.artifacts import InputError
from jaxsae.detection.estimators import Matrix, MeanProbability, TrainVocabulary, make_l1_logistic, make_logistic
from jaxsae.detection.specs import Baseline, Choice, Settings
from jaxsae.detection.tables import TRACK_CONTROLS, TRACK_FAMILIES, Tables

METHOD = "tracks_best"
FAMILIES = ("metrics", *TRACK_FAMILIES)
FAMILY_DETECTORS = {  # a family -> the detectors that read it alone, whose scores the stack takes
    "metrics": ("tracks_forest", "tracks_logistic"),
    **{name: (f"tracks_{name}",) for name in TRACK_FAMILIES},
}
CONTROLS = tuple(f"tracks_{name}" for name in TRACK_CONTROLS)  # beside tracks_logistic, the same regression
_DENSE = ("prompt", "profiles", "late_births")
# Boosting by histograms: on 3,840 rows of 26 metrics ten times as fast as the published one, and its AUROC within .003.
METHOD_CHOICES = (
    *(Choice(model=model, families="metrics") for model in ("forest", "logistic", "boosting", "svm", "mean")),
    *(
        Choice(model=model, families=families)
        for families in (
            *("prompt", "profiles", "late_births", "metrics+profiles", "prompt+late_births"),
            "metrics+prompt+profiles+late_births",
        )
        for model in ("logistic", "boosting")
    ),
    Choice(model="l1", families="concepts"),
    Choice(model="l1", families="metrics+prompt+profiles+concepts+late_births"),
)
_FAMILY_CHOICES = (Choice(c=0.01, model="logistic"), Choice(c=1.0, model="logistic"), Choice(model="boosting"))
_METHOD_C = 0.1  # inverse penalty of the method's logistic regressions


def make_track_detectors(settings: Settings) -> list[Baseline]:
    """Return the detectors that read tracks alone."""
    return [
        make_forest(settings),
        _logistic(),
        *(_dense_family(settings, name) for name in _DENSE),
        _concepts(settings),
        *_controls(),
        _method(settings),
    ]


def method_choices(families: Sequence[str]) -> tuple[Choice, ...]:
    """Return those of `METHOD_CHOICES` that read no other families."""
    return tuple(each for each in METHOD_CHOICES if set(cast(str, each.families).split("+")) <= set(families))


def make_forest(settings: Settings) -> Baseline:
    """Return the published classifier on the track metrics."""
    return Baseline(
        name="tracks_forest",
        definition=f"the reference classifier on the track metrics: a random forest of {settings.trees} trees",
        inputs=lambda tables, choice: tables.track_metrics,
        estimator=lambda choice, n_rows, n_columns: _classifier("forest", settings, n_rows, n_columns),
    )


def _logistic() -> Baseline:
    return Baseline(
        name="tracks_logistic",
        definition="logistic regression on the standardised track metrics",
        inputs=lambda tables, choice: tables.track_metrics,
        estimator=lambda choice, n_rows, n_columns: make_logistic(1.0, n_columns),
    )


def _dense_family(settings: Settings, name: str) -> Baseline:
    words = {
        "prompt": "the track metrics at the last token of the prompt, before anything was said",
        "profiles": "profiles of the tracks by layer (match costs, births, deaths, activation that no track of two "
        "layers explains) and the SAE's error there",
        "late_births": "tracks born in the last third of the layers: how far they point at the emitted token and at "
        "the best other one",
    }
    return Baseline(
        name=f"tracks_{name}",
        definition=f"on {words[name]}; logistic regression of either penalty or boosting, chosen by inner validation",
        inputs=lambda tables, choice: family_matrix(tables, name),
        estimator=lambda choice, n_rows, n_columns: (
            make_logistic(choice.c, n_columns)
            if choice.c is not None
            else _classifier("boosting", settings, n_rows, n_columns)
        ),
        choices=_FAMILY_CHOICES,
    )


def _concepts(settings: Settings) -> Baseline:
    return Baseline(
        name="tracks_concepts",
        definition="L1 logistic regression on which concepts (chains of linked latents) tracks carry, are born in and "
        "end in",
        inputs=lambda tables, choice: family_matrix(tables, "concepts"),
        estimator=lambda choice, n_rows, n_columns: _classifier("l1", settings, n_rows, n_columns),
    )


def _controls() -> list[Baseline]:
    words = {
        "none": "tracks that end after one layer each: what the latents of single layers tell",
        "shuffled": "tracks whose links were drawn anew among those of one answer and layer: what births, deaths and "
        "activations tell without who goes on as whom",
        "random_decoders": "tracks followed by the cosines of random directions in place of the decoders",
        "neurons": "tracks of the residual stream's largest coordinates in place of latents: what needs no SAE",
    }

    def make(name: str) -> Baseline:
        def inputs(tables: Tables, choice: Choice) -> Matrix:
            if name not in tables.track_controls:
                raise InputError(
                    f"tracks.npz has no control {name!r}, which detector tracks_{name} reads; run jaxsae track --redo"
                )
            return tables.track_controls[name]

        return Baseline(
            name=f"tracks_{name}",
            definition=f"control of tracks_logistic, the same on {words[name]}",
            inputs=inputs,
            estimator=lambda choice, n_rows, n_columns: make_logistic(1.0, n_columns),
        )

    return [make(name) for name in TRACK_CONTROLS]


def _method(settings: Settings) -> Baseline:
    choices = method_choices(settings.families)

    def inputs(tables: Tables, choice: Choice) -> Matrix:
        parts = [family_matrix(tables, name) for name in cast(str, choice.families).split("+")]
        if choice.model == "l1":
            return sp.hstack([sp.csr_matrix(part) for part in parts], format="csr")
        return np.concatenate(parts, axis=1)

    def estimator(choice: Choice, n_rows: int, n_columns: int) -> BaseEstimator:
        return _classifier(cast(str, choice.model), settings, n_rows, n_columns)

    return Baseline(
        name=METHOD,
        definition=f"the classifier and the families of track features that inner validation chose of {len(choices)} "
        "configurations, anew for each fold",
        inputs=inputs,
        estimator=estimator,
        choices=choices,
    )


def family_matrix(tables: Tables, name: str) -> Matrix:
    """Return one family of track features, a row an answer.

    Raises:
        InputError: the tables have none of that name.
    """
    if name == "metrics":
        return tables.track_metrics
    if name not in tables.track_families:
        raise InputError(f"tracks.npz has no family {name!r}, of detection.families; run jaxsae track --redo")
    return tables.track_families[name].matrix


def _classifier(model: str, settings: Settings, n_rows: int, n_columns: int) -> Pipeline:
    """Return one of the method's classifiers, unfitted."""
    if model == "l1":
        return make_pipeline(
            TrainVocabulary(), *make_l1_logistic(settings.sae_penalty, n_rows, n_columns, seed=settings.seed)
        )
    make: dict[str, Callable[[], BaseEstimator]] = {
        "forest": lambda: RandomForestClassifier(settings.trees, random_state=settings.seed),
        "boosting": lambda: HistGradientBoostingClassifier(
            max_iter=100, max_depth=3, early_stopping=False, random_state=settings.seed
        ),
        "svm": lambda: SVC(),
        "logistic": lambda: make_logistic(_METHOD_C, n_columns)[-1],
    }
    if model == "mean":  # the published ensemble of the four
        return make_pipeline(StandardScaler(), MeanProbability([made() for made in make.values()]))
    return make_pipeline(StandardScaler(), make[model]())
