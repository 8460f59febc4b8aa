"""Which latents of a row, or of a batch, are kept: as dense features, or as codes (the kept ones alone).

Inside a sharded step the rows of a batch are spread along a mesh axis, whose name is passed as `axis`; with `axis=None`
the batch is whole. Latents may be spread too, along `latent_axis`: each shard then keeps some of its own.
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsae.sae.autoencoder import AnyArray

_Axes = str | tuple[str, ...] | None  # of a mesh, along which a sum goes

ROW_FACTOR = 4  # a batch's kept latents are looked for among this many times k of each row, before everywhere


@flax.struct.dataclass
class CrowdedRows:
    """Rows that keep too many latents for slots.

    Attributes:
        rows: [C] int32, which rows; B where there are fewer than C.
        kept: [C F], which latents each of them keeps.
    """

    rows: Int[Array, " C"]
    kept: Bool[Array, "C F"]


@flax.struct.dataclass
class Codes:
    """The kept latents of B rows, K slots for each row on average.

    Attributes:
        ids: [B K] int32, each slot's latent.
        values: [B K], its activation; 0 in a slot that is empty.
        rows: [B K] int32, the row each slot belongs to, ascending through the flattened slots; None where slots lie in
            their own row.
        crowded: rows that have no slots.
    """

    ids: Int[Array, "B K"]
    values: Float[Array, "B K"]
    rows: Int[Array, "B K"] | None = None
    crowded: CrowdedRows | None = None


def keep_above(pre: Float[Array, "B F"], threshold: Float[AnyArray, "*F"]) -> Float[Array, "B F"]:
    """Keep entries strictly above a threshold (0 keeps the positive ones), zero the rest: JumpReLU.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435, eq. (3).
    """
    return jnp.where(pre > jnp.maximum(threshold, 0.0), pre, 0.0)


def keep_topk(pre: Float[Array, "B F"], k: int, latent_axis: str | None = None) -> Float[Array, "B F"]:
    """Keep the k largest positive entries of each row, zero the rest; the lowest index wins a tie.

    Source: Gao et al. 2024, arXiv:2406.04093, section 2.3.
    """
    return spread(topk_codes(pre, k, latent_axis=latent_axis), pre)


def topk_codes(
    pre: Float[Array, "B F"], k: int, k_now: Float[Array, ""] | None = None, latent_axis: str | None = None
) -> Codes:
    """Return the k largest positive entries of each row, descending; with `k_now` at most so many of them.

    Of latents that are spread, those that are among the k largest of all shards.
    """
    values, ids = lax.top_k(pre, min(k, pre.shape[-1]))
    values = jax.nn.relu(values)
    if latent_axis is not None:
        values = jnp.where(rank_in_row(values, k, latent_axis) < (k if k_now is None else k_now), values, 0.0)
    elif k_now is not None:
        values = jnp.where(jnp.arange(values.shape[-1]) < k_now, values, 0.0)
    return Codes(ids, values)


def rank_in_row(values: Float[Array, "B K"], n: int, latent_axis: str) -> Int[Array, "B K"]:
    """Return the place, from 0, of each of this shard's values in its row of all shards' values; n or more as n.

    Only the values travel. Of equal ones the lowest latent comes first, as the shards follow each other.

    Args:
        values: descending in each row, equal ones by latent.
    """
    n_rows, n_own = values.shape
    every = lax.all_gather(lax.stop_gradient(values), latent_axis, axis=1, tiled=True)
    places = lax.top_k(every, min(n, every.shape[-1]))[1]
    ranks = (
        jnp.full(every.shape, n, jnp.int32)
        .at[jnp.arange(n_rows)[:, None], places]
        .set(jnp.arange(places.shape[-1], dtype=jnp.int32), unique_indices=True, mode="promise_in_bounds")
    )
    return lax.dynamic_slice_in_dim(ranks, lax.axis_index(latent_axis) * n_own, n_own, axis=1)


def spread(codes: Codes, like: Float[Array, "B F"]) -> Float[Array, "B F"]:
    """Return the codes of `topk_codes` as dense features of the shape of `like`."""
    rows = jnp.arange(like.shape[0])[:, None]
    return jnp.zeros_like(like).at[rows, codes.ids].set(codes.values, unique_indices=True, mode="promise_in_bounds")


def keep_batch_topk(
    pre: Float[Array, "B F"],
    k: int | Float[Array, ""],
    *,
    n_row: int,
    by_row: Bool[Array, ""] | None = None,
    axis: str | None = None,
    latent_axis: str | None = None,
) -> tuple[Float[Array, "B F"], Float[Array, ""]]:
    """Keep the B k largest positive entries of the whole batch; also return the smallest value kept.

    B counts the rows of every shard. Entries equal to the smallest kept value are all kept. With fewer
    than B k positive entries all of them are kept and the threshold is 0.

    Args:
        n_row: the largest entries of each row that are searched first; see `kth_largest`.
        by_row: keep the k largest positive entries of each row instead, and those equal to the k-th; the value that is
            returned then is the batch's among each row's `n_row` largest.

    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    positive = jax.nn.relu(pre)
    searched = lax.stop_gradient(positive)
    largest = lax.top_k(searched, min(n_row, pre.shape[-1]))[0]
    axes = _axes(axis, latent_axis)
    threshold = lax.stop_gradient(kth_largest(searched, n_kept(pre, k, axis), largest, axes, of_largest=by_row))
    bar = threshold if by_row is None else jnp.where(by_row, _kth_of_row(largest, k, latent_axis), threshold)
    return jnp.where(positive >= bar, positive, 0.0), threshold


def _kth_of_row(
    largest: Float[Array, "B K"], k: int | Float[Array, ""], latent_axis: str | None
) -> Float[Array, "B 1"]:
    """Return the k-th of each row's largest entries, of all shards of latents."""
    # A slice of the top-k itself would make XLA join the two and sort the rows; the slice of its bits does not.
    bits = _bits(largest)[:, :k] if isinstance(k, int) else _bits(largest)
    if latent_axis is not None:
        every = lax.all_gather(lax.bitcast_convert_type(bits, jnp.float32), latent_axis, axis=1, tiled=True)
        bits = _bits(lax.top_k(every, bits.shape[-1])[0])
    place = jnp.clip(jnp.round(k).astype(jnp.int32), 1, bits.shape[-1]) - 1
    return lax.bitcast_convert_type(lax.dynamic_slice_in_dim(bits, place, 1, axis=1), jnp.float32)


def n_kept(pre: Float[Array, "B F"], k: int | Float[Array, ""], axis: str | None) -> int | Int[Array, ""]:
    """Return B k, of all shards together; k may be a share of one while it is annealed."""
    n_rows = pre.shape[0] * _n_shards(axis)
    return n_rows * k if isinstance(k, int) else jnp.round(n_rows * k).astype(jnp.int32)


def batch_topk_codes(
    pre: Float[Array, "B F"],
    k: int,
    k_now: int | Float[Array, ""],
    axis: str | None,
    latent_axis: str | None = None,
    *,
    by_row: Bool[Array, ""] | None = None,
) -> tuple[Codes, Float[Array, ""], Bool[Array, ""]]:
    """Return what `keep_batch_topk` keeps as codes, the value that it returns, and whether the codes hold all of it, on
    every shard. By row exactly k entries are kept, of equal ones the lowest latents.

    There are slots for one entry a row more than k, for ties, and on one of several shards of rows for a quarter more,
    since the batch's entries need not be spread evenly; on one of several shards of latents, for twice its part. Rows
    that may keep more than `ROW_FACTOR` k are looked at whole, up to one row in 32. Where the codes do not hold all,
    the value is not the batch's.
    """
    n_rows, n_latents = pre.shape
    axes, part = _axes(axis, latent_axis), -(-k // _n_shards(latent_axis))
    n_slots = 1 + part + (part if part < k else k // 4 if _n_shards(axis) > 1 else 0)
    n, positive = n_kept(pre, k_now, axis), jax.nn.relu(pre)
    largest, ids = lax.top_k(positive, min(ROW_FACTOR * k, n_latents))
    top, low = _search_largest(largest, n, axes)
    of_rows = largest
    # The n-th largest of these is no larger than that of all: a row whose last is smaller has all its kept among them.
    is_crowded = (_bits(largest)[:, -1] >= jnp.maximum(low, 1)) & (largest.shape[-1] < n_latents)
    crowded = jnp.nonzero(is_crowded, size=-(-n_rows // 32), fill_value=n_rows)[0].astype(jnp.int32)
    whole_rows = positive.at[crowded].get(mode="fill", fill_value=0.0)
    largest = jnp.where(is_crowded[:, None], 0.0, largest)
    is_open = is_crowded.any() if by_row is None else is_crowded.any() & ~by_row
    high = jnp.where(_max(is_open.astype(jnp.int32), axes) > 0, top + 1, low + 1)
    bits = _search((_bits(largest), _bits(whole_rows)), n, low, high, axes)
    threshold = lax.bitcast_convert_type(bits, jnp.float32)

    slots = _fill_in_turn(largest, (largest >= threshold) & (largest > 0), n_slots)
    slots = slots._replace(overflows=slots.overflows | (is_crowded.sum() > len(crowded)))
    kept = (whole_rows >= threshold) & (whole_rows > 0)
    if by_row is not None:  # no row is looked at whole
        own = _fill_by_row(of_rows, _is_of_row(of_rows, k, k_now, latent_axis), n_slots)
        slots = jax.tree.map(lambda row, batch: jnp.where(by_row, row, batch), own, slots)
        kept &= ~by_row
    codes = Codes(
        ids=ids[slots.rows, slots.places].reshape(n_rows, n_slots),
        values=slots.values.reshape(n_rows, n_slots),
        rows=slots.rows.astype(jnp.int32).reshape(n_rows, n_slots),
        crowded=CrowdedRows(crowded, kept),
    )
    return codes, threshold, _max(slots.overflows.astype(jnp.int32), axes) == 0


class _Slots(NamedTuple):
    """Which entries of an array [B, K] the slots [S] of codes hold, 0 in empty ones, and whether they are too few."""

    rows: Int[Array, " S"]
    places: Int[Array, " S"]
    values: Float[Array, " S"]
    overflows: Bool[Array, ""]


def _fill_in_turn(largest: Float[Array, "B K"], is_kept: Bool[Array, "B K"], n_slots: int) -> _Slots:
    """Put the entries that are kept, the first of each row, into the slots of all rows, one after the other."""
    n_in_row = is_kept.sum(axis=-1)
    ends, slots = jnp.cumsum(n_in_row), jnp.arange(len(largest) * n_slots)
    # Entries descend, so that slot s is that far into the row that it falls in.
    rows = jnp.minimum(jnp.searchsorted(ends, slots, side="right"), len(largest) - 1)
    places = jnp.minimum(slots - (ends - n_in_row)[rows], largest.shape[-1] - 1)
    return _Slots(rows, places, jnp.where(slots < ends[-1], largest[rows, places], 0.0), ends[-1] > len(slots))


def _fill_by_row(largest: Float[Array, "B K"], is_kept: Bool[Array, "B K"], n_slots: int) -> _Slots:
    """Put the entries that are kept, among the first of each row, into the row's own slots."""
    rows, places = jnp.divmod(jnp.arange(len(largest) * n_slots), n_slots)
    is_there, places = places < largest.shape[-1], jnp.minimum(places, largest.shape[-1] - 1)
    values = jnp.where(is_there & is_kept[rows, places], largest[rows, places], 0.0)
    return _Slots(rows, places, values, (is_kept.sum(axis=-1) > n_slots).any())


def _is_of_row(
    largest: Float[Array, "B K"], k: int, k_now: int | Float[Array, ""], latent_axis: str | None
) -> Bool[Array, "B K"]:
    """Say which of each row's largest entries are among its k largest above zero, of all shards of latents."""
    place = jnp.arange(largest.shape[-1]) if latent_axis is None else rank_in_row(largest, k, latent_axis)
    return (place < jnp.round(k_now)) & (largest > 0)


def kth_largest(
    values: Float[Array, "B F"],
    n: int | Int[Array, ""],
    largest: Float[Array, "B K"],
    axes: _Axes,
    *,
    of_largest: Bool[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Return the n-th largest of non-negative values over all shards, exactly, without sorting them.

    The bit patterns of non-negative floats are ordered like the floats, so searching 31 bits by counting finds the
    value. Each row's `largest` are searched first; every value is searched, from there on, only when some row may have
    more of the n largest than those.

    Args:
        of_largest: look no further than at the rows' `largest`.
    """
    top, low = _search_largest(largest, n, axes)
    is_open = (_bits(largest)[:, -1] >= low).any() & (largest.shape[-1] < values.shape[-1])
    if of_largest is not None:
        is_open &= ~of_largest
    high = jnp.where(_max(is_open.astype(jnp.int32), axes) > 0, top + 1, low + 1)
    return lax.bitcast_convert_type(_search((_bits(values),), n, low, high, axes), jnp.float32)


def _search_largest(
    largest: Float[Array, "B K"], n: int | Int[Array, ""], axes: _Axes
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Return the bits of the largest of all values, and of the n-th largest of these."""
    top = _max(lax.bitcast_convert_type(largest.max(), jnp.int32), axes)
    return top, _search((_bits(largest),), n, jnp.zeros_like(top), top + 1, axes)


def _search(
    bits: tuple[Int[Array, "_ _"], ...],
    n: int | Int[Array, ""],
    low: Int[Array, ""],
    high: Int[Array, ""],
    axes: _Axes,
) -> Int[Array, ""]:
    """Return the largest b in [low, high) with at least n of `bits` >= b, given that it holds for low.

    One device halves the interval; several ask about 15 places at once, as a round costs them a reduction.
    """
    n_parts = 2 if _n_shards(axes) == 1 else 16

    def narrow(bounds: tuple) -> tuple:
        low, high = bounds
        width = (high - low + n_parts - 1) // n_parts
        edges = low + width * jnp.arange(1, n_parts)
        parts = [jnp.sum(part[..., None] >= edges, axis=(0, 1), dtype=jnp.int32) for part in bits]
        counts = _sum(functools.reduce(jnp.add, parts), axes)
        n_enough = jnp.sum((counts >= n) & (edges < high), dtype=jnp.int32)
        return low + width * n_enough, jnp.minimum(high, low + width * (n_enough + 1))

    return lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, narrow, (low, high))[0]


def _bits(values: Float[Array, "..."]) -> Int[Array, "..."]:
    return lax.bitcast_convert_type(values, jnp.int32)


def _axes(axis: str | None, latent_axis: str | None) -> _Axes:
    """Return the axes along which rows, and latents, are spread."""
    return tuple(name for name in (axis, latent_axis) if name is not None) or None


def _n_shards(axes: _Axes) -> int:
    return 1 if axes is None else lax.axis_size(axes)


def _sum(x: Array, axes: _Axes) -> Array:
    return x if axes is None else lax.psum(x, axes)


def _max(x: Array, axes: _Axes) -> Array:
    return x if axes is None else lax.pmax(x, axes)
