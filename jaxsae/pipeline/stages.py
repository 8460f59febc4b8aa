"""The order of the stages, what is up to date, and how one is run: its record, its lock, its interruption.

A stage leaves `manifests/STAGE.json`, written last: its settings, digests of what it read and wrote, time and memory.
A stage whose record still holds is skipped. Where settings or inputs changed, cheap stages run again; the expensive
ones (extract, train, answer) refuse to destroy what they made, unless told to by `--redo`.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import platform
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from absl import logging

from jaxsae import artifacts
from jaxsae.artifacts import InputError, resolve_path
from jaxsae.config import RunConfig
from jaxsae.progress import human_bytes, human_seconds


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: also the command, and the module below `jaxsae.pipeline` whose `run` does the work.
        summary: one line for `--help`.
        settings: config sections and fields whose change makes the outcome another one.
        sources: config paths read (`model`, `corpus`, `questions`).
        reads: files of the workdir it depends on, with the stage that makes them.
        writes: files that stand for its outcome; digests of them are kept.
        parts: patterns of the many other files that must be there; whoever reads them checks their content.
        clears: what `--redo` removes.
        is_expensive: refuse, rather than run again, when settings or inputs changed.
        is_distributed: every process of the run takes part, not only the first.
    """

    name: str
    summary: str
    settings: tuple[str, ...]
    sources: tuple[str, ...]
    reads: dict[str, str]
    writes: tuple[str, ...]
    clears: tuple[str, ...]
    parts: tuple[str, ...] = ()
    is_expensive: bool = False
    is_distributed: bool = False


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="extract",
            summary="run the corpus through the language model; store every layer's residual stream",
            settings=("model", "corpus", "activations"),
            sources=("model", "corpus"),
            reads={},
            writes=("activations/meta.json",),
            parts=("activations/done/*.json", "activations/resid.zarr/c/0/*/0"),
            clears=("activations",),
            is_expensive=True,
            is_distributed=True,
        ),
        Stage(
            name="train",
            summary="train one sparse autoencoder per layer, all at once; measure them on held-out tokens",
            settings=("sae", "train", "mesh.data", "mesh.latent", "seed"),
            sources=("model",),
            reads={"activations/meta.json": "extract"},
            writes=("saes/suite.json", "saes/evaluation.json"),
            parts=("saes/manifests/*.json",),
            clears=("saes", "logs"),
            is_expensive=True,
            is_distributed=True,
        ),
        Stage(
            name="answer",
            summary="put the questions to the language model; label its answers",
            settings=("model", "questions"),
            sources=("model", "questions"),
            reads={},
            writes=("answers.jsonl", "answers_summary.json"),
            clears=("answers.jsonl", "answers_summary.json", "answers.partial.jsonl"),
            is_expensive=True,
        ),
        Stage(
            name="track",
            summary="SAE features of the answers; follow them through the layers as tracks",
            settings=("model", "features", "tracking"),
            sources=("model",),
            reads={"answers.jsonl": "answer", "saes/evaluation.json": "train"},
            writes=("features.npz", "tracks.npz"),
            clears=("features.npz", "features.resid.zarr", "links.npz", "tracks.npz"),
        ),
        Stage(
            name="detect",
            summary="fit and judge detectors of hallucinated answers, beside baselines and a noise canary",
            settings=("detection", "seed"),
            sources=(),
            reads={
                "answers.jsonl": "answer",
                "features.npz": "track",
                "tracks.npz": "track",
                "saes/evaluation.json": "train",
            },
            writes=(
                *("metrics.json", "metrics.csv", "predictions.csv"),
                *("detector/detector.json", "detector/estimators.skops"),
            ),
            clears=("metrics.json", "metrics.csv", "predictions.csv", "detector"),
        ),
        Stage(
            name="evaluate",
            summary="write the report: report.md, report.html, figures/",
            settings=("report",),
            sources=(),
            reads={
                "metrics.json": "detect",
                "predictions.csv": "detect",
                "answers.jsonl": "answer",
                "answers_summary.json": "answer",
                "tracks.npz": "track",
                "saes/evaluation.json": "train",
            },
            writes=("report.md", "report.html"),
            parts=("figures/*.png",),
            clears=("report.md", "report.html", "figures"),
        ),
    )
}


def stages_of(config: RunConfig) -> dict[str, Stage]:
    """Return the stages of a run in order.

    Where activations are streamed, training itself reads model and corpus. What tracking reads and writes besides
    depends on `tracking.links`.
    """
    stages = dict(STAGES)
    if config.activations.source == "stream":
        del stages["extract"]
        train = STAGES["train"]
        stages["train"] = dataclasses.replace(
            train,
            settings=(*train.settings, "model", "corpus", "activations"),
            sources=(*train.sources, "corpus"),
            reads={},
        )
    track = STAGES["track"]
    if config.tracking.links != "none":
        track = dataclasses.replace(track, writes=(*track.writes, "links.npz"))
    if config.tracking.links == "coactivation":
        track = dataclasses.replace(track, settings=(*track.settings, "corpus"), sources=(*track.sources, "corpus"))
    stages["track"] = track
    return stages


class Interruption(BaseException):
    """End the command because of a signal; what was done is saved, and the same command goes on from there."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"interrupted, exit code {exit_code}")
        self.exit_code = exit_code


_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
_AGAIN_SECONDS = 0.05


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag for stages that can stop, and into `Interruption` for the rest.

    SLURM sends SIGUSR1 (`--signal`) or SIGTERM before it takes the machine. A second signal does not wait.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._is_polled = False
        if threading.current_thread() is threading.main_thread():
            for number in _EXIT_CODES:
                signal.signal(number, self._handle)
            self._report_unraisable, sys.unraisablehook = sys.unraisablehook, self._send_again

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second = self.exit_code is not None
        self.exit_code = _EXIT_CODES[signal.Signals(number)]
        if is_second or not self._is_polled:
            raise Interruption(self.exit_code)
        logging.info("signal %s: finishing the step, then saving", signal.Signals(number).name)

    def _send_again(self, unraisable: Any) -> None:
        """Repeat a signal whose `Interruption` Python had to drop, as it does inside a garbage collection."""
        if not isinstance(unraisable.exc_value, Interruption):
            self._report_unraisable(unraisable)
            return
        number = next(number for number, code in _EXIT_CODES.items() if code == unraisable.exc_value.exit_code)
        timer = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    def is_set(self) -> bool:
        """Say whether to stop; a stage that asks is trusted to save and return."""
        return self.exit_code is not None

    @contextlib.contextmanager
    def polled(self) -> Iterator[Callable[[], bool]]:
        """Defer signals while the block asks for them itself; raise `Interruption` at its end if one came."""
        self._is_polled = True
        try:
            yield self.is_set
        finally:
            self._is_polled = False
        if self.exit_code is not None:
            raise Interruption(self.exit_code)


@dataclasses.dataclass
class Context:
    """What a stage's `run` gets besides the config.

    Attributes:
        workdir: the run's folder.
        config_name: name of the config file, without its ending.
        command: the command line, for the report.
        stop: the signals.
        process_index, process_count: of the run's processes.
        details: a stage may leave a line here for its record and the report.
    """

    workdir: Path
    config_name: str
    command: str
    stop: StopSignal
    process_index: int = 0
    process_count: int = 1
    details: str = ""

    @property
    def is_main(self) -> bool:
        """Say whether this process writes records and logs."""
        return self.process_index == 0


def source_digests(stage: Stage, config: RunConfig) -> dict[str, str]:
    """Return digests of the model, corpus and questions that the config points at.

    Raises:
        InputError: a path is missing.
    """
    digests = {}
    for source in stage.sources:
        section = getattr(config, source)
        name = getattr(section, "name", None)
        if section.path is None and not name:
            raise InputError(f"neither {source}.path nor {source}.name is set; give the {source} to use")
        digests[source] = path_digest(source, resolve_path(section.path)) if section.path is not None else f"hub:{name}"
    return digests


def path_digest(source: str, path: Path) -> str:
    """Return one digest for a file, or for the files of a folder.

    Raises:
        InputError: there is nothing, or nothing readable.
    """
    if not path.exists():
        raise InputError(f"{source}.path {path} does not exist")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    try:
        return artifacts.fingerprint([[file.name, artifacts.sha256_file(file)] for file in files])
    except OSError as error:
        raise InputError(f"{source}.path {path} cannot be read: {error.strerror}") from None


def record_path(workdir: Path, stage: Stage) -> Path:
    """Return where a stage's record lies."""
    return workdir / "manifests" / f"{stage.name}.json"


def read_record(workdir: Path, stage: Stage) -> dict[str, Any] | None:
    """Return a stage's record, None if it never finished.

    Raises:
        InputError: the record is damaged or of another format.
    """
    path = record_path(workdir, stage)
    if not path.exists():
        return None
    return artifacts.read_json(path, rebuild=f"delete it and run jaxsae {stage.name}")


@dataclasses.dataclass(frozen=True)
class State:
    """Where a stage stands: what it would read now, and how that differs from its record.

    Attributes:
        settings, inputs: as they are now.
        is_done: there is a record.
        changes: differences from the record, one phrase each; up to date if there are none.
        lost: outputs that are missing or were changed since.
    """

    settings: dict[str, Any]
    inputs: dict[str, str]
    is_done: bool
    changes: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def is_current(self) -> bool:
        """Say whether the stage can be skipped."""
        return self.is_done and not self.changes and not self.lost


def missing_inputs(stage: Stage, workdir: Path) -> list[str]:
    """Return one phrase for each file of the workdir that an earlier stage has yet to make."""
    return [
        f"{file} is missing: run jaxsae {maker}"
        for file, maker in stage.reads.items()
        if not (workdir / file).is_file()
    ]


def state(stage: Stage, config: RunConfig, workdir: Path) -> State:
    """Compare a stage with its record.

    Raises:
        InputError: an input is missing; the message names the stage to run.
    """
    missing = missing_inputs(stage, workdir)
    if missing:
        raise InputError(f"{workdir}/{missing[0]}")
    inputs = source_digests(stage, config)
    inputs |= {name: artifacts.sha256_file(workdir / name) for name in stage.reads}
    settings = config.select(*stage.settings)
    record = read_record(workdir, stage)
    if record is None:
        return State(settings, inputs, is_done=False)
    changes = [
        f"{name} was {record['settings'].get(name)!r}, is {setting!r}"
        for name, setting in settings.items()
        if record["settings"].get(name) != setting
    ]
    changes += [f"{name} has changed" for name, digest in inputs.items() if record["inputs"].get(name) != digest]
    lost = [
        name
        for name, digest in record["outputs"].items()
        if not (workdir / name).is_file() or artifacts.sha256_file(workdir / name) != digest
    ]
    lost += [name for name in record["parts"] if not (workdir / name).is_file()]
    return State(settings, inputs, is_done=True, changes=tuple(changes), lost=tuple(lost))


def run_stage(stage: Stage, config: RunConfig, context: Context, *, redo: bool = False) -> bool:
    """Run one stage, or skip it if it is up to date; return whether it ran.

    Raises:
        InputError: an input is missing or bad, or an expensive stage's settings changed.
        Interruption: a signal came; what was done is saved.
    """
    workdir = context.workdir
    if redo and context.is_main:
        _clear(stage, workdir)
    _wait_for_all(context, f"{stage.name} begins")
    current = state(stage, config, workdir)
    if current.is_current:
        logging.info("%s: up to date, skipped", stage.name)
        return False
    if stage.is_expensive and current.changes:
        raise InputError(
            f"{workdir} was made by another {stage.name}: {current.changes[0]}"
            + (f" (and {len(current.changes) - 1} more)" if len(current.changes) > 1 else "")
            + f"; use a new --workdir, or jaxsae {stage.name} --redo to replace it and what follows from it"
        )
    why = current.changes or tuple(f"{name} is missing or damaged" for name in current.lost)
    logging.info("%s: %s%s", stage.name, stage.summary, f" (again: {why[0]})" if why else "")
    _wait_for_all(context, f"{stage.name} is due")
    started = time.monotonic()
    reset_peak()
    context.details = ""
    if context.is_main or stage.is_distributed:
        importlib.import_module(f"jaxsae.pipeline.{stage.name}").run(config, context)
    _wait_for_all(context, f"{stage.name} ends")
    seconds = time.monotonic() - started
    if context.is_main:
        _write_record(stage, workdir, current, seconds=seconds, details=context.details)
        peak = human_bytes(peak_bytes())
        logging.info(
            "%s: done in %s, peak memory %s%s", stage.name, human_seconds(seconds), peak, _tail(context.details)
        )
    return True


def _tail(details: str) -> str:
    return f"; {details}" if details else ""


def _clear(stage: Stage, workdir: Path) -> None:
    """Remove a stage's record first, then its outcome, so that nothing half-removed counts as whole."""
    record_path(workdir, stage).unlink(missing_ok=True)
    for name in stage.clears:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_record(stage: Stage, workdir: Path, current: State, *, seconds: float, details: str) -> None:
    outputs = {name: artifacts.sha256_file(workdir / name) for name in stage.writes}
    artifacts.write_json(
        record_path(workdir, stage),
        {
            "stage": stage.name,
            "settings": current.settings,
            "inputs": current.inputs,
            "outputs": outputs,
            "parts": sorted(str(path.relative_to(workdir)) for name in stage.parts for path in workdir.glob(name)),
            "seconds": round(seconds, 3),
            "peak_bytes": peak_bytes(),
            "output_bytes": sum(tree_bytes(workdir / name) for name in stage.clears),
            "details": details,
            "host": platform.node(),
        },
    )


def _wait_for_all(context: Context, name: str) -> None:
    if context.process_count > 1:
        from jaxsae.mesh import wait_for_all

        wait_for_all(name)


def tree_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; 0 if there is neither."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def reset_peak() -> None:
    """Start a new measurement of the process's peak memory, where the system can."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_bytes() -> int:
    """Return the process's largest resident memory since `reset_peak`, bytes; since its start where that cannot be."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Hold the workdir: one writer at a time.

    A lock whose process is gone, on this host, is named and taken over; half-written files of killed processes go.

    Raises:
        InputError: another process holds it; the message names host and pid.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / ".lock"
    _acquire(path)
    for partial in workdir.rglob(".*.partial"):
        partial.unlink()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a command that wrote nothing leaves no folder behind
            workdir.rmdir()


def _acquire(path: Path) -> None:
    """Make the lock with its content in one step: a process killed here leaves no lock that names nobody."""
    mine = path.with_name(f".lock.{socket.gethostname()}.{os.getpid()}.partial")
    mine.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), encoding="utf-8")
    try:
        with _one_at_a_time(path.parent):
            while True:
                try:
                    os.link(mine, path)
                    return
                except FileExistsError:
                    _take_over(path)
    finally:
        mine.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process of this host at a time judge a lock stale and replace it, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take_over(path: Path) -> None:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        host, pid = holder["host"], int(holder["pid"])
    except FileNotFoundError:
        return
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        host, pid = "an unknown host", 0
    if host == socket.gethostname() and not _is_alive(pid):
        logging.warning("%s was left by process %d, which is gone; taking it over", path, pid)
        path.unlink(missing_ok=True)
        return
    if pid == 0:
        raise InputError(f"{path} cannot be read; if no jaxsae runs in {path.parent}, delete it")
    raise InputError(
        f"{path.parent} is in use by process {pid} on {host}; wait for it, or delete {path} if it is no jaxsae any more"
    )


def _is_alive(pid: int) -> bool:
    """Say whether another process has this id; a lock with our own is from before ids began anew, as in a container."""
    if pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
