"""Rows of question files, each with its place for the error messages, and the checks of their fields."""

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsae.artifacts import InputError, read_jsonl
from jaxsae.data.labels import normalise


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file: its fields, and `where` it stands, such as "q.csv line 3".

    Attributes:
        columns: of a table, all its columns, those where this row is blank among them.
    """

    where: str
    fields: Mapping[str, Any]
    columns: tuple[str, ...] = ()

    def get(self, name: str) -> Any:
        """Return a field of any type.

        Raises:
            InputError: it is not there.
        """
        if name not in self.fields:
            raise InputError(f"{self.where} lacks the field {name!r}; it has {', '.join(self.fields) or 'none'}")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return a field that is a string and not blank, as it is.

        Raises:
            InputError: it is not there, of another type, or blank.
        """
        content = self.get(name)
        if not isinstance(content, str):
            raise InputError(f"{self.where}: {name!r} must be a string, got {_clip(content)}")
        if not content.strip():
            raise InputError(f"{self.where}: {name!r} is empty")
        return content

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a field that is a list of strings.

        Raises:
            InputError: it is not there, or of another type.
        """
        content = self.get(name)
        if not isinstance(content, list) or not all(isinstance(entry, str) for entry in content):
            raise InputError(f"{self.where}: {name!r} must be a list of strings, got {_clip(content)}")
        return tuple(content)

    def json_texts(self, name: str) -> tuple[str, ...]:
        """Return a field that is a string holding a JSON list of strings, as tables keep lists.

        Raises:
            InputError: it is not there, or of another type.
        """
        try:
            content = json.loads(self.text(name))
        except json.JSONDecodeError as error:
            raise InputError(f"{self.where}: {name!r} is no JSON list ({error}): {_clip(self.get(name))}") from None
        return Row(self.where, {name: content}).texts(name)

    def part(self, name: str) -> "Row":
        """Return a field that is an object, as a row of its own.

        Raises:
            InputError: it is not there, or of another type.
        """
        content = self.get(name)
        if not isinstance(content, dict):
            raise InputError(f"{self.where}: {name!r} must be an object, got {_clip(content)}")
        return Row(f"{self.where}, {name}", content)


def read_table(path: Path, *, delimiter: str = ",") -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file whose first line names the columns; blank cells count as not there.

    Raises:
        InputError: the file is missing, not UTF-8, badly quoted, or a row has another number of cells than the header.
    """
    _check_file(path)
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                number = reader.line_num
                if None in cells or None in cells.values():
                    raise InputError(f"{path} line {number} has not the {len(reader.fieldnames or ())} cells of line 1")
                filled = {name: cell for name, cell in cells.items() if cell.strip()}
                yield Row(f"{path} line {number}", filled, tuple(cells))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no readable table after line {number}: {error}") from None


def read_json(path: Path, *, key: str | None = None) -> Iterator[Row]:
    """Yield the objects of a JSON list, of a list under `key` of one object, or of a file with one object a line.

    Raises:
        InputError: the file is missing or not UTF-8 JSON, or an entry is not an object.
    """
    _check_file(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        # Every file of more than one line of JSON stops at extra data; a list has none.
        if error.msg != "Extra data" or text.lstrip().startswith("["):
            raise InputError(f"{path} is not readable JSON: {error}") from None
        yield from (Row(f"{path} line {number}", row) for number, row in read_jsonl(path))
        return
    if isinstance(content, dict):
        content = content.get(key, [content])
    for number, entry in enumerate(content if isinstance(content, list) else [content], start=1):
        if not isinstance(entry, dict):
            raise InputError(f"{path} entry {number} holds a JSON {type(entry).__name__}, expected an object")
        yield Row(f"{path} entry {number}", entry)


def usable(answers: Sequence[str]) -> tuple[str, ...]:
    """Return the answers a label can match, blanks at their ends cut: each normalised text once, none without words."""
    kept: dict[tuple[str, ...], str] = {}
    for answer in answers:
        words = normalise(answer)
        if words:
            kept.setdefault(words, answer.strip())
    return tuple(kept.values())


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing or not a file")


def _clip(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False)[:80]
