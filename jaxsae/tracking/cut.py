"""Tracks with one of them left out."""

import dataclasses

import numpy as np

from jaxsae.tracking.tracks import Tracks


def leave_one_out(tracks: Tracks) -> Tracks:
    """Return R samples from the only sample of `tracks`, which has R tracks: sample r lacks track r, the rest is equal.

    Every other track keeps its observations: what the tracker would have matched in its place is not asked.
    """
    n_tracks, lengths = len(tracks.birth), np.diff(tracks.observation_offsets)
    kept = np.array([other for r in range(n_tracks) for other in range(n_tracks) if other != r], dtype=np.int64)
    starts = np.repeat(tracks.observation_offsets[kept], lengths[kept])
    offsets = np.concatenate([[0], np.cumsum(lengths[kept])])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths[kept])
    return dataclasses.replace(
        tracks,
        sample_offsets=np.arange(n_tracks + 1) * max(n_tracks - 1, 0),
        birth=tracks.birth[kept],
        death=tracks.death[kept],
        observation_offsets=offsets,
        layer=tracks.layer[starts + within],
        feature_id=tracks.feature_id[starts + within],
        activation=tracks.activation[starts + within],
    )
