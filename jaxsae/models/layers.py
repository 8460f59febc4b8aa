"""Building blocks of the language models: dots at a stated precision, norms, rotary positions, attention, the scan.

A module holds its weights as `nnx.Param` and gets everything else, the compute dtype included, as arguments. Matrices
are [out, in], and tables have one row an id. Norms, softmax, biases and the residual stream are float32 whatever the
compute dtype; only the two operands of a dot are rounded to it, and its sum is float32 again.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, Integer

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


def project(x: Float[Array, "B T d_in"], weight: Float[Array, "d_out d_in"], dtype: str) -> Float[Array, "B T d_out"]:
    """Return x Wᵀ.

    For one token a row, where reading W is the cost, W is the left operand and the result is turned over: on a CPU XLA
    does this 1.3 to 2.5 times as fast, for 4 to 64 rows. The barrier keeps it from turning the dot itself over.
    """
    if x.shape[1] > 1:
        return einsum("bti,oi->bto", x, weight, dtype)
    turned = einsum("oi,bti->obt", weight, x, dtype)
    return jnp.moveaxis(jax.lax.optimization_barrier(turned), 0, -1)


class Embedding(nnx.Module):
    """A table of vectors, one row an id."""

    def __init__(self, key: Array, n_rows: int, d_model: int, *, std: float):
        self.weight = nnx.Param(std * jax.random.normal(key, (n_rows, d_model)))

    def __call__(self, ids: Int[Array, "*axes"]) -> Float[Array, "*axes D"]:
        """Look rows up; they come back as float32."""
        return self.weight[...][ids].astype(jnp.float32)


def unembed(x: Float[Array, "B T D"], table: Embedding, dtype: str) -> Float[Array, "B T V"]:
    """Return the logits where the input embeddings serve as the output matrix."""
    return einsum("btd,vd->btv", x, table.weight[...], dtype)


class Linear(nnx.Module):
    """An affine map with its weight as [out, in]; the bias is optional."""

    def __init__(self, key: Array, d_in: int, d_out: int, *, std: float, has_bias: bool = False):
        self.weight = nnx.Param(std * jax.random.normal(key, (d_out, d_in)))
        if has_bias:
            self.bias = nnx.Param(jnp.zeros(d_out))

    def __call__(self, x: Float[Array, "B T d_in"], dtype: str) -> Float[Array, "B T d_out"]:
        """Return x Wᵀ, plus b where there is one."""
        mapped = project(x, self.weight[...], dtype)
        return mapped + self.bias[...].astype(jnp.float32) if hasattr(self, "bias") else mapped


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


class RMSNorm(nnx.Module):
    """Divide by the root mean square over the last axis and scale; in float32."""

    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*axes D"], epsilon: float) -> Float[Array, "*axes D"]:
        """Normalise over the last axis; `epsilon` is added to the mean square."""
        normal = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
        return normal * self.weight[...].astype(jnp.float32)


def split_heads(x: Float[Array, "B T width"], d_head: int) -> Float[Array, "B T heads C"]:
    """Cut the last axis into heads of width `d_head`."""
    return x.reshape(*x.shape[:2], -1, d_head)


def rotate(
    x: Float[Array, "B T H C"], positions: Int[Array, "B T"], frequencies: tuple[float, ...]
) -> Float[Array, "B T H C"]:
    """Turn the coordinates (i, i + n) of each head by position * frequency i, for n frequencies; others stay.

    Args:
        frequencies: radians per position (`config_fields.Rotary.frequencies`).

    Source: Su et al. 2021, arXiv:2104.09864, eq. (34), with the coordinates of a pair n apart, not neighbours.
    """
    half = len(frequencies)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)


@struct.dataclass
class Sight:
    """Where the tokens at hand stand, and the earlier keys and values that attention sees beside theirs.

    Attributes:
        positions: of the tokens at hand.
        keys: of one layer, or of all: stacked along a leading axis, or one array a layer (`unroll_blocks`). Slot s of
            the S holds position s of its row. None when the tokens at hand are whole texts, positions 0 to T - 1.
        values: as keys.
    """

    positions: Int[Array, "B T"]
    keys: Float[Array, "*L B G S C"] | tuple[Float[Array, "B G S C"], ...] | None = None
    values: Float[Array, "*L B G S C"] | tuple[Float[Array, "B G S C"], ...] | None = None

    def attend(
        self,
        query: Float[Array, "B T H C"],
        key: Float[Array, "B T G C"],
        value: Float[Array, "B T G C"],
        *,
        scale: float | Float[Array, ""],
        dtype: str,
        window: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T H C"], "Sight"]:
        """Mix the values that each token sees, and return with them the sight that holds these keys and values too.

        A token sees its own position and those before it, or the last `window` of these.
        """
        keys, values = self._fill(self.keys, key), self._fill(self.values, value)
        slots, at = jnp.arange(keys.shape[2]), self.positions[..., None]
        visible = slots <= at
        if window is not None:
            visible &= slots > at - window
        mixed = attention(query, keys, values, visible, scale=scale, dtype=dtype)
        return mixed, Sight(self.positions, keys, values)

    def _fill(self, slots: Any, fresh: Float[Array, "B T G C"]) -> Float[Array, "B G S C"]:
        """Write what belongs to the tokens at hand into the slots of their positions; or make it the slots."""
        if slots is None:
            return jnp.swapaxes(fresh, 1, 2)
        return slots.at[jnp.arange(len(fresh))[:, None], :, self.positions].set(fresh.astype(slots.dtype))


def attention(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B G S C"],
    value: Float[Array, "B G S C"],
    visible: Bool[Array, "B T S"],
    *,
    scale: float | Float[Array, ""],
    dtype: str,
) -> Float[Array, "B T H C"]:
    """Mix the visible values by softmax(scale * query·key); scores and softmax in float32.

    Each of the G heads of keys and values serves H / G neighbouring heads of queries. These and the positions are laid
    out as the rows of one matrix for each row and head of keys, and the mixture is divided by the sum of the (rounded)
    weights last: on a CPU twice as fast as a dot over all axes by name.
    """
    dot = _single_row_einsum if query.shape[1] == 1 else einsum
    n_rows, n_tokens, _, d_head = query.shape
    n_groups, n_slots = key.shape[1:3]
    by_group = jnp.moveaxis(query.reshape(n_rows, n_tokens, n_groups, -1, d_head), 1, 3)
    flat_query = by_group.reshape(n_rows * n_groups, -1, d_head)
    flat_key, flat_value = (part.reshape(n_rows * n_groups, n_slots, d_head) for part in (key, value))
    scores = dot("xqc,xsc->xqs", flat_query, flat_key, dtype).reshape(*by_group.shape[:4], n_slots) * scale
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(dtype).astype(jnp.float32)
    mixed = dot("xqs,xsc->xqc", weights.reshape(*flat_query.shape[:2], n_slots), flat_value, dtype)
    mixed = mixed.reshape(by_group.shape) / weights.sum(-1, keepdims=True)
    return jnp.moveaxis(mixed, 3, 1).reshape(query.shape)


def _single_row_einsum(
    formula: str, left: Float[Array, "..."], right: Float[Array, "..."], dtype: str
) -> Float[Array, "..."]:
    """Return what `einsum` does, where a CPU has no product of bfloat16s: for a batch of single rows.

    There the rounded operands are multiplied in float32, which holds the products exactly.
    """
    if dtype == "float32":
        return einsum(formula, left, right, dtype)

    def on_cpu(left, right):
        return einsum(formula, left.astype(dtype).astype(jnp.float32), right.astype(jnp.float32), "float32")

    def elsewhere(left, right):
        return einsum(formula, left, right, dtype)

    return jax.lax.platform_dependent(left, right.astype(dtype), cpu=on_cpu, default=elsewhere)


def tensor_name(path: tuple[str, ...], *, blocks: str) -> str:
    """Return a checkpoint's name of a weight, without the base prefix; `{layer}` stands for the block's index.

    Args:
        blocks: how the checkpoint calls the list of blocks.
    """
    return ".".join((blocks, "{layer}", *path[1:]) if path[0] == "blocks" else path)


def stack_blocks(make_block: Callable[[Array], nnx.Module], keys: Array) -> nnx.Module:
    """Return one block module whose every weight has a leading layer axis, one key a layer."""
    return nnx.merge(*jax.vmap(lambda key: nnx.split(make_block(key)))(keys))


def scan_blocks(
    blocks: nnx.Module,
    x: Float[Array, "B T D"],
    sight: Sight,
    apply: Callable[[Any, Int[Array, ""], Float[Array, "B T D"], Sight], tuple[Float[Array, "B T D"], Sight]],
    *,
    n_layers: int,
    keep: str = "",
) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"] | None, Sight | None]:
    """Run x through all blocks.

    Args:
        sight: of all layers: `keys` and `values`, where there are any, have a leading layer axis.
        apply: `apply(block, index, x, sight) -> x, sight` for one block.
        keep: what to return of every block: "residuals", "sight", both with a space between them, or nothing.

    Returns:
        The last output; the output of every block; the sight of all layers after the tokens at hand.
    """
    graph, stacked = nnx.split(blocks)

    def step(x, layer):
        weights, index, keys, values = layer
        x, seen = apply(nnx.merge(graph, weights), index, x, dataclasses.replace(sight, keys=keys, values=values))
        return x, (x if "residuals" in keep else None, (seen.keys, seen.values) if "sight" in keep else None)

    last, (resid, seen) = jax.lax.scan(step, x, (stacked, jnp.arange(n_layers), sight.keys, sight.values))
    return last, resid, None if seen is None else dataclasses.replace(sight, keys=seen[0], values=seen[1])


def unroll_blocks(
    blocks: Iterable[nnx.Module],
    x: Float[Array, "B T D"],
    sight: Sight,
    apply: Callable[[Any, Int[Array, ""], Float[Array, "B T D"], Sight], tuple[Float[Array, "B T D"], Sight]],
) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"], Sight]:
    """Run x through the blocks, each a module of its own, as `scan_blocks` does; everything of every block is kept.

    A scan copies the weights of each layer out of their stack, and each layer's keys and values in and out of theirs;
    here nothing is copied, but the program grows with the number of layers.

    Args:
        sight: `keys` and `values` are one array a layer.
    """
    resid, keys, values = [], list(sight.keys or ()), list(sight.values or ())
    for index, block in enumerate(blocks):
        x, seen = apply(block, jnp.int32(index), x, Sight(sight.positions, keys[index], values[index]))
        resid.append(x)
        keys[index], values[index] = seen.keys, seen.values
    return x, jnp.stack(resid), Sight(sight.positions, tuple(keys), tuple(values))


def scan_blocks_after(
    blocks: nnx.Module,
    layer: LayerIndex,
    x: Float[Array, "B T D"],
    sight: Sight,
    apply: Callable[[Any, Int[Array, ""], Float[Array, "B T D"], Sight], tuple[Float[Array, "B T D"], Sight]],
    *,
    n_layers: int,
) -> Float[Array, "B T D"]:
    """Run x, the output of block `layer`, through the blocks after it; `layer` may be traced, and -1 runs them all."""
    graph, stacked = nnx.split(blocks)

    def step(x, at):
        weights, index = at
        return jax.lax.cond(
            index > layer, lambda x: apply(nnx.merge(graph, weights), index, x, sight)[0], lambda x: x, x
        ), None

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
