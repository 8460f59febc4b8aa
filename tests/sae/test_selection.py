"""Which latents are kept: against plain loops and sorting, on one device and on eight, dense and as codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsae import mesh as meshes
from jaxsae.sae.selection import (
    batch_topk_codes,
    keep_above,
    keep_batch_topk,
    keep_topk,
    kth_largest,
    spread,
    topk_codes,
)


def loop_topk(pre, k):
    kept = np.zeros_like(pre)
    for row, out in zip(pre, kept, strict=True):
        for index in sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]:
            out[index] = max(row[index], 0.0)
    return kept


jitted_topk = jax.jit(keep_topk, static_argnums=1)
jitted_batch_topk = jax.jit(keep_batch_topk, static_argnums=1, static_argnames="n_row")
TOPK_ROWS = {
    "random": np.random.default_rng(0).normal(size=(6, 11)),
    "ties": np.random.default_rng(1).integers(-2, 3, size=(6, 11)),
    "few positive": np.where(np.arange(11) == 4, 2.0, -np.random.default_rng(2).random((6, 11))),
    "none positive": -np.ones((6, 11)),
}


@pytest.mark.parametrize("name", TOPK_ROWS)
@pytest.mark.parametrize("k", [1, 3, 11, 14])
def test_keep_topk__equals_a_plain_loop(name, k):
    pre = TOPK_ROWS[name].astype(np.float32)
    np.testing.assert_array_equal(jitted_topk(pre, k), loop_topk(pre, k))


def test_keep_above__is_strict_and_never_keeps_a_negative_entry():
    pre = jnp.asarray([[-1.0, 0.0, 0.5, 0.75, 1.0]])
    np.testing.assert_array_equal(keep_above(pre, jnp.full(5, 0.5)), [[0, 0, 0, 0.75, 1]])
    np.testing.assert_array_equal(keep_above(pre, jnp.full(5, -2.0)), [[0, 0, 0.5, 0.75, 1]])
    np.testing.assert_array_equal(keep_above(pre, jnp.asarray([0.0, 0.0, 0.6, 0.6, 1.0])), [[0, 0, 0, 0.75, 0]])


def batches():
    rng = np.random.default_rng(3)
    random = rng.normal(size=(16, 23))
    one_row = rng.normal(size=(16, 23))
    one_row[5] = 10 + rng.random(23)  # more of the batch's largest than a row's 4 k candidates hold
    one_shard = rng.normal(size=(16, 23))
    one_shard[:2] += 7  # all on the first of eight shards
    return {
        "random": random,
        "tied": rng.integers(-3, 4, size=(16, 23)),
        "all equal": np.ones((16, 23)),
        "all negative": -rng.random((16, 23)),
        "few positive": np.where(rng.random((16, 23)) < 0.05, random, -1.0),
        "one row": one_row,
        "one shard": one_shard,
        "tiny and huge": random * 10.0 ** rng.integers(-20, 20, size=(16, 23)),
    }


@functools.cache
def sharded_batch_topk(k, n_shards):
    mesh = meshes.make_mesh(1, data=n_shards)
    function = functools.partial(keep_batch_topk, k=k, n_row=4 * k, axis=meshes.DATA)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(meshes.DATA), out_specs=(P(meshes.DATA), P())))


@functools.cache
def sharded_codes(k, n_shards):
    """Return the compiled pre -> (dense features of the codes, threshold, whether they hold all)."""
    mesh = meshes.make_mesh(1, data=n_shards)

    def function(pre):
        codes, threshold, fits = batch_topk_codes(pre, k, k, meshes.DATA)
        feats = jnp.zeros_like(pre).at[codes.rows, codes.ids].add(codes.values)
        whole = codes.crowded
        kept = jnp.where(whole.kept, pre.at[whole.rows].get(mode="fill", fill_value=0), 0)
        return feats.at[whole.rows].add(kept, mode="drop"), threshold, fits

    specs = (P(meshes.DATA), P(), P())
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(meshes.DATA), out_specs=specs))


@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("k", [1, 3])
def test_keep_batch_topk__equals_sorting_the_batch__on_one_device_and_on_eight(name, k):
    pre = batches()[name].astype(np.float32)
    threshold = np.maximum(np.sort(pre, axis=None)[::-1][16 * k - 1], 0)
    for kept, found in (jitted_batch_topk(pre, k, n_row=4 * k), sharded_batch_topk(k, 8)(pre)):
        assert float(found) == threshold
        np.testing.assert_array_equal(kept, np.where(pre >= threshold, np.maximum(pre, 0), 0))


@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("n_shards", [1, 8])
def test_batch_topk_codes__hold_what_is_kept__or_say_that_they_do_not(name, n_shards):
    pre = batches()[name].astype(np.float32)
    kept, expected = jitted_batch_topk(pre, 3, n_row=12)
    found, threshold, fits = sharded_codes(3, n_shards)(pre)
    if n_shards == 1:
        assert bool(fits) == (name not in {"one shard", "tied", "all equal"})
    if fits:
        assert float(threshold) == float(expected)
        np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("n_shards", [1, 8])
def test_by_row__each_row_keeps_its_largest__and_the_threshold_is_the_batchs_of_the_rows_largest(name, n_shards):
    pre = batches()[name].astype(np.float32)
    largest = np.sort(np.maximum(pre, 0), axis=1)[:, -12:]
    for is_by_row in (True, False):
        expected = np.sort(largest, axis=None)[-3 * len(pre)] if is_by_row else jitted_batch_topk(pre, 3, n_row=12)[1]
        dense, codes = by_row_forms(n_shards)
        kept, threshold = dense(pre, is_by_row)
        found, of_codes, fits = codes(pre, is_by_row)
        assert float(threshold) == float(expected)
        if is_by_row:
            np.testing.assert_array_equal(found, jitted_topk(pre, 3))
            kth = np.sort(pre, axis=1)[:, -3, None]
            np.testing.assert_array_equal(kept, np.where((pre >= kth) & (pre > 0), pre, 0))
        else:
            np.testing.assert_array_equal(kept, jitted_batch_topk(pre, 3, n_row=12)[0])
        if fits:
            assert float(of_codes) == float(expected)


@functools.cache
def by_row_forms(n_shards):
    """Return the compiled (pre, is by row) -> (kept, threshold), and -> (codes as dense, threshold, do they fit)."""
    mesh = meshes.make_mesh(1, data=n_shards)

    def dense(pre, is_by_row):
        return keep_batch_topk(pre, 3, n_row=12, by_row=is_by_row, axis=meshes.DATA)

    def by_codes(pre, is_by_row):
        codes, threshold, fits = batch_topk_codes(pre, 3, 3, meshes.DATA, by_row=is_by_row)
        feats = jnp.zeros_like(pre).at[codes.rows, codes.ids].add(codes.values)
        whole = codes.crowded
        kept = jnp.where(whole.kept, pre.at[whole.rows].get(mode="fill", fill_value=0), 0)
        return feats.at[whole.rows].add(kept, mode="drop"), threshold, fits

    specs = (P(meshes.DATA), P())
    outs = (P(meshes.DATA), P()), (P(meshes.DATA), P(), P())
    return tuple(
        jax.jit(jax.shard_map(form, mesh=mesh, in_specs=specs, out_specs=out))
        for form, out in zip((dense, by_codes), outs, strict=True)
    )


@pytest.mark.parametrize("by_row", [None, jnp.array(True)], ids=["by batch", "by row"])
def test_batch_topk_codes__compiled__search_rows_once_without_sorting_them(by_row):
    codes = jax.jit(lambda pre, by_row: batch_topk_codes(pre, 4, 4, None, by_row=by_row))
    text = codes.lower(np.zeros((64, 256), np.float32), by_row).compile().as_text()
    assert text.count('custom_call_target="TopK"') == 1
    assert " sort(" not in text


def test_topk_codes__with_fewer_asked_for_now__keep_those_of_a_smaller_k():
    pre = jnp.asarray(np.random.default_rng(5).normal(size=(6, 11)), jnp.float32)
    np.testing.assert_array_equal(spread(topk_codes(pre, 5, jnp.float32(2)), pre), jitted_topk(pre, 2))


def test_keep_batch_topk__with_part_of_a_k__keeps_that_many_of_the_batch():
    pre = jnp.asarray(np.random.default_rng(6).random((16, 23)), jnp.float32)
    kept, _ = keep_batch_topk(pre, jnp.float32(2.25), n_row=12)
    assert int((kept > 0).sum()) == 36


kth = jax.jit(
    lambda values, n, n_row: kth_largest(values, n, jax.lax.top_k(values, n_row)[0], None), static_argnums=(1, 2)
)


def test_kth_largest__searches_every_value_when_one_row_holds_the_largest():
    values = np.zeros((4, 9), np.float32)
    values[2] = np.arange(10, 19)
    values[:, 0] = 1.0
    assert [float(kth(values, n, 2)) for n in (1, 4, 8)] == [18, 15, 11]


def test_kth_largest__is_zero_beyond_the_number_of_values():
    assert float(kth(jnp.ones((2, 3)), 7, 2)) == 0


def test_kth_largest__equals_sorting_for_random_sizes():
    rng = np.random.default_rng(4)
    for n, n_row in [(1, 1), (17, 2), (40, 5), (77, 7)]:
        values = np.maximum(rng.normal(size=(7, 11)), 0).astype(np.float32)
        assert float(kth(values, n, n_row)) == np.sort(values, axis=None)[::-1][n - 1]
