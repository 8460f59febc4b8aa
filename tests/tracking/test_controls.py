"""Controls keep what they say they keep, and lose the links."""

import numpy as np
import pytest

from jaxsae import tracking


def make_tracks(*, missed=0, n_samples=5, n_layers=7, seed=0):
    """Follow features that persist: most tracks live for several layers, some coast where `missed` allows it."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((23, 6))
    decoders = (directions + 0.3 * rng.standard_normal((n_layers, 23, 6))).astype(np.float32)
    ids = np.stack([[rng.choice(23, 9, replace=False) for _ in range(n_layers)] for _ in range(n_samples)])
    activations = -np.sort(-rng.exponential(2.0, ids.shape), axis=-1)
    return tracking.track(ids, activations, decoders, tracking.TrackerConfig(max_missed_layers=missed))


def owners(tracks):
    return np.repeat(np.arange(len(tracks.birth)), np.diff(tracks.observation_offsets))


def observed(tracks):
    """Return the sorted (sample, layer, latent, activation) of all observations."""
    sample = np.repeat(np.arange(tracks.n_samples), np.diff(tracks.sample_offsets))[owners(tracks)]
    return sorted(zip(sample, tracks.layer, tracks.feature_id, tracks.activation, strict=True))


def links(tracks):
    """Return the sorted (sample, layer, layer of the next observation) of all links."""
    owner = owners(tracks)
    sample = np.repeat(np.arange(tracks.n_samples), np.diff(tracks.sample_offsets))[owner]
    later = np.flatnonzero(owner[1:] == owner[:-1]) + 1
    return sorted(zip(sample[later], tracks.layer[later - 1], tracks.layer[later], strict=True))


@pytest.mark.parametrize("missed", [0, 2])
def test_shuffle_links__keeps_births_deaths_observations_and_the_layers_of_links(missed):
    tracks = make_tracks(missed=missed)
    shuffled = tracking.shuffle_links(tracks, seed=0)
    again = tracking.Tracks.from_arrays(shuffled.arrays())  # checks that no array contradicts another
    assert observed(again) == observed(tracks)
    assert links(again) == links(tracks)
    np.testing.assert_array_equal(shuffled.birth, tracks.birth)
    np.testing.assert_array_equal(shuffled.sample_offsets, tracks.sample_offsets)
    assert sorted(shuffled.death) == sorted(tracks.death)
    names = tracking.DIVERGENCE_COLUMNS
    kept = [n for n, name in enumerate(names) if "stab" not in name and (not missed or "concurrent" not in name)]
    before, after = tracking.divergence_metrics(tracks), tracking.divergence_metrics(shuffled)
    if missed == 0:  # a track that coasts counts as living in the layer that it misses
        np.testing.assert_allclose(after[:, kept], before[:, kept], rtol=1e-12)
    assert (after != before).any()


def test_shuffle_links__loses_who_goes_on_as_whom():
    tracks = make_tracks(n_samples=40)
    shuffled = tracking.shuffle_links(tracks, seed=0)
    real, drawn = owners(tracks), owners(shuffled)

    def pairs(tracks, owner):
        sample = np.repeat(np.arange(tracks.n_samples), np.diff(tracks.sample_offsets))[owner]
        later = np.flatnonzero(owner[1:] == owner[:-1]) + 1
        ids = tracks.feature_id
        return set(zip(sample[later], tracks.layer[later], ids[later - 1], ids[later], strict=True))

    before, after = pairs(tracks, real), pairs(shuffled, drawn)
    assert len(before) == len(after) > 300
    assert len(before & after) < 0.5 * len(before)
    other = tracking.shuffle_links(tracks, seed=1)
    assert pairs(other, owners(other)) != after
    same = tracking.shuffle_links(tracks, seed=0)
    np.testing.assert_array_equal(same.feature_id, shuffled.feature_id)


def test_shuffle_links__of_no_tracks_gives_none():
    ids = np.full((3, 4, 2), -1)
    empty = tracking.track(ids, np.zeros(ids.shape), np.ones((4, 5, 2)), tracking.TrackerConfig())
    assert len(tracking.shuffle_links(empty, seed=0).birth) == 0


def test_random_decoders__have_the_shapes_of_the_real_ones_and_nothing_of_their_directions():
    real = [np.ones((400, 64), np.float32), np.ones((300, 64), np.float32)]
    random = tracking.RandomDecoders(real, 0)
    assert [random[layer].shape for layer in range(len(random))] == [(400, 64), (300, 64)]
    np.testing.assert_array_equal(random[1], random[1])
    unit = [decoder / np.linalg.norm(decoder, axis=1, keepdims=True) for decoder in (random[0], random[1])]
    cosines = unit[0][:300] @ unit[1].T
    assert abs(cosines.mean()) < 0.01
    assert 0.9 / 8 < cosines.std() < 1.1 / 8  # 1 / sqrt(D)
