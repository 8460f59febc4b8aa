"""Is it right on an accelerator, and how fast: `launch/gpu-check [DIR]`, or this file with DIR; ten minutes at most.

1. Parity: a few training steps of every architecture, dense and by codes, on the accelerator and on the CPU.
2. Speed: a step's tokens/s, as a share of the measured peak of bfloat16 products (in operations of the dense form),
   dense and by codes; from it, the time of the published run's job (10 M tokens, 20 epochs, 24 SAEs of D 1,024 and
   F 5,120), with the language model's forward passes.
3. A profile of some steps in DIR/profile, for TensorBoard or Perfetto.

Prints one table last and writes gpu_check.json into DIR. With --small, sizes at which a CPU takes a minute: that the
script runs can be seen anywhere, its figures then say nothing.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from turns import take_turns

from jaxsae import mesh as meshes
from jaxsae import sae
from jaxsae.config import SaeConfig, TrainConfig
from jaxsae.models import decoder, families
from jaxsae.sae import step as steps
from jaxsae.sae.architectures import ARCHITECTURES

TOLERANCE = 2e-4  # of the largest number: products in float32 are sums in another order
REFERENCE_TOKENS = 200_000_000  # 10 M tokens, 20 epochs


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: layers, D, F and k of a suite; batches; rows of a square product; a language model's input."""

    n_layers: int = 24
    d_model: int = 1024
    n_latents: tuple[int, ...] = (5120, 32_768)
    k: int = 32
    batches: tuple[int, ...] = (128, 4096, 16_384)
    square: int = 8192
    context: int = 1024
    rows: int = 16


SMALL = Sizes(n_layers=2, d_model=64, n_latents=(128, 512), k=4, batches=(32, 128), square=512, context=32, rows=2)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table."""

    what: str
    figure: str
    is_right: bool = True


class Training:
    """A suite in training on one device, and one batch there."""

    def __init__(
        self, device: jax.Device, sizes: Sizes, batch: int, *, dtype: str = "float32", **settings: Any
    ) -> None:
        train = TrainConfig(batch=batch, n_tokens=1000 * batch, dtype=dtype, warmup_steps=0)
        self.recipe = sae.make_recipe(
            SaeConfig(k=sizes.k, **settings),
            train,
            n_layers=sizes.n_layers,
            d_model=sizes.d_model,
            batches_per_epoch=1000,
        )
        axes = (meshes.LAYER, meshes.DATA, meshes.LATENT)
        mesh = Mesh(np.array([device]).reshape(1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((sizes.n_layers, max(batch, 512), sizes.d_model), np.float32) + 0.3
        self.state = meshes.put_layers(steps.init_state(self.recipe, rows, 0), mesh)
        self.acts = meshes.put_batch(rows[:, :batch], slice(0, sizes.n_layers), sizes.n_layers, mesh)
        self.take_step, self.step = steps.make_step(self.recipe, mesh), 0

    def advance(self, n_steps: int) -> None:
        """Take steps and wait for the last."""
        for _ in range(n_steps):
            self.state, metrics = self.take_step(self.state, self.acts, np.int32(self.step))
            self.step += 1
        jax.block_until_ready(metrics)

    def weights(self) -> dict[str, np.ndarray]:
        """Return the suite's arrays on the host."""
        return jax.device_get(steps.weights_of(self.state, self.recipe, self.step))


def parity(architecture: str, compute: str) -> Line:
    """Compare the weights after five steps with the CPU's."""
    ended = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        training = Training(device, SMALL, 64, architecture=architecture, n_latents=256, compute=compute)
        training.advance(5)
        ended.append(training.weights())
    worst = max(float(np.abs(x - ended[1][name]).max() / max(np.abs(x).max(), 1.0)) for name, x in ended[0].items())
    return Line(f"parity, {architecture} {compute}", f"{worst:.1e} (bound {TOLERANCE:.0e})", worst <= TOLERANCE)


def peak(sizes: Sizes) -> float:
    """Return the operations a second of a square product of bfloat16, summed in float32."""
    square = jnp.ones((sizes.square, sizes.square), jnp.bfloat16)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    seconds = take_turns(product=lambda: jax.block_until_ready([product(square) for _ in range(10)]))
    return 10 * 2 * sizes.square**3 / seconds["product"].median


def speeds(sizes: Sizes, peak_rate: float) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Time steps at every width and batch, dense and by codes in turns."""
    for n_latents in sizes.n_latents:
        for batch in sizes.batches:
            trainings = {
                compute: Training(
                    jax.devices()[0],
                    sizes,
                    batch,
                    dtype="bfloat16",
                    architecture="topk",
                    n_latents=n_latents,
                    compute=compute,
                )
                for compute in ("dense", "sparse")
            }
            n_steps = max(1, sizes.batches[-1] // batch)
            tasks = {name: functools.partial(training.advance, n_steps) for name, training in trainings.items()}
            for name, seconds in take_turns(**tasks).items():
                rate = n_steps * batch / seconds.median
                share = rate * 10 * sizes.n_layers * sizes.d_model * n_latents / peak_rate
                what = f"F {n_latents:,}, batch {batch:,}, {name}"
                hours = f"{REFERENCE_TOKENS / rate / 60:.1f} min for 200 M tokens"
                line = Line(what, f"{rate:,.0f} tokens/s of {sizes.n_layers} SAEs, {share:.0%} of peak; {hours}")
                yield (
                    line,
                    {
                        "n_latents": n_latents,
                        "batch": batch,
                        "compute": name,
                        "tokens_per_second": rate,
                        "share": share,
                    },
                )


def forward(sizes: Sizes) -> tuple[Line, float]:
    """Time the residual streams of a GPT-2 of the suite's depth and width, bfloat16."""
    shape = {"n_layer": sizes.n_layers, "n_embd": sizes.d_model, "n_head": sizes.d_model // 64}
    config = families.of("gpt2").read_config({"model_type": "gpt2", **shape})
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder.init(config, jax.random.key(0)))
    token_ids = np.random.default_rng(0).integers(0, config.n_vocab, (sizes.rows, sizes.context))
    residuals = jax.jit(lambda params, ids: decoder.residuals(config, params, ids, dtype="bfloat16"))
    seconds = take_turns(residuals=lambda: jax.block_until_ready(residuals(params, token_ids)))
    rate = token_ids.size / seconds["residuals"].median
    return Line("language model, residuals of all layers", f"{rate:,.0f} tokens/s"), rate


def profile(sizes: Sizes, folder: Path) -> Line:
    """Record three steps at the largest batch."""
    training = Training(
        jax.devices()[0],
        sizes,
        sizes.batches[-1],
        dtype="bfloat16",
        architecture="batchtopk",
        n_latents=sizes.n_latents[0],
    )
    training.advance(1)
    with jax.profiler.trace(str(folder)):
        training.advance(3)
    return Line("profile", str(folder))


def main(dir: Path, sizes: Sizes) -> int:
    dir.mkdir(parents=True, exist_ok=True)
    lines = [Line("device", f"{jax.devices()[0].device_kind}, jax {jax.__version__}")]
    for name, architecture in ARCHITECTURES.items():
        computes = ("dense", "sparse") if architecture.codes is not None else ("dense",)
        lines += [parity(name, compute) for compute in computes]
    peak_rate = peak(sizes)
    lines.append(Line("peak, bfloat16 products", f"{peak_rate / 1e12:,.1f} TFLOP/s"))
    measured = list(speeds(sizes, peak_rate))
    line, model_rate = forward(sizes)
    lines += [line for line, _ in measured] + [line]
    large = [row for _, row in measured if row["n_latents"] == sizes.n_latents[0] and row["batch"] >= sizes.batches[1]]
    fastest = max(large, key=lambda row: row["tokens_per_second"])
    minutes = REFERENCE_TOKENS * (1 / fastest["tokens_per_second"] + 1 / model_rate) / 60
    lines.append(Line("the published job, with forward passes", f"{minutes:.1f} min at batch {fastest['batch']:,}"))
    lines.append(profile(sizes, dir / "profile"))
    width = max(len(line.what) for line in lines)
    for line in lines:
        print(f"{line.what:{width}}  {line.figure}{'' if line.is_right else '  WRONG'}")
    rows = {"lines": [dataclasses.asdict(line) for line in lines], "speeds": [row for _, row in measured]}
    (dir / "gpu_check.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(line.is_right for line in lines) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="parity, speed and a profile on the accelerator that is here")
    parser.add_argument("dir", type=Path, nargs="?", default=Path("runs/gpu-check"), help="where the results go")
    parser.add_argument("--small", action="store_true", help="sizes at which a CPU shows that the script runs")
    arguments = parser.parse_args()
    sys.exit(main(arguments.dir, SMALL if arguments.small else Sizes()))
