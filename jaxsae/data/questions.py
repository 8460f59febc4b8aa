"""Read and write question sets: JSON lines and tables with named columns, and the published sets of `sets`."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from jaxsae.artifacts import InputError, Question, atomic_write, read_jsonl, resolve_path
from jaxsae.data import sets
from jaxsae.data.labels import normalise
from jaxsae.data.rows import Row, read_table

# Field -> the columns that hold it where none is named, the first that is there; compared without case.
_COLUMNS = {
    "id": ("id",),
    "question": ("question",),
    "answers": ("answers", "answer"),
    "group": ("group",),
    "category": ("category",),
    "wrong_answers": ("wrong_answers", "incorrect_answers"),
    "knowledge": ("knowledge",),
}
_IDENTIFYING = ("id", "group")
_NEEDED = ("question", "answers")
_LISTS = ("answers", "wrong_answers")
_ENDINGS = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv"}


def read_questions(path: str | os.PathLike, *, format: str = "auto", columns: Sequence[str] = ()) -> list[Question]:
    """Read a question set.

    In "jsonl" (an object a line) and "csv" (first line names the columns; tab-separated where the file ends in .tsv) a
    row has `question` and `answers` and, if it likes, `id`, `group`, `category`, `wrong_answers` and `knowledge`.
    `answers` are the texts that count as right; `group` is what no split may divide, such as the fact asked for.
    Without an `id` or `group` column both come from the question's text. In a table, a cell of answers is a JSON list
    where it begins with "[", else answers between semicolons. Other columns are ignored.

    Args:
        path: the file, or "package://PACKAGE/PATH".
        format: "jsonl", "csv" or one of `sets.FORMATS`; "auto" goes by the file's ending, .jsonl, .csv or .tsv.
        columns: "FIELD=COLUMN" for columns of other names, as "answers=gold"; for jsonl and csv.

    Raises:
        InputError: the file is missing, empty or unreadable; a field is missing or has the wrong type or no text; an id
            comes twice. The row is named.
    """
    path = resolve_path(path)
    format = find_format(path) if format == "auto" else format
    if format in sets.FORMATS:
        if columns:
            raise InputError(
                f"questions.columns is {list(columns)}, but {format} has columns of its own; leave it empty"
            )
        return sets.read_set(path, format)
    if format not in _READERS:
        raise InputError(f"questions.format is {format!r}, expected one of {', '.join(FORMATS)}")
    return sets.with_ids(path, _READERS[format](path, _parse_columns(columns)))


def questions_of(path: Path, rows: Iterable[Row]) -> list[Question]:
    """Return the questions of rows with columns as of "jsonl", which `path` holds; raises as `read_questions` does."""
    return sets.with_ids(path, _read_rows(rows, {}))


def find_format(path: Path) -> str:
    """Return the format that a file's ending stands for.

    Raises:
        InputError: it stands for none.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise InputError(
            f"{path} ends in none of {', '.join(_ENDINGS)}; set questions.format to one of {', '.join(FORMATS)}"
        )
    return _ENDINGS[path.suffix.lower()]


def _parse_columns(columns: Sequence[str]) -> dict[str, str]:
    named = {}
    for entry in columns:
        field, _, column = entry.partition("=")
        if field not in _COLUMNS or not column:
            raise InputError(
                f"questions.columns holds {entry!r}, expected FIELD=COLUMN with a field among {', '.join(_COLUMNS)}"
            )
        named[field] = column
    return named


def _read_jsonl(path: Path, named: Mapping[str, str]) -> Iterator[tuple[str, Question]]:
    return _read_rows((Row(f"{path} line {number}", row) for number, row in read_jsonl(path)), named)


def _read_csv(path: Path, named: Mapping[str, str]) -> Iterator[tuple[str, Question]]:
    rows = read_table(path, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    return _read_rows(rows, named, cell=_split_cell)


def _read_rows(
    rows: Iterable[Row], named: Mapping[str, str], *, cell: Callable[[Row, str], Row] = lambda row, column: row
) -> Iterator[tuple[str, Question]]:
    """Yield (place, question); the first row says whether the rows have an id and a group.

    Args:
        cell: turns a row's column of answers into a list, where the file has no lists.
    """
    identifying: dict[str, str] | None = None
    for row in rows:
        columns = _find_columns(row, named)
        if identifying is None:
            identifying = {field: column for field, column in columns.items() if field in _IDENTIFYING}
            for column in (*named.values(), *(columns.get(field, field) for field in _NEEDED)):
                row.get(column)
        for field in _LISTS:
            row = cell(row, columns[field]) if columns.get(field) in row.fields else row
        yield row.where, _read_row(row, columns | identifying)


def _find_columns(row: Row, named: Mapping[str, str]) -> dict[str, str]:
    """Return field -> column, for the fields that the row, or its table, has."""
    there = {column.casefold(): column for column in reversed(row.columns or tuple(row.fields))}
    found = {
        field: next(there[name] for name in candidates if name in there)
        for field, candidates in _COLUMNS.items()
        if any(name in there for name in candidates)
    }
    return found | dict(named)


def _read_row(row: Row, columns: Mapping[str, str]) -> Question:
    question = row.text(columns.get("question", "question"))
    wrong = columns.get("wrong_answers")
    return Question(
        id=row.text(columns["id"]) if "id" in columns else "",
        question=question,
        answers=_read_answers(row, columns.get("answers", "answers")),
        group=row.text(columns["group"]) if "group" in columns else sets.group_of(question),
        category=_read_optional(row, columns.get("category")),
        wrong_answers=_read_list(row, wrong) if wrong is not None and wrong in row.fields else (),
        knowledge=_read_optional(row, columns.get("knowledge")),
    )


def _read_optional(row: Row, column: str | None) -> str:
    return row.text(column) if column is not None and column in row.fields else ""


def _read_list(row: Row, column: str) -> tuple[str, ...]:
    """Return a list of strings; a lone string is a list of one, unless the column's name is plural."""
    if isinstance(row.get(column), str) and column.casefold() not in _LISTS:
        return (row.text(column),)
    return row.texts(column)


def _read_answers(row: Row, column: str) -> tuple[str, ...]:
    answers = _read_list(row, column)
    if not answers:
        raise InputError(f"{row.where}: {column!r} is empty; at least one right answer is needed for a label")
    for answer in answers:
        if not normalise(answer):
            raise InputError(f"{row.where}: the answer {answer!r} holds no letter or digit; no answer could match it")
    return answers


def _split_cell(row: Row, column: str) -> Row:
    text = row.text(column)
    if text.lstrip().startswith("["):
        entries = list(row.json_texts(column))
    else:
        entries = [entry.strip() for entry in text.split(";") if entry.strip()]
    return dataclasses.replace(row, fields={**row.fields, column: entries})


_READERS: dict[str, Callable[[Path, Mapping[str, str]], Iterator[tuple[str, Question]]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
}
FORMATS = (*_READERS, *sets.FORMATS)


def write_questions(path: str | os.PathLike, questions: Iterable[Question]) -> None:
    """Write a question set that `read_questions` reads, atomically; empty optional fields are left out."""
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        for question in questions:
            row = {
                "id": question.id,
                "question": question.question,
                "answers": list(question.answers),
                "group": question.group,
            }
            row |= {"category": question.category} if question.category else {}
            row |= {"wrong_answers": list(question.wrong_answers)} if question.wrong_answers else {}
            row |= {"knowledge": question.knowledge} if question.knowledge else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
