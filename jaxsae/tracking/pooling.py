"""Metrics of answers that were tracked at each of their tokens: the mean and the largest over the tokens."""

import numpy as np
from jaxtyping import Float, Int

from jaxsae.tracking.metrics import DIVERGENCE_COLUMNS, divergence_metrics
from jaxsae.tracking.tracks import Tracks

POOLED_COLUMNS = tuple(f"{pool}_{name}" for pool in ("mean", "max") for name in DIVERGENCE_COLUMNS)


def pooled_metrics(tracks: Tracks, token_offsets: Int[np.ndarray, " N_and_1"]) -> Float[np.ndarray, "N Q"]:
    """Return the mean of each of the 26 metrics over an answer's tokens, then the largest, columns `POOLED_COLUMNS`.

    Args:
        tracks: a sample for each token of each answer, in order.
        token_offsets: answer n's tokens are the samples `token_offsets[n]` to `token_offsets[n + 1]`, at least one.
    """
    metrics, starts = divergence_metrics(tracks), token_offsets[:-1]
    mean = np.add.reduceat(metrics, starts, axis=0) / np.diff(token_offsets)[:, None]
    return np.concatenate([mean, np.maximum.reduceat(metrics, starts, axis=0)], axis=1)
