"""The audit: planted leaks are caught, each by its own check, and rows without one are not accused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxsae.artifacts import InputError
from jaxsae.detection import leaks
from jaxsae.detection.audit import audit, check_rows
from jaxsae.detection.leaks import AuditRows, make_splits, minimum_detectable, rotate
from jaxsae.detection.statistics import draw_group_weights

WORDS = np.array([f"{first}{second}" for first in "bdfgklmn" for second in ("a", "e", "i", "o", "u")])


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """Take a third of the trees: what they find here is large."""
    monkeypatch.setattr(leaks, "TREES", 10)


def say(rng, n):
    return " ".join(rng.choice(WORDS, size=n))


def make_rows(*, n_groups=160, per_group=2, seed=0, **changes):
    """Return rows whose labels are drawn independently of everything else."""
    rng = np.random.default_rng(seed)
    n = n_groups * per_group
    asked = [f"{say(rng, 5)} {group}?" for group in range(n_groups)]
    rows = AuditRows(
        questions=tuple(asked[number // per_group] for number in range(n)),
        answers=tuple(say(rng, rng.integers(2, 7)) for _ in range(n)),
        labels=rng.integers(2, size=n),
        groups=tuple(f"g{number // per_group}" for number in range(n)),
        units=np.arange(n),
        is_paired=False,
        categories=tuple(rng.choice(["places", "people", "laws"], size=n).tolist()),
        splits=("",) * n,
    )
    return dataclasses.replace(rows, **changes)


def make_pairs(*, n_groups=60, wrong=5, seed=0):
    """Return pairs whose right answer comes again beside each of a question's wrong ones."""
    rng = np.random.default_rng(seed)
    questions, answers, groups = [], [], []
    for group in range(n_groups):
        question, right = f"{say(rng, 5)} {group}?", f"{say(rng, 4)} {group:09d}"
        for _ in range(wrong):
            questions += [question] * 2
            answers += [right, f"{say(rng, 4)} {rng.integers(10**9):09d}"]
            groups += [f"g{group}"] * 2
    n = len(groups)
    blank, labels, units = ("",) * n, np.tile([0, 1], n // 2), np.repeat(np.arange(n // 2), 2)
    return AuditRows(tuple(questions), tuple(answers), labels, tuple(groups), units, True, blank, blank)


def run(rows, **settings):
    return audit(rows, **{"bootstrap": 200, **settings})


def by_name(found):
    return {row["name"]: row for row in found["checks"]}


def found_names(found):
    """Return the names of all checks and splits that found something."""
    names = {row["name"] for row in found["checks"] if row["finding"] == "found"}
    for split in found["splits"]:
        names |= {f"noise by {split['name']}"} if split["canary"]["finding"] == "found" else set()
        names |= {f"texts by {split['name']}"} if split["overlap_finding"] == "found" else set()
    return names


@pytest.mark.parametrize("seed", range(4))
def test_clean_rows__are_not_accused(seed):
    found = run(make_rows(seed=seed), seed=seed)
    assert found_names(found) == set()
    assert {row["finding"] for row in found["checks"]} <= {"none", "unclear"}
    assert found["duplicates"]["repeated_texts"] == found["duplicates"]["contradictory_texts"] == 0


def test_repeated_right_answer__leaks_by_pair_and_not_by_group():
    found = run(make_pairs())
    pair, group = found["splits"]
    assert (pair["name"], group["name"]) == ("pair", "group")
    # A text of five pairs is absent from 70 % of the pairs with probability .3 ** 4 = .008 or less.
    assert pair["right_texts_in_train"]["share"] > 0.97
    assert pair["right_texts_in_train"]["ci_low"] <= pair["right_texts_in_train"]["share"]
    assert pair["hallucinated_texts_in_train"]["share"] == 0
    assert pair["canary"]["auroc"] > 0.9
    for key in ("right_texts_in_train", "hallucinated_texts_in_train", "rows_with_question_in_train"):
        assert group[key]["share"] == 0
    assert group["canary"]["finding"] != "found"
    assert found_names(found) == {"texts by pair", "noise by pair"}
    assert (found["duplicates"]["repeated_texts"], found["duplicates"]["repeated_rows"]) == (60, 300)
    assert found["duplicates"]["texts_in_two_groups"] == 0


def test_text_in_two_groups__leaks_by_group_too():
    rows = make_rows()
    half = len(rows.labels) // 2  # 80 of the 160 questions, two rows each
    twice = {name: getattr(rows, name)[:half] * 2 for name in ("questions", "answers")}
    rows = dataclasses.replace(rows, **twice, labels=np.tile(rows.labels[:half], 2))
    found = run(rows)
    assert found_names(found) >= {"texts by row", "noise by row", "texts by group", "noise by group"}
    assert found["duplicates"]["texts_in_two_groups"] == half
    assert found["duplicates"]["questions_in_two_groups"] == 80


def plant_length(rows):
    return {"answers": tuple(text + " da da da" * label for text, label in zip(rows.answers, rows.labels, strict=True))}


def plant_question(rows):
    labels = np.repeat(rows.labels[::2], 2)
    words = ("ba", "du")
    texts = zip(rows.questions, labels, strict=True)
    return {"questions": tuple(f"{words[label]}{words[label]} {text}" for text, label in texts), "labels": labels}


def plant_answer(rows):
    """Put one of two equally long words into each answer."""
    return {"answers": tuple(f"{('xx', 'yy')[label]} {a}" for a, label in zip(rows.answers, rows.labels, strict=True))}


def plant_category(rows):
    return {"categories": tuple(("places", "laws")[label] for label in rows.labels)}


def plant_order(rows):
    """Sort the file by label."""
    return {"labels": (np.arange(len(rows.labels)) > len(rows.labels) // 2).astype(np.int64)}


def plant_alternation(rows):
    return {"labels": np.arange(len(rows.labels)) % 2}


PLANTED = {
    "length": (plant_length, {"length"}),
    "question_tfidf": (plant_question, {"question_tfidf"}),
    "answer_tfidf": (plant_answer, {"answer_tfidf"}),
    "category": (plant_category, {"category"}),
    "position": (plant_order, {"position"}),
    "alternation": (plant_alternation, {"position", "class_prior_by_question"}),
}


@pytest.mark.parametrize("name", list(PLANTED))
def test_planted_clue__is_caught_by_its_own_check(name):
    plant, wanted = PLANTED[name]
    rows = make_rows(seed=1)
    found = run(dataclasses.replace(rows, **plant(rows)))
    names = found_names(found)
    assert wanted <= names
    for check in wanted - {"class_prior_by_question"}:
        assert by_name(found)[check]["auroc"] > 0.85
    # Words added are text too, and labels that follow the order or the question follow the group.
    bystanders = {"question_answer_tfidf", "answer_tfidf", "class_prior_by_question"}
    assert names <= wanted | bystanders


def test_questions_of_one_label__give_it_away_by_row_only():
    rows = make_rows(n_groups=80, per_group=4)
    found = run(dataclasses.replace(rows, labels=np.repeat(rows.labels[::4], 4)))
    row = by_name(found)["class_prior_by_question"]
    assert (row["split"], row["finding"]) == ("row", "found")
    assert row["auroc"] > 0.95
    assert by_name(found)["question_tfidf"]["finding"] != "found"
    assert found["sizes"]["mixed_groups"] == 0


def test_questions_of_both_labels__give_them_away_from_below():
    row = by_name(run(make_rows(labels=np.tile([0, 1, 1, 0], 80))))["class_prior_by_question"]
    assert (row["finding"], row["auroc"] < 0.2) == ("found", True)


def test_own_split_of_the_file__is_judged_where_it_leaks():
    rows = make_rows()
    n = len(rows.labels)
    of_row = np.where(np.arange(n) % 4 < 3, "train", "test")
    clean = run(dataclasses.replace(rows, splits=tuple(np.where(np.arange(n) < n // 2, "train", "test").tolist())))
    assert [split["name"] for split in clean["splits"]] == ["row", "group", "file"]
    assert clean["splits"][2]["rows_with_question_in_train"]["share"] == 0
    assert found_names(clean) == set()
    # Every second test row is a copy of the training row before it.
    texts = {name: list(getattr(rows, name)) for name in ("questions", "answers")}
    for number in range(3, n, 8):
        for name in texts:
            texts[name][number] = texts[name][number - 1]
    labels = rows.labels.copy()
    labels[3::8] = labels[2::8]
    changes = {name: tuple(values) for name, values in texts.items()}
    own = run(dataclasses.replace(rows, **changes, labels=labels, splits=tuple(of_row.tolist())))["splits"][2]
    n_seen = sum(own[f"{kind}_texts_in_train"]["share"] * own[f"{kind}_texts_in_train"]["n"] for kind in KINDS)
    assert n_seen == pytest.approx(n // 8)
    assert own["rows_with_question_in_train"] == {"n": n // 4, "share": 1.0, "ci_low": 1.0, "ci_high": 1.0}
    assert (own["overlap_finding"], own["canary"]["n"], own["canary"]["auroc"] > 0.6) == ("found", n // 4, True)


KINDS = ("right", "hallucinated")


def test_own_split__of_test_rows_alone_is_no_split():
    assert len(make_splits(make_rows(splits=("test",) * 320), seed=0)) == 2


def test_contradictory_labels__are_counted():
    rows = make_rows()
    answers, questions = list(rows.answers), list(rows.questions)
    answers[1], questions[1] = answers[0].upper() + "!", questions[0]
    labels = rows.labels.copy()
    labels[:2] = [0, 1]
    changes = {"answers": tuple(answers), "questions": tuple(questions), "labels": labels}
    found = run(dataclasses.replace(rows, **changes), bootstrap=100)["duplicates"]
    assert (found["contradictory_texts"], found["contradictory_rows"], found["repeated_texts"]) == (1, 2, 1)


def test_empty_answers__are_counted_and_do_no_harm():
    rows = make_rows()
    found = run(dataclasses.replace(rows, answers=("", "?!", *rows.answers[2:]), labels=np.tile([1, 0], 160)))
    assert (found["sizes"]["empty_answers"], found["sizes"]["empty_hallucinated"]) == (2, 1)
    everything_empty = run(dataclasses.replace(rows, answers=("",) * 320))
    assert by_name(everything_empty)["answer_tfidf"]["auroc"] <= 0.55


def test_rows_of_pairs__have_no_order_and_may_have_no_category():
    checks = by_name(run(make_pairs()))
    assert checks["position"]["finding"] == checks["category"]["finding"] == "unmeasured"
    assert checks["class_prior_by_question"]["auroc"] == 0.5


def test_audit__is_the_same_for_a_seed_and_is_json():
    rows = make_rows(n_groups=60)
    first, again, other = (json.dumps(run(rows, seed=seed), allow_nan=False) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_canary__is_the_mean_of_its_draws():
    found = run(make_rows(n_groups=60))
    for split in found["splits"]:
        canary = split["canary"]
        assert len(set(canary["auroc_by_draw"])) == found["settings"]["noise_draws"] == 10
        assert canary["auroc"] == pytest.approx(np.mean(canary["auroc_by_draw"]))
        assert canary["ci_low"] < canary["auroc"] < canary["ci_high"]


def test_progress__counts_every_step():
    said = []
    run(make_rows(n_groups=40), progress=lambda done, total, what: said.append((done, total)))
    assert said == [(number, len(said)) for number in range(1, len(said) + 1)]


@pytest.mark.parametrize("per_unit", [1, 3])
def test_rotation__tests_each_unit_once_and_trains_on_70_percent(per_unit):
    units = np.repeat(np.arange(143), per_unit)
    labels = np.zeros(len(units), dtype=np.int64)
    labels[: 10 * per_unit] = 1
    turns = rotate(units, labels, seed=5)
    assert np.array_equal(sum(turn.test.astype(int) for turn in turns), np.ones(len(units)))
    for turn in turns:
        assert not (turn.train & turn.test).any()
        assert not np.isin(units[turn.test], units[turn.train]).any()
        assert turn.train.sum() / len(units) == pytest.approx(0.7, abs=0.01)
        assert set(labels[turn.train]) == {0, 1}
        assert labels[turn.test].sum() >= per_unit  # ten hallucinated units in seven arcs, spread evenly


def test_rotation__changes_with_the_seed():
    units, labels = np.arange(50), np.arange(50) % 2
    first, other = (np.stack([turn.test for turn in rotate(units, labels, seed=seed)]) for seed in (0, 1))
    assert not np.array_equal(first, other)


def detectable(rows, seed=0):
    weights = draw_group_weights(int(rows.group_index.max()) + 1, resamples=500, seed=seed)
    noise = np.random.default_rng(seed).standard_normal((int(rows.text_index.max()) + 1, 3))[rows.text_index]
    return minimum_detectable(rows, noise, weights, seed)


def test_minimum_detectable__of_single_rows_follows_the_variance_of_ranks():
    n = 400
    rows = make_rows(n_groups=n, per_group=1, labels=np.arange(n) % 2)
    found = detectable(rows)
    # Variance of the Mann-Whitney statistic of two equal classes: (n + 1) / (12 (n/2) (n/2))
    assert found["standard_error"] == pytest.approx(np.sqrt((n + 1) / (3 * n * n)), rel=0.15)
    assert found["from_chance"] == pytest.approx((1.959964 + 0.841621) * found["standard_error"], rel=1e-5)
    assert found["between_detectors"] == pytest.approx(np.sqrt(2) * found["from_chance"])


def test_minimum_detectable__counts_questions_and_not_rows_of_one_label():
    single = make_rows(n_groups=150, per_group=1)
    labels = np.repeat(single.labels, 6)
    repeated = make_rows(n_groups=150, per_group=6, labels=labels)
    ratio = detectable(repeated)["standard_error"] / detectable(single)["standard_error"]
    assert ratio == pytest.approx(1, rel=0.25)  # six times the rows, each question still one draw


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (make_rows(labels=np.zeros(320, dtype=np.int64)), r"got 0 hallucinated \(label 1\) and 320 right"),
        (make_rows(labels=np.ones(320, dtype=np.int64)), r"got 320 hallucinated \(label 1\) and 0 right"),
        (make_rows(n_groups=19), "38 rows lie in 19 groups .questions., expected at least 20"),
        (
            make_rows(labels=(np.arange(320) < 17).astype(np.int64)),
            "the hallucinated answers lie in 9 of 160 groups .questions., expected at least 10",
        ),
    ],
)
def test_rows_that_allow_no_interval__are_refused(rows, words):
    with pytest.raises(InputError, match=words):
        check_rows(rows)


def test_finding__needs_size_and_certainty():
    rows = make_rows(n_groups=160)
    split = make_splits(rows, seed=0)[1]
    weights = draw_group_weights(160, resamples=300, seed=0)

    def finding(shift, n=320):
        scores = np.random.default_rng(1).standard_normal(n) + shift * rows.labels
        return leaks._score_row("x", "", split, rows, scores, weights)

    strong, weak, none = finding(1.0), finding(0.3), finding(0.0)
    assert (strong["finding"], none["finding"]) == ("found", "none")
    assert weak["ci_low"] > 0.5
    assert weak["auroc"] - 0.5 < 2.6 * weak["standard_error"]
    assert weak["finding"] == "unclear"
