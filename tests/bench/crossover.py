"""From how many latents on a training step by kept latents is faster than a dense one: python tests/bench/crossover.py

One SAE, D 768, k 32, 2,048 rows, on the CPU; the forms take turns within one run, and a figure is the median of the
turns after the first twenty steps, in which the kept latents spread over the rows. `Architecture.sparse_from` is read
off it.
"""

import functools
import os

os.environ["OMP_WAIT_POLICY"] = "passive"

import jax
import numpy as np
from turns import take_turns

from jaxsae import mesh as meshes
from jaxsae import sae
from jaxsae.config import SaeConfig, TrainConfig
from jaxsae.sae import step as steps
from jaxsae.sae.architectures import ARCHITECTURES

BATCH, D, K = 2048, 768, 32
WIDTHS = (512, 1024, 2048, 3072, 6144)
N_BEFORE = 20


class Training:
    """An SAE in training on the same rows again and again."""

    def __init__(self, rows: np.ndarray, architecture: str, n_latents: int, compute: str) -> None:
        recipe = sae.make_recipe(
            SaeConfig(architecture=architecture, n_latents=n_latents, k=K, compute=compute),
            TrainConfig(batch=BATCH, n_tokens=10**9, lr=1e-3, warmup_steps=0),
            n_layers=1,
            d_model=D,
            batches_per_epoch=1000,
        )
        mesh = meshes.make_mesh(1)
        self._acts = meshes.put_batch(rows, slice(0, 1), 1, mesh)
        self._state = meshes.put_layers(steps.init_state(recipe, rows, 0), mesh)
        self._take_step, self._step = steps.make_step(recipe, mesh), 0

    def advance(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self._state, _ = self._take_step(self._state, self._acts, np.int32(self._step))
            self._step += 1
        jax.block_until_ready(self._state)


def make_rows() -> np.ndarray:
    """Return rows of some 20 of 3 D directions each."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((3 * D, D), np.float32)
    weights = rng.exponential(size=(BATCH, 3 * D)) * (rng.random((BATCH, 3 * D)) < 20 / (3 * D))
    return (weights @ directions)[None].astype(np.float32)


def main() -> None:
    rows = make_rows()
    print(f"{'architecture':14}{'F':>7}{'F / k':>7}{'dense ms':>10}{'sparse ms':>11}")
    for name in (name for name, architecture in ARCHITECTURES.items() if architecture.codes is not None):
        for n_latents in WIDTHS:
            trainings = {form: Training(rows, name, n_latents, form) for form in ("dense", "sparse")}
            for training in trainings.values():
                training.advance(N_BEFORE)
            turns = take_turns(**{form: functools.partial(training.advance, 1) for form, training in trainings.items()})
            dense, sparse = (1e3 * turns[form].median for form in ("dense", "sparse"))
            print(f"{name:14}{n_latents:7}{n_latents / K:7.0f}{dense:10.0f}{sparse:11.0f}", flush=True)


if __name__ == "__main__":
    main()
