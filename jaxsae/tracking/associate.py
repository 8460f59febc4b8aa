"""Association: which living track goes on as which feature of the next layer.

Every function works on N samples at once. A sample's rows are its living tracks in creation order, its columns the
features of the layer in the order given; both are padded on the right, and `n_rows`, `n_cols` count what is real.
An assignment is Int["N K"]: for each column the row that goes on as it, or -1.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from jaxsae.artifacts import InputError

ASSOCIATIONS = ("hungarian", "greedy", "links", "feature_id", "none")
GATES = ("after", "before")
NULLS = ("none", "random_pairs", "matched_activation")
SILENT = 1e-6  # a track at or below this activation has no ratio to compare; from the published tracker
AUDIBLE = 0.1  # beside a silent track, a feature above this activation differs as much as can be; same source


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
    """Settings of the tracker; the defaults are `reference()` except that `gate` is "before".

    Cost of a track with last observation (a_p, e_p) going on as a feature (a, e), e the decoder vectors:
    semantic_weight · (1 - s) + activation_weight · |a_p - a| / (a_p + a), with the similarity s = cos(e_p, e).

    Attributes:
        association: "hungarian" takes the assignment of least total cost; "greedy" lets the track with the largest
            last activation choose first; "links" is "hungarian" among the pairs that a `LinkGraph` links, with the
            links' strengths as similarities: a lookup, no decoder is read; "feature_id" continues a track by its last
            latent id; "none" matches nothing.
        birth_threshold: an unmatched feature starts a track if its activation is above this, in activation units.
        association_threshold: only pairs of a cost below this match; 0.4 is stricter than 0.5.
        semantic_weight: weight of the cosine distance, which lies in [0, 2].
        activation_weight: weight of the relative difference of activations, which lies in [0, 1].
        gate: for "hungarian", when pairs at or above the threshold are dropped. "after": from the assignment of least
            cost over all pairs, so that such a pair can use up a track and a feature that had partners. "before": they
            are never assigned; among all sets of pairs below the threshold the one of least total cost is taken, where
            a pair that is not made costs the threshold, so no worse set is taken only because it matches more. The
            other associations look at single pairs, where the two are the same.
        max_missed_layers: layers in a row that a track may go without an observation and live on. With "links" a track
            moves, in a layer it misses, to the strongest neighbour of the latent it was at, and goes on from there.
        normalise_activations: divide a sample's activations in each layer by the mean of the positive ones among them,
            before anything is compared with a threshold. A sample's tracks never depend on the other samples.
        null: what similarity counts from. With "random_pairs" or "matched_activation" s = (c - q) / (1 - q) with the
            cosine (or strength) c, and q of the two layers: one in 1,000 pairs of unrelated latents exceeds it. So s is
            1 for equal directions and 0 at the null in every layer, and a threshold means the same in all of them.
            Unrelated are pairs drawn at random, or pairs of equal rank among the latents that fire on one token of a
            corpus, whichever are not each other's best. "none": s = c.
    """

    association: str = "hungarian"
    birth_threshold: float | int = 0.5
    association_threshold: float | int = 0.5
    semantic_weight: float | int = 0.6
    activation_weight: float | int = 0.2
    gate: str = "before"
    max_missed_layers: int = 0
    normalise_activations: bool = False
    null: str = "none"

    def __post_init__(self):
        _check_choice("association", self.association, ASSOCIATIONS)
        _check_choice("gate", self.gate, GATES)
        _check_choice("null", self.null, NULLS)
        for name in ("birth_threshold", "association_threshold", "semantic_weight", "activation_weight"):
            _check_weight(name, getattr(self, name))
        if self.association_threshold == 0:
            raise InputError("tracking.association_threshold is 0, so nothing matches; set tracking.association=none")
        if self.semantic_weight == 0 and self.activation_weight == 0:
            raise InputError("tracking.semantic_weight and tracking.activation_weight are both 0; make one positive")
        _check_count("max_missed_layers", self.max_missed_layers)
        _check_flag("normalise_activations", self.normalise_activations)

    @classmethod
    def reference(cls) -> "TrackerConfig":
        """Return the settings that give the published tracker's results exactly."""
        return cls(gate="after")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"tracking.{name} is {value!r}, expected one of {', '.join(choices)}")


def _check_weight(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError(f"tracking.{name} is {value!r}, expected a finite number, 0 or more")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"tracking.{name} is {value!r}, expected a whole number of layers, 0 or more")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputError(f"tracking.{name} is {value!r}, expected True or False")


def decisive_similarities(config: TrackerConfig) -> tuple[float, float]:
    """Return (low, high): at a similarity up to `low` no pair matches, above `high` each costs less than the threshold.

    With weights w > 0 and v of similarity and activations, and threshold t, a cost lies between w (1 - s) and that + v.
    """
    low = 1 - config.association_threshold / config.semantic_weight
    return low, low + config.activation_weight / config.semantic_weight


def activation_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the relative differences of activations, between 0 and 1.

    A track at or below 1e-6 has difference 1 to a feature above 0.1 and 0 to any other.
    """
    is_silent = before <= SILENT
    change = np.abs(before - after) / (np.where(is_silent, 1.0, before) + after)
    return np.where(is_silent, np.where(after > AUDIBLE, 1.0, 0.0), change) if is_silent.any() else change


def pair_costs(
    cos: Float[np.ndarray, "N R K"],
    row_activations: Float[np.ndarray, "N R"],
    col_activations: Float[np.ndarray, "N K"],
    *,
    config: TrackerConfig,
) -> Float[np.ndarray, "N R K"]:
    """Return the cost of every (track, feature) pair; `cos` is clipped to [-1, 1] first."""
    change = activation_change(row_activations[:, :, None], col_activations[:, None, :])
    return config.semantic_weight * (1.0 - np.clip(cos, -1.0, 1.0)) + config.activation_weight * change


def assign_hungarian(
    cost: Float[np.ndarray, "N R K"],
    n_rows: Int[np.ndarray, " N"],
    n_cols: Int[np.ndarray, " N"],
    *,
    threshold: float | int,
    gate: str,
) -> Int[np.ndarray, "N K"]:
    """Return the assignment of least total cost, without its pairs at or above `threshold`.

    With the gate "before" a cost above the threshold is lowered to it first. A full assignment of such costs costs
    min(rows, columns) · threshold minus what its pairs below the threshold save, so the least one saves the most, and
    a pair above the threshold can only stand where neither side has a partner that helps.
    """
    if gate == "before":
        cost = np.minimum(cost, threshold)
    assignment = np.full((len(cost), cost.shape[2]), -1)
    for n in np.flatnonzero((n_rows > 0) & (n_cols > 0)):
        rows, cols = linear_sum_assignment(cost[n, : n_rows[n], : n_cols[n]])
        assignment[n, cols] = rows
    samples, cols = np.nonzero(assignment >= 0)
    is_over = cost[samples, assignment[samples, cols], cols] >= threshold
    assignment[samples[is_over], cols[is_over]] = -1
    return assignment


def assign_greedy(
    cost: Float[np.ndarray, "N R K"],
    row_activations: Float[np.ndarray, "N R"],
    n_rows: Int[np.ndarray, " N"],
    n_cols: Int[np.ndarray, " N"],
    *,
    threshold: float | int,
) -> Int[np.ndarray, "N K"]:
    """Let tracks choose by activation, largest first: each takes its cheapest free feature below `threshold`.

    On equal activations the older track chooses first; on equal costs it takes the first feature.
    """
    n_samples, width, n_slots = cost.shape
    is_row = np.arange(width) < n_rows[:, None]
    is_free = np.arange(n_slots) < n_cols[:, None]
    order = np.argsort(np.where(is_row, -row_activations, np.inf), axis=1, kind="stable")
    assignment = np.full((n_samples, n_slots), -1)
    everyone = np.arange(n_samples)
    for rank in range(int(n_rows.max(initial=0)) if n_slots else 0):
        row = order[:, rank]
        choices = np.where(is_free, cost[everyone, row], np.inf)
        col = choices.argmin(axis=1)
        takes = np.flatnonzero((choices[everyone, col] < threshold) & (rank < n_rows))
        assignment[takes, col[takes]] = row[takes]
        is_free[takes, col[takes]] = False
    return assignment


def assign_by_id(
    row_ids: Int[np.ndarray, "N R"], col_ids: Int[np.ndarray, "N K"], is_col: Bool[np.ndarray, "N K"]
) -> Int[np.ndarray, "N K"]:
    """Continue each track as the feature with its last latent id; -1 in `row_ids` marks an empty row."""
    is_same = (row_ids[:, :, None] == col_ids[:, None, :]) & is_col[:, None, :]
    if not row_ids.shape[1]:
        return np.full(col_ids.shape, -1)
    return np.where(is_same.any(axis=1), is_same.argmax(axis=1), -1)
