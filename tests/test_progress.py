"""What is said while a stage runs, and the metrics that a killed run leaves."""

import json
import re

import pytest
from absl import logging

from jaxsae import progress
from jaxsae.progress import MetricsLog, Progress, human_bytes, human_seconds, read_metrics


class Clock:
    """A monotonic clock that stands still until it is told."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "info", lambda form, *words: said.append(form % words))
    return said


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.4 * 2**30, "1.4 GiB"),
        (917e9, "854.0 GiB"),
        (2**42, "4.0 TiB"),
    ],
)
def test_human_bytes__uses_binary_units(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (56_760, "15 h 46 min")],
)
def test_human_seconds__is_what_one_says(seconds, text):
    assert human_seconds(seconds) == text


def test_line__has_rate_and_time_left_of_this_run_alone(clock):
    bar = Progress("train", 700, "steps", done=100)
    assert bar.line() == "train: 100/700 steps, 0 steps/s, unknown left"
    clock.seconds += 20
    bar.update(150)  # 50 steps in 20 s; the 100 before were another run's
    assert bar.line("fvu 0.1") == "train: 150/700 steps, 2.5 steps/s, 3 min 40 s left, fvu 0.1"


def test_update__speaks_every_half_minute(clock, lines):
    with Progress("extract", 1, "shards") as bar:
        for done in range(1, 8):
            clock.seconds += 10
            bar.update(done, total=14)
    assert lines == ["extract: 4/14 shards, 0.1 shards/s, 1 min 40 s left"]


def test_update__is_silent_on_other_processes(clock, lines):
    bar = Progress("extract", 9, "shards", process_index=1)
    clock.seconds += 1000
    bar.update(3)
    assert lines == []
    assert bar.bar is None


def test_bar__is_drawn_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("answer", 9, "questions", done=2) as bar:
        bar.update(5, "well")
        bar.bar.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "answer" in shown
    assert "5/9" in shown
    assert "well" in shown


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(directory, steps, **arguments):
    log = MetricsLog(directory, **arguments)
    for step in steps:
        log.write(step, {"train/fvu/layer_00": step / 7, "train/loss/layer_01": 1.0})
    log.close()


def test_metrics_log__of_a_resumed_run_equals_that_of_an_uninterrupted_one(tmp_path):
    write_steps(tmp_path / "whole", range(10, 60, 10))
    write_steps(tmp_path / "cut", range(10, 50, 10))  # killed after step 40, when the newest checkpoint was of step 20
    write_steps(tmp_path / "cut", range(30, 60, 10), resume_step=20)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert whole
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == whole
    assert rows_of(tmp_path / "cut" / "metrics.jsonl")[1] == {
        "step": 20,
        "train/fvu/layer_00": 20 / 7,
        "train/loss/layer_01": 1.0,
    }


def test_metrics_log__of_a_run_that_starts_anew_is_empty(tmp_path):
    write_steps(tmp_path, [10, 20])
    write_steps(tmp_path, [], resume_step=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_metrics_log__cuts_off_a_torn_last_line(tmp_path):
    write_steps(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 30, "train/fv')
    assert [row["step"] for row in read_metrics(path)] == [10, 20]
    assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"step": 30, "train/fv')
    write_steps(tmp_path, [30], resume_step=20)
    assert [row["step"] for row in rows_of(path)] == [10, 20, 30]


def test_metrics_log__writes_tensorboard_scalars_under_the_same_names(tmp_path):
    write_steps(tmp_path, [10, 20])
    events = b"".join(path.read_bytes() for path in tmp_path.glob("events.out.tfevents.*"))
    assert events.count(b"train/fvu/layer_00") == 2
    assert events.count(b"train/loss/layer_01") == 2


def test_metrics_log__of_another_process_writes_nothing(tmp_path):
    write_steps(tmp_path, [10, 20], process_index=1)
    assert not any(tmp_path.iterdir())


def test_read_metrics__without_a_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
