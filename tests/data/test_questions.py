import json
from pathlib import Path

import pytest

from jaxsae.artifacts import InputError, Question
from jaxsae.data import format_prompt, read_questions, write_questions

ROW = {"id": "q1", "question": "Where is it?", "answers": ["here", "there"], "group": "g1", "category": "often"}


def _write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_read_questions__reads_every_field(tmp_path):
    bare = {name: ROW[name] for name in ("question", "answers", "group")} | {"id": "q2", "source": "ignored"}
    questions = read_questions(_write(tmp_path / "q.jsonl", ROW, "", bare))
    assert questions == [
        Question("q1", "Where is it?", ("here", "there"), "g1", "often"),
        Question("q2", "Where is it?", ("here", "there"), "g1"),
    ]


def test_write_questions__is_undone_by_read_questions(tmp_path):
    questions = [Question("1", 'Wo «ist» "es"?\n', ("Überall",), "g"), Question("2", "x", ("y", "z"), "g", "seldom")]
    write_questions(tmp_path / "q.jsonl", questions)
    assert read_questions(tmp_path / "q.jsonl") == questions


@pytest.mark.parametrize("name", ["id", "question", "answers", "group"])
def test_read_questions__names_a_missing_field_and_its_line(tmp_path, name):
    row = {key: value for key, value in ROW.items() if key != name}
    with pytest.raises(InputError, match=rf"q\.jsonl line 2 lacks the field '{name}'; it has "):
        read_questions(_write(tmp_path / "q.jsonl", {**ROW, "id": "q0"}, row))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 7}, "line 1: 'id' must be a string, got 7"),
        ({"question": None}, "line 1: 'question' must be a string, got null"),
        ({"group": ["g"]}, r"line 1: 'group' must be a string, got \[\"g\"\]"),
        ({"category": 1}, "line 1: 'category' must be a string, got 1"),
        ({"question": " "}, "line 1: 'question' is empty"),
        ({"answers": "here"}, "line 1: 'answers' must be a list of strings, got \"here\""),
        ({"answers": ["here", 3]}, "line 1: 'answers' must be a list of strings"),
        ({"answers": []}, "line 1: 'answers' is empty"),
        ({"answers": ["here", "?!"]}, r"line 1: the answer '\?!' holds no letter or digit"),
    ],
)
def test_read_questions__names_a_field_that_cannot_be_used(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read_questions(_write(tmp_path / "q.jsonl", ROW | change))


def test_read_questions__names_both_lines_of_a_repeated_id(tmp_path):
    with pytest.raises(InputError, match="line 3 repeats the id 'q1' of line 1"):
        read_questions(_write(tmp_path / "q.jsonl", ROW, ROW | {"id": "q2"}, ROW))


def test_read_questions__names_a_line_that_is_not_json(tmp_path):
    with pytest.raises(InputError, match=r"q\.jsonl line 2 is not readable JSON"):
        read_questions(_write(tmp_path / "q.jsonl", ROW, '{"id":'))


def test_read_questions__refuses_an_empty_or_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"q\.jsonl holds no question"):
        read_questions(_write(tmp_path / "q.jsonl"))
    with pytest.raises(InputError, match=r"other\.jsonl is missing"):
        read_questions(tmp_path / "other.jsonl")


def test_format_prompt__replaces_the_placeholder_alone():
    assert format_prompt("{x} Q: {question} {}A:", "Is {it} {question}?") == "{x} Q: Is {it} {question}? {}A:"
    assert format_prompt("{question}", Question("1", "Who?", ("I",), "g")) == "Who?"


def test_format_prompt__refuses_a_template_without_the_placeholder():
    with pytest.raises(InputError, match=r"questions\.prompt must hold \{question\}, got 'Q: \{\}'"):
        format_prompt("Q: {}", "Who?")
