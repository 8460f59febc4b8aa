"""SAEs whose latents lie on several devices: what is kept, evaluated and saved is what one device keeps, and saves."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsae import artifacts, sae
from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.config import SaeConfig, TrainConfig
from jaxsae.sae import evaluate
from jaxsae.sae.losses import revive
from jaxsae.sae.selection import batch_topk_codes, keep_batch_topk, keep_topk, topk_codes
from jaxsae.sae.suite import SaeSuite

tiny_run = runpy.run_path(str(Path(__file__).with_name("tiny_run.py")))
PlantedSource, BATCH = tiny_run["PlantedSource"], tiny_run["BATCH"]
L, D, F, K = 4, 7, 16, 2
ROWS = {
    "random": np.random.default_rng(0).normal(size=(6, F)),
    "ties": np.random.default_rng(1).integers(-2, 3, size=(6, F)),
    "all equal": np.ones((6, F)),
    "one shard": np.random.default_rng(2).normal(size=(6, F)) + 9 * (np.arange(F) // 4 == 2),
    "three of four on a shard": np.random.default_rng(3).normal(size=(6, F)) + 9 * np.isin(np.arange(F), (8, 9, 10)),
    "none positive": -np.ones((6, F)),
}


@functools.cache
def on_four_shards(function, *, n_numbers=0):
    """Return the compiled pre [B F] -> (features [B F], numbers), with the latents on four devices."""
    mesh = meshes.make_mesh(1, layer=1, latent=4)
    latents = P(None, meshes.LATENT)
    outcomes = (latents, *[P()] * n_numbers) if n_numbers else latents
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=latents, out_specs=outcomes))


def keep(pre, k, axis=None):
    return keep_topk(pre, k, axis)


def keep_first_of(pre, k, axis=None):
    """Keep the two largest where there are slots for k."""
    codes = topk_codes(pre, k, jnp.float32(2), axis)
    return jnp.zeros_like(pre).at[jnp.arange(len(pre))[:, None], codes.ids].set(codes.values)


def revive_odd(pre, k, axis=None):
    first = 0 if axis is None else jax.lax.axis_index(axis) * pre.shape[-1]
    return revive(pre, (first + jnp.arange(pre.shape[-1])) % 2 == 1, k, axis)


sharded_keeps = functools.cache(lambda keep, k: functools.partial(keep, k=k, axis=meshes.LATENT))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("function", "k"),
    [(keep, 3), (keep, 5), (keep, F), (keep_first_of, 5), (revive_odd, 3)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_largest_of_a_row__over_shards_of_latents__are_those_of_the_whole_row(function, k, name):
    pre = jnp.asarray(ROWS[name], jnp.float32)
    np.testing.assert_array_equal(on_four_shards(sharded_keeps(function, k))(pre), function(pre, k))


def sharded_batch_topk(pre):
    return keep_batch_topk(pre, 4, n_row=16, latent_axis=meshes.LATENT)


def rows_largest(pre):
    return keep_batch_topk(pre, 4, n_row=16, by_row=jnp.array(True), latent_axis=meshes.LATENT)


def codes_of_rows(pre):
    codes, threshold, fits = batch_topk_codes(pre, 4, 4, None, meshes.LATENT, by_row=jnp.array(True))
    return jnp.zeros_like(pre).at[codes.rows, codes.ids].add(codes.values), threshold, fits


@pytest.mark.parametrize("name", ROWS)
def test_largest_by_row__over_shards_of_latents__are_those_of_the_whole_row(name):
    pre = jnp.asarray(ROWS[name], jnp.float32)
    kth = jax.lax.top_k(pre, 4)[0][:, -1:]
    found, _ = on_four_shards(rows_largest, n_numbers=1)(pre)
    np.testing.assert_array_equal(found, jnp.where(pre >= jnp.maximum(kth, 0), jax.nn.relu(pre), 0))
    found, _, fits = on_four_shards(codes_of_rows, n_numbers=2)(pre)
    if fits:
        np.testing.assert_array_equal(found, keep_topk(pre, 4))


def sharded_codes(pre):
    codes, threshold, fits = batch_topk_codes(pre, 4, 4, None, meshes.LATENT)
    return jnp.zeros_like(pre).at[codes.rows, codes.ids].add(codes.values), threshold, fits


@pytest.mark.parametrize("name", ROWS)
def test_largest_of_a_batch__over_shards_of_latents__are_those_of_the_whole_batch(name):
    pre = jnp.asarray(ROWS[name], jnp.float32)
    expected, threshold = keep_batch_topk(pre, 4, n_row=16)
    found, found_threshold = on_four_shards(sharded_batch_topk, n_numbers=1)(pre)
    np.testing.assert_array_equal(found, expected)
    assert found_threshold == threshold
    found, found_threshold, fits = on_four_shards(sharded_codes, n_numbers=2)(pre)
    assert bool(fits) == (name not in ("one shard", "all equal"))  # more on a shard than twice its part
    if fits:
        np.testing.assert_array_equal(found, expected)
        assert found_threshold == threshold


def make_trainer(folder, *, layer=1, data=1, latent=1):
    recipe = sae.make_recipe(
        SaeConfig(architecture="topk", n_latents=F, k=K, dead_tokens=2 * BATCH),
        TrainConfig(
            batch=BATCH, n_tokens=8 * BATCH, lr=0.02, warmup_steps=2, evaluate_every=4, evaluate_tokens=128,
            checkpoint_every=4,
        ),
        n_layers=L,
        d_model=D,
        batches_per_epoch=10,
    )  # fmt: skip
    about = {"architecture": "topk", "k": K, "n_layers": L, "d_model": D, "n_latents": F}
    artifacts.write_json(folder / "saes" / "suite.json", about)
    mesh = meshes.make_mesh(L, layer=layer, data=data, latent=latent)
    return sae.Trainer(PlantedSource(L, D), recipe, sae.Checkpoints(folder / "saes"), mesh=mesh, seed=5)


def run(trainer, stop_at=None):
    """Train; return the evaluations by step."""
    evaluations = {}
    trainer.run(
        on_step=lambda step, note: None,
        on_evaluation=evaluations.__setitem__,
        should_stop=lambda: trainer.step == stop_at,
    )
    trainer.checkpoints.close()
    return evaluations


def assert_close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-6), found, expected)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return two folders with what their trainers measured: of one device, and of eight with an interruption."""
    one, eight = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("eight")
    expected = run(make_trainer(one))
    stopped = make_trainer(eight, data=2, latent=4)
    found = run(stopped, stop_at=6)
    resumed = make_trainer(eight, data=2, latent=4)
    assert resumed.step == 6
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state), jax.device_get(stopped.state))
    before = jax.tree.map(lambda x: x.sharding, resumed.state)
    found |= run(resumed)
    # The best weights stay spread as they were: a step compiled for other places would be compiled again.
    jax.tree.map(lambda x, was: x.sharding.is_equivalent_to(was, x.ndim) or pytest.fail(str(x)), resumed.state, before)
    return one, eight, expected, found, resumed.measure_best()[1]


def test_train__with_latents_on_several_devices__measures_what_one_device_measures(runs):
    _, _, expected, found, best = runs
    assert list(found) == [4, 8]
    assert_close(found, expected)
    for name in ("fvu", "mse"):
        np.testing.assert_allclose(best[name], np.minimum(expected[4][name], expected[8][name]), rtol=0, atol=5e-6)


@pytest.mark.parametrize("which", ["best", "last"])
def test_train__with_latents_on_several_devices__saves_what_one_device_saves(runs, which):
    one, eight, *_ = runs
    assert_close(sae.load(eight / "saes", which=which), sae.load(one / "saes", which=which))
    for layer in range(L):
        whole = sae.load(eight / "saes", which=which).layer(layer)
        jax.tree.map(np.testing.assert_array_equal, sae.load(eight / "saes", layer=layer, which=which), whole)


def test_load__of_one_layer_that_several_devices_saved__checks_every_part_of_it(runs):
    _, eight, *_ = runs
    parts = sorted((eight / "saes" / "checkpoints" / "8" / "best" / "W_dec").glob("1.*"))
    assert len(parts) == 8  # four shards of latents, each written by its two devices
    content = parts[3].read_bytes()
    try:
        parts[3].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        sae.load(eight / "saes", layer=0)
        with pytest.raises(InputError, match=r"W_dec/1\.3\.0 is damaged"):
            sae.load(eight / "saes", layer=1)
    finally:
        parts[3].write_bytes(content)


def test_thresholds__with_latents_on_several_devices__are_those_of_one_device():
    rng = np.random.default_rng(4)
    W_dec = rng.normal(size=(L, F, D)).astype(np.float32)
    zeros = np.zeros((L, F), np.float32)
    suite = SaeSuite(W_dec.swapaxes(1, 2).copy(), zeros, W_dec, np.zeros((L, D), np.float32), zeros, "batchtopk", K)
    acts = rng.integers(-4, 5, size=(L, BATCH, D)).astype(np.float32)

    def thresholds(**axes):
        mesh = meshes.make_mesh(L, layer=1, **axes)
        return evaluate.thresholds_for_k(
            evaluate.make_bit_counts(mesh), evaluate.place(suite, mesh), lambda: [acts], K,
            batch=BATCH, layers=slice(0, L), n_layers=L, mesh=mesh,
        )  # fmt: skip

    np.testing.assert_allclose(thresholds(data=2, latent=4), thresholds(), rtol=1e-6)
