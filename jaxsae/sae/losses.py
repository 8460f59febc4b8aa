"""The training loss of one layer's SAE, as this shard's share of the loss over the whole batch.

The shares of all shards add up to the loss, and their gradients to its gradient, so that a sharded step needs one
sum of gradients and equals the unsharded one.
"""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxsae.config import SaeConfig
from jaxsae.sae.architectures import SaeParams, architecture, decode, dot, pre_activations, revive


@flax.struct.dataclass
class BatchCounts:
    """Sums over this shard's rows, for one layer.

    Attributes:
        loss: this shard's share of the loss.
        squared_error: sum of |x - x_hat|^2, in the scaled units that the SAE sees.
        n_active: features above zero.
        fired: [F], rows on which each latent is above zero.
    """

    loss: Any
    squared_error: Any
    n_active: Any
    fired: Any


def layer_loss(
    params: SaeParams,
    acts: Float[Array, "B D"],
    variance: Float[Array, ""],
    threshold: Float[Array, ""],
    is_dead: Bool[Array, " F"],
    *,
    config: SaeConfig,
    axis: str | None,
    with_aux: bool,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, ""], tuple[BatchCounts, Float[Array, ""]]]:
    """Return the loss share, and (sums over the rows, the batch's threshold).

    l0 architectures: sum |x - x_hat|^2 / (B variance) + aux_coefficient * aux.
    l1 architectures: mean (x - x_hat)^2 + l1_coefficient * mean |f|, means over rows and coordinates.

    Args:
        acts: this shard's rows, scaled.
        variance: mean squared distance of a row from the mean row, scaled; makes the loss a fraction of variance.
        threshold: of architectures that have a fixed one.
        with_aux: add the loss that revives dead latents; without any, it is zero anyway.
    """
    arch = architecture(config.architecture)
    n_rows = acts.shape[0] * (1 if axis is None else lax.axis_size(axis))
    pre = _pre_activations(params, acts, centres_input=arch.centres_input, dtype=dtype)
    feats, threshold = arch.encode_train(pre, config.k, threshold, axis)
    error = acts - decode(params, feats, dtype=dtype)
    squared_error = jnp.sum(error**2)
    if arch.sparsity == "l1":
        penalty = jnp.sum(jnp.abs(feats)) / (n_rows * feats.shape[-1])
        loss = squared_error / (n_rows * acts.shape[-1]) + config.l1_coefficient * penalty
    else:
        loss = squared_error / (n_rows * variance)
    if with_aux:
        loss += config.aux_coefficient * aux_loss(params, pre, error, is_dead, axis=axis, dtype=dtype)
    is_active = (feats > 0).astype(jnp.float32)
    counts = BatchCounts(
        loss=lax.stop_gradient(loss),
        squared_error=lax.stop_gradient(squared_error),
        n_active=is_active.sum(),
        fired=is_active.sum(axis=0),
    )
    return loss, (counts, threshold)


def _pre_activations(
    params: SaeParams, acts: Float[Array, "B D"], *, centres_input: bool, dtype: DTypeLike
) -> Float[Array, "B F"]:
    """Return the pre-activations, with a cheap gradient for b_dec.

    Through acts - b_dec it would be a product of B D F operations, summed over B. It is the same to sum first.
    """
    if not centres_input:
        return pre_activations(params, acts, centres_input=False, dtype=dtype)
    fixed = dataclasses.replace(params, b_dec=lax.stop_gradient(params.b_dec))
    zero = fixed.b_dec - params.b_dec
    return pre_activations(fixed, acts, centres_input=True, dtype=dtype) + dot(
        zero, lax.stop_gradient(params.W_enc), dtype
    )


def aux_loss(
    params: SaeParams,
    pre: Float[Array, "B F"],
    error: Float[Array, "B D"],
    is_dead: Bool[Array, " F"],
    *,
    axis: str | None,
    dtype: DTypeLike,
) -> Float[Array, ""]:
    """Return how badly the dead latents alone explain what the living ones left over: a fraction of its energy.

    D/2 dead latents a row take part. The leftover is a constant here, and b_dec is not added to its reconstruction
    a second time.

    Source: Gao et al. 2024, arXiv:2406.04093, appendix A.2.
    """
    error = lax.stop_gradient(error)
    feats, any_dead = revive(pre, is_dead, error.shape[-1] // 2)
    energy = jnp.sum(error**2)
    energy = energy if axis is None else lax.psum(energy, axis)
    unexplained = jnp.sum((error - dot(feats, params.W_dec, dtype)) ** 2)
    return any_dead * unexplained / jnp.maximum(energy, jnp.finfo(jnp.float32).tiny)
