"""How good an SAE is, whoever trained it: one NumPy function for all, on rows that nobody trained on."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

CHUNK = 4096  # rows encoded at a time


@dataclasses.dataclass(frozen=True)
class Weights:
    """One SAE as its library saves it for use on rows as they are; latents are (x - b_dec) W_enc + b_enc.

    Attributes:
        W_enc: [D F].    b_enc: [F].    W_dec: [F D].    b_dec: [D].
        threshold: [F] where a latent is active above one; None where each row's k largest are.
    """

    W_enc: Float[np.ndarray, "D F"]
    b_enc: Float[np.ndarray, " F"]
    W_dec: Float[np.ndarray, "F D"]
    b_dec: Float[np.ndarray, " D"]
    threshold: Float[np.ndarray, " F"] | None


@dataclasses.dataclass(frozen=True)
class Score:
    """Quality at L0 = k.

    Attributes:
        fvu: sum |x - x_hat|^2 / sum |x - mean|^2 over the rows, with their own mean.
        l0: active latents of a row, on average; below k only where fewer are positive.
        own_l0: the same with the threshold that the library saved.
    """

    fvu: float
    l0: float
    own_l0: float


def score(weights: Weights, rows: Float[np.ndarray, "N D"], k: int) -> Score:
    """Measure an SAE on rows at L0 = k.

    Saved thresholds differ in L0 by what they were estimated on, and a larger L0 has the smaller FVU. All of them
    are therefore shifted alike by what gives these rows k active latents on average.
    """
    shift = 0.0 if weights.threshold is None else _shift(weights, rows, k)
    squared_error, n_active, own_active = 0.0, 0, 0
    for acts, pre in _encoded(weights, rows):
        feats = np.where(_is_active(weights, pre, k, shift), pre, 0.0)
        error = acts - (feats @ weights.W_dec + weights.b_dec)
        squared_error += float(np.sum(error.astype(np.float64) ** 2))
        n_active += int(np.count_nonzero(feats))
        own_active += int(np.count_nonzero(_is_active(weights, pre, k, 0.0)))
    variance = float(np.sum((rows - rows.mean(axis=0, dtype=np.float64)) ** 2))
    return Score(squared_error / variance, n_active / len(rows), own_active / len(rows))


def dead_share(weights: Weights, rows: Float[np.ndarray, "N D"], k: int) -> float:
    """Return the share of latents that are active on none of the rows, at L0 = k."""
    shift = 0.0 if weights.threshold is None else _shift(weights, rows, k)
    fired = np.zeros(len(weights.b_enc), bool)
    for _, pre in _encoded(weights, rows):
        fired |= _is_active(weights, pre, k, shift).any(axis=0)
    return float(np.mean(~fired))


def _encoded(weights: Weights, rows: Float[np.ndarray, "N D"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of the rows with their pre-activations."""
    for start in range(0, len(rows), CHUNK):
        acts = rows[start : start + CHUNK].astype(np.float32)
        yield acts, (acts - weights.b_dec) @ weights.W_enc + weights.b_enc


def _is_active(weights: Weights, pre: Float[np.ndarray, "B F"], k: int, shift: float) -> Bool[np.ndarray, "B F"]:
    if weights.threshold is not None:
        return (pre - weights.threshold > shift) & (pre > 0)
    kth = np.partition(pre, pre.shape[-1] - k, axis=-1)[:, pre.shape[-1] - k, None]
    return (pre >= kth) & (pre > 0)


def _shift(weights: Weights, rows: Float[np.ndarray, "N D"], k: int) -> float:
    """Return what to add to the thresholds so that the rows have k active latents on average.

    All N F pre-activations are held at once, 4 bytes each.
    """
    above = np.concatenate([(pre - weights.threshold).ravel() for _, pre in _encoded(weights, rows)])
    rank = above.size - 1 - len(rows) * k
    return float(np.partition(above, rank)[rank])
