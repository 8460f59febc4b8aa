"""What this machine does a second, measured in a few seconds: products, elementwise work, top-k, the disk."""

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsae import sae
from jaxsae.artifacts import InputError
from jaxsae.models import layers
from jaxsae.pipeline.sizes import Number, Shape


@dataclasses.dataclass(frozen=True)
class Rates:
    """What this machine does a second, on one device.

    Attributes:
        model: operations of a matrix product of the language model's shape, in its dtype.
        sae: operations of the SAEs' batched product, float32.
        moved: bytes read and written by an elementwise program.
        ranked: numbers that `top_k` looks at.
        disk: bytes written durably under the workdir.
        where: the device and the folder, in words.
        seconds: what measuring took.
    """

    model: Number
    sae: Number
    moved: Number
    ranked: Number
    disk: Number
    where: str = ""
    seconds: Number = 0.0


# Share of a bare rate that the stages reach; products stand among other work, and moved bytes miss the caches.
SHARES = {"model": 0.7, "sae": 0.85, "moved": 0.7, "ranked": 0.8, "disk": 0.7}


def measure_rates(shape: Shape, recipe: sae.Recipe, folder: Path) -> Rates:
    """Measure one device and the disk of `folder`; a few seconds.

    Raises:
        InputError: nothing can be written to the folder.
    """
    started = time.monotonic()
    rows = 2048
    product = jax.jit(lambda x, w: layers.einsum("td,dm->tm", x, w, shape.dtype))
    left = jnp.ones((rows, shape.d_model))
    model = _rate(product, left, jnp.ones((shape.d_model, shape.d_mlp), shape.dtype))
    n_stacked = min(4, recipe.n_layers)
    batch = max(64, min(recipe.train.batch, 2**34 // (2 * n_stacked * shape.d_model * recipe.n_latents)))
    stacked = jax.jit(jax.vmap(lambda x, w: layers.einsum("bd,df->bf", x, w, "float32")))
    acts = jnp.ones((n_stacked, batch, shape.d_model))
    sae_rate = _rate(stacked, acts, jnp.ones((n_stacked, shape.d_model, recipe.n_latents)))
    numbers, n_passes = jnp.ones(2**25), 4
    passes = jax.jit(lambda x: jax.lax.fori_loop(0, n_passes, lambda _, x: 0.5 * x + 1, x))
    moved = n_passes * _rate(passes, numbers)
    pre = jax.random.normal(jax.random.key(0), (max(1, 2**22 // recipe.n_latents), recipe.n_latents))
    ranked = _rate(jax.jit(lambda x: jax.lax.top_k(x, min(recipe.sae.k, recipe.n_latents))), pre)
    disk = _disk_rate(folder)
    device = jax.local_devices()[0]
    kind = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else f"one {device.device_kind}"
    return Rates(
        model=2 * rows * shape.d_model * shape.d_mlp * model,
        sae=2 * n_stacked * batch * shape.d_model * recipe.n_latents * sae_rate,
        moved=8 * numbers.size * moved,
        ranked=pre.size * ranked,
        disk=disk,
        where=f"{kind}, disk of {folder}",
        seconds=time.monotonic() - started,
    )


def _rate(function: Callable, *arguments: Float[Array, "..."]) -> Number:
    """Return how often a second the compiled function runs: the best of several, for at most about half a second."""
    jax.block_until_ready(function(*arguments))
    best, until = math.inf, time.monotonic() + 0.4
    while time.monotonic() < until:
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - started)
    return 1 / best


_DISK_PROBE_BYTES = 64 * 2**20


def _disk_rate(folder: Path) -> Number:
    noise = np.random.default_rng(0).bytes(_DISK_PROBE_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            file.write(noise)
            file.flush()
            os.fsync(file.fileno())
            return len(noise) / (time.perf_counter() - started)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}; use another --workdir") from None
