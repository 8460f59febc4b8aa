"""`extract` and `train` as two processes of one run: the same store and the same SAEs as one process makes."""

import re
import socket

import numpy as np
import pytest

from jaxsae import artifacts, sae
from jaxsae.pipeline.stages import STAGES
from jaxsae.progress import read_metrics

PATIENCE = 150  # seconds for one command of both processes


# The threads of a process share its matrix products out by their number, which decides the last bits; Adam makes a
# difference in a gradient of almost nothing grow to a step. Without threads one and two processes can be compared, for
# a few steps: sooner or later two latents of a row are so near the k-th place that the last bits choose between them.
WITHOUT_THREADS = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
FEW_STEPS = {"train.n_tokens": 8 * 256, "train.evaluate_every": 4, "train.checkpoint_every": 4}


def run_in_two_processes(run, command, environment, folder):
    """Run a command in two processes of three devices each, a layer on each device; return their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(2):
        names = {"JAXSAE_COORDINATOR": f"localhost:{port}", "JAXSAE_PROCESSES": "2", "JAXSAE_PROCESS": str(index)}
        own = environment | WITHOUT_THREADS | names | {"JAX_NUM_CPU_DEVICES": "3"}
        processes.append(run.start(command, folder / f"{command}{index}.txt", own))
    try:
        return [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def twofold(finished, environment, tmp_path_factory):
    """Extract and train in two processes; return the run and what each process said."""
    folder = tmp_path_factory.mktemp("twofold")
    run = type(finished)(folder / "run", finished.questions, tuple((dict(finished.settings) | FEW_STEPS).items()))
    said = {}
    for command in ("extract", "train"):
        codes = run_in_two_processes(run, command, environment, folder)
        said |= {(command, index): (folder / f"{command}{index}.txt").read_text() for index in range(2)}
        assert codes == [0, 0], said
    return run, said


@pytest.fixture(scope="module")
def alone(twofold, environment, tmp_path_factory):
    """Train as one process from the same store."""
    folder = tmp_path_factory.mktemp("alone")
    run = twofold[0].copy(folder / "run", without=tuple(name for name in STAGES if name != "extract"))
    with run.start("train", folder / "stderr.txt", environment | WITHOUT_THREADS) as process:
        assert process.wait(PATIENCE) == 0, (folder / "stderr.txt").read_text()
    return run


def test_two_processes__write_the_same_store(twofold, finished):
    run, _ = twofold
    for shard in range(4):
        name = f"activations/resid.zarr/c/0/{shard}/0"
        assert (run.workdir / name).read_bytes() == (finished.workdir / name).read_bytes()
    for name in ("tokens.npz", "resid.zarr/zarr.json"):
        left, right = (one.workdir / "activations" / name for one in (run, finished))
        assert artifacts.sha256_file(left) == artifacts.sha256_file(right)


@pytest.mark.parametrize("which", ["best", "last"])
def test_two_processes__train_the_same_saes(twofold, alone, which):
    run, _ = twofold
    left, right = (sae.load(one.workdir / "saes", which=which) for one in (run, alone))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        one, other = getattr(left, name), getattr(right, name)
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6, err_msg=name)


def test_two_processes__measure_the_same_qualities(twofold, alone):
    run, _ = twofold
    left, right = (
        artifacts.read_json(one.workdir / "saes" / "evaluation.json", rebuild="")["rows"] for one in (run, alone)
    )
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name, number in other.items():
            assert one[name] == pytest.approx(number, rel=1e-5, abs=1e-6), name
    left, right = (read_metrics(one.workdir / "logs" / "metrics.jsonl") for one in (run, alone))
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for one, other in zip(left, right, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_two_processes__speak_with_one_voice(twofold):
    run, said = twofold
    for command in ("extract", "train"):
        assert f"{command}: done in " in said[command, 0]
        assert "done in" not in said[command, 1]
        assert (run.workdir / "manifests" / f"{command}.json").exists()
    assert "3 x 1 devices" not in said["train", 0]
    assert "6 x 1 x 1 devices (layer x data x latent), from step 0" in said["train", 0]


def test_two_processes__leave_a_run_that_one_process_can_go_on_with(twofold, caplog):
    run, _ = twofold
    caplog.set_level("INFO", logger="absl")
    assert run("train") == 0
    assert "train: up to date, skipped" in caplog.text


@pytest.mark.parametrize(
    "given",
    [
        {"JAXSAE_COORDINATOR": "localhost:1"},
        {"JAXSAE_COORDINATOR": "localhost:1", "JAXSAE_PROCESSES": "two", "JAXSAE_PROCESS": "0"},
    ],
)
def test_variables_that_do_not_fit__are_named(finished, refuses, tmp_path, monkeypatch, given):
    for name, setting in given.items():
        monkeypatch.setenv(name, setting)
    run = type(finished)(tmp_path / "run", finished.questions)
    names = "JAXSAE_COORDINATOR, JAXSAE_PROCESSES, JAXSAE_PROCESS"
    refuses(run, "extract", f"set {names} together, two numbers last; found {re.escape(str(given))}")
    assert not run.workdir.exists()
