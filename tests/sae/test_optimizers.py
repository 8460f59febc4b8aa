"""Optimizers and schedules: single updates against plain ones, and which weights a schedule-free run is after."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest

from jaxsae.config import SaeConfig, TrainConfig
from jaxsae.sae.autoencoder import SaeParams
from jaxsae.sae.step import Recipe, TrainState, init_state, make_optimizer, make_recipe, make_schedule, weights_of

L, D, F, LR, WARMUP = 2, 3, 7, 0.05, 4


def recipe_of(optimizer, schedule, *, architecture="topk", **changes) -> Recipe:
    train = {"batch": 8, "n_tokens": 800, "lr": LR, "warmup_steps": WARMUP, "clip_norm": 1e9} | changes
    return make_recipe(
        SaeConfig(architecture=architecture, n_latents=F, k=2),
        TrainConfig(optimizer=optimizer, schedule=schedule, **train),
        n_layers=L,
        d_model=D,
        batches_per_epoch=10,
    )


def start(recipe) -> TrainState:
    return init_state(recipe, np.random.default_rng(0).normal(size=(L, 50, D)).astype(np.float32), seed=1)


def gradients(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)


def take_steps(recipe, state, n) -> TrainState:
    """Take steps along gradients that do not depend on the weights."""
    update = jax.jit(jax.vmap(make_optimizer(recipe).update), compiler_options={"xla_backend_optimization_level": 0})
    params, opt_state = state.params, state.opt_state
    for step in range(n):
        updates, opt_state = update(gradients(params, step), opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def rates(n):
    return [LR * min(step / WARMUP, 1) for step in range(n)]


def test_signum__moves_by_the_sign_of_the_mean_gradient():
    recipe = recipe_of("signum", "linear")
    state, mean = start(recipe), 0.0
    expected = np.array(state.params.W_enc)
    for step, rate in enumerate(rates(6)):
        mean = 0.95 * mean + 0.05 * np.asarray(gradients(state.params, step).W_enc)
        expected -= rate * np.sign(mean)
    np.testing.assert_allclose(take_steps(recipe, state, 6).params.W_enc, expected, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "nadam"])
def test_adam__is_kingmas__and_nadam_looks_one_step_ahead_of_its_mean(optimizer):
    recipe = recipe_of(optimizer, "linear")
    state, b1, b2 = start(recipe), 0.9, recipe.b2
    expected, mean, square = np.array(state.params.W_enc), 0.0, 0.0
    for step, rate in enumerate(rates(6), 1):
        gradient = np.asarray(gradients(state.params, step - 1).W_enc)
        mean, square = b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient**2
        ahead = b1 * mean / (1 - b1 ** (step + 1)) + (1 - b1) * gradient / (1 - b1**step)
        direction = ahead if optimizer == "nadam" else mean / (1 - b1**step)
        expected -= rate * direction / (np.sqrt(square / (1 - b2**step)) + 1e-8)
    np.testing.assert_allclose(take_steps(recipe, state, 6).params.W_enc, expected, atol=2e-6)


def defazio(state, n, base, momentum, b2):
    """Return y and x after n steps: z by the base optimizer, x its average weighted with lr^2, y between them."""
    y = x = z = np.array(state.params.W_enc)
    total, largest, memory = 0.0, 0.0, np.zeros_like(y)
    # The weight of a step is that of the rate after it: the two count from 0 and from 1.
    for step, (rate, following) in enumerate(zip(rates(n), rates(n + 1)[1:], strict=True)):
        gradient = np.asarray(gradients(state.params, step).W_enc)
        memory = b2 * memory + (1 - b2) * gradient**2
        scaled = np.sign(gradient) if base == "signum" else gradient / np.sqrt(memory / (1 - b2 ** (step + 1)))
        largest = max(largest, following)
        total += largest**2
        z = z - rate * scaled
        x = x + largest**2 / total * (z - x)
        y = momentum * x + (1 - momentum) * z
    return y, x


@pytest.mark.parametrize(("optimizer", "momentum"), [("adam", 0.9), ("nadam", 0.9), ("signum", 0.95)])
def test_schedule_free__is_defazios__and_evaluates_the_average(optimizer, momentum):
    recipe = recipe_of(optimizer, "schedule_free")
    begin = start(recipe)
    end = take_steps(recipe, begin, 9)
    y, x = defazio(begin, 9, optimizer, momentum, recipe.b2)
    np.testing.assert_allclose(end.params.W_enc, y, atol=2e-6)
    weights, average = weights_of(end, recipe, 9), optax.contrib.schedule_free_eval_params
    lengths = np.linalg.norm(jax.vmap(average)(end.opt_state, end.params).W_dec, axis=-1)
    np.testing.assert_allclose(weights["W_enc"], x * lengths[:, None, :], atol=5e-6)
    assert np.abs(x - y).max() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(weights["W_dec"], axis=-1), 1, atol=1e-6)
    assert recipe.is_folded
    assert recipe_of(optimizer, "linear").is_folded
    assert not recipe_of(optimizer, "linear", architecture="jumprelu_l1").is_folded
    assert recipe_of(optimizer, "schedule_free", architecture="jumprelu_l1").is_folded


def test_weights_of__schedule_free_and_folded__folds_the_average():
    recipe = recipe_of("adam", "schedule_free", architecture="jumprelu")
    state = start(recipe)
    far = jax.tree.map(lambda x: x + 1, state.params)
    moved = dataclasses.replace(state, opt_state=state.opt_state._replace(z=far))
    threshold = np.exp(state.params.gate["log_threshold"] - 0.1 / 0.9)  # x = (y - (1 - b1) z) / b1
    np.testing.assert_allclose(weights_of(moved, recipe, 1)["threshold"], threshold, rtol=1e-5)


def test_schedule__schedule_free__warms_up_and_stays():
    schedule = make_schedule(recipe_of("signum", "schedule_free"))
    assert [float(schedule(step)) for step in (0, 2, 4, 50, 99)] == pytest.approx([0, LR / 2, LR, LR, LR])


def test_learning_rate__unset__falls_with_the_root_of_the_latents():
    def lr(optimizer, n_latents):
        sae, train = SaeConfig(n_latents=n_latents), TrainConfig(optimizer=optimizer, batch=8, n_tokens=800)
        return make_recipe(sae, train, n_layers=L, d_model=D, batches_per_epoch=10).lr

    assert [lr("signum", 2**n) for n in (12, 14, 16)] == pytest.approx([1e-2, 5e-3, 2.5e-3])
    assert [lr("adam", 2**n) for n in (12, 14, 16)] == pytest.approx([0.14 / 2 ** (n / 2) for n in (12, 14, 16)])


def test_settled_step__is_where_k_or_the_penalty_stops_changing():
    def settled(architecture, **settings):
        sae = SaeConfig(architecture=architecture, n_latents=F, k=2, **settings)
        train = TrainConfig(batch=8, n_tokens=8 * 55)
        return make_recipe(sae, train, n_layers=L, d_model=D, batches_per_epoch=10).settled_step

    assert [settled("topk"), settled("topk", k_start=5), settled("jumprelu_l1")] == [0, 6, 0]
    assert [settled("batchtopk"), settled("batchtopk", by_row=0.0)] == [17, 0]
    assert [settled("matryoshka", k_start=5, anneal=0.5), settled("topk", by_row=0.5)] == [28, 0]
    assert [settled("jumprelu"), settled("jumprelu_tanh"), settled("relu", anneal=0.5)] == [6, 55, 28]


def test_params__hold_what_an_architecture_learns_beside_the_weights():
    state = start(recipe_of("adam", "linear", architecture="gated"))
    assert isinstance(state.params, SaeParams)
    assert {name: x.shape for name, x in state.params.gate.items()} == {"r_mag": (L, F), "b_mag": (L, F)}
