"""The building blocks against plain loops and transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxsae.models import layers
from jaxsae.models.config_fields import Rotary

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def random_array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", sorted(layers.ACTIVATIONS))
def test_activations__equal_transformers(name):
    x = np.linspace(-9, 9, 2001, dtype=np.float32)
    expected = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.asarray(x)), expected, atol=2e-6, rtol=2e-6)


def test_rotate__turns_pairs_of_coordinates_as_complex_numbers():
    x, positions, frequencies = random_array(2, 3, 4, 10), np.array([[0, 1, 7], [5, 5, 100]]), (1.0, 0.3, 0.01)
    expected = x.astype(np.float64)
    for row, token, head, pair in np.ndindex(2, 3, 4, 3):
        turn = np.exp(1j * positions[row, token] * frequencies[pair])
        turned = (x[row, token, head, pair] + 1j * x[row, token, head, pair + 3]) * turn
        expected[row, token, head, [pair, pair + 3]] = turned.real, turned.imag
    np.testing.assert_allclose(layers.rotate(jnp.asarray(x), jnp.asarray(positions), frequencies), expected, atol=1e-5)


def test_rotate__equals_transformers_far_into_a_text():
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    x, positions = random_array(1, 5, 2, 128), np.array([[0, 2047, 8191, 65_536, 131_071]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.tensor(x), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(*[torch.tensor(x).transpose(1, 2)] * 2, cos, sin)
    found = jax.jit(layers.rotate, static_argnums=2)(x, positions, Rotary(theta=5e5).frequencies(128))
    # A frequency off by one unit in the last place (see below) turns the last position by up to 2e-3 of a radian.
    np.testing.assert_allclose(found, expected.transpose(1, 2).numpy(), atol=1e-5)


@pytest.mark.parametrize("d_head", [10, 64, 80, 128])
@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0])
def test_frequencies__equal_transformers_but_for_one_unit_in_the_last_place(d_head, theta):
    expected = (1.0 / (theta ** (torch.arange(0, d_head, 2, dtype=torch.int64).float() / d_head))).numpy()
    found = np.array(Rotary(theta=theta).frequencies(d_head), np.float32)
    np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    assert (found != expected).sum() <= 1


@pytest.mark.parametrize("d_head", [64, 128])
@pytest.mark.parametrize(
    ("kind", "own"), [("llama3", LLAMA3), ("llama3", LLAMA3 | {"factor": 32.0}), ("linear", {"factor": 4.0})]
)
def test_frequencies__of_scaled_positions_equal_transformers(d_head, kind, own):
    parameters = {"rope_type": kind, "rope_theta": 500_000.0, **own}
    config = LlamaConfig(hidden_size=2 * d_head, num_attention_heads=2, rope_parameters=parameters)
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    found = np.array(Rotary(theta=500_000.0, kind=kind, **own).frequencies(d_head), np.float32)
    assert factor == 1.0
    np.testing.assert_allclose(found, expected.numpy(), rtol=3e-7)
    plain = np.array(Rotary(theta=500_000.0).frequencies(d_head))
    assert found[-1] == pytest.approx(plain[-1] / own["factor"])
    assert (found[0] == plain[0]) == (kind == "llama3")


def attention_by_loops(query, key, value, n_seen, scale):
    """Return the mix of values in float64, where a token sees `n_seen` slots up to its own."""
    mixed, n_served = np.zeros(query.shape), query.shape[2] // key.shape[2]
    for row, token, head in np.ndindex(query.shape[:3]):
        group = head // n_served
        slots = range(max(0, token + 1 - n_seen), token + 1)
        scores = [scale * float(query[row, token, head] @ key[row, slot, group]) for slot in slots]
        weights = np.exp(np.array(scores) - max(scores))
        for weight, slot in zip(weights / weights.sum(), slots, strict=True):
            mixed[row, token, head] += weight * value[row, slot, group]
    return mixed


@pytest.mark.parametrize("window", [None, 1, 3, 99])
def test_attend__equals_a_plain_loop_over_the_heads_each_key_serves(window):
    query, key, value = random_array(2, 7, 6, 4), random_array(2, 7, 3, 4, seed=1), random_array(2, 7, 3, 4, seed=2)
    sight = layers.Sight(jnp.broadcast_to(jnp.arange(7), (2, 7)))
    mixed, _ = sight.attend(*map(jnp.asarray, (query, key, value)), scale=0.7, dtype="float32", window=window)
    expected = attention_by_loops(query, key, value, 99 if window is None else window, 0.7)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_norms__equal_torch():
    x = 3 * random_array(2, 5, 8) + 1
    weight, bias = random_array(8, seed=1), random_array(8, seed=2)
    norm, rms = layers.LayerNorm(8), layers.RMSNorm(8)
    norm.weight[...], norm.bias[...], rms.weight[...] = weight, bias, weight
    expected = torch.nn.functional.layer_norm(torch.tensor(x), (8,), torch.tensor(weight), torch.tensor(bias), 0.3)
    np.testing.assert_allclose(norm(jnp.asarray(x), 0.3), expected.numpy(), atol=1e-5)
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (8,), torch.tensor(weight), 0.3)
    np.testing.assert_allclose(rms(jnp.asarray(x), 0.3), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("n_heads", "n_key_heads"), [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("n_rows", [1, 2, 16])
def test_attend__one_token_a_row_in_bfloat16__is_near_float32(n_rows, n_heads, n_key_heads):
    # Products of bfloat16s in batches of single rows of this width are what XLA has no program for on a CPU.
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(n_rows, 1, n_heads, 64)), jnp.float32)
    fresh = jnp.asarray(rng.normal(size=(n_rows, 1, n_key_heads, 64)), jnp.float32)
    slots = jnp.asarray(rng.normal(size=(n_rows, n_key_heads, 24, 64)), jnp.bfloat16)
    positions = jnp.full((n_rows, 1), 7)

    @functools.partial(jax.jit, static_argnums=0)
    def attend(dtype, query, fresh, slots):
        return layers.Sight(positions, slots, slots).attend(query, fresh, fresh, scale=0.125, dtype=dtype)[0]

    exact = attend("float32", query, fresh, slots.astype(jnp.float32))
    np.testing.assert_allclose(attend("bfloat16", query, fresh, slots), exact, atol=0.03)
