"""A deterministic language model of three layers, and a script that extracts its residual streams.

The tests load this file by its path and run it as `python tiny_lm.py DIR key=value ...`.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

N_LAYERS, D_MODEL, VOCABULARY, BOS = 3, 8, 31, 30


class TinyLM:
    """Blocks x + tanh(mean of the tokens so far @ W), from seeded weights; `shapes` records what it was asked."""

    name, fingerprint = "tiny", "tiny-weights-1"
    n_layers, d_model, n_positions = N_LAYERS, D_MODEL, 64

    def __init__(self, delay: float = 0.0):
        rng = np.random.default_rng(7)
        self.embedding = jnp.asarray(rng.normal(size=(VOCABULARY, D_MODEL)), jnp.float32)
        self.weights = jnp.asarray(rng.normal(size=(N_LAYERS, D_MODEL, D_MODEL)), jnp.float32)
        self.delay, self.shapes = delay, []

    def residuals(self, token_ids):
        self.shapes.append(token_ids.shape)
        time.sleep(self.delay)
        return _forward(self.embedding, self.weights, jnp.asarray(token_ids))


@jax.jit
def _forward(embedding, weights, token_ids):
    x = embedding[token_ids]
    count = jnp.arange(1, token_ids.shape[1] + 1)[:, None]
    residuals = []
    for weight in weights:
        x = x + jnp.tanh(jnp.cumsum(x, axis=1) / count @ weight)
        residuals.append(x)
    return jnp.stack(residuals)


def contexts(n: int, context: int) -> np.ndarray:
    """Return contexts that begin with BOS and hold it elsewhere now and then."""
    ids = np.random.default_rng(3).integers(0, VOCABULARY, size=(n, context)).astype(np.int32)
    ids[:, 0] = BOS
    return ids


if __name__ == "__main__":
    from jaxsae.activations import extract

    options = dict(argument.split("=") for argument in sys.argv[2:])
    extract(
        TinyLM(float(options.get("delay", 0))),
        contexts(int(options["n"]), int(options["context"])),
        sys.argv[1],
        bos_id=BOS,
        corpus_fingerprint="corpus-1",
        batch=int(options["batch"]),
        process_index=int(options.get("index", 0)),
        process_count=int(options.get("count", 1)),
        wait_seconds=30,
    )
