"""What a user sees while a stage runs: log lines, a bar with rate and ETA, and metrics on disk.

Nothing here imports jax; the index of the process is passed in, and only process 0 speaks.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from absl import logging

from jaxsae.artifacts import atomic_write, read_jsonl

LOG_SECONDS = 30.0  # between two lines of progress where there is no terminal


def human_bytes(count: int | float) -> str:
    """Return a byte count with a binary unit, such as "1.4 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: int | float) -> str:
    """Return a duration such as "4.2 s", "3 min 20 s" or "15 h 46 min"."""
    if seconds < 59.95:  # rounds to less than a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Show how far a stage is: a bar on a terminal, else a line every half minute; with rate and time left."""

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, process_index: int = 0) -> None:
        """Start counting at `done` of `total` units; the rate counts only what this process run adds."""
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.started = self.last_line = time.monotonic()
        self.is_main = process_index == 0
        self.bar = self._make_bar() if self.is_main and sys.stderr.isatty() else None

    def _make_bar(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        bar = Bar(*columns, *times, console=Console(stderr=True), transient=True)
        bar.start()
        self.task = bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return bar

    def update(self, done: int, note: str = "", *, total: int | None = None) -> None:
        """Say that `done` units are done, with a short note such as the current loss; `total` may become known late."""
        self.done, self.total = done, total or self.total
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, note=note)
        elif self.is_main and time.monotonic() - self.last_line > LOG_SECONDS:
            self.last_line = time.monotonic()
            logging.info("%s", self.line(note))

    def line(self, note: str = "") -> str:
        """Return the state in one line: done, total, rate and time left."""
        seconds = time.monotonic() - self.started
        rate = (self.done - self.first) / seconds if seconds > 0 else 0.0
        left = human_seconds((self.total - self.done) / rate) if rate > 0 else "unknown"
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left} left"
        return f"{text}, {note}" if note else text

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


class MetricsLog:
    """Write metrics to `metrics.jsonl` (rows) and to TensorBoard events (flat names), on process 0 only.

    A resumed run passes the step it resumes from: later rows, which an interrupted run left behind, are dropped, so
    that the file equals that of an uninterrupted run.
    """

    def __init__(self, directory: str | os.PathLike, *, resume_step: int = 0, process_index: int = 0) -> None:
        self.is_main = process_index == 0
        if not self.is_main:
            return
        from tensorboardX import SummaryWriter

        self.path = Path(directory) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        with atomic_write(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self.events = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one row `{"step": step, name: number, ...}` and its TensorBoard scalars."""
        if not self.is_main:
            return
        self.file.write(json.dumps({"step": step, **scalars}) + "\n")
        self.file.flush()
        for name, number in scalars.items():
            self.events.add_scalar(name, number, step)

    def close(self) -> None:
        """Flush and close both."""
        if self.is_main:
            self.file.close()
            self.events.close()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Return the rows of a `metrics.jsonl`; none without a file. A killed run's torn last line is cut off."""
    path = Path(path)
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with atomic_write(path) as partial:
            partial.write_bytes(whole)
    return [row for _, row in read_jsonl(path)]
