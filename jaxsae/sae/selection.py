"""Which latents of a row, or of a batch, are kept: as dense features, or as codes (the kept ones alone).

Inside a sharded step the rows of a batch are spread along a mesh axis, whose name is passed as `axis`; with `axis=None`
the batch is whole.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsae.sae.autoencoder import AnyArray

ROW_FACTOR = 4  # a batch's kept latents are looked for among this many times k of each row, before everywhere


@flax.struct.dataclass
class Codes:
    """The kept latents of B rows, K slots for each row on average.

    Attributes:
        ids: [B K] int32, each slot's latent.
        values: [B K], its activation; 0 in a slot that is empty.
        rows: [B K] int32, the row each slot belongs to, ascending through the flattened slots; None where slots lie in
            their own row.
    """

    ids: Int[Array, "B K"]
    values: Float[Array, "B K"]
    rows: Int[Array, "B K"] | None


def keep_above(pre: Float[Array, "B F"], threshold: Float[AnyArray, "*F"]) -> Float[Array, "B F"]:
    """Keep entries strictly above a threshold (0 keeps the positive ones), zero the rest: JumpReLU.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435, eq. (3).
    """
    return jnp.where(pre > jnp.maximum(threshold, 0.0), pre, 0.0)


def keep_topk(pre: Float[Array, "B F"], k: int) -> Float[Array, "B F"]:
    """Keep the k largest positive entries of each row, zero the rest; the lowest index wins a tie.

    Source: Gao et al. 2024, arXiv:2406.04093, section 2.3.
    """
    return spread(topk_codes(pre, k), pre)


def topk_codes(pre: Float[Array, "B F"], k: int, k_now: Float[Array, ""] | None = None) -> Codes:
    """Return the k largest positive entries of each row, descending; with `k_now` at most so many of them."""
    values, ids = lax.top_k(pre, min(k, pre.shape[-1]))
    values = jax.nn.relu(values)
    if k_now is not None:
        values = jnp.where(jnp.arange(values.shape[-1]) < k_now, values, 0.0)
    return Codes(ids, values, None)


def spread(codes: Codes, like: Float[Array, "B F"]) -> Float[Array, "B F"]:
    """Return the codes of `topk_codes` as dense features of the shape of `like`."""
    rows = jnp.arange(like.shape[0])[:, None]
    return jnp.zeros_like(like).at[rows, codes.ids].set(codes.values, unique_indices=True, mode="promise_in_bounds")


def keep_batch_topk(
    pre: Float[Array, "B F"], k: int | Float[Array, ""], *, n_row: int, axis: str | None = None
) -> tuple[Float[Array, "B F"], Float[Array, ""]]:
    """Keep the B k largest positive entries of the whole batch; also return the smallest value kept.

    B counts the rows of every shard along `axis`. Entries equal to the smallest kept value are all kept. With fewer
    than B k positive entries all of them are kept and the threshold is 0.

    Args:
        n_row: the largest entries of each row that are searched first; see `kth_largest`.

    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    positive = jax.nn.relu(pre)
    searched = lax.stop_gradient(positive)
    largest = lax.top_k(searched, min(n_row, pre.shape[-1]))[0]
    threshold = lax.stop_gradient(kth_largest(searched, n_kept(pre, k, axis), largest, axis))
    return jnp.where(positive >= threshold, positive, 0.0), threshold


def n_kept(pre: Float[Array, "B F"], k: int | Float[Array, ""], axis: str | None) -> int | Int[Array, ""]:
    """Return B k, of all shards together; k may be a share of one while it is annealed."""
    n_rows = pre.shape[0] * (1 if axis is None else lax.axis_size(axis))
    return n_rows * k if isinstance(k, int) else jnp.round(n_rows * k).astype(jnp.int32)


def batch_topk_codes(
    pre: Float[Array, "B F"], k: int, k_now: int | Float[Array, ""], axis: str | None
) -> tuple[Codes, Float[Array, ""], Bool[Array, ""]]:
    """Return what `keep_batch_topk` keeps as codes, the smallest value kept, and whether the codes hold all of it,
    on every shard.

    There are slots for one entry a row more than k, for ties, and on one of several shards for a quarter more, since
    the batch's entries need not be spread evenly. The codes do not hold all where those do not suffice, or where a row
    has more than `ROW_FACTOR` k.
    """
    n_rows, n_latents = pre.shape
    n_slots = k + 1 if axis is None or lax.axis_size(axis) == 1 else k + k // 4 + 1
    positive = jax.nn.relu(pre)
    largest, ids = lax.top_k(positive, min(ROW_FACTOR * k, n_latents))
    threshold = kth_largest(positive, n_kept(pre, k_now, axis), largest, axis)
    is_kept = (largest >= threshold) & (largest > 0)
    # Each kept entry moves to the slot that is its rank among the kept, row after row.
    place = jnp.where(is_kept, jnp.cumsum(is_kept.ravel()).reshape(is_kept.shape) - 1, n_rows * n_slots).ravel()
    rows = jnp.broadcast_to(jnp.arange(n_rows)[:, None], is_kept.shape)

    def packed(entries: Array, empty: int) -> Array:
        slots = jnp.full(n_rows * n_slots, empty, entries.dtype)
        return slots.at[place].set(entries.ravel(), mode="drop").reshape(n_rows, n_slots)

    overflows = is_kept.sum() > n_rows * n_slots
    if largest.shape[-1] < n_latents:
        overflows |= is_kept[:, -1].any()
    codes = Codes(packed(ids, 0), packed(largest, 0), packed(rows, n_rows - 1))
    return codes, threshold, _max(overflows.astype(jnp.int32), axis) == 0


def kth_largest(
    values: Float[Array, "B F"], n: int | Int[Array, ""], largest: Float[Array, "B K"], axis: str | None
) -> Float[Array, ""]:
    """Return the n-th largest of non-negative values over all shards, exactly, without sorting them.

    The bit patterns of non-negative floats are ordered like the floats, so searching 31 bits by counting finds the
    value. Each row's `largest` are searched first; every value is searched, from there on, only when some row may have
    more of the n largest than those.
    """
    top = _max(lax.bitcast_convert_type(largest.max(), jnp.int32), axis)
    low = _search(_bits(largest), n, jnp.zeros_like(top), top + 1, axis)
    row_is_full = (_bits(largest)[:, -1] >= low).any() & (largest.shape[-1] < values.shape[-1])
    high = jnp.where(_max(row_is_full.astype(jnp.int32), axis) > 0, top + 1, low + 1)
    return lax.bitcast_convert_type(_search(_bits(values), n, low, high, axis), jnp.float32)


def _search(
    bits: Int[Array, "B K"],
    n: int | Int[Array, ""],
    low: Int[Array, ""],
    high: Int[Array, ""],
    axis: str | None,
) -> Int[Array, ""]:
    """Return the largest b in [low, high) with at least n of `bits` >= b, given that it holds for low.

    One device halves the interval; several ask about 15 places at once, as a round costs them a reduction.
    """
    n_parts = 2 if axis is None or lax.axis_size(axis) == 1 else 16

    def narrow(bounds: tuple) -> tuple:
        low, high = bounds
        width = (high - low + n_parts - 1) // n_parts
        edges = low + width * jnp.arange(1, n_parts)
        counts = _sum(jnp.sum(bits[..., None] >= edges, axis=(0, 1), dtype=jnp.int32), axis)
        n_enough = jnp.sum((counts >= n) & (edges < high), dtype=jnp.int32)
        return low + width * n_enough, jnp.minimum(high, low + width * (n_enough + 1))

    return lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, narrow, (low, high))[0]


def _bits(values: Float[Array, "..."]) -> Int[Array, "..."]:
    return lax.bitcast_convert_type(values, jnp.int32)


def _sum(x: Array, axis: str | None) -> Array:
    return x if axis is None else lax.psum(x, axis)


def _max(x: Array, axis: str | None) -> Array:
    return x if axis is None else lax.pmax(x, axis)
