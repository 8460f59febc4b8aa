"""The 26 divergence metrics of a sample's tracks, in the published order.

Source: khurramkhalil/GhostTrack (MIT), whose values they equal to rounding.
"""

import numpy as np
from jaxtyping import Float, Int

from jaxsae.tracking.cosines import blocks
from jaxsae.tracking.tracks import TOGETHER, Tracks

DIVERGENCE_COLUMNS = (
    "entropy_mean",
    "entropy_max",
    "entropy_std",
    "entropy_final",
    "total_births",
    "total_deaths",
    "birth_rate",
    "death_rate",
    "churn_ratio",
    "survival_rate",
    "competition_mean",
    "competition_max",
    "competition_std",
    "competition_final",
    "high_competition_ratio",
    "stability_mean",
    "stability_min",
    "unstable_track_ratio",
    "dominance_mean",
    "dominance_min",
    "dominance_final",
    "weak_dominance_ratio",
    "density_mean",
    "density_max",
    "density_std",
    "max_concurrent_tracks",
)
STRONG = 0.5  # activation above which a track competes; this and the three below are the published tracker's
CROWDED = 2  # competing tracks above which a layer counts as high competition
UNSTABLE = 0.5  # stability below which a track counts as unstable
WEAK = 0.5  # dominance below which a layer counts as weak


def divergence_metrics(tracks: Tracks) -> Float[np.ndarray, "N Q"]:
    """Return the 26 metrics of each sample, columns `DIVERGENCE_COLUMNS`; all spreads have ddof 0.

    Over the tracks living at a layer, with activations a: entropy is that of a / Σa in bits, competition the number
    of a > 0.5, dominance max a / Σa, density their number; entropy and dominance are 0 where there are none. Stability
    of a track with at least 2 observations is 1 / (1 + variance of its activations); its three metrics are 0 without
    such a track, and survival_rate without any track. Rates are per layer.
    """
    metrics = np.empty((tracks.n_samples, len(DIVERGENCE_COLUMNS)))
    for samples in blocks(tracks.n_samples, TOGETHER):
        metrics[samples] = _metrics(tracks.part(samples))
    return metrics


def _metrics(tracks: Tracks) -> Float[np.ndarray, "N Q"]:
    owner = np.repeat(np.arange(tracks.n_samples), np.diff(tracks.sample_offsets))
    density = count_living(tracks, owner)
    entropy, competition, dominance = _per_layer(tracks, owner)
    columns = {
        **_spread("entropy", entropy),
        **_turnover(tracks, owner),
        **_spread("competition", competition),
        "high_competition_ratio": (competition > CROWDED).mean(axis=1),
        **_stability(tracks, owner),
        "dominance_mean": dominance.mean(axis=1),
        "dominance_min": dominance.min(axis=1),
        "dominance_final": dominance[:, -1],
        "weak_dominance_ratio": (dominance < WEAK).mean(axis=1),
        **_spread("density", density),
        "max_concurrent_tracks": density.max(axis=1),
    }
    return np.stack([columns[name] for name in DIVERGENCE_COLUMNS], axis=1)


def _spread(name: str, values: Float[np.ndarray, "N L"]) -> dict[str, np.ndarray]:
    return {
        f"{name}_mean": values.mean(axis=1),
        f"{name}_max": values.max(axis=1),
        f"{name}_std": values.std(axis=1),
        f"{name}_final": values[:, -1],
    }


def count_living(tracks: Tracks, owner: Int[np.ndarray, " R"]) -> Float[np.ndarray, "N L"]:
    """Count the tracks living at each layer."""
    n_samples, n_layers = tracks.n_samples, tracks.n_layers
    dies = tracks.death >= 0
    steps = np.bincount(owner * n_layers + tracks.birth, minlength=n_samples * n_layers)
    last_layers = np.bincount((owner * n_layers + tracks.death)[dies], minlength=n_samples * n_layers)
    ended = np.cumsum(last_layers.reshape(n_samples, n_layers), axis=1)
    density = np.cumsum(steps.reshape(n_samples, n_layers), axis=1)
    density[:, 1:] -= ended[:, :-1]  # a track still lives at the layer it dies at
    return density.astype(np.float64)


def _per_layer(
    tracks: Tracks, owner: Int[np.ndarray, " R"]
) -> tuple[Float[np.ndarray, "N L"], Float[np.ndarray, "N L"], Float[np.ndarray, "N L"]]:
    """Return entropy (bits), competition and dominance at each layer; a track without observation there adds 0."""
    n_samples, n_layers = tracks.n_samples, tracks.n_layers
    cell = np.repeat(owner, np.diff(tracks.observation_offsets)) * n_layers + tracks.layer
    n_cells, acts = n_samples * n_layers, tracks.activation
    total = _sums(cell, acts, n_cells)
    largest = np.zeros(n_cells)
    np.maximum.at(largest, cell, acts)
    share = acts / np.where(total > 0, total, 1.0)[cell]
    bits = -share * np.log2(np.where(share > 0, share, 1.0))
    entropy = _sums(cell, bits, n_cells)
    competition = np.bincount(cell[acts > STRONG], minlength=n_cells).astype(np.float64)
    dominance = np.divide(largest, total, out=np.zeros(n_cells), where=total > 0)
    shape = n_samples, n_layers
    return entropy.reshape(shape), competition.reshape(shape), dominance.reshape(shape)


def _turnover(tracks: Tracks, owner: Int[np.ndarray, " R"]) -> dict[str, np.ndarray]:
    births = np.diff(tracks.sample_offsets).astype(np.float64)
    deaths = np.bincount(owner[tracks.death >= 0], minlength=tracks.n_samples).astype(np.float64)
    return {
        "total_births": births,
        "total_deaths": deaths,
        "birth_rate": births / tracks.n_layers,
        "death_rate": deaths / tracks.n_layers,
        "churn_ratio": (births + deaths) / (2 * tracks.n_layers),
        "survival_rate": (births - deaths) / np.maximum(births, 1),
    }


def _stability(tracks: Tracks, owner: Int[np.ndarray, " R"]) -> dict[str, np.ndarray]:
    lengths = np.diff(tracks.observation_offsets)
    track_of = np.repeat(np.arange(len(lengths)), lengths)
    mean = _sums(track_of, tracks.activation, len(lengths)) / lengths
    squares = _sums(track_of, (tracks.activation - mean[track_of]) ** 2, len(lengths))
    is_long = lengths >= 2
    stability, sample = 1.0 / (1.0 + squares[is_long] / lengths[is_long]), owner[is_long]
    count = np.bincount(sample, minlength=tracks.n_samples)
    lowest = np.where(count > 0, np.inf, 0.0)
    np.minimum.at(lowest, sample, stability)
    divisor = np.maximum(count, 1)
    return {
        "stability_mean": _sums(sample, stability, tracks.n_samples) / divisor,
        "stability_min": lowest,
        "unstable_track_ratio": np.bincount(sample[stability < UNSTABLE], minlength=tracks.n_samples) / divisor,
    }


def _sums(
    index: Int[np.ndarray, " observations"], values: Float[np.ndarray, " observations"], size: int
) -> Float[np.ndarray, " size"]:
    return np.bincount(index, weights=values, minlength=size).astype(np.float64)  # of nothing it counts in integers
