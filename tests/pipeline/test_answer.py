"""The answer stage: own and given answers of the demo's model, their counts, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from jaxsae import artifacts, data, models
from jaxsae.artifacts import Answer, InputError, Question
from jaxsae.config import QuestionsConfig
from jaxsae.pipeline import answer as stage

ASSET = "package://jaxsae/assets/demo_gpt2"


@pytest.fixture(scope="module")
def lm():
    return models.load(ASSET)


@pytest.fixture(scope="module")
def asked():
    """Forty questions of the demo, each with a wrong answer: the right one of another fact."""
    questions = data.read_questions(f"{ASSET}/questions.jsonl")[::120]
    others = [*questions[1:], questions[0]]
    return [
        Question(q.id, q.question, q.answers, q.group, q.category, wrong_answers=("Rome", *other.answers))
        for q, other in zip(questions, others, strict=True)
    ]


@pytest.fixture
def write_set(tmp_path, asked):
    """Write a question set and return its path."""

    def write(questions=asked, name="q.jsonl"):
        data.write_questions(tmp_path / name, questions)
        return tmp_path / name

    return write


def put(lm, questions):
    prompter = data.make_prompter("jsonl", prompt="{question}", stop=(".",))
    return [stage.put(question, prompter, lm.tokenizer) for question in questions]


def row(id, text, label, right=("Paris",), category=""):
    return Answer(id, "Where?", right, id, category, "Where?", (1,), text, (2,), label, (-1.0,), (0.5,))


def test_given_answers__have_the_log_probabilities_of_one_forward_pass_of_their_own(lm, asked):
    pairs = [pair for item in put(lm, asked[:5]) for pair in stage.pair_up(item, lm.tokenizer)]
    answers = stage.read_given(lm, pairs, batch=4)
    assert [answer.label for answer in answers] == [0, 1] * 5
    assert [answer.id for answer in answers[:2]] == [f"{asked[0].id}/right", f"{asked[0].id}/wrong"]
    for answer in answers:
        ids = np.array([*answer.prompt_ids, *answer.answer_ids])[None]
        expected = np.asarray(jax.nn.log_softmax(lm.logits(ids)[0]))
        first = len(answer.prompt_ids)
        token_logprobs = [expected[at - 1, ids[0, at]] for at in range(first, ids.shape[1])]
        np.testing.assert_allclose(answer.logprobs, token_logprobs, atol=1e-5)
        entropies = [-np.sum(np.exp(expected[at - 1]) * expected[at - 1]) for at in range(first, ids.shape[1])]
        np.testing.assert_allclose(answer.entropies, entropies, atol=5e-5)
        assert lm.tokenizer.decode(answer.answer_ids).strip() == answer.answer
        assert answer.answer == (asked_of(answer, asked).answers[0] if answer.label == 0 else "Rome")


def asked_of(answer, asked):
    return next(question for question in asked if answer.id.startswith(f"{question.id}/"))


def test_given_answers__that_are_the_models_own_have_the_log_probabilities_of_its_generation(lm, asked):
    items = put(lm, asked)
    stop_ids = models.generate.stop_token_ids(lm.tokenizer, (".",))
    own = [a for a in stage.ask(lm, items, max_new_tokens=8, stop_ids=stop_ids) if a.answer_ids]
    given = [
        stage.Prompted(items[0].question, answer.prompt, answer.prompt_ids, answer.id, answer.answer, answer.answer_ids)
        for answer in own
    ]
    read = stage.read_given(lm, given, batch=16)
    assert len(own) > 30
    for a, b in zip(own, read, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        np.testing.assert_allclose(a.entropies, b.entropies, atol=1e-4)


def test_pair_up__names_a_question_without_a_wrong_answer(lm):
    (item,) = put(lm, [Question("q7", "Where?", ("Rome",), "g")])
    with pytest.raises(
        InputError, match=r"question q7 has no wrong answer; questions\.answers=given needs one for every"
    ):
        stage.pair_up(item, lm.tokenizer)


def test_load_questions__takes_them_evenly(write_set, asked):
    path = str(write_set())
    every, format = stage.load_questions(QuestionsConfig(path=path))
    assert (every, format) == (asked, "jsonl")
    n = len(asked)
    some, _ = stage.load_questions(QuestionsConfig(path=path, n_questions=3))
    assert some == [asked[0], asked[n // 3], asked[2 * n // 3]]
    assert stage.load_questions(QuestionsConfig(path=path, n_questions=n))[0] == asked
    with pytest.raises(InputError, match=rf"questions\.n_questions is 999, but .*q\.jsonl holds {n}; ask for fewer"):
        stage.load_questions(QuestionsConfig(path=path, n_questions=999))


def test_load_questions__takes_a_published_set_from_a_path_or_a_download(tmp_path, monkeypatch):
    path = tmp_path / "nq.dev"
    path.write_text('{"question": "who", "answer": ["Ann"]}\n')
    (question,), format = stage.load_questions(QuestionsConfig(path=str(path), name="nq_open"))
    assert (question.answers, format) == (("Ann",), "nq_open")
    monkeypatch.setattr(stage, "download", {"nq_open": path}.__getitem__)
    assert stage.load_questions(QuestionsConfig(name="nq_open")) == ([question], "nq_open")
    with pytest.raises(
        InputError, match=r"questions\.name is nq_open but questions\.format is popqa; leave the format"
    ):
        stage.load_questions(QuestionsConfig(name="nq_open", format="popqa"))
    with pytest.raises(InputError, match=r"questions\.path and questions\.name are both unset"):
        stage.load_questions(QuestionsConfig())


ROWS = [
    row("a", "Paris", 0, category="x"),
    row("b", "London", 1, category="x"),
    row("c", "I don't know.", 1, category="y"),
    row("d", "...", 1, category="y"),
    row("e", "I don't know, Paris", 0, category="y"),
    row("f", "Parisian", 1, category="y"),
]


def test_summarise__drops_refusals_and_counts_every_class():
    kept, summary = stage.summarise(ROWS, QuestionsConfig())
    assert [answer.id for answer in kept] == ["a", "b", "d", "e", "f"]
    assert summary["counts"] == {"asked": 6, "right": 2, "wrong": 2, "empty": 1, "refusal": 1, "dropped": 1}
    assert summary["by_category"] == {
        "x": {"asked": 2, "right": 1, "wrong": 1, "empty": 0, "refusal": 0, "dropped": 0},
        "y": {"asked": 4, "right": 1, "wrong": 1, "empty": 1, "refusal": 1, "dropped": 1},
    }
    assert summary["dropped"] == [{"id": "c", "answer": "I don't know."}]
    assert summary["hallucinated_by_rule"] == {"alias": 3, "substring": 2, "exact": 4, "token_f1": 4}
    assert next((r["a"], r["b"], r["n"]) for r in summary["agreement"]) == ("alias", "substring", 5)
    assert summary["agreement"][0]["agreement"] == 0.8


def test_summarise__keeps_refusals_as_wrong_where_asked():
    kept, summary = stage.summarise(ROWS, QuestionsConfig(refusals="wrong"))
    assert kept == ROWS
    assert (summary["counts"]["refusal"], summary["counts"]["dropped"], summary["dropped"]) == (1, 0, [])


def test_summarise__believes_the_labels_of_given_answers():
    rows = [row("a/right", "I don't know", 0), row("a/wrong", "Paris", 1)]
    kept, summary = stage.summarise(rows, QuestionsConfig(answers="given"))
    assert kept == rows
    assert summary["counts"] == {"asked": 2, "right": 1, "wrong": 1, "empty": 0, "refusal": 0, "dropped": 0}
    assert summary["hallucinated_by_rule"] == {"given": 1, "alias": 1, "substring": 1, "exact": 1, "token_f1": 1}
    assert summary["agreement"][0] == {"a": "given", "b": "alias", "n": 2, "agreement": 0.0, "kappa": -1.0}


def test_answers_of_one_kind__are_refused_in_one_line(finished, refuses, tmp_path, write_set, asked):
    run = finished.copy(tmp_path / "run", without=("answer", "track", "detect", "evaluate"))
    hopeless = [Question(q.id, q.question, ("nobody says this",), q.group) for q in asked]
    words = (
        rf"the answers are of one kind: 0 right and {len(asked)} hallucinated; detectors need both: .*partial\.jsonl"
    )
    refuses(run, "answer", words, questions__path=write_set(hopeless))
    assert len((run.workdir / "answers.partial.jsonl").read_text().splitlines()) == 1 + len(asked)
    assert not (run.workdir / "answers.jsonl").exists()


def test_chat__without_a_template_is_refused_in_one_line(finished, refuses, tmp_path):
    run = finished.copy(tmp_path / "run", without=("answer", "track", "detect", "evaluate"))
    refuses(
        run, "answer", r"questions\.chat is set, but the model's tokenizer has no chat template", questions__chat=True
    )


def test_given_answers__go_through_the_whole_run_and_the_report_says_what_they_are(finished, tmp_path, write_set):
    questions = data.read_questions(finished.questions)
    others = [*questions[7:], *questions[:7]]
    pairs = [
        Question(
            q.id, q.question, q.answers, q.group, q.category, other.answers if other.answers != q.answers else ("No",)
        )
        for q, other in zip(questions, others, strict=True)
    ]
    run = finished.copy(tmp_path / "run", without=("answer", "track", "detect", "evaluate"))
    assert run("run", questions__path=write_set(pairs), questions__answers="given") == 0
    answers = artifacts.read_answers(run.workdir / "answers.jsonl")
    assert len(answers) == 2 * len(questions)
    assert sum(answer.label for answer in answers) == len(questions)
    assert len({answer.group for answer in answers}) == len({question.group for question in questions})
    report = (run.workdir / "report.md").read_text()
    assert "The answers were given by the question set, not generated by the model" in report
    assert "A diagnostic, no result" in report
    assert "Cohen's κ" in report


def test_own_answers__come_with_their_summary_and_no_such_note(finished):
    summary = json.loads((finished.workdir / "answers_summary.json").read_text())
    answers = artifacts.read_answers(finished.workdir / "answers.jsonl")
    assert (summary["answers"], summary["format"], summary["prompt"], summary["stop"]) == (
        *("own", "jsonl", "{question}"),
        ["."],
    )
    counts = summary["counts"]
    assert counts["asked"] == len(answers) + counts["dropped"]
    assert counts["wrong"] + counts["empty"] == summary["hallucinated_by_rule"]["alias"]
    assert sum(answer.label for answer in answers) == summary["hallucinated_by_rule"]["alias"]
    report = (finished.workdir / "report.md").read_text()
    assert "not generated by the model" not in report
    assert "token_f1" in report
