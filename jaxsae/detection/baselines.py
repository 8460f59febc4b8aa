"""Every detector by name: what it reads, the estimator that reads it, and one line that says so."""

import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from jaxsae.artifacts import RESID_POSITIONS, InputError
from jaxsae.detection.tables import ENTROPY_COLUMNS, LOGPROB_COLUMNS, TRACK_CONTROLS, Tables

LOGPROB_DETECTORS = (
    *(f"logprob_{column}" for column in LOGPROB_COLUMNS),
    *(f"entropy_{column}" for column in ENTROPY_COLUMNS),
)
PROBES = tuple(f"probe_{position}" for position in RESID_POSITIONS)
TEXT_DETECTORS = ("question_tfidf", "answer_tfidf", "question_answer_tfidf")
CONTROLS = tuple(f"tracks_{name}" for name in TRACK_CONTROLS)  # beside tracks_logistic, the same regression
NOISE_CANARY = "noise_canary"
STACKS = {  # a stack's name -> the detectors whose scores it reads
    "stack": (*LOGPROB_DETECTORS, *PROBES),
    "stack_tracks": (*LOGPROB_DETECTORS, *PROBES, "tracks_forest", "tracks_logistic"),
}
STACK_DEFINITIONS = {
    "stack": "logistic regression on the out-of-fold scores of the log-prob family and the three residual probes",
    "stack_tracks": "the stack with the out-of-fold scores of both track classifiers besides",
}
DETECTORS = (
    "class_prior",
    "length",
    *TEXT_DETECTORS,
    *LOGPROB_DETECTORS,
    *PROBES,
    "sae_logistic",
    "sae_best_latent",
    "tracks_forest",
    "tracks_logistic",
    *CONTROLS,
    *STACKS,
)
_CHOLESKY_COLUMNS = 512  # above, the Newton solver's D x D Hessian costs more than L-BFGS's steps (measured)

_LIBLINEAR = threading.Lock()

Matrix: TypeAlias = np.ndarray | sp.csr_matrix


class Choice(NamedTuple):
    """One setting that inner validation chooses between."""

    layer: int | None = None
    c: float | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the detectors' estimators are made with.

    Attributes:
        trees: trees of the forest.
        probe_c: inverse penalties of the residual probes, chosen between by inner validation.
        sae_penalty: L1 penalty of the SAE detector as a fraction of the universal threshold.
        sae_position: the kept position whose latents are read, or "max".
        seed: of the forest and of liblinear's coordinate order.
    """

    trees: int
    probe_c: tuple[float, ...]
    sae_penalty: float
    sae_position: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A detector that is fitted on one matrix.

    Attributes:
        choices: what inner validation chooses between; the first wins a tie.
        inputs: (tables, choice) -> one row per answer; it sees no label.
        estimator: (choice, rows, columns) -> an unfitted scikit-learn classifier.
        selector: the estimator that takes its place while the choice is made, where its own would be too slow.
    """

    name: str
    definition: str
    inputs: Callable[[Tables, Choice], Matrix]
    estimator: Callable[[Choice, int, int], BaseEstimator]
    choices: tuple[Choice, ...] = (Choice(),)
    selector: Callable[[Choice, int, int], BaseEstimator] | None = None


class FixedScore(ClassifierMixin, BaseEstimator):
    """Score a row with its only column; nothing is fitted."""

    def fit(self, inputs: Matrix, labels: np.ndarray) -> "FixedScore":
        """Remember the classes."""
        self.classes_ = np.unique(labels)
        return self

    def decision_function(self, inputs: Matrix) -> Float[np.ndarray, " N"]:
        """Return the column as it is."""
        check_is_fitted(self)
        return np.asarray(inputs)[:, 0].astype(np.float64)


class TrainVocabulary(TransformerMixin, BaseEstimator):
    """Keep the columns that some training row uses: counts as if the vocabulary had been read from those rows alone."""

    def fit(self, inputs: sp.csr_matrix, labels: np.ndarray | None = None) -> "TrainVocabulary":
        """Find the used columns; the first stays where there is none."""
        used = np.flatnonzero(inputs.getnnz(axis=0))
        self.columns_ = used if used.size else np.zeros(1, dtype=np.int64)
        return self

    def transform(self, inputs: sp.csr_matrix) -> sp.csr_matrix:
        """Return those columns."""
        check_is_fitted(self)
        return inputs[:, self.columns_]


class MeanDifference(ClassifierMixin, BaseEstimator):
    """Weigh each latent by the difference of its class means over its standard deviation, 0 where it is constant."""

    def fit(self, inputs: sp.csr_matrix, labels: np.ndarray) -> "MeanDifference":
        """Compute the weights from sums over the training rows."""
        self.classes_ = np.unique(labels)
        wrong = np.asarray(labels == 1, dtype=np.float64)
        n, n_wrong = len(wrong), wrong.sum()
        total = np.asarray(inputs.sum(axis=0)).ravel()
        total_wrong = inputs.T @ wrong
        variance = np.asarray(inputs.multiply(inputs).sum(axis=0)).ravel() / n - (total / n) ** 2
        difference = total_wrong / n_wrong - (total - total_wrong) / (n - n_wrong)
        # A constant latent has a variance of rounding errors; 1e-12 of its mean square is far above them.
        varies = variance > 1e-12 * (total / n) ** 2
        self.coef_ = np.divide(difference, np.sqrt(np.maximum(variance, 0)), out=np.zeros_like(total), where=varies)
        return self

    def decision_function(self, inputs: sp.csr_matrix) -> Float[np.ndarray, " N"]:
        """Return the weighted sum of the latents."""
        check_is_fitted(self)
        return np.asarray(inputs @ self.coef_)


class BestLatent(MeanDifference):
    """Score a row with the one latent whose class means differ most, signed so that more means hallucinated."""

    def fit(self, inputs: sp.csr_matrix, labels: np.ndarray) -> "BestLatent":
        """Keep the largest weight, as +1 or -1; the first wins a tie."""
        super().fit(inputs, labels)
        best = int(np.argmax(np.abs(self.coef_)))
        coef = np.zeros_like(self.coef_)
        coef[best] = np.sign(self.coef_[best])
        self.coef_ = coef
        return self


class L1Logistic(LogisticRegression):
    """Fit an L1 logistic regression by liblinear, one at a time.

    liblinear draws the order of coordinates from one generator per process: fits side by side would take numbers from
    each other, and the last digits would depend on the threads.
    """

    def fit(self, inputs: Matrix, labels: np.ndarray) -> "L1Logistic":
        """Fit alone."""
        with _LIBLINEAR:
            return super().fit(inputs, labels)


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
        _forest(settings),
        _tracks_logistic(),
        *_track_controls(),
    ]
    return {baseline.name: baseline for baseline in baselines}


def make_canary(settings: Settings, noise: Float[np.ndarray, "N Q"]) -> Baseline:
    """Return the method's reference classifier on Gaussian noise in place of the track metrics."""
    return dataclasses.replace(
        _forest(settings),
        name=NOISE_CANARY,
        definition="the track forest on Gaussian noise keyed by the text of (question, answer): 0.5 unless texts leak",
        inputs=lambda tables, choice: noise,
    )


def text_noise(texts: tuple[str, ...], *, n_columns: int, seed: int) -> Float[np.ndarray, "N {n_columns}"]:
    """Draw standard normal numbers that depend on the text and the seed alone: equal texts have equal rows."""
    noise = np.empty((len(texts), n_columns))
    for row, text in enumerate(texts):
        digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
        noise[row] = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32)).standard_normal(n_columns)
    return noise


def _logistic(c: float, n_columns: int) -> Pipeline:
    """Return a standardised L2 logistic regression; c is the inverse penalty."""
    solver = "newton-cholesky" if n_columns <= _CHOLESKY_COLUMNS else "lbfgs"
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, solver=solver, max_iter=1000))


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
        estimator=lambda choice, n_rows, n_columns: _logistic(1.0, n_columns),
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
            estimator=lambda choice, n_rows, n_columns: _logistic(cast(float, choice.c), n_columns),
            choices=tuple(Choice(layer, c) for layer in range(n_layers) for c in settings.probe_c),
        )

    return [make(index, position) for index, position in enumerate(RESID_POSITIONS)]


def _sae(settings: Settings, n_layers: int) -> list[Baseline]:
    def latents(tables: Tables, choice: Choice) -> sp.csr_matrix:
        return tables.latents(cast(int, choice.layer), settings.sae_position)

    def l1(choice: Choice, n_rows: int, n_columns: int) -> Pipeline:
        """Penalise like the universal threshold sqrt(2 log F) of a score whose noise has deviation <= sqrt(n)/2."""
        penalty = settings.sae_penalty * math.sqrt(n_rows) / 2 * math.sqrt(2 * math.log(max(n_columns, 2)))
        regression = L1Logistic(
            C=1 / penalty, l1_ratio=1.0, solver="liblinear", max_iter=1000, random_state=settings.seed
        )
        return make_pipeline(StandardScaler(with_mean=False), regression)

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


def _forest(settings: Settings) -> Baseline:
    return Baseline(
        name="tracks_forest",
        definition=f"the reference classifier on the track metrics: a random forest of {settings.trees} trees",
        inputs=lambda tables, choice: tables.track_metrics,
        estimator=lambda choice, n_rows, n_columns: make_pipeline(
            StandardScaler(), RandomForestClassifier(settings.trees, random_state=settings.seed)
        ),
    )


def _tracks_logistic() -> Baseline:
    return Baseline(
        name="tracks_logistic",
        definition="logistic regression on the standardised track metrics",
        inputs=lambda tables, choice: tables.track_metrics,
        estimator=lambda choice, n_rows, n_columns: _logistic(1.0, n_columns),
    )


def _track_controls() -> list[Baseline]:
    words = {
        "none": "tracks that end after one layer each: what the latents of single layers tell",
        "shuffled": "tracks whose links were drawn anew among those of one answer and layer: what births, deaths and "
        "activations tell without who goes on as whom",
        "random_decoders": "tracks followed by the cosines of random directions in place of the decoders",
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
            estimator=lambda choice, n_rows, n_columns: _logistic(1.0, n_columns),
        )

    return [make(name) for name in TRACK_CONTROLS]
