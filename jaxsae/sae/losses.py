"""The training losses of one layer's SAE, as this shard's share of the loss over the whole batch.

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
from jaxsae.sae import sparse
from jaxsae.sae.autoencoder import SaeParams, decode, dot, pre_activations
from jaxsae.sae.selection import Codes


@flax.struct.dataclass
class Moment:
    """What a loss depends on beside weights and rows.

    Attributes:
        variance: mean squared distance of a row from the mean row, scaled; makes a loss a fraction of variance.
        is_dead: [F].
        progress: share of the run's steps that are done, 0 to 1.
        config: the suite's settings.
        axis: the mesh axis along which rows are spread, or None.
        is_sparse: compute by codes, where the architecture has them.
        dtype: of the operands of matrix products.
    """

    variance: Any
    is_dead: Any
    progress: Any
    config: SaeConfig = flax.struct.field(pytree_node=False)
    axis: str | None = flax.struct.field(pytree_node=False, default=None)
    is_sparse: bool = flax.struct.field(pytree_node=False, default=False)
    dtype: DTypeLike = flax.struct.field(pytree_node=False, default=jnp.float32)

    def n_rows(self, acts: Float[Array, "B D"]) -> int:
        """Return the rows of all shards together."""
        return acts.shape[0] * (1 if self.axis is None else lax.axis_size(self.axis))


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


@flax.struct.dataclass
class Seen:
    """What a loss saw on its way, without gradients.

    Attributes:
        counts: sums over the rows.
        error: [B D], what the reconstruction left over.
        threshold: the smallest kept activation of the batch, where the architecture looks for it.
    """

    counts: BatchCounts
    error: Any
    threshold: Any


def encoder(
    params: SaeParams, acts: Float[Array, "B D"], *, centres_input: bool, dtype: DTypeLike
) -> Float[Array, "B F"]:
    """Return the pre-activations; the gradient of b_dec comes from the column sums, without one for the activations."""
    if not centres_input:
        return pre_activations(params, acts, centres_input=False, dtype=dtype)
    fixed = dataclasses.replace(params, b_dec=lax.stop_gradient(params.b_dec))
    zero = fixed.b_dec - params.b_dec
    return pre_activations(fixed, acts, centres_input=True, dtype=dtype) + dot(
        zero, lax.stop_gradient(params.W_enc), dtype
    )


def see(
    loss: Float[Array, ""],
    error: Float[Array, "B D"],
    fired: Float[Array, " F"],
    threshold: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Seen]:
    """Return the loss, and what it saw."""
    squared_error = jnp.sum(error**2)
    counts = BatchCounts(loss, squared_error, fired.sum(), fired)
    return loss, lax.stop_gradient(Seen(counts, error, threshold))


def fraction_of_variance(error: Float[Array, "B D"], moment: Moment) -> Float[Array, ""]:
    """Return sum |x - x_hat|^2 / (B variance)."""
    return jnp.sum(error**2) / (moment.n_rows(error) * moment.variance)


def dense_loss(
    params: SaeParams,
    acts: Float[Array, "B D"],
    feats: Float[Array, "B F"],
    moment: Moment,
    threshold: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Seen]:
    """Return the unexplained fraction of variance, with features that are dense arrays."""
    error = acts - decode(params, feats, dtype=moment.dtype)
    return see(fraction_of_variance(error, moment), error, count_fired(feats), threshold)


def sparse_loss(
    params: SaeParams,
    acts: Float[Array, "B D"],
    codes: Codes,
    moment: Moment,
    threshold: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Seen]:
    """Return what `dense_loss` returns, by codes; they come from an encoder that reads activations - b_dec."""
    values = sparse.attach(params, acts - lax.stop_gradient(params.b_dec), codes)
    error = acts - (sparse.decode(params.W_dec, values, codes, acts) + params.b_dec)
    is_active = (codes.values > 0).astype(jnp.float32)
    fired = jnp.zeros_like(params.b_enc).at[codes.ids].add(is_active, mode="promise_in_bounds")
    return see(fraction_of_variance(error, moment), error, fired, threshold)


def count_fired(feats: Float[Array, "B F"]) -> Float[Array, " F"]:
    """Return the rows on which each latent is above zero."""
    return jnp.sum((feats > 0).astype(jnp.float32), axis=0)


def aux_loss(
    params: SaeParams,
    acts: Float[Array, "B D"],
    error: Float[Array, "B D"],
    moment: Moment,
    *,
    few: bool,
) -> Float[Array, ""]:
    """Return how badly the dead latents alone explain what the living ones left over: a fraction of its energy.

    The D/2 dead latents with a row's largest pre-activations take part in it. They are not rectified, so that a dead
    latent learns also where its pre-activation is negative. The leftover is a constant here, and b_dec is not added to
    its reconstruction a second time.

    Args:
        acts: this shard's rows, scaled.
        error: the leftover.
        few: at most D/2 latents are dead, so that all of them take part: only their weights are read.

    Source: Gao et al. 2024, arXiv:2406.04093, appendix A.2.
    """
    n_revived = min(error.shape[-1] // 2, params.b_enc.shape[-1])
    if few:
        dead, weights = _of_dead(params, moment.is_dead, n_revived)
        feats = jnp.where(dead, encoder(weights, acts, centres_input=True, dtype=moment.dtype), 0.0)
    else:
        weights = params
        feats = revive(encoder(params, acts, centres_input=True, dtype=moment.dtype), moment.is_dead, n_revived)
    energy = jnp.sum(error**2)
    energy = energy if moment.axis is None else lax.psum(energy, moment.axis)
    unexplained = jnp.sum((error - dot(feats, weights.W_dec, moment.dtype)) ** 2)
    return unexplained / jnp.maximum(energy, jnp.finfo(jnp.float32).tiny)


def _of_dead(params: SaeParams, is_dead: Bool[Array, " F"], n: int) -> tuple[Bool[Array, " n"], SaeParams]:
    """Return the weights of `n` latents, the dead ones first, and which of them are dead."""
    ids = jnp.nonzero(is_dead, size=n, fill_value=0)[0]
    return jnp.arange(n) < is_dead.sum(), dataclasses.replace(
        params, W_enc=params.W_enc[:, ids], b_enc=params.b_enc[ids], W_dec=params.W_dec[ids]
    )


def revive(pre: Float[Array, "B F"], is_dead: Bool[Array, " F"], n_revived: int) -> Float[Array, "B F"]:
    """Return each row's `n_revived` largest pre-activations among the dead latents, and zeros."""
    values, ids = lax.top_k(jnp.where(is_dead, pre, -jnp.inf), n_revived)
    rows = jnp.arange(pre.shape[0])[:, None]
    values = jnp.where(jnp.isfinite(values), values, 0.0)
    return jnp.zeros_like(pre).at[rows, ids].set(values, unique_indices=True, mode="promise_in_bounds")
