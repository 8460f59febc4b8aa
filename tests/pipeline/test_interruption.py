"""A run that is killed and interrupted at many moments ends with the numbers of one that was not, bit for bit.

One workdir goes through all the moments: each time the same command is started again, and stopped at the next one.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxsae import artifacts, sae
from jaxsae.pipeline import answer as answer_stage
from jaxsae.pipeline.stages import Interruption, StopSignal

EXIT_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 120  # seconds until a moment must have come

# The first test waits for a whole run and for another that is stopped eleven times.
pytestmark = pytest.mark.timeout(900)


def n_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a signal is sent: once `has_come(workdir)`, and `delay` seconds later."""

    name: str
    signal: signal.Signals
    has_come: Callable[[Path], bool]
    delay: float = 0.0


def appears(pattern):
    return lambda workdir: any(workdir.glob(pattern))


MOMENTS = (
    Moment("extract: between two shards", signal.SIGKILL, appears("activations/done/0.json")),
    Moment("train: after a checkpoint", signal.SIGTERM, appears("saes/manifests/20.json")),
    Moment("train: in the middle of a checkpoint", signal.SIGKILL, appears("saes/checkpoints/40*")),
    Moment("train: after another checkpoint", signal.SIGUSR1, appears("saes/manifests/60.json")),
    Moment("train: trained, not measured", signal.SIGKILL, appears("saes/manifests/80.json")),
    Moment("answer: after a chunk", signal.SIGINT, appears("answers.partial.jsonl")),
    Moment(
        "answer: after two chunks", signal.SIGKILL, lambda workdir: n_lines(workdir / "answers.partial.jsonl") > 128
    ),
    Moment("track: as the features are written", signal.SIGKILL, appears("*features.npz*")),
    Moment("detect: early", signal.SIGTERM, appears("manifests/track.json"), delay=0.5),
    Moment("detect: as its files are written", signal.SIGKILL, appears("detector/*")),
    Moment("evaluate: between two figures", signal.SIGKILL, appears("figures/*")),
)


def is_held_by(process, workdir):
    """Say whether the workdir's lock is this process's, not the one that a killed process left."""
    try:
        return json.loads((workdir / ".lock").read_text())["pid"] == process.pid
    except FileNotFoundError:
        return False


def stop_at(process, moment, workdir):
    """Send the moment's signal when it has come and return the exit code.

    What the process before left can be all that the moment asks for: the signal waits until this one has begun.
    """
    deadline = time.monotonic() + PATIENCE
    while not (is_held_by(process, workdir) and moment.has_come(workdir)):
        assert process.poll() is None, f"ended with {process.returncode} before {moment.name}"
        assert time.monotonic() < deadline, f"{moment.name} has not come"
        time.sleep(0.002)
    time.sleep(moment.delay)
    process.send_signal(moment.signal)
    return process.wait(PATIENCE)


@dataclasses.dataclass(frozen=True)
class Battered:
    """A run that went through all moments and then to its end, and how each process ended."""

    run: object
    exit_codes: dict[str, int]
    said: dict[str, str]
    pids: dict[str, int]


@pytest.fixture(scope="module")
def battered(finished, environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("battered")
    run = type(finished)(folder / "run", finished.questions)
    exit_codes, said, pids = {}, {}, {}
    for moment in (*MOMENTS, None):
        name = moment.name if moment else "the end"
        with run.start("run", folder / "stderr.txt", environment) as process:
            try:
                pids[name] = process.pid
                exit_codes[name] = stop_at(process, moment, run.workdir) if moment else process.wait(PATIENCE)
            finally:
                process.kill()
        said[name] = (folder / "stderr.txt").read_text()
    return Battered(run, exit_codes, said, pids)


def test_signals__end_the_process_with_their_exit_codes(battered):
    expected = {moment.name: EXIT_CODES[moment.signal] for moment in MOMENTS}
    assert battered.exit_codes == expected | {"the end": 0}, battered.said


def test_signals__that_can_be_caught_end_in_one_line_without_a_traceback(battered):
    for moment in MOMENTS:
        said = battered.said[moment.name]
        assert "Traceback" not in said
        if moment.signal != signal.SIGKILL:
            assert said.splitlines()[-1] == "jaxsae: interrupted; the same command goes on from here"
    assert "signal SIGTERM: finishing the step, then saving" in battered.said["train: after a checkpoint"]


def test_train__goes_on_from_the_step_at_which_it_was_interrupted(battered):
    """A signal saves between two checkpoints; a kill goes back to the last one."""

    def first_step(name):
        line = next(line for line in battered.said[name].splitlines() if "from step" in line)
        return int(line.rpartition(" ")[2])

    assert first_step("train: after a checkpoint") == 0
    after_signal = first_step("train: in the middle of a checkpoint")
    assert 20 < after_signal < 40
    assert first_step("train: after another checkpoint") == after_signal
    assert 60 < first_step("train: trained, not measured") < 80
    assert first_step("answer: after a chunk") == 80


def test_lock__of_a_killed_process_is_named_and_taken_over(battered):
    names = [moment.name for moment in MOMENTS] + ["the end"]
    for moment, following in zip(MOMENTS, names[1:], strict=True):
        line = f".lock was left by process {battered.pids[moment.name]}, which is gone; taking it over"
        assert (line in battered.said[following]) == (moment.signal == signal.SIGKILL)


def test_workdir__holds_no_half_written_file_in_the_end(battered, finished):
    files, expected = (
        {str(path.relative_to(one.workdir)) for path in one.workdir.rglob("*") if "events" not in path.name}
        for one in (battered.run, finished)
    )
    assert {name for name in files ^ expected if "checkpoints/" not in name and "saes/manifests/" not in name} == set()
    assert not [name for name in files if "partial" in name or "tmp" in name or name.endswith(".lock")]


@pytest.mark.parametrize(
    "name", ["answers.jsonl", "predictions.csv", "logs/metrics.jsonl", "saes/evaluation.json", "saes/suite.json"]
)
def test_file__is_the_same_byte_for_byte(battered, finished, name):
    assert (battered.run.workdir / name).read_bytes() == (finished.workdir / name).read_bytes()


@pytest.mark.parametrize("name", ["features.npz", "tracks.npz", "activations/tokens.npz"])
def test_arrays__are_the_same_bit_for_bit(battered, finished, name):
    assert_same_arrays(battered.run.workdir / name, finished.workdir / name)


def assert_same_arrays(left, right):
    left, right = (artifacts.read_npz(path, rebuild="") for path in (left, right))
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def test_metrics__are_the_same_but_for_time_and_memory(battered, finished):
    left, right = (artifacts.read_json(one.workdir / "metrics.json", rebuild="") for one in (battered.run, finished))
    for name in ("seconds", "peak_bytes"):
        assert left.pop(name).keys() == right.pop(name).keys()
    assert left == right


def test_store__is_the_same_shard_for_shard(battered, finished):
    for one in range(4):
        name = f"activations/resid.zarr/c/0/{one}/0"
        assert (battered.run.workdir / name).read_bytes() == (finished.workdir / name).read_bytes()


@pytest.mark.parametrize("which", ["best", "last"])
def test_saes__are_the_same_bit_for_bit(battered, finished, which):
    left, right = (sae.load(one.workdir / "saes", which=which) for one in (battered.run, finished))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def test_report__is_the_same_but_for_time_and_place(battered, finished):
    """The report's tables of results hold the same numbers; times, memory and the host's lines may differ."""
    left, right = (
        (one.workdir / "report.md").read_text(encoding="utf-8").splitlines() for one in (battered.run, finished)
    )
    assert len(left) == len(right)
    same = sum(one == other for one, other in zip(left, right, strict=True))
    assert same > 0.8 * len(left)
    left, right = (
        sorted(path.name for path in (one.workdir / "figures").iterdir()) for one in (battered.run, finished)
    )
    assert left == right


def test_second_process__is_refused_while_the_first_one_runs(finished, environment, tmp_path, capsys):
    run = type(finished)(tmp_path / "run", finished.questions)
    with run.start("extract", tmp_path / "stderr.txt", environment) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not (run.workdir / ".lock").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGSTOP)
            assert run("answer") == 2
            assert f"{run.workdir} is in use by process {process.pid} on " in capsys.readouterr().err
            assert not (run.workdir / "answers.jsonl").exists()
            process.send_signal(signal.SIGCONT)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert not (run.workdir / ".lock").exists()


@pytest.fixture
def stop():
    """Return a `StopSignal`; the process has its own handlers back afterwards."""
    handlers, hook = {number: signal.getsignal(number) for number in CAUGHT}, sys.unraisablehook
    yield StopSignal()
    sys.unraisablehook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


def send(number, times=1, sent=None):
    """Send this process a signal, and note each time that it went on afterwards."""
    for _ in range(times):
        os.kill(os.getpid(), number)
        sent.append(number)


def send_while_polled(stop, number, times, sent):
    with stop.polled() as should_stop:
        assert not should_stop()
        send(number, times, sent)
        assert should_stop()


@pytest.mark.parametrize("number", CAUGHT)
def test_stop_signal__waits_for_a_stage_that_asks_for_it(stop, number):
    sent = []
    with pytest.raises(Interruption) as interruption:
        send_while_polled(stop, number, 1, sent)
    assert sent == [number]
    assert interruption.value.exit_code == EXIT_CODES[number]


@pytest.mark.parametrize("number", CAUGHT)
def test_stop_signal__does_not_wait_for_a_stage_that_does_not_ask(stop, number):
    sent = []
    with pytest.raises(Interruption) as interruption:
        send(number, 2, sent)
    assert sent == []
    assert interruption.value.exit_code == EXIT_CODES[number]


def test_stop_signal__does_not_wait_a_second_time(stop):
    sent = []
    with pytest.raises(Interruption):
        send_while_polled(stop, signal.SIGTERM, 3, sent)
    assert sent == [signal.SIGTERM]


class SendsWhenCollected:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def collect_and_wait():
    SendsWhenCollected()  # is collected at once, and Python drops what is raised meanwhile
    time.sleep(10)


def test_stop_signal__comes_again_when_python_dropped_it(stop, capfd):
    started = time.monotonic()
    with pytest.raises(Interruption) as interruption:
        collect_and_wait()
    assert interruption.value.exit_code == 143
    assert time.monotonic() - started < 5
    assert "Exception ignored" not in capfd.readouterr().err


def make_partial(finished, path, n_rows, tail=b""):
    """Write what a process leaves that was killed after `n_rows` answers, none of which can have been computed."""
    rows = [dataclasses.asdict(row) for row in artifacts.read_answers(finished.workdir / "answers.jsonl")[:n_rows]]
    lines = [{"identity": "this run"}, *({**row, "answer": "from before"} for row in rows)]
    path.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + tail)


@pytest.mark.parametrize(
    ("n_rows", "tail", "n_kept"), [(0, b"", 0), (63, b"", 0), (64, b"", 64), (130, b'{"id": "x', 128), (5, b"\0\0", 0)]
)
def test_answers_of_an_interrupted_run__are_kept_by_whole_chunks(finished, tmp_path, n_rows, tail, n_kept):
    """A chunk that was cut would be answered in other batches, whose log-probabilities have other last digits."""
    path = tmp_path / "answers.partial.jsonl"
    make_partial(finished, path, n_rows, tail)
    kept = answer_stage._read_partial(path, "this run", 64)
    assert [row.answer for row in kept] == ["from before"] * n_kept
    assert n_lines(path) == 1 + n_kept
    answer_stage._append(path, "this run", kept[:1])
    assert len(answer_stage._read_partial(path, "this run", 1)) == n_kept + len(kept[:1])


def test_answers_of_another_run__are_dropped_with_a_line(finished, tmp_path, caplog):
    path = tmp_path / "answers.partial.jsonl"
    make_partial(finished, path, 64)
    assert answer_stage._read_partial(path, "another run", 64) == []
    assert f"{path} is of other questions, settings or model; starting anew" in caplog.text
    assert not path.exists()


@pytest.mark.parametrize("line", [b'{"id": 3}\n', b"nothing\n"])
def test_answers_of_an_interrupted_run__that_are_damaged_are_named(finished, tmp_path, line):
    path = tmp_path / "answers.partial.jsonl"
    make_partial(finished, path, 3, line)
    with pytest.raises(artifacts.InputError, match=rf"{path} is damaged \(.*; delete it and run jaxsae answer"):
        answer_stage._read_partial(path, "this run", 1)
