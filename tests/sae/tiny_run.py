"""A source of planted activations, and a training run on it as its own process.

The tests load this file by its path, and run it as `python tiny_run.py DIR key=value ...`, to kill it or to start it
twice. Keys: architecture, n_latents, layer, data, latent (the mesh), total (steps), die ("commit": SIGKILL between
Orbax's commit of the second checkpoint of the process and its manifest), pause (seconds after an evaluation).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

BATCH, EVERY = 16, 4  # rows in a step; steps between two evaluations, and between two checkpoints


class PlantedSource:
    """Rows that are sums of two of some directions, around a mean; another dictionary in each layer."""

    batches_per_epoch = 10
    n_train_tokens = 160

    def __init__(
        self,
        n_layers=3,
        d_model=7,
        *,
        n_directions=11,
        seed=0,
        layers=None,
        batch=BATCH,
        dtype=np.float32,
        n_held_out=40,
    ):
        rng = np.random.default_rng(seed)
        self.layers = layers or slice(0, n_layers)
        self.batch, self.dtype, self.n_held_out = batch, dtype, n_held_out
        directions = rng.normal(size=(n_layers, n_directions, d_model))
        self.directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
        self.mean = rng.normal(size=(n_layers, 1, d_model))

    def rows(self, n, *key):
        """Return n rows of this process's layers, a function of the key alone."""
        rng = np.random.default_rng(key)
        weights = rng.uniform(0.5, 2.0, size=(n, self.directions.shape[1]))
        weights[np.argsort(np.argsort(rng.random(weights.shape), axis=1), axis=1) >= 2] = 0
        return (weights @ self.directions + self.mean)[self.layers].astype(self.dtype)

    def init(self):
        return {"position": 0}

    def next(self, state):
        return {"position": state["position"] + 1}, self.rows(self.batch, 1, state["position"])

    def sample(self, n, *, seed):
        return self.rows(n, 2, seed)

    def held_out_batches(self, batch):
        rows = self.rows(self.n_held_out, 3)
        for start in range(0, self.n_held_out, batch):
            yield rows[:, start : start + batch]


def main(
    directory, *, architecture="batchtopk", n_latents="13", layer="1", data="1", latent="1", total="20", die="",
    pause="0",
):  # fmt: skip
    """Train to the end of the budget and write what `sae.load` then reads to loaded.npz; devices are one a process."""
    from jaxsae import artifacts, sae
    from jaxsae import mesh as meshes
    from jaxsae.config import SaeConfig, TrainConfig
    from jaxsae.progress import MetricsLog
    from jaxsae.sae import checkpoint

    meshes.start_processes()
    import jax

    n_layers, d_model = 3, 7
    mesh = meshes.make_mesh(n_layers, layer=int(layer), data=int(data), latent=int(latent))
    source = PlantedSource(n_layers, d_model, layers=meshes.local_layers(n_layers, mesh))
    config = SaeConfig(
        architecture=architecture, n_latents=int(n_latents), k=2, dead_tokens=2 * BATCH, sparsity_coefficient=0.01
    )
    train = TrainConfig(
        batch=BATCH, n_tokens=int(total) * BATCH, lr=0.02, warmup_steps=2, clip_norm=0.5, evaluate_every=EVERY,
        evaluate_tokens=128, checkpoint_every=EVERY,
    )  # fmt: skip
    recipe = sae.make_recipe(config, train, n_layers=n_layers, d_model=d_model, batches_per_epoch=10)
    main_process = jax.process_index() == 0
    saes = Path(directory) / "saes"
    if main_process and not (saes / "suite.json").exists():
        artifacts.write_json(
            saes / "suite.json",
            {
                "architecture": architecture,
                "k": 2,
                "n_layers": n_layers,
                "d_model": d_model,
                "n_latents": int(n_latents),
            },
        )
    if die == "commit":
        _kill_before_manifest(checkpoint)
    trainer = sae.Trainer(source, recipe, sae.Checkpoints(saes), mesh=mesh, seed=5)
    history = MetricsLog(Path(directory), resume_step=trainer.step, process_index=jax.process_index())

    def on_evaluation(step, numbers):
        history.write(step, {f"{name}/{i}": float(x) for name, row in numbers.items() for i, x in enumerate(row)})
        time.sleep(float(pause))

    trainer.run(on_step=lambda step, note: None, on_evaluation=on_evaluation, should_stop=lambda: False)
    _, best = trainer.measure_best()
    gathered = meshes.gather_layers(source.rows(3, 4), source.layers, n_layers)
    facts = {
        "best": {name: x.tolist() for name, x in best.items()},
        "layers": [source.layers.start, source.layers.stop],
        "gathered": gathered.tolist(),
        "fetched": meshes.fetch(trainer.state.since_fired).tolist(),
    }
    (Path(directory) / f"facts_{jax.process_index()}.json").write_text(json.dumps(facts))
    trainer.checkpoints.close()


def _kill_before_manifest(checkpoint):
    saves = iter(range(100))
    vouch = checkpoint.Checkpoints._vouch

    def vouch_or_die(self, step):
        if next(saves) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        vouch(self, step)

    checkpoint.Checkpoints._vouch = vouch_or_die


if __name__ == "__main__":
    main(sys.argv[1], **dict(pair.split("=", 1) for pair in sys.argv[2:]))
