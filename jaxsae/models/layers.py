"""Building blocks of the language models: dots at a stated precision, norms, attention, and the scan over blocks.

A module holds its weights as `nnx.Param` and gets everything else, the compute dtype included, as arguments. Weights
keep the shapes of the checkpoints. Norms, softmax, biases and the residual stream are float32 whatever the compute
dtype; only the two operands of a dot are rounded to it, and its sum is float32 again.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from jaxsae.artifacts import InputError

DTYPES = ("float32", "bfloat16")
LayerIndex = int | Integer[Array, ""]


def check_dtype(dtype: str) -> None:
    """Refuse a compute dtype other than float32 (exact) and bfloat16.

    Raises:
        InputError: the dtype has another name.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")


def einsum(formula: str, left: Float[Array, "..."], right: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """Contract two arrays rounded to `dtype`, summing in float32; float32 is exact on every device (no TF32)."""
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT
    operands = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(formula, *operands, precision=precision, preferred_element_type=jnp.float32)


class Embedding(nnx.Module):
    """A table of vectors, one row an id."""

    def __init__(self, key: Array, n_rows: int, d_model: int, *, std: float):
        self.weight = nnx.Param(std * jax.random.normal(key, (n_rows, d_model)))

    def __call__(self, ids: Int[Array, "*axes"]) -> Float[Array, "*axes D"]:
        """Look rows up; they come back as float32."""
        return self.weight[...][ids].astype(jnp.float32)


class Projection(nnx.Module):
    """An affine map with its weight stored as [in, out], as GPT-2's checkpoints do."""

    def __init__(self, key: Array, d_in: int, d_out: int, *, std: float):
        self.weight = nnx.Param(std * jax.random.normal(key, (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out))

    def __call__(self, x: Float[Array, "B T d_in"], dtype: str) -> Float[Array, "B T d_out"]:
        """Return x W + b."""
        return einsum("bti,io->bto", x, self.weight[...], dtype) + self.bias[...].astype(jnp.float32)


class LayerNorm(nnx.Module):
    """Subtract the mean, divide by the standard deviation over the residual width, scale and shift; in float32."""

    def __init__(self, d_model: int):
        self.weight = nnx.Param(jnp.ones(d_model))
        self.bias = nnx.Param(jnp.zeros(d_model))

    def __call__(self, x: Float[Array, "*axes D"], epsilon: float) -> Float[Array, "*axes D"]:
        """Normalise over the last axis; `epsilon` is added to the (biased) variance."""
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + epsilon)
        return normal * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


def causal_attention(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T H C"],
    value: Float[Array, "B T H C"],
    *,
    scale: float | Float[Array, ""],
    dtype: str,
) -> Float[Array, "B T H C"]:
    """Mix the values of positions 0..t into position t by softmax(scale * query·key); scores and softmax in float32."""
    scores = einsum("bqhc,bkhc->bhqk", query, key, dtype) * scale
    n_positions = query.shape[1]
    visible = jnp.tril(jnp.ones((n_positions, n_positions), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return einsum("bhqk,bkhc->bqhc", weights, value, dtype)


def stack_blocks(make_block: Callable[[Array], nnx.Module], keys: Array) -> nnx.Module:
    """Return one block module whose every weight has a leading layer axis, one key a layer."""
    return nnx.merge(*jax.vmap(lambda key: nnx.split(make_block(key)))(keys))


def scan_blocks(
    blocks: nnx.Module, x: Float[Array, "B T D"], apply: Callable, *, n_layers: int, keep: bool
) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"] | None]:
    """Run x through all blocks; return the last output and, with `keep`, the output of every block.

    Args:
        apply: `apply(block, index, x) -> x` for one block.
    """
    graph, stacked = nnx.split(blocks)

    def step(x, layer):
        weights, index = layer
        x = apply(nnx.merge(graph, weights), index, x)
        return x, x if keep else None

    return jax.lax.scan(step, x, (stacked, jnp.arange(n_layers)))


def scan_blocks_after(
    blocks: nnx.Module, layer: LayerIndex, x: Float[Array, "B T D"], apply: Callable, *, n_layers: int
) -> Float[Array, "B T D"]:
    """Run x, the output of block `layer`, through the blocks after it; `layer` may be traced, and -1 runs them all."""
    graph, stacked = nnx.split(blocks)

    def step(x, at):
        weights, index = at
        run = functools.partial(apply, nnx.merge(graph, weights), index)
        return jax.lax.cond(index > layer, run, lambda x: x, x), None

    return jax.lax.scan(step, x, (stacked, jnp.arange(n_layers)))[0]


def _gelu_tanh(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    return jax.nn.gelu(x, approximate=True)


def _gelu_erf(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": _gelu_erf,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu_erf,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
