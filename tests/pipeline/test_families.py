"""Families of track features by position, and their way through tracks.npz."""

import dataclasses

import numpy as np
import pytest

from jaxsae import tracking
from jaxsae.artifacts import Features, InputError
from jaxsae.config import TrackingConfig
from jaxsae.pipeline.families import family_arrays, read_families
from jaxsae.pipeline.track import TOKENS, _measure_neurons, follow_all, follow_families, metric_names

N, L, K, F, D = 4, 3, 5, 17, 6
POSITIONS = ("last_prompt", "last_answer", "answer_00", "answer_01")
CONFIG = TrackingConfig(top_k=4)


@pytest.fixture(scope="module")
def kept():
    rng = np.random.default_rng(0)
    slots = (N, L, len(POSITIONS))
    return Features(
        ids=tuple("abcd"),
        positions=POSITIONS,
        feature_ids=np.argsort(rng.random((*slots, F)), axis=-1)[..., :K].astype(np.int32),
        activations=-np.sort(-rng.exponential(2.0, (*slots, K)), axis=-1).astype(np.float32),
        resid=rng.normal(size=(N, L, 3, D)).astype(np.float16),
        recon_error=rng.random(slots).astype(np.float32),
        token_directions=rng.normal(size=(N, 2, D)).astype(np.float32),
        logprobs=np.zeros(7, np.float32),
        offsets=np.array([0, 2, 4, 5, 7]),
    )


@pytest.fixture(scope="module")
def decoders():
    rng = np.random.default_rng(1)
    return list((rng.normal(size=(F, D)) + 0.3 * rng.normal(size=(L, F, D))).astype(np.float32))


def families_at(kept, decoders, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    tracks, _ = follow_all(kept, decoders, config)
    concepts = np.arange(L * F).reshape(L, F) // 3
    return follow_families(kept, tracks, decoders, concepts, config)


def equal(one, other):
    return one.columns == other.columns and (one.matrix != other.matrix).sum() == 0


def test_follow_families__are_of_the_tracked_position_and_of_the_prompt(kept, decoders):
    found = families_at(kept, decoders, position="last_answer")
    assert set(found) == {"prompt", "profiles", "concepts", "late_births"}
    at_prompt = kept.feature_ids[:, :, 0, :4], kept.activations[:, :, 0, :4]
    prompt = tracking.track(*at_prompt, decoders, tracking.TrackerConfig())
    np.testing.assert_array_equal(found["prompt"].matrix, tracking.divergence_metrics(prompt))
    width = len(tracking.LATE_BIRTH_COLUMNS)
    for index in range(2):
        part = found["late_births"].matrix[:, (2 + index) * width : (3 + index) * width]
        np.testing.assert_array_equal(part, tracking.late_births(prompt, decoders, kept.token_directions)[:, index])
    at = found["profiles"].columns.index("sae_error_00")
    np.testing.assert_array_equal(found["profiles"].matrix[:, at : at + L], kept.recon_error[:, :, 1])
    alone = families_at(kept, decoders, position="last_prompt")
    assert alone["late_births"].matrix.shape == (N, 2 * width)
    assert equal(alone["prompt"], found["prompt"])


def test_follow_families__of_every_token_are_those_of_the_last_one(kept, decoders):
    of_tokens, last = (families_at(kept, decoders, position=position) for position in (TOKENS, "last_answer"))
    assert set(of_tokens) == set(last)
    assert all(equal(of_tokens[name], last[name]) for name in last)


def test_follow_families__have_no_prompt_where_it_was_not_kept(kept, decoders):
    without = dataclasses.replace(
        kept,
        positions=POSITIONS[1:],
        feature_ids=kept.feature_ids[:, :, 1:],
        activations=kept.activations[:, :, 1:],
        recon_error=kept.recon_error[:, :, 1:],
    )
    assert set(families_at(without, decoders)) == {"profiles", "concepts", "late_births"}


@pytest.mark.parametrize("position", ["last_answer", "last_prompt", TOKENS])
def test_neurons__have_the_metrics_of_the_tracks(kept, position):
    config = dataclasses.replace(CONFIG, position=position)
    found = _measure_neurons(kept, config)
    assert found.shape == (N, len(metric_names(config)))
    linked = dataclasses.replace(config, association="links", null="random_pairs")
    assert np.isfinite(_measure_neurons(kept, linked)).all()
    at = ("last_prompt", "last_answer").index(position if position != TOKENS else "last_answer")
    ids, sizes = tracking.largest_coordinates(kept.resid[:, :, at], k=4)
    tracks = tracking.track(ids, sizes, tracking.SignedCoordinates(L, D), tracking.TrackerConfig())
    np.testing.assert_array_equal(found[:, :1], tracking.divergence_metrics(tracks)[:, :1])


def test_read_families__gives_what_was_written_and_names_what_is_missing(kept, decoders):
    families = families_at(kept, decoders)
    arrays = family_arrays(families)
    again = read_families(arrays, "tracks.npz")
    assert set(again) == set(families)
    assert all(equal(again[name], families[name]) for name in families)
    del arrays["late_births"]
    with pytest.raises(InputError, match=r"tracks\.npz has no late_births, as an older version wrote it; run jaxsae"):
        read_families(arrays, "tracks.npz")
