"""What each architecture learns and how it encodes afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsae.artifacts import InputError
from jaxsae.config import SaeConfig
from jaxsae.sae import architectures
from jaxsae.sae.architectures import ARCHITECTURES, architecture, group_sizes, jump, setting, sparsity_weight
from jaxsae.sae.autoencoder import SaeParams
from jaxsae.sae.losses import Moment
from jaxsae.sae.suite import fold_scale

B, D, F, K = 40, 6, 19, 3
VARIANCE = 2.5
QUICK = {"xla_backend_optimization_level": 0}
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def inputs(name, seed=0):
    """Return weights in which nothing is at its start, and rows."""
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(F, D))
    gates = {
        "gated": {"r_mag": 0.3 * rng.normal(size=F), "b_mag": 0.3 * rng.normal(size=F)},
        "jumprelu": {"log_threshold": 0.3 * rng.normal(size=F) - 1},
        "jumprelu_tanh": {"log_threshold": 0.3 * rng.normal(size=F) - 1},
    }
    params = SaeParams(
        W_enc=0.4 * rng.normal(size=(D, F)),
        b_enc=0.3 * rng.normal(size=F),
        W_dec=W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True),
        b_dec=0.5 * rng.normal(size=D),
        gate=gates.get(name, {}),
    )
    acts = rng.normal(size=(B, D)) + 0.5
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), jnp.asarray(acts, jnp.float32)


def moment_of(name, *, n_dead=0, progress=0.5, **settings):
    config = SaeConfig(architecture=name, k=K, n_latents=F, **settings)
    return Moment(jnp.float32(VARIANCE), jnp.arange(F) < n_dead, jnp.float32(progress), config)


def take_loss(name, params, acts, moment):
    """Return the loss, what it saw, and the gradients."""
    value_and_grad = jax.jit(jax.value_and_grad(architecture(name).loss, has_aux=True), compiler_options=QUICK)
    (loss, seen), grads = value_and_grad(params, acts, moment)
    return loss, seen, grads


def suite_of(name, params, config, estimated=0.0):
    folded = architecture(name).fold(params, jnp.float32(estimated), config)
    return fold_scale(folded | {"scale": jnp.ones(())}, architecture=name, k=config.k)


def test_architecture__of_an_unknown_name__lists_those_there_are():
    with pytest.raises(InputError, match="'vanilla', expected one of topk, batchtopk, matryoshka, relu, gated, jump"):
        architectures.architecture("vanilla")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folded_weights__encode_as_training_did(name):
    (params, acts), moment = inputs(name), moment_of(name, threshold=0.2)
    _, seen, _ = take_loss(name, params, acts, moment)
    # Training keeps the batch's smallest kept activation too, the threshold at inference is exceeded.
    suite = suite_of(name, params, moment.config, 0.0 if seen.threshold is None else seen.threshold * (1 - 1e-6))
    feats = suite.encode(acts)
    np.testing.assert_array_equal((feats > 0).sum(axis=0), seen.counts.fired)
    np.testing.assert_allclose(acts - suite.decode(feats), seen.error, atol=1e-5)
    assert 0 < seen.counts.n_active < B * F
    assert float(seen.counts.squared_error) == pytest.approx(float((seen.error**2).sum()), rel=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encode__of_a_row__does_not_depend_on_the_others(name):
    (params, acts), config = inputs(name, 1), moment_of(name, threshold=0.2).config
    suite = suite_of(name, params, config, 0.4)
    together = suite.encode(acts)
    alone = jnp.concatenate([suite.encode(acts[i : i + 1]) for i in range(0, B, 7)])
    np.testing.assert_allclose(alone, together[::7], atol=1e-6)


def to_torch(params):
    tensors = {name: torch.from_numpy(np.array(getattr(params, name))).requires_grad_() for name in WEIGHTS}
    return tensors | {name: torch.from_numpy(np.array(x)).requires_grad_() for name, x in params.gate.items()}


def assert_same_as_torch(name, torch_loss, moment, seed):
    """Compare value and gradients; `torch_loss` takes the tensors, rows, centred rows times W_enc, and k."""
    params, acts = inputs(name, seed)
    tensors, x = to_torch(params), torch.from_numpy(np.array(acts))
    expected = torch_loss(tensors, x, (x - tensors["b_dec"]) @ tensors["W_enc"])
    expected.backward()
    loss, _, grads = take_loss(name, params, acts, moment)
    assert float(loss) == pytest.approx(expected.item(), abs=1e-5)
    for field in WEIGHTS:
        np.testing.assert_allclose(getattr(grads, field), tensors[field].grad.numpy(), atol=1e-5, err_msg=field)
    for field, gradient in grads.gate.items():
        np.testing.assert_allclose(gradient, tensors[field].grad.numpy(), atol=1e-5, err_msg=field)
        assert np.abs(gradient).max() > 1e-3, field


def torch_error(weights, x, feats):
    return ((x - feats @ weights["W_dec"] - weights["b_dec"]) ** 2).sum() / (B * VARIANCE)


def test_relu_loss__equals_torch():
    def loss(weights, x, products):
        feats = torch.relu(products + weights["b_enc"])
        norms = weights["W_dec"].detach().norm(dim=1)
        return torch_error(weights, x, feats) + 0.3 * (feats * norms).sum() / (B * VARIANCE)

    assert_same_as_torch("relu", loss, moment_of("relu", sparsity_coefficient=0.3), 2)


def test_gated_loss__equals_torch():
    """Two encoders, W_mag_ij = exp(r_mag_i) W_gate_ij, and a frozen copy of the decoder."""

    def loss(weights, x, products):
        gate = products + weights["b_enc"]
        centred = x - weights["b_dec"]
        magnitude = torch.relu(centred @ (weights["W_enc"] * weights["r_mag"].exp()) + weights["b_mag"])
        frozen = {name: weights[name].detach() for name in ("W_dec", "b_dec")}
        penalty = 0.3 * torch.relu(gate).sum() / (B * VARIANCE)
        through_gate = torch_error(frozen, x, torch.relu(gate))
        return torch_error(weights, x, (gate > 0).float() * magnitude) + penalty + through_gate

    assert_same_as_torch("gated", loss, moment_of("gated", sparsity_coefficient=0.3), 3)


class TorchJump(torch.autograd.Function):
    """JumpReLU and the step, each with the paper's pseudo-derivative; `moves` says whether pre gets it too."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, moves):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.moves = bandwidth, moves
        is_above = (pre > threshold).to(pre)
        return pre * is_above, is_above

    @staticmethod
    def backward(ctx, to_feats, to_steps):
        pre, threshold = ctx.saved_tensors
        near = (((pre - threshold) / ctx.bandwidth).abs() < 0.5).to(pre) / ctx.bandwidth
        jumps = near * (threshold * to_feats + to_steps)
        to_pre = (pre > threshold).to(pre) * to_feats + (jumps if ctx.moves else 0)
        return to_pre, -jumps.sum(dim=0), None, None


def torch_short(threshold, pre, n_dead):
    return 3e-6 * torch.relu(threshold - pre)[:, :n_dead].sum() / (B * VARIANCE)


@pytest.mark.parametrize("coefficient", [None, 0.02])
def test_jumprelu_loss__equals_torch(coefficient):
    def loss(weights, x, products):
        pre, threshold = products + weights["b_enc"], weights["log_threshold"].exp()
        feats, steps = TorchJump.apply(pre, threshold, 0.5, False)
        mean_l0 = steps.sum() / B
        penalty = (mean_l0 / K - 1) ** 2 * architectures.SQUARE if coefficient is None else coefficient * mean_l0
        return torch_error(weights, x, feats) + penalty + torch_short(threshold, pre, 4)

    moment = moment_of("jumprelu", n_dead=4, bandwidth=0.5, sparsity_coefficient=coefficient)
    assert_same_as_torch("jumprelu", loss, moment, 4)


def test_tanh_loss__equals_torch():
    def loss(weights, x, products):
        pre, threshold = products + weights["b_enc"], weights["log_threshold"].exp()
        feats, _ = TorchJump.apply(pre, threshold, 2.0, True)
        penalty = 0.5 * 0.3 * torch.tanh(4 * feats).sum() / (B * VARIANCE)  # half of the warm-up is over
        return torch_error(weights, x, feats) + penalty + torch_short(threshold, pre, 4)

    assert_same_as_torch("jumprelu_tanh", loss, moment_of("jumprelu_tanh", n_dead=4, sparsity_coefficient=0.3), 5)


def torch_batch_topk(pre):
    pre = torch.relu(pre)
    return pre * (pre >= pre.detach().flatten().topk(B * K).values[-1])


def test_matryoshka_loss__equals_torch__each_prefix_decoded_on_its_own():
    def loss(weights, x, products):
        feats = torch_batch_topk(products + weights["b_enc"])
        prefixes = [torch.where(torch.arange(F) < size, feats, 0.0) for size in (2, 7, 19)]
        return sum(torch_error(weights, x, prefix) for prefix in prefixes) / 3

    assert_same_as_torch("matryoshka", loss, moment_of("matryoshka", groups=(2, 7, 19)), 6)


def test_matryoshka__of_one_group__is_batchtopk():
    params, acts = inputs("matryoshka", 7)
    nested = take_loss("matryoshka", params, acts, moment_of("matryoshka", groups=(F,)))
    plain = take_loss("batchtopk", params, acts, moment_of("batchtopk"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), nested, plain)


def test_groups__are_halvings_by_default__and_must_rise_to_all_latents():
    assert group_sizes(SaeConfig(), 64) == (4, 8, 16, 32, 64)
    assert group_sizes(SaeConfig(), 13) == (1, 3, 6, 13)
    assert group_sizes(SaeConfig(groups=(5, 13)), 13) == (5, 13)
    for groups in ((5, 12), (7, 5, 13), (0, 13), (5, 5, 13)):
        with pytest.raises(InputError, match=r"sae.groups is \(.*\), expected rising sizes of which the last is 13, t"):
            group_sizes(SaeConfig(groups=groups), 13)


def smoothed(pre, threshold, to_feats, to_steps, bandwidth):
    """Return what a cotangent makes of JumpReLU and step when uniform noise is added to pre, by quadrature."""
    noise = bandwidth * ((np.arange(40_000) + 0.5) / 40_000 - 0.5)
    noisy = pre[..., None] + noise
    is_above = noisy > threshold[:, None]
    return ((noisy * is_above).mean(-1) * to_feats + is_above.mean(-1) * to_steps).sum()


def test_jump__has_the_threshold_gradient_of_the_smoothed_objective():
    rng = np.random.default_rng(8)
    pre, (to_feats, to_steps) = rng.uniform(-1, 2, size=(30, 4)), rng.normal(size=(2, 30, 4))
    threshold, bandwidth, moved = np.array([0.2, 0.5, 0.9, 1.3]), 0.7, 0.01
    # Rows at the edge of the kernel would change sides on the way.
    pre = np.where(np.abs(np.abs(pre - threshold) - bandwidth / 2) < 2 * moved, 5.0, pre)
    spread = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), pre.shape)
    _, pull_back = jax.vjp(
        lambda pre, threshold: jump(pre, threshold, bandwidth), jnp.asarray(pre, jnp.float32), spread
    )
    to_pre, to_threshold = pull_back((jnp.asarray(to_feats, jnp.float32), jnp.asarray(to_steps, jnp.float32)))
    for i in range(4):
        sides = [
            smoothed(pre, threshold + sign * moved * np.eye(4)[i], to_feats, to_steps, bandwidth) for sign in (1, -1)
        ]
        assert (sides[0] - sides[1]) / (2 * moved) == pytest.approx(float(to_threshold.sum(axis=0)[i]), rel=2e-3)
    np.testing.assert_allclose(to_pre, to_feats * (pre > threshold), atol=1e-6)


def test_sparsity_weight__unset__pulls_while_too_many_are_active__and_aims_from_all_latents_down_to_k():
    def weight(n_active, progress=1.0, **settings):
        feats = jnp.zeros((B, F)).at[:, :n_active].set(1.0)
        return float(sparsity_weight(feats, moment_of("relu", progress=progress, anneal=0.4, **settings)))

    excess = [0, 0, 1 / 3, 2 / 3, 1, 1]
    assert [weight(n) for n in (0, 3, 4, 5, 6, 19)] == pytest.approx([architectures.PULL * x for x in excess], abs=1e-4)
    aims = [F * (K / F) ** (progress / 0.4) for progress in (0, 0.1, 0.3)]
    expected = [architectures.PULL * min(max(12 / aim - 1, 0), 1) for aim in aims]
    assert [weight(12, progress) for progress in (0, 0.1, 0.3)] == pytest.approx(expected, abs=1e-4)
    assert 0 == expected[0] < expected[1] < expected[2] == architectures.PULL
    assert weight(12, 0.2, sparsity_coefficient=3.0) == pytest.approx(1.5)


def test_jumprelu__starts_with_k_latents_active():
    rng = np.random.default_rng(9)
    mean, config = rng.normal(size=64), SaeConfig(architecture="jumprelu", k=8)
    rows = rng.normal(size=(2000, 64)) + mean
    scale = np.sqrt(64 / (rows**2).sum(-1).mean())
    params = architecture("jumprelu").init(jax.random.key(0), jnp.asarray(mean * scale, jnp.float32), 512, config)
    pre = (rows * scale - params.b_dec) @ params.W_enc
    assert (pre > np.exp(params.gate["log_threshold"])).sum(-1).mean() == pytest.approx(8, rel=0.1)
    fixed = dataclasses.replace(config, threshold=0.1)
    params = architecture("jumprelu").init(jax.random.key(0), jnp.zeros(64), 512, fixed)
    np.testing.assert_allclose(params.gate["log_threshold"], np.log(0.1), rtol=1e-6)


def test_setting__unset__is_the_architectures_own():
    assert setting(SaeConfig("jumprelu_l1"), "threshold") == 1.0
    assert setting(SaeConfig("jumprelu_l1"), "sparsity_coefficient") == 0.05
    assert setting(SaeConfig("jumprelu_tanh"), "anneal") == 1.0
    assert setting(SaeConfig("batchtopk"), "anneal") == 0.1
    assert setting(dataclasses.replace(SaeConfig("jumprelu_tanh"), anneal=0.0), "anneal") == 0.0
