"""Read and write question sets, and put a question into a prompt."""

import json
import os
from collections.abc import Iterable
from typing import Any

from jaxsae.artifacts import InputError, Question, atomic_write, read_jsonl, resolve_path
from jaxsae.data.labels import normalise

_PLACEHOLDER = "{question}"


def read_questions(path: str | os.PathLike) -> list[Question]:
    """Read a question set: one JSON object a line with `id, question, answers[], group` and, if wanted, `category`.

    `answers` are the texts that count as right; `group` is what no split may divide, such as the fact asked for.
    Other fields are ignored. `path` may be "package://PACKAGE/PATH".

    Raises:
        InputError: the file is missing, empty or not UTF-8 JSON lines; a field is missing or has the wrong type or no
            text; an id comes twice. The line is named.
    """
    path = resolve_path(path)
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        question = Question(
            id=_read_text(row, "id", where),
            question=_read_text(row, "question", where),
            answers=_read_answers(row, where),
            group=_read_text(row, "group", where),
            category=_read_text(row, "category", where) if "category" in row else "",
        )
        if question.id in lines:
            raise InputError(f"{where} repeats the id {question.id!r} of line {lines[question.id]}; ids must differ")
        lines[question.id] = number
        questions.append(question)
    if not questions:
        raise InputError(f"{path} holds no question")
    return questions


def write_questions(path: str | os.PathLike, questions: Iterable[Question]) -> None:
    """Write a question set that `read_questions` reads, atomically; an empty category is left out."""
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        for question in questions:
            row = {
                "id": question.id,
                "question": question.question,
                "answers": list(question.answers),
                "group": question.group,
            }
            row |= {"category": question.category} if question.category else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def format_prompt(template: str, question: Question | str) -> str:
    """Return `template` with the question in place of each "{question}"; other braces stay as they are.

    Raises:
        InputError: the template has no "{question}".
    """
    if _PLACEHOLDER not in template:
        raise InputError(f"questions.prompt must hold {_PLACEHOLDER}, got {template!r}")
    return template.replace(_PLACEHOLDER, question.question if isinstance(question, Question) else question)


def _read_text(row: dict[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise InputError(f"{where} lacks the field {name!r}; it has {', '.join(row) or 'none'}")
    if not isinstance(row[name], str):
        raise InputError(f"{where}: {name!r} must be a string, got {json.dumps(row[name])[:80]}")
    if not row[name].strip():
        raise InputError(f"{where}: {name!r} is empty")
    return row[name]


def _read_answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    if "answers" not in row:
        raise InputError(f"{where} lacks the field 'answers'; it has {', '.join(row) or 'none'}")
    answers = row["answers"]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{where}: 'answers' must be a list of strings, got {json.dumps(answers)[:80]}")
    if not answers:
        raise InputError(f"{where}: 'answers' is empty; at least one right answer is needed for a label")
    for answer in answers:
        if not normalise(answer):
            raise InputError(f"{where}: the answer {answer!r} holds no letter or digit; no answer could match it")
    return tuple(answers)
