"""The 26 metrics: identities, a hand-made case, and a plain loop written from their description."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxsae import tracking

N_LAYERS = 5
ASSOCIATIONS = st.sampled_from(["hungarian", "greedy", "feature_id", "none"])
properties = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


def draw_tracks(seed, association, missed):
    rng = np.random.default_rng(seed)
    ids, acts = np.full((4, N_LAYERS, 6), -1), np.zeros((4, N_LAYERS, 6))
    for sample, layer in np.ndindex(4, N_LAYERS):
        count = rng.integers(0, 7)
        ids[sample, layer, :count] = rng.choice(11, count, replace=False)
        acts[sample, layer, :count] = -np.sort(-rng.exponential(1.0, count))
    config = tracking.TrackerConfig(association, max_missed_layers=missed, association_threshold=0.6)
    return tracking.track(ids, acts, rng.standard_normal((N_LAYERS, 11, 3)), config)


def column(table, name):
    return table[:, tracking.DIVERGENCE_COLUMNS.index(name)]


def oracle_row(births, deaths, observations):
    """Compute one sample's metrics; `observations` holds a dict layer -> activation for each track."""
    layers = {"entropy": [], "competition": [], "dominance": [], "density": []}
    for layer in range(N_LAYERS):
        living = [r for r in range(len(births)) if births[r] <= layer and (deaths[r] < 0 or deaths[r] >= layer)]
        acts = [observations[r].get(layer, 0.0) for r in living]
        total = sum(acts)
        shares = [a / total for a in acts if a > 0]
        layers["entropy"].append(-sum(p * math.log2(p) for p in shares))
        layers["competition"].append(sum(a > 0.5 for a in acts))
        layers["dominance"].append(max(acts) / total if total > 0 else 0.0)
        layers["density"].append(len(living))
    row = {}
    for name, values in layers.items():
        mean = sum(values) / N_LAYERS
        row[f"{name}_mean"], row[f"{name}_max"], row[f"{name}_min"] = mean, max(values), min(values)
        row[f"{name}_std"] = math.sqrt(sum((v - mean) ** 2 for v in values) / N_LAYERS)
        row[f"{name}_final"] = values[-1]
    row["high_competition_ratio"] = sum(c > 2 for c in layers["competition"]) / N_LAYERS
    row["weak_dominance_ratio"] = sum(d < 0.5 for d in layers["dominance"]) / N_LAYERS
    row["max_concurrent_tracks"] = max(layers["density"])
    n_born, n_dead = len(births), sum(d >= 0 for d in deaths)
    row |= {"total_births": n_born, "total_deaths": n_dead}
    row |= {"birth_rate": n_born / N_LAYERS, "death_rate": n_dead / N_LAYERS}
    row["churn_ratio"] = (n_born + n_dead) / (2 * N_LAYERS)
    row["survival_rate"] = sum(d < 0 for d in deaths) / n_born if n_born else 0.0
    stable = [1 / (1 + np.var(list(seen.values()))) for seen in observations if len(seen) >= 2]
    row["stability_mean"] = sum(stable) / len(stable) if stable else 0.0
    row["stability_min"] = min(stable, default=0.0)
    row["unstable_track_ratio"] = sum(s < 0.5 for s in stable) / len(stable) if stable else 0.0
    return [row[name] for name in tracking.DIVERGENCE_COLUMNS]


def oracle_table(tracks):
    rows = []
    for n in range(tracks.n_samples):
        mine = range(tracks.sample_offsets[n], tracks.sample_offsets[n + 1])
        spans = [slice(*tracks.observation_offsets[r : r + 2]) for r in mine]
        seen = [dict(zip(tracks.layer[s].tolist(), tracks.activation[s].tolist(), strict=True)) for s in spans]
        rows.append(oracle_row([tracks.birth[r] for r in mine], [tracks.death[r] for r in mine], seen))
    return np.array(rows)


@properties
@hypothesis.given(st.integers(0, 10**6), ASSOCIATIONS, st.integers(0, 3))
def test_divergence_metrics__births_less_deaths_live_at_the_end(seed, association, missed):
    tracks = draw_tracks(seed, association, missed)
    table = tracking.divergence_metrics(tracks)
    living = column(table, "total_births") - column(table, "total_deaths")
    alive = [
        (tracks.death[a:b] < 0).sum() for a, b in zip(*[tracks.sample_offsets[i:][:4] for i in (0, 1)], strict=True)
    ]
    np.testing.assert_array_equal(living, alive)
    np.testing.assert_allclose(living, column(table, "survival_rate") * column(table, "total_births"), atol=1e-12)
    assert (living <= column(table, "density_max")).all()


@properties
@hypothesis.given(st.integers(0, 10**6), ASSOCIATIONS, st.integers(0, 3))
def test_divergence_metrics__equal_the_plain_loop(seed, association, missed):
    tracks = draw_tracks(seed, association, missed)
    np.testing.assert_allclose(tracking.divergence_metrics(tracks), oracle_table(tracks), rtol=1e-12, atol=1e-12)


def test_divergence_metrics__of_one_hand_made_sample():
    """Layers 0 to 3: {4}; {2, 2}; {1, 1, 1, 1}; none left. The first track's activations are 4, 2, 1."""
    tracks = tracking.Tracks(
        sample_offsets=np.array([0, 4]),
        birth=np.array([0, 1, 2, 2]),
        death=np.array([2, 2, 2, 2]),
        observation_offsets=np.array([0, 3, 5, 6, 7]),
        layer=np.array([0, 1, 2, 1, 2, 2, 2]),
        feature_id=np.array([5, 5, 5, 6, 6, 7, 8]),
        activation=np.array([4.0, 2.0, 1.0, 2.0, 1.0, 1.0, 1.0]),
        n_layers=4,
    )
    spread, shaky = 1 / (1 + 14 / 9), 1 / (1 + 1 / 4)  # variances 14/9 and 1/4
    density = np.array([1, 2, 4, 0])
    expected = {
        "entropy_mean": 0.75,
        "entropy_max": 2.0,
        "entropy_std": math.sqrt(11 / 16),
        "entropy_final": 0.0,
        "total_births": 4,
        "total_deaths": 4,
        "birth_rate": 1,
        "death_rate": 1,
        "churn_ratio": 1,
        "survival_rate": 0,
        "competition_mean": 1.75,
        "competition_max": 4,
        "competition_std": density.std(),
        "competition_final": 0,
        "high_competition_ratio": 0.25,
        "stability_mean": (spread + shaky) / 2,
        "stability_min": spread,
        "unstable_track_ratio": 0.5,
        "dominance_mean": (1 + 0.5 + 0.25 + 0) / 4,
        "dominance_min": 0,
        "dominance_final": 0,
        "weak_dominance_ratio": 0.5,
        "density_mean": 1.75,
        "density_max": 4,
        "density_std": density.std(),
        "max_concurrent_tracks": 4,
    }
    assert tuple(expected) == tracking.DIVERGENCE_COLUMNS
    np.testing.assert_allclose(tracking.divergence_metrics(tracks)[0], list(expected.values()), rtol=1e-14)


def test_divergence_metrics__a_coasting_track_counts_with_activation_zero():
    """A track seen at layers 0 and 2 of 4, alive at the end: it lives everywhere and is silent at 1 and 3."""
    tracks = tracking.Tracks(
        sample_offsets=np.array([0, 1]),
        birth=np.array([0]),
        death=np.array([-1]),
        observation_offsets=np.array([0, 2]),
        layer=np.array([0, 2]),
        feature_id=np.array([5, 5]),
        activation=np.array([2.0, 2.0]),
        n_layers=4,
    )
    table = tracking.divergence_metrics(tracks)
    assert column(table, "density_mean") == 1.0
    assert column(table, "competition_mean") == 0.5
    assert column(table, "dominance_final") == 0.0
    assert column(table, "weak_dominance_ratio") == 0.5
    assert column(table, "stability_min") == 1.0


@pytest.mark.parametrize("n_samples", [0, 3])
def test_divergence_metrics__without_tracks_are_zero_except_weak_dominance(n_samples):
    ids = np.full((n_samples, 2, 4), -1)
    config = tracking.TrackerConfig()
    table = tracking.divergence_metrics(tracking.track(ids, np.zeros(ids.shape), np.ones((2, 5, 3)), config))
    assert table.dtype == np.float64
    assert table.shape == (n_samples, 26)
    assert (column(table, "weak_dominance_ratio") == 1.0).all()
    assert table.sum() == n_samples
