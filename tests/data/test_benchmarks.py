"""Labelled answers from files: a row per answer, pairs, and what is said of files that are neither."""

import csv
import json
import re

import pytest

from jaxsae.artifacts import InputError
from jaxsae.data.benchmarks import PAIRS, read_benchmark
from jaxsae.data.questions import write_questions
from jaxsae.data.sets import Question

ROW = {"question": "Who?", "answer": "Ann", "label": 1}
TRUTHFULQA = {
    "Category": "Law",
    "Question": "Is it?",
    "Best Answer": "No",
    "Best Incorrect Answer": "Yes",
    "Correct Answers": "No; Never",
    "Incorrect Answers": "Yes; Often; Always",
}
HALUEVAL = {"knowledge": "k", "question": "Which?", "right_answer": "This", "hallucinated_answer": "That one."}


def write_table(path, rows):
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def short(benchmark):
    return [(row.unit, row.label, row.answer) for row in benchmark.rows]


@pytest.mark.parametrize("name", ["b.csv", "b.tsv", "b.jsonl", "b.json"])
def test_rows__are_read_from_every_ending(tmp_path, name):
    rows = [ROW, {"question": "Where, then?", "answer": "", "label": 0}]
    write = write_table if name.endswith("sv") else write_lines
    benchmark = read_benchmark(write(tmp_path / name, rows))
    assert short(benchmark) == [(0, 1, "Ann"), (1, 0, "")]
    assert [row.group for row in benchmark.rows] == ["who", "where then"]
    assert (benchmark.layout, benchmark.pairs, benchmark.labels) == ("rows", None, {"1": 1, "0": 1})


def test_columns__of_common_spellings_are_found_and_said(tmp_path):
    row = {"User Query": "Who?", "chatgpt_response": "Ann", "Hallucination": "yes", "Question-ID": 7, "Topic": "people"}
    benchmark = read_benchmark(write_lines(tmp_path / "b.jsonl", [row]))
    assert benchmark.columns == {
        "question": "User Query",
        "answer": "chatgpt_response",
        "label": "Hallucination",
        "group": "Question-ID",
        "category": "Topic",
    }
    (read,) = benchmark.rows
    assert (read.label, read.group, read.category) == (1, "7", "people")


def test_columns__may_be_named(tmp_path):
    row = ROW | {"text": "Bob", "is_bad": False}
    benchmark = read_benchmark(write_lines(tmp_path / "b.jsonl", [row]), columns=["answer=text", "label=is_bad"])
    assert short(benchmark) == [(0, 0, "Bob")]


@pytest.mark.parametrize("label", [1, 1.0, True, "1", "1.0", "True", " yes", "Hallucinated", "FAIL"])
def test_label__of_a_hallucinated_answer_has_many_spellings(tmp_path, label):
    assert short(read_benchmark(write_lines(tmp_path / "b.jsonl", [ROW | {"label": label}])))[0][1] == 1


@pytest.mark.parametrize("label", [0, 0.0, False, "0", "false", "No", "right", "PASS"])
def test_label__of_a_right_answer_has_many_spellings(tmp_path, label):
    assert short(read_benchmark(write_lines(tmp_path / "b.jsonl", [ROW | {"label": label}])))[0][1] == 0


@pytest.mark.parametrize(
    ("pairs", "answers"),
    [
        ("question", [(0, 0, "No"), (0, 1, "Yes")]),
        ("published", [(0, 0, "No"), (0, 1, "Yes"), (1, 0, "No"), (1, 1, "Often"), (2, 0, "No"), (2, 1, "Always")]),
    ],
)
def test_pairs__of_truthfulqa_are_made_as_asked(tmp_path, pairs, answers):
    path = write_table(tmp_path / "T.csv", [TRUTHFULQA])
    benchmark = read_benchmark(path, pairs=pairs)
    assert short(benchmark) == answers
    assert {(row.group, row.category) for row in benchmark.rows} == {("is it", "Law")}
    assert (benchmark.layout, benchmark.pairs) == ("truthfulqa", pairs)


def test_pairs__all_sets_each_right_answer_beside_each_wrong_one(tmp_path):
    benchmark = read_benchmark(write_table(tmp_path / "T.csv", [TRUTHFULQA]), pairs="all")
    right, wrong = short(benchmark)[::2], short(benchmark)[1::2]
    assert [(a[2], b[2]) for a, b in zip(right, wrong, strict=True)] == [
        (one, other) for one in ("No", "Never") for other in ("Yes", "Often", "Always")
    ]
    assert [row[0] for row in right] == [row[0] for row in wrong] == list(range(6))


@pytest.mark.parametrize(
    "row",
    [
        HALUEVAL,
        {"dialogue_history": "Which?", "right_response": "This", "hallucinated_response": "That one."},
        {"document": "Which?", "right_summary": "This", "hallucinated_summary": "That one."},
    ],
)
@pytest.mark.parametrize("pairs", PAIRS)
def test_halueval__of_every_task_gives_a_pair_a_question(tmp_path, row, pairs):
    benchmark = read_benchmark(write_lines(tmp_path / "h.json", [row, row]), pairs=pairs)
    assert short(benchmark) == [(0, 0, "This"), (0, 1, "That one."), (1, 0, "This"), (1, 1, "That one.")]
    assert {row.group for row in benchmark.rows} == {"which"}


def test_question_set__with_wrong_answers_gives_pairs(tmp_path):
    question = Question("1", "Who?", ("Ann", "Anna"), "g", category="people", wrong_answers=("Bob", "Cy"))
    write_questions(tmp_path / "q.jsonl", [question])
    benchmark = read_benchmark(tmp_path / "q.jsonl", pairs="published")
    assert short(benchmark) == [(0, 0, "Ann"), (0, 1, "Bob"), (1, 0, "Ann"), (1, 1, "Cy")]
    assert {(row.group, row.category) for row in benchmark.rows} == {("g", "people")}


def test_question_set__answered_and_labelled_is_a_row_per_answer(tmp_path):
    row = ROW | {"answers": ["Bob"], "wrong_answers": ["Cy"], "group": "g", "prompt": "Q: Who?"}
    assert short(read_benchmark(write_lines(tmp_path / "answers.jsonl", [row]))) == [(0, 1, "Ann")]


def test_split__is_read_in_its_usual_names(tmp_path):
    names = {"train": "train", "Training": "train", "dev": "validation", "val": "validation", "TEST": "test", "": ""}
    path = write_table(tmp_path / "b.csv", [ROW | {"split": name} for name in names])
    assert [row.split for row in read_benchmark(path).rows] == list(names.values())


BAD = {
    "no label column": (
        [{"question": "q", "answer": "a", "score": 1}],
        {},
        r"b\.jsonl has no column for label; it has 'question', 'answer', 'score'\. Rename one \(label: label, hall",
    ),
    "unknown label": (
        [ROW, ROW | {"label": "maybe"}],
        {},
        r"line 2: 'label' is 'maybe', expected 1, true, yes or hall",
    ),
    "label of two": ([ROW | {"label": 2}], {}, r"line 1: 'label' is '2', expected"),
    "label null": ([ROW | {"label": None}], {}, r"line 1: 'label' is 'None', expected"),
    "label missing in a row": ([ROW, {"question": "q", "answer": "a"}], {}, r"line 2 lacks the field 'label'"),
    "answer a list": ([ROW | {"answer": ["a"]}], {}, r"line 1: 'answer' must be a string, got a JSON list"),
    "question blank": ([ROW | {"question": " "}], {}, r"line 1: 'question' is empty"),
    "group blank": ([ROW | {"group": "g"}, ROW | {"group": ""}], {}, r"line 2: 'group' is empty; no split can keep"),
    "odd split": ([ROW | {"split": "fold 3"}], {}, r"line 1: 'split' is 'fold 3', expected train, validation or test"),
    "pairs of rows": ([ROW], {"pairs": "all"}, r"has a row per answer; leave out --pairs"),
    "unknown pairs": ([ROW], {"pairs": "some"}, r"--pairs is 'some', expected one of question, published, all"),
    "column not there": ([ROW], {"columns": ["label=gold"]}, r"has no column 'gold'; it has 'question', 'answer', 'la"),
    "column for nothing": ([ROW], {"columns": ["lable=gold"]}, r"--columns holds 'lable=gold', expected FIELD=COLUMN"),
    "no row": ([], {}, r"b\.jsonl holds no row"),
    "no wrong answer": (
        [{"question": "q", "answers": ["a"], "wrong_answers": []}],
        {},
        "no question with a right and a",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_file__is_named_in_one_line(tmp_path, case):
    rows, settings, words = BAD[case]
    with pytest.raises(InputError, match=words) as caught:
        read_benchmark(write_lines(tmp_path / "b.jsonl", rows), **settings)
    assert "\n" not in str(caught.value)


def test_label_blank_in_a_table__is_named(tmp_path):
    path = write_table(tmp_path / "b.csv", [ROW, ROW | {"label": ""}])
    with pytest.raises(InputError, match=r"b\.csv line 3: 'label' is empty, expected 1, true"):
        read_benchmark(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("b.parquet", r"ends in none of \.csv, \.tsv, \.jsonl, \.json"), ("b.csv", "is missing or not a")],
)
def test_file_that_cannot_be_read__is_named(tmp_path, name, words):
    with pytest.raises(InputError, match=re.escape(str(tmp_path / name)) + f" {words}"):
        read_benchmark(tmp_path / name)


def test_read_benchmark__reads_a_question_set_from_a_json_list(tmp_path):
    rows = [{"question": f"Who wrote book {n}?", "answers": ["Ann"], "wrong_answers": ["Bo"]} for n in range(3)]
    (tmp_path / "q.json").write_text(json.dumps(rows), encoding="utf-8")
    write_lines(tmp_path / "q.jsonl", rows)
    listed, lines = (read_benchmark(tmp_path / name) for name in ("q.json", "q.jsonl"))
    assert listed.rows == lines.rows
    assert len(listed.rows) == 6
    assert listed.layout == "questions"


def test_read_benchmark__says_where_a_json_list_ends_too_early(tmp_path):
    (tmp_path / "b.json").write_text('[{"question": "q"}]\n{"question": "r"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"b\.json is not readable JSON: Extra data: line 2 column 1"):
        read_benchmark(tmp_path / "b.json")
