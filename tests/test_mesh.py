"""Meshes, moves on and off the devices, and two processes that train like one."""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxsae import mesh as meshes
from jaxsae import sae
from jaxsae.artifacts import InputError

SCRIPT = Path(__file__).parent / "sae" / "tiny_run.py"
tiny_run = runpy.run_path(str(SCRIPT))
LIMIT = 120  # seconds a run of two processes may take on a loaded machine


def test_make_mesh__takes_no_more_devices_than_layers_unless_told():
    assert dict(meshes.make_mesh(5).shape) == {"layer": 5, "data": 1, "latent": 1}
    assert dict(meshes.make_mesh(24).shape) == {"layer": 8, "data": 1, "latent": 1}
    assert dict(meshes.make_mesh(24, data=3).shape) == {"layer": 2, "data": 3, "latent": 1}
    assert dict(meshes.make_mesh(24, data=2, latent=2).shape) == {"layer": 2, "data": 2, "latent": 2}
    assert dict(meshes.make_mesh(1, layer=2, data=4).shape) == {"layer": 2, "data": 4, "latent": 1}


def test_make_mesh__of_more_devices_than_there_are__says_how_many():
    with pytest.raises(InputError, match=r"mesh.layer 4 x mesh.data 3 x mesh.latent 1 needs 12 devices, 8 are here"):
        meshes.make_mesh(5, layer=4, data=3)
    with pytest.raises(InputError, match=r"mesh.layer 1 x mesh.data 3 x mesh.latent 3 needs 9 devices, 8 are here"):
        meshes.make_mesh(5, data=3, latent=3)


def test_make_mesh__of_several_processes__leaves_no_device_idle(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    message = r"mesh.layer 3 x mesh.data 1 x mesh.latent 1 uses 3 of 8 devices; with several processes"
    with pytest.raises(InputError, match=message):
        meshes.make_mesh(3)


@pytest.mark.parametrize(
    "environment",
    [
        {"JAXSAE_COORDINATOR": "host:1"},
        {"JAXSAE_PROCESSES": "2", "JAXSAE_PROCESS": "0"},
        {"JAXSAE_COORDINATOR": "host:1", "JAXSAE_PROCESSES": "two", "JAXSAE_PROCESS": "0"},
    ],
)
def test_start_processes__with_half_of_the_variables__says_which_are_there(environment):
    value = next(iter(environment.values()))
    with pytest.raises(InputError, match=rf"set JAXSAE_COORDINATOR, .* together, two numbers last; found .*{value}"):
        meshes.start_processes(environment)


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"SLURM_NTASKS": "4"}])
def test_start_processes__of_one_process__joins_nobody(environment, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: pytest.fail("joined"))
    meshes.start_processes(environment)


def test_start_processes__takes_the_variables_or_the_clusters_own(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append(args))
    named = {"JAXSAE_COORDINATOR": "host:1", "JAXSAE_PROCESSES": "3", "JAXSAE_PROCESS": "2"}
    meshes.start_processes(named | {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"})
    meshes.start_processes({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"})
    assert calls == [("host:1", 3, 2), ()]


def fake_mesh(owners):
    """Return a mesh whose devices belong to the given processes [layer, data, latent]; this one is process 0."""
    owners = np.asarray(owners).reshape(len(owners), len(owners[0]), -1)
    devices = np.vectorize(lambda owner: SimpleNamespace(process_index=owner), otypes=[object])(owners)
    return mock.Mock(
        spec=Mesh, devices=devices, shape=dict(zip(("layer", "data", "latent"), owners.shape, strict=True))
    )


@pytest.mark.parametrize(
    ("owners", "n_layers", "expected"),
    [
        ([[0], [1]], 5, (0, 3)),
        ([[1], [0]], 5, (3, 5)),
        ([[1], [1], [1], [0]], 5, (4, 5)),  # only padding is left: the last layer, to repeat
        ([[0, 1]], 3, (0, 3)),
        ([[0], [1], [0]], 3, (0, 3)),
        ([[[1, 0]], [[1, 1]]], 4, (0, 2)),
    ],
)
def test_local_layers__are_those_of_this_processs_rows(owners, n_layers, expected):
    found = meshes.local_layers(n_layers, fake_mesh(owners))
    assert (found.start, found.stop) == expected


@pytest.mark.parametrize(("layer", "data"), [(1, 1), (2, 4), (8, 1)])
def test_put_batch__repeats_the_last_layer_up_to_the_mesh(layer, data):
    mesh = meshes.make_mesh(5, layer=layer, data=data)
    acts = np.random.default_rng(0).normal(size=(5, 8, 3)).astype(np.float32)
    placed = meshes.put_batch(acts, slice(0, 5), 5, mesh)
    padded = acts[np.minimum(np.arange(-(-5 // layer) * layer), 4)]
    np.testing.assert_array_equal(placed, padded)
    assert placed.sharding.shard_shape(placed.shape) == (len(padded) // layer, 8 // data, 3)
    np.testing.assert_array_equal(meshes.pad_layers(acts, mesh), padded)
    assert meshes.padded_layers(5, mesh) == len(padded)


def test_put_rows_and_layers__spread_along_their_own_axis():
    mesh = meshes.make_mesh(4, layer=2, data=4)
    weights = meshes.put_rows(np.arange(8, dtype=np.float32), mesh)
    assert weights.sharding.shard_shape(weights.shape) == (2,)
    tree = meshes.put_layers({"a": np.arange(12).reshape(4, 3), "b": np.arange(4)}, mesh)
    assert tree["a"].sharding.shard_shape((4, 3)) == (2, 3)
    fetched = meshes.fetch(tree)
    np.testing.assert_array_equal(fetched["a"], np.arange(12).reshape(4, 3))
    assert all(isinstance(x, np.ndarray) for x in fetched.values())


def test_put_layers__spreads_what_has_latents_along_the_latent_axis_too():
    mesh = meshes.make_mesh(4, layer=2, data=2, latent=2)
    shapes = {
        "W_enc": ((4, 3, 6), (2, 3, 3)), "b_enc": ((4, 6), (2, 3)), "W_dec": ((4, 6, 3), (2, 3, 3)),
        "b_dec": ((4, 6), (2, 6)), "since_fired": ((4, 6), (2, 3)), "mean": ((4, 6), (2, 6)), "scale": ((4,), (2,)),
    }  # fmt: skip
    arrays = {name: np.arange(np.prod(shape)).reshape(shape) for name, (shape, _) in shapes.items()}
    tree = meshes.put_layers({"best": [arrays], "gate": {"any name": np.zeros((4, 6))}}, mesh)
    for name, (shape, expected) in shapes.items():
        assert tree["best"][0][name].sharding.shard_shape(shape) == expected, name
        np.testing.assert_array_equal(tree["best"][0][name], arrays[name])
    assert tree["gate"]["any name"].sharding.shard_shape((4, 6)) == (2, 3)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        (("blocks", "mlp", "c_fc", "weight"), (3, 40, 24), (3, 10, 24)),
        (("blocks", "attn", "c_proj", "weight"), (3, 24, 24), (3, 24, 6)),
        (("blocks", "mlp", "up_proj", "weight"), (3, 40, 24), (3, 10, 24)),
        (("blocks", "mlp", "fc2", "weight"), (3, 24, 40), (3, 24, 10)),
        (("blocks", "self_attn", "k_proj", "weight"), (3, 6, 24), (3, 6, 6)),  # 6 rows make no four even parts
        (("blocks", "self_attn", "k_proj", "weight"), (4, 6, 22), (4, 6, 22)),  # nor do 22 columns; layers stay
        (("wte", "weight"), (40, 24), (10, 24)),
        (("wte", "weight"), (37, 24), (37, 6)),
        (("wpe", "weight"), (40, 24), (40, 24)),
        (("blocks", "mlp", "c_fc", "bias"), (3, 40), (3, 40)),
        (("blocks", "ln_1", "weight"), (4, 24), (4, 24)),
    ],
)
def test_param_sharding__splits_matrices_and_tables_but_never_layers(path, shape, expected):
    mesh = meshes.make_mesh(4, layer=2, data=2)
    assert meshes.param_sharding(path, shape, mesh, "split").shard_shape(shape) == expected
    assert meshes.param_sharding(path, shape, mesh, "replicated").shard_shape(shape) == shape


def test_param_sharding__names_another_choice():
    with pytest.raises(InputError, match="sharding is 'tensor'; use one of replicated, split"):
        meshes.param_sharding(("wte", "weight"), (4, 4), meshes.make_mesh(1), "tensor")


def test_one_process__agrees_with_itself():
    rows = np.arange(6).reshape(3, 2)
    assert meshes.gather_layers(rows, slice(0, 3), 3) is rows
    assert meshes.global_any(True) is True
    assert meshes.global_any(False) is False


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(folder, options):
    """Start training in two processes of one device each."""
    names = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAXSAE_COORDINATOR": f"127.0.0.1:{free_port()}",
        "JAXSAE_PROCESSES": "2",
    }
    command = [sys.executable, str(SCRIPT), str(folder), *(f"{name}={setting}" for name, setting in options.items())]
    return [
        subprocess.Popen(command, env=os.environ | names | {"JAXSAE_PROCESS": index}, stderr=subprocess.PIPE, text=True)
        for index in "01"
    ]


def finish(processes):
    """Wait for both; where one fails, the other would wait for it."""
    deadline = time.monotonic() + LIMIT
    try:
        while any(process.poll() is None for process in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for process in processes:
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr.read()
    finally:
        for process in processes:
            process.kill()


def facts(folder, process):
    return json.loads((folder / f"facts_{process}.json").read_text())


def assert_close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), found, expected)


@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize(
    ("axes", "layers"),
    [
        ({"layer": 2}, [[0, 2], [2, 3]]),
        ({"data": 2}, [[0, 3], [0, 3]]),
        ({"latent": 2, "architecture": "topk", "n_latents": 14}, [[0, 3], [0, 3]]),
    ],
)
def test_train__in_two_processes__equals_one(tmp_path, axes, layers):
    one, two, options = tmp_path / "one", tmp_path / "two", axes | {"total": 8}
    processes = start_two(two, options)
    tiny_run["main"](one, **options)
    finish(processes)
    for which in ("best", "last"):
        assert_close(sae.load(two / "saes", which=which), sae.load(one / "saes", which=which))
    for process in (0, 1):
        own = facts(two, process)
        assert own["layers"] == layers[process]
        for name in ("best", "gathered", "fetched"):
            assert_close(own[name], facts(one, 0)[name])
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (two, one)]
    assert [row["step"] for row in rows[0]] == [4, 8]
    assert_close(*rows)
