"""Train the SAEs of all layers at once: the loop around the step, with evaluation, checkpoints and exact resume.

A run that was interrupted and resumed ends bit-identical to one that was not: the state holds everything the next step
depends on, and the source is a pure function of its position.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.sae import evaluate
from jaxsae.sae.architectures import architecture
from jaxsae.sae.autoencoder import AnyArray, SaeParams
from jaxsae.sae.checkpoint import Checkpoints, load
from jaxsae.sae.step import Recipe, TrainState, init_state, keep_best, make_step, make_steps, suite_of, weights_of
from jaxsae.sae.suite import SaeSuite

INIT_ROWS = 16_384  # training rows behind mean, scale and variance
_FETCH_STEPS = 16  # steps whose metrics are fetched together, so that the host does not wait for each


@runtime_checkable
class Source(Protocol):
    """Where activations come from; `next` is a function of its state alone.

    Batches are this process's layers on the host, or all layers, padded to the mesh, on the devices.
    """

    batches_per_epoch: int
    n_train_tokens: int

    def init(self) -> dict[str, int]: ...
    def next(self, state: dict[str, int]) -> tuple[dict[str, int], Float[AnyArray, "L B D"]]: ...
    def sample(self, n: int, *, seed: int) -> Float[np.ndarray, "L N D"]: ...
    def held_out_batches(self, batch: int) -> Iterator[Float[AnyArray, "L _ D"]]: ...


@runtime_checkable
class BufferedSource(Source, Protocol):
    """A source with arrays on the devices that its state alone would be slow to make again; checkpoints keep them.

    It computes ahead: so it is told when the run ends, and has rows at hand before the first batch.
    """

    def init(self, n_batches: int | None = None) -> dict[str, int]: ...
    def peek(self, state: dict[str, int], n: int) -> Float[np.ndarray, "L _ D"]: ...
    def arrays(self, state: dict[str, int]) -> dict[str, Array]: ...
    def abstract_arrays(self) -> dict[str, jax.ShapeDtypeStruct]: ...
    def restore(self, state: dict[str, int], arrays: dict[str, Array]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: after how many steps, and whether the run is finished."""

    step: int
    total_steps: int
    is_finished: bool


class Trainer:
    """One training run: its recipe, its state, where they are kept, and the loop."""

    def __init__(self, source: Source, recipe: Recipe, checkpoints: Checkpoints, *, mesh: Mesh, seed: int) -> None:
        """Resume from the newest whole checkpoint, or start from rows of the source."""
        self.source, self.recipe, self.checkpoints, self.mesh = source, recipe, checkpoints, mesh
        self.layers = meshes.local_layers(recipe.n_layers, mesh)
        self.reader = source.init(recipe.total_steps) if isinstance(source, BufferedSource) else source.init()
        latest = checkpoints.latest_step()
        # Of a state that a checkpoint replaces, the shapes alone count: any rows give them.
        sample = self._sample(seed) if latest is None else np.eye(2, recipe.d_model)[None].repeat(recipe.n_layers, 0)
        self.state = meshes.put_layers(init_state(recipe, meshes.pad_layers(sample, mesh), seed), mesh)
        self.step = 0
        if latest is not None:
            self._resume(latest)
        together = recipe.train.steps_per_dispatch
        self._take_steps = make_steps(recipe, mesh, together) if together > 1 else make_step(recipe, mesh)
        self._row_sums, self._bit_counts = evaluate.make_row_sums(mesh), evaluate.make_bit_counts(mesh)
        self._pending: list[tuple[range, dict[str, Array]]] = []

    def _sample(self, seed: int) -> Float[np.ndarray, "L N D"]:
        """Return the rows that the state before the first step is made from, of all layers."""
        if isinstance(self.source, BufferedSource):
            rows = self.source.peek(self.reader, INIT_ROWS)
        else:
            rows = self.source.sample(min(INIT_ROWS, self.source.n_train_tokens), seed=seed)
        return meshes.gather_layers(rows, self.layers, self.recipe.n_layers)

    def _resume(self, latest: int) -> None:
        """Go on from the newest whole checkpoint."""
        like = _trees(self.state, self.recipe, 0)
        buffered = self.source if isinstance(self.source, BufferedSource) and latest < self.recipe.total_steps else None
        if buffered is not None:
            like["buffer"] = buffered.abstract_arrays()
        trees, self.reader = self.checkpoints.restore(latest, like)
        self.state, self.step = _from_trees(trees, self.state, self.recipe), latest
        if buffered is not None:
            buffered.restore(self.reader, trees["buffer"])

    def run(
        self,
        *,
        on_step: Callable[[int, str], None],
        on_evaluation: Callable[[int, dict[str, np.ndarray]], None],
        should_stop: Callable[[], bool],
    ) -> Outcome:
        """Train to the end of the budget, or until `should_stop`; either way the state is saved.

        Args:
            on_step: called with the number of steps done and a short note.
            on_evaluation: called with the step and held-out `fvu`, `mse`, `l0`, the batch's `loss`, `dead`,
                `l0_train`; all [L].

        Raises:
            InputError: the loss is not finite (step and layer named), or the disk is full.
        """
        recipe, total, every = self.recipe, self.recipe.total_steps, self.recipe.train
        while self.step < total:
            before = self.step
            self._advance()
            stop = self._must_stop(should_stop, before)
            if self.step % every.evaluate_every == 0 or self.step == total:
                numbers = self._evaluate()
                on_evaluation(self.step, numbers)
                on_step(self.step, _note(numbers))
            if self.step < total and (self.step % every.checkpoint_every == 0 or stop):
                self._save(_trees(self.state, recipe, self.step) | self._buffer())
            if sum(len(steps) for steps, _ in self._pending) >= _FETCH_STEPS:
                on_step(self.step, _note(self._fetch()))
            if stop and self.step < total:
                return Outcome(self.step, total, is_finished=False)
        if self.checkpoints.latest_step() != total:
            self._finish()
        return Outcome(self.step, total, is_finished=True)

    def _must_stop(self, should_stop: Callable[[], bool], before: int) -> bool:
        """Ask; several processes agree only now and then, since each agreement waits for all devices."""
        if jax.process_count() > 1 and self.step // _FETCH_STEPS == before // _FETCH_STEPS:
            return False
        return meshes.global_any(should_stop())

    def _advance(self) -> None:
        """Take the steps of one dispatch, which ends where something is to be done; they equal single ones."""
        settings = self.recipe.train
        ends = (settings.evaluate_every, settings.checkpoint_every)
        count = min(
            settings.steps_per_dispatch, self.recipe.total_steps - self.step, *(end - self.step % end for end in ends)
        )
        batches = []
        for _ in range(count):
            self.reader, acts = self.source.next(self.reader)
            batches.append(meshes.put_batch(acts, self.layers, self.recipe.n_layers, self.mesh))
        if settings.steps_per_dispatch == 1:
            self.state, metrics = self._take_steps(self.state, batches[0], np.int32(self.step))
        else:
            batches += batches[-1:] * (settings.steps_per_dispatch - count)
            self.state, metrics = self._take_steps(self.state, tuple(batches), np.int32(self.step), np.int32(count))
        self._pending.append((range(self.step + 1, self.step + count + 1), metrics))
        self.step += count

    def _fetch(self) -> dict[str, np.ndarray]:
        """Fetch the pending steps' metrics and return the last one's, of the real layers."""
        dispatches, metrics = zip(*self._pending, strict=True)
        self._pending = []
        fetched = jax.tree.map(np.atleast_2d, meshes.fetch(list(metrics)))
        for steps, rows in zip(dispatches, fetched, strict=True):
            for step, loss in zip(steps, rows["loss"][:, : self.recipe.n_layers], strict=False):
                if not np.isfinite(loss).all():
                    layer = int(np.flatnonzero(~np.isfinite(loss))[0])
                    raise InputError(
                        f"the loss of layer {layer} is {loss[layer]} at step {step}; the activations are not finite or "
                        "train.lr is too high: lower it, or run jaxsae extract again"
                    )
        last = len(dispatches[-1]) - 1
        return {name: rows[last, : self.recipe.n_layers] for name, rows in fetched[-1].items()}

    def _evaluate(self) -> dict[str, np.ndarray]:
        batch_metrics = self._fetch()
        weights = weights_of(self.state, self.recipe, self.step)
        quality = self.measure(suite_of(weights, self.recipe))
        if not np.isfinite(quality.fvu).all():
            layer = int(np.flatnonzero(~np.isfinite(quality.fvu))[0])
            raise InputError(
                f"the held-out FVU of layer {layer} is {quality.fvu[layer]} at step {self.step}; its held-out "
                "activations are not finite or all the same, or train.lr is too high: lower it, or run jaxsae extract "
                "again"
            )
        fvu = meshes.put_layers(meshes.pad_layers(quality.fvu.astype(np.float32), self.mesh), self.mesh)
        self.state = keep_best(self.state, weights, fvu, np.int32(self.step), self.recipe)
        numbers = {"fvu": quality.fvu, "mse": quality.mse, "l0": quality.l0}
        return numbers | {"loss": batch_metrics["loss"], "dead": batch_metrics["dead"], "l0_train": batch_metrics["l0"]}

    def measure(self, suite: SaeSuite) -> evaluate.Quality:
        """Measure a suite on `train.evaluate_tokens` held-out tokens."""
        return evaluate.measure(
            self._row_sums,
            suite,
            self.held_out(),
            centre=self.state.mean / self.state.scale[:, None],
            batch=self.recipe.train.batch,
            layers=self.layers,
            n_layers=self.recipe.n_layers,
            mesh=self.mesh,
        )

    def measure_best(self) -> tuple[evaluate.Quality, dict[str, np.ndarray]]:
        """Measure each layer's best SAE as it was saved; return its quality, and one number a layer for each name.

        Beside those of the quality: `l0_train` is the sparsity that training imposed (k), or that of the evaluation;
        `dead` the share of latents that had not fired for `Recipe.dead_tokens` training tokens when the best weights
        were kept, at `best_step`.
        """
        quality = self.measure(evaluate.place(load(self.checkpoints.directory), self.mesh))
        state = meshes.fetch({"dead": self.state.best_dead, "best_step": self.state.best_step})
        imposes_k = architecture(self.recipe.sae.architecture).imposes_k
        numbers = {name: values[: self.recipe.n_layers] for name, values in state.items()}
        numbers["l0_train"] = np.full_like(quality.l0, self.recipe.sae.k) if imposes_k else quality.l0
        return quality, quality.by_layer() | numbers

    def held_out(self) -> Iterator[Float[AnyArray, "L _ D"]]:
        """Yield the held-out rows that every evaluation uses."""
        batch = self.recipe.train.batch
        n_batches = max(1, self.recipe.train.evaluate_tokens // batch)
        return itertools.islice(self.source.held_out_batches(batch), n_batches)

    def _save(self, trees: dict[str, Any]) -> None:
        if self._pending:
            self._fetch()
        self.checkpoints.save(self.step, trees, self.reader)

    def _buffer(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the source, beside its position."""
        return {"buffer": self.source.arrays(self.reader)} if isinstance(self.source, BufferedSource) else {}

    def _finish(self) -> None:
        """Set BatchTopK's thresholds so that held-out tokens have k active latents on average, and save."""
        trees = _trees(self.state, self.recipe, self.step)
        if architecture(self.recipe.sae.architecture).estimates_threshold:
            for which in ("best", "last"):
                trees[which]["threshold"] = self._calibrated(trees[which])
        self._save(trees)

    def _calibrated(self, weights: dict[str, Array]) -> Float[Array, "L F"]:
        thresholds = evaluate.thresholds_for_k(
            self._bit_counts,
            suite_of(weights, self.recipe),
            self.held_out,
            self.recipe.sae.k,
            batch=self.recipe.train.batch,
            layers=self.layers,
            n_layers=self.recipe.n_layers,
            mesh=self.mesh,
        )
        placed = meshes.put_layers(meshes.pad_layers(thresholds, self.mesh), self.mesh)
        return jnp.zeros_like(weights["b_enc"]) + (placed * weights["scale"])[:, None]


def _note(numbers: dict[str, np.ndarray]) -> str:
    return f"fvu {np.mean(numbers['fvu']):.4f}, dead {np.mean(numbers['dead']):.1%}"


_STATE_ONLY = ("since_fired", "threshold_sum", "mean", "variance", "best_fvu", "best_step", "best_dead")


def _trees(state: TrainState, recipe: Recipe, step: int) -> dict[str, Any]:
    """Return the state as the checkpoint's items: weights that others read, and what only training needs."""
    train = {name: getattr(state, name) for name in _STATE_ONLY}
    kept = {name: _by_name(getattr(state, field)) for name, field in _kept_fields(recipe).items()}
    return {"best": dict(state.best), "last": weights_of(state, recipe, step), "train": train | kept}


def _from_trees(trees: dict[str, Any], like: TrainState, recipe: Recipe) -> TrainState:
    """Undo `_trees`."""
    last, train = trees["last"], trees["train"]
    whole = {field: _from_names(train[name], getattr(like, field)) for name, field in _kept_fields(recipe).items()}
    if "params" not in whole:
        whole["params"] = SaeParams(**{name: last[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")})
    return dataclasses.replace(
        like, scale=last["scale"], best=trees["best"], **whole, **{name: train[name] for name in _STATE_ONLY}
    )


def _kept_fields(recipe: Recipe) -> dict[str, str]:
    """Return the pytrees that only training needs; the weights are one where those in `last` are not the same."""
    return {"optimizer": "opt_state"} | ({"params": "params"} if recipe.is_folded else {})


def _by_name(tree: Any) -> dict[str, Any]:
    """Return a pytree's leaves by their places in it."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="_"): leaf for path, leaf in paths}


def _from_names(leaves: dict[str, Any], like: Any) -> Any:
    """Undo `_by_name`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _by_name(like)])
