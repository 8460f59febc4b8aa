"""Try settings on a run's features, in this process or in several, each setting to a file of its own."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxsae import artifacts, sae
from jaxsae.artifacts import Answer, Features, InputError
from jaxsae.config import RunConfig
from jaxsae.detection.nesting import quiet_single_threaded_blas
from jaxsae.detection.splits import make_folds
from jaxsae.detection.sweep import Known, Point, fit_point
from jaxsae.detection.tracks import CONTROLS, FAMILIES, FAMILY_DETECTORS, METHOD
from jaxsae.pipeline.detect import make_tables
from jaxsae.pipeline.families import read_families
from jaxsae.pipeline.links import needs_links, read_links
from jaxsae.pipeline.points import Sweep
from jaxsae.pipeline.track import read_concepts, track_arrays
from jaxsae.pipeline.trials import Trial
from jaxsae.progress import Progress


@dataclasses.dataclass
class Bench:
    """A run's features, answers and decoders, on which settings are tried one after the other."""

    sweep: Sweep
    features: Features
    answers: list[Answer]
    decoders: sae.Decoders
    folds: Int[np.ndarray, "repeats N"] | None = None  # the same for all settings
    known: Known = dataclasses.field(default_factory=dict)
    tracked: tuple[Any, dict[str, np.ndarray]] = (None, {})  # the last tracks, by their key

    @classmethod
    def load(cls, sweep: Sweep) -> "Bench":
        """Read the run's files; raises InputError where one is damaged."""
        features = artifacts.read_features(sweep.workdir / "features.npz")
        answers = artifacts.read_answers(sweep.workdir / "answers.jsonl")
        return cls(sweep, features, answers, sae.Decoders(sweep.workdir / "saes"))

    def try_out(self, trial: Trial) -> None:
        """Follow tracks, fit and judge, and write the trial's point."""
        with quiet_single_threaded_blas():
            protocol = self.sweep.protocol_of(trial.config)
            has_families = _read_families(protocol.parts)
            controls = tuple(name.removeprefix("tracks_") for name in protocol.parts if name in CONTROLS)
            key = trial.tracks_key, controls, has_families
            if self.tracked[0] != key:
                self.tracked = key, self._follow(trial, controls, has_families=has_families)
            arrays = self.tracked[1]
            families = read_families(arrays, f"setting {trial.name}") if has_families else {}
            split_by = self.sweep.config.detection.split_by
            tables = make_tables(self.features, self.answers, arrays, families, split_by=split_by)
            if self.folds is None:
                self.folds = make_folds(tables, protocol)
            self.sweep.write_point(trial, fit_point(tables, protocol, folds=self.folds, known=self.known))

    def _follow(self, trial: Trial, controls: Sequence[str], *, has_families: bool) -> dict[str, np.ndarray]:
        """Return what `tracks.npz` would hold, as far as the detectors read it."""
        workdir, config = self.sweep.workdir, trial.config.tracking
        return track_arrays(
            self.features,
            self.decoders,
            config,
            links=read_links(workdir) if needs_links(config) else None,
            concepts=read_concepts(workdir) if has_families else None,
            controls=controls,
        )


def _read_families(parts: Sequence[str]) -> bool:
    """Say whether some of the detectors read more of the tracks than their metrics."""
    readers = {name for family in FAMILIES if family != "metrics" for name in FAMILY_DETECTORS[family]}
    return bool(readers.union([METHOD]).intersection(parts))


class Workers:
    """Processes that try settings, or this one alone; what a setting gives depends on neither number nor order.

    Processes and not threads, which were as fast: a process can be ended in the middle of a forest.
    """

    def __init__(self, sweep: Sweep, bench: Bench | None, n_workers: int) -> None:
        """Try settings on the bench or, without one, in `n_workers` processes, each with its own."""
        self.sweep = sweep
        self.bench = bench
        self.n_workers = n_workers
        self._others = set(multiprocessing.active_children())
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor is None:
            return
        if kind is not None:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        self._executor.shutdown(cancel_futures=True)

    def points(self, trials: Sequence[Trial], bar: Progress | None) -> dict[str, Point]:
        """Return the trials' points by name, in their order, making those that are not there.

        Raises:
            InputError: a point cannot be made, or a process was killed.
        """
        found = {trial.name: self.sweep.read_point(trial) for trial in trials}
        due = _by_tracks([trial for trial in trials if found[trial.name] is None])
        n_kept = len(trials) - len(due)
        if bar is not None:
            bar.done = bar.first = n_kept
        for n_done, name in enumerate(self._try_out(due), start=n_kept + 1):
            if bar is not None:
                bar.update(n_done, name)
        found |= {trial.name: self.sweep.read_point(trial) for trial in due}
        return {name: _there(name, point) for name, point in found.items()}

    def _try_out(self, trials: Sequence[Trial]) -> Iterator[str]:
        """Make points, yielding each trial's name when it is done."""
        if self.bench is not None:
            for trial in trials:
                self.bench.try_out(trial)
                yield trial.name
            return
        names = self._submit(trials)
        try:
            for future in concurrent.futures.as_completed(names):
                future.result()
                yield names[future]
        except BrokenProcessPool:
            raise InputError(
                f"a process that tried settings was killed, perhaps as {self.n_workers} of them need more memory than "
                "there is; the same command goes on, with --config.sweep.workers=1 in one process"
            ) from None

    def _submit(self, trials: Sequence[Trial]) -> dict[concurrent.futures.Future, str]:
        if self._executor is None:
            self._executor = concurrent.futures.ProcessPoolExecutor(
                self.n_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.sweep,),
            )
        with _interrupts_blocked():
            return {self._executor.submit(_try_out, trial): trial.name for trial in trials}


def _by_tracks(trials: Sequence[Trial]) -> list[Trial]:
    """Put trials of the same tracks side by side, which are then followed once."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.tracks_key, []).append(trial)
    return [trial for group in groups.values() for trial in group]


def _there(name: str, point: Point | None) -> Point:
    if point is None:
        raise InputError(f"the point of setting {name} was changed while the sweep ran; run the same command again")
    return point


def n_workers(config: RunConfig, n_trials: int) -> int:
    """Return how many processes a sweep of so many settings takes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = n_trials if config.sweep.trials is None else cores
    return max(1, min(config.sweep.workers or cores, most))


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes that Ctrl-C, which the terminal sends to all, does not reach: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_of_worker: dict[str, Bench] = {}  # a worker process has one


def _start_worker(sweep: Sweep) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _of_worker["bench"] = Bench.load(sweep)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, even if it was killed and could not say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _try_out(trial: Trial) -> None:
    _of_worker["bench"].try_out(trial)
