import csv
import json
from pathlib import Path

import pytest

from jaxsae.artifacts import InputError, Question
from jaxsae.data import read_questions, write_questions

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
    questions += [Question("3", "x", ("y",), "g", wrong_answers=("q", "r"), knowledge="y is x")]
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


TABLE = [
    {
        "ID": "1",
        "Question": "Who, then?",
        "Answers": "Ann; Bob ;",
        "Group": "g",
        "Category": "",
        "Knowledge": "It, was.",
    },
    {
        "ID": "2",
        "Question": "Which\nline?",
        "Answers": '["one; two", "three"]',
        "Group": "h",
        "Category": "c",
        "Knowledge": "",
    },
]


def _write_table(path: Path, rows, delimiter=",") -> Path:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(("name", "delimiter"), [("q.csv", ","), ("q.tsv", "\t"), ("q.CSV", ",")])
def test_read_questions__reads_a_table_with_named_columns(tmp_path, name, delimiter):
    assert read_questions(_write_table(tmp_path / name, TABLE, delimiter)) == [
        Question("1", "Who, then?", ("Ann", "Bob"), "g", knowledge="It, was."),
        Question("2", "Which\nline?", ("one; two", "three"), "h", "c"),
    ]


def test_read_questions__takes_a_lone_answer_and_wrong_ones(tmp_path):
    rows = [{"question": "Who?", "answer": "Ann", "incorrect_answers": ["Bob", "Eve"]}]
    (question,) = read_questions(_write(tmp_path / "q.jsonl", *rows))
    assert (question.answers, question.wrong_answers) == (("Ann",), ("Bob", "Eve"))
    (question,) = read_questions(_write_table(tmp_path / "q.csv", [rows[0] | {"incorrect_answers": "Bob;Eve"}]))
    assert (question.answers, question.wrong_answers) == (("Ann",), ("Bob", "Eve"))


def test_read_questions__makes_ids_and_groups_from_the_text_where_the_file_has_none(tmp_path):
    rows = [{"question": text, "answers": ["x"]} for text in ("Who is it?", "Where?", "who is it")]
    found = read_questions(_write(tmp_path / "q.jsonl", *rows))
    assert [question.group for question in found] == ["who is it", "where", "who is it"]
    assert len({question.id for question in found}) == 3


def test_read_questions__follows_the_columns_it_is_told(tmp_path):
    rows = [{"nr": "7", "Frage": "Wo?", "gold": "hier", "question": "not this"}]
    columns = ("id=nr", "question=Frage", "answers=gold")
    for path in (_write_table(tmp_path / "q.csv", rows), _write(tmp_path / "q.jsonl", *rows)):
        (question,) = read_questions(path, columns=columns)
        assert (question.id, question.question, question.answers) == ("7", "Wo?", ("hier",))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("frage=x",), r"questions\.columns holds 'frage=x', expected FIELD=COLUMN with a field among id, question"),
        (("question",), r"questions\.columns holds 'question', expected FIELD=COLUMN"),
        (("group=set",), r"q\.jsonl line 1 lacks the field 'set'; it has id, question, answers, group, category$"),
    ],
)
def test_read_questions__names_columns_that_are_not_there(tmp_path, columns, words):
    with pytest.raises(InputError, match=words):
        read_questions(_write(tmp_path / "q.jsonl", ROW), columns=columns)


def test_read_questions__names_row_and_field_of_a_table(tmp_path):
    blank = TABLE[0] | {"ID": "3", "Answers": " "}
    path = _write_table(tmp_path / "q.csv", [TABLE[0], TABLE[0] | {"ID": "2"}, blank])
    with pytest.raises(InputError, match=r"q\.csv line 4 lacks the field 'Answers'; it has ID, Question, Group, Know"):
        read_questions(path)
    with pytest.raises(InputError, match=r"q\.csv line 2: 'Answers' is empty; at least one right answer"):
        read_questions(_write_table(tmp_path / "q.csv", [TABLE[0] | {"Answers": " ; "}]))
    with pytest.raises(InputError, match=r"q\.csv line 2: 'Answers' is no JSON list .*\[Ann"):
        read_questions(_write_table(tmp_path / "q.csv", [TABLE[0] | {"Answers": "[Ann]"}]))
    with pytest.raises(InputError, match=r"q\.csv line 2 lacks the field 'question'; it has quest, answers"):
        read_questions(_write_table(tmp_path / "q.csv", [{"quest": "a", "answers": "b"}]))


def test_read_questions__goes_by_the_files_ending_unless_told(tmp_path):
    with pytest.raises(
        InputError, match=r"q\.json ends in none of \.jsonl, \.csv, \.tsv; set questions\.format to one of"
    ):
        read_questions(_write(tmp_path / "q.json", ROW))
    assert len(read_questions(_write(tmp_path / "q.json", ROW), format="jsonl")) == 1
    with pytest.raises(InputError, match=r"questions\.format is 'xml', expected one of jsonl, csv, truthfulqa"):
        read_questions(tmp_path / "q.json", format="xml")


def test_read_questions__refuses_columns_for_a_published_set(tmp_path):
    with pytest.raises(InputError, match=r"questions\.columns is \['id=x'\], but nq_open has columns of its own"):
        read_questions(_write(tmp_path / "q.json", ROW), format="nq_open", columns=("id=x",))


def test_read_questions__finds_optional_fields_in_whatever_row_has_them(tmp_path):
    rows = [ROW, ROW | {"id": "q2", "incorrect_answers": ["no"], "Knowledge": "It is here."}]
    first, second = read_questions(_write(tmp_path / "q.jsonl", *rows))
    assert (first.wrong_answers, first.knowledge) == ((), "")
    assert (second.wrong_answers, second.knowledge) == (("no",), "It is here.")
