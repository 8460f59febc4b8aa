"""Tracks that should know less than real ones: what a detector still reads from them, links or SAEs did not tell it."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxsae.tracking.links import Decoders, LinkGraph
from jaxsae.tracking.tracks import Tracks


def shuffle_links(tracks: Tracks, *, seed: int) -> Tracks:
    """Draw anew which track goes on as which feature, among the links of one sample between the same two layers.

    Births, deaths, what was observed in each layer and how many tracks live there stay as they are; a track of one
    observation stays whole. What changes is who goes on as whom, and so how a track's activation varies.
    """
    owner = np.repeat(np.arange(len(tracks.birth)), np.diff(tracks.observation_offsets))
    sample_of = np.repeat(np.arange(tracks.n_samples), np.diff(tracks.sample_offsets))
    later = np.flatnonzero(owner[1:] == owner[:-1]) + 1  # observations that some earlier one goes on as
    links = np.stack([sample_of[owner[later]], tracks.layer[later - 1], tracks.layer[later]])
    draw = np.random.default_rng([seed, 4]).random(len(later))
    before = np.arange(len(owner))
    before[later[np.lexsort(links[::-1])]] = later[np.lexsort((draw, *links[::-1]))] - 1
    new_owner = _follow(before, owner, tracks)
    order = np.lexsort((tracks.layer, new_owner))
    lengths = np.bincount(new_owner, minlength=len(tracks.birth))
    ends = tracks.observation_offsets[1:] - 1  # the last observations are the same, of other tracks
    death = np.empty_like(tracks.death)
    death[new_owner[ends]] = tracks.death
    return dataclasses.replace(
        tracks,
        death=death,
        observation_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        layer=tracks.layer[order],
        feature_id=tracks.feature_id[order],
        activation=tracks.activation[order],
    )


def _follow(
    before: Int[np.ndarray, " observations"], owner: Int[np.ndarray, " observations"], tracks: Tracks
) -> Int[np.ndarray, " observations"]:
    """Return the track of each observation, given the one before it; a birth is its own, and keeps its track."""
    new_owner = owner.copy()
    for layer in range(tracks.n_layers):
        here = np.flatnonzero(tracks.layer == layer)
        new_owner[here] = new_owner[before[here]]
    return new_owner


def relabel_links(links: LinkGraph, *, seed: int) -> LinkGraph:
    """Give the latents of every layer but the first new numbers where links lead to them: drawn by the seed.

    The links of a latent keep their number and strengths, but lead to others than those that are like it.
    """
    ids, parents = links.ids.copy(), links.parents.copy()
    for layer in range(len(ids)):
        new = np.random.default_rng([seed, 8, layer]).permutation(links.n_latents)
        ids[layer] = np.where(ids[layer] >= 0, new[ids[layer]], -1)
        parents[layer, new] = links.parents[layer]
    return dataclasses.replace(links, ids=ids, parents=parents)


@dataclasses.dataclass(frozen=True)
class RandomDecoders:
    """Gaussian directions in place of decoders, of their shapes; a layer's are the same whenever it is read."""

    decoders: Decoders
    seed: int

    def __len__(self) -> int:
        return len(self.decoders)

    def __getitem__(self, layer: int, /) -> Any:
        shape = self.decoders[layer].shape
        return np.random.default_rng([self.seed, 5, layer]).standard_normal(shape, np.float32)


def largest_coordinates(
    resid: Float[np.ndarray, "N L D"], *, k: int
) -> tuple[Int[np.ndarray, "N L K"], Float[np.ndarray, "N L K"]]:
    """Return the k coordinates of largest size in place of latents: (feature_ids, activations) for `track`.

    Coordinate d counts as latent d where it is positive and as D + d where it is negative, with its absolute value as
    activation, so that `SignedCoordinates` are the decoders. Of equal sizes the first coordinate comes first.
    """
    size, width = np.abs(resid.astype(np.float32)), resid.shape[-1]
    ids = np.argsort(-size, axis=-1, kind="stable")[..., : min(k, width)]
    activations = np.take_along_axis(size, ids, axis=-1)
    signed = ids + width * (np.take_along_axis(resid, ids, axis=-1) < 0)
    return np.where(activations > 0, signed, -1), activations


@dataclasses.dataclass(frozen=True)
class SignedCoordinates:
    """The coordinates of a residual stream and their negatives as the decoder of every layer, [2 D, D]."""

    n_layers: int
    width: int

    def __len__(self) -> int:
        return self.n_layers

    def __getitem__(self, layer: int, /) -> Float[np.ndarray, "F D"]:
        if not 0 <= layer < self.n_layers:
            raise IndexError(layer)
        unit = np.eye(self.width, dtype=np.float32)
        return np.concatenate([unit, -unit])
