"""The link graph: each latent's most alike latents in the next layer, and how alike unrelated ones are.

Alike are latents whose decoder rows point the same way (cosine) and, where a corpus was read, that fire together on its
tokens (correlation of activations). The graph is made once for a suite of SAEs; association and concepts look it up.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from scipy.special import ndtri

from jaxsae.artifacts import InputError

NULLS = ("random_pairs", "matched_activation")
TAIL = 1e-3  # share of unrelated pairs above a null
NULL_LATENTS = 512  # latents of a layer whose pairs with as many of another make up the null of random pairs
NULL_PAIRS = 16_384  # pairs of matched activation at most; 16 of them lie above the null
BLOCK_BYTES = 32 * 2**20  # similarities of a block of latents with all of the next layer


@runtime_checkable
class Decoders(Protocol):
    """L decoder matrices [F, D]: an array, a list, or anything that reads one layer when indexed."""

    def __len__(self) -> int: ...

    def __getitem__(self, layer: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class CorpusLatents:
    """The strongest latents of a corpus's tokens, in every layer.

    Attributes:
        ids: -1 in empty slots.
        activations: descending, 0 in empty slots.
        n_latents: F.
    """

    ids: Int[np.ndarray, "L T K"]
    activations: Float[np.ndarray, "L T K"]
    n_latents: int


@dataclasses.dataclass(frozen=True)
class LinkGraph:
    """The M latents of the next layer that are most like each latent, the strongest link first.

    A link's strength, at most 1, is the cosine of the two decoder rows; where a corpus was read, the mean of that and
    the correlation of the two latents' activations.

    Attributes:
        ids: latents of layer l + 1 for each latent of layer l; -1 in empty slots, which stand last.
        cosines: of the two decoder rows, 0 if one has norm 0; 0 in empty slots.
        coactivation: Pearson's correlation of the two latents' activations over the corpus's tokens, 0 where one of
            them never fired; None if no corpus was read.
        parents: for each latent of layer l + 1 the latent of layer l that is most like it, among all; the first of
            equals.
        null_cosines: for each of `NULLS`, span s and layer l the cosine between layers l and l + 1 + s that one in
            1,000 unrelated pairs exceeds; NaN where that was not measured, and beyond the last layer.
        null_strengths: for each of `NULLS` and layer l the same of the strengths of links; NaN where not measured.
        n_tokens: corpus tokens behind `coactivation`; 0 without.
    """

    ids: Int[np.ndarray, "L_less_1 F M"]
    cosines: Float[np.ndarray, "L_less_1 F M"]
    coactivation: Float[np.ndarray, "L_less_1 F M"] | None
    parents: Int[np.ndarray, "L_less_1 F"]
    null_cosines: Float[np.ndarray, "2 S L_less_1"]
    null_strengths: Float[np.ndarray, "2 L_less_1"]
    n_tokens: int = 0

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.ids) + 1

    @property
    def n_latents(self) -> int:
        """F."""
        return self.ids.shape[1]

    def strengths(self, layer: int) -> Float[np.ndarray, "F M"]:
        """Return the strengths of the links from `layer` to the next; 0 in empty slots."""
        if self.coactivation is None:
            return self.cosines[layer]
        return (self.cosines[layer] + self.coactivation[layer]) / 2

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every field as an array, for an .npz; `from_arrays` is the way back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: np.asarray(value) for name, value in fields.items() if value is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "LinkGraph":
        """Build a graph from what `arrays` gave; other names in `arrays` are left alone.

        Raises:
            InputError: a name is missing, has another type or shape, or holds what cannot be.
        """
        fields: dict[str, Any] = {"coactivation": None}
        for field in dataclasses.fields(cls):
            if field.name in arrays:
                fields[field.name] = _typed(field.name, np.asarray(arrays[field.name]))
            elif field.name != "coactivation":
                raise InputError(f"links lack the array {field.name}; run jaxsae track")
        fields["n_tokens"] = int(fields["n_tokens"])
        _check_shapes(fields)
        graph = cls(**fields)
        _check_graph(graph)
        return graph


def link_by_weights(
    decoders: Decoders, m: int, *, spans: int = 1, seed: int = 0, on_layer: Callable[[int], None] = lambda n_done: None
) -> LinkGraph:
    """Link each latent with the `m` of the next layer whose decoder rows have the largest cosine with its own.

    Args:
        decoders: read in order, `spans` + 1 layers in memory at a time.
        m: links of a latent; no more than there are latents are made.
        spans: null cosines are measured between layers up to this far apart.
        seed: of the latents drawn for the nulls.
        on_layer: called with the number of layer pairs done.

    Raises:
        InputError: there are fewer than two layers, their shapes differ, a value is not finite, or m or spans is below
            1.
    """
    return _link(decoders, m, None, spans=spans, seed=seed, on_layer=on_layer)


def link_by_coactivation(
    decoders: Decoders,
    m: int,
    corpus: CorpusLatents,
    *,
    spans: int = 1,
    seed: int = 0,
    on_layer: Callable[[int], None] = lambda n_done: None,
) -> LinkGraph:
    """Link each latent with the `m` of the next layer that are most like it by decoder row and by firing together.

    The null of matched activation is measured as well. Arguments and errors are those of `link_by_weights`; also

    Args:
        corpus: the kept latents of at least two tokens; what was not kept counts as 0.

    Raises:
        InputError: the corpus does not fit the decoders.
    """
    return _link(decoders, m, corpus, spans=spans, seed=seed, on_layer=on_layer)


def concepts(graph: LinkGraph, *, null: str = "random_pairs") -> Int[np.ndarray, "L F"]:
    """Return a concept's number for each latent: chains of mutual best links share one, other latents have their own.

    A latent of layer l and one of layer l + 1 are of one concept if each is most like the other, and their link is
    stronger than the best of F unrelated ones would be but once in 1,000 times: than the null of these layers, which is
    that of single pairs, times z(1 / 1,000 F) / z(1 / 1,000), z the upper quantile of a normal distribution. A chain so
    has one latent in each layer it spans. Concepts are numbered from 0 by first layer, then by latent there.

    Raises:
        InputError: the graph does not hold this null.
    """
    kind, raised = _null_index(graph, null), float(ndtri(TAIL / graph.n_latents) / ndtri(TAIL))
    numbers = np.empty((graph.n_layers, graph.n_latents), np.int64)
    numbers[0], n_concepts = np.arange(graph.n_latents), graph.n_latents
    for layer in range(graph.n_layers - 1):
        parent, child = graph.parents[layer], graph.ids[layer, :, 0]
        latent = np.arange(graph.n_latents)
        is_mutual = (parent >= 0) & (child[parent] == latent)
        is_linked = is_mutual & (graph.strengths(layer)[parent, 0] > raised * graph.null_strengths[kind, layer])
        fresh = n_concepts + np.cumsum(~is_linked) - 1
        numbers[layer + 1] = np.where(is_linked, numbers[layer, parent], fresh)
        n_concepts += int((~is_linked).sum())
    return numbers


def concept_spans(numbers: Int[np.ndarray, "L F"]) -> Int[np.ndarray, "C 2"]:
    """Return the first and the last layer of each concept, from what `concepts` gave."""
    spans = np.zeros((int(numbers.max()) + 1, 2), np.int64)
    for layer in range(len(numbers)):
        spans[numbers[layer], 1] = layer
    for layer in reversed(range(len(numbers))):
        spans[numbers[layer], 0] = layer
    return spans


def random_null(
    before: Float[np.ndarray, "F D"], after: Float[np.ndarray, "G D"], *, layer: int, span: int = 1, seed: int = 0
) -> float:
    """Return the cosine that one in 1,000 unrelated pairs of latents of two layers exceeds.

    All pairs of up to 512 latents of each layer are looked at, drawn by seed, layer and span. Each latent may have one
    counterpart in the other layer that is the same feature: so many pairs, 1 in G, are set aside at the top.

    Args:
        before: decoder rows of `layer`; rows of norm 0 are left out.
        after: those of the layer `span` further on.
    """
    drawn = [_draw(rows, [seed, 6, layer, span, side]) for side, rows in enumerate((before, after))]
    units = [_unit_rows(rows[chosen]) for rows, chosen in zip((before, after), drawn, strict=True)]
    return _upper((units[0] @ units[1].T).ravel(), len(after))


def check_null(graph: LinkGraph | None, null: str, *, n_layers: int, spans: int) -> None:
    """Raise InputError if a graph does not hold the null cosines of the first `n_layers` layers and of these spans."""
    if graph is None:
        raise InputError(f"tracking.null={null} needs a link graph, none was given; pass links=, or run jaxsae track")
    kind = _null_index(graph, null)
    if graph.n_layers < n_layers or graph.null_cosines.shape[1] < min(spans, n_layers - 1):
        raise InputError(
            f"links hold nulls of {graph.n_layers} layers up to {graph.null_cosines.shape[1]} apart, expected "
            f"{n_layers} and {spans}; run jaxsae track"
        )
    for span in range(min(spans, n_layers - 1)):
        if np.isnan(graph.null_cosines[kind, span, : n_layers - 1 - span]).any():
            raise InputError(f"links lack the null {null} of layers {span + 1} apart; run jaxsae track")


def _null_index(graph: LinkGraph, null: str) -> int:
    if null not in NULLS:
        raise InputError(f"null is {null!r}, expected one of {', '.join(NULLS)}")
    kind = NULLS.index(null)
    if np.isnan(graph.null_strengths[kind]).any():
        raise InputError(f"links lack the null {null}; set tracking.links=coactivation and run jaxsae track")
    return kind


def _link(
    decoders: Decoders,
    m: int,
    corpus: CorpusLatents | None,
    *,
    spans: int,
    seed: int,
    on_layer: Callable[[int], None],
) -> LinkGraph:
    n_layers = len(decoders)
    if n_layers < 2 or m < 1 or spans < 1:
        raise InputError(f"got {n_layers} layers, {m} links a latent and spans {spans}; expected at least 2, 1 and 1")
    first = _read(decoders, 0, None)
    n_latents = len(first.rows)
    m = min(m, n_latents)
    if corpus is not None:
        _check_corpus(corpus, n_layers, n_latents)
    graph = _empty(n_layers, n_latents, m, spans, corpus)
    window = {0: first}
    firing = None if corpus is None else _Firing.of(corpus, 0)
    for layer in range(n_layers - 1):
        window.pop(layer - spans, None)
        window[layer + 1] = _read(decoders, layer + 1, window[layer].rows.shape)
        pair = _Pair(
            window[layer], window[layer + 1], firing, None if corpus is None else _Firing.of(corpus, layer + 1)
        )
        _fill(graph, layer, pair)
        _measure_nulls(graph, layer, pair, window, corpus, seed)
        firing = pair.firing_after
        on_layer(layer + 1)
    return graph


def _empty(n_layers: int, n_latents: int, m: int, spans: int, corpus: CorpusLatents | None) -> LinkGraph:
    shape = n_layers - 1, n_latents, m
    return LinkGraph(
        ids=np.full(shape, -1, np.int32),
        cosines=np.zeros(shape, np.float32),
        coactivation=None if corpus is None else np.zeros(shape, np.float32),
        parents=np.full(shape[:2], -1, np.int32),
        null_cosines=np.full((len(NULLS), min(spans, n_layers - 1), n_layers - 1), np.nan),
        null_strengths=np.full((len(NULLS), n_layers - 1), np.nan),
        n_tokens=0 if corpus is None else corpus.ids.shape[1],
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """One layer's decoder rows, and the same of norm 1; a row of norm 0 stays."""

    rows: Float[np.ndarray, "F D"]
    units: Float[np.ndarray, "F D"]


@dataclasses.dataclass(frozen=True)
class _Firing:
    """One layer's activations over the corpus's tokens, by latent and by token.

    Of each latent the mean and 1 / deviation, 0 of one that never changes.
    """

    acts: sp.csc_matrix
    by_token: sp.csr_matrix
    mean: Float[np.ndarray, " F"]
    inverse_sd: Float[np.ndarray, " F"]

    @classmethod
    def of(cls, corpus: CorpusLatents, layer: int) -> "_Firing":
        ids, acts = corpus.ids[layer], corpus.activations[layer]
        token, slot = np.nonzero((ids >= 0) & (acts > 0))
        values = acts[token, slot].astype(np.float64)
        matrix = sp.csc_matrix((values, (token, ids[token, slot])), shape=(len(ids), corpus.n_latents))
        mean = np.asarray(matrix.mean(axis=0)).ravel()
        variance = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - mean**2
        changes = variance > 1e-12 * (mean**2 + variance)
        return cls(
            matrix,
            matrix.tocsr(),
            mean,
            np.divide(1.0, np.sqrt(np.maximum(variance, 0)), where=changes, out=np.zeros_like(mean)),
        )


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two neighbouring layers, with their similarities by blocks of latents of the first."""

    before: _Rows
    after: _Rows
    firing_before: _Firing | None
    firing_after: _Firing | None

    def similarities(
        self, chosen: Int[np.ndarray, " rows"] | slice
    ) -> tuple[Float[np.ndarray, "rows F"], Float[np.ndarray, "rows F"] | None]:
        """Return cosines and correlations of some latents of the first layer with all of the second."""
        cosines = self.before.units[chosen] @ self.after.units.T
        if self.firing_before is None or self.firing_after is None:
            return cosines, None
        left, right = self.firing_before, self.firing_after
        together = (left.acts[:, chosen].T @ right.by_token).toarray() / left.acts.shape[0]
        together -= left.mean[chosen][:, None] * right.mean
        together *= left.inverse_sd[chosen][:, None]
        together *= right.inverse_sd
        return cosines, np.clip(together, -1, 1).astype(np.float32)


def _strength(cosines: np.ndarray, coactivation: np.ndarray | None) -> np.ndarray:
    return cosines if coactivation is None else (cosines + coactivation) / 2


def _fill(graph: LinkGraph, layer: int, pair: _Pair) -> None:
    """Write the links of one pair of layers."""
    n_latents, m = graph.ids.shape[1:]
    best = np.full(n_latents, -np.inf, np.float32)
    for block in _blocks(n_latents, max(1, BLOCK_BYTES // (16 * n_latents))):
        cosines, coactivation = pair.similarities(block)
        strength = _strength(cosines, coactivation)
        ids = _top(strength, m)
        graph.ids[layer, block] = ids
        graph.cosines[layer, block] = np.take_along_axis(cosines, ids, axis=1)
        if coactivation is not None and graph.coactivation is not None:
            graph.coactivation[layer, block] = np.take_along_axis(coactivation, ids, axis=1)
        row = strength.argmax(axis=0)
        value = strength[row, np.arange(n_latents)]
        is_better = value > best
        graph.parents[layer, is_better] = row[is_better] + block.start
        best = np.maximum(best, value)


def _top(strength: Float[np.ndarray, "rows F"], m: int) -> Int[np.ndarray, "rows M"]:
    """Return the m strongest columns of each row, strongest first, the first of equals first."""
    if m == strength.shape[1]:
        return np.argsort(-strength, axis=1, kind="stable")
    chosen = np.sort(np.argpartition(-strength, m - 1, axis=1)[:, :m], axis=1)
    order = np.argsort(-np.take_along_axis(strength, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def _measure_nulls(
    graph: LinkGraph, layer: int, pair: _Pair, window: Mapping[int, _Rows], corpus: CorpusLatents | None, seed: int
) -> None:
    """Write the nulls between `layer` + 1 and the layers before it, as far as spans go."""
    for span in range(1, graph.null_cosines.shape[1] + 1):
        start = layer + 1 - span
        if start < 0:
            continue
        before, after = window[start], window[layer + 1]
        graph.null_cosines[0, span - 1, start] = random_null(before.rows, after.rows, layer=start, span=span, seed=seed)
        if corpus is not None:
            left, right = _matched(graph, corpus, start, span, seed)
            cosines = np.einsum("pd,pd->p", before.units[left], after.units[right])
            graph.null_cosines[1, span - 1, start] = _upper(cosines, None)
    graph.null_strengths[:, layer] = graph.null_cosines[:, 0, layer]
    if corpus is None:
        return
    chosen = [_draw(rows.rows, [seed, 6, layer, 1, side]) for side, rows in enumerate((pair.before, pair.after))]
    sampled = _strength(*pair.similarities(chosen[0]))[:, chosen[1]]
    graph.null_strengths[0, layer] = _upper(sampled.ravel(), graph.n_latents)
    left, right = _matched(graph, corpus, layer, 1, seed)
    graph.null_strengths[1, layer] = _upper(_strengths_of(pair, left, right), None)


def _strengths_of(pair: _Pair, left: Int[np.ndarray, " pairs"], right: Int[np.ndarray, " pairs"]) -> np.ndarray:
    """Return the strengths of single pairs, a block of the first layer's latents at a time."""
    latents, at = np.unique(left, return_inverse=True)
    strengths = np.empty(len(left), np.float32)
    for block in _blocks(len(latents), max(1, BLOCK_BYTES // (16 * len(pair.after.rows)))):
        sampled = _strength(*pair.similarities(latents[block]))
        here = (at >= block.start) & (at < block.stop)
        strengths[here] = sampled[at[here] - block.start, right[here]]
    return strengths


def _matched(
    graph: LinkGraph, corpus: CorpusLatents, layer: int, span: int, seed: int
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Return pairs of latents of two layers that have the same rank among those that fire on a token.

    Pairs are left out that the strongest links lead to, from one end or the other.
    """
    left, right = (corpus.ids[at].astype(np.int64) for at in (layer, layer + span))
    token, slot = np.nonzero((left >= 0) & (right >= 0))
    left, right = left[token, slot], right[token, slot]
    forth, back = left, right
    for step in range(span):
        forth = graph.ids[layer + step, forth, 0].astype(np.int64)
        back = graph.parents[layer + span - 1 - step, back].astype(np.int64)
    kept = np.flatnonzero((forth != right) & (back != left))
    if len(kept) > NULL_PAIRS:
        kept = np.sort(np.random.default_rng([seed, 7, layer, span]).choice(kept, NULL_PAIRS, replace=False))
    return left[kept], right[kept]


def _draw(rows: Float[np.ndarray, "F D"], seed: list[int]) -> Int[np.ndarray, " drawn"]:
    """Draw up to `NULL_LATENTS` of the rows that are not 0."""
    latents = np.flatnonzero(rows.any(axis=1))
    if len(latents) <= NULL_LATENTS:
        return latents
    return np.sort(np.random.default_rng(seed).choice(latents, NULL_LATENTS, replace=False))


def _upper(similarities: np.ndarray, n_latents: int | None) -> float:
    """Return what the share `TAIL` of pairs exceeds, one pair a latent of `n_latents` set aside; 0 of no pair."""
    if not similarities.size:
        return 0.0
    share = TAIL + (1 / n_latents if n_latents else 0)
    return float(np.quantile(similarities, max(0.0, 1 - share)))


def _read(decoders: Decoders, layer: int, shape: tuple[int, ...] | None) -> _Rows:
    rows = np.asarray(decoders[layer])
    if rows.ndim != 2 or (shape is not None and rows.shape != shape):
        expected = "[latents, width]" if shape is None else f"{shape}, as of the layer before"
        raise InputError(f"decoder of layer {layer} has shape {rows.shape}, expected {expected}")
    if not np.isfinite(rows).all():
        raise InputError(f"decoder of layer {layer} is not finite; train or export the SAE again")
    return _Rows(rows, _unit_rows(rows))


def _unit_rows(rows: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
    norms = np.sqrt(np.einsum("fd,fd->f", rows, rows, dtype=np.float64))
    return (rows * np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)[:, None]).astype(np.float32)


def _blocks(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _check_corpus(corpus: CorpusLatents, n_layers: int, n_latents: int) -> None:
    shape, n_found = corpus.ids.shape, int(corpus.ids.max(initial=-1))
    if len(shape) != 3 or corpus.activations.shape != shape or shape[0] != n_layers or shape[1] < 2:
        raise InputError(
            f"corpus latents have shapes {shape} and {corpus.activations.shape}, expected [{n_layers}, tokens, slots] "
            "of at least 2 tokens"
        )
    if corpus.n_latents != n_latents or n_found >= n_latents:
        raise InputError(
            f"corpus latents are of {corpus.n_latents} latents with ids up to {n_found}, the decoders have {n_latents}"
        )


def _typed(name: str, array: np.ndarray) -> np.ndarray:
    is_integer = name in ("ids", "parents", "n_tokens")
    n_axes = {"parents": 2, "null_strengths": 2, "n_tokens": 0}.get(name, 3)
    if array.dtype.kind not in ("iu" if is_integer else "f") or array.ndim != n_axes:
        raise InputError(
            f"links: {name} is {array.dtype} of shape {array.shape}, expected "
            f"{'integers' if is_integer else 'floats'} with {n_axes} axes; run jaxsae track"
        )
    return array


def _check_shapes(fields: Mapping[str, Any]) -> None:
    shape, nulls = fields["ids"].shape, fields["null_cosines"].shape
    expected = {
        "cosines": shape,
        "coactivation": shape,
        "parents": shape[:2],
        "null_cosines": (len(NULLS), nulls[1], shape[0]),
        "null_strengths": (len(NULLS), shape[0]),
    }
    for name, axes in expected.items():
        array = fields[name]
        if array is not None and array.shape != axes:
            raise InputError(f"links: {name} has shape {array.shape}, expected {axes}; run jaxsae track")


def _check_graph(graph: LinkGraph) -> None:
    n_pairs, n_latents, _ = graph.ids.shape
    for name in ("ids", "parents"):
        array = getattr(graph, name)
        if array.size and (array.min() < -1 or array.max() >= n_latents):
            raise InputError(f"links: {name} holds latents outside -1 to {n_latents - 1}; run jaxsae track")
    for name in ("cosines", "coactivation"):
        array = getattr(graph, name)
        if array is not None and not (np.abs(array) <= 1 + 1e-4).all():
            raise InputError(f"links: {name} holds a value that is not in [-1, 1]; run jaxsae track")
    strengths = (np.where(graph.ids[at] >= 0, graph.strengths(at), -np.inf) for at in range(n_pairs))
    for layer, strength in enumerate(strengths):
        if (strength[:, 1:] > strength[:, :-1] + 1e-6).any():
            raise InputError(f"links of layer {layer} do not descend in strength; run jaxsae track")
