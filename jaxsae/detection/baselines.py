"""Every detector by name: what it reads, the estimator that reads it, and one line that says so."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from jaxsae.artifacts import RESID_POSITIONS
from jaxsae.detection.estimators import (
    BestLatent,
    FixedScore,
    Matrix,
    MeanDifference,
    TrainVocabulary,
    make_l1_logistic,
    make_logistic,
)
from jaxsae.detection.specs import Baseline, Choice, Settings
from jaxsae.detection.tables import ENTROPY_COLUMNS, LOGPROB_COLUMNS, Tables
from jaxsae.detection.tracks import CONTROLS, FAMILIES, FAMILY_DETECTORS, METHOD, make_forest, make_track_detectors

LOGPROB_DETECTORS = (
    *(f"logprob_{column}" for column in LOGPROB_COLUMNS),
    *(f"entropy_{column}" for column in ENTROPY_COLUMNS),
)
PROBES = tuple(f"probe_{position}" for position in RESID_POSITIONS)
TEXT_DETECTORS = ("question_tfidf", "answer_tfidf", "question_answer_tfidf")
NOISE_CANARY = "noise_canary"
CANARY_DRAWS = 10  # of its noise: one draw alone is off by more than resampled answers tell, and now and then far off
CANARY_TREES = 30  # so that its draws take no longer than the method's forest
CANARY_DEFINITION = (
    f"the track forest ({CANARY_TREES} trees at most) on Gaussian noise keyed by the text of (question, answer): 0.5 "
    f"unless texts leak; the mean of {CANARY_DRAWS} draws, with a t-interval over them"
)


def stack_parts(families: Sequence[str]) -> tuple[str, ...]:
    """Return the detectors whose scores a stack reads that knows these families of track features."""
    tracks = (name for family in FAMILIES if family in families for name in FAMILY_DETECTORS[family])
    return (*LOGPROB_DETECTORS, *PROBES, *tracks)


STACKS = {  # a stack's name -> the detectors whose scores it reads where no family is left out
    "stack": stack_parts(()),
    "stack_tracks": stack_parts(FAMILIES),
}
STACK_DEFINITIONS = {
    "stack": "logistic regression or boosting, chosen by inner validation, on the out-of-fold scores of the log-prob "
    "family and the three residual probes",
    "stack_tracks": "the stack with the out-of-fold scores of the detectors of every track family besides",
}
DETECTORS = (
    "class_prior",
    "length",
    *TEXT_DETECTORS,
    *LOGPROB_DETECTORS,
    *PROBES,
    "sae_logistic",
    "sae_best_latent",
    METHOD,
    *(name for family in FAMILIES for name in FAMILY_DETECTORS[family]),
    *CONTROLS,
    *STACKS,
)


def parts_of(name: str, families: Sequence[str]) -> tuple[str, ...]:
    """Return the detectors whose scores a detector reads: its own alone, or a stack's."""
    return {"stack": stack_parts(()), "stack_tracks": stack_parts(families)}.get(name, (name,))


def make_baselines(settings: Settings, n_layers: int) -> dict[str, Baseline]:
    """Return every detector that is not a stack, by name."""
    baselines = [
        _class_prior(),
        _length(),
        *_text(),
        *_logprobs(),
        *_entropies(),
        *_probes(settings, n_layers),
        *_sae(settings, n_layers),
        *make_track_detectors(settings),
    ]
    return {baseline.name: baseline for baseline in baselines}


def make_canary(settings: Settings, noise: Float[np.ndarray, "N Q"]) -> Baseline:
    """Return the method's reference classifier on one draw of Gaussian noise in place of the track metrics."""
    return dataclasses.replace(
        make_forest(dataclasses.replace(settings, trees=min(settings.trees, CANARY_TREES))),
        name=NOISE_CANARY,
        definition=CANARY_DEFINITION,
        inputs=lambda tables, choice: noise,
    )


def text_noise(texts: tuple[str, ...], *, n_columns: int, seed: int) -> Float[np.ndarray, "N {n_columns}"]:
    """Draw standard normal numbers that depend on the text and the seed alone: equal texts have equal rows."""
    noise = np.empty((len(texts), n_columns))
    for row, text in enumerate(texts):
        digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
        noise[row] = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32)).standard_normal(n_columns)
    return noise


def _class_prior() -> Baseline:
    return Baseline(
        name="class_prior",
        definition="the share of hallucinated answers among the training rows; by that, folds rank a little below 0.5",
        inputs=lambda tables, choice: np.zeros((len(tables.ids), 1)),
        estimator=lambda choice, n_rows, n_columns: DummyClassifier(strategy="prior"),
    )


def _length() -> Baseline:
    return Baseline(
        name="length",
        definition="logistic regression on the answer's number of generated tokens and of characters",
        inputs=lambda tables, choice: tables.lengths,
        estimator=lambda choice, n_rows, n_columns: make_logistic(1.0, n_columns),
    )


def _text() -> list[Baseline]:
    def estimator(choice: Choice, n_rows: int, n_columns: int) -> Pipeline:
        return make_pipeline(TrainVocabulary(), TfidfTransformer(), LogisticRegression(C=1.0, max_iter=1000))

    def both(tables: Tables, choice: Choice) -> sp.csr_matrix:
        return sp.hstack([tables.question_counts, tables.answer_counts], format="csr")

    readers: dict[str, tuple[str, Callable[[Tables, Choice], Matrix]]] = {
        "question_tfidf": ("question", lambda tables, choice: tables.question_counts),
        "answer_tfidf": ("answer", lambda tables, choice: tables.answer_counts),
        "question_answer_tfidf": ("question and, in columns of their own, the answer", both),
    }
    return [
        Baseline(
            name=name,
            definition=f"logistic regression on TF-IDF of the words and word pairs of the {text}; no model is read",
            inputs=inputs,
            estimator=estimator,
        )
        for name, (text, inputs) in readers.items()
    ]


def _logprobs() -> list[Baseline]:
    words = {"mean": "mean", "min": "smallest", "sum": "summed", "first": "first"}

    def make(index: int, column: str) -> Baseline:
        return Baseline(
            name=f"logprob_{column}",
            definition=f"minus the {words[column]} token log-probability of the answer; only calibration is fitted",
            inputs=lambda tables, choice: -tables.logprobs[:, index : index + 1],
            estimator=lambda choice, n_rows, n_columns: FixedScore(),
        )

    return [make(index, column) for index, column in enumerate(LOGPROB_COLUMNS)]


def _entropies() -> list[Baseline]:
    words = {"mean": "mean", "max": "largest"}

    def make(index: int, column: str) -> Baseline:
        return Baseline(
            name=f"entropy_{column}",
            definition=f"the {words[column]} entropy of the distributions that the answer's tokens were chosen from; "
            "only calibration is fitted",
            inputs=lambda tables, choice: tables.entropies[:, index : index + 1],
            estimator=lambda choice, n_rows, n_columns: FixedScore(),
        )

    return [make(index, column) for index, column in enumerate(ENTROPY_COLUMNS)]


def _probes(settings: Settings, n_layers: int) -> list[Baseline]:
    spots = {"last_prompt": "at the last prompt token", "last_answer": "at the last answer token"}

    def make(index: int, position: str) -> Baseline:
        spot = spots.get(position, "averaged over the answer")
        return Baseline(
            name=f"probe_{position}",
            definition=f"logistic regression on the residual stream {spot}; layer chosen by inner validation",
            inputs=lambda tables, choice: tables.resid[:, choice.layer, index].astype(np.float32),
            estimator=lambda choice, n_rows, n_columns: make_logistic(cast(float, choice.c), n_columns),
            choices=tuple(Choice(layer, c) for layer in range(n_layers) for c in settings.probe_c),
        )

    return [make(index, position) for index, position in enumerate(RESID_POSITIONS)]


def _sae(settings: Settings, n_layers: int) -> list[Baseline]:
    def latents(tables: Tables, choice: Choice) -> sp.csr_matrix:
        return tables.latents(cast(int, choice.layer), settings.sae_position)

    def l1(choice: Choice, n_rows: int, n_columns: int) -> Pipeline:
        return make_l1_logistic(settings.sae_penalty, n_rows, n_columns, seed=settings.seed)

    at = "over the kept positions" if settings.sae_position == "max" else f"at {settings.sae_position}"
    choices = tuple(Choice(layer) for layer in range(n_layers))
    return [
        Baseline(
            name="sae_logistic",
            definition=f"L1 logistic regression on the largest SAE activations {at}; layer chosen by inner validation "
            "of the latents' class-mean differences",
            inputs=latents,
            estimator=l1,
            choices=choices,
            selector=lambda choice, n_rows, n_columns: MeanDifference(),
        ),
        Baseline(
            name="sae_best_latent",
            definition=f"activation {at} of the one SAE latent whose class means differ most; layer chosen by inner "
            "validation",
            inputs=latents,
            estimator=lambda choice, n_rows, n_columns: BestLatent(),
            choices=choices,
        ),
    ]
