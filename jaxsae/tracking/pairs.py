"""Association by the few pairs of a track and a feature that can match, out of all.

A sample's rows are its living tracks in creation order, its columns the features of the layer. Pairs are found by the
cosines of decoder rows, or by looking up a link graph; whichever way, those whose cost is at the threshold or above are
never chosen, and a pair alone in its row and column below it always is.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from jaxsae.tracking.associate import (
    SILENT,
    TrackerConfig,
    activation_change,
    assign_greedy,
    assign_hungarian,
    decisive_similarities,
    pair_costs,
)
from jaxsae.tracking.cosines import Cosines

FEW_PAIRS = 0.06  # share of all pairs up to which single dot products are cheaper than a product of matrices


@dataclasses.dataclass(frozen=True)
class Side:
    """Living tracks, or the features of a layer: of each sample the first `count` slots are real.

    Attributes:
        ids: latents; -1 in empty slots.
        layers: of the latents.
    """

    count: Int[np.ndarray, " N"]
    ids: Int[np.ndarray, "N X"]
    layers: Int[np.ndarray, "N X"]
    activations: Float[np.ndarray, "N X"]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a row and a column of the same sample, in ascending order; a cost may be any below the threshold where
    nothing competes with the pair.
    """

    sample: Int[np.ndarray, " pairs"]
    row: Int[np.ndarray, " pairs"]
    col: Int[np.ndarray, " pairs"]
    cost: Float[np.ndarray, " pairs"]

    def where(self, chosen: np.ndarray) -> "Pairs":
        """Return some of them."""
        return Pairs(self.sample[chosen], self.row[chosen], self.col[chosen], self.cost[chosen])


def match_by_cosine(
    tracks: Side,
    features: Side,
    layer: int,
    cosines: Cosines,
    config: TrackerConfig,
    null: Float[np.ndarray, " spans"] | None,
) -> Int[np.ndarray, "N K"]:
    """Return the row that goes on as each column, or -1, by the cosines of the decoder rows.

    Args:
        null: for each span the cosine between layers so far apart that becomes similarity 0; None for cosines as they
            are.
    """
    if config.semantic_weight == 0:
        return _match_by_activation(tracks, features, config)
    search = _Search(tracks, features, layer, cosines, config, null)
    if config.association == "hungarian" and config.gate == "after":
        return search.match_before_gate()
    return search.match_after_gate()


def match_by_links(
    tracks: Side,
    features: Side,
    neighbours: Int[np.ndarray, "F M"],
    strengths: Float[np.ndarray, "F M"],
    config: TrackerConfig,
) -> Int[np.ndarray, "N K"]:
    """Return the row that goes on as each column, or -1; only linked pairs can match, at the cost of their strength.

    With the gate "after", a pair without a link costs as much as one of similarity -1 and activations that differ as
    much as can be; it is dropped if the assignment of least cost holds it.

    Args:
        neighbours: the links of each latent that a track can be at; -1 is none.
        strengths: their similarities.
    """
    n_samples, n_slots = features.ids.shape
    slot = np.full((n_samples, len(neighbours) + 1), -1, np.int16 if n_slots < 2**15 else np.int64)
    np.put_along_axis(slot, features.ids, np.arange(n_slots), axis=1)
    slot[:, -1] = -1  # where the id -1 of empty slots and links has written or is read
    linked = neighbours[tracks.ids]
    linked[tracks.ids < 0] = -1
    at = np.take_along_axis(slot, linked.reshape(n_samples, -1), axis=1).reshape(linked.shape)
    sample, row, link = np.nonzero(at >= 0)
    col = at[sample, row, link].astype(np.int64)
    order = np.lexsort((col, row, sample))
    sample, row, col, link = sample[order], row[order], col[order], link[order]
    similarity = strengths[tracks.ids[sample, row], link].astype(np.float64)
    cost = _costs(similarity, tracks.activations[sample, row], features.activations[sample, col], config)
    pairs = Pairs(sample, row, col, cost)
    if config.gate == "after":
        return _match_dense(pairs, tracks, features, config)
    return assign(pairs.where(cost < config.association_threshold), tracks, features, config)


def assign(pairs: Pairs, tracks: Side, features: Side, config: TrackerConfig) -> Int[np.ndarray, "N K"]:
    """Choose among pairs below the threshold: those of least total cost, a pair not made costing the threshold.

    With config.association "greedy", let the track with the largest last activation choose first.
    """
    assignment = np.full(features.ids.shape, -1)
    is_alone = _alone(pairs, tracks.ids.shape[1], features.ids.shape[1])
    alone, rest = pairs.where(is_alone), pairs.where(~is_alone)
    assignment[alone.sample, alone.col] = alone.row
    if not len(rest.sample):
        return assignment
    if config.association == "greedy":
        samples, at = np.unique(rest.sample, return_inverse=True)
        cost = np.full((len(samples), tracks.ids.shape[1], features.ids.shape[1]), np.inf)
        cost[at, rest.row, rest.col] = rest.cost
        counts = tracks.count[samples], features.count[samples]
        threshold = config.association_threshold
        chosen = assign_greedy(cost, tracks.activations[samples], *counts, threshold=threshold)
        assignment[samples] = np.where(chosen >= 0, chosen, assignment[samples])
        return assignment
    bounds = np.flatnonzero(np.diff(rest.sample, prepend=-1, append=-1))
    for start, stop in itertools.pairwise(bounds):
        some = rest.where(np.arange(start, stop))
        rows, row = np.unique(some.row, return_inverse=True)
        cols, col = np.unique(some.col, return_inverse=True)
        cost = np.full((len(rows), len(cols)), float(config.association_threshold))
        cost[row, col] = some.cost
        for r, c in zip(*linear_sum_assignment(cost), strict=True):
            if cost[r, c] < config.association_threshold:
                assignment[some.sample[0], cols[c]] = rows[r]
    return assignment


def _alone(pairs: Pairs, n_rows: int, n_cols: int) -> Bool[np.ndarray, " pairs"]:
    """Mark the pairs that share neither row nor column with another."""
    of_row, of_col = pairs.sample * n_rows + pairs.row, pairs.sample * n_cols + pairs.col
    return (np.bincount(of_row)[of_row] == 1) & (np.bincount(of_col)[of_col] == 1)


def _costs(similarity: np.ndarray, before: np.ndarray, after: np.ndarray, config: TrackerConfig) -> np.ndarray:
    """Return the costs of pairs by similarity and activations, in shapes that go together."""
    return config.semantic_weight * (1.0 - similarity) + config.activation_weight * activation_change(before, after)


def _match_dense(pairs: Pairs, tracks: Side, features: Side, config: TrackerConfig) -> Int[np.ndarray, "N K"]:
    """Take the assignment of least total cost over all pairs, and drop those without a link or over the threshold."""
    threshold, width = config.association_threshold, tracks.ids.shape[1]
    worst = max(2 * config.semantic_weight + config.activation_weight, threshold)
    assignment = np.full(features.ids.shape, -1)
    for n in np.unique(pairs.sample):
        of_sample = pairs.where(pairs.sample == n)
        cost = np.full((width, features.ids.shape[1]), float(worst))
        cost[of_sample.row, of_sample.col] = of_sample.cost
        linked = np.zeros(cost.shape, bool)
        linked[of_sample.row, of_sample.col] = of_sample.cost < threshold
        rows, cols = linear_sum_assignment(cost[: tracks.count[n], : features.count[n]])
        is_kept = linked[rows, cols]
        assignment[n, cols[is_kept]] = rows[is_kept]
    return assignment


def _match_by_activation(tracks: Side, features: Side, config: TrackerConfig) -> Int[np.ndarray, "N K"]:
    """Match where the cosine weighs nothing, by dense matrices."""
    shape = *tracks.ids.shape, features.ids.shape[1]
    cost = pair_costs(np.zeros(shape), tracks.activations, features.activations, config=config)
    counts, threshold = (tracks.count, features.count), config.association_threshold
    if config.association == "greedy":
        return assign_greedy(cost, tracks.activations, *counts, threshold=threshold)
    return assign_hungarian(cost, *counts, threshold=threshold, gate=config.gate)


class _Search:
    """The pairs of one layer and block of samples that can cost less than the threshold, by their cosines.

    A pair's similarity s is the cosine, or (cosine - q) / (1 - q) with the null cosine q of its layers. `similarity` is
    off by `error` at most. Up to `low` no pair matches; above `high` each has a cost below the threshold.
    """

    def __init__(
        self,
        tracks: Side,
        features: Side,
        layer: int,
        cosines: Cosines,
        config: TrackerConfig,
        null: Float[np.ndarray, " spans"] | None,
    ) -> None:
        self.tracks, self.features, self.layer = tracks, features, layer
        self.cosines, self.config = cosines, config
        self.null = None if null is None else null[np.clip(layer - tracks.layers, 1, len(null)) - 1]
        self.similarity, self.error = cosines.screen(tracks.ids, tracks.layers, features.ids, layer)
        if self.null is not None:
            self.similarity = (self.similarity - self.null[:, :, None]) / (1 - self.null[:, :, None])
            self.error = (self.error + 2.0**-22) / float(1 - self.null.max())
        self.low, self.high = decisive_similarities(config)
        sample, row, col = np.nonzero(self.similarity > self.low - self.error)
        is_real = (row < tracks.count[sample]) & (col < features.count[sample])
        sample, row, col = sample[is_real], row[is_real], col[is_real]
        self.pairs = Pairs(sample, row, col, np.zeros(len(sample)))

    def match_after_gate(self) -> Int[np.ndarray, "N K"]:
        """Match where pairs over the threshold are left out first."""
        pairs = self.pairs
        is_alone = _alone(pairs, self.tracks.ids.shape[1], self.features.ids.shape[1])
        is_open = ~is_alone | ~self._is_below(pairs)
        pairs.cost[is_open] = self._exact_costs(pairs.where(is_open))
        return assign(
            pairs.where(pairs.cost < self.config.association_threshold), self.tracks, self.features, self.config
        )

    def match_before_gate(self) -> Int[np.ndarray, "N K"]:
        """Match where pairs over the threshold are dropped from the assignment of least total cost over all pairs.

        Most pairs are seen to be in every such assignment (`_is_fixed`). The others' rows and columns are a smaller
        assignment of their own, where more are seen to be; what remains is only assigned where one of its pairs can be
        below the threshold.
        """
        assignment = np.full(self.features.ids.shape, -1)
        free_row = np.arange(self.tracks.ids.shape[1]) < self.tracks.count[:, None]
        free_col = np.arange(self.features.ids.shape[1]) < self.features.count[:, None]
        others, is_first = self.pairs, True
        while len(others.sample):
            is_fixed = self._is_fixed(others, free_row, free_col, is_first=is_first)
            self._keep_below(assignment, others.where(is_fixed))
            free_row[others.sample[is_fixed], others.row[is_fixed]] = False
            free_col[others.sample[is_fixed], others.col[is_fixed]] = False
            others = others.where(free_row[others.sample, others.row] & free_col[others.sample, others.col])
            if not is_first and not is_fixed.any():
                break
            is_first = False
        for n in np.unique(others.sample).tolist():
            self._assign_rest(assignment, n, np.flatnonzero(free_row[n]), np.flatnonzero(free_col[n]))
        return assignment

    def _keep_below(self, assignment: Int[np.ndarray, "N K"], fixed: Pairs) -> None:
        """Write those of some pairs of an assignment that are below the threshold."""
        is_open = ~self._is_below(fixed)
        fixed.cost[is_open] = self._exact_costs(fixed.where(is_open))
        kept = fixed.where(fixed.cost < self.config.association_threshold)
        assignment[kept.sample, kept.col] = kept.row

    def _is_below(self, pairs: Pairs) -> Bool[np.ndarray, " pairs"]:
        """Mark pairs whose cost is below the threshold for certain, whatever their activations."""
        return self.similarity[pairs.sample, pairs.row, pairs.col] > self.high + self.error

    def _exact_costs(self, pairs: Pairs) -> Float[np.ndarray, " pairs"]:
        """Return the costs of pairs by cosines in float64."""
        tracks, features = self.tracks, self.features
        at, to = (pairs.sample, pairs.row), (pairs.sample, pairs.col)
        if len(pairs.sample) > FEW_PAIRS * self.similarity.size:
            cos = np.empty(len(pairs.sample))
            bounds = np.searchsorted(pairs.sample, np.arange(len(tracks.ids) + 1))
            for n, part in enumerate(map(slice, bounds[:-1], bounds[1:])):
                if part.start < part.stop:
                    block = self.cosines.exact_block(tracks.ids[n], tracks.layers[n], features.ids[n], self.layer)
                    cos[part] = block[pairs.row[part], pairs.col[part]]
        else:
            cos = self.cosines.exact(tracks.ids[at], tracks.layers[at], features.ids[to], self.layer)
        similarity = self._calibrated(np.clip(cos, -1.0, 1.0), *at)
        return _costs(similarity, tracks.activations[at], features.activations[to], self.config)

    def _calibrated(self, cos: np.ndarray, sample: np.ndarray | int, row: np.ndarray) -> np.ndarray:
        if self.null is None:
            return cos
        null = self.null[sample, row]
        return (cos - null) / (1 - null)

    def _is_fixed(
        self,
        pairs: Pairs,
        free_row: Bool[np.ndarray, "N R"],
        free_col: Bool[np.ndarray, "N K"],
        *,
        is_first: bool,
    ) -> Bool[np.ndarray, " pairs"]:
        """Mark pairs that every assignment of least total cost, over all pairs of free rows and columns, holds.

        Suppose one does not hold (i, j), but (i, j') and (i', j). Taking (i, j) and (i', j') instead saves

            w (s_ij + s_i'j' - s_ij' - s_i'j) + v (r_ij' + r_i'j - r_i'j' - r_ij)

        with the weights w and v of similarity s and activations' difference r. As r is a metric, tanh of half the
        difference of logarithms, r_i'j' is at most r_i'j + r_ij + r_ij', and the second term at least -2 v r_ij. So
        (i, j) is held if w (s_ij + min s - max_j' s_ij' - max_i' s_i'j) > 2 v r_ij. Where i or j has no partner, what
        is saved is more than that. A silent track's r is no such distance: its sample is left to the assignment.

        Args:
            is_first: all rows and columns are free, and `pairs` are all candidates: of a lone pair's row and column
                none other is above `low`.
        """
        config, at, to = self.config, (pairs.sample, pairs.row), (pairs.sample, pairs.col)
        change = activation_change(self.tracks.activations[at], self.features.activations[to])
        is_silent = (free_row & (self.tracks.activations <= SILENT)).any(axis=1)
        lowest = self._lowest(pairs.sample, free_row, free_col, is_first=is_first)
        least = 2 * config.activation_weight / config.semantic_weight * change + 4 * self.error + 1e-9
        found = self.similarity[pairs.sample, pairs.row, pairs.col] + lowest - least
        is_fixed = np.zeros(len(pairs.sample), bool)
        if is_first:
            is_alone = _alone(pairs, free_row.shape[1], free_col.shape[1])
            is_fixed = is_alone & (found > 2 * (self.low - self.error))
        open_ = np.flatnonzero(~is_fixed)
        is_fixed[open_] = found[open_] > self._rivals(pairs.where(open_), lowest[open_], free_row, free_col)
        return is_fixed & ~np.asarray(is_silent)[pairs.sample]

    def _lowest(
        self,
        sample: Int[np.ndarray, " pairs"],
        free_row: Bool[np.ndarray, "N R"],
        free_col: Bool[np.ndarray, "N K"],
        *,
        is_first: bool,
    ) -> Float[np.ndarray, " pairs"]:
        """Return a bound from below on the similarities of free rows and columns, for the sample of each pair."""
        if is_first:
            return self.similarity.min(axis=(1, 2))[sample]
        samples, at = np.unique(sample, return_inverse=True)
        is_free = free_row[samples, :, None] & free_col[samples, None, :]
        return np.where(is_free, self.similarity[samples], np.inf).min(axis=(1, 2))[at]

    def _rivals(
        self,
        pairs: Pairs,
        lowest: Float[np.ndarray, " pairs"],
        free_row: Bool[np.ndarray, "N R"],
        free_col: Bool[np.ndarray, "N K"],
    ) -> Float[np.ndarray, " pairs"]:
        """Return the largest similarities of the rest of each pair's row and of its column, summed."""
        numbers, total = np.arange(len(pairs.sample)), np.zeros(len(pairs.sample))
        along = (
            (self.similarity[pairs.sample, pairs.row], pairs.col, free_col),
            (self.similarity[pairs.sample, :, pairs.col], pairs.row, free_row),
        )
        for rest, own, is_free in along:
            rest[~is_free[pairs.sample]] = -np.inf
            rest[numbers, own] = -np.inf
            total += np.maximum(rest.max(axis=1), lowest)
        return total

    def _assign_rest(
        self, assignment: Int[np.ndarray, "N K"], n: int, rows: Int[np.ndarray, " rows"], cols: Int[np.ndarray, " cols"]
    ) -> None:
        """Write the matches among some rows and columns of sample n, by exact costs of all their pairs."""
        tracks, features = self.tracks, self.features
        cos = self.cosines.exact_block(tracks.ids[n, rows], tracks.layers[n, rows], features.ids[n, cols], self.layer)
        similarity = self._calibrated(np.clip(cos, -1.0, 1.0), n, rows[:, None])
        cost = _costs(similarity, tracks.activations[n, rows][:, None], features.activations[n, cols], self.config)
        r, c = linear_sum_assignment(cost)
        is_kept = cost[r, c] < self.config.association_threshold
        assignment[n, cols[c[is_kept]]] = rows[r[is_kept]]
