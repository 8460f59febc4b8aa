"""Time tasks in turns within one run: a machine's slow minutes meet all of them, and ratios can be trusted."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

N_TURNS = 5
PAUSE = 0.5  # seconds before each; OpenMP's idle threads spin for 0.2 and would take the other library's cores


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What a task's turns took: the median and the quartiles."""

    median: float
    low: float
    high: float


def take_turns(n_turns: int = N_TURNS, **tasks: Callable[[], Any]) -> dict[str, Seconds]:
    """Return the seconds of each task; the first turn, which compiles, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(n_turns + 1):
        for name, task in tasks.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            task()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: _summarise(times) for name, times in seconds.items()}


def _summarise(times: list[float]) -> Seconds:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Seconds(median, low, high)
