"""`jaxsae audit` from a file to its three files: what is said, what is refused, and the published figures."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxsae import artifacts, cli
from jaxsae.data.benchmarks import LabelledAnswer, read_benchmark
from jaxsae.pipeline import audit

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published files are not in {SHARED}")
TRUTHFULQA = SHARED / "truthfulqa" / "TruthfulQA.csv"
HALUEVAL = SHARED / "halueval" / "qa_one-turn_data.json"
VOID = {"meta", "link", "br", "img"}


class Balance(HTMLParser):
    """Checks that every element is closed in order, and gathers ids, links to fragments, and text."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.addresses, self.text = [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.links += [value[1:]] if name == "href" and value.startswith("#") else []
            self.addresses += [value] if name in ("href", "src") and not value.startswith(("#", "data:")) else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(path):
    page = Balance()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


@pytest.fixture
def benchmark(tmp_path):
    """Write 60 questions with a short right and a long hallucinated answer each; one text is hostile."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "eta", "<script>alert(1)</script>"]
    path = tmp_path / "mine.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "response", "hallucinated", "category"])
        for number in range(60):
            for label in rng.permutation(2).tolist():
                answer = " ".join(rng.choice(words, size=2 + 5 * label))
                writer.writerow([f"What is {number}?", answer, label, words[number % 6]])
    return path


def run(*arguments):
    return cli.run(["jaxsae", "audit", *map(str, arguments), "--bootstrap=200"])


def test_audit__writes_three_files_that_say_the_same(benchmark, tmp_path, capsys):
    assert run(benchmark, f"--out={tmp_path}/out", "--seed=3") == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.html", "audit.json", "audit.md"]
    found = artifacts.read_json(tmp_path / "out" / "audit.json", rebuild="")
    assert (found["sha256"], found["pairs"]) == (artifacts.sha256_file(benchmark), None)
    assert found["columns"]["answer"] == "response"
    assert found["label_values"] == {"0": 60, "1": 60}
    assert found["rows_in_file"] == found["sizes"]["rows"] == 120
    sizes = {"rotations": 7, "train_share": 0.7, "noise_columns": 8, "noise_draws": 10, "trees": 30}
    assert found["settings"] == {"seed": 3, "bootstrap": 200} | sizes
    length = next(row for row in found["checks"] if row["name"] == "length")
    figure = f"{length['auroc']:.3f}"
    assert length["auroc"] > 0.9
    assert re.search(rf"^  length of the answer +{re.escape(figure)} .* gives the label away$", said, re.MULTILINE)
    assert max(map(len, said.splitlines()[:-1])) <= 100
    page = read_page(tmp_path / "out" / "audit.html")
    markdown = (tmp_path / "out" / "audit.md").read_text(encoding="utf-8")
    for text in (page.text, markdown):
        assert "Length of the answer: gives the label away" in text
        assert figure in text
    assert all(row["definition"] in page.text for row in found["checks"] if "definition" in row)


def test_page__is_whole_escaped_and_asks_for_nothing(benchmark, tmp_path):
    run(benchmark, f"--out={tmp_path}/out")
    page = read_page(tmp_path / "out" / "audit.html")
    assert page.addresses == []
    assert set(page.links) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "<script>alert(1)</script>" in page.text  # the category's name, as text


def test_audit__of_one_seed_gives_the_same_bytes(benchmark, tmp_path):
    for name in ("one", "two"):
        run(benchmark, f"--out={tmp_path}/{name}")
    for name in audit.FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_dry_run__checks_the_file_and_writes_nothing(benchmark, tmp_path, capsys):
    assert run(benchmark, f"--out={tmp_path}/out", "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"would audit 120 of 120 rows of {benchmark} (a row per answer): 60 right, 60 hallucinat")
    assert said[1:] == [f"would write {tmp_path}/out/{name}" for name in audit.FILES]
    assert not (tmp_path / "out").exists()


BAD = {
    "no file": (["--out=o"], "jaxsae audit takes one FILE, a benchmark's answers; got none"),
    "two files": (["a.csv", "b.csv", "--out=o"], "takes one FILE.*; got a.csv b.csv"),
    "no out": (["mine.csv"], "--out is missing; name a folder"),
    "a config": (["mine.csv", "--out=o", "--config=c.py"], "Unknown command line flag 'config'"),
    "out a file": (["mine.csv", "--out=mine.csv"], "--out=mine.csv is a file; name a folder"),
    "out below a file": (["mine.csv", "--out=mine.csv/o"], "--out=mine.csv/o cannot be made: Not a directory"),
    "file not there": (["nope.csv", "--out=o"], "nope.csv is missing or not a file"),
    "pairs of rows": (["mine.csv", "--out=o", "--pairs=all"], "mine.csv has a row per answer; leave out --pairs"),
    "one class": (["right.csv", "--out=o"], r"right.csv: the audit needs answers of both kinds, got 0 hallucinated"),
    "few groups": (["few.csv", "--out=o"], r"few.csv: 4 rows lie in 2 groups \(questions\), expected at least 20"),
    "unnamed columns": (["odd.csv", "--out=o"], "odd.csv has no column for answer, label; it has 'question', 'text'"),
    "negative seed": (["mine.csv", "--out=o", "--seed=-1"], "--seed=-1: "),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input__ends_in_one_line_and_writes_nothing(benchmark, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    rows = benchmark.read_text().splitlines(keepends=True)
    Path("right.csv").write_text(rows[0] + "".join(row for row in rows if ",0," in row))
    Path("few.csv").write_text("".join(rows[:5]))
    Path("odd.csv").write_text("question,text\nq,a\n")
    before = sorted(tmp_path.iterdir())
    arguments, words = BAD[case]
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert re.search(f"^jaxsae: .*{words}", said.err), said.err
    assert sorted(tmp_path.iterdir()) == before


def test_sample__takes_whole_groups_by_the_seed_until_a_limit(monkeypatch):
    rows = [LabelledAnswer("q" * 10, "a" * 10, n % 2, f"g{n // 3}", n) for n in range(90)]
    assert audit.take_rows(rows, seed=0) == rows
    monkeypatch.setattr(audit, "MOST_ROWS", 20)
    taken = audit.take_rows(rows, seed=0)
    assert len(taken) == 18  # six groups of three; a seventh would pass the limit
    assert [row.unit for row in taken] == sorted(row.unit for row in taken)
    assert len({row.group for row in taken}) == 6
    assert taken == audit.take_rows(rows, seed=0) != audit.take_rows(rows, seed=1)
    monkeypatch.setattr(audit, "MOST_CHARACTERS", 130)
    assert len(audit.take_rows(rows, seed=0)) == 6


def test_sample__is_said(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "MOST_ROWS", 80)
    run(benchmark, f"--out={tmp_path}/out")
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (found["rows_in_file"], found["sizes"]["rows"]) == (120, 80)
    assert "The file gives 120 rows; the figures are of a sample of 80" in (tmp_path / "out" / "audit.md").read_text()


def test_help__teaches_the_file_and_every_flag(capsys):
    assert cli.run(["jaxsae", "audit", "--help"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  --([\w-]+)", said, re.MULTILINE) == [
        "out",
        "pairs",
        "columns",
        "seed",
        "bootstrap",
        "dry-run",
    ]
    for word in ("FILE", "question, answer, label (1 = hallucinated)", "TruthfulQA.csv", "HaluEval", "published"):
        assert word in said


def real(path, tmp_path, *flags):
    assert run(path, f"--out={tmp_path}", *flags) == 0
    found = json.loads((tmp_path / "audit.json").read_text())
    return found, {row["name"]: row for row in found["checks"]}, {row["name"]: row for row in found["splits"]}


@needs_real
def test_truthfulqa__published_pairs_leak_as_measured_before(tmp_path):
    found, checks, splits = real(TRUTHFULQA, tmp_path, "--pairs=published")
    assert found["sizes"]["rows"] == 6498
    # By reading: 95 % of the right answers' test texts in training, noise about .98 (a forest of 100 trees .976).
    assert splits["pair"]["right_texts_in_train"]["share"] == pytest.approx(0.95, abs=0.01)
    assert splits["pair"]["hallucinated_texts_in_train"]["share"] == 0
    assert splits["pair"]["canary"]["auroc"] == pytest.approx(0.98, abs=0.015)
    assert splits["group"]["right_texts_in_train"]["share"] == 0
    assert splits["group"]["canary"]["ci_low"] < 0.5 < splits["group"]["canary"]["ci_high"]
    assert checks["answer_tfidf"]["auroc"] == pytest.approx(0.82, abs=0.015)  # 0.824 grouped, published pairs


@needs_real
def test_truthfulqa__of_two_rows_a_question_leaks_in_no_split(tmp_path):
    found, checks, splits = real(TRUTHFULQA, tmp_path)
    assert (found["pairs"], found["sizes"]["rows"]) == ("question", 1580)
    for split in splits.values():
        assert split["right_texts_in_train"]["share"] == split["hallucinated_texts_in_train"]["share"] == 0
        assert split["canary"]["auroc"] == pytest.approx(0.5, abs=0.04)
        assert split["canary"]["finding"] == "none"
    assert checks["question_tfidf"]["auroc"] == 0.5
    assert checks["answer_tfidf"]["finding"] == "found"


@needs_real
def test_halueval__is_told_by_length_alone(tmp_path):
    _, checks, _ = real(HALUEVAL, tmp_path)
    assert checks["length"]["ci_low"] > 0.9
    assert checks["length"]["finding"] == "found"


@needs_real
def test_all_pairs__of_truthfulqa_are_within_the_limits():
    made = read_benchmark(TRUTHFULQA, pairs="all").rows
    assert audit.take_rows(made, seed=0) == list(made)
