"""The training losses of one layer's SAE, as this shard's share of the loss over the whole batch.

The shares of all shards add up to the loss, and their gradients to its gradient, so that a sharded step needs one
sum of gradients and equals the unsharded one.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from jaxsae.config import SaeConfig
from jaxsae.sae import sparse
from jaxsae.sae.autoencoder import SaeParams, decode, dot, pre_activations, with_unit_rows
from jaxsae.sae.selection import Codes, rank_in_row

_BAR_WEIGHT = 0.3  # of what a dead latent lacks to be kept, beside what dead latents leave unexplained


@flax.struct.dataclass
class Moment:
    """What a loss depends on beside weights and rows.

    Attributes:
        variance: mean squared distance of a row from the mean row, scaled; makes a loss a fraction of variance.
        is_dead: [F].
        progress: share of the run's steps that are done, 0 to 1.
        config: the suite's settings.
        axis: the mesh axis along which rows are spread, or None.
        latent_axis: the mesh axis along which latents are spread, or None. A loss is the same on all their shards, so
            that whatever it sums over latents goes through `all_latents`.
        is_sparse: compute by codes, where the architecture has them.
        dtype: of the operands of matrix products.
    """

    variance: Any
    is_dead: Any
    progress: Any
    config: SaeConfig = flax.struct.field(pytree_node=False)
    axis: str | None = flax.struct.field(pytree_node=False, default=None)
    latent_axis: str | None = flax.struct.field(pytree_node=False, default=None)
    is_sparse: bool = flax.struct.field(pytree_node=False, default=False)
    dtype: DTypeLike = flax.struct.field(pytree_node=False, default=jnp.float32)

    def n_rows(self, acts: Float[Array, "B D"]) -> int:
        """Return the rows of all shards together."""
        return acts.shape[0] * (1 if self.axis is None else lax.axis_size(self.axis))

    def total(self, x: Float[Array, ""]) -> Float[Array, ""]:
        """Return the sum over all shards of rows."""
        return x if self.axis is None else lax.psum(x, self.axis)

    def n_latents(self, feats: Float[Array, "B F"]) -> int:
        """Return the latents of all shards together."""
        return feats.shape[-1] * (1 if self.latent_axis is None else lax.axis_size(self.latent_axis))

    def least(self, x: Float[Array, "*_"]) -> Float[Array, "*_"]:
        """Return the least over all shards of rows."""
        return x if self.axis is None else lax.pmin(x, self.axis)

    def least_of_latents(self, x: Float[Array, "*_"]) -> Float[Array, "*_"]:
        """Return the least over all shards of latents."""
        return x if self.latent_axis is None else lax.pmin(x, self.latent_axis)

    def all_latents(self, x: Shaped[Array, "*_"]) -> Shaped[Array, "*_"]:
        """Return the sum over all shards of latents."""
        return x if self.latent_axis is None else lax.psum(x, self.latent_axis)

    def on_latents(self, x: Float[Array, "*_"]) -> Float[Array, "*_"]:
        """Return what all shards of latents share, as each one's own; its gradient is the sum of theirs."""
        return x if self.latent_axis is None else lax.pcast(x, self.latent_axis, to="varying")

    def decode(self, params: SaeParams, feats: Float[Array, "B F"]) -> Float[Array, "B D"]:
        """Return the reconstruction from the features of all shards."""
        return decode(params, feats, dtype=self.dtype, axis=self.latent_axis)

    def share(self, energy: Float[Array, "B _"]) -> Float[Array, ""]:
        """Return this shard's sum of what a row adds to its squared error, as a fraction of the rows' variance."""
        return jnp.sum(energy) / (self.n_rows(energy) * self.variance)


@flax.struct.dataclass
class BatchCounts:
    """Sums over this shard's rows, for one layer; the latter two of this shard's latents.

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
        bar: [B] or [], what a row's pre-activation had to exceed to be kept, of this shard's latents; None where that
            is learned.
    """

    counts: BatchCounts
    error: Any
    threshold: Any
    bar: Any


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
    bar: Float[Array, "*B"] | None = None,
) -> tuple[Float[Array, ""], Seen]:
    """Return the loss, and what it saw; a threshold is also the bar."""
    squared_error = jnp.sum(error**2)
    bar = threshold if bar is None else bar
    counts = BatchCounts(loss, squared_error, fired.sum(), fired)
    return loss, lax.stop_gradient(Seen(counts, error, threshold, bar))


def fraction_of_variance(error: Float[Array, "B D"], moment: Moment) -> Float[Array, ""]:
    """Return sum |x - x_hat|^2 / (B variance)."""
    return moment.share(error**2)


def dense_loss(
    params: SaeParams,
    acts: Float[Array, "B D"],
    feats: Float[Array, "B F"],
    moment: Moment,
    threshold: Float[Array, ""] | None = None,
    bar: Float[Array, "*B"] | None = None,
) -> tuple[Float[Array, ""], Seen]:
    """Return the unexplained fraction of variance, with features that are dense arrays."""
    error = acts - moment.decode(params, feats)
    return see(fraction_of_variance(error, moment), error, count_fired(feats), threshold, bar)


def sparse_loss(
    params: SaeParams,
    acts: Float[Array, "B D"],
    codes: Codes,
    lengths: Float[Array, " F"],
    moment: Moment,
    threshold: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Seen]:
    """Return what `dense_loss` returns of the SAE with unit decoder rows that is the same, by codes.

    What a latent adds to the reconstruction does not depend on the length of its row: only its value in the codes does,
    by which it was ranked.

    Args:
        params: decoder rows of any length; their gradients are of these.
        codes: of the SAE with unit rows; they come from an encoder that reads activations - b_dec.
        lengths: of the rows.
    """
    own = dataclasses.replace(codes, values=codes.values / lengths.at[codes.ids].get(mode="promise_in_bounds"))
    encoding = dataclasses.replace(params, b_dec=moment.on_latents(params.b_dec))
    order = sparse.by_latent(own, len(params.b_enc))
    values = sparse.attach(encoding, acts - lax.stop_gradient(params.b_dec), own, order)
    recon = sparse.decode(params.W_dec, values, own, order, moment.on_latents(acts))
    is_active = (codes.values > 0).astype(jnp.float32)
    fired = jnp.zeros_like(params.b_enc).at[codes.ids].add(is_active, mode="promise_in_bounds")
    if codes.crowded is not None:
        rows, kept = acts.at[codes.crowded.rows].get(mode="fill", fill_value=0.0), codes.crowded.kept
        feats = jnp.where(kept, encoder(params, rows, centres_input=True, dtype=moment.dtype), 0.0)
        recon = recon.at[codes.crowded.rows].add(dot(feats, params.W_dec, moment.dtype), mode="drop")
        fired += kept.astype(jnp.float32).sum(axis=0)
    error = acts - (moment.all_latents(recon) + params.b_dec)
    bar = smallest_kept(codes.values) if threshold is None else None
    return see(fraction_of_variance(error, moment), error, fired, threshold, bar)


def smallest_kept(values: Float[Array, "B K"]) -> Float[Array, " B"]:
    """Return each row's smallest value above zero; infinity where none is."""
    return jnp.min(jnp.where(values > 0, values, jnp.inf), axis=-1)


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
    bar: Float[Array, "*B"] | None = None,
    has_free_rows: bool = False,
) -> Float[Array, ""]:
    """Return how badly the dead latents alone explain what the living ones left over, plus how far they are from life.

    The first is a fraction of the leftover's energy. The D/2 dead latents with a row's largest pre-activations take
    part in it. They are not rectified, so that a dead latent learns also where its pre-activation is negative. The
    leftover is a constant here, and b_dec is not added to its reconstruction a second time. Source: Gao et al. 2024,
    arXiv:2406.04093, appendix A.2.

    What is left over is small beside what is kept, so that a latent may explain it and yet be kept on no row. The
    second therefore is, summed over the dead latents, how much is missing on the row of the whole batch where a latent
    comes nearest to being kept, in standard deviations of a row; each one's row is another. Without it 14 % of the
    latents of the demo's last layer are dead after 300 steps, with it 1 %.

    Args:
        acts: this shard's rows, scaled.
        error: the leftover.
        few: at most D/2 latents are dead, so that all of them take part: only their weights are read.
        bar: what a row's pre-activation has to exceed; None leaves the second part out.
        has_free_rows: the loss is of the SAE with unit decoder rows that is the same as `params`.
    """
    n_revived = error.shape[-1] // 2
    is_dead, weights = _of_dead(params, moment.is_dead, n_revived) if few else (moment.is_dead, params)
    if has_free_rows:
        weights = with_unit_rows(weights)
    pre = encoder(weights, acts, centres_input=True, dtype=moment.dtype)
    feats = jnp.where(is_dead, pre, 0.0) if few else revive(pre, is_dead, n_revived, moment.latent_axis)
    energy = moment.total(jnp.sum(error**2))
    unexplained = jnp.sum((error - moment.all_latents(dot(feats, weights.W_dec, moment.dtype))) ** 2)
    loss = unexplained / jnp.maximum(energy, jnp.finfo(jnp.float32).tiny)
    return loss if bar is None else loss + _BAR_WEIGHT * _short_of_bar(pre, acts - params.b_dec, is_dead, bar, moment)


def _short_of_bar(
    pre: Float[Array, "B F"],
    centred: Float[Array, "B D"],
    is_dead: Bool[Array, " F"],
    bar: Float[Array, "*B"],
    moment: Moment,
) -> Float[Array, ""]:
    """Return this shard's share of what each dead latent lacks on its row, summed over them.

    Its row is that of the largest pre-activation for its length: of pre-activations as they are, rows far out would
    have the largest of all latents.
    """
    lowest = moment.least_of_latents(bar) if bar.ndim else bar
    lowest = jnp.where(jnp.isfinite(lowest), lowest, 0.0)
    lengths = lax.stop_gradient(jnp.linalg.norm(centred, axis=-1))
    nearness = lax.stop_gradient(pre) / lengths[:, None]
    rows, far = jnp.argmax(nearness, axis=0), -nearness.max(axis=0)
    is_here = far == moment.least(far)  # of all shards' rows, on this one
    bars = lowest[rows] if bar.ndim else lowest
    missing = jax.nn.relu(bars - jnp.take_along_axis(pre, rows[None], axis=0)[0]) / lengths[rows]
    return moment.all_latents(jnp.sum(jnp.where(is_here & is_dead, missing, 0.0)))


def _of_dead(params: SaeParams, is_dead: Bool[Array, " F"], n: int) -> tuple[Bool[Array, " n"], SaeParams]:
    """Return the weights of `n` latents (all, if those are fewer), the dead ones first, and which of them are dead."""
    n = min(n, len(is_dead))
    ids = jnp.nonzero(is_dead, size=n, fill_value=0)[0]
    return jnp.arange(n) < is_dead.sum(), dataclasses.replace(
        params, W_enc=params.W_enc[:, ids], b_enc=params.b_enc[ids], W_dec=params.W_dec[ids]
    )


def revive(
    pre: Float[Array, "B F"], is_dead: Bool[Array, " F"], n_revived: int, latent_axis: str | None = None
) -> Float[Array, "B F"]:
    """Return each row's `n_revived` largest pre-activations among the dead latents of all shards, and zeros."""
    values, ids = lax.top_k(jnp.where(is_dead, pre, -jnp.inf), min(n_revived, pre.shape[-1]))
    is_kept = jnp.isfinite(values)
    if latent_axis is not None:
        is_kept &= rank_in_row(values, n_revived, latent_axis) < n_revived
    rows = jnp.arange(pre.shape[0])[:, None]
    values = jnp.where(is_kept, values, 0.0)
    return jnp.zeros_like(pre).at[rows, ids].set(values, unique_indices=True, mode="promise_in_bounds")
