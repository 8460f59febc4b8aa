"""One training step of all layers' SAEs: the recipe, the state, and the sharded step itself.

The step runs inside `jax.shard_map` over the ("layer", "data") mesh. Gradients and the counters of fired latents travel
along "data" in one sum; nothing travels along "layer".
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.config import SaeConfig, TrainConfig
from jaxsae.sae.architectures import architecture, gradients, group_sizes, k_slots, setting
from jaxsae.sae.autoencoder import AnyArray, SaeParams, unit_rows, with_unit_rows
from jaxsae.sae.losses import Moment, Seen, aux_loss
from jaxsae.sae.suite import SaeSuite, fold_scale

_MOMENTUM = {"nadam": 0.9, "adam": 0.9, "signum": 0.95}  # sparsify's for Signum
METRICS = ("loss", "mse", "fvu", "l0", "dead")  # of a step, one number a layer
THRESHOLD_DECAY = 0.999  # of BatchTopK's threshold at inference, an exponential average
_MEDIAN_ROWS, _MEDIAN_ROUNDS = 4096, 30
_MEDIAN_SHIFT = 1e-4  # of the rows' distances; a round that moves the median by less is the last
_FEATURE_BYTES = 2**32  # of the layers that an accelerator computes together
_LONGEST_WAIT = 2**30  # tokens; counters of latents that never fire stop about here, before int32 overflows


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run's settings with everything derived from them.

    Attributes:
        dead_tokens: the window after which a latent counts as dead, at most a twentieth of the run.
    """

    sae: SaeConfig
    train: TrainConfig
    n_layers: int
    d_model: int
    n_latents: int
    total_steps: int
    batches_per_epoch: int
    dead_tokens: int
    lr: float
    is_sparse: bool

    @property
    def total_tokens(self) -> int:
        """Return the tokens that all steps together see."""
        return self.total_steps * self.train.batch

    @property
    def b2(self) -> float:
        """Return the decay of Adam's second moment, which averages over a tenth of the run and at most 1,000 steps."""
        return min(0.999, 1 - 10 / max(self.total_steps, 100))

    @property
    def settled_step(self) -> int:
        """Return the step from which on k, how it is kept, or the weight of the sparsity penalty stays as it is."""
        is_annealed = self.sae.k_start is not None or not architecture(self.sae.architecture).imposes_k
        annealed = math.ceil(setting(self.sae, "anneal") * self.total_steps) if is_annealed else 0
        return max(annealed, self.steps_by_row)

    @property
    def steps_by_row(self) -> int:
        """Return the steps at the start in which k is each row's instead of the batch's."""
        is_of_batch = architecture(self.sae.architecture).estimates_threshold
        return math.ceil(self.sae.by_row * self.total_steps) if is_of_batch else 0

    @property
    def is_folded(self) -> bool:
        """Say whether training cannot go on from the weights that `weights_of` returns."""
        return self.train.schedule == "schedule_free" or architecture(self.sae.architecture).has_free_rows


def make_recipe(sae: SaeConfig, train: TrainConfig, *, n_layers: int, d_model: int, batches_per_epoch: int) -> Recipe:
    """Derive what the settings leave open.

    Raises:
        InputError: the corpus holds less than a batch, k exceeds the latents, groups do not rise to them, or the run
            has no step.
    """
    n_latents = sae.n_latents if sae.n_latents is not None else round((sae.expansion or 0) * d_model)
    if sae.k > n_latents:
        raise InputError(f"sae.k is {sae.k} but each SAE has {n_latents} latents")
    group_sizes(sae, n_latents)
    if batches_per_epoch < 1:
        raise InputError(f"the training tokens do not fill one batch of {train.batch}; lower train.batch")
    steps = round((train.epochs or 0) * batches_per_epoch) if train.n_tokens is None else train.n_tokens // train.batch
    if steps < 1:
        raise InputError(f"the budget (epochs {train.epochs}, n_tokens {train.n_tokens}) is less than one step")
    return Recipe(
        sae=sae,
        train=train,
        n_layers=n_layers,
        d_model=d_model,
        n_latents=n_latents,
        total_steps=steps,
        batches_per_epoch=batches_per_epoch,
        dead_tokens=max(train.batch, min(sae.dead_tokens, steps * train.batch // 20)),
        is_sparse=_is_sparse(sae, n_latents),
        lr=train.lr if train.lr is not None else _default_lr(train.optimizer, n_latents, steps),
    )


def _default_lr(optimizer: str, n_latents: int, steps: int) -> float:
    """Return the learning rate, which falls with sqrt(F) as sparsify's does; Adam's also with the cube root of steps.

    That joins what is best in 150 and 300 steps (SmolLM2, F 1,152: 2e-3 to 5e-3; the demo, F 512: 6e-3) to the 2e-4 of
    Gao et al. (arXiv:2406.04093) for F 2^14 in tens of thousands.
    """
    if optimizer == "signum":
        return 5e-3 / (n_latents / 2**14) ** 0.5
    return 0.14 / n_latents**0.5 * (300 / max(300, steps)) ** (1 / 3)


def _is_sparse(sae: SaeConfig, n_latents: int) -> bool:
    """Choose the form of the products: by codes only touches k of F latents, dense is one large product.

    Where one overtakes the other is measured on a CPU; accelerators take the dense form until it is measured there.
    """
    if sae.compute == "auto":
        return jax.default_backend() == "cpu" and n_latents >= architecture(sae.architecture).sparse_from * k_slots(sae)
    return sae.compute == "sparse"


@flax.struct.dataclass
class TrainState:
    """Everything the next step depends on; every leaf is `[L, ...]`.

    Attributes:
        since_fired: [L F], training tokens since each latent was last active.
        threshold_sum: [L], BatchTopK's exponential average, from where k is the batch's, before its bias correction.
        scale: [L], what a row is multiplied with before the SAE sees it.
        mean, variance: [L D] and [L], of the scaled rows; the variance is the mean squared distance from the mean.
        best: weights at each layer's lowest held-out FVU, with `best_fvu`, `best_step` and `best_dead` [L] there.
    """

    params: SaeParams
    opt_state: Any
    since_fired: Any
    threshold_sum: Any
    scale: Any
    mean: Any
    variance: Any
    best: dict[str, Any]
    best_fvu: Any
    best_step: Any
    best_dead: Any


def make_optimizer(recipe: Recipe, latent_axis: str | None = None) -> optax.GradientTransformation:
    """Return one layer's optimizer; a suite maps it over layers, so that clipping does not couple them.

    Schedule-free, the weights' average takes the place of the momentum, with its coefficient (Defazio et al. 2024,
    arXiv:2405.15682).
    """
    momentum, is_free = _MOMENTUM[recipe.train.optimizer], recipe.train.schedule == "schedule_free"
    schedule = make_schedule(recipe)
    chained = optax.chain(
        _bound_norm(recipe.train.clip_norm, latent_axis),
        *_scaling(recipe, 0.0 if is_free else momentum),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.contrib.schedule_free(chained, schedule, b1=momentum) if is_free else chained


def _bound_norm(max_norm: float | None, latent_axis: str | None) -> optax.GradientTransformation:
    """Return clipping by the norm of one layer's gradients, of which shards of latents hold parts; or scaling to 1.

    Where all gradients are scaled to one norm, a batch with rows far out moves the moments no more than another.
    """

    def update(grads: SaeParams, state: Any, params: Any = None) -> tuple[SaeParams, Any]:
        squared = optax.tree.norm(dataclasses.replace(grads, b_dec=None), squared=True)
        if latent_axis is not None:  # b_dec alone is the same on all shards
            squared = lax.psum(squared, latent_axis)
        norm = jnp.maximum(jnp.sqrt(squared + jnp.sum(grads.b_dec**2)), jnp.finfo(jnp.float32).tiny)
        factor = 1 / norm if max_norm is None else jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda x: x * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scaling(recipe: Recipe, momentum: float) -> tuple[optax.GradientTransformation, ...]:
    if recipe.train.optimizer == "signum":
        return optax.ema(momentum, debias=False), optax.scale_by_sign()
    return (optax.scale_by_adam(b1=momentum, b2=recipe.b2, nesterov=recipe.train.optimizer == "nadam"),)


def make_schedule(recipe: Recipe) -> optax.Schedule:
    """Return the learning rate of each step.

    linear: warm-up from 0, constant, then down to 0 over the last fifth. cosine: the published run's, one value an
    epoch, lr (1 + cos(pi epoch / epochs)) / 2. schedule_free: as linear, without the fall.
    """
    steps = recipe.total_steps
    if recipe.train.schedule == "cosine":
        epochs = max(1, round(steps / recipe.batches_per_epoch))
        return lambda step: recipe.lr * (1 + jnp.cos(jnp.pi * (step // recipe.batches_per_epoch) / epochs)) / 2
    warmup, decay = min(recipe.train.warmup_steps, steps // 10), max(1, steps // 5)
    pieces = [optax.linear_schedule(0.0, recipe.lr, warmup)] if warmup else []
    end = recipe.lr if recipe.train.schedule == "schedule_free" else 0.0
    pieces += [optax.constant_schedule(recipe.lr), optax.linear_schedule(recipe.lr, end, decay)]
    return optax.join_schedules(pieces, [warmup, steps - decay] if warmup else [steps - decay])


def init_state(recipe: Recipe, sample: Float[np.ndarray, "L N D"], seed: int) -> TrainState:
    """Return the state before the first step, on the default device.

    Args:
        sample: training rows of all layers; they set b_dec, scale and variance.

    Raises:
        InputError: a layer's rows are not finite, or all the same.
    """
    arch = architecture(recipe.sae.architecture)
    moments = [_moments(layer, rows) for layer, rows in enumerate(sample)]
    squared, mean, centre = (np.stack(each) for each in zip(*moments, strict=True))
    scale = np.sqrt(recipe.d_model / squared) if arch.centres_input else np.ones(len(sample))
    variance = (squared - (mean**2).sum(-1)) * scale**2
    mean, centre = mean * scale[:, None], centre * scale[:, None]
    layers = [
        arch.init(
            jax.random.fold_in(jax.random.key(seed), layer),
            jnp.asarray(own, jnp.float32),
            recipe.n_latents,
            recipe.sae,
        )
        for layer, own in enumerate(centre)
    ]
    params = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    n_layers = len(sample)
    state = TrainState(
        params=params,
        opt_state=jax.vmap(make_optimizer(recipe).init)(params),
        since_fired=jnp.zeros((n_layers, recipe.n_latents), jnp.int32),
        threshold_sum=jnp.zeros(n_layers),
        scale=jnp.asarray(scale, jnp.float32),
        mean=jnp.asarray(mean, jnp.float32),
        variance=jnp.asarray(variance, jnp.float32),
        best={},
        best_fvu=jnp.full(n_layers, jnp.inf),
        best_step=jnp.zeros(n_layers, jnp.int32),
        best_dead=jnp.zeros(n_layers),
    )
    return dataclasses.replace(state, best=weights_of(state, recipe, 0))


def _moments(
    layer: int, sample: Float[np.ndarray, "N D"]
) -> tuple[float, Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """Return the mean squared norm of a layer's rows, their mean, and their geometric median."""
    rows = sample.astype(np.float64)
    if not np.isfinite(rows).all():
        raise InputError(f"the activations of layer {layer} are not finite; run jaxsae extract again")
    if np.ptp(rows, axis=0).max() == 0:
        raise InputError(f"the activations of layer {layer} are the same on all {len(rows)} tokens")
    squared = float(np.einsum("nd,nd->", rows, rows)) / len(rows)
    return squared, rows.mean(axis=0), geometric_median(rows[:_MEDIAN_ROWS])


def geometric_median(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " D"]:
    """Return the point with the least sum of distances to the rows, by Weiszfeld's iteration from their mean.

    It lies in the bulk of the rows, which the mean may not where a few of them are far out. Gao et al. 2024
    (arXiv:2406.04093, appendix A.1) start b_dec there.
    """
    median, squared = rows.mean(axis=0), np.einsum("nd,nd->n", rows, rows)
    for _ in range(_MEDIAN_ROUNDS):
        distances = np.sqrt(np.maximum(squared - 2 * rows @ median + median @ median, 0.0))
        weights = 1 / np.maximum(distances, 1e-6 * distances.max() + np.finfo(np.float32).tiny)
        before, median = median, weights @ rows / weights.sum()
        if np.linalg.norm(median - before) < _MEDIAN_SHIFT * np.median(distances):
            break
    return median


def make_step(recipe: Recipe, mesh: Mesh) -> Callable:
    """Return the compiled (state, acts [L B D], step) -> (state, metrics [L] each) over the mesh; it donates the state.

    Metrics of the batch, with training's encoding: loss, mse (a coordinate's, residual units), fvu (against the
    variance at the start), l0, dead (share of latents).
    """
    local_step = _local_step(recipe, mesh)

    def take_step(
        state: TrainState, acts: Float[Array, "L B D"], step: Int[AnyArray, ""]
    ) -> tuple[TrainState, dict[str, Float[Array, " L"]]]:
        specs = meshes.layer_specs(state, mesh)
        return jax.shard_map(
            local_step,
            mesh=mesh,
            in_specs=(specs, meshes.acts_spec(mesh), meshes.REPLICATED),
            out_specs=(specs, meshes.BY_LAYER),
        )(state, acts, step)

    return jax.jit(take_step, donate_argnums=0)


def make_steps(recipe: Recipe, mesh: Mesh, n: int) -> Callable:
    """Return the compiled (state, n batches [L B D], step, count) -> (state, metrics [n L] each); it donates the state.

    One dispatch takes the steps `step` to before `step + count` with the first `count` of the batches, bit for bit as
    `make_step` does one at a time; one program serves every count up to n. The batches beyond may be the same array
    again; their metrics are NaN.
    """
    local_step = _local_step(recipe, mesh)

    def local_steps(
        state: TrainState, batches: tuple[Array, ...], first: Int[AnyArray, ""], count: Int[AnyArray, ""]
    ) -> tuple[TrainState, dict[str, Float[Array, "n L"]]]:
        acts = jnp.stack(batches)

        def body(i: Int[Array, ""], carry: tuple) -> tuple:
            state, metrics = carry
            state, own = local_step(state, lax.dynamic_index_in_dim(acts, i, keepdims=False), first + i)
            return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), metrics, own)

        empty = jnp.broadcast_to(jnp.full_like(state.scale, jnp.nan), (n, *state.scale.shape))
        return lax.fori_loop(0, count, body, (state, dict.fromkeys(METRICS, empty)))

    def take_steps(
        state: TrainState, batches: tuple[Array, ...], step: Int[AnyArray, ""], count: Int[AnyArray, ""]
    ) -> tuple[TrainState, dict[str, Float[Array, "n L"]]]:
        specs = meshes.layer_specs(state, mesh)
        return jax.shard_map(
            local_steps,
            mesh=mesh,
            in_specs=(specs, meshes.acts_spec(mesh), meshes.REPLICATED, meshes.REPLICATED),
            out_specs=(specs, meshes.BY_STEP_AND_LAYER),
        )(state, batches, step, count)

    return jax.jit(take_steps, donate_argnums=0)


def _local_step(recipe: Recipe, mesh: Mesh) -> Callable:
    """Return (state, acts, step) -> (state, metrics) of one shard of the mesh."""
    latent_axis = meshes.latent_axis(mesh)
    optimizer = make_optimizer(recipe, latent_axis)
    axis = meshes.data_axis(mesh)
    return functools.partial(train_step, recipe=recipe, optimizer=optimizer, axis=axis, latent_axis=latent_axis)


def train_step(
    state: TrainState,
    acts: Float[Array, "L B D"],
    step: Int[Array, ""],
    *,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    axis: str | None,
    latent_axis: str | None = None,
) -> tuple[TrainState, dict[str, Float[Array, " L"]]]:
    """Take one step on this shard's layers, rows and latents; where an axis is None, on all of them."""
    arch = architecture(recipe.sae.architecture)
    acts = acts.astype(jnp.float32) * state.scale[:, None, None]
    grads, seen = _gradients(state, acts, step, recipe, axis, latent_axis)
    counts = seen.counts
    if axis is not None:
        grads, counts = lax.psum((grads, counts), axis)
    updates, opt_state = jax.vmap(optimizer.update)(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if not arch.has_free_rows:
        unit = jnp.where((step + 1) % recipe.train.unit_decoder_every == 0, unit_rows(params.W_dec), params.W_dec)
        params = dataclasses.replace(params, W_dec=unit)
    waited = jnp.minimum(state.since_fired, _LONGEST_WAIT) + recipe.train.batch
    since_fired = jnp.where(counts.fired > 0, 0, waited)
    n_rows, n_active, dead = recipe.train.batch, counts.n_active, jnp.mean(since_fired >= recipe.dead_tokens, axis=-1)
    if latent_axis is not None:
        n_active, dead = lax.psum(n_active, latent_axis), lax.pmean(dead, latent_axis)
    metrics = {
        "loss": counts.loss,
        "mse": counts.squared_error / (n_rows * recipe.d_model * state.scale**2),
        "fvu": counts.squared_error / (n_rows * state.variance),
        "l0": n_active / n_rows,
        "dead": dead,
    }
    new_state = dataclasses.replace(state, params=params, opt_state=opt_state, since_fired=since_fired)
    if arch.estimates_threshold:
        decay = jnp.where(step > recipe.steps_by_row, THRESHOLD_DECAY, 0.0)  # before it, the batch's own stands for it
        average = decay * state.threshold_sum + (1 - THRESHOLD_DECAY) * seen.threshold
        new_state = dataclasses.replace(new_state, threshold_sum=average)
    return new_state, metrics


def _gradients(
    state: TrainState,
    acts: Float[Array, "L B D"],
    step: Int[Array, ""],
    recipe: Recipe,
    axis: str | None,
    latent_axis: str | None,
) -> tuple[SaeParams, Seen]:
    """Return this shard's gradients and what the losses saw, some layers at a time."""
    arch = architecture(recipe.sae.architecture)
    params = state.params if axis is None else jax.tree.map(lambda x: lax.pcast(x, axis, to="varying"), state.params)
    is_dead = state.since_fired >= recipe.dead_tokens
    dtype = jnp.dtype(recipe.train.dtype)
    at = functools.partial(
        Moment, config=recipe.sae, axis=axis, latent_axis=latent_axis, is_sparse=recipe.is_sparse, dtype=dtype
    )

    def one_layer(layer: tuple) -> tuple[SaeParams, Seen]:
        params, acts, variance, is_dead = layer
        moment = at(variance, is_dead, step / recipe.total_steps)
        (_, seen), grads = gradients(recipe.sae.architecture, params, acts, moment)
        if arch.revives_dead and recipe.sae.aux_coefficient > 0:
            grads, seen = _with_aux(grads, seen, params, acts, moment, has_free_rows=arch.has_free_rows)
        return grads, dataclasses.replace(seen, error=None, bar=None)

    together = _layers_at_once(acts, params.b_enc.shape[-1])
    layers = (params, acts, state.variance, is_dead)
    return lax.map(one_layer, layers, batch_size=together if together > 1 else None)


def _with_aux(
    grads: SaeParams,
    seen: Seen,
    params: SaeParams,
    acts: Float[Array, "B D"],
    moment: Moment,
    *,
    has_free_rows: bool,
) -> tuple[SaeParams, Seen]:
    """Add the dead latents' loss; it costs nothing while none is dead, and little while few are."""
    weight = moment.config.aux_coefficient

    def added(few: bool) -> tuple[SaeParams, Float[Array, ""]]:
        def loss(params: SaeParams) -> Float[Array, ""]:
            return weight * aux_loss(
                params, acts, seen.error, moment, few=few, bar=seen.bar, has_free_rows=has_free_rows
            )

        aux, aux_grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(jnp.add, grads, aux_grads), seen.counts.loss + aux

    n_dead = moment.all_latents(moment.is_dead.sum())
    which = (n_dead > 0).astype(jnp.int32) + (n_dead > acts.shape[-1] // 2)
    branches = (lambda: (grads, seen.counts.loss), lambda: added(few=True), lambda: added(few=False))
    grads, loss = lax.switch(which, branches)
    return grads, dataclasses.replace(seen, counts=dataclasses.replace(seen.counts, loss=loss))


def _layers_at_once(acts: Float[Array, "L B D"], n_latents: int) -> int:
    """Return how many layers' features are in memory together: one on a CPU, whose caches are small, else 4 GiB."""
    if jax.default_backend() == "cpu":
        return 1
    fitting = max(1, _FEATURE_BYTES // (4 * acts.shape[1] * n_latents))
    return max(n for n in range(1, len(acts) + 1) if len(acts) % n == 0 and n <= fitting)


def weights_of(state: TrainState, recipe: Recipe, step: int) -> dict[str, Array]:
    """Return the arrays that make a suite: weights, threshold at inference [L F], scale.

    Schedule-free, the weights are the average that the run is after. Free decoder rows are unit in them.
    """
    arch = architecture(recipe.sae.architecture)
    estimated = state.threshold_sum / (1 - THRESHOLD_DECAY ** max(1, step - recipe.steps_by_row))
    params = state.params
    if recipe.train.schedule == "schedule_free":
        params = jax.vmap(optax.contrib.schedule_free_eval_params)(state.opt_state, params)
    if arch.has_free_rows:
        params = with_unit_rows(params)
    folded = jax.vmap(lambda params, threshold: arch.fold(params, threshold, recipe.sae))(params, estimated)
    # A threshold that is a constant, or a layer's, does not lie where its latents do.
    threshold = jax.device_put(folded["threshold"], state.params.b_enc.sharding)
    return {**folded, "threshold": threshold, "scale": state.scale}


def suite_of(weights: dict[str, Array], recipe: Recipe) -> SaeSuite:
    """Return the suite in residual units."""
    return fold_scale(weights, architecture=recipe.sae.architecture, k=recipe.sae.k)


@functools.partial(jax.jit, static_argnums=4)
def keep_best(
    state: TrainState, weights: dict[str, Array], fvu: Float[Array, " L"], step: Int[Array, ""], recipe: Recipe
) -> TrainState:
    """Replace the best weights of the layers whose held-out FVU is their lowest so far.

    Weights of before the end of the annealing are replaced in any case: more latents were active with them.
    """
    is_better = (fvu < state.best_fvu) | (state.best_step < recipe.settled_step)

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(is_better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return dataclasses.replace(
        state,
        best=jax.tree.map(choose, weights, state.best),
        best_fvu=choose(fvu, state.best_fvu),
        best_step=choose(jnp.broadcast_to(step, fvu.shape), state.best_step),
        best_dead=choose(jnp.mean(state.since_fired >= recipe.dead_tokens, axis=-1), state.best_dead),
    )
