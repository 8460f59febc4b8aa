"""Read labelled answers of any hallucination benchmark: a row per answer, or a right and a wrong answer per question.

    a row per answer      question, answer, label (1 = hallucinated) and, if it likes, group, category, split
    HaluEval              question, dialogue_history or document, with right_* and hallucinated_*
    TruthfulQA.csv        Best Answer, Correct Answers, Best Incorrect Answer, Incorrect Answers
    a question set        question, answers, wrong_answers, as `questions` reads it

Files with pairs say which answers there are, not which rows: `PAIRS` are the ways to make rows of them. Source of the
layouts: Lin et al. 2022, arXiv:2109.07958; Li et al. 2023, arXiv:2305.11747.
"""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxsae.artifacts import InputError, Question, read_jsonl, resolve_path
from jaxsae.data import questions, sets
from jaxsae.data.rows import Row, read_json, read_table

# question: the best right answer and the most tempting wrong one; published: the best right answer, repeated beside
# each wrong one; all: each right answer beside each wrong one
PAIRS = ("question", "published", "all")
TRAIN, VALIDATION, TEST = "train", "validation", "test"
_SPLITS = {"train": TRAIN, "training": TRAIN, "val": VALIDATION, "valid": VALIDATION, "dev": VALIDATION} | {
    name: name for name in (VALIDATION, TEST)
}
# Field -> the columns that hold it where none is named, the first that is there; without case, blanks and hyphens as _
_COLUMNS = {
    "question": ("question", "prompt", "query", "user_query", "user_input", "input", "instruction"),
    "answer": (
        *("answer", "response", "model_answer", "model_response", "chatgpt_response", "output", "completion"),
        *("generation", "generated_answer", "generated_text"),
    ),
    "label": ("label", "hallucinated", "is_hallucinated", "hallucination", "is_hallucination"),
    "group": ("group", "group_id", "question_id"),
    "category": ("category", "topic", "subject", "domain", "task"),
    "split": ("split",),
}
_NEEDED = ("question", "answer", "label")
_PAIRED_COLUMNS = (  # HaluEval's three tasks: what is asked, the right answer, the wrong one
    ("question", "right_answer", "hallucinated_answer"),
    ("dialogue_history", "right_response", "hallucinated_response"),
    ("document", "right_summary", "hallucinated_summary"),
)
_TRUTHFULQA = ("question", "best_answer", "best_incorrect_answer", "correct_answers", "incorrect_answers", "category")
_QUESTION_SET: tuple[str, ...] = ("question", "answers", "wrong_answers", "incorrect_answers", "group", "category")
_LABELS = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "hallucinated", "hallucination", "wrong", "incorrect", "fail"), 1),
    **dict.fromkeys(("0", "0.0", "false", "no", "right", "correct", "factual", "pass"), 0),
}
_LABEL_HELP = "1, true, yes or hallucinated for a hallucinated answer, 0, false, no or right for a right one"


@dataclasses.dataclass(frozen=True)
class LabelledAnswer:
    """One answer to one question.

    Attributes:
        answer: may be empty.
        label: 1 hallucinated, 0 right.
        group: the question, or whatever the file says that no split may divide.
        unit: what a split that knows nothing of groups would draw: the pair's number, or the row's.
        split: "train", "validation" or "test", where the file says it; else "".
    """

    question: str
    answer: str
    label: int
    group: str
    unit: int
    category: str = ""
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The rows of one file, and how they were read.

    Attributes:
        layout: "rows", "halueval", "truthfulqa" or "questions".
        pairs: one of `PAIRS`, or None where the file has a row per answer.
        columns: field -> the file's column.
        labels: the file's spellings of a label -> rows; empty where there are pairs.
    """

    rows: tuple[LabelledAnswer, ...]
    layout: str
    pairs: str | None
    columns: dict[str, str]
    labels: dict[str, int]


def read_benchmark(path: str | os.PathLike, *, pairs: str | None = None, columns: Sequence[str] = ()) -> Benchmark:
    """Read labelled answers from .csv, .tsv, .jsonl or .json; the columns say which layout it is.

    Args:
        pairs: how rows are made from a file with pairs, one of `PAIRS`; "question" where it is None.
        columns: "FIELD=COLUMN" for columns of other names, as "answer=model_text"; for a row per answer.

    Raises:
        InputError: the file is missing, empty or unreadable, has none of the layouts (its columns are named), a row
            lacks a field or has a label that says neither, or `pairs` or `columns` do not fit the file.
    """
    path = resolve_path(path)
    if pairs is not None and pairs not in PAIRS:
        raise InputError(f"--pairs is {pairs!r}, expected one of {', '.join(PAIRS)}")
    named = _parse_columns(columns)
    rows = list(_read_rows(path))
    if not rows:
        raise InputError(f"{path} holds no row")
    there = _columns_of(rows[0])
    layout = "rows" if named else _layout_of(there)
    if layout == "rows":
        if pairs is not None:
            raise InputError(f"{path} has a row per answer; leave out --pairs, which is for right and wrong answers")
        return _read_labelled(path, rows, there, named)
    pairs = pairs or PAIRS[0]
    found, used = _READERS[layout](path, rows, there)
    made = tuple(_make_rows(found, pairs))
    if not made:
        raise InputError(f"{path} holds no question with a right and a wrong answer")
    return Benchmark(made, layout, pairs, used, {})


def _read_rows(path: Path) -> Iterator[Row]:
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return read_table(path, delimiter="\t" if ending == ".tsv" else ",")
    if ending == ".jsonl":
        return (Row(f"{path} line {number}", row) for number, row in read_jsonl(path))
    if ending == ".json":
        return read_json(path)
    raise InputError(f"{path} ends in none of .csv, .tsv, .jsonl, .json")


def _columns_of(row: Row) -> dict[str, str]:
    """Return normalised name -> the file's own; the first of two that are alike."""
    there: dict[str, str] = {}
    for name in row.columns or tuple(row.fields):
        there.setdefault(name.strip().casefold().replace(" ", "_").replace("-", "_"), name)
    return there


def _layout_of(there: dict[str, str]) -> str:
    if {"best_answer", "incorrect_answers"} <= there.keys():
        return "truthfulqa"
    if any(there.keys() >= set(names) for names in _PAIRED_COLUMNS):
        return "halueval"
    is_set = "answers" in there and ("wrong_answers" in there or "incorrect_answers" in there)
    return "questions" if is_set and not any(name in there for name in _COLUMNS["label"]) else "rows"


def _parse_columns(columns: Sequence[str]) -> dict[str, str]:
    named = {}
    for entry in columns:
        field, _, column = entry.partition("=")
        if field not in _COLUMNS or not column:
            raise InputError(
                f"--columns holds {entry!r}, expected FIELD=COLUMN with a field among {', '.join(_COLUMNS)}"
            )
        named[field] = column
    return named


def _read_labelled(path: Path, rows: Sequence[Row], there: dict[str, str], named: dict[str, str]) -> Benchmark:
    for column in named.values():
        if column not in there.values():
            raise InputError(f"{path} has no column {column!r}; it has {_list(there.values())}")
    found = {
        field: next(there[name] for name in candidates if name in there)
        for field, candidates in _COLUMNS.items()
        if any(name in there for name in candidates)
    } | named
    missing = [field for field in _NEEDED if field not in found]
    if missing:
        accepted = "; ".join(f"{field}: {', '.join(_COLUMNS[field])}" for field in missing)
        raise InputError(
            f"{path} has no column for {', '.join(missing)}; it has {_list(there.values())}. Rename one ({accepted}), "
            f"or name it with --columns={missing[0]}=COLUMN. Right and wrong answers side by side: "
            "question, right_answer, hallucinated_answer"
        )
    labels: Counter[str] = Counter()
    read = []
    for number, row in enumerate(rows):
        read.append(_read_row(row, found, number))
        labels[str(row.get(found["label"])).strip()] += 1
    return Benchmark(tuple(read), "rows", None, found, dict(labels))


def _read_row(row: Row, columns: dict[str, str], number: int) -> LabelledAnswer:
    question = row.text(columns["question"])
    return LabelledAnswer(
        question=question,
        answer=_read_answer(row, columns["answer"]),
        label=_read_label(row, columns["label"]),
        group=_read_name(row, columns["group"], needed=True) if "group" in columns else sets.group_of(question),
        unit=number,
        category=_read_name(row, columns["category"]) if "category" in columns else "",
        split=_read_split(row, columns["split"]) if "split" in columns else "",
    )


def _read_answer(row: Row, column: str) -> str:
    """Return the answer; "" where a table's cell is blank or JSON has null, as models do answer nothing."""
    if row.columns and column not in row.fields:
        return ""
    content = row.get(column)
    if content is not None and not isinstance(content, str):
        raise InputError(f"{row.where}: {column!r} must be a string, got a JSON {type(content).__name__}")
    return content or ""


def _read_label(row: Row, column: str) -> int:
    if row.columns and column not in row.fields:
        raise InputError(f"{row.where}: {column!r} is empty, expected {_LABEL_HELP}")
    content = row.get(column)
    spelling = str(content).strip().casefold()
    if isinstance(content, (dict, list)) or spelling not in _LABELS:
        raise InputError(f"{row.where}: {column!r} is {str(content)[:80]!r}, expected {_LABEL_HELP}")
    return _LABELS[spelling]


def _read_name(row: Row, column: str, *, needed: bool = False) -> str:
    content = row.fields.get(column)
    if content is None or not str(content).strip():
        if needed:
            raise InputError(f"{row.where}: {column!r} is empty; no split can keep such a row's group together")
        return ""
    if isinstance(content, (dict, list)):
        raise InputError(f"{row.where}: {column!r} must be a string or a number, got a JSON {type(content).__name__}")
    return str(content).strip()


def _read_split(row: Row, column: str) -> str:
    name = _read_name(row, column)
    if name.casefold() not in {"", *_SPLITS}:
        raise InputError(
            f"{row.where}: {column!r} is {name!r}, expected train, validation or test; rename a column that means "
            "something else"
        )
    return _SPLITS.get(name.casefold(), "")


def _read_truthfulqa(path: Path, rows: Sequence[Row], there: dict[str, str]) -> tuple[list[Question], dict[str, str]]:
    read = sets.FORMATS["truthfulqa"].question
    return [read(row) for row in rows], {name: there[name] for name in _TRUTHFULQA if name in there}


def _read_halueval(path: Path, rows: Sequence[Row], there: dict[str, str]) -> tuple[list[Question], dict[str, str]]:
    names = next(names for names in _PAIRED_COLUMNS if there.keys() >= set(names))
    used = {field: there[name] for field, name in zip(("question", "right", "wrong"), names, strict=True)}
    used |= {field: there[field] for field in ("group", "category") if field in there}
    found = []
    for row in rows:
        asked = row.text(used["question"])
        found.append(
            Question(
                id="",
                question=asked,
                answers=(_read_answer(row, used["right"]),),
                group=_read_name(row, used["group"], needed=True) if "group" in used else sets.group_of(asked),
                category=_read_name(row, used["category"]) if "category" in used else "",
                wrong_answers=(_read_answer(row, used["wrong"]),),
            )
        )
    return found, used


def _read_questions(path: Path, rows: Sequence[Row], there: dict[str, str]) -> tuple[list[Question], dict[str, str]]:
    used = {name: there[name] for name in _QUESTION_SET if name in there}
    if path.suffix.lower() in (".csv", ".tsv"):
        return questions.read_questions(path, format="csv"), used
    return questions.questions_of(path, rows), used


_READERS: dict[str, Any] = {
    "truthfulqa": _read_truthfulqa,
    "halueval": _read_halueval,
    "questions": _read_questions,
}


def _make_rows(found: Iterable[Question], pairs: str) -> Iterator[LabelledAnswer]:
    """Yield two rows a pair, the right answer first."""
    unit = itertools.count()
    for question in found:
        right, wrong = question.answers, question.wrong_answers
        if pairs != "all":
            right = right[:1]
        if pairs == "question":
            wrong = wrong[:1]
        for answers in itertools.product(right, wrong):
            number = next(unit)
            for label, answer in enumerate(answers):
                yield LabelledAnswer(
                    question.question, answer, label, question.group, number, category=question.category
                )


def _list(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
