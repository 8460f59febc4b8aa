"""The SAE architectures, each written for one layer: how it encodes while training and afterwards.

A suite is these functions under `jax.vmap`. Inside a sharded step the rows of a batch are spread along a mesh axis,
whose name is passed as `axis`; with `axis=None` the batch is whole.

To add an architecture: a pair of functions and an entry in `ARCHITECTURES`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxsae.artifacts import InputError

AnyArray = Array | np.ndarray


@flax.struct.dataclass
class SaeParams:
    """The weights of one layer's SAE (or, with a leading axis, of all layers').

    The decoder is stored as rows, one direction in the residual stream for each latent. Fields of a pytree are `Any`:
    jax and optax also fill it with shapes, shardings and norms.

    Attributes:
        W_enc: [D F].    b_enc: [F].    W_dec: [F D].    b_dec: [D].
    """

    W_enc: Any
    b_enc: Any
    W_dec: Any
    b_dec: Any


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What sets an architecture apart.

    Attributes:
        encode_train: (pre [B F], k, threshold, axis) -> (features [B F], the batch's threshold).
        encode: (pre [B F], k, threshold) -> features [B F], the same for a row whatever the batch.
        centres_input: the encoder reads acts - b_dec, and inputs are scaled so that E|x|^2 = D.
        learns_threshold: the threshold at inference is estimated from the training batches.
        sparsity: "l0" (fixed by k, dead latents revived by an auxiliary loss) or "l1" (a penalty).
    """

    encode_train: Callable
    encode: Callable
    centres_input: bool
    learns_threshold: bool
    sparsity: str


def architecture(name: str) -> Architecture:
    """Return an architecture by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"sae.architecture is {name!r}, expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def dot(left: Float[Array, "... A"], right: Float[AnyArray, "A Z"], dtype: DTypeLike) -> Float[Array, "... Z"]:
    """Multiply with operands in `dtype` and a float32 outcome; float32 operands are not rounded on any device."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.matmul(left.astype(dtype), right.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def pre_activations(
    params: SaeParams, acts: Float[Array, "B D"], *, centres_input: bool, dtype: DTypeLike = jnp.float32
) -> Float[Array, "B F"]:
    """Return the encoder's linear part, before anything sets it to zero."""
    if centres_input:
        acts = acts - params.b_dec
    return dot(acts, params.W_enc, dtype) + params.b_enc


def decode(params: SaeParams, feats: Float[Array, "B F"], *, dtype: DTypeLike = jnp.float32) -> Float[Array, "B D"]:
    """Return the reconstruction: the features' decoder rows, weighted, plus b_dec."""
    return dot(feats, params.W_dec, dtype) + params.b_dec


def keep_topk(pre: Float[Array, "B F"], k: int) -> Float[Array, "B F"]:
    """Keep the k largest positive entries of each row, zero the rest; the lowest index wins a tie.

    Source: Gao et al. 2024, arXiv:2406.04093, section 2.3.
    """
    values, ids = lax.top_k(pre, min(k, pre.shape[-1]))
    rows = jnp.arange(pre.shape[0])[:, None]
    return jnp.zeros_like(pre).at[rows, ids].set(jax.nn.relu(values), unique_indices=True, mode="promise_in_bounds")


def keep_batch_topk(
    pre: Float[Array, "B F"], k: int, axis: str | None = None
) -> tuple[Float[Array, "B F"], Float[Array, ""]]:
    """Keep the B k largest positive entries of the whole batch; also return the smallest value kept.

    B counts the rows of every shard along `axis`. Entries equal to the smallest kept value are all kept. With fewer
    than B k positive entries all of them are kept and the threshold is 0.

    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    positive = jax.nn.relu(pre)
    n_keep = pre.shape[0] * k * (1 if axis is None else lax.axis_size(axis))
    threshold = lax.stop_gradient(kth_largest(lax.stop_gradient(positive), n_keep, 4 * k, axis))
    return jnp.where(positive >= threshold, positive, 0.0), threshold


def kth_largest(values: Float[Array, "B F"], n: int, n_row: int, axis: str | None) -> Float[Array, ""]:
    """Return the n-th largest of non-negative values over all shards, exactly, without sorting them.

    The bit patterns of non-negative floats are ordered like the floats, so bisecting 31 bits by counting finds the
    value. Each row's `n_row` largest are searched first; every value is searched, from there on, only when some row
    may hold more than `n_row` of the n largest.
    """
    kept = lax.top_k(values, min(n_row, values.shape[-1]))[0]
    top = _max(lax.bitcast_convert_type(kept.max(), jnp.int32), axis)
    low = _bisect(_bits(kept), n, jnp.zeros_like(top), top + 1, axis)
    row_is_full = (_bits(kept)[:, -1] >= low).any() & (kept.shape[-1] < values.shape[-1])
    high = jnp.where(_max(row_is_full.astype(jnp.int32), axis) > 0, top + 1, low + 1)
    return lax.bitcast_convert_type(_bisect(_bits(values), n, low, high, axis), jnp.float32)


def _bisect(
    bits: Int[Array, "B K"], n: int, low: Int[Array, ""], high: Int[Array, ""], axis: str | None
) -> Int[Array, ""]:
    """Return the largest b in [low, high) with at least n of `bits` >= b, given that it holds for low."""

    def halve(bounds: tuple) -> tuple:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = _sum(jnp.sum(bits >= middle, dtype=jnp.int32), axis) >= n
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    return lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, halve, (low, high))[0]


def _bits(values: Float[Array, "..."]) -> Int[Array, "..."]:
    return lax.bitcast_convert_type(values, jnp.int32)


def _sum(x: Array, axis: str | None) -> Array:
    return x if axis is None else lax.psum(x, axis)


def _max(x: Array, axis: str | None) -> Array:
    return x if axis is None else lax.pmax(x, axis)


def keep_above(pre: Float[Array, "B F"], threshold: Float[AnyArray, "*F"]) -> Float[Array, "B F"]:
    """Keep entries strictly above a threshold (0 keeps the positive ones), zero the rest: JumpReLU.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435, eq. (3).
    """
    return jnp.where(pre > jnp.maximum(threshold, 0.0), pre, 0.0)


def _train_topk(pre: Float[Array, "B F"], k: int, threshold: Float[Array, ""], axis: str | None):
    return keep_topk(pre, k), jnp.zeros_like(threshold)


def _train_batch_topk(pre: Float[Array, "B F"], k: int, threshold: Float[Array, ""], axis: str | None):
    return keep_batch_topk(pre, k, axis)


def _train_jumprelu(pre: Float[Array, "B F"], k: int, threshold: Float[Array, ""], axis: str | None):
    return keep_above(pre, threshold), threshold


def _encode_topk(pre: Float[Array, "B F"], k: int, threshold: Float[AnyArray, " F"]):
    return keep_topk(pre, k)


def _encode_above(pre: Float[Array, "B F"], k: int, threshold: Float[AnyArray, " F"]):
    return keep_above(pre, threshold)


ARCHITECTURES = {
    "topk": Architecture(_train_topk, _encode_topk, centres_input=True, learns_threshold=False, sparsity="l0"),
    "batchtopk": Architecture(
        _train_batch_topk, _encode_above, centres_input=True, learns_threshold=True, sparsity="l0"
    ),
    # The published run's: one fixed threshold without a gradient, an L1 penalty, inputs as they are.
    "jumprelu_l1": Architecture(
        _train_jumprelu, _encode_above, centres_input=False, learns_threshold=False, sparsity="l1"
    ),
}


def revive(
    pre: Float[Array, "B F"], is_dead: Bool[Array, " F"], n_revived: int
) -> tuple[Float[Array, "B F"], Float[Array, ""]]:
    """Return each row's `n_revived` largest pre-activations among the dead latents, and whether there are any.

    They are not rectified, so that a dead latent learns also where its pre-activation is negative.
    """
    masked = jnp.where(is_dead, pre, -jnp.inf)
    values, ids = lax.top_k(masked, min(n_revived, pre.shape[-1]))
    rows = jnp.arange(pre.shape[0])[:, None]
    values = jnp.where(jnp.isfinite(values), values, 0.0)
    feats = jnp.zeros_like(pre).at[rows, ids].set(values, unique_indices=True, mode="promise_in_bounds")
    return feats, is_dead.any().astype(jnp.float32)
