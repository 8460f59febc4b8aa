"""Tracks with one left out: the same as an answer that never had it."""

import numpy as np

from jaxsae import tracking


def test_leave_one_out__lacks_one_track_each_and_keeps_the_others():
    decoders = np.eye(5)[None].repeat(3, axis=0)
    ids = np.array([[[0, 1, 2], [0, 3, -1], [0, 3, 4]]])
    acts = np.array([[[5.0, 2.0, 1.0], [4.0, 3.0, 0.0], [3.0, 2.0, 1.0]]])
    whole = tracking.track(ids, acts, decoders, tracking.TrackerConfig())
    assert whole.feature_id.tolist() == [0, 0, 0, 1, 2, 3, 3, 4]
    without = tracking.leave_one_out(whole)
    assert (without.n_samples, without.n_layers) == (5, 3)
    for r, latent in enumerate([0, 1, 2, 3, 4]):
        # Tracks of equal latents alone match here, so that an answer without the latent has the others as they are.
        order = np.argsort(np.where(ids == latent, 0, -acts), axis=-1, kind="stable")
        cut_acts = np.take_along_axis(np.where(ids == latent, 0, acts), order, axis=-1)
        cut_ids = np.where(cut_acts > 0, np.take_along_axis(ids, order, axis=-1), -1)
        alone = tracking.track(cut_ids, cut_acts, decoders, tracking.TrackerConfig())
        tracks = slice(without.sample_offsets[r], without.sample_offsets[r + 1])
        seen = slice(without.observation_offsets[tracks.start], without.observation_offsets[tracks.stop])
        np.testing.assert_array_equal(without.birth[tracks], alone.birth)
        np.testing.assert_array_equal(without.death[tracks], alone.death)
        for name in ("layer", "feature_id", "activation"):
            np.testing.assert_array_equal(getattr(without, name)[seen], getattr(alone, name))
        np.testing.assert_array_equal(tracking.divergence_metrics(without)[r], tracking.divergence_metrics(alone)[0])


def test_leave_one_out__of_a_single_track_leaves_none():
    whole = tracking.track(np.array([[[3]]]), np.array([[[2.0]]]), np.ones((1, 4, 2)), tracking.TrackerConfig())
    without = tracking.leave_one_out(whole)
    assert (without.n_samples, len(without.birth), len(without.layer)) == (1, 0, 0)
    assert tracking.divergence_metrics(without)[0, tracking.DIVERGENCE_COLUMNS.index("total_births")] == 0
