"""Print how fast the tracker follows features at the published size, on one core: `launch/bench [DIR] tracker`.

24 layers, 50 latents kept of 5,120, residual width 1,024: GPT-2 medium as published, where a sample took 0.66 s.
Features persist from layer to layer, drift and are replaced, so that tracks live for some layers and the matrices to
assign are as full as real ones. The link graph of the same decoders is made and its time and size are printed, and
`links` looks it up. Memory is that of tracks and metrics, with as many samples as go through the layers together and
with twice as many. Results go to DIR/tracker.json.
"""

import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from jaxsae import artifacts, tracking
from jaxsae.tracking.tracks import TOGETHER

N_LAYERS, N_KEPT, N_LATENTS, D_MODEL = 24, 50, 5120, 1024
PUBLISHED_SECONDS = 0.66  # a sample, khurramkhalil/GhostTrack's own figure for GPT-2 medium
PERSIST = 0.8  # of the latents go on in the next layer; the others are replaced
N_SAMPLES, ROUNDS = 192, 3
N_LINKS = 16  # of a latent, the default of tracking.links_per_latent
CONFIGS = {
    "default": tracking.TrackerConfig(),
    "reference": tracking.TrackerConfig.reference(),
    "null": tracking.TrackerConfig(null="random_pairs"),
    "links": tracking.TrackerConfig(association="links"),
}


def make_decoders(rng: np.random.Generator) -> list[Float[np.ndarray, "F D"]]:
    """Draw decoders whose latent f points about where latent f of the layer before does (cosine 0.9)."""
    decoders = [rng.standard_normal((N_LATENTS, D_MODEL), np.float32)]
    for _ in range(N_LAYERS - 1):
        fresh = rng.standard_normal((N_LATENTS, D_MODEL), np.float32)
        decoders.append((0.9 * decoders[-1] + np.sqrt(1 - 0.9**2) * fresh).astype(np.float32))
    return [decoder / np.linalg.norm(decoder, axis=1, keepdims=True) for decoder in decoders]


def make_features(
    rng: np.random.Generator, n_samples: int
) -> tuple[Int[np.ndarray, "N L K"], Float[np.ndarray, "N L K"]]:
    """Draw latents that persist with probability `PERSIST`; activations are exponential, largest first."""
    ids = np.empty((n_samples, N_LAYERS, N_KEPT), np.int32)
    for sample in range(n_samples):
        kept = rng.choice(N_LATENTS, N_KEPT, replace=False)
        for layer in range(N_LAYERS):
            free = np.setdiff1d(np.arange(N_LATENTS), kept)
            replaced = rng.random(N_KEPT) > PERSIST
            kept[replaced] = rng.choice(free, int(replaced.sum()), replace=False)
            ids[sample, layer] = rng.permutation(kept)
    activations = -np.sort(-rng.exponential(2.0, ids.shape), axis=-1).astype(np.float32)
    return ids, activations


def measure(
    ids: Int[np.ndarray, "N L K"],
    activations: Float[np.ndarray, "N L K"],
    decoders: list[np.ndarray],
    config: tracking.TrackerConfig,
    links: tracking.LinkGraph | None = None,
) -> float:
    """Return the CPU seconds of one sample, tracks and metrics; the least of `ROUNDS`."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        tracking.divergence_metrics(tracking.track(ids, activations, decoders, config, links=links))
        seconds.append(time.process_time() - began)
    return min(seconds) / len(ids)


def working_bytes(
    n_samples: int,
    ids: Int[np.ndarray, "N L K"],
    activations: Float[np.ndarray, "N L K"],
    decoders: list[np.ndarray],
    config: tracking.TrackerConfig,
    links: tracking.LinkGraph | None = None,
) -> int:
    """Return the most that was allocated at a time beyond input and output, with the samples again and again."""
    rows = np.resize(np.arange(len(ids)), n_samples)
    ids, activations = ids[rows], activations[rows]
    tracemalloc.start()
    tracks = tracking.track(ids, activations, decoders, config, links=links)
    metrics = tracking.divergence_metrics(tracks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - metrics.nbytes - sum(array.nbytes for array in tracks.arrays().values())


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench")
    rng = np.random.default_rng(0)
    decoders, (ids, activations) = make_decoders(rng), make_features(rng, N_SAMPLES)
    rows = []
    with threadpool_limits(1):
        began = time.process_time()
        links = tracking.link_by_weights(decoders, N_LINKS)
        graph = {"seconds": time.process_time() - began, "bytes": sum(x.nbytes for x in links.arrays().values())}
        print(f"links: {graph['seconds']:.1f} s on one core, {graph['bytes'] / 2**20:.1f} MiB", flush=True)
        for name, config in CONFIGS.items():
            seconds = measure(ids, activations, decoders, config, links)
            once, twice = (
                working_bytes(n, ids, activations, decoders, config, links) for n in (TOGETHER, 2 * TOGETHER)
            )
            rows.append(
                {
                    "config": name,
                    "ms_per_sample": 1e3 * seconds,
                    "times_published": PUBLISHED_SECONDS / seconds,
                    "working_bytes": twice,
                    "working_bytes_more": twice - once,
                }
            )
            print(
                f"tracker, {name}: {rows[-1]['ms_per_sample']:.2f} ms a sample on one core, "
                f"{rows[-1]['times_published']:.0f} times the published {PUBLISHED_SECONDS} s; working memory "
                f"{once / 2**20:.1f} MiB for {TOGETHER} samples, {twice / 2**20:.1f} MiB for {2 * TOGETHER}",
                flush=True,
            )
    artifacts.write_json(out / "tracker.json", {"samples": N_SAMPLES, "rows": rows, "links": graph})


if __name__ == "__main__":
    main()
