"""`jaxsae audit FILE --out=DIR`: a benchmark's labelled answers to `audit.json`, `audit.md` and `audit.html`.

No language model, SAE or config is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jaxsae import artifacts
from jaxsae.artifacts import InputError
from jaxsae.data.benchmarks import Benchmark, LabelledAnswer, read_benchmark
from jaxsae.detection.audit import AuditRows, audit, check_rows
from jaxsae.progress import Progress
from jaxsae.report import audit as page

FILES = ("audit.json", "audit.md", "audit.html")
# What two cores audit in about three minutes; HaluEval-QA has 20,000 rows and 3 million characters.
MOST_ROWS = 30_000
MOST_CHARACTERS = 10_000_000


def run(
    path: str,
    out: Path,
    *,
    pairs: str | None = None,
    columns: Sequence[str] = (),
    seed: int = 0,
    bootstrap: int = 2000,
    dry_run: bool = False,
) -> str:
    """Audit a file, write the three files under `out` and return what the terminal shows.

    Args:
        pairs: how rows are made of a file with right and wrong answers, one of `benchmarks.PAIRS`.
        columns: "FIELD=COLUMN" for columns of other names.
        seed: of the sample, splits, noise and resamples.
        bootstrap: resamples of questions behind every interval.
        dry_run: read and check the file, write nothing.

    Raises:
        InputError: the file cannot be used, or `out` is no folder that can be written to.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file; name a folder")
    benchmark = read_benchmark(path, pairs=pairs, columns=columns)
    rows = take_rows(benchmark.rows, seed=seed)
    table = to_table(benchmark, rows)
    try:
        check_rows(table)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if dry_run:
        return "\n".join(_plan(path, out, benchmark, rows))
    _make_folder(out)
    with Progress("audit", 1, "steps") as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.update(done, what, total=total)

        measured = audit(table, seed=seed, bootstrap=bootstrap, progress=show)
    content: dict[str, Any] = {
        "file": str(path),
        "sha256": artifacts.sha256_file(artifacts.resolve_path(path)),
        "layout": benchmark.layout,
        "pairs": benchmark.pairs,
        "columns": benchmark.columns,
        "label_values": benchmark.labels,
        "rows_in_file": len(benchmark.rows),
        **measured,
    }
    artifacts.write_json(out / "audit.json", content)
    page.write(out, content)
    return f"{page.summary(content)}\n\naudit: {out}/audit.html (and audit.md, audit.json)"


def take_rows(rows: Sequence[LabelledAnswer], *, seed: int) -> list[LabelledAnswer]:
    """Return all rows or, where they are too many, those of groups drawn by the seed until the limits are reached.

    Rows stay in their order. At least one group is taken, whatever its size.
    """
    by_group: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_group.setdefault(row.group, []).append(number)
    characters = [len(row.question) + len(row.answer) for row in rows]
    if len(rows) <= MOST_ROWS and sum(characters) <= MOST_CHARACTERS:
        return list(rows)
    groups = list(by_group.values())
    taken: list[int] = []
    n_characters = 0
    for place in np.random.default_rng([seed, 4]).permutation(len(groups)):
        numbers = groups[place]
        n_characters += sum(characters[number] for number in numbers)
        if taken and (len(taken) + len(numbers) > MOST_ROWS or n_characters > MOST_CHARACTERS):
            break
        taken += numbers
    logging.info("%d of %d rows are audited: whole groups drawn by the seed", len(taken), len(rows))
    return [rows[number] for number in sorted(taken)]


def to_table(benchmark: Benchmark, rows: Sequence[LabelledAnswer]) -> AuditRows:
    """Return rows column by column."""
    return AuditRows(
        questions=tuple(row.question for row in rows),
        answers=tuple(row.answer for row in rows),
        labels=np.array([row.label for row in rows], dtype=np.int64),
        groups=tuple(row.group for row in rows),
        units=np.array([row.unit for row in rows], dtype=np.int64),
        is_paired=benchmark.pairs is not None,
        categories=tuple(row.category for row in rows),
        splits=tuple(row.split for row in rows),
    )


def _make_folder(out: Path) -> None:
    """Make the folder first, so that minutes of work do not end at one that cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in artifacts.DISK_FULL:
            raise
        raise InputError(f"--out={out} cannot be made: {error.strerror}; name another folder") from None


def _plan(path: str, out: Path, benchmark: Benchmark, rows: Sequence[LabelledAnswer]) -> list[str]:
    how = f"{benchmark.layout}, --pairs={benchmark.pairs}" if benchmark.pairs else "a row per answer"
    wrong = sum(row.label for row in rows)
    return [
        f"would audit {len(rows)} of {len(benchmark.rows)} rows of {path} ({how}): {len(rows) - wrong} right, {wrong} "
        f"hallucinated, {len({row.group for row in rows})} questions",
        *(f"would write {out / name}" for name in FILES),
    ]
