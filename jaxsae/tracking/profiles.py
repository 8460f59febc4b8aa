"""Dense profiles of a sample's tracks, layer by layer, and of what tracks and SAEs leave unexplained there."""

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsae.tracking.associate import TrackerConfig, pair_costs
from jaxsae.tracking.links import Decoders
from jaxsae.tracking.metrics import count_living
from jaxsae.tracking.tracks import Tracks

LAYER_PROFILES = ("match_cost_mean", "match_cost_min", "births", "deaths", "living", "unexplained", "sae_error")
SAE_ERROR_SUMMARIES = ("mean", "std", "max", "min", "final", "growth", "argmax_layer", "late_ratio")
_BLOCK = 1024  # pairs of decoder rows in float64 at a time


def profile_columns(n_layers: int) -> tuple[str, ...]:
    """Name the columns of `layer_profiles`: each of `LAYER_PROFILES` for every layer, then the errors' summaries."""
    by_layer = (f"{name}_{layer:02d}" for name in LAYER_PROFILES for layer in range(n_layers))
    return (*by_layer, *(f"sae_error_{name}" for name in SAE_ERROR_SUMMARIES))


def layer_profiles(
    tracks: Tracks,
    costs: Float[np.ndarray, " observations"],
    *,
    feature_ids: Int[np.ndarray, "N L K"],
    activations: Float[np.ndarray, "N L K"],
    recon_error: Float[np.ndarray, "N L"],
    no_match: float | int,
) -> Float[np.ndarray, "N X"]:
    """Return the profiles of each sample, columns `profile_columns`.

    In each layer: mean and smallest cost of the links into it (`no_match` where there is none); tracks born there,
    tracks that end there, tracks that live there; unexplained: the share of the kept activation that belongs to no
    track seen in more than one layer (0 where nothing is kept); and the SAE's error. Of the errors over the layers:
    mean, std (ddof 0), max, min, final, growth (last minus first), the layer of the largest, and the mean over the last
    third of the layers over the mean of all (1 where all are 0).

    Args:
        costs: of each observation, as `link_costs` gives them.
        feature_ids, activations: what was tracked, as `track` got it.
        recon_error: squared SAE error over squared distance from b_dec, at the tracked position.
    """
    n_samples, n_layers = tracks.n_samples, tracks.n_layers
    track_sample, sample = owners(tracks)
    shape = n_samples, n_layers
    cell = sample * n_layers + tracks.layer
    mean_cost, least_cost = _link_profile(cell, costs, n_samples * n_layers, no_match)
    born = np.bincount(track_sample * n_layers + tracks.birth, minlength=n_samples * n_layers)
    dies = tracks.death >= 0
    died = np.bincount((track_sample * n_layers + tracks.death)[dies], minlength=n_samples * n_layers)
    by_layer = {
        "match_cost_mean": mean_cost.reshape(shape),
        "match_cost_min": least_cost.reshape(shape),
        "births": born.reshape(shape),
        "deaths": died.reshape(shape),
        "living": count_living(tracks, track_sample),
        "unexplained": unexplained_share(tracks, feature_ids, activations),
        "sae_error": recon_error.astype(np.float64),
    }
    profiles = [np.asarray(by_layer[name], np.float64) for name in LAYER_PROFILES]
    return np.concatenate([*profiles, _summarise_errors(by_layer["sae_error"])], axis=1)


def link_costs(tracks: Tracks, decoders: Decoders, config: TrackerConfig) -> Float[np.ndarray, " observations"]:
    """Return the association cost of each observation with the one that its track had before; NaN for the first one.

    It is the cost of `TrackerConfig` whatever the association went by, and that of a sample never depends on others.

    Args:
        decoders: those the tracks were followed with; each layer is read once, in order.
    """
    costs = np.full(len(tracks.layer), np.nan)
    before = _before(tracks)
    window: dict[int, np.ndarray] = {}
    for layer in range(tracks.n_layers):
        window.pop(layer - config.max_missed_layers - 2, None)
        window[layer] = np.asarray(decoders[layer])
        here = np.flatnonzero((tracks.layer == layer) & (before >= 0))
        for start in range(0, len(here), _BLOCK):
            rows = here[start : start + _BLOCK]
            cos = _cosines(_rows(tracks, before[rows], window), _rows(tracks, rows, window))
            pairs = cos[:, None, None], tracks.activation[before[rows], None], tracks.activation[rows, None]
            costs[rows] = pair_costs(*pairs, config=config)[:, 0, 0]
    return costs


def owners(tracks: Tracks) -> tuple[Int[np.ndarray, " R"], Int[np.ndarray, " observations"]]:
    """Return the sample of each track and that of each observation."""
    of_track = np.repeat(np.arange(tracks.n_samples), np.diff(tracks.sample_offsets))
    return of_track, np.repeat(of_track, np.diff(tracks.observation_offsets))


def late_layers(n_layers: int) -> Bool[np.ndarray, " L"]:
    """Mark the last third of the layers, one at least."""
    return np.arange(n_layers) >= n_layers - -(-n_layers // 3)


def unexplained_share(
    tracks: Tracks, feature_ids: Int[np.ndarray, "N L K"], activations: Float[np.ndarray, "N L K"]
) -> Float[np.ndarray, "N L"]:
    """Return the share of each layer's kept activation that belongs to no track seen in more than one layer."""
    n_samples, n_layers = feature_ids.shape[:2]
    lengths = np.diff(tracks.observation_offsets)
    is_long = np.repeat(lengths > 1, lengths)
    n_latents = int(max(feature_ids.max(initial=0), tracks.feature_id.max(initial=0))) + 1
    cell = owners(tracks)[1] * n_layers + tracks.layer
    followed = (cell * n_latents + tracks.feature_id)[is_long]
    cells = np.arange(n_samples * n_layers).reshape(n_samples, n_layers, 1)
    is_real = (activations > 0) & (feature_ids >= 0)
    kept = np.where(is_real, activations, 0).astype(np.float64)
    explained = np.where(is_real & np.isin(cells * n_latents + feature_ids, followed), kept, 0).sum(axis=2)
    total = kept.sum(axis=2)
    return np.divide(total - explained, total, out=np.zeros(total.shape), where=total > 0)


def _before(tracks: Tracks) -> Int[np.ndarray, " observations"]:
    """Return for each observation the one that its track had before, -1 for the first."""
    before = np.arange(-1, len(tracks.layer) - 1)
    before[tracks.observation_offsets[:-1]] = -1
    return before


def _rows(
    tracks: Tracks, observations: Int[np.ndarray, " pairs"], window: dict[int, np.ndarray]
) -> Float[np.ndarray, "pairs D"]:
    """Gather the decoder rows of some observations, in float64."""
    layers, ids = tracks.layer[observations], tracks.feature_id[observations]
    rows = np.empty((len(observations), next(iter(window.values())).shape[1]))
    for layer in np.unique(layers):
        is_here = layers == layer
        rows[is_here] = window[layer][ids[is_here]]
    return rows


def _cosines(one: Float[np.ndarray, "pairs D"], other: Float[np.ndarray, "pairs D"]) -> Float[np.ndarray, " pairs"]:
    """Return the cosine of each pair of rows, 0 if a norm is 0."""
    product, left, right = (np.einsum("pd,pd->p", x, y) for x, y in ((one, other), (one, one), (other, other)))
    norms = np.sqrt(left * right)
    return np.divide(product, norms, out=np.zeros(len(norms)), where=norms > 0)


def _link_profile(
    cell: Int[np.ndarray, " observations"],
    costs: Float[np.ndarray, " observations"],
    n_cells: int,
    no_match: float | int,
) -> tuple[Float[np.ndarray, " cells"], Float[np.ndarray, " cells"]]:
    is_link = ~np.isnan(costs)
    cell, costs = cell[is_link], costs[is_link]
    count = np.bincount(cell, minlength=n_cells)
    total = np.bincount(cell, weights=costs, minlength=n_cells)
    least = np.full(n_cells, np.inf)
    np.minimum.at(least, cell, costs)
    mean = np.divide(total, count, out=np.full(n_cells, float(no_match)), where=count > 0)
    return mean, np.where(count > 0, least, no_match)


def _summarise_errors(errors: Float[np.ndarray, "N L"]) -> Float[np.ndarray, "N 8"]:
    mean, late = errors.mean(axis=1), errors[:, late_layers(errors.shape[1])].mean(axis=1)
    columns = {
        "mean": mean,
        "std": errors.std(axis=1),
        "max": errors.max(axis=1),
        "min": errors.min(axis=1),
        "final": errors[:, -1],
        "growth": errors[:, -1] - errors[:, 0],
        "argmax_layer": errors.argmax(axis=1),
        "late_ratio": np.divide(late, mean, out=np.ones(len(mean)), where=mean > 0),
    }
    return np.stack([columns[name] for name in SAE_ERROR_SUMMARIES], axis=1)
