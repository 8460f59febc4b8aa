"""The published question sets, each from the file its authors published.

    truthfulqa   TruthfulQA.csv, the release with "Best Incorrect Answer"; category: its own
    halueval     qa_data.json: knowledge, question, right_answer, hallucinated_answer
    triviaqa     unfiltered-web-dev.json and its like, or lines with question and answer as exported from the Hub
    nq_open      NQ-open.dev.jsonl: question, answer[]
    popqa        popQA.tsv: id, subj, prop, question, possible_answers (a JSON list); category: prop
    known_1000   known_1000.json: known_id, subject, relation_id, prompt, attribute; category: relation_id

Source: Lin et al. 2022, arXiv:2109.07958; Li et al. 2023, arXiv:2305.11747; Joshi et al. 2017, arXiv:1705.03551; Lee
et al. 2019, arXiv:1906.00300; Mallen et al. 2023, arXiv:2212.10511; Meng et al. 2022, arXiv:2202.05262.

A question's group is its normalised text, so that one asked twice lies on one side of every split; a cloze's is subject
and relation. An id is the set's own, or comes from the question's text.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from absl import logging

from jaxsae.artifacts import InputError, Question
from jaxsae.data.labels import normalise
from jaxsae.data.rows import Row, read_json, read_table, usable


@dataclasses.dataclass(frozen=True)
class SetFormat:
    """How one set is read: its file into rows, a row into a question (with the id "" where the set has none)."""

    rows: Callable[[Path], Iterator[Row]]
    question: Callable[[Row], Question]


def read_set(path: Path, name: str) -> list[Question]:
    """Read one of `FORMATS`; a question without an answer that a label could match is left out, with a line.

    Raises:
        InputError: the file cannot be read, a field is missing or of the wrong type, an id comes twice, or nothing is
            left; the row is named.
    """
    known = FORMATS[name]
    located = [(row.where, known.question(row)) for row in known.rows(path)]
    kept = [(where, question) for where, question in located if question.answers]
    if len(kept) < len(located):
        first = next(where for where, question in located if not question.answers)
        logging.warning("%d questions without a usable answer left out, first %s", len(located) - len(kept), first)
    return with_ids(path, kept)


def with_ids(path: Path, located: Iterable[tuple[str, Question]]) -> list[Question]:
    """Return the questions with every id filled in, given each with its place in the file.

    Raises:
        InputError: an id comes twice, or there is no question.
    """
    questions: list[Question] = []
    places: dict[str, str] = {}
    derived: Counter[str] = Counter()
    for where, question in located:
        identity = question.id
        if not identity:
            slug = hashlib.sha256(question.question.encode()).hexdigest()[:12]
            derived[slug] += 1
            identity = slug if derived[slug] == 1 else f"{slug}-{derived[slug]}"
        if identity in places:
            first = places[identity].removeprefix(f"{path} ")
            raise InputError(f"{where} repeats the id {identity!r} of {first}; ids must differ")
        places[identity] = where
        questions.append(dataclasses.replace(question, id=identity))
    if not questions:
        raise InputError(f"{path} holds no question")
    return questions


def group_of(question: str) -> str:
    """Return a question's identity: its normalised words, or the text itself where it has none."""
    return " ".join(normalise(question)) or question


def _truthfulqa(row: Row) -> Question:
    question, best, worst = row.text("Question"), row.text("Best Answer"), row.text("Best Incorrect Answer")
    right = usable([best, *row.text("Correct Answers").split(";")])
    matched = {normalise(alias) for alias in right}
    wrong = [alias for alias in row.text("Incorrect Answers").split(";") if normalise(alias) not in matched]
    return Question(
        id="",
        question=question,
        answers=right,
        group=group_of(question),
        category=row.text("Category"),
        wrong_answers=usable([worst, *wrong]),
    )


def _halueval(row: Row) -> Question:
    question = row.text("question")
    return Question(
        id="",
        question=question,
        answers=usable([row.text("right_answer")]),
        group=group_of(question),
        wrong_answers=(row.text("hallucinated_answer"),),
        knowledge=row.text("knowledge"),
    )


def _triviaqa(row: Row) -> Question:
    official = "Question" in row.fields
    question = row.text("Question" if official else "question")
    answer = row.part("Answer" if official or "Answer" in row.fields else "answer")
    names = ("Value", "Aliases", "NormalizedAliases", "HumanAnswers")
    if "Value" not in answer.fields:
        names = ("value", "aliases", "normalized_aliases", "human_answers")
    value, *lists = names
    aliases = [alias for name in lists if name in answer.fields for alias in answer.texts(name)]
    identity = next((name for name in ("QuestionId", "question_id") if name in row.fields), None)
    return Question(
        id=row.text(identity) if identity else "",
        question=question,
        answers=usable([answer.text(value), *aliases]),
        group=group_of(question),
    )


def _nq_open(row: Row) -> Question:
    question = row.text("question")
    return Question(id="", question=question, answers=usable(row.texts("answer")), group=group_of(question))


def _popqa(row: Row) -> Question:
    question = row.text("question")
    return Question(
        id=row.text("id"),
        question=question,
        answers=usable(row.json_texts("possible_answers")),
        group=group_of(question),
        category=row.text("prop"),
    )


def _known_1000(row: Row) -> Question:
    return Question(
        id=f"known_{row.get('known_id')}",
        question=row.text("prompt"),
        answers=usable([row.text("attribute")]),
        group=f"{row.text('subject')}/{row.text('relation_id')}",
        category=row.text("relation_id"),
    )


FORMATS = {
    "truthfulqa": SetFormat(read_table, _truthfulqa),
    "halueval": SetFormat(read_json, _halueval),
    "triviaqa": SetFormat(functools.partial(read_json, key="Data"), _triviaqa),
    "nq_open": SetFormat(read_json, _nq_open),
    "popqa": SetFormat(functools.partial(read_table, delimiter="\t"), _popqa),
    "known_1000": SetFormat(read_json, _known_1000),
}
