"""Checkpoints: what is restored, what damage is noticed, and that one layer is read without the others' bytes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxsae import artifacts, sae
from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.sae import checkpoint
from jaxsae.sae.suite import fold_scale

L, D, F = 3, 4, 7
READER = {"epoch": 1, "position": 17}


def weights(seed):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,), "scale": ()}
    return {name: rng.uniform(0.5, 2, size=(L, *shape)).astype(np.float32) for name, shape in shapes.items()}


def trees(seed=0):
    """Return what a training run saves; the threshold of `last` is all zeros, as TopK's is."""
    last = weights(seed + 1)
    last["threshold"] *= 0
    counters = np.random.default_rng(seed).integers(0, 9, size=(L, F)).astype(np.int32)
    train = {"since_fired": counters, "optimizer": {"1_mu_b_dec": last["b_dec"] / 3}}
    return jax.tree.map(jnp.asarray, {"best": weights(seed), "last": last, "train": train})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with the checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("run") / "saes"
    about = {"architecture": "batchtopk", "k": 2, "n_layers": L, "d_model": D, "n_latents": F}
    artifacts.write_json(folder / "suite.json", about)
    checkpoints = sae.Checkpoints(folder)
    checkpoints.save(4, trees(40), READER)
    checkpoints.save(8, trees(80), READER)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """Return a copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "saes")


def flip(path, offset=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1
    path.write_bytes(content)


def restore(folder, like=None):
    checkpoints = sae.Checkpoints(folder)
    try:
        return checkpoints.restore(checkpoints.latest_step(), like or trees())
    finally:
        checkpoints.close()


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_restore__returns_the_bytes_and_the_position_that_were_saved(folder):
    found, reader = restore(folder)
    assert_equal(found, trees(80))
    assert reader == READER


def test_restore__spreads_arrays_like_those_it_is_given(folder):
    mesh = meshes.make_mesh(L, layer=3)
    like = meshes.put_layers(jax.tree.map(np.asarray, trees()), mesh)
    found, _ = restore(folder, like)
    assert_equal(found, trees(80))
    assert all(x.sharding == meshes.layer_sharding(mesh) for x in jax.tree.leaves(found))


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("arrays", ["numpy", "jax"])
def test_load__is_the_newest_suite_with_the_scale_folded_in(folder, which, arrays):
    suite = sae.load(folder, which=which, arrays=arrays)
    saved = {name: np.asarray(x) for name, x in trees(80)[which].items()}
    expected = fold_scale(saved, architecture="batchtopk", k=2)
    assert_equal(suite, expected)
    assert all(isinstance(x, np.ndarray if arrays == "numpy" else jax.Array) for x in jax.tree.leaves(suite))
    assert (suite.architecture, suite.k) == ("batchtopk", 2)


def test_load__of_a_layer__equals_that_layer_of_all(folder):
    suite = sae.load(folder)
    for layer in range(L):
        assert_equal(sae.load(folder, layer=layer), suite.layer(layer))


def test_load__of_a_layer__does_not_read_the_others_bytes(folder):
    best = folder / "checkpoints" / "8" / "best"
    expected = sae.load(folder, layer=1)
    for chunk in [*best.glob("*/0*"), *best.glob("*/2*")]:
        chunk.unlink()
    assert_equal(sae.load(folder, layer=1), expected)
    with pytest.raises(InputError, match=r"best/W_dec/0.0.0 is missing"):
        sae.load(folder, layer=0)
    flip(best / "b_enc" / "1.0")
    with pytest.raises(InputError, match=r"best/b_enc/1.0 is damaged"):
        sae.load(folder, layer=1)


def test_load__needs_no_restore_by_orbax(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("Orbax was asked")

    monkeypatch.setattr(ocp, "CheckpointManager", refuse)
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", refuse)
    assert sae.load(folder).W_enc.shape == (L, D, F)


DAMAGED = [
    "best/W_dec/1.0.0",
    "best/W_enc/.zarray",
    "best/_METADATA",
    "last/threshold/2.0",
    "train/since_fired/0.0",
    "train/optimizer.1_mu_b_dec/0.0",
    "reader/metadata",
    "_CHECKPOINT_METADATA",
]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_restore__names_a_damaged_file_and_the_way_out(folder, name, damage):
    path = folder / "checkpoints" / "8" / name
    flip(path) if damage == "flip" else path.unlink()
    what = "is damaged" if damage == "flip" else "is missing"
    with pytest.raises(InputError, match=rf"/8/{name} {what}.*; delete .*/checkpoints/8 and .*/manifests/8.json, then "
                       r"run jaxsae train again: it goes on from step 4"):  # fmt: skip
        restore(folder)


def test_restore__after_the_damaged_step_is_deleted_as_told__goes_on_from_the_one_before(folder):
    shutil.rmtree(folder / "checkpoints" / "8")
    (folder / "manifests" / "8.json").unlink()
    found, _ = restore(folder)
    assert_equal(found, trees(40))
    flip(folder / "checkpoints" / "4" / "best" / "scale" / "0")
    with pytest.raises(InputError, match=r"best/scale/0 is damaged.*it starts anew"):
        sae.load(folder)


def test_load__names_a_damaged_file(folder):
    flip(folder / "checkpoints" / "8" / "best" / "W_dec" / "1.0.0")
    with pytest.raises(InputError, match=r"best/W_dec/1.0.0 is damaged"):
        sae.load(folder)
    assert sae.load(folder, which="last").d_model == D


def test_load__notices_any_flipped_byte_of_suite_json(folder):
    path = folder / "suite.json"
    whole = path.read_bytes()
    for offset in range(len(whole)):
        flip(path, offset)
        with pytest.raises(
            InputError, match=r"suite.json (is damaged|is not readable|has format_version).*jaxsae train"
        ):
            sae.load(folder)
        path.write_bytes(whole)
    assert sae.load(folder).k == 2


def test_load__with_a_flipped_byte_in_the_manifest__is_refused_or_unharmed(folder):
    path, expected = folder / "manifests" / "8.json", sae.load(folder)
    whole = path.read_bytes()
    refused = 0
    for offset in range(0, len(whole), 151):
        flip(path, offset)
        try:
            assert_equal(sae.load(folder), expected)
        except InputError as error:
            refused += 1
            assert "manifests/8.json" in str(error) or "suite.json" in str(error)  # noqa: PT017 - either may be raised
        path.write_bytes(whole)
    assert refused > 10


@pytest.mark.parametrize("key", ["files", "suite"])
def test_load__of_a_manifest_without_a_key__names_it(folder, key):
    path = folder / "manifests" / "8.json"
    path.write_text(path.read_text().replace(f'"{key}"', f'"{key[:-1]}"'))
    with pytest.raises(InputError, match=rf"manifests/8.json is damaged \(it lacks '{key}'\); delete .*"):
        sae.load(folder)


def test_checkpoints__remove_and_ignore_what_interrupted_saves_left(folder):
    steps = folder / "checkpoints"
    shutil.copytree(steps / "8", steps / "12")  # committed by Orbax, without a manifest
    shutil.copytree(steps / "8", steps / "16.orbax-checkpoint-tmp-1")
    (steps / "notes").mkdir()
    assert_equal(sae.load(folder), fold_scale(jax.device_get(trees(80)["best"]), architecture="batchtopk", k=2))
    checkpoints = sae.Checkpoints(folder)
    assert checkpoints.latest_step() == 8
    assert sorted(path.name for path in steps.iterdir()) == ["4", "8", "notes"]
    checkpoints.save(12, trees(120), READER)
    checkpoints.close()
    assert_equal(restore(folder)[0], trees(120))


def test_checkpoints__keep_two_steps_and_their_manifests(folder):
    checkpoints = sae.Checkpoints(folder)
    for step in (12, 16):
        checkpoints.save(step, trees(step), READER)
    checkpoints.close()
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir()) == [12, 16]
    assert checkpoint.manifest_steps(folder) == [12, 16]
    assert len(list((folder / "manifests").iterdir())) == 2


def without_scale(tree):
    return {name: x for name, x in tree.items() if name != "scale"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tree: tree | {"W_dec": tree["W_dec"][:, :5]},
            r"8/best holds W_dec as \(\(3, 7, 4\), .*, this run needs \(\(3, 5, 4",
        ),
        (
            lambda tree: tree | {"b_enc": tree["b_enc"].astype(jnp.bfloat16)},
            r"b_enc as .*float32'\), this run needs .*bfloat16",
        ),
        (lambda tree: tree | {"gate": tree["b_enc"]}, r"gate as None, this run needs .*use a new --workdir"),
        (without_scale, r"scale as \(\(3,\), 'float32'\), this run needs None"),
    ],
)
def test_restore__of_another_configuration__names_what_differs(folder, change, message):
    like = trees()
    with pytest.raises(InputError, match=message):
        restore(folder, like | {"best": change(like["best"])})


def test_save__on_a_full_disk__says_so_and_keeps_what_was_there(folder, monkeypatch):
    checkpoints = sae.Checkpoints(folder)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.manager, "save", fail)
    with pytest.raises(InputError, match=r"no space left for checkpoint 12 in .*saes; free some"):
        checkpoints.save(12, trees(), READER)
    monkeypatch.setattr(checkpoints.manager, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(5, "I/O")))
    with pytest.raises(OSError, match="I/O"):
        checkpoints.save(12, trees(), READER)
    checkpoints.close()
    assert_equal(restore(folder)[0], trees(80))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "newest"}, "which='newest', arrays='numpy'; expected which=best or last"),
        ({"arrays": "torch"}, "arrays='torch'; expected .* arrays=numpy or jax"),
        ({"layer": 3}, "layer 3 asked for, .*saes holds layers 0 to 2"),
        ({"layer": -1}, "layer -1 asked for"),
    ],
)
def test_load__refuses_what_is_not_there(folder, options, message):
    with pytest.raises(InputError, match=message):
        sae.load(folder, **options)


def test_load__without_a_suite_or_a_whole_checkpoint__says_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"suite.json is missing; run jaxsae train"):
        sae.load(tmp_path)
    artifacts.write_json(tmp_path / "suite.json", {"architecture": "topk", "k": 2, "n_layers": L})
    with pytest.raises(InputError, match="holds no whole checkpoint; run jaxsae train"):
        sae.load(tmp_path)
    with pytest.raises(InputError, match="holds no whole checkpoint; run jaxsae train"):
        sae.Decoders(tmp_path)


def test_decoders__read_a_layer_when_asked_for__and_remember_two(folder, monkeypatch):
    expected, loaded = sae.load(folder).W_dec, []
    real = checkpoint.load

    def spy(*args, layer, **options):
        loaded.append(layer)
        return real(*args, layer=layer, **options)

    monkeypatch.setattr(checkpoint, "load", spy)
    decoders = sae.Decoders(folder)
    assert len(decoders) == L
    assert loaded == []
    for layer in (0, 1, 0, 1, 2, 1, 0):
        np.testing.assert_array_equal(decoders[layer], expected[layer])
    assert loaded == [0, 1, 2, 0]
    with pytest.raises(IndexError):
        decoders[L]
    assert [rows.shape for rows in decoders] == [(F, D)] * L


def test_decoders__of_another_layers_damage__do_not_know(folder):
    flip(folder / "checkpoints" / "8" / "best" / "W_dec" / "2.0.0")
    decoders = sae.Decoders(folder)
    assert decoders[0].shape == (F, D)
    with pytest.raises(InputError, match=r"W_dec/2.0.0 is damaged"):
        decoders[2]


def test_manifest__lists_every_file_of_the_step(folder):
    content = json.loads((folder / "manifests" / "8.json").read_text())
    step = folder / "checkpoints" / "8"
    assert set(content["files"]) == {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert content["suite"] == artifacts.sha256_file(folder / "suite.json")
