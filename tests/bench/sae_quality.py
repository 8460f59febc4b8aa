"""Compare SAEs of jaxsae, SAELens and sparsify on the same activations: `launch/bench [DIR]`, or this file.

    jaxsae extract --config=configs/demo.py --workdir=runs/bench/demo
    .venv/bin/python tests/bench/sae_quality.py runs/bench/demo/activations runs/bench/sae_quality_demo.json \
        --layers 0 2 5 --n-latents 512 --k 8 --n-tokens 300000

Every library trains the same F and k on the same rows in the same order through its own trainer, in two ways.
"defaults": with its own settings. "best lr": with the learning rate of one shared grid that does best on validation
rows for the first seed (mean over layers of log FVU), where all have the same warm-up, decay and window for dead
latents, and normalise the input if they can. One NumPy function scores all on test rows at the same L0 (`scores.py`).

A difference is the ratio of jaxsae's FVU to a peer's in the same way, for the same layer and seed: its geometric mean
over layers and seeds, with a 95 % t-interval over the seeds; the layers are these.

Prints a line for each run and two tables, and writes the JSON file, anew after each run. The rows take 4 L N D bytes.
"""

import argparse
import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_WAIT_POLICY"] = (
    "passive"  # nothing is timed here, and on busy cores spinning threads take ten times as long
)

import jax
import numpy as np
import peers
import scipy.stats
import torch
from absl import logging
from jaxtyping import Float, Int
from scores import Weights, dead_share, score

from jaxsae import __version__, activations, artifacts, sae
from jaxsae import mesh as meshes
from jaxsae.activations.source import dropped_rows
from jaxsae.config import SaeConfig, TrainConfig

LRS = (1e-3, 2.3e-3, 5.5e-3, 1.3e-2, 3e-2)  # a few hundred steps need more than Adam's usual 1e-4; Signum's own: 3e-2
HELD_OUT = 0.05  # share of the contexts kept for validation, and again for the test
DEAD_ROWS = 65_536  # a latent that fires on none of so many training rows and the test rows is dead
DEFAULTS, BEST_LR = "defaults", "best lr"

Train = Callable[[peers.Task], list[Weights]]
Done = dict[tuple[str, int], float | None]  # learning rate by way and seed


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of the chosen layers; contexts are not split between the parts."""

    train: Float[np.ndarray, "L N D"]
    validation: Float[np.ndarray, "L N D"]
    test: Float[np.ndarray, "L N D"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One layer's SAE: how it was trained (`lr` None: the library's default), and its quality on the test rows.

    Attributes:
        fvu, l0, own_l0: as in `scores.Score`.
        dead: share of latents that fire on none of DEAD_ROWS training rows and the test rows.
    """

    architecture: str
    library: str
    way: str
    lr: float | None
    seed: int
    layer: int
    fvu: float
    l0: float
    own_l0: float
    dead: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """FVU of jaxsae over a peer's, with its 95 % interval over the seeds, and each layer's geometric mean."""

    architecture: str
    way: str
    peer: str
    ratio: float
    low: float
    high: float
    of_layers: dict[int, float]


class RowSource:
    """Rows in memory, in a given order, as jaxsae's trainer reads a store."""

    def __init__(self, task: peers.Task, validation: Float[np.ndarray, "L N D"]) -> None:
        self._task, self._validation = task, validation
        self.batches_per_epoch, self.n_train_tokens = len(task.order), task.acts.shape[1]

    def init(self) -> dict[str, int]:
        return {"step": 0}

    def next(self, state: dict[str, int]) -> tuple[dict[str, int], Float[np.ndarray, "L B D"]]:
        return {"step": state["step"] + 1}, self._task.acts[:, self._task.order[state["step"]]]

    def sample(self, n: int, *, seed: int) -> Float[np.ndarray, "L n D"]:
        return self._task.acts[:, np.random.default_rng(seed).permutation(self.n_train_tokens)[:n]]

    def held_out_batches(self, batch: int) -> Iterator[Float[np.ndarray, "L _ D"]]:
        for start in range(0, self._validation.shape[1], batch):
            yield self._validation[:, start : start + batch]


def train_jaxsae(task: peers.Task, validation: Float[np.ndarray, "L N D"]) -> list[Weights]:
    """Train with jaxsae's trainer; it evaluates once, at the end, so that what it saves are the last weights."""
    steps, batch = task.order.shape
    train = TrainConfig(batch=batch, n_tokens=steps * batch, evaluate_every=steps, checkpoint_every=steps)
    config = SaeConfig(architecture=task.architecture, n_latents=task.n_latents, k=task.k)
    if task.shared is not None:
        train = dataclasses.replace(train, lr=task.shared.lr, warmup_steps=task.shared.warmup_steps)
        config = dataclasses.replace(config, dead_tokens=task.shared.dead_tokens)
    source, n_layers = RowSource(task, validation), len(task.acts)
    sizes = {"n_layers": n_layers, "d_model": task.acts.shape[-1]}
    recipe = sae.make_recipe(config, train, batches_per_epoch=source.batches_per_epoch, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        about = {"architecture": task.architecture, "k": task.k} | sizes
        artifacts.write_json(Path(folder) / "suite.json", about)
        checkpoints = sae.Checkpoints(folder)
        trainer = sae.Trainer(source, recipe, checkpoints, mesh=meshes.make_mesh(n_layers), seed=task.seed)
        trainer.run(on_step=lambda *_: None, on_evaluation=lambda *_: None, should_stop=lambda: False)
        checkpoints.close()
        suite = sae.load(folder)
    thresholds = suite.threshold if task.architecture == "batchtopk" else [None] * n_layers
    arrays = suite.W_enc, suite.b_enc, suite.W_dec, suite.b_dec, thresholds
    return [Weights(*layer) for layer in zip(*arrays, strict=True)]


def train_peer(peer: peers.SaeLens | peers.Sparsify, task: peers.Task) -> list[Weights]:
    """Train a peer to the end of the task."""
    peer.advance(len(task.order))
    return list(peer.weights())


def contenders(architecture: str, validation: Float[np.ndarray, "L N D"]) -> dict[str, Train]:
    """Return the libraries that have the architecture, jaxsae first."""
    libraries: dict[str, Train] = {
        "jaxsae": lambda task: train_jaxsae(task, validation),
        "sae-lens": lambda task: train_peer(peers.SaeLens(task), task),
    }
    if architecture == "topk":
        libraries["sparsify signum"] = lambda task: train_peer(peers.Sparsify(task, optimizer="signum"), task)
        libraries["sparsify adam"] = lambda task: train_peer(peers.Sparsify(task, optimizer="adam"), task)
    return libraries


def read_rows(store_dir: Path, layers: list[int], n_tokens: int) -> Rows:
    """Read rows that jaxsae would train on: `n_tokens` of them or all, and those of the last contexts."""
    store = activations.open(store_dir)
    meta = store.meta
    kept = ~dropped_rows(store.token_ids, meta.context, bos_id=meta.bos_id)
    held_out = round(HELD_OUT * meta.n_tokens / meta.context) * meta.context
    ends = [0, meta.n_tokens - 2 * held_out, meta.n_tokens - held_out, meta.n_tokens]

    def read(start: int, stop: int) -> Float[np.ndarray, "L N D"]:
        rows = [store.read(slice(layer, layer + 1), start, stop)[0, kept[start:stop]] for layer in layers]
        return np.stack([of_layer[:n_tokens].astype(np.float32) for of_layer in rows])

    return Rows(*itertools.starmap(read, itertools.pairwise(ends)))


def make_order(n_rows: int, n_tokens: int, batch: int, seed: int) -> Int[np.ndarray, "S B"]:
    """Return each step's rows: as many passes over the rows as the tokens need, each in an order of its own."""
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(n_rows) for _ in range(-(-n_tokens // n_rows))]
    n_steps = n_tokens // batch
    return np.concatenate(passes)[: n_steps * batch].reshape(n_steps, batch)


def make_task(rows: Rows, given: argparse.Namespace, architecture: str, seed: int, lr: float | None) -> peers.Task:
    """Return what is to be trained; without a learning rate, at each library's defaults."""
    order = make_order(rows.train.shape[1], given.n_tokens, given.batch, seed)
    steps, shared = len(order), None
    if lr is not None:  # the warm-up, decay and window are those that jaxsae takes in a short run
        shared = peers.Shared(lr, min(1000, steps // 10), steps // 5, max(1, steps // 20) * given.batch)
    return peers.Task(rows.train, order, architecture, given.n_latents, given.k, seed, shared)


def compare(rows: Rows, given: argparse.Namespace, kept: list[Outcome]) -> Iterator[list[Outcome]]:
    """Train and score everything that is not among `kept`; yield the layers' outcomes of each run."""
    for architecture in given.architectures:
        for library, train in contenders(architecture, rows.validation).items():
            own = [one for one in kept if (one.architecture, one.library) == (architecture, library)]
            done = {(one.way, one.seed): one.lr for one in own}
            for way, task, saes in itertools.chain(
                at_defaults(train, rows, given, architecture, done), at_best_lr(train, rows, given, architecture, done)
            ):
                yield list(measure(library, way, task, saes, rows, given))


def at_defaults(
    train: Train, rows: Rows, given: argparse.Namespace, architecture: str, done: Done
) -> Iterator[tuple[str, peers.Task, list[Weights]]]:
    """Yield the SAEs of each seed that is not done."""
    for seed in range(given.seeds):
        if (DEFAULTS, seed) not in done:
            task = make_task(rows, given, architecture, seed, None)
            yield DEFAULTS, task, train(task)


def at_best_lr(
    train: Train, rows: Rows, given: argparse.Namespace, architecture: str, done: Done
) -> Iterator[tuple[str, peers.Task, list[Weights]]]:
    """Yield the SAEs of each seed that is not done, at the learning rate that is best for the first."""
    known = [lr for (way, _), lr in done.items() if way == BEST_LR and lr is not None]
    first = {} if known else {lr: train(make_task(rows, given, architecture, 0, lr)) for lr in given.lrs}

    def validation_loss(lr: float) -> float:
        fvus = [score(one, held_out, given.k).fvu for one, held_out in zip(first[lr], rows.validation, strict=True)]
        return float(np.mean(np.log(fvus)))

    best = known[0] if known else min(first, key=validation_loss)
    for seed in range(given.seeds):
        if (BEST_LR, seed) not in done:
            task = make_task(rows, given, architecture, seed, best)
            yield BEST_LR, task, train(task) if seed else first[best]


def measure(
    library: str, way: str, task: peers.Task, saes: list[Weights], rows: Rows, given: argparse.Namespace
) -> Iterator[Outcome]:
    """Yield each layer's outcome."""
    lr = None if task.shared is None else task.shared.lr
    for layer, one, test, train in zip(given.layers, saes, rows.test, rows.train, strict=True):
        dead = dead_share(one, np.concatenate([test, train[:DEAD_ROWS]]), task.k)
        quality = dataclasses.asdict(score(one, test, task.k))
        yield Outcome(task.architecture, library, way, lr, task.seed, layer, dead=dead, **quality)


def differences(outcomes: list[Outcome], given: argparse.Namespace) -> Iterator[Difference]:
    """Yield jaxsae beside each peer, in each way."""
    fvus = {(one.architecture, one.library, one.way, one.seed, one.layer): one.fvu for one in outcomes}
    compared = {
        (one.architecture, one.way, one.library): None
        for one in outcomes
        if one.library != "jaxsae" and one.architecture in given.architectures
    }
    for architecture, way, peer in compared:
        ratios = [
            [
                fvus[architecture, "jaxsae", way, seed, layer] / fvus[architecture, peer, way, seed, layer]
                for layer in given.layers
            ]
            for seed in range(given.seeds)
        ]
        log_ratios = np.log(ratios)
        low, middle, high = np.exp(_interval(log_ratios.mean(axis=1))).tolist()
        of_layers = dict(zip(given.layers, np.exp(log_ratios.mean(axis=0)).tolist(), strict=True))
        yield Difference(architecture, way, peer, middle, low, high, of_layers)


def _interval(of_seeds: Float[np.ndarray, " S"]) -> Float[np.ndarray, "3"]:
    """Return the mean between the ends of its 95 % t-interval."""
    n_seeds = len(of_seeds)
    half = scipy.stats.t.ppf(0.975, n_seeds - 1) * of_seeds.std(ddof=1) / n_seeds**0.5
    return of_seeds.mean() + half * np.array([-1, 0, 1])


def print_outcomes(outcomes: list[Outcome], given: argparse.Namespace) -> None:
    heads = "".join(f"{f'layer {layer}':>10}" for layer in given.layers)
    print(f"\n{'test FVU':10}{'way':10}{'library':17}{'lr':>8}{heads}{'L0':>8}{'own L0':>9}{'dead':>7}")
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.architecture, outcome.way, outcome.library), []).append(outcome)
    for (architecture, way, library), runs in sorted(groups.items()):
        fvus = "".join(f"{np.mean([one.fvu for one in runs if one.layer == layer]):10.4f}" for layer in given.layers)
        l0, own_l0, dead = (np.mean([getattr(one, name) for one in runs]) for name in ("l0", "own_l0", "dead"))
        lr = "its own" if runs[0].lr is None else f"{runs[0].lr:g}{'!' if _is_at_edge(runs[0].lr, given) else ''}"
        print(f"{architecture:10}{way:10}{library:17}{lr:>8}{fvus}{l0:8.2f}{own_l0:9.2f}{dead:7.1%}")
    print("!: at an end of the grid, a better one may lie beyond")


def _is_at_edge(lr: float, given: argparse.Namespace) -> bool:
    return lr in (min(given.lrs), max(given.lrs))


def print_differences(rows: list[Difference]) -> None:
    print(f"\n{'':10}{'way':10}{'jaxsae / peer':17}{'FVU':>7}   95 % interval    of layers")
    for row in rows:
        of_layers = " ".join(f"{ratio:.3f}" for ratio in row.of_layers.values())
        interval = f"{row.low:.3f} to {row.high:.3f}"
        print(f"{row.architecture:10}{row.way:10}{row.peer:17}{row.ratio:7.3f}   {interval:17}{of_layers}")


def write(given: argparse.Namespace, outcomes: list[Outcome], rows: list[Difference]) -> None:
    settings = {name: str(each) if isinstance(each, Path) else each for name, each in vars(given).items()}
    content: dict[str, Any] = {"versions": versions(), "settings": settings}
    content |= {"outcomes": [dataclasses.asdict(one) for one in outcomes]}
    content |= {"differences": [dataclasses.asdict(row) for row in rows]}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2) + "\n")


def read_kept(given: argparse.Namespace) -> list[Outcome]:
    """Return what OUT holds of the same rows and sizes."""
    found = json.loads(given.out.read_text())
    for name in ("layers", "n_latents", "k", "batch", "n_tokens", "lrs"):
        if found["settings"][name] != vars(given)[name]:
            raise SystemExit(f"{given.out} is of {name} {found['settings'][name]}, asked for are {vars(given)[name]}")
    return [Outcome(**one) for one in found["outcomes"]]


def versions() -> str:
    return f"jaxsae {__version__}, jax {jax.__version__}, {peers.versions()}"


def main(given: argparse.Namespace) -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax warns a hundred times a checkpoint
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = read_rows(given.store, given.layers, given.n_tokens)
    print(
        f"{given.store}: D {rows.train.shape[-1]}, F {given.n_latents}, k {given.k}; {given.n_tokens} tokens of "
        f"{rows.train.shape[1]} different ones, batch {given.batch}; {rows.validation.shape[1]} rows for validation, "
        f"{rows.test.shape[1]} for the test; {versions()}"
    )
    outcomes: list[Outcome] = read_kept(given) if given.keep else []
    for run in compare(rows, given, list(outcomes)):
        outcomes += run
        write(given, outcomes, [])
        one, fvus = run[0], " ".join(f"{each.fvu:.4f}" for each in run)
        lr = "its own" if one.lr is None else f"{one.lr:g}"
        print(f"{one.architecture:10}{one.way:10}{one.library:17}lr {lr:8} seed {one.seed}: FVU {fvus}", flush=True)
    table = list(differences(outcomes, given))
    print_outcomes(outcomes, given)
    print_differences(table)
    write(given, outcomes, table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="SAEs of jaxsae beside its peers', on the same activations")
    parser.add_argument("store", type=Path, help="activations/ of a run, from jaxsae extract")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--n-latents", type=int, required=True, help="F")
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1024, help="rows in a step")
    parser.add_argument("--n-tokens", type=int, required=True, help="rows that each SAE sees, repeated if need be")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2, which an interval needs")
    parser.add_argument("--lrs", type=float, nargs="+", default=list(LRS), help="the shared grid")
    parser.add_argument("--architectures", nargs="+", default=["topk", "batchtopk"])
    parser.add_argument("--keep", action="store_true", help="go on: runs that OUT holds already are kept")
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error(f"--seeds is {given.seeds}; an interval needs at least 2")
    main(given)
