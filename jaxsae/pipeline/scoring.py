"""The command `jaxsae score`: a prompt to a page of text, or a file of rows to JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsae import artifacts, report
from jaxsae.artifacts import InputError
from jaxsae.pipeline.score import Detector, Score
from jaxsae.progress import Progress

_ROW_FIELDS = ("id", "prompt", "answer")


def score_prompt(workdir: Path, prompt: str, answer: str | None, *, model: str | None, tracks: int, draws: int) -> str:
    """Return what is to be said of one answer, the model's own if there is none; raises as `Detector.score` does."""
    detector = Detector.load(workdir, model=model)
    score = detector.score(prompt, answer, tracks=tracks, draws=draws)
    return report.describe_score(score.to_dict(), n_layers=detector.judge.lm.n_layers)


def score_file(workdir: Path, source: Path, out: Path | None, *, model: str | None, tracks: int, draws: int) -> int:
    """Score the rows of a JSONL file; write a JSON object a line to `out`, or to stdout as they come; return how many.

    Raises:
        InputError: `out` exists, a row cannot be used (it is named, before anything is scored), or the run cannot.
    """
    if out is not None and out.exists():
        raise InputError(f"{out} exists already; name a new file with --out")
    rows = read_rows(source)
    scores = Detector.load(workdir, model=model).scores(rows, tracks=tracks, draws=draws)
    with Progress("score", len(rows), "answers") as bar:
        done = _counted(scores, bar)
        if out is not None:
            artifacts.write_jsonl(out, (score.to_dict() for score in done))
        else:
            for score in done:
                print(json.dumps(score.to_dict(), ensure_ascii=False, allow_nan=False), flush=True)
    return len(rows)


def _counted(scores: Iterator[Score], bar: Progress) -> Iterator[Score]:
    for number, score in enumerate(scores, start=1):
        yield score
        bar.update(number)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file: `prompt`, and `answer` and `id` where wanted; rows without id are named by line.

    Raises:
        InputError: there is no row; a line is damaged, has an unknown field or a wrong type; or an id comes twice.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, row in artifacts.read_jsonl(path):
        unknown = sorted(set(row) - set(_ROW_FIELDS))
        if unknown or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            found = f"unknown {', '.join(unknown)}" if unknown else f"prompt {row.get('prompt')!r}"
            raise InputError(
                f"{path} line {number}: {found}; expected prompt (a text), and at most answer and id beside"
            )
        for name in ("answer", "id"):
            if row.get(name) is not None and not isinstance(row[name], str):
                raise InputError(f"{path} line {number}: {name} is {row[name]!r}, expected a text, or leave it out")
        name = row.get("id") or f"line {number}"
        if name in rows:
            raise InputError(f"{path} line {number}: id {name!r} comes twice")
        rows[name] = row | {"id": name}
    if not rows:
        raise InputError(f"{path} holds no row; expected one JSON object a line, with prompt and perhaps answer")
    return list(rows.values())
