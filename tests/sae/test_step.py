"""The training step: sharded, stacked and plain forms of it agree, and what its compiled program sends."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.config import SaeConfig, TrainConfig
from jaxsae.sae.architectures import architecture as architecture_of
from jaxsae.sae.autoencoder import with_unit_rows
from jaxsae.sae.losses import Moment, aux_loss
from jaxsae.sae.step import Recipe, init_state, keep_best, make_recipe, make_schedule, make_step, make_steps, weights_of

L, B, D, F, K, STEPS = 5, 16, 6, 24, 3, 6
N_SILENT = 4  # latents whose bias keeps them from ever firing
ARCHITECTURES = ("topk", "batchtopk", "jumprelu_l1")
MESHES = ((8, 1), (4, 2), (1, 8), (2, 4))  # devices along layer and data, and for the next also along latent
LATENT_MESHES = (
    ("topk", "dense", (1, 1, 8)),
    ("topk", "dense", (2, 2, 2)),
    ("topk", "sparse", (1, 2, 4)),
    ("batchtopk", "dense", (1, 2, 4)),
    ("batchtopk", "sparse", (2, 2, 2)),
    ("jumprelu_l1", "dense", (1, 2, 4)),
    ("matryoshka", "dense", (2, 2, 2)),
    ("jumprelu", "dense", (1, 2, 4)),
)
QUICK = {"xla_backend_optimization_level": 0}  # LLVM's would double the time and change nothing tested
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


@functools.cache
def make(architecture: str, n_layers: int = L, **changes) -> Recipe:
    sae_names = {field.name for field in dataclasses.fields(SaeConfig)}
    sae = {"n_latents": F, "k": K, "dead_tokens": 2 * B, "threshold": 0.3, "aux_coefficient": 0.5}
    train = {"batch": B, "n_tokens": 100 * B, "lr": 0.01, "warmup_steps": 3, "clip_norm": 0.2}
    for name, setting in changes.items():
        (sae if name in sae_names else train)[name] = setting
    return make_recipe(
        SaeConfig(architecture=architecture, **sae),
        TrainConfig(**train),
        n_layers=n_layers,
        d_model=D,
        batches_per_epoch=10,
    )


def rows(n, seed, n_layers=L):
    """Return activations whose size differs between layers, around a mean."""
    acts = np.random.default_rng(seed).normal(size=(n_layers, n, D)) + 0.3
    return (acts * np.linspace(0.5, 3, n_layers)[:, None, None]).astype(np.float32)


def start(recipe, n_layers=L, n_silent=N_SILENT):
    """Return a fresh state in which some latents are dead and stay so."""
    state = init_state(recipe, rows(50, 99, n_layers), seed=7)
    silent = jnp.arange(F) < n_silent
    params = dataclasses.replace(state.params, b_enc=jnp.where(silent, -20.0, state.params.b_enc))
    since_fired = jnp.where(silent, recipe.dead_tokens, 0) + jnp.zeros((n_layers, 1), jnp.int32)
    return dataclasses.replace(state, params=params, since_fired=since_fired.astype(jnp.int32))


def place(state, mesh):
    padded = jax.tree.map(lambda x: meshes.pad_layers(np.asarray(x), mesh), state)
    return meshes.put_layers(padded, mesh)


@functools.cache
def compiled(recipe, layer, data, latent=1):
    """Return the compiled step."""
    mesh, n_layers = meshes.make_mesh(recipe.n_layers, layer=layer, data=data, latent=latent), recipe.n_layers
    state = place(start(recipe, n_layers), mesh)
    acts = meshes.put_batch(rows(B, 0, n_layers), slice(0, n_layers), n_layers, mesh)
    lowered = make_step(recipe, mesh).lower(state, acts, np.int32(0))
    return lowered.compile(compiler_options=QUICK)


@functools.cache
def run(architecture, layer, data):
    """Return the compiled program's text, and the state and metrics after each of a few steps, as NumPy."""
    recipe = make(architecture)
    history = take_steps(recipe, STEPS, layer=layer, data=data)
    return compiled(recipe, layer, data).as_text(), history


def take_steps(recipe, n, begin=None, *, layer=1, data=1, latent=1):
    mesh = meshes.make_mesh(L, layer=layer, data=data, latent=latent)
    state, step_fn, history = place(begin or start(recipe), mesh), compiled(recipe, layer, data, latent), []
    for step in range(n):
        acts = meshes.put_batch(rows(B, step), slice(0, L), L, mesh)
        state, metrics = step_fn(state, acts, np.int32(step))
        history.append(jax.tree.map(lambda x: np.array(x)[:L], (state, metrics)))
    return history


def assert_close(found, expected, tolerance):
    def check(path, x, y):
        size = np.abs(y[np.isfinite(y)]).max(initial=1.0)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * size, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, found, expected)


@pytest.mark.parametrize("layer_by_data", MESHES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step__sharded__equals_one_device(architecture, layer_by_data):
    _, expected = run(architecture, 1, 1)
    _, found = run(architecture, *layer_by_data)
    # Sums over shards round differently; XLA also compiles other kernels for another number of layers on a device.
    assert_close(found, expected, 2e-6)
    for (state, _), (expected_state, _) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(state.since_fired, expected_state.since_fired)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step__of_a_layer_shard__is_bitwise_that_of_its_layers_alone(architecture):
    # Two layers a device in both runs, so that XLA compiles the same kernels.
    _, history = run(architecture, 4, 2)
    recipe, mesh = make(architecture, 2), meshes.make_mesh(2, layer=1, data=2)
    for layers in (slice(0, 2), slice(2, 4)):
        state = place(jax.tree.map(lambda x, layers=layers: x[layers], start(make(architecture))), mesh)
        for step in range(STEPS):
            acts = meshes.put_batch(rows(B, step)[layers], slice(0, 2), 2, mesh)
            state, _ = compiled(recipe, 1, 2)(state, acts, np.int32(step))
            expected = jax.tree.map(lambda x, layers=layers: x[layers], history[step][0])
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step__revives_dead_latents__where_there_are_any(architecture):
    recipe = make(architecture)
    begin = jax.device_get(start(recipe))
    _, history = run(architecture, 1, 1)
    moved = np.abs(history[-1][0].params.W_dec - begin.params.W_dec).max(axis=-1)
    assert (history[-1][1]["dead"] >= N_SILENT / F).all()
    assert (moved[:, N_SILENT:].max(axis=-1) > 1e-3).all()
    if architecture == "jumprelu_l1":
        assert moved[:, :N_SILENT].max() < 1e-6
    else:
        assert moved[:, :N_SILENT].min() > 1e-4


@pytest.mark.parametrize(("architecture", "compute", "mesh"), LATENT_MESHES, ids=str)
def test_step__with_latents_on_several_devices__equals_one_device(architecture, compute, mesh):
    recipe, (layer, data, latent) = make(architecture, compute=compute), mesh
    _, expected = run(architecture, 1, 1)
    found = take_steps(recipe, STEPS, layer=layer, data=data, latent=latent)
    assert_close(found, expected, 2e-6)
    for (state, _), (expected_state, _) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(state.since_fired, expected_state.since_fired)


@pytest.mark.parametrize(("compute", "mesh"), [("dense", (1, 1, 8)), ("sparse", (1, 2, 4))], ids=str)
def test_step__with_latents_on_several_devices__revives_few_dead_ones_alike(compute, mesh):
    recipe, (layer, data, latent) = make("topk", compute=compute), mesh
    begin = start(make("topk"), n_silent=2)  # at most D / 2
    expected = take_steps(make("topk"), 3, begin)
    assert_close(take_steps(recipe, 3, begin, layer=layer, data=data, latent=latent), expected, 2e-6)
    assert np.abs(expected[-1][0].params.W_dec - np.asarray(begin.params.W_dec))[:, :2].max(axis=-1).min() > 1e-4


def test_steps__of_one_dispatch__are_bitwise_those_taken_one_at_a_time():
    layer, data, latent = 2, 2, 2
    recipe = make("topk", k_start=6, anneal=0.05)  # depends on the step's number
    expected = take_steps(recipe, STEPS, layer=layer, data=data, latent=latent)
    mesh = meshes.make_mesh(L, layer=layer, data=data, latent=latent)
    state, dispatch, step = place(start(recipe), mesh), None, 0
    for count in (4, 1, 1):
        numbers = [*range(step, step + count), *[step] * (4 - count)]
        batches = tuple(meshes.put_batch(rows(B, number), slice(0, L), L, mesh) for number in numbers)
        args = (state, batches, np.int32(step), np.int32(count))
        # One program for every count, else the call is refused.
        dispatch = dispatch or make_steps(recipe, mesh, 4).lower(*args).compile(compiler_options=QUICK)
        state, metrics = dispatch(*args)
        for i in range(count):
            jax.tree.map(
                lambda x, y, i=i: np.testing.assert_array_equal(np.array(x)[i, :L], y), metrics, expected[step + i][1]
            )
        assert all(np.isnan(x[count:]).all() for x in metrics.values())
        step += count
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.array(x)[:L], y), state, expected[step - 1][0])


def separate_run(recipe, states):
    """Train one SAE after another as anybody would: a plain loop and an optimizer each, no stack and no mesh."""
    is_centred = recipe.sae.architecture != "jumprelu_l1"
    optimizer = optax.chain(
        optax.clip_by_global_norm(recipe.train.clip_norm), optax.nadam(make_schedule(recipe), b1=0.9, b2=recipe.b2)
    )

    @jax.jit
    def take_step(params, optimizer_state, since_fired, acts, variance, step):
        is_dead = since_fired >= recipe.dead_tokens
        moment = Moment(variance, is_dead, step / recipe.total_steps, recipe.sae)

        def loss(params):
            seen_by_loss = with_unit_rows(params) if is_centred else params
            value, seen = architecture_of(recipe.sae.architecture).loss(seen_by_loss, acts, moment)
            if is_centred:
                weight = jnp.where(is_dead.any(), recipe.sae.aux_coefficient, 0.0)
                value += weight * aux_loss(seen_by_loss, acts, seen.error, moment, few=False, bar=seen.bar)
            return value, seen

        (_, seen), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        if not is_centred:
            lengths = jnp.linalg.norm(params.W_dec, axis=-1, keepdims=True)
            params = dataclasses.replace(params, W_dec=params.W_dec / lengths)
        since_fired = jnp.where(seen.counts.fired > 0, 0, since_fired + B)
        return params, optimizer_state, since_fired, optax.tree.norm(grads)

    for layer, state in enumerate(states):
        carried, norms = (state.params, optimizer.init(state.params), state.since_fired), []
        for step in range(STEPS):
            acts = jnp.asarray(rows(B, step)[layer] * float(state.scale))
            *carried, norm = take_step(*carried, acts, state.variance, step)
            norms.append(float(norm))
        yield carried[0], carried[2], norms


@pytest.mark.parametrize("layer_by_data", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_step__by_codes__equals_the_dense_form(architecture, layer_by_data):
    _, expected = run(architecture, 1, 1)
    found = take_steps(make(architecture, compute="sparse"), STEPS, layer=layer_by_data[0], data=layer_by_data[1])
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step__stacked__equals_separate_saes_with_clipping(architecture):
    recipe = make(architecture)
    begin, (end, _) = start(recipe), run(architecture, 1, 1)[1][-1]
    states, all_norms = [jax.tree.map(lambda x, layer=layer: x[layer], begin) for layer in range(L)], []
    for layer, (params, since_fired, norms) in enumerate(separate_run(recipe, states)):
        assert_close(jax.tree.map(lambda x, layer=layer: x[layer], end.params), jax.device_get(params), 2e-6)
        np.testing.assert_array_equal(end.since_fired[layer], since_fired)
        all_norms.append(norms)
    # Clipping is active in some layer at every step, and not by the same factor: coupled layers would differ.
    assert (np.max(all_norms, axis=0) > 1.5 * recipe.train.clip_norm).all()
    assert (np.max(all_norms, axis=0) > 1.05 * np.min(all_norms, axis=0)).all()


def collectives(text):
    """Return (operation, shapes, replica groups) of each collective in a compiled program."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match:
            shapes = [
                (kind, tuple(int(n) for n in sizes.split(",") if n))
                for kind, sizes in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", match[1])
            ]
            found.append((match[2], shapes, replica_groups(line)))
    return found


def replica_groups(line):
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    assert named, line
    sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", named[1])}
    along = [list(sizes).index(name) for name in named[2].split(",")]
    devices = np.moveaxis(
        np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values())), along, range(len(along))
    )
    return devices.reshape(np.prod([list(sizes.values())[axis] for axis in along]), -1).T.tolist()


# How many reductions of few numbers may go beside the gradients, at most: for few dead latents and for many, the
# leftover's energy and what each lacks to be kept; of BatchTopK the largest value, whether a row is full, and the
# counts of both searches, by codes also whether they hold all that is kept, and the dense form's for when they do not.
BESIDE = {
    ("topk", "dense"): {"f32": 4},
    ("topk", "sparse"): {"f32": 4},
    ("batchtopk", "dense"): {"f32": 4, "s32": 4},
    ("batchtopk", "sparse"): {"f32": 4, "s32": 9},
    ("jumprelu_l1", "dense"): {},
}


@pytest.mark.parametrize("layer_by_data", [(1, 1), *MESHES], ids=str)
@pytest.mark.parametrize(("architecture", "compute"), BESIDE)
def test_step__compiled__sends_gradients_once_along_data_and_nothing_along_layer(architecture, compute, layer_by_data):
    layer, data = layer_by_data
    local = -(-L // layer)
    found = collectives(compiled(make(architecture, compute=compute), layer, data).as_text())
    if data == 1:
        assert not found
        return
    gradients = [shapes for _, shapes, _ in found if ("f32", (local, D, F)) in shapes]
    beside = [shape for _, shapes, _ in found if ("f32", (local, D, F)) not in shapes for shape in shapes]
    nearest = {(F,)}  # of many dead latents; of few, D / 2
    assert {operation for operation, _, _ in found} == {"all-reduce"}
    assert len(gradients) == 1
    # The first loss equals the sum of squares up to a factor; XLA may send one of them.
    sizes = [(local, D, F), (local, F), (local, F, D), (local, D), (local, F), (local,), (local,), (local,)]
    assert set(gradients[0]) == {("f32", size) for size in sizes}
    assert len(gradients[0]) <= len(sizes)
    assert all(np.prod(shape) <= 15 or shape in nearest for _, shape in beside)
    assert {shape for _, shape in beside if np.prod(shape) > 15} == (
        set() if architecture == "jumprelu_l1" else nearest
    )
    counts = Counter(kind for kind, _ in beside)
    assert all(counts[kind] <= BESIDE[architecture, compute].get(kind, 0) for kind in counts)
    assert set(counts) == set(BESIDE[architecture, compute])
    rows_of_mesh = [list(range(row * data, (row + 1) * data)) for row in range(layer)]
    assert all(sorted(groups) == rows_of_mesh for _, _, groups in found)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu_tanh"])
def test_step__with_a_penalty__sends_the_batchs_l0_along_data_and_equals_one_device(architecture):
    _, expected = run(architecture, 1, 1)
    text, found = run(architecture, 2, 4)
    assert_close(found, expected, 2e-6)
    sent = collectives(text)
    sizes = [sum(int(np.prod(shape)) for _, shape in shapes) for _, shapes, _ in sent]
    assert {operation for operation, _, _ in sent} == {"all-reduce"}
    assert all(sorted(groups) == along(2, 4, 1)["data"] for _, _, groups in sent)
    # The gradients and counters, the batch's L0, and where an auxiliary loss is taken, of few and of many dead latents
    # the leftover's energy and what each lacks.
    assert sorted(sizes)[:-1] == ([1, 1, 1, D // 2, F] if architecture == "relu" else [1])


@functools.cache
def along(*mesh):
    """Return the groups of devices, sorted, of a collective along each axis, or two, of a mesh [layer data latent]."""
    ids = np.arange(np.prod(mesh)).reshape(mesh)
    axes = {"data": ids.transpose(0, 2, 1), "latent": ids, "both": ids}
    sizes = {"data": mesh[1], "latent": mesh[2], "both": mesh[1] * mesh[2]}
    return {name: sorted(ids.reshape(-1, sizes[name]).tolist()) for name, ids in axes.items()}


# What goes along latent for a layer, and how often: sums of partial reconstructions [B, D] and of b_dec's gradient [D]
# through the encoder, one each for the loss, for few and for many dead latents; the candidates of the top k, and of the
# D/2 dead ones to revive, of all shards; the number of dead ones. BatchTopK searches by counts along data and latent.
ALONG_LATENT = {
    ("topk", "dense"): {"recon": 3, "b_dec": 3, "candidates": 2, "s32": 1, "counts": 0},
    ("topk", "sparse"): {"recon": 3, "b_dec": 3, "candidates": 2, "s32": 1, "counts": 0},
    ("batchtopk", "dense"): {"recon": 3, "b_dec": 3, "candidates": 2, "s32": 1, "counts": 4},
    ("jumprelu_l1", "dense"): {"recon": 1, "b_dec": 0, "candidates": 0, "s32": 0, "counts": 0},
}


@pytest.mark.parametrize(
    ("architecture", "compute", "mesh"), [case for case in LATENT_MESHES if case[:2] in ALONG_LATENT], ids=str
)
def test_step__compiled__sends_candidates_and_reconstructions_along_latent(architecture, compute, mesh):
    layer, data, latent = mesh
    local, b, f = -(-L // layer), B // data, F // latent
    found = collectives(compiled(make(architecture, compute=compute), layer, data, latent).as_text())
    groups = along(*mesh)
    gradients = {("f32", shape) for shape in [(local, D, f), (local, f, D), (local, f), (local, D), (local,)]}
    n_candidates = latent * min(K, f)
    counts: Counter = Counter()
    for operation, shapes, devices in found:
        expected, name = "data", None
        if ("f32", (local, D, f)) in shapes:
            assert set(shapes) == gradients
            name = "gradients"
        elif operation == "all-gather":
            assert shapes == [("f32", (b, n_candidates))]
            expected, name = "latent", "candidates"
        elif ("f32", (b, D)) in shapes:
            assert set(shapes) <= {("f32", (b, D)), ("f32", ())}  # beside it the penalty
            expected, name = "latent", "recon"
        elif sorted(devices) == groups["data"] and shapes in ([("f32", (f,))], [("f32", (D // 2,))]):
            name = "nearest"  # how near each dead latent is to what it has to reach, of few of them or of many
        elif ("f32", (D,)) in shapes:
            assert set(shapes) <= {("f32", (D,)), ("f32", ())}  # beside it what dead latents lack
            expected, name = "latent", "b_dec"
        elif set(shapes) == {("f32", (local,))}:  # squared norm for clipping, dead and active latents
            expected, name = "latent", "numbers"
        elif shapes == [("s32", ())] and sorted(devices) == groups["latent"] and counts["s32"] == 0:
            expected, name = "latent", "s32"
        elif shapes[0][0] == "s32":
            assert np.prod(shapes[0][1]) <= 15
            expected, name = "both", "counts"
        elif shapes == [("f32", (b,))]:  # the bar that dead latents have to reach
            expected, name = "latent", "bar"
        else:
            assert shapes == [("f32", ())]  # the leftover's energy, and what dead latents lack
            expected, name = ("latent", "lack") if sorted(devices) == groups["latent"] else ("data", "energy")
        assert sorted(devices) == groups[expected], (name, devices)
        counts[name] += 1
    of_dead = ("energy", "nearest", "lack", "bar")
    beside = {"gradients": int(data > 1), "numbers": 1} | {name: counts[name] for name in of_dead}
    assert dict(counts) == {name: n for name, n in (ALONG_LATENT[architecture, compute] | beside).items() if n}
    assert all(counts[name] <= 2 for name in of_dead)  # of few dead latents and of many


@pytest.mark.parametrize("axis", ["layer", "latent"])
def test_step__memory_of_a_device__falls_with_the_devices_along_an_axis(axis):
    recipe, bytes_of = make("topk", n_layers=8), {}
    for n in (1, 2, 4, 8):
        mesh = meshes.make_mesh(8, **{"layer": 1, axis: n})
        state = place(start(recipe, 8), mesh)
        shards = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state.opt_state) if x.ndim == 3}
        bytes_of[n] = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        assert shards == ({(8 // n, D, F), (8 // n, F, D)} if axis == "layer" else {(8, D, F // n), (8, F // n, D)})
    for n in (2, 4, 8):
        whole = 8 * 4 * (5 * D + 8)  # b_dec, its moments and its best, the mean, and numbers of a layer
        assert bytes_of[n] <= bytes_of[1] / n + (whole if axis == "latent" else 0)


def test_step__with_latents_that_do_not_divide__names_the_settings():
    message = "24 latents do not divide by mesh.latent 5; change mesh.latent, or sae.n_latents or sae.expansion"
    with pytest.raises(InputError, match=message):
        place(start(make("topk")), meshes.make_mesh(L, layer=1, latent=5))


def test_collectives__are_seen__where_plain_jit_gathers_the_pre_activations_for_a_top_k():
    mesh = meshes.make_mesh(1, data=8)
    pre = jax.device_put(rows(B, 0)[0].T, NamedSharding(mesh, P(None, meshes.DATA)))
    text = jax.jit(lambda pre: jax.lax.top_k(pre, 3)[0]).lower(pre).compile().as_text()
    operation, _, groups = collectives(text)[0]
    assert (operation, groups) == ("all-gather", [list(range(8))])


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_step__leaves_decoder_rows_free__the_weights_for_use_have_unit_ones_and_do_the_same(architecture):
    state, _ = run(architecture, 1, 1)[1][-1]
    weights = weights_of(jax.tree.map(jnp.asarray, state), make(architecture), STEPS)
    lengths = np.linalg.norm(state.params.W_dec, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(weights["W_dec"], axis=-1), 1, atol=1e-6)
    assert np.ptp(lengths) > 0.01
    acts = rows(B, 0) - state.params.b_dec[:, None]
    pre = acts @ state.params.W_enc + state.params.b_enc[:, None]
    pre_of_weights = acts @ np.asarray(weights["W_enc"]) + np.asarray(weights["b_enc"])[:, None]
    np.testing.assert_allclose(pre_of_weights, pre * lengths[:, None], atol=1e-5)
    parts = pre_of_weights[..., None] * np.asarray(weights["W_dec"])[:, None]
    np.testing.assert_allclose(parts, pre[..., None] * state.params.W_dec[:, None], atol=1e-5)


def test_step__without_a_clip_norm__scales_each_layers_gradient_to_norm_one():
    state, _ = take_steps(make("topk", clip_norm=None), 1)[0]
    for layer in range(L):
        first_moment = jax.tree.map(lambda x, layer=layer: x[layer], state.opt_state[1].mu)
        assert float(optax.tree.norm(first_moment)) == pytest.approx(0.1, rel=1e-5)
    clipped, _ = take_steps(make("topk", clip_norm=1e9), 1)[0]
    norms = [float(optax.tree.norm(jax.tree.map(lambda x, i=i: x[i], clipped.opt_state[1].mu))) for i in range(L)]
    assert (np.abs(np.array(norms) - 0.1) > 0.01).all()
    for layer, norm in enumerate(norms):
        np.testing.assert_allclose(
            state.opt_state[1].mu.W_enc[layer], clipped.opt_state[1].mu.W_enc[layer] / norm / 10, rtol=1e-4, atol=1e-8
        )


def test_step__projects_the_decoder_every_third_step_if_asked():
    history = take_steps(make("jumprelu_l1", unit_decoder_every=3, warmup_steps=0), 6)
    lengths = [np.linalg.norm(state.params.W_dec, axis=-1) for state, _ in history]
    is_unit = [bool(np.abs(row - 1).max() < 1e-6) for row in lengths]
    assert is_unit == [False, False, True, False, False, True]


def test_step__counts_tokens_since_each_latent_fired__and_the_share_beyond_the_window():
    recipe = make("topk")
    begin = jax.device_get(start(recipe))
    since = begin.since_fired
    for step, (state, metrics) in enumerate(take_steps(recipe, 4)):
        fired = since + B != state.since_fired
        assert (state.since_fired[fired] == 0).all()
        assert (metrics["l0"] * B >= fired.sum(axis=-1)).all()
        np.testing.assert_allclose(metrics["dead"], (state.since_fired >= 2 * B).mean(axis=-1))
        assert (state.since_fired[:, :N_SILENT] == recipe.dead_tokens + (step + 1) * B).all()
        since = state.since_fired


def test_step__stops_counting_before_int32_overflows():
    recipe = make("topk")
    begin = start(recipe)
    begin = dataclasses.replace(begin, since_fired=begin.since_fired.at[:, 0].set(2**30 + 5))
    state, metrics = take_steps(recipe, 1, begin)[0]
    assert (state.since_fired[:, 0] == 2**30 + B).all()
    assert (metrics["dead"] > 0).all()


def test_step__metrics__are_those_of_the_batch_in_residual_units():
    recipe = make("topk")
    begin = jax.device_get(start(recipe))
    _, metrics = run("topk", 1, 1)[1][0]
    acts = rows(B, 0).astype(np.float64)
    for layer in range(L):
        free = jax.tree.map(lambda x, layer=layer: jnp.asarray(x[layer]), begin.params)
        params = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), with_unit_rows(free))
        scale = float(begin.scale[layer])
        pre = (acts[layer] * scale - params.b_dec) @ params.W_enc + params.b_enc
        kept = (pre >= np.sort(pre, axis=-1)[:, -K][:, None]) & (pre > 0)
        recon = (np.where(kept, pre, 0) @ params.W_dec + params.b_dec) / scale
        squared_error = ((acts[layer] - recon) ** 2).sum()
        sample = rows(50, 99)[layer].astype(np.float64)
        variance = ((sample - sample.mean(axis=0)) ** 2).sum(axis=-1).mean()
        assert metrics["mse"][layer] == pytest.approx(squared_error / acts[layer].size, rel=1e-5)
        assert metrics["fvu"][layer] == pytest.approx(squared_error / (B * variance), rel=1e-5)
        assert metrics["l0"][layer] == kept.sum() / B


def test_init__scales_each_layer_to_squared_norm_d__and_starts_in_the_bulk():
    recipe = make("topk")
    sample = rows(50, 99)
    state = jax.device_get(init_state(recipe, sample, seed=7))
    scaled = sample * state.scale[:, None, None]
    np.testing.assert_allclose((scaled**2).sum(axis=-1).mean(axis=-1), D, rtol=1e-5)
    for own, b_dec in zip(scaled.astype(np.float64), state.params.b_dec, strict=True):
        away = own - b_dec  # the sum of distances is least where the directions to the rows cancel
        pull = (away / np.linalg.norm(away, axis=-1, keepdims=True)).mean(axis=0)
        assert np.linalg.norm(pull) < 1e-4
    np.testing.assert_allclose(state.variance, scaled.var(axis=1).sum(axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(state.params.W_enc, state.params.W_dec.swapaxes(-1, -2))
    np.testing.assert_allclose(np.linalg.norm(state.params.W_dec, axis=-1), 0.5, atol=1e-6)
    assert len(np.unique(state.params.W_dec)) > L * F * D * 0.99


def test_init__of_the_reference_run__is_torchs_linear_default_on_unscaled_inputs():
    state = jax.device_get(init_state(make("jumprelu_l1"), rows(50, 99), seed=7))
    assert (state.scale == 1).all()
    for name, n_inputs in (("W_enc", D), ("b_enc", D), ("b_dec", F)):
        bound, drawn = n_inputs**-0.5, getattr(state.params, name)
        assert 0.9 * bound < np.abs(drawn).max() <= bound, name
        assert abs(drawn.std() - bound / 3**0.5) < 0.1 * bound, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: np.where(np.arange(L)[:, None, None] == 3, np.nan, rows), "layer 3 are not finite"),
        (lambda rows: np.where(np.arange(L)[:, None, None] == 2, 1.5, rows), "layer 2 are the same on all 50 tokens"),
    ],
)
def test_init__refuses_rows_that_say_nothing(change, message):
    with pytest.raises(InputError, match=message):
        init_state(make("topk"), change(rows(50, 99)).astype(np.float32), seed=0)


def test_schedule__warms_up_stays_and_falls_to_zero_over_the_last_fifth():
    schedule = make_schedule(make("topk", warmup_steps=1000, lr=0.5))
    steps = [0, 1, 5, 10, 50, 80, 85, 90, 99, 100]
    expected = [0, 0.05, 0.25, 0.5, 0.5, 0.5, 0.375, 0.25, 0.025, 0]
    np.testing.assert_allclose([float(schedule(step)) for step in steps], expected, atol=1e-7)


def test_schedule__without_warm_up_or_of_one_step__starts_at_the_peak():
    assert float(make_schedule(make("topk", warmup_steps=0))(0)) == pytest.approx(0.01)
    assert float(make_schedule(make("topk", n_tokens=B))(0)) == pytest.approx(0.01)


def test_schedule__cosine__has_one_value_an_epoch():
    schedule = make_schedule(make("jumprelu_l1", schedule="cosine", n_tokens=None, epochs=4.0, lr=2.0))
    cosines = [1 + np.cos(np.pi * epoch / 4) for epoch in range(4)]
    np.testing.assert_allclose([float(schedule(10 * epoch)) for epoch in range(4)], cosines, rtol=1e-6)
    np.testing.assert_allclose([float(schedule(10 * epoch + 9)) for epoch in range(4)], cosines, rtol=1e-6)


def test_recipe__derives_steps_latents_window_and_learning_rate():
    by_epochs = make("topk", n_tokens=None, epochs=2.5, n_latents=None, expansion=1.5, lr=None)
    assert (by_epochs.total_steps, by_epochs.n_latents, by_epochs.total_tokens) == (25, 9, 25 * B)
    assert by_epochs.lr == pytest.approx(0.14 / 3)
    assert make("topk", lr=None, n_tokens=2400 * B).lr == pytest.approx(0.14 / F**0.5 / 2)
    assert make("topk", n_latents=2**14, lr=None, n_tokens=30_000 * B).lr == pytest.approx(2.36e-4, rel=1e-2)
    assert make("topk", n_tokens=37 * B + 3).total_steps == 37
    assert make("topk", dead_tokens=10_000_000).dead_tokens == 100 * B // 20
    assert make("topk", dead_tokens=1).dead_tokens == B


@pytest.mark.parametrize(
    ("changes", "batches_per_epoch", "message"),
    [
        ({"k": 21}, 10, "sae.k is 21 but each SAE has 20 latents"),
        ({}, 0, "do not fill one batch of 16"),
        ({"n_tokens": 15}, 10, r"\(epochs None, n_tokens 15\) is less than one step"),
        ({"n_tokens": None, "epochs": 0.01}, 10, r"\(epochs 0.01, n_tokens None\) is less than one step"),
    ],
)
def test_recipe__refuses_what_cannot_be_trained(changes, batches_per_epoch, message):
    train = {name: x for name, x in changes.items() if name != "k"}
    with pytest.raises(InputError, match=message):
        make_recipe(
            SaeConfig(n_latents=20, k=changes.get("k", 3)),
            TrainConfig(**({"batch": B, "n_tokens": 100 * B} | train)),
            n_layers=L, d_model=D, batches_per_epoch=batches_per_epoch,
        )  # fmt: skip


def test_weights_of__batchtopk__averages_thresholds_without_bias():
    recipe = make("batchtopk", by_row=0.0)
    thresholds = []
    for step, (state, _) in enumerate(take_steps(recipe, STEPS), start=1):
        previous = thresholds[-1][1] if thresholds else np.zeros(L)
        thresholds.append(((state.threshold_sum - 0.999 * previous) / 0.001, state.threshold_sum))
        found = np.asarray(weights_of(jax.tree.map(jnp.asarray, state), recipe, step)["threshold"])
        decays = 0.999 ** np.arange(step)[::-1]
        average = sum(d * batch for d, (batch, _) in zip(decays, thresholds, strict=True)) / decays.sum()
        np.testing.assert_allclose(found, np.broadcast_to(average[:, None], (L, F)), rtol=1e-3)
    assert (thresholds[0][0] > 0).all()


def test_weights_of__batchtopk__averages_thresholds_from_where_k_is_the_batch_s():
    """Before that the last batch's stands for it; the first of the batches with k of their own starts afresh."""
    recipe = make("batchtopk", by_row=0.03)
    assert (recipe.steps_by_row, recipe.settled_step) == (3, 3)
    own, total = [], np.zeros(L)
    for step, (state, _) in enumerate(take_steps(recipe, STEPS), start=1):
        own.append((state.threshold_sum - (0.999 if step > 4 else 0.0) * total) / 0.001)
        total = state.threshold_sum
        found = np.asarray(weights_of(jax.tree.map(jnp.asarray, state), recipe, step)["threshold"])
        counted = own[3:] or own[-1:]
        decays = 0.999 ** np.arange(len(counted))[::-1]
        average = sum(d * batch for d, batch in zip(decays, counted, strict=True)) / decays.sum()
        np.testing.assert_allclose(found, np.broadcast_to(average[:, None], (L, F)), rtol=1e-3)
    assert STEPS >= 6


def test_weights_of__jumprelu__has_the_configured_threshold__topk_none():
    fixed = weights_of(start(make("jumprelu_l1")), make("jumprelu_l1"), 1)["threshold"]
    np.testing.assert_array_equal(fixed, np.full((L, F), 0.3, np.float32))
    assert not weights_of(start(make("topk")), make("topk"), 1)["threshold"].any()


def test_keep_best__replaces_only_layers_that_got_better():
    recipe = make("topk")
    state = start(recipe)
    first = weights_of(state, recipe, 1)
    second = jax.tree.map(lambda x: x + 1, first)
    state = keep_best(state, first, jnp.asarray([0.5, 0.5, 0.5, 0.5, jnp.nan]), jnp.int32(1), recipe)
    since_fired = jnp.zeros_like(state.since_fired)
    state = dataclasses.replace(state, since_fired=since_fired)
    state = keep_best(state, second, jnp.asarray([0.4, 0.6, 0.5, 0.1, 0.3]), jnp.int32(2), recipe)
    np.testing.assert_allclose(state.best_fvu, [0.4, 0.5, 0.5, 0.1, 0.3], rtol=1e-6)
    assert state.best_step.tolist() == [2, 1, 1, 2, 2]
    np.testing.assert_allclose(state.best_dead, np.asarray([0, 1, 1, 0, 0]) * N_SILENT / F)
    for name in first:
        is_second = np.asarray([1, 0, 0, 1, 1]).reshape(-1, *[1] * (first[name].ndim - 1))
        np.testing.assert_allclose(state.best[name], first[name] + is_second, rtol=1e-6)


def test_keep_best__replaces_weights_of_before_the_end_of_the_annealing_in_any_case():
    recipe = make("topk", k_start=9, anneal=0.5)
    state, replaced = start(recipe), []
    for step, fvu in ((40, 0.2), (49, 0.3), (50, 0.4), (60, 0.5), (70, 0.1)):
        state = keep_best(state, weights_of(state, recipe, 1), jnp.full(L, fvu), jnp.int32(step), recipe)
        replaced.append(int(state.best_step[0]) == step)
    assert recipe.settled_step == 50
    assert replaced == [True, True, True, False, True]
