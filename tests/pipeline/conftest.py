"""One small run of all stages on the demo's language model, shared by the tests of this folder.

The run is made in this process, so that the annotations are checked; other processes are started only where one has
to die or to be another. All have eight CPU devices, as the numbers' last bits depend on it.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxsae import cli
from jaxsae.artifacts import resolve_path
from jaxsae.pipeline.stages import STAGES

ROOT = Path(__file__).parents[2]
ASSET = "package://jaxsae/assets/demo_gpt2"
N_QUESTIONS = 240
# 16,384 tokens are four shards of the store; 80 steps with a checkpoint every 20; answers in four chunks of 64.
SMALL = {
    "corpus.n_tokens": 16_384,
    "corpus.context": 64,
    "activations.batch": 16,
    "sae.expansion": 0.5,
    "sae.k": 4,
    "sae.architecture": "topk",
    "train.batch": 256,
    "train.n_tokens": 20_480,
    "train.lr": 0.001,
    "train.held_out": 0.1,
    "train.buffer_tokens": 4096,
    "train.evaluate_every": 20,
    "train.evaluate_tokens": 512,
    "train.delta_ce_tokens": 512,
    "train.checkpoint_every": 20,
    "questions.batch": 8,
    "questions.max_new_tokens": 8,
    "features.keep": 8,
    "features.positions": "('last_prompt','last_answer','answer_max')",
    "tracking.top_k": 8,
    "tracking.gate": "before",
    "detection.folds": 3,
    "detection.repeats": 1,
    "detection.bootstrap": 100,
}


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """A workdir and the settings that make it."""

    workdir: Path
    questions: Path
    settings: tuple[tuple[str, object], ...] = tuple(SMALL.items())

    def argv(self, command: str, *flags: str, **changes: object) -> list[str]:
        """Return the command line; a change is named like "train__lr"."""
        changed = {name.replace("__", "."): setting for name, setting in changes.items()}
        settings = dict(self.settings) | {"questions.path": self.questions} | changed
        overrides = [f"--config.{name}={setting}" for name, setting in settings.items()]
        return ["jaxsae", command, f"--config={ROOT}/configs/demo.py", f"--workdir={self.workdir}", *overrides, *flags]

    def __call__(self, command: str, *flags: str, **changes: object) -> int:
        """Run a command in this process and return its exit code; its handlers of signals do not stay."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        handlers, hook = {number: signal.getsignal(number) for number in numbers}, sys.unraisablehook
        try:
            return cli.run(self.argv(command, *flags, **changes))
        finally:
            sys.unraisablehook = hook
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def start(self, command: str, stderr: Path, environment: dict[str, str], **changes: object) -> subprocess.Popen:
        """Start a command in another process, whose stderr goes to a file."""
        line = [sys.executable, "-m", "jaxsae.cli", *self.argv(command, **changes)[1:]]
        with open(stderr, "w") as file:
            return subprocess.Popen(
                line, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file
            )

    def copy(self, workdir: Path, *, without: tuple[str, ...] = ()) -> "SmallRun":
        """Return the same run in another folder, without the outcome and record of some stages."""
        shutil.copytree(self.workdir, workdir)
        for name in without:
            for path in (workdir / file for file in (*STAGES[name].clears, f"manifests/{name}.json")):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return dataclasses.replace(self, workdir=workdir)


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """Write one question about each of 240 facts, taken evenly from the demo's."""
    lines = resolve_path(f"{ASSET}/questions.jsonl").read_text(encoding="utf-8").splitlines()
    first_of_fact = {json.loads(line)["group"]: line for line in reversed(lines)}
    every = len(first_of_fact) // N_QUESTIONS
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(f"{line}\n" for line in list(first_of_fact.values())[::every][:N_QUESTIONS]))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, questions) -> SmallRun:
    """Run all stages once; nobody may change the files."""
    run = SmallRun(tmp_path_factory.mktemp("finished") / "run", questions)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run("run") == 0
    (run.workdir.parent / "stdout.txt").write_text(said.getvalue())
    return run


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Return the variables of other processes: the devices of this one, and a shared cache of compiled programs."""
    cache = tmp_path_factory.mktemp("compiled")
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def refuses(capsys) -> Callable:
    """Return a check that a command ends with 2 and one line, and leaves every file there was as it was."""

    def check(run: SmallRun, command: str, words: str, *flags: str, **changes: object) -> None:
        before = contents(run.workdir)
        capsys.readouterr()
        code = run(command, "--verbosity=-1", *flags, **changes)
        said = capsys.readouterr()
        assert code == 2, said
        lines = said.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("jaxsae: ")
        assert re.search(words, lines[0]), lines[0]
        after = contents(run.workdir)
        assert {name: after.get(name) for name in before} == before
        assert not (run.workdir / ".lock").exists()

    return check


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder; nothing for a folder that is not there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
