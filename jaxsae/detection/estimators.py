"""scikit-learn estimators that the detectors are made of, beside scikit-learn's own."""

import math
import threading
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

Matrix: TypeAlias = np.ndarray | sp.csr_matrix

_CHOLESKY_COLUMNS = 512  # above, the Newton solver's D x D Hessian costs more than L-BFGS's steps (measured)
_LIBLINEAR = threading.Lock()


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


class MeanProbability(ClassifierMixin, BaseEstimator):
    """Average the probabilities of several classifiers; one that has none lends the logistic of its decision function.

    Args:
        members: unfitted classifiers.
    """

    def __init__(self, members: list[BaseEstimator]) -> None:
        self.members = members

    def fit(self, inputs: Matrix, labels: np.ndarray) -> "MeanProbability":
        """Fit each member on all rows."""
        self.classes_ = np.unique(labels)
        self.members_ = [clone(member).fit(inputs, labels) for member in self.members]
        return self

    def predict_proba(self, inputs: Matrix) -> Float[np.ndarray, "N 2"]:
        """Return the mean of the members' probabilities."""
        check_is_fitted(self)
        found = np.mean([_probability(member, inputs) for member in self.members_], axis=0)
        return np.stack([1 - found, found], axis=1)


def _probability(estimator: BaseEstimator, inputs: Matrix) -> Float[np.ndarray, " N"]:
    if hasattr(estimator, "predict_proba"):
        return np.asarray(estimator.predict_proba(inputs)[:, 1], dtype=np.float64)
    return expit(np.asarray(estimator.decision_function(inputs), dtype=np.float64))


def make_logistic(c: float, n_columns: int) -> Pipeline:
    """Return a standardised L2 logistic regression; c is the inverse penalty."""
    solver = "newton-cholesky" if n_columns <= _CHOLESKY_COLUMNS else "lbfgs"
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, solver=solver, max_iter=1000))


def make_l1_logistic(share: float, n_rows: int, n_columns: int, *, seed: int) -> Pipeline:
    """Return an L1 logistic regression on columns of unit variance, not centred.

    Its penalty is `share` of the universal threshold sqrt(2 log F) of a score whose noise has deviation <= sqrt(n)/2.
    """
    penalty = share * math.sqrt(n_rows) / 2 * math.sqrt(2 * math.log(max(n_columns, 2)))
    regression = L1Logistic(C=1 / penalty, l1_ratio=1.0, solver="liblinear", max_iter=1000, random_state=seed)
    return make_pipeline(StandardScaler(with_mean=False), regression)
