"""Measure a training step of SAEs against sparsify and SAELens: `launch/bench [DIR]`, or this file with DIR [CASE ...].

TopK with k 32, Adam, batches of 2,048 rows in memory, float32, on the same number of threads. Each library runs its own
trainer's loop at its own defaults; no latent has had the time to die, so no auxiliary loss is at work. jaxsae
trains a suite in one program, the peers loop over SAEs. The libraries take turns within one run, a figure is the median
of its turns. Nothing else should run meanwhile: the peers' threads wait spinning, and company costs them up to twice
their time (the load of the minute before is printed). Where it cannot be avoided, OMP_WAIT_POLICY=passive is fairer.

Beside it, measured in the same run: the time of the encoders' matrix products alone (the faster of XLA's and PyTorch's)
as a share of the step. And what was learnt, by one function for all: active latents of a row, FVU on the rows before
and after. Prints one table and writes sae_step.json into DIR. A suite of 24 layers takes about 16 GB.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import peers
import torch
from jaxtyping import Float
from scores import Weights, score
from turns import N_TURNS, Seconds, take_turns

from jaxsae import __version__, sae
from jaxsae import mesh as meshes
from jaxsae.config import SaeConfig, TrainConfig
from jaxsae.sae import step as sae_step

BATCH, K = 2048, 32
CASES = {  # layers, D, F
    "d768-f6144": (1, 768, 6144),
    "d768-f24576": (1, 768, 24_576),
    "d1024-f5120": (1, 1024, 5120),
    "d1024-f32768": (1, 1024, 32_768),
    "12 x d768-f6144": (12, 768, 6144),
    "24 x d1024-f5120": (24, 1024, 5120),
}


class Contender(Protocol):
    """A library's trainer."""

    def advance(self, n_steps: int) -> None: ...
    def weights(self) -> Iterator[Weights]: ...


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        seconds: of one step of all layers: median and quartiles.
        ratio: how many times as long as jaxsae's.
        share: of the step, that the encoders' matrix products alone take.
        l0: active latents of a row after training.
        fvu_before, fvu_after: of the first layer on rows it was trained on.
    """

    case: str
    library: str
    seconds: Seconds
    ratio: float
    share: float
    l0: float
    fvu_before: float
    fvu_after: float


class Jaxsae:
    """The compiled step of jaxsae at its defaults, on batches that come from host memory."""

    def __init__(self, task: peers.Task) -> None:
        n_layers, _, d_model = task.acts.shape
        self._task, self._step, self._layers = task, 0, slice(0, n_layers)
        self._recipe = sae.make_recipe(
            SaeConfig(architecture=task.architecture, n_latents=task.n_latents, k=task.k),
            TrainConfig(batch=task.order.shape[1], n_tokens=10**9, optimizer="adam", warmup_steps=0),
            n_layers=n_layers,
            d_model=d_model,
            batches_per_epoch=len(task.order),
        )
        self._mesh = meshes.make_mesh(n_layers)
        fresh = sae_step.init_state(self._recipe, task.acts[:, :BATCH], task.seed)
        self._state = meshes.put_layers(fresh, self._mesh)
        self._take_step = sae_step.make_step(self._recipe, self._mesh)

    def advance(self, n_steps: int) -> None:
        """Take the next steps and wait for the last."""
        for rows in self._task.order[self._step : self._step + n_steps]:
            batch = meshes.put_batch(self._task.acts[:, rows], self._layers, len(self._task.acts), self._mesh)
            self._state, _ = self._take_step(self._state, batch, np.int32(self._step))
            self._step += 1
        jax.block_until_ready(self._state)

    def weights(self) -> Iterator[Weights]:
        """Yield each layer's SAE."""
        suite = sae_step.suite_of(sae_step.weights_of(self._state, self._recipe, self._step), self._recipe)
        arrays = (np.asarray(x) for x in (suite.W_enc, suite.b_enc, suite.W_dec, suite.b_dec))
        yield from (Weights(*layer, None) for layer in zip(*arrays, strict=True))


def contenders(task: peers.Task) -> dict[str, Contender]:
    """Return the libraries, jaxsae first.

    One SAE is also trained with SAELens' sparse activations, which it leaves off; a suite of 24 would not fit memory
    four times.
    """
    libraries: dict[str, Contender] = {
        "jaxsae": Jaxsae(task),
        "sparsify": peers.Sparsify(task, optimizer="adam"),
        "sae-lens": peers.SaeLens(task),
    }
    return libraries if len(task.acts) > 1 else libraries | {"sae-lens sparse": peers.SaeLens(task, is_sparse=True)}


def make_rows(n_layers: int, n_rows: int, d_model: int) -> Float[np.ndarray, "L N D"]:
    """Return rows that a sparse code explains well: eight of 4 D directions each, a mean row, a little noise."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((4 * d_model, d_model), np.float32) / d_model**0.5
    rows = 0.02 * rng.standard_normal((n_layers, n_rows, d_model), np.float32) + 0.1
    for layer in rows:
        for ids in rng.integers(0, len(directions), (8, n_rows)):
            layer += rng.exponential(size=(n_rows, 1)).astype(np.float32) * directions[ids]
    return rows


def encoder_products(task: peers.Task) -> dict[str, Callable[[], object]]:
    """Return the encoder's matrix product on one batch of one layer, by XLA and by PyTorch."""
    rows, matrix = task.acts[0, :BATCH], np.ones((task.acts.shape[-1], task.n_latents), np.float32)
    product = jax.jit(lambda left, right: jnp.matmul(left, right, precision="highest"))
    ours, theirs = (jnp.asarray(rows), jnp.asarray(matrix)), (torch.from_numpy(rows), torch.from_numpy(matrix))
    return {"xla": lambda: product(*ours).block_until_ready(), "torch": lambda: torch.matmul(*theirs)}


def bench(case: str, n_turns: int) -> Iterator[Row]:
    n_layers, d_model, n_latents = CASES[case]
    per_turn = max(1, CASES["d768-f6144"][1] * CASES["d768-f6144"][2] * 2 // (n_layers * d_model * n_latents))
    acts = make_rows(n_layers, 2 * BATCH, d_model)
    order = np.resize(np.arange(2 * BATCH), ((n_turns + 1) * per_turn, BATCH))
    task = peers.Task(acts, order, "topk", n_latents, K, seed=0)
    libraries = contenders(task)
    before = {name: score(next(library.weights()), acts[0], K) for name, library in libraries.items()}
    steps = {name: lambda library=library: library.advance(per_turn) for name, library in libraries.items()}
    seconds = take_turns(n_turns, **steps, **encoder_products(task))
    limit = n_layers * min(seconds.pop("xla").median, seconds.pop("torch").median)
    for name, turns in seconds.items():
        each = Seconds(turns.median / per_turn, turns.low / per_turn, turns.high / per_turn)
        after = score(next(libraries[name].weights()), acts[0], K)
        ratio = turns.median / seconds["jaxsae"].median
        yield Row(case, name, each, ratio, limit / each.median, after.l0, before[name].fvu, after.fvu)


def main(dir: Path, cases: list[str], n_turns: int) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(
        f"ms a step of {BATCH} rows, TopK, k {K}, Adam, float32, CPU, {torch.get_num_threads()} threads; "
        f"load {os.getloadavg()[0]:.1f}; jaxsae {__version__}, jax {jax.__version__}, {peers.versions()}"
    )
    print(f"{'case':18}{'library':17}{'ms':>8}{'quartiles':>16}{'ratio':>7}{'products':>10}{'L0':>6}  FVU")
    dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases:
        for row in bench(case, n_turns):
            low, median, high = (1e3 * each for each in (row.seconds.low, row.seconds.median, row.seconds.high))
            quartiles, fvu = f"{low:.0f} to {high:.0f}", f"{row.fvu_before:.3f} to {row.fvu_after:.3f}"
            figures = f"{median:8.0f}{quartiles:>16}{row.ratio:7.2f}{row.share:10.0%}{row.l0:6.1f}"
            print(f"{row.case:18}{row.library:17}{figures}  {fvu}", flush=True)
            rows.append(dataclasses.asdict(row))
        content = {"versions": peers.versions(), "rows": rows}
        (dir / "sae_step.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="training steps of SAEs, jaxsae beside its peers")
    parser.add_argument("dir", type=Path, help="where sae_step.json goes")
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--turns", type=int, default=N_TURNS, help="turns of each library that count")
    arguments = parser.parse_args()
    main(arguments.dir, arguments.cases, arguments.turns)
