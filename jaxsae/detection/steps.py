"""Independent steps on threads, each reported as it ends."""

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any

import joblib
from threadpoolctl import threadpool_limits

Progress = Callable[[int, int, str], None]


class Steps:
    """Run independent steps on threads and report each as it ends."""

    def __init__(self, n_jobs: int, progress: Progress | None, *, total: int) -> None:
        self.n_jobs = joblib.cpu_count() if n_jobs == -1 else n_jobs
        self.progress = progress
        self.total = total
        self.done = 0

    def run(self, steps: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
        """Return what each step returns, by its key; the first error stops those that have not begun."""
        executor = concurrent.futures.ThreadPoolExecutor(self.n_jobs, initializer=_use_one_openmp_thread)
        try:
            keys = {executor.submit(step): key for key, step in steps.items()}
            finished = {}
            for future in concurrent.futures.as_completed(keys):
                finished[keys[future]] = future.result()
                self.report(" ".join(map(str, keys[future])))
            return finished
        finally:
            executor.shutdown(cancel_futures=True)

    def report(self, what: str) -> None:
        """Count one step as done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)


def _use_one_openmp_thread() -> None:
    """Keep boosting to the thread it is called from: the number is each thread's own, and steps have threads enough."""
    threadpool_limits(1, user_api="openmp")
