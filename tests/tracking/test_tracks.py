"""The tracker against the published one's results, a plain loop written from its description, and exact properties."""

import dataclasses
import itertools
import json
import tracemalloc
import weakref
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxsae import tracking
from jaxsae.artifacts import InputError
from jaxsae.tracking import cosines as cosines_module
from jaxsae.tracking import metrics as metrics_module
from jaxsae.tracking import pairs as pairs_module
from jaxsae.tracking import tracks as tracks_module
from jaxsae.tracking.cosines import Cosines

FIXTURE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "tracker_reference.npz"
CASES = ("base", "loose", "ids", "none", "greedy", "all_empty")
FIELDS = ("sample_offsets", "birth", "death", "observation_offsets", "layer", "feature_id", "activation")
VARIANTS = list(itertools.product(("hungarian", "greedy", "feature_id", "none"), ("after", "before"), (0, 1, 3)))

properties = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
variants = st.sampled_from(VARIANTS)
seeds = st.integers(0, 10**6)


def make_features(seed, n_samples=4, n_layers=6, n_slots=7, n_latents=19, d_model=5):
    """Draw features that persist, change and vanish; activations straddle the birth threshold."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((n_latents, d_model))
    decoders = (directions + 0.7 * rng.standard_normal((n_layers, n_latents, d_model))).astype(np.float32)
    ids = np.full((n_samples, n_layers, n_slots), -1, np.int32)
    acts = np.zeros((n_samples, n_layers, n_slots), np.float32)
    for sample, layer in np.ndindex(n_samples, n_layers):
        count = rng.integers(0, n_slots + 1)
        ids[sample, layer, :count] = rng.choice(n_latents, count, replace=False)
        acts[sample, layer, :count] = -np.sort(-rng.exponential(1.0, count))
    return ids, acts, decoders


def make_config(variant, **settings):
    association, gate, missed = variant
    return tracking.TrackerConfig(association=association, gate=gate, max_missed_layers=missed, **settings)


def oracle_cost(track, feature, config):
    (_, _, before, v), (_, after, w) = track["observations"][-1], feature
    norms = np.sqrt(v @ v) * np.sqrt(w @ w)
    cos = min(1.0, max(-1.0, (v @ w) / norms)) if norms > 0 else 0.0
    change = abs(before - after) / (before + after) if before > 1e-6 else float(after > 0.1)
    return config.semantic_weight * (1 - cos) + config.activation_weight * change


def oracle_hungarian(cost, config):
    """Return (row, col) pairs; "before" by giving every row and column a partner of its own for half the threshold."""
    n_rows, n_cols = cost.shape
    if config.gate == "before":
        threshold = config.association_threshold
        square = np.zeros((n_rows + n_cols, n_rows + n_cols))
        square[:n_rows, :n_cols] = np.where(cost < threshold, cost, 1e6)
        square[:n_rows, n_cols:] = np.where(np.eye(n_rows) > 0, threshold / 2, 1e6)
        square[n_rows:, :n_cols] = np.where(np.eye(n_cols) > 0, threshold / 2, 1e6)
        rows, cols = linear_sum_assignment(square)
        return [(r, c) for r, c in zip(rows, cols, strict=True) if r < n_rows and c < n_cols]
    rows, cols = linear_sum_assignment(cost)
    return [(r, c) for r, c in zip(rows, cols, strict=True) if cost[r, c] < config.association_threshold]


def oracle_greedy(living, cost, config):
    free, pairs = list(range(cost.shape[1])), []
    for row in sorted(range(len(living)), key=lambda r: -living[r]["observations"][-1][2]):
        best = min(free, key=lambda c: cost[row, c], default=None)
        if best is not None and cost[row, best] < config.association_threshold:
            pairs.append((row, best))
            free.remove(best)
    return pairs


def oracle_pairs(living, features, config):
    if not living or not features or config.association == "none":
        return []
    if config.association == "feature_id":
        last = [track["observations"][-1][1] for track in living]
        return [(last.index(f[0]), c) for c, f in enumerate(features) if f[0] in last]
    cost = np.array([[oracle_cost(track, feature, config) for feature in features] for track in living])
    return oracle_greedy(living, cost, config) if config.association == "greedy" else oracle_hungarian(cost, config)


def oracle_sample(ids, acts, decoders, config):
    """Follow one sample's features as the published description says, one track at a time."""
    tracks = []
    for layer, decoder in enumerate(decoders):
        features = [
            (int(f), float(a), decoder[f].astype(np.float64))
            for f, a in zip(ids[layer], acts[layer], strict=True)
            if a > 0
        ]
        living = [track for track in tracks if track["death"] < 0]
        matched = {col: living[row] for row, col in oracle_pairs(living, features, config)}
        for col, track in matched.items():
            track["observations"].append((layer, *features[col]))
        for track in living:
            last = track["observations"][-1][0]
            if layer - last > config.max_missed_layers:
                track["death"] = last
        for col, feature in enumerate(features):
            if col not in matched and feature[1] > config.birth_threshold:
                tracks.append({"death": -1, "observations": [(layer, *feature)]})
    return tracks


def oracle_tracks(ids, acts, decoders, config):
    acts = acts.astype(np.float64)
    if config.normalise_activations:
        for rows in acts.reshape(-1, acts.shape[-1]):
            rows /= rows.sum() / (rows > 0).sum() if rows.any() else 1.0
    return [oracle_sample(i, a, decoders, config) for i, a in zip(ids, acts, strict=True)]


def as_lists(tracks):
    """Turn `Tracks` into what the oracle returns, without the vectors."""
    samples = []
    for n in range(tracks.n_samples):
        sample = []
        for r in range(tracks.sample_offsets[n], tracks.sample_offsets[n + 1]):
            at = slice(tracks.observation_offsets[r], tracks.observation_offsets[r + 1])
            seen = zip(tracks.layer[at], tracks.feature_id[at], tracks.activation[at], strict=True)
            sample.append(
                (int(tracks.birth[r]), int(tracks.death[r]), [(int(a), int(b), float(c)) for a, b, c in seen])
            )
        samples.append(sample)
    return samples


def oracle_lists(samples):
    return [
        [(t["observations"][0][0], t["death"], [o[:3] for o in t["observations"]]) for t in sample]
        for sample in samples
    ]


def assert_same(tracks, other, names=FIELDS):
    for name in names:
        np.testing.assert_array_equal(getattr(tracks, name), getattr(other, name), err_msg=name)


def published_config(text):
    """Build the TrackerConfig of a fixture case from the published tracker's own settings."""
    published = json.loads(text)
    association = "hungarian"
    for flag, name in (
        ("use_feature_id_matching", "feature_id"),
        ("disable_association", "none"),
        ("use_greedy", "greedy"),
    ):
        association = name if published.get(flag) else association
    same = ("birth_threshold", "association_threshold", "semantic_weight", "activation_weight")
    reference = tracking.TrackerConfig.reference()
    return dataclasses.replace(reference, association=association, **{name: published[name] for name in same})


# Exact properties


@properties
@hypothesis.given(seeds, variants)
def test_track__gives_every_loud_feature_to_exactly_one_track(seed, variant):
    ids, acts, decoders = make_features(seed)
    tracks = tracking.track(ids, acts, decoders, make_config(variant))
    sample = np.repeat(np.repeat(np.arange(4), np.diff(tracks.sample_offsets)), np.diff(tracks.observation_offsets))
    seen = list(zip(sample, tracks.layer, tracks.feature_id, strict=True))
    loud = {(n, layer, ids[n, layer, k]) for n, layer, k in zip(*np.nonzero(acts > 0.5), strict=True)}
    assert len(seen) == len(set(seen))
    assert loud <= set(seen)


@properties
@hypothesis.given(seeds, variants)
def test_track__bridges_at_most_max_missed_layers(seed, variant):
    tracks = tracking.track(*make_features(seed), make_config(variant))
    gaps = [np.diff([layer for layer, _, _ in seen]) for sample in as_lists(tracks) for _, _, seen in sample]
    assert max((gap.max(initial=1) for gap in gaps), default=1) <= variant[2] + 1
    last = tracks.layer[tracks.observation_offsets[1:] - 1]
    assert np.array_equal(tracks.death < 0, last >= tracks.n_layers - 1 - variant[2])
    assert np.array_equal(tracks.death[tracks.death >= 0], last[tracks.death >= 0])


@properties
@hypothesis.given(seeds, variants)
def test_track__batch_equals_one_sample_at_a_time(seed, variant):
    ids, acts, decoders = make_features(seed)
    config = make_config(variant)
    together = as_lists(tracking.track(ids, acts, decoders, config))
    alone = [as_lists(tracking.track(ids[n : n + 1], acts[n : n + 1], decoders, config))[0] for n in range(4)]
    assert together == alone


@properties
@hypothesis.given(seeds, variants)
def test_track__ignores_how_latents_are_numbered(seed, variant):
    """`feature_id` reads the numbers, so there one permutation serves all layers; elsewhere each has its own."""
    ids, acts, decoders = make_features(seed)
    rng = np.random.default_rng(seed + 1)
    n_layers, n_latents, _ = decoders.shape
    new_names = np.stack([rng.permutation(n_latents) for _ in range(n_layers)])
    if variant[0] == "feature_id":
        new_names[:] = new_names[0]
    renamed, moved = ids.copy(), np.empty_like(decoders)
    for layer in range(n_layers):
        moved[layer, new_names[layer]] = decoders[layer]
        renamed[:, layer] = np.where(ids[:, layer] >= 0, new_names[layer][ids[:, layer]], -1)
    tracks = tracking.track(ids, acts, decoders, make_config(variant))
    other = tracking.track(renamed, acts, moved, make_config(variant))
    assert_same(tracks, other, [name for name in FIELDS if name != "feature_id"])
    np.testing.assert_array_equal(other.feature_id, new_names[tracks.layer, tracks.feature_id])


@properties
@hypothesis.given(seeds, variants)
def test_track__ignores_the_scale_of_a_layer_when_normalising(seed, variant):
    ids, acts, decoders = make_features(seed)
    scale = 2.0 ** np.random.default_rng(seed).integers(-6, 7, acts.shape[1])  # powers of two, so that it is exact
    config = make_config(variant, normalise_activations=True)
    tracks = tracking.track(ids, acts, decoders, config)
    assert_same(tracks, tracking.track(ids, (acts * scale[:, None]).astype(np.float32), decoders, config))


@properties
@hypothesis.given(seeds, variants)
def test_track__births_less_deaths_are_the_living(seed, variant):
    tracks = tracking.track(*make_features(seed), make_config(variant))
    owner = np.repeat(np.arange(4), np.diff(tracks.sample_offsets))
    seen_at = [layers for sample in as_lists(tracks) for _, _, layers in sample]
    for layer in range(tracks.n_layers):
        births = np.bincount(owner[tracks.birth <= layer], minlength=4)
        deaths = np.bincount(owner[(tracks.death >= 0) & (tracks.death < layer)], minlength=4)
        living = [seen[0][0] <= layer and (d < 0 or d >= layer) for seen, d in zip(seen_at, tracks.death, strict=True)]
        np.testing.assert_array_equal(births - deaths, np.bincount(owner[living], minlength=4))


@properties
@hypothesis.given(seeds, variants, st.sampled_from([0.05, 0.5, 1.1]))
def test_track__decides_with_float32_products_as_with_float64_ones(seed, variant, threshold):
    """Many pairs have equal cosines, but for the last digits of float32: twins of latents, one of them longer."""
    ids, acts, decoders = make_features(seed)
    rng = np.random.default_rng(seed)
    twin = rng.integers(decoders.shape[1], size=decoders.shape[1])
    decoders = decoders[:, twin] * np.float32(1 + 0.1 * rng.random((1, decoders.shape[1], 1)))
    config, decoders = make_config(variant, association_threshold=threshold), decoders.astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cosines, "screen", screen_nothing)
        exact = tracking.track(ids, acts, decoders, config)
    for few in (0.0, 1.0):  # single dot products, and products of matrices
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairs_module, "FEW_PAIRS", few)
            assert_same(exact, tracking.track(ids, acts, decoders, config))


def screen_nothing(cosines, row_ids, row_layers, col_ids, layer):
    """Stand in for `Cosines.screen` with an error that leaves every pair to be asked again in float64."""
    return np.zeros((*row_ids.shape, col_ids.shape[1]), np.float32), 4.0


def test_track__looks_at_close_calls_again_in_float64(monkeypatch):
    """Each track has two partners whose cosines differ by less than float32 products are off."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((100, 256)).astype(np.float32)
    second = (np.repeat(first, 2, axis=0) * (1 + 1e-4 * rng.standard_normal((200, 256)))).astype(np.float32)
    ids = np.stack([[[n, -1], [2 * n, 2 * n + 1]] for n in range(100)])
    acts = np.where(ids >= 0, 1.0, 0.0)
    products = first[:, None].astype(np.float64) * second.reshape(100, 2, 256)
    cos = products.sum(axis=2) / np.linalg.norm(second.astype(np.float64), axis=1).reshape(100, 2)
    expected = 2 * np.arange(100) + cos.argmax(axis=1)
    for few in (0.0, 1.0):
        monkeypatch.setattr(pairs_module, "FEW_PAIRS", few)
        for gate in ("before", "after"):
            tracks = tracking.track(ids, acts, [first, second], tracking.TrackerConfig(gate=gate))
            assert tracks.feature_id[tracks.layer == 1].reshape(100, 2)[:, 0].tolist() == expected.tolist()
    monkeypatch.setattr(Cosines, "exact", lambda self, *pairs: np.ones(len(pairs[0])))
    hasty = tracking.track(ids, acts, [first, second], tracking.TrackerConfig())
    assert np.sum(hasty.feature_id[hasty.layer == 1].reshape(100, 2)[:, 0] != expected) > 20


@pytest.mark.parametrize("prefers_tiles", [False, True])
@pytest.mark.parametrize("d_model", [1, 30, 257])
def test_screen__is_off_by_less_than_it_says(d_model, prefers_tiles, monkeypatch):
    monkeypatch.setattr(cosines_module, "_prefers_tiles", lambda: prefers_tiles)
    rng = np.random.default_rng(d_model)
    decoders = (rng.standard_normal((2, 50, d_model)) * 10.0 ** rng.integers(-8, 8, (2, 50, 1))).astype(np.float32)
    decoders[1, 7] = 0
    rows, cols = rng.integers(50, size=(3, 11)), rng.integers(50, size=(3, 6))
    cosines = Cosines()
    cosines.add(0, decoders[0], rows)
    cosines.add(1, decoders[1], cols)
    found, error = cosines.screen(rows, np.zeros_like(rows), cols, 1)
    exact = decoders.astype(np.float64)
    exact /= np.maximum(np.linalg.norm(exact, axis=2, keepdims=True), 1e-300)
    expected = np.einsum("nrd,nkd->nrk", exact[0][rows], exact[1][cols])
    assert 0 < error < 1e-3
    assert np.abs(found - expected).max() < error
    pairs = cosines.exact(rows[0, :6], np.zeros(6, np.int64), cols[0], 1)
    np.testing.assert_allclose(pairs, expected[0, np.arange(6), np.arange(6)], rtol=0, atol=1e-14)
    block = cosines.exact_block(rows[0], np.zeros(11, np.int64), cols[0], 1)
    np.testing.assert_allclose(block, expected[0], rtol=0, atol=1e-14)


def test_track__sees_most_pairs_of_the_optimum_without_an_assignment(monkeypatch):
    """With the gate after the assignment: few of 240 layers of samples need one."""
    ids, acts, decoders = make_features(4, n_samples=40, n_layers=7, n_slots=12, n_latents=60, d_model=200)
    asked = []

    def assign(cost):
        asked.append(cost.size)
        return linear_sum_assignment(cost)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cosines, "screen", screen_nothing)
        expected = tracking.track(ids, acts, decoders, tracking.TrackerConfig.reference())
    monkeypatch.setattr(pairs_module, "linear_sum_assignment", assign)
    assert_same(expected, tracking.track(ids, acts, decoders, tracking.TrackerConfig.reference()))
    assert len(asked) < 60


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_track__ignores_the_length_of_decoder_vectors_however_extreme(scale):
    ids, acts, decoders = make_features(11)
    config = tracking.TrackerConfig()
    tracks = tracking.track(ids, acts, decoders.astype(np.float64), config)
    scaled = (decoders.astype(np.float64) * scale).astype(np.float32)
    assert_same(tracks, tracking.track(ids, acts, scaled, config))


def test_track__normalises_by_the_sample_s_mean_positive_activation_in_the_layer():
    ids = np.array([[[0, 1], [0, -1]], [[1, -1], [-1, -1]]])
    acts = np.array([[[6.0, 3.0], [0.25, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    config = tracking.TrackerConfig(association="none", normalise_activations=True)
    tracks = tracking.track(ids, acts, np.ones((2, 2, 3)), config)
    assert tracks.activation.tolist() == [6.0 / 4.5, 3.0 / 4.5, 1.0, 1.0]
    assert tracks.birth.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_track__of_a_sample_is_the_same_alone_when_normalising(variant):
    ids, acts, decoders = make_features(3, n_samples=5)
    config = make_config(variant, normalise_activations=True)
    together = as_lists(tracking.track(ids, acts, decoders, config))
    assert [
        as_lists(tracking.track(ids[n : n + 1], acts[n : n + 1], decoders, config))[0] for n in range(5)
    ] == together


def test_track__coasts_over_a_missed_layer_with_its_last_observation():
    decoders = np.stack([np.eye(3)] * 4)
    ids = np.array([[[0, 1], [2, -1], [0, -1], [-1, -1]]])
    acts = np.array([[[2.0, 1.0], [3.0, 0.0], [2.5, 0.0], [0.0, 0.0]]])
    coasting = tracking.track(ids, acts, decoders, tracking.TrackerConfig(max_missed_layers=1))
    assert as_lists(coasting) == [[(0, -1, [(0, 0, 2.0), (2, 0, 2.5)]), (0, 0, [(0, 1, 1.0)]), (1, 1, [(1, 2, 3.0)])]]
    strict = tracking.track(ids, acts, decoders, tracking.TrackerConfig())
    assert as_lists(strict) == [
        [(0, 0, [(0, 0, 2.0)]), (0, 0, [(0, 1, 1.0)]), (1, 1, [(1, 2, 3.0)]), (2, 2, [(2, 0, 2.5)])]
    ]


def test_track__a_feature_at_the_birth_threshold_is_not_born():
    ids, acts = np.array([[[0, 1]]]), np.array([[[np.nextafter(0.5, 1.0), 0.5]]])
    tracks = tracking.track(ids, acts, np.ones((1, 2, 3)), tracking.TrackerConfig.reference())
    assert tracks.feature_id.tolist() == [0]


def test_track__a_matched_feature_may_be_quieter_than_the_birth_threshold():
    ids, acts = np.array([[[0], [0], [0]]]), np.array([[[0.6], [0.4], [0.3]]])
    tracks = tracking.track(ids, acts, np.ones((3, 1, 2)), tracking.TrackerConfig.reference())
    assert as_lists(tracks) == [[(0, -1, [(0, 0, 0.6), (1, 0, 0.4), (2, 0, 0.3)])]]


def test_track__takes_zero_vectors_as_orthogonal():
    ids, acts = np.array([[[0], [0]]]), np.array([[[1.0], [1.0]]])
    for threshold, n_tracks in ((0.6, 2), (0.61, 1)):  # cost 0.6 · (1 - 0) + 0.2 · 0
        config = dataclasses.replace(tracking.TrackerConfig.reference(), association_threshold=threshold)
        assert len(tracking.track(ids, acts, np.zeros((2, 1, 3)), config).birth) == n_tracks


def test_track__takes_a_slot_of_activation_zero_as_empty():
    ids, acts, decoders = make_features(5)
    named = np.where(acts > 0, ids, 1_000 + np.arange(ids.shape[2]))
    config = tracking.TrackerConfig()
    assert_same(tracking.track(ids, acts, decoders, config), tracking.track(named, acts, decoders, config))


@pytest.mark.parametrize("association", ["hungarian", "greedy", "feature_id", "none"])
@pytest.mark.parametrize(("n_samples", "n_slots"), [(0, 3), (2, 0), (2, 3)])
def test_track__nothing_in_gives_no_tracks(association, n_samples, n_slots):
    ids = np.full((n_samples, 4, n_slots), -1)
    tracks = tracking.track(ids, np.zeros(ids.shape), np.ones((4, 5, 2)), tracking.TrackerConfig(association))
    assert tracks.sample_offsets.tolist() == [0] * (n_samples + 1)
    assert tracks.n_layers == 4
    assert [len(getattr(tracks, name)) for name in FIELDS[1:]] == [0, 0, 1, 0, 0, 0]
    assert tracking.divergence_metrics(tracks).shape == (n_samples, 26)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_track__takes_any_integer_and_float_type(dtype):
    ids, acts, decoders = make_features(3)
    ids = np.where(acts > 0, ids, 0 if dtype == np.uint16 else -1)  # uint16 has no -1; activation 0 says the same
    ids[acts == 0] += np.where(dtype == np.uint16, 30 + np.indices(ids.shape)[2], 0)[acts == 0]
    halves = acts.astype(np.float16)
    config = tracking.TrackerConfig()
    tracks = tracking.track(ids.astype(dtype), halves, list(decoders), config)
    assert_same(tracks, tracking.track(ids, halves.astype(np.float64), decoders.astype(np.float64), config))
    assert tracks.activation.dtype == np.float64
    assert {getattr(tracks, name).dtype for name in FIELDS[:-1]} == {np.dtype(np.int64)}


@pytest.mark.parametrize("association", ["hungarian", "greedy"])
@pytest.mark.parametrize("missed", [0, 2])
def test_track__does_not_depend_on_the_block_size(association, missed, monkeypatch):
    features = make_features(8, n_samples=9)
    config = tracking.TrackerConfig(association=association, max_missed_layers=missed)
    whole = tracking.track(*features, config)
    monkeypatch.setattr(tracks_module, "PAIR_BYTES", 1_200)
    monkeypatch.setattr(cosines_module, "VECTOR_BYTES", 1)
    assert_same(whole, tracking.track(*features, config))


class LayerReader:
    """Reads one decoder when indexed; remembers which, and the most that were held at a time."""

    def __init__(self, decoders):
        self.decoders, self.reads, self.given, self.most_held = decoders, [], [], 0

    def __len__(self):
        return len(self.decoders)

    def __getitem__(self, layer):
        decoder = self.decoders[layer].copy()
        self.reads.append(layer)
        self.given.append(weakref.ref(decoder))
        self.most_held = max(self.most_held, sum(given() is not None for given in self.given))
        return decoder


@pytest.mark.parametrize("missed", [0, 1])
def test_track__reads_each_decoder_once_and_holds_few(missed, monkeypatch):
    ids, acts, decoders = make_features(2)
    monkeypatch.setattr(cosines_module, "VECTOR_BYTES", 1)
    config = tracking.TrackerConfig(max_missed_layers=missed)
    reader = LayerReader(decoders)
    assert_same(tracking.track(ids, acts, reader, config), tracking.track(ids, acts, decoders, config))
    assert reader.reads == [0, 1, 2, 3, 4, 5]
    assert reader.most_held == missed + 2


def test_track__memory_does_not_grow_with_gathered_vectors(monkeypatch):
    """A sample more may cost its share of the arrays [N, K] and of the output, not its decoder rows (64 KiB)."""
    monkeypatch.setattr(tracks_module, "PAIR_BYTES", 2**16)
    monkeypatch.setattr(cosines_module, "VECTOR_BYTES", 2**18)
    peaks = []
    for n_samples in (20, 220):
        features = make_features(1, n_samples=n_samples, n_layers=3, n_slots=16, n_latents=40, d_model=512)
        tracemalloc.start()
        tracking.track(*features, tracking.TrackerConfig())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 200 < 16 * 1024


@pytest.mark.parametrize("association", ["hungarian", "greedy", "links"])
def test_track__memory_does_not_grow_with_the_samples(association, monkeypatch):
    """Beyond input and output."""
    monkeypatch.setattr(tracks_module, "TOGETHER", 200)
    monkeypatch.setattr(metrics_module, "TOGETHER", 200)
    shape = {"n_layers": 3, "n_slots": 16, "n_latents": 40, "d_model": 512}
    links = tracking.link_by_weights(make_features(1, n_samples=1, **shape)[2], 4)
    config, peaks = tracking.TrackerConfig(association=association), []
    # The first time the type checker of the tests takes memory, and some with each call.
    for n_samples in (200, 400, 1200):
        features = make_features(1, n_samples=n_samples, **shape)
        tracemalloc.start()
        tracks = tracking.track(*features, config, links=links)
        metrics = tracking.divergence_metrics(tracks)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        peaks.append(peak - metrics.nbytes - sum(array.nbytes for array in tracks.arrays().values()))
    assert peaks[2] - peaks[1] < 800 * 160  # the numbers of a sample's tracks alone would be 192 bytes


@pytest.mark.parametrize("association", ["hungarian", "links"])
def test_track__does_not_depend_on_how_many_samples_go_together(association, monkeypatch):
    ids, acts, decoders = make_features(8, n_samples=9)
    config, links = tracking.TrackerConfig(association=association), tracking.link_by_weights(decoders, 4)
    whole = tracking.track(ids, acts, decoders, config, links=links)
    metrics = tracking.divergence_metrics(whole)
    monkeypatch.setattr(tracks_module, "TOGETHER", 4)
    monkeypatch.setattr(metrics_module, "TOGETHER", 2)
    parts = tracking.track(ids, acts, decoders, config, links=links)
    assert_same(whole, parts)
    np.testing.assert_array_equal(tracking.divergence_metrics(parts), metrics)


def test_track__names_the_sample_behind_the_first_that_go_together(monkeypatch):
    monkeypatch.setattr(tracks_module, "TOGETHER", 4)
    ids, acts, decoders = make_features(8, n_samples=9)
    acts[6, 2, 0] = np.nan
    with pytest.raises(InputError, match="activation nan in sample 6, layer 2"):
        tracking.track(ids, acts, decoders, tracking.TrackerConfig())
    ids, acts, decoders = make_features(8, n_samples=9)
    ids[7, 1, 0] = 999
    for association in ("hungarian", "links"):
        config = tracking.TrackerConfig(association=association)
        with pytest.raises(InputError, match="feature id 999 in sample 7, layer 1"):
            tracking.track(ids, acts, decoders, config, links=tracking.link_by_weights(decoders, 4))


# Parity


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("normalise", [False, True])
def test_track__equals_the_plain_loop(variant, normalise):
    for seed in range(6):
        ids, acts, decoders = make_features(seed)
        config = make_config(variant, normalise_activations=normalise, association_threshold=0.55)
        tracks, expected = tracking.track(ids, acts, decoders, config), oracle_tracks(ids, acts, decoders, config)
        assert as_lists(tracks) == oracle_lists(expected)


def test_track__random_cases_tell_the_variants_apart():
    """Without this the parity test could pass with an option that does nothing."""
    ids, acts, decoders = make_features(0, n_samples=12)
    seen = {str(as_lists(tracking.track(ids, acts, decoders, make_config(variant)))) for variant in VARIANTS}
    assert len(seen) == 3 * len({("hungarian", "after"), ("hungarian", "before"), "greedy", "feature_id", "none"})


# Published numbers


@pytest.mark.skipif(not FIXTURE.exists(), reason="shared/fixtures/tracker_reference.npz is absent")
@pytest.mark.parametrize("case", CASES)
def test_track__equals_the_published_tracker(case):
    with np.load(FIXTURE) as fixture:
        given = {name: fixture[f"{case}/{name}"] for name in ("ids", "acts", "dec", "tracks", "offsets", "metrics")}
        names, config = tuple(fixture["metric_names"]), published_config(str(fixture[f"{case}/config"]))
    tracks = tracking.track(given["ids"], given["acts"], given["dec"], config)
    lengths = np.diff(tracks.observation_offsets)
    np.testing.assert_array_equal(tracks.sample_offsets, given["offsets"])
    np.testing.assert_array_equal(np.stack([tracks.birth, tracks.death, lengths], axis=1), given["tracks"])
    assert names == tracking.DIVERGENCE_COLUMNS
    error = np.abs(tracking.divergence_metrics(tracks) - given["metrics"])
    assert (error <= 1e-6 * np.maximum(1, np.abs(given["metrics"]))).all()


# Errors


def spoil(sample, layer, slot, *, feature_id=None, activation=None):
    """Return features of 2 samples, 3 layers, 4 full slots with one value replaced."""
    ids = np.tile(np.arange(4), (2, 3, 1))
    acts = np.tile([4.0, 3.0, 2.0, 1.0], (2, 3, 1))
    if feature_id is not None:
        ids[sample, layer, slot] = feature_id
    if activation is not None:
        acts[sample, layer, slot] = activation
    return ids, acts


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (spoil(1, 2, 0, activation=np.nan), "activation nan in sample 1, layer 2: expected finite"),
        (spoil(0, 1, 0, activation=np.inf), "activation inf in sample 0, layer 1: expected finite"),
        (spoil(1, 0, 3, activation=-0.25), r"activation -0\.25 in sample 1, layer 0: expected none below 0"),
        (spoil(1, 2, 2, activation=3.5), r"activation 3\.5 in sample 1, layer 2: expected descending"),
        (spoil(0, 2, 1, feature_id=-3), "feature id -3 in sample 0, layer 2: expected a latent, or -1"),
        (spoil(0, 2, 1, feature_id=-1), r"activation 3\.0 in sample 0, layer 2: expected 0 in slots of feature id -1"),
        (spoil(1, 1, 0, feature_id=2), "feature id 2 in sample 1, layer 1: expected each latent once"),
        (spoil(1, 1, 2, feature_id=7), "feature id 7 in sample 1, layer 1: the decoder has 5 latents"),
    ],
)
@pytest.mark.parametrize("association", ["hungarian", "none"])
def test_track__names_a_bad_value_and_its_place(features, message, association):
    with pytest.raises(InputError, match=message):
        tracking.track(*features, np.ones((3, 5, 2)), tracking.TrackerConfig(association))


@pytest.mark.parametrize(
    ("ids", "acts", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((2, 3)), r"feature_ids are int64 of shape \(2, 3\)"),
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), r"feature_ids are float64 of shape \(2, 3, 4\), expected integers"),
        (np.zeros((2, 3, 4), int), np.zeros((2, 3, 5)), r"activations are float64 of shape \(2, 3, 5\).*\(2, 3, 4\)"),
        (np.zeros((2, 3, 4), int), np.zeros((2, 3, 4), int), "activations are int64"),
        (np.zeros((2, 0, 4), int), np.zeros((2, 0, 4)), r"\(2, 0, 4\) have no layer"),
    ],
)
def test_track__names_shapes_and_types_that_disagree(ids, acts, message):
    with pytest.raises(InputError, match=message):
        tracking.track(ids, acts, np.ones((3, 5, 2)), tracking.TrackerConfig())


@pytest.mark.parametrize(
    ("decoders", "message"),
    [
        ([np.ones((5, 2))] * 4, "4 decoders for 3 layers"),
        ([np.ones((5, 2)), np.ones((5, 6)), np.ones((5, 2))], "decoder of layer 1 is 6 wide, that of layer 0 2"),
        ([np.ones((5, 2)), np.ones(5), np.ones((5, 2))], r"decoder of layer 1 has shape \(5,\)"),
        ([np.ones((5, 2)), np.full((5, 2), np.nan), np.ones((5, 2))], "decoder of layer 1, latent 0 is not finite"),
    ],
)
def test_track__names_a_bad_decoder(decoders, message):
    with pytest.raises(InputError, match=message):
        tracking.track(*spoil(0, 0, 0), decoders, tracking.TrackerConfig())


# Tracks as arrays


def test_tracks__survive_arrays_and_back(tmp_path):
    tracks = tracking.track(*make_features(4), tracking.TrackerConfig(max_missed_layers=1))
    np.savez(tmp_path / "tracks.npz", **tracks.arrays())
    with np.load(tmp_path / "tracks.npz") as arrays:
        back = tracking.Tracks.from_arrays({**arrays, "metrics": np.ones(3)})
    assert_same(back, tracks)
    assert back.n_layers == tracks.n_layers
    assert isinstance(back.n_layers, int)


GOOD = {
    "sample_offsets": np.array([0, 1, 1, 2]),
    "birth": np.array([0, 1]),
    "death": np.array([-1, 2]),
    "observation_offsets": np.array([0, 3, 5]),
    "layer": np.array([0, 1, 3, 1, 2]),
    "feature_id": np.array([7, 7, 5, 3, 2]),
    "activation": np.array([2.0, 1.5, 1.0, 0.75, 0.25]),
    "n_layers": np.array(4),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("birth", [0.5, 1.0], r"birth is float64 of shape \(2,\), expected integers with 1 axes"),
        ("activation", np.ones((5, 1)), r"activation is float64 of shape \(5, 1\), expected floats"),
        ("n_layers", [4], r"n_layers is int64 of shape \(1,\), expected integers with 0 axes"),
        ("sample_offsets", [0, 1, 1], "sample_offsets does not rise from 0 to the 2 tracks"),
        ("sample_offsets", [0, 2, 1, 2], "sample_offsets does not rise"),
        ("death", [-1], "death holds 1 tracks, birth 2"),
        ("feature_id", [7, 7, 5, 3], "feature_id holds 4 observations, layer 5"),
        ("observation_offsets", [0, 3, 4], "observation_offsets does not rise from 0 to the 5 observations"),
        ("observation_offsets", [0, 3, 4, 5], "2 births but 4 observation_offsets"),
        ("observation_offsets", [0, 0, 5], "track 0 has no observation"),
        ("observation_offsets", [0, 5, 5], "track 1 has no observation"),
        ("birth", [0, 0], "track 1 is not born at its first observation"),
        ("death", [2, 2], "track 0 does not end at its last one"),
        ("n_layers", 3, "track 0 has a layer outside 0 to 2"),
        ("layer", [0, 0, 3, 1, 2], "track 0 is not ascending"),
        ("feature_id", [7, 7, 5, -1, 2], "track 1 has a negative feature id"),
        ("activation", [2.0, 1.5, 1.0, 0.75, np.nan], "track 1 has a negative or non-finite activation"),
        ("activation", [2.0, -1.5, 1.0, 0.75, 1.0], "track 0 has a negative or non-finite activation"),
    ],
)
def test_tracks__refuse_arrays_that_contradict_each_other(name, value, message):
    tracking.Tracks.from_arrays(GOOD)
    with pytest.raises(InputError, match=message):
        tracking.Tracks.from_arrays({**GOOD, name: np.asarray(value)})


@pytest.mark.parametrize("name", [*FIELDS, "n_layers"])
def test_tracks__name_a_missing_array(name):
    with pytest.raises(InputError, match=f"lack the array {name}"):
        tracking.Tracks.from_arrays({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # On a line of logarithms i', j, i, j' are one step apart each: what (i', j') differ is all three steps.
        (np.exp([0.8, 0.0]), np.exp([1.2, 0.4])),
        # A silent track differs as much as can be from what is heard, and not at all from what is not.
        (np.array([0.1, 1e-7]), np.array([0.12, 0.1])),
    ],
    ids=["far", "silent"],
)
def test_track__pair_of_large_cosine_is_given_up_where_the_activations_of_the_rest_ask_for_it(before, after):
    """Cosines alone would join i with j, and i' with j'; the least total cost does not, by a little."""
    cosines = np.array([[0.554, 0.7], [0.5, 0.554]])  # of i and i' with j' and j
    rest = np.sqrt(1 - (cosines**2).sum(axis=1))
    decoders = np.stack([np.hstack([cosines, np.diag(rest)]), np.eye(2, 4)]).astype(np.float32)
    ids, acts = np.array([[[0, 1], [0, 1]]]), np.stack([before, after])[None]
    config = tracking.TrackerConfig(gate="after", birth_threshold=0.0)
    change = np.abs(before[:, None] - after) / (before[:, None] + after)
    if before[1] < 1e-6:
        change[1] = after > 0.1
    cost = 0.6 * (1 - cosines) + 0.2 * change
    assert cost.trace() < cost[::-1].trace() - 0.01
    tracks = tracking.track(ids, acts, decoders, config)
    assert tracks.feature_id.reshape(2, 2).tolist() == [[0, 0], [1, 1]]
