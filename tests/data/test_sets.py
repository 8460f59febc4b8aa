"""The published question sets: small files in their layouts, and the real ones where they are at hand."""

import csv
import json
from pathlib import Path

import pytest

from jaxsae import config
from jaxsae.artifacts import InputError, sha256_file
from jaxsae.data import prompts, questions, sets
from jaxsae.data.fetch import SOURCES
from jaxsae.data.labels import normalise

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
REAL = {
    "truthfulqa": (SHARED / "truthfulqa" / "TruthfulQA.csv", 790, 790),
    "halueval": (SHARED / "halueval" / "qa_one-turn_data.json", 500, 500),
    "nq_open": (SHARED / "nq_open" / "NQ-open.dev.jsonl", 3610, 3608),
    "known_1000": (SHARED / "known_1000" / "known_1000.json", 1209, 1209),
}
needs_real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published files are not in {SHARED}")

TRUTHFULQA = {
    "Type": "Adversarial",
    "Category": "Law",
    "Question": "Is it, legal?",
    "Best Answer": "It is not",
    "Best Incorrect Answer": "It is",
    "Correct Answers": "No; It is not; it is NOT.; Unknown; ",
    "Incorrect Answers": "Yes; It is; unknown; ",
    "Source": "",
}
POPQA = {
    "id": "42",
    "subj": "Ann",
    "prop": "author",
    "question": "Who wrote it?",
    "possible_answers": '["Ann B.", "B"]',
}
HALUEVAL = {"knowledge": "It is so.", "question": "Which?", "right_answer": "This", "hallucinated_answer": "That one."}
KNOWN = {"known_id": 7, "subject": "Rome", "attribute": "Italy", "prompt": "Rome is in", "relation_id": "P30"}
TRIVIAQA = {"QuestionId": "tc_2", "Question": "Who sang?", "Answer": {"Value": "Ann", "Aliases": ["Ann", "The Ann"]}}


def write_table(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_list(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def test_truthfulqa__keeps_both_answers_with_the_best_of_each_first(tmp_path):
    (question,) = sets.read_set(write_table(tmp_path / "t.csv", [TRUTHFULQA]), "truthfulqa")
    assert question.question == "Is it, legal?"
    assert question.answers == ("It is not", "No", "Unknown")
    assert question.wrong_answers == ("It is", "Yes")  # an answer that also counts as right is not wrong
    assert (question.group, question.category) == ("is it legal", "Law")


@pytest.mark.parametrize("write", [write_lines, write_list])
def test_halueval__is_read_as_a_list_and_as_lines(tmp_path, write):
    rows = [HALUEVAL, HALUEVAL | {"question": "Who?"}]
    first, second = sets.read_set(write(tmp_path / "h.json", rows), "halueval")
    assert (first.answers, first.wrong_answers, first.knowledge) == (("This",), ("That one.",), "It is so.")
    assert (first.question, second.question) == ("Which?", "Who?")


def test_halueval__of_one_line_is_one_question(tmp_path):
    assert len(sets.read_set(write_lines(tmp_path / "h.json", [HALUEVAL]), "halueval")) == 1


def test_triviaqa__is_read_in_the_official_and_in_the_exported_layout(tmp_path):
    official = tmp_path / "official.json"
    official.write_text(json.dumps({"Data": [TRIVIAQA], "Version": 1.0}))
    answer = {"value": "Ann", "aliases": ["Ann"], "normalized_aliases": ["ann", "the ann", "miss ann"]}
    exported = write_lines(tmp_path / "hub.jsonl", [{"question_id": "tc_2", "question": "Who sang?", "answer": answer}])
    (first,), (second,) = sets.read_set(official, "triviaqa"), sets.read_set(exported, "triviaqa")
    assert (first.id, first.question, first.group) == (second.id, second.question, second.group)
    assert (first.answers, second.answers) == (("Ann",), ("Ann", "miss ann"))


def test_popqa__reads_its_list_of_answers_and_groups_by_question(tmp_path):
    rows = [POPQA, POPQA | {"id": "43", "question": "who wrote it", "possible_answers": '["C"]'}]
    first, second = sets.read_set(write_table(tmp_path / "p.tsv", rows, "\t"), "popqa")
    assert (first.id, first.answers, first.category) == ("42", ("Ann B.", "B"), "author")
    assert first.group == second.group == "who wrote it"


def test_known_1000__groups_by_subject_and_relation(tmp_path):
    rows = [KNOWN, KNOWN | {"known_id": 8, "prompt": "Rome lies in"}, KNOWN | {"known_id": 9, "relation_id": "P36"}]
    found = sets.read_set(write_list(tmp_path / "k.json", rows), "known_1000")
    assert [question.group for question in found] == ["Rome/P30", "Rome/P30", "Rome/P36"]
    assert (found[0].question, found[0].answers) == ("Rome is in", ("Italy",))


def test_a_question_asked_twice__has_one_group_and_two_stable_ids(tmp_path):
    rows = [{"question": text, "answer": ["a"]} for text in ("where is it", "Where is it?", "who is it", "where is it")]
    found = sets.read_set(write_lines(tmp_path / "n.jsonl", rows), "nq_open")
    assert [question.group for question in found] == ["where is it", "where is it", "who is it", "where is it"]
    assert len({question.id for question in found}) == 4
    fewer = sets.read_set(write_lines(tmp_path / "n.jsonl", rows[2:]), "nq_open")
    assert fewer[0] == found[2]  # the id does not depend on the other rows
    assert found[3].id == f"{found[0].id}-2"


def test_a_question_without_a_usable_answer__is_left_out_with_a_line(tmp_path, caplog):
    rows = [{"question": "how many", "answer": ["---"]}, {"question": "who", "answer": ["?", "Ann"]}]
    (question,) = sets.read_set(write_lines(tmp_path / "n.jsonl", rows), "nq_open")
    assert question.answers == ("Ann",)
    assert "1 questions without a usable answer left out, first " in caplog.text
    assert "n.jsonl line 1" in caplog.text


BAD = {
    "column": ("truthfulqa", [{"Question": "x?"}], r"f line 2 lacks the field 'Best Answer'; it has Question$"),
    "blank cell": ("truthfulqa", [TRUTHFULQA, TRUTHFULQA | {"Category": " "}], r"line 3 lacks the field 'Category'"),
    "list": ("popqa", [POPQA | {"possible_answers": "A; B"}], r"line 2: 'possible_answers' is no JSON list .*A; B"),
    "list of": (
        "popqa",
        [POPQA | {"possible_answers": "[1]"}],
        r"'possible_answers' must be a list of strings, got \[1",
    ),
    "id twice": ("popqa", [POPQA, POPQA], r"f line 3 repeats the id '42' of line 2; ids must differ"),
    "answer": (
        "nq_open",
        [{"question": "x", "answer": "y"}],
        r"entry 1: 'answer' must be a list of strings, got \"y\"",
    ),
    "number": ("halueval", [HALUEVAL | {"question": 3}], r"entry 1: 'question' must be a string, got 3"),
    "no answer": (
        "triviaqa",
        [{"Question": "x", "QuestionId": "1"}],
        r"entry 1 lacks the field 'Answer'; it has Question",
    ),
    "aliases": (
        "triviaqa",
        [TRIVIAQA | {"Answer": {"Value": "a", "Aliases": "b"}}],
        r"entry 1, Answer: 'Aliases' must be a list of strings, got \"b\"",
    ),
    "entry": ("halueval", [3], r"f entry 1 holds a JSON int, expected an object"),
    "nothing usable": ("nq_open", [{"question": "x", "answer": []}], r"f holds no question"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_read_set__names_row_and_field_of_what_cannot_be_used(tmp_path, name):
    format, rows, words = BAD[name]
    delimiter = {"truthfulqa": ",", "popqa": "\t"}.get(format)
    path = tmp_path / "f"
    if delimiter is None:
        write_list(path, rows)
    else:
        write_table(path, rows, delimiter)
    with pytest.raises(InputError, match=words):
        sets.read_set(path, format)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1\n", r"f line 2 has not the 2 cells of line 1"),
        (b"a,b\n1,2,3\n", r"f line 2 has not the 2 cells of line 1"),
        (b'a,b\n1,"2\n', r"f is no readable table after line 0: unexpected end of data"),
        (b"a,b\n1,\xff\n", r"f is no readable table after line 0: .*0xff"),
        (b"a,b\n", r"f holds no question"),
    ],
)
def test_read_set__names_a_damaged_table(tmp_path, content, words):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InputError, match=words):
        sets.read_set(tmp_path / "f", "truthfulqa")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[{", r"f is not readable JSON: .*column"),
        (json.dumps(HALUEVAL).encode() + b'\n{"question"\n', r"f line 2 is not readable JSON"),
        (b"\xff", r"f is not UTF-8: .*0xff"),
    ],
)
def test_read_set__names_damaged_json(tmp_path, content, words):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InputError, match=words):
        sets.read_set(tmp_path / "f", "nq_open" if b"\n" not in content else "halueval")


def test_read_set__names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.csv is missing or not a file"):
        sets.read_set(tmp_path / "nothing.csv", "truthfulqa")


def test_formats__are_the_same_in_config_prompts_and_downloads():
    assert tuple(sets.FORMATS) == config.QUESTION_SETS
    assert tuple(prompts.FORMATS) == questions.FORMATS == ("jsonl", "csv", *sets.FORMATS)
    assert set(SOURCES) == {*sets.FORMATS, "squad"}


@needs_real
@pytest.mark.parametrize("name", list(REAL))
def test_published_files__are_read_whole(name):
    path, n_rows, n_questions = REAL[name]
    found = sets.read_set(path, name)
    assert len(found) == n_questions
    assert n_rows - n_questions in (0, 2)  # NQ-open answers two questions with dashes and signs alone
    assert len({question.id for question in found}) == n_questions
    if name in ("truthfulqa", "halueval"):
        assert all(question.wrong_answers for question in found)


@needs_real
def test_truthfulqa__gives_two_answers_for_every_one_of_its_questions():
    with open(REAL["truthfulqa"][0], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = sets.read_set(REAL["truthfulqa"][0], "truthfulqa")
    assert [(q.answers[0], q.wrong_answers[0]) for q in found] == [
        (row["Best Answer"].strip(), row["Best Incorrect Answer"].strip()) for row in rows
    ]


@needs_real
def test_examples_in_prompts__are_in_none_of_the_sets():
    examples = {normalise(asked) for own in prompts.FORMATS.values() for asked, _ in own.examples}
    assert len(examples) == 10
    for name, (path, _, _) in REAL.items():
        assert not examples & {normalise(question.question) for question in sets.read_set(path, name)}


@needs_real
@pytest.mark.parametrize("name", ["truthfulqa", "nq_open"])
def test_checksums__are_of_the_published_files(name):
    assert sha256_file(REAL[name][0]) == SOURCES[name].sha256
    assert REAL[name][0].stat().st_size == SOURCES[name].n_bytes


@needs_real
def test_checksum_of_known_1000__is_of_its_rows_without_the_columns_added_later(tmp_path):
    rows = json.loads(REAL["known_1000"][0].read_text(encoding="utf-8"))
    rows = [{name: cell for name, cell in row.items() if "/" not in name} for row in rows]
    (tmp_path / "known_1000.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    assert sha256_file(tmp_path / "known_1000.json") == SOURCES["known_1000"].sha256


@pytest.mark.parametrize(
    ("field", "setting", "words"),
    [
        ("name", "nq", r"questions\.name is 'nq', expected one of truthfulqa, halueval, triviaqa, nq_open"),
        ("format", "json", r"questions\.format is 'json', expected one of auto, jsonl, csv, truthfulqa"),
        ("answers", "both", r"questions\.answers is 'both', expected one of own, given"),
        ("refusals", "keep", r"questions\.refusals is 'keep', expected one of drop, wrong"),
        ("shots", -1, r"questions\.shots is -1, expected at least 0"),
        ("n_questions", 0, r"questions\.n_questions is 0, expected at least 1"),
    ],
)
def test_config__refuses_what_no_question_set_knows(field, setting, words):
    settings = config.defaults()
    settings.sae.n_latents, settings.train.epochs = 8, 1.0
    assert config.resolve(settings).questions.name is None
    settings.questions[field] = setting
    with pytest.raises(InputError, match=words):
        config.resolve(settings)
