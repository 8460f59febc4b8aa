"""Late births that point at a token, the emitted one or a rival: what the last layers add, by the logit lens."""

import numpy as np
from jaxtyping import Float, Int

from jaxsae.tracking.links import Decoders
from jaxsae.tracking.profiles import late_layers, owners
from jaxsae.tracking.tracks import Tracks

LATE_BIRTH_COLUMNS = (
    "late_births",
    "late_activation",
    "late_alignment_max",
    "late_alignment_mean",
    "late_contribution_max",
    "late_contribution_sum",
    "late_aligned_share",
    "final_contribution",
    "first_aligned_layer",
)
ALIGNED = 3.0  # standard deviations 1/sqrt(D) of the cosine of random directions, above which a latent is aligned
_BLOCK = 1024  # decoder rows in float64 at a time


def late_births(
    tracks: Tracks, decoders: Decoders, directions: Float[np.ndarray, "N T D"]
) -> Float[np.ndarray, "N T 9"]:
    """Return how far what is born late in each sample points at each of T tokens, columns `LATE_BIRTH_COLUMNS`.

    Late births are tracks born in the last third of the layers. A latent's alignment is the cosine of its decoder row
    with the token's direction, its contribution their product times the activation, in logits. Columns: their number
    and summed activation; the largest alignment and the mean weighted by activation; the largest and the summed
    contribution; the share of them that are aligned (above `ALIGNED` / sqrt(D)); the summed contribution of all tracks
    seen in the last layer; and the first layer, over L, where any track is aligned (1 if none is). Without late births
    all but the last two are 0.

    Args:
        decoders: those the tracks were followed with; each layer is read once, in order.
        directions: how a token's logit changes with the last layer's residual stream where the emitted one was chosen
            (`Features.token_directions`): the final norm is in it to first order. What later layers would make of a
            latent is left out. Zeros for a sample that emitted nothing.
    """
    seen = _attribute(tracks, decoders, directions)
    return np.stack([_columns(tracks, *each, directions.shape[2]) for each in zip(*seen, strict=True)], axis=1)


def _columns(
    tracks: Tracks,
    alignment: Float[np.ndarray, " observations"],
    contribution: Float[np.ndarray, " observations"],
    d_model: int,
) -> Float[np.ndarray, "N 9"]:
    """Return the columns for one token."""
    n, n_layers, sample = tracks.n_samples, tracks.n_layers, owners(tracks)[1]
    born = np.zeros(len(tracks.layer), bool)
    born[tracks.observation_offsets[:-1]] = True
    late = np.flatnonzero(born & late_layers(n_layers)[tracks.layer])
    of, acts = sample[late], tracks.activation[late]
    aligned = alignment > ALIGNED / np.sqrt(d_model)
    count, activation = np.bincount(of, minlength=n), _sums(of, acts, n)
    weighted = _sums(of, acts * alignment[late], n)
    final = tracks.layer == n_layers - 1
    first = np.full(n, n_layers)
    np.minimum.at(first, sample[aligned], tracks.layer[aligned])
    columns = {
        "late_births": count,
        "late_activation": activation,
        "late_alignment_max": _largest(of, alignment[late], n),
        "late_alignment_mean": np.divide(weighted, activation, out=np.zeros(n), where=activation > 0),
        "late_contribution_max": _largest(of, contribution[late], n),
        "late_contribution_sum": _sums(of, contribution[late], n),
        "late_aligned_share": _sums(of, aligned[late].astype(np.float64), n) / np.maximum(count, 1),
        "final_contribution": _sums(sample[final], contribution[final], n),
        "first_aligned_layer": first / n_layers,
    }
    return np.stack([columns[name] for name in LATE_BIRTH_COLUMNS], axis=1).astype(np.float64)


def _attribute(
    tracks: Tracks, decoders: Decoders, directions: Float[np.ndarray, "N T D"]
) -> tuple[Float[np.ndarray, "T observations"], Float[np.ndarray, "T observations"]]:
    """Return each observation's alignment with its sample's directions, and its contribution."""
    shape = directions.shape[1], len(tracks.layer)
    alignment, contribution = np.zeros(shape), np.zeros(shape)
    sample = owners(tracks)[1]
    for layer in range(tracks.n_layers):
        decoder, here = np.asarray(decoders[layer]), np.flatnonzero(tracks.layer == layer)
        for start in range(0, len(here), _BLOCK):
            rows = here[start : start + _BLOCK]
            vectors = decoder[tracks.feature_id[rows]].astype(np.float64)
            left = np.einsum("pd,pd->p", vectors, vectors)
            for token in range(shape[0]):
                towards = directions[sample[rows], token].astype(np.float64)
                product, right = (np.einsum("pd,pd->p", x, towards) for x in (vectors, towards))
                norms = np.sqrt(left * right)
                alignment[token, rows] = np.divide(product, norms, out=np.zeros(len(rows)), where=norms > 0)
                contribution[token, rows] = product * tracks.activation[rows]
    return alignment, contribution


def _sums(index: Int[np.ndarray, " X"], values: Float[np.ndarray, " X"], size: int) -> Float[np.ndarray, " size"]:
    return np.bincount(index, weights=values, minlength=size).astype(np.float64)  # of nothing it counts in integers


def _largest(index: Int[np.ndarray, " X"], values: Float[np.ndarray, " X"], size: int) -> Float[np.ndarray, " size"]:
    """Return the largest value of each index, 0 where there is none."""
    largest = np.full(size, -np.inf)
    np.maximum.at(largest, index, values)
    return np.where(np.isneginf(largest), 0.0, largest)
