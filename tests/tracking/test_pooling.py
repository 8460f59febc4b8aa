"""Metrics pooled over an answer's tokens, and tracks laid one after the other."""

import numpy as np

from jaxsae import tracking


def make_tracks(seed, n_samples):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n_samples, 4, 9)), axis=2)[..., :5]
    acts = -np.sort(-rng.exponential(1.0, ids.shape), axis=2)
    return tracking.track(ids, acts, rng.standard_normal((4, 9, 6)), tracking.TrackerConfig())


def test_pooled_metrics__are_mean_and_largest_over_each_answer_s_tokens():
    tracks, offsets = make_tracks(0, 9), np.array([0, 1, 5, 9])
    metrics = tracking.divergence_metrics(tracks)
    pooled = tracking.pooled_metrics(tracks, offsets)
    assert pooled.shape == (3, 52)
    for answer, (start, stop) in enumerate([(0, 1), (1, 5), (5, 9)]):
        np.testing.assert_allclose(pooled[answer, :26], metrics[start:stop].mean(axis=0), rtol=1e-13)
        np.testing.assert_array_equal(pooled[answer, 26:], metrics[start:stop].max(axis=0))
    names = tracking.DIVERGENCE_COLUMNS
    assert (*(f"mean_{name}" for name in names), *(f"max_{name}" for name in names)) == tracking.POOLED_COLUMNS


def test_concatenate__keeps_every_sample_as_it_is():
    whole = make_tracks(1, 7)
    parts = [make_tracks(1, 7), make_tracks(2, 3)]
    joined = tracking.Tracks.concatenate(parts)
    assert joined.n_samples == 10
    assert tracking.Tracks.from_arrays(joined.arrays()).n_samples == 10  # offsets and lives agree
    expected = np.concatenate([tracking.divergence_metrics(part) for part in parts])
    np.testing.assert_array_equal(tracking.divergence_metrics(joined), expected)
    alone = tracking.Tracks.concatenate([whole])
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(alone.arrays()[name], array)
