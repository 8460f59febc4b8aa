"""Why an answer got its score, and how far that can be believed.

Pure functions over arrays: which kept right answer is most like it and where a track leaves it, from which layer on the
verdict stands, and whether taking a track out of the model does more than taking out as much of something else. Who
runs the model passes what came out.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from jaxsae.detection.detector import FittedDetector, Part
from jaxsae.detection.tables import Tables
from jaxsae.detection.tracks import FAMILY_DETECTORS

Latents = Sequence[tuple[int, int]]  # (layer, latent) pairs

NEAREST = 5  # latents of like size among which a random deletion draws, for each latent of the track, at least
_TRIES = 20  # for each random deletion wanted: where fewer differ, there are fewer
_ROW_FIELDS = ("ids", "groups", "categories", "questions", "answers")  # of `Tables`; its other tuples name columns


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a deletion changed, beside what random deletions of like size changed.

    Attributes:
        change: with the track's latents taken out, minus before.
        random_mean: the mean change of the random deletions.
        random_low, random_high: the central 95 % of their changes.
        p_value: share of deletions, this one counted, whose change is at least as large in absolute value.
    """

    change: float
    random_mean: float
    random_low: float
    random_high: float
    p_value: float


def compare(change: float, random_changes: Float[np.ndarray, " draws"]) -> Effect:
    """Set a change beside those of random deletions, of which there is at least one."""
    low, high = np.percentile(random_changes, [2.5, 97.5])
    n_as_large = int(np.sum(np.abs(random_changes) >= abs(change)))
    return Effect(
        change=float(change),
        random_mean=float(np.mean(random_changes)),
        random_low=float(low),
        random_high=float(high),
        p_value=(1 + n_as_large) / (1 + len(random_changes)),
    )


def draw_matched(
    latents: Latents, sizes: Sequence[Float[np.ndarray, " F"]], *, draws: int, rng: np.random.Generator
) -> list[list[tuple[int, int]]]:
    """Draw random deletions that match a track's: in the same layers, latents active in the same text, of like size.

    For each latent of the track one is drawn from the `NEAREST` in size (of log) among the layer's active latents that
    are neither the track's nor drawn already; from as many more as it takes, for a short track, to make `draws`
    different deletions. No deletion comes twice: a repeated one would lower a p-value without telling anything.

    Args:
        latents: the track's.
        sizes: for each layer what each latent adds to the residual stream at the tracked position: the sum over its
            tokens of activation times length of the decoder row; 0 for a silent one.

    Returns:
        `draws` deletions, fewer where the active latents allow no more; none where some layer has no other active
        latent, as then nothing matches the track.
    """
    candidates = [
        np.setdiff1d(np.flatnonzero(size > 0), [f for at, f in latents if at == layer])
        for layer, size in enumerate(sizes)
    ]
    needed = np.bincount([layer for layer, _ in latents], minlength=len(sizes))
    if any(len(found) < n for found, n in zip(candidates, needed, strict=True)):
        return []
    nearest = max(NEAREST, math.ceil(draws ** (1 / len(latents))))
    drawn: dict[frozenset[tuple[int, int]], list[tuple[int, int]]] = {}
    for _ in range(_TRIES * draws):
        one = _draw_one(latents, sizes, candidates, nearest, rng)
        drawn.setdefault(frozenset(one), one)
        if len(drawn) == draws:
            break
    return list(drawn.values())


def _draw_one(
    latents: Latents,
    sizes: Sequence[Float[np.ndarray, " F"]],
    candidates: Sequence[np.ndarray],
    nearest: int,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    drawn: list[tuple[int, int]] = []
    for layer, latent in latents:
        free = np.setdiff1d(candidates[layer], [f for at, f in drawn if at == layer])
        wanted = max(
            sizes[layer][latent], np.finfo(np.float64).tiny
        )  # a latent that is silent here matches the smallest
        distance = np.abs(np.log(sizes[layer][free] / wanted))
        drawn.append((layer, int(rng.choice(free[np.argsort(distance, kind="stable")[:nearest]]))))
    return drawn


def total_size(latents: Latents, sizes: Sequence[Float[np.ndarray, " F"]]) -> float:
    """Return what a deletion takes out in all, in residual units (see `draw_matched`)."""
    return float(sum(sizes[layer][latent] for layer, latent in latents))


def latent_sizes(
    token_features: Sequence[sp.csr_matrix], decoders: Sequence[np.ndarray]
) -> list[Float[np.ndarray, " F"]]:
    """Return the `sizes` of `draw_matched` from each layer's activations [tokens F] and decoder [F D]."""
    return [
        np.asarray(feats.sum(axis=0), np.float64).ravel() * np.linalg.norm(decoder, axis=1)
        for feats, decoder in zip(token_features, decoders, strict=True)
    ]


def similarity(
    feature_ids: Int[np.ndarray, "L K"],
    activations: Float[np.ndarray, "L K"],
    other_ids: Int[np.ndarray, "N L K"],
    other_activations: Float[np.ndarray, "N L K"],
) -> Float[np.ndarray, " N"]:
    """Return how like one answer's kept latents are to those of others: the mean over layers of the cosine, 0 to 1.

    A layer in which either has no active latent counts as 0.
    """
    n_latents = int(max(feature_ids.max(initial=0), other_ids.max(initial=0))) + 1
    cosines = np.zeros((len(other_ids), len(feature_ids)))
    for layer, (ids, acts) in enumerate(zip(feature_ids, activations, strict=True)):
        dense = np.zeros(n_latents + 1)  # empty slots, of id -1, read and write the last place
        dense[ids] = np.where(ids >= 0, acts, 0.0)
        others = np.where(other_ids[:, layer] >= 0, other_activations[:, layer], 0.0).astype(np.float64)
        products = np.sum(dense[other_ids[:, layer]] * others, axis=1)
        norms = np.linalg.norm(dense) * np.linalg.norm(others, axis=1)
        np.divide(products, norms, out=cosines[:, layer], where=norms > 0)
    return cosines.mean(axis=1)


def split_layer(latents: Latents, other_ids: Int[np.ndarray, "L K"]) -> int | None:
    """Return the first layer of a track whose latent the other answer has not among its own; None if it has all."""
    return next((layer for layer, latent in sorted(latents) if latent not in other_ids[layer]), None)


def repeat_row(tables: Tables, row: int, n: int, **changed: Any) -> Tables:
    """Return `n` copies of one row, with some of the fields replaced by those given, of n rows each; no controls."""
    fields = {field.name: getattr(tables, field.name) for field in dataclasses.fields(tables)}
    repeated: dict[str, Any] = {name: fields[name][row : row + 1] * n for name in _ROW_FIELDS}
    repeated |= {
        name: np.repeat(x[row : row + 1], n, axis=0) for name, x in fields.items() if isinstance(x, np.ndarray)
    }
    repeated["track_families"] = {name: family[[row] * n] for name, family in tables.track_families.items()}
    return dataclasses.replace(tables, **(repeated | {"track_controls": {}} | changed))


def scores_by_layer(fitted: FittedDetector, tables: Tables) -> Float[np.ndarray, " L_and_1"]:
    """Return the uncalibrated score of one answer as far as it can be known before any layer and after each.

    After layer l the tracks up to l are known, and the probes of layers up to l. What comes later (the probes of later
    layers; log-probabilities and all else that the model's output gives, which the last layer does) counts as its mean
    over the rows the stack was fitted on, that is as nothing.

    Args:
        tables: L rows of the same answer, row l with the metrics of its tracks through layers 0 to l.

    Returns:
        NaN where nothing is known, as the detector is one part that comes later.
    """
    scores = fitted.part_scores(tables)
    scores = np.concatenate([scores[:1], scores])
    known_from = np.array([_known_from(part, tables.n_layers) for part in fitted.parts])
    is_known = np.arange(-1, tables.n_layers)[:, None] >= known_from
    if fitted.stack is None:
        return np.where(is_known[:, 0], fitted.combine(scores), np.nan)
    return fitted.combine(np.where(is_known, scores, fitted.stack[0].mean_))


def _known_from(part: Part, n_layers: int) -> int:
    if part.choice.layer is not None:
        return part.choice.layer
    return 0 if part.name in FAMILY_DETECTORS["metrics"] else n_layers - 1


def earliest_layer(is_as_last: Bool[np.ndarray, " L_and_1"]) -> int | None:
    """Return the first layer from which on the verdict is the last layer's.

    Args:
        is_as_last: whether the verdict before any layer, and after each of them, is that after the last.

    Returns:
        None where it is so before any layer and stays so: what the answer was did not turn what would have been said
        without it.
    """
    others = np.flatnonzero(~is_as_last)
    return int(others[-1]) if others.size else None
