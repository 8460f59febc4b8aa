"""The training loss of one layer: values and gradients against finite differences and a torch re-implementation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsae.config import SaeConfig
from jaxsae.sae.architectures import architecture as architecture_of
from jaxsae.sae.architectures import gradients
from jaxsae.sae.autoencoder import SaeParams
from jaxsae.sae.losses import Moment, aux_loss, revive

B, D, F, K = 10, 6, 17, 3
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(F, D))
    params = {
        "W_enc": 0.3 * rng.normal(size=(D, F)),
        "b_enc": 0.3 * rng.normal(size=F),
        "W_dec": W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True),
        "b_dec": 0.5 * rng.normal(size=D),
    }
    acts = rng.normal(size=(B, D)) + 0.5
    return {name: x.astype(np.float32) for name, x in params.items()}, acts.astype(np.float32)


def moment_of(architecture, is_dead=None, **settings):
    config = SaeConfig(architecture=architecture, k=K, n_latents=F, threshold=0.2, **settings)
    dead = jnp.zeros(F, bool) if is_dead is None else jnp.asarray(is_dead)
    return Moment(jnp.float32(2.5), dead, jnp.float32(0.5), config)


def loss_of(architecture, acts, is_dead=None, **settings):
    """Return the loss as a function of the weights alone, that of dead latents with it where some are named."""
    moment = moment_of(architecture, is_dead, **settings)

    def loss(weights):
        params = SaeParams(**weights)
        value, seen = architecture_of(architecture).loss(params, jnp.asarray(acts), moment)
        if is_dead is not None and is_dead.any():
            few = bool(is_dead.sum() <= D // 2)
            value += moment.config.aux_coefficient * aux_loss(params, jnp.asarray(acts), seen.error, moment, few=few)
        return value, seen

    return loss


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu_l1"])
def test_loss__has_the_gradient_of_finite_differences(architecture):
    weights, acts = inputs()
    value = jax.jit(lambda weights: loss_of(architecture, acts)(weights)[0])
    grads = jax.jit(jax.grad(value))(weights)
    rng = np.random.default_rng(1)
    for name in NAMES:
        # So small a step that no latent enters or leaves the kept ones: the loss is smooth along it.
        direction = rng.normal(size=weights[name].shape).astype(np.float32)
        moved = [value({**weights, name: weights[name] + sign * 3e-4 * direction}) for sign in (1, -1)]
        slope = float(jnp.vdot(grads[name], direction))
        assert (moved[0] - moved[1]) / 6e-4 == pytest.approx(slope, rel=3e-3, abs=4e-3), name
        assert abs(slope) > 0.01


def torch_topk_loss(weights, acts, is_dead, coefficient):
    """Gao et al. 2024: normalised error, and the dead latents' share of what is left over."""
    x, dead = torch.from_numpy(acts), torch.from_numpy(is_dead)
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    top, ids = torch.relu(pre).topk(K, dim=-1)
    recon = torch.zeros_like(pre).scatter(-1, ids, top) @ weights["W_dec"] + weights["b_dec"]
    error = x - recon
    loss = (error**2).sum() / (B * 2.5)
    if coefficient and dead.any():
        top, ids = pre.masked_fill(~dead, -torch.inf).topk(D // 2, dim=-1)
        top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
        left_over = error.detach()
        from_dead = torch.zeros_like(pre).scatter(-1, ids, top) @ weights["W_dec"]
        loss = loss + coefficient * ((left_over - from_dead) ** 2).sum() / (left_over**2).sum()
    return loss


def torch_reference_loss(weights, acts):
    """The published run: JumpReLU with a fixed threshold, mean squared error and a mean absolute activation."""
    x = torch.from_numpy(acts)
    pre = torch.nn.functional.linear(x, weights["W_enc"].T, weights["b_enc"])
    feats = pre * (pre > 0.2).float()
    recon = torch.nn.functional.linear(feats, weights["W_dec"].T, weights["b_dec"])
    return torch.nn.functional.mse_loss(recon, x) + 0.05 * feats.abs().mean()


def assert_same_as_torch(loss, torch_loss, weights):
    tensors = {name: torch.from_numpy(x).requires_grad_() for name, x in weights.items()}
    expected = torch_loss(tensors)
    expected.backward()
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
    assert float(value) == pytest.approx(expected.item(), abs=1e-5)
    for name in NAMES:
        np.testing.assert_allclose(grads[name], tensors[name].grad.numpy(), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("n_dead", [0, 2, 9])
def test_topk_loss__equals_torch__with_none_few_and_many_dead(n_dead):
    weights, acts = inputs(n_dead)
    is_dead = np.arange(F) < n_dead
    loss = loss_of("topk", acts, is_dead, aux_coefficient=0.7)
    assert_same_as_torch(loss, lambda tensors: torch_topk_loss(tensors, acts, is_dead, 0.7), weights)


def test_reference_loss__equals_torch():
    weights, acts = inputs(4)
    assert_same_as_torch(loss_of("jumprelu_l1", acts), lambda tensors: torch_reference_loss(tensors, acts), weights)


def test_batchtopk_loss__equals_torch():
    weights, acts = inputs(5)

    def torch_loss(tensors):
        x = torch.from_numpy(acts)
        pre = torch.relu((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"])
        smallest = pre.detach().flatten().topk(B * K).values[-1]
        recon = (pre * (pre >= smallest)) @ tensors["W_dec"] + tensors["b_dec"]
        return ((x - recon) ** 2).sum() / (B * 2.5)

    assert_same_as_torch(loss_of("batchtopk", acts), torch_loss, weights)


def aux(weights, acts, error, is_dead, *, few=False):
    return aux_loss(
        SaeParams(**{name: jnp.asarray(x) for name, x in weights.items()}),
        jnp.asarray(acts),
        jnp.asarray(error),
        moment_of("topk", np.asarray(is_dead)),
        few=few,
    )


def at_origin(weights):
    return weights | {"b_enc": np.zeros(F, np.float32), "b_dec": np.zeros(D, np.float32)}


@pytest.mark.parametrize("n_dead", [1, 2, 3])
def test_aux_loss__of_few_dead_latents__reads_their_weights_alone_and_is_the_same(n_dead):
    weights, acts = inputs(6)
    error = np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)
    is_dead = np.isin(np.arange(F), [3, 8, 15][:n_dead])
    values, grads = zip(
        *[
            jax.value_and_grad(lambda w, few=few: aux(w, acts, error, is_dead, few=few))(weights)
            for few in (False, True)
        ],
        strict=True,
    )
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-6)
    for name in NAMES:
        np.testing.assert_allclose(grads[0][name], grads[1][name], atol=1e-6, err_msg=name)


def test_aux_loss__is_a_fraction_of_the_errors_energy():
    weights, error = at_origin(inputs(6)[0]), inputs(6)[1]
    is_dead = np.arange(F) % 3 == 0
    once, scaled = aux(weights, error, error, is_dead), aux(weights, 7 * error, 7 * error, is_dead)
    assert float(once) == pytest.approx(float(scaled), rel=1e-5)
    assert float(aux(weights, np.zeros_like(error), error, is_dead)) == pytest.approx(1.0, rel=1e-6)


def test_aux_loss__does_not_add_b_dec_to_the_reconstruction():
    weights, acts = inputs(7)
    is_dead, moved = np.arange(F) < D // 2, weights | {"b_dec": 100 + weights["b_dec"]}
    pre = (acts - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    error = pre[:, is_dead] @ weights["W_dec"][is_dead]
    for few in (False, True):
        assert float(aux(weights, acts, error, is_dead, few=few)) < 1e-10
        assert float(aux(moved, acts + 100, error, is_dead, few=few)) < 1e-7


def test_aux_loss__reaches_only_dead_latents():
    weights, acts = inputs(8)
    is_dead = np.arange(F) % 4 == 1
    grads = jax.grad(lambda weights: aux(weights, acts, acts, is_dead))(weights)
    for name, rows in (("W_enc", grads["W_enc"].T), ("W_dec", grads["W_dec"]), ("b_enc", grads["b_enc"][:, None])):
        assert not rows[~is_dead].any(), name
        assert rows[is_dead].any(axis=-1).all(), name


def test_revive__takes_the_largest_dead_latents_unrectified():
    pre = jnp.asarray([[5.0, -1.0, 2.0, -3.0, 4.0], [1.0, -2.0, -7.0, -0.5, 0.0]])
    is_dead = jnp.asarray([False, True, False, True, True])
    np.testing.assert_array_equal(revive(pre, is_dead, 2), [[0, -1, 0, 0, 4], [0, 0, 0, -0.5, 0]])


def test_revive__with_fewer_dead_than_asked_for__takes_those():
    pre = jnp.asarray([[5.0, -1.0, 2.0]])
    np.testing.assert_array_equal(revive(pre, jnp.asarray([False, True, False]), 2), [[0, -1, 0]])
    np.testing.assert_array_equal(revive(pre, jnp.zeros(3, bool), 2), np.zeros((1, 3)))


def test_loss__counts_what_it_kept():
    weights, acts = inputs(10)
    loss, seen = jax.jit(loss_of("topk", acts))(weights)
    counts = seen.counts
    pre = (acts - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    kept = (pre >= np.sort(pre, axis=1)[:, -K:][:, :1]) & (pre > 0)
    recon = np.where(kept, pre, 0) @ weights["W_dec"] + weights["b_dec"]
    np.testing.assert_array_equal(counts.fired, kept.sum(axis=0))
    assert float(counts.n_active) == kept.sum()
    assert float(counts.squared_error) == pytest.approx(float(((acts - recon) ** 2).sum()), rel=1e-5)
    assert float(loss) == float(counts.loss)
    assert seen.threshold is None
    np.testing.assert_allclose(seen.error, acts - recon, atol=1e-5)
    assert {field.name for field in dataclasses.fields(counts)} == {"loss", "squared_error", "n_active", "fired"}


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize(("k_start", "by_row"), [(None, 0.0), (6, 0.0), (None, 0.3), (None, 0.6), (6, 0.6)])
def test_gradients__by_codes__equal_the_dense_ones(architecture, k_start, by_row):
    weights, acts = inputs(11)
    moment = moment_of(architecture, k_start=k_start, anneal=1.0, by_row=by_row)
    pre = (acts - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    for crowded in (False, True):
        # One row with more to keep than the codes have room for: the dense form takes over.
        rows = acts + crowded * (np.arange(B) == 2)[:, None] * 90 * np.sign(pre[2]) @ weights["W_enc"].T
        found = [
            jax.jit(lambda w, is_sparse=is_sparse, rows=rows: gradients(
                architecture, SaeParams(**w), jnp.asarray(rows), dataclasses.replace(moment, is_sparse=is_sparse)
            ))(weights)
            for is_sparse in (False, True)
        ]  # fmt: skip
        compare = functools.partial(np.testing.assert_allclose, atol=2e-6 * np.abs(rows).max() ** 2)
        jax.tree.map(compare, *found)
