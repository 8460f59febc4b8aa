"""A run killed with SIGKILL, at three moments, and started again ends as if nothing had happened, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("tiny_run.py")
LIMIT = 120  # seconds any process here may take on a loaded machine


def start(folder, cache, **options):
    """Start training in `folder` on two CPU devices, one for two layers each."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    arguments = [f"{name}={setting}" for name, setting in {"layer": 2, **options}.items()]
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors


def kill_when(process, happened):
    """Kill the process as soon as `happened()`."""
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    assert process.returncode == -signal.SIGKILL


def steps_evaluated(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def chunks(folder):
    """Return the bytes of the last step's arrays."""
    step = folder / "saes" / "checkpoints" / "20"
    return {
        str(path.relative_to(step)): path.read_bytes()
        for item in ("best", "last", "train")
        for path in (step / item).rglob("*")
        if path.name[0].isdigit()
    }


@pytest.mark.timeout(4 * LIMIT)
def test_train__killed_three_times__ends_bit_for_bit_like_an_uninterrupted_run(tmp_path):
    whole, parts, cache = tmp_path / "whole", tmp_path / "parts", tmp_path / "cache"
    uninterrupted = start(whole, cache)

    # After an evaluation, before the checkpoint of the same step.
    kill_when(start(parts, cache, pause=0.5), lambda: 8 in steps_evaluated(parts))
    assert [path.stem for path in (parts / "saes" / "manifests").iterdir()] == ["4"]
    # While Orbax writes.
    kill_when(start(parts, cache), lambda: any((parts / "saes" / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
    # Between Orbax's commit and our manifest.
    process = start(parts, cache, die="commit")
    process.communicate(timeout=LIMIT)
    assert process.returncode == -signal.SIGKILL
    steps = sorted(int(path.name) for path in (parts / "saes" / "checkpoints").iterdir() if path.name.isdigit())
    assert not (parts / "saes" / "manifests" / f"{steps[-1]}.json").exists()

    finish(start(parts, cache))
    finish(uninterrupted)
    assert len(chunks(whole)) > 60
    assert chunks(parts) == chunks(whole)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert steps_evaluated(parts) == [4, 8, 12, 16, 20]
    assert (parts / "facts_0.json").read_bytes() == (whole / "facts_0.json").read_bytes()
