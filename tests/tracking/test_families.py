"""Families of track features, each against a plain loop over tracks, layers and observations."""

import itertools

import numpy as np
import pytest

from jaxsae import tracking
from jaxsae.tracking.bags import CONCEPT_EVENTS
from jaxsae.tracking.births import ALIGNED
from jaxsae.tracking.profiles import LAYER_PROFILES, SAE_ERROR_SUMMARIES

N, L, K, F, D = 9, 7, 5, 23, 6


@pytest.fixture(scope="module", params=[0, 2])
def followed(request):
    """Return (ids, activations, decoders, config, tracks); some slots are empty, one sample has nothing at all."""
    rng = np.random.default_rng(3)
    directions = rng.standard_normal((F, D))
    decoders = (directions + 0.3 * rng.standard_normal((L, F, D))).astype(np.float32)
    decoders[2, 4] = 0.0
    ids = np.stack([[rng.choice(F, K, replace=False) for _ in range(L)] for _ in range(N)])
    activations = -np.sort(-rng.exponential(2.0, ids.shape), axis=-1)
    activations[rng.random(ids.shape) < 0.05] = 0
    activations = -np.sort(-activations, axis=-1)
    activations[4] = 0
    ids[activations == 0] = -1
    config = tracking.TrackerConfig(max_missed_layers=request.param)
    return ids, activations, decoders, config, tracking.track(ids, activations, decoders, config)


def observations(tracks, track):
    at = slice(tracks.observation_offsets[track], tracks.observation_offsets[track + 1])
    return list(zip(tracks.layer[at], tracks.feature_id[at], tracks.activation[at], strict=True))


def tracks_of(tracks, sample):
    return range(tracks.sample_offsets[sample], tracks.sample_offsets[sample + 1])


def cosine(x, y):
    norms = np.linalg.norm(x.astype(float)) * np.linalg.norm(y.astype(float))
    return float(x.astype(float) @ y.astype(float) / norms) if norms else 0.0


def plain_costs(decoders, config, links):
    """Return the cost of each (before, after) pair of observations."""
    costs = []
    for (l0, f0, a0), (l1, f1, a1) in links:
        costs.append(
            config.semantic_weight * (1 - cosine(decoders[l0][f0], decoders[l1][f1]))
            + config.activation_weight * abs(a0 - a1) / (a0 + a1)
        )
    return costs


def test_link_costs__are_those_of_the_associations_that_were_made(followed):
    *_, decoders, config, tracks = followed
    found = tracking.link_costs(tracks, decoders, config)
    n_links = 0
    for track in range(len(tracks.birth)):
        seen = observations(tracks, track)
        at = tracks.observation_offsets[track]
        assert np.isnan(found[at])
        expected = plain_costs(decoders, config, itertools.pairwise(seen))
        np.testing.assert_allclose(found[at + 1 : at + len(seen)], expected, rtol=1e-12)
        n_links += len(expected)
    assert n_links > 50
    assert np.nanmax(found) < config.association_threshold


def test_layer_profiles__equal_a_plain_loop(followed):
    ids, activations, decoders, config, tracks = followed
    error = np.random.default_rng(0).random((N, L)).astype(np.float32)
    how = {"feature_ids": ids, "activations": activations, "recon_error": error, "no_match": 0.5}
    found = tracking.layer_profiles(tracks, tracking.link_costs(tracks, decoders, config), **how)
    columns = tracking.profile_columns(L)
    assert found.shape == (N, len(columns)) == (N, L * len(LAYER_PROFILES) + len(SAE_ERROR_SUMMARIES))
    for n in range(N):
        row = dict(zip(columns, found[n], strict=True))
        mine = [observations(tracks, track) for track in tracks_of(tracks, n)]
        lives = [(tracks.birth[track], tracks.death[track]) for track in tracks_of(tracks, n)]
        for layer in range(L):
            into = [pair for seen in mine for pair in itertools.pairwise(seen) if pair[1][0] == layer]
            costs = plain_costs(decoders, config, into) or [0.5]
            assert row[f"match_cost_mean_{layer:02d}"] == pytest.approx(np.mean(costs), abs=1e-12)
            assert row[f"match_cost_min_{layer:02d}"] == pytest.approx(min(costs), abs=1e-12)
            assert row[f"births_{layer:02d}"] == sum(birth == layer for birth, _ in lives)
            assert row[f"deaths_{layer:02d}"] == sum(death == layer for _, death in lives)
            living = sum(birth <= layer and (death < 0 or death >= layer) for birth, death in lives)
            assert row[f"living_{layer:02d}"] == living
            explained = sum(a for seen in mine if len(seen) > 1 for at, _, a in seen if at == layer)
            total = activations[n, layer].sum()
            expected = 1 - explained / total if total else 0
            assert row[f"unexplained_{layer:02d}"] == pytest.approx(expected, abs=1e-12)
            assert row[f"sae_error_{layer:02d}"] == error[n, layer]
        of = error[n].astype(float)
        summary = [of.mean(), of.std(), of.max(), of.min(), of[-1], of[-1] - of[0], of.argmax()]
        summary.append(of[-3:].mean() / of.mean())  # seven layers: the last third is three
        for name, value in zip(SAE_ERROR_SUMMARIES, summary, strict=True):
            assert row[f"sae_error_{name}"] == pytest.approx(value, rel=1e-12)


def test_concept_bags__equal_a_plain_loop(followed):
    tracks = followed[-1]
    concepts = np.random.default_rng(1).integers(0, 11, (L, F))
    concepts[0, 0] = 10
    found = tracking.concept_bags(tracks, concepts).toarray()
    expected = {}
    for n in range(N):
        for track in tracks_of(tracks, n):
            seen = observations(tracks, track)
            for layer, latent, activation in seen:
                key = n, "active", concepts[layer, latent]
                expected[key] = max(expected.get(key, 0), activation)
            third = ("early", "middle", "late")[int(3 * seen[0][0] / L)]
            expected[n, f"born_{third}", concepts[seen[0][0], seen[0][1]]] = 1
            if tracks.death[track] >= 0:
                third = ("early", "middle", "late")[int(3 * seen[-1][0] / L)]
                expected[n, f"died_{third}", concepts[seen[-1][0], seen[-1][1]]] = 1
    dense = np.zeros((N, len(CONCEPT_EVENTS) * 11))
    for (n, event, concept), value in expected.items():
        dense[n, CONCEPT_EVENTS.index(event) * 11 + concept] = value
    np.testing.assert_array_equal(found, dense)
    assert len({event for _, event, _ in expected}) >= 6  # where tracks coast, few end late


def test_late_births__equal_a_plain_loop(followed):
    *_, decoders, _, tracks = followed
    both = np.random.default_rng(2).standard_normal((N, 2, D)).astype(np.float32)
    both[5] = 0
    found = tracking.late_births(tracks, decoders, both)
    assert found.shape == (N, 2, len(tracking.LATE_BIRTH_COLUMNS))
    for n, token in np.ndindex(N, 2):
        directions = both[:, token]
        mine = [observations(tracks, track) for track in tracks_of(tracks, n)]
        born = [seen[0] for seen in mine if seen[0][0] >= 4]
        cosines = [cosine(decoders[layer][latent], directions[n]) for layer, latent, _ in born]

        towards = directions[n].astype(float)

        def given(layer, latent, activation, towards=towards):
            return activation * (decoders[layer][latent].astype(float) @ towards)

        gifts = [given(*each) for each in born]
        sizes = [activation for *_, activation in born]
        aligned = [
            layer
            for seen in mine
            for layer, latent, _ in seen
            if cosine(decoders[layer][latent], directions[n]) > ALIGNED / np.sqrt(D)
        ]
        row = {
            "late_births": len(born),
            "late_activation": sum(sizes),
            "late_alignment_max": max(cosines, default=0),
            "late_alignment_mean": np.dot(sizes, cosines) / sum(sizes) if born else 0,
            "late_contribution_max": max(gifts, default=0),
            "late_contribution_sum": sum(gifts),
            "late_aligned_share": np.mean(np.array(cosines) > ALIGNED / np.sqrt(D)) if born else 0,
            "final_contribution": sum(given(*each) for seen in mine for each in seen if each[0] == L - 1),
            "first_aligned_layer": min(aligned, default=L) / L,
        }
        np.testing.assert_allclose(found[n, token], [row[name] for name in tracking.LATE_BIRTH_COLUMNS], atol=1e-9)


def test_families__of_a_sample_alone_are_the_same_to_the_last_bit(followed):
    ids, activations, decoders, config, tracks = followed
    rng = np.random.default_rng(4)
    error, directions = rng.random((N, L)).astype(np.float32), rng.standard_normal((N, 2, D)).astype(np.float32)
    concepts = rng.integers(0, 11, (L, F))

    def families(tracks, rows):
        costs = tracking.link_costs(tracks, decoders, config)
        how = {"feature_ids": ids[rows], "activations": activations[rows], "recon_error": error[rows]}
        return (
            tracking.layer_profiles(tracks, costs, **how, no_match=0.5),
            tracking.concept_bags(tracks, concepts).toarray(),
            tracking.late_births(tracks, decoders, directions[rows]),
        )

    together = families(tracks, slice(None))
    for n in range(N):
        one = slice(n, n + 1)
        alone = families(tracking.track(ids[one], activations[one], decoders, config), one)
        for each, whole in zip(alone, together, strict=True):
            np.testing.assert_array_equal(each[0], whole[n])


def test_families__do_not_depend_on_the_order_of_latents(followed):
    ids, activations, decoders, config, tracks = followed
    order = np.random.default_rng(5).permutation(F)  # latent f is called order[f]
    renamed = np.where(ids >= 0, order[ids], -1)
    shuffled = np.empty_like(decoders)
    shuffled[:, order] = decoders
    again = tracking.track(renamed, activations, shuffled, config)
    np.testing.assert_allclose(
        tracking.link_costs(again, shuffled, config), tracking.link_costs(tracks, decoders, config), atol=1e-12
    )
    concepts = np.arange(L * F).reshape(L, F)
    moved = np.empty_like(concepts)
    moved[:, order] = concepts
    np.testing.assert_array_equal(
        tracking.concept_bags(again, moved).toarray(), tracking.concept_bags(tracks, concepts).toarray()
    )


def test_families__of_no_tracks_are_defined():
    ids = np.full((3, 4, 2), -1)
    empty = tracking.track(ids, np.zeros(ids.shape), np.ones((4, 5, 2)), tracking.TrackerConfig())
    how = {"feature_ids": ids, "activations": np.zeros(ids.shape), "recon_error": np.zeros((3, 4)), "no_match": 0.5}
    profiles = tracking.layer_profiles(empty, np.empty(0), **how)
    assert np.isfinite(profiles).all()
    assert (profiles[:, :4] == 0.5).all()
    assert tracking.concept_bags(empty, np.zeros((4, 5), int)).nnz == 0
    births = tracking.late_births(empty, np.ones((4, 5, 2)), np.ones((3, 2, 2)))
    np.testing.assert_array_equal(births, [[[0] * 8 + [1]] * 2] * 3)


def test_largest_coordinates__are_signed_units_that_only_equal_coordinates_link():
    resid = np.array([[[0.5, -3.0, 2.0, 0.0], [1.0, -2.5, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]], np.float16)
    ids, activations = tracking.largest_coordinates(resid, k=3)
    np.testing.assert_array_equal(ids, [[[5, 2, 0], [5, 6, 0], [-1, -1, -1]]])
    np.testing.assert_array_equal(activations, [[[3, 2, 0.5], [2.5, 2, 1], [0, 0, 0]]])
    decoders = tracking.SignedCoordinates(3, 4)
    np.testing.assert_array_equal(decoders[1][ids[0, 0]], [[0, -1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])
    tracks = tracking.track(ids, activations, decoders, tracking.TrackerConfig(birth_threshold=0.1))
    lives = {(tracks.feature_id[at], end) for at, end in zip(tracks.observation_offsets, tracks.death, strict=False)}
    assert lives == {(5, 1), (2, 0), (0, 1), (6, 1)}
    with pytest.raises(IndexError):
        decoders[3]
