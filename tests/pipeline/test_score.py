"""`jaxsae score` and `jaxsae.Detector` on the small run: the same alone as in a batch, and clear where they refuse."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy

import jaxsae
from jaxsae import artifacts, cli, detection
from jaxsae.artifacts import InputError, resolve_path
from jaxsae.detection import explain
from jaxsae.pipeline import explanation
from jaxsae.pipeline.detect import read_tables

ASSET = resolve_path("package://jaxsae/assets/demo_gpt2")
QUICK = {"tracks": 2, "draws": 3}
LEARNED = "the detector learned from an answer to this prompt: it is surer of it than of a new one"


@pytest.fixture(scope="module")
def detector(finished):
    return jaxsae.Detector.load(finished.workdir)


@pytest.fixture(scope="module")
def answers(finished):
    return artifacts.read_answers(finished.workdir / "answers.jsonl")


@pytest.fixture(scope="module")
def rows(answers):
    return [
        {"prompt": answers[0].prompt},
        {"prompt": answers[1].prompt, "answer": answers[2].answer, "id": "given"},
        {"prompt": answers[3].prompt, "answer": ""},
        {"prompt": answers[0].prompt, "answer": f"{answers[0].answer} and {answers[1].answer} as well"},
    ]


def table_of(finished):
    return read_tables(finished.workdir)


def test_score_batch__equals_single_scores_to_the_last_bit(detector, rows):
    together = detector.score_batch(rows, **QUICK)
    for row, score in zip(rows, together, strict=True):
        alone = detector.score_batch([row], **QUICK)[0]
        assert dataclasses.replace(alone, id=score.id).to_dict() == score.to_dict()
    again = detector.score(rows[1]["prompt"], rows[1]["answer"], **QUICK)
    assert again.to_dict() | {"id": "given"} == together[1].to_dict()
    assert len({score.probability for score in together}) == 4


def test_score__of_the_run_s_own_answers_is_what_the_detector_says_of_their_rows(detector, finished, answers):
    expected = detector.judge.fitted.predict_proba(table_of(finished))[:40, 1]
    scores = [detector.score(answer.prompt, tracks=0) for answer in answers[:40]]
    assert [score.answer for score in scores] == [answer.answer for answer in answers[:40]]
    # float16 residual streams of batches of other shapes differ in a last digit; a tree's threshold may lie between.
    found = np.array([score.probability for score in scores])
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert np.median(np.abs(found - expected)) < 1e-3
    assert expected.std() > 0.05


def test_score__of_an_answer_given_is_that_of_the_same_answer_generated(detector, answers):
    own = detector.score(answers[5].prompt, **QUICK)
    given = detector.score(answers[5].prompt, own.answer, **QUICK)
    assert given.to_dict() == own.to_dict()


def test_token_scores__are_those_of_the_answer_cut_short(detector, answers):
    longest = max(answers, key=lambda answer: len(answer.answer_ids))
    score = detector.score(longest.prompt, tracks=0)
    assert len(score.tokens) == len(score.token_scores) == len(longest.answer_ids) > 1
    assert "".join(score.tokens).strip() == score.answer
    assert score.token_scores[-1] == score.probability
    for n in range(1, len(longest.answer_ids)):
        text = "".join(score.tokens[:n])
        cut = dataclasses.replace(detector._prepare({"prompt": longest.prompt}, 1)[0], answer=text.strip())
        cut = dataclasses.replace(cut, answer_ids=longest.answer_ids[:n])
        reading = detector.judge.read(cut)
        alone = detector.judge.probabilities(detector.judge.tabulate(reading.cuts, reading.features))[-1]
        assert score.token_scores[n - 1] == pytest.approx(alone, abs=1e-6)


def test_predict_proba__is_the_score_s_probability(detector, rows):
    found = detector.predict_proba(rows)
    np.testing.assert_array_equal(found[:, 1], [score.probability for score in detector.score_batch(rows, tracks=0)])
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-15)
    assert detector.predict_proba([]).shape == (0, 2)


def test_fit__learns_the_labels_it_is_given(finished, answers):
    fresh = jaxsae.Detector.load(finished.workdir)
    some = answers[:90]
    rows = [{"prompt": answer.prompt} for answer in some]
    labels, before = np.array([answer.label for answer in some]), fresh.predict_proba(rows[:4])
    assert fresh.fit(rows, labels, groups=[answer.group for answer in some]) is fresh
    assert fresh.judge.fitted.n_rows == 90
    kept = np.isin([answer.id for answer in answers], [answer.id for answer in some])
    assert kept[:90].all()
    right = fresh.score(rows[0]["prompt"], **QUICK).similar
    assert right.id in {str(row + 1) for row in np.flatnonzero(labels == 0)}
    told = fresh.predict_proba(rows)[:, 1]
    assert told[labels == 1].mean() > told[labels == 0].mean() + 0.1
    fresh.fit(rows, 1 - labels)
    untold = fresh.predict_proba(rows)[:, 1]
    assert untold[labels == 1].mean() < untold[labels == 0].mean() - 0.1
    assert not np.array_equal(before, fresh.predict_proba(rows[:4]))
    with pytest.raises(InputError, match="got 90 rows, 3 labels and 90 groups"):
        fresh.fit(rows, [0, 1, 0])
    with pytest.raises(InputError, match="row 2: label 2, expected 1"):
        fresh.fit(rows[:2], [0, 2])
    with pytest.raises(InputError, match="got no row to learn from"):
        fresh.fit([], [])


def test_tracks__are_those_without_which_the_probability_changes_most(detector, answers):
    judge, prompt = detector.judge, answers[7].prompt
    every = detector.score(prompt, tracks=1000, draws=1).tracks
    changes = [abs(track.change) for track in every]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0
    few = detector.score(prompt, **QUICK)
    assert [track.latents for track in few.tracks] == [track.latents for track in every[:2]]
    # The first one by hand: its observations out of the metrics, its share out of the last answer token's stream.
    answered, _ = detector._answered(detector._prepare({"prompt": prompt}, 1))
    reading = judge.read(answered)
    tables = judge.tabulate(reading.cuts, reading.features)
    followed = explanation._last_sample(judge.follow(reading.features))
    assert len(followed.birth) == len(every)
    latents = list(zip(every[0].layers, every[0].latents, strict=True))
    number = next(r for r in range(len(every)) if explanation._latents(followed, r) == latents)
    remaining = jaxsae.tracking.leave_one_out(followed)
    metrics = jaxsae.tracking.divergence_metrics(remaining)[number : number + 1]
    kept = explanation._repeat_last(reading.features, len(every))
    place = kept.positions.index("last_answer")
    for row in range(len(every)):
        for layer, latent in explanation._latents(followed, row):
            kept.activations[row, layer, place][kept.feature_ids[row, layer, place] == latent] = 0
    families = {name: each[number : number + 1] for name, each in judge.families(kept, remaining).items()}
    resid, n_answer = tables.resid[-1:].astype(np.float32), len(answered.answer_ids)
    for (layer, latent), activation in zip(latents, every[0].activations, strict=True):
        share = activation * judge.decoders[layer][latent]
        resid[0, layer, 1] -= share
        resid[0, layer, 2] -= share / n_answer
    changed = {"track_metrics": metrics, "resid": resid, "track_families": families}
    without = explain.repeat_row(tables, len(tables.ids) - 1, 1, **changed)
    change = judge.probabilities(without)[0] - judge.probabilities(tables)[-1]
    assert every[0].change == pytest.approx(change, abs=1e-6)


def test_deletion__compares_the_ablated_model_with_random_ablations_of_the_same_layers(detector, answers, monkeypatch):
    asked = []
    read = type(detector.judge).read_ablated

    def watch(judge, answer, latents):
        again, kept = read(judge, answer, latents)
        asked.append((latents, again, kept))
        return again, kept

    monkeypatch.setattr(type(detector.judge), "read_ablated", watch)
    score = detector.score(answers[7].prompt, tracks=1, draws=6)
    [(latents, again, kept)] = asked
    track = score.tracks[0]
    assert latents[0] == []
    assert latents[1] == list(zip(track.layers, track.latents, strict=True))
    draws = track.deletion.draws
    assert 0 < draws <= 6  # as many as differ
    assert len({frozenset(pairs) for pairs in latents[2:]}) == len(latents) - 2 == draws
    for pairs in latents[2:]:
        assert [layer for layer, _ in pairs] == list(track.layers)
        assert not set(pairs) & set(latents[1])
    probabilities = detector.judge.probabilities(detector.judge.tabulate(again, kept))
    totals = np.array([sum(answer.logprobs) for answer in again], dtype=np.float64)
    for effect, values in ((track.deletion.probability, probabilities), (track.deletion.logprob, totals)):
        assert effect == explain.compare(values[1] - values[0], values[2:] - values[0])
    assert probabilities[0] == pytest.approx(score.probability, abs=0.02)


def test_similar__is_the_nearest_right_answer_other_than_itself(detector, answers):
    right = next(answer for answer in answers if answer.label == 0)
    score = detector.score(right.prompt, **QUICK)
    assert score.answer == right.answer
    assert score.similar.id != right.id
    found = next(answer for answer in answers if answer.id == score.similar.id)
    assert (found.label, found.prompt, found.answer) == (0, score.similar.prompt, score.similar.answer)
    reference = detector.reference
    row = next(n for n, answer in enumerate(reference.answers) if answer.id == right.id)
    likeness = explain.similarity(
        reference.feature_ids[row], reference.activations[row], reference.feature_ids, reference.activations
    )
    others = [n for n, answer in enumerate(reference.answers) if answer.label == 0 and n != row]
    assert score.similar.similarity == pytest.approx(likeness[others].max(), abs=1e-5)
    for track in score.tracks:
        pairs = list(zip(track.layers, track.latents, strict=True))
        shared = [latent in score.similar.feature_ids[layer] for layer, latent in pairs]
        assert track.splits_at == (None if all(shared) else track.layers[shared.index(False)])


def test_earliest_layer__is_where_the_verdict_of_what_is_known_stops_changing(detector, answers):
    found = set()
    for answer in answers[:25]:
        score = detector.score(answer.prompt, tracks=0)
        found.add(score.earliest_layer)
    assert found <= {None, *range(6)}
    assert len(found) > 1


def test_earliest_layer__of_a_detector_that_reads_the_output_alone_is_the_last_whatever_it_says(
    finished, detector, answers
):
    fitted = detection.fit_detector(table_of(finished), dataclasses.replace(detector.protocol, deploy="logprob_mean"))
    judge, verdicts = dataclasses.replace(detector.judge, fitted=fitted), set()
    for answer in answers[:25]:
        reading = judge.read(answer)
        tables = judge.tabulate(reading.cuts, reading.features)
        verdicts.add(bool(judge.probabilities(tables)[-1] >= fitted.threshold))
        assert judge.earliest_layer(tables, reading.features) == judge.lm.n_layers - 1
    assert verdicts == {False, True}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", "the answer is empty: scored by the last token of the prompt; none of the answers learned from was empty"),
        (" \n", "the answer is empty"),
        ("a b c d e f g h i j", r"the answer has \d\d tokens, the longest learned from \d+: the probability is extrap"),
    ],
)
def test_score__warns_of_answers_unlike_those_learned_from(detector, answers, answer, words):
    score = detector.score(answers[0].prompt, answer, tracks=0)
    first, second = score.warnings
    assert re.match(words, first)
    assert second == LEARNED
    assert 0 <= score.probability <= 1
    assert len(score.token_scores) == len(score.tokens)
    assert detector.score(answers[0].prompt, answers[0].answer, tracks=0).warnings == (LEARNED,)
    asked = answers[0].question
    fresh = answers[0].prompt.replace(asked, f"And {asked}")
    assert not detector.score(fresh, answers[0].answer, tracks=0).warnings


def test_score__warns_of_another_form_of_prompt_and_of_an_unfinished_answer(finished, answers):
    detector = jaxsae.Detector.load(finished.workdir)
    detector.asking = dataclasses.replace(detector.asking, template="Q: {question}\nA:", max_new_tokens=1)
    longest = max(answers, key=lambda answer: len(answer.answer_ids))
    first, second, third = detector.score(longest.prompt, tracks=0).warnings
    assert first == "the model did not end its answer within 1 tokens; it is scored as it stands"
    assert second == r"the run's prompts are of the form 'Q: {question}\nA:', this one is not"
    assert third == LEARNED
    given = detector.score(f"Q: {longest.prompt}\nA:", longest.answer, tracks=0)
    assert not given.warnings


BAD_ROWS = {
    "no prompt": ({"prompt": " "}, r"row 1: expected a prompt, a text that is not empty, got ' '"),
    "a number": (
        {"prompt": "Who?", "answer": 3, "id": "x"},
        r"row x: expected an answer that is a text or none, got 3",
    ),
    "too long": (
        {"prompt": "Who?", "answer": "word " * 200},
        r"row 1: \d+ tokens of the prompt and \d+ of the answer are more than the \d+ that demo_gpt2 reads",
    ),
    "a prompt too long": (
        {"prompt": "word " * 200},
        r"row 1: \d+ tokens of the prompt and 8 to be generated are more than the \d+ that demo_gpt2 reads",
    ),
}


@pytest.mark.parametrize("case", list(BAD_ROWS))
def test_score__refuses_a_row_that_cannot_be_scored(detector, case):
    row, words = BAD_ROWS[case]
    with pytest.raises(InputError, match=words):
        detector.score_batch([row])


def test_score__refuses_an_answer_without_a_token(finished, monkeypatch):
    detector = jaxsae.Detector.load(finished.workdir)
    encode = detector.judge.lm.tokenizer.encode
    monkeypatch.setattr(
        detector.judge.lm.tokenizer, "encode", lambda text, **how: encode(text.split(" \u200b")[0], **how)
    )
    with pytest.raises(InputError, match="row 1: the tokenizer does not begin a token where the answer"):
        detector.score("Where does Grobre live?", "\u200b")


# The command


def score(finished, *flags):
    return cli.run(["jaxsae", "score", f"--workdir={finished.workdir}", "--verbosity=-1", *flags])


def test_command__prints_a_page_for_a_prompt(finished, detector, answers, capsys):
    assert score(finished, f"--prompt={answers[7].prompt}", "--tracks=2", "--draws=3") == 0
    page = capsys.readouterr().out
    said = detector.score(answers[7].prompt, **QUICK)
    assert f"prompt       {said.prompt}\nanswer       {said.answer}\n" in page
    assert f"probability  {said.probability:.3f} that it is hallucinated" in page
    assert page.count(" random deletions of like size") == 2
    for track in said.tracks:
        assert f"{' > '.join(map(str, track.latents))}: {track.change:+.4f} without it" in page
        assert f"beside {track.deletion.draws} random deletions" in page
        assert (
            f"{track.deletion.probability.change:+.3f}, random {track.deletion.probability.random_mean:+.3f} " in page
        )


def test_command__writes_a_line_a_row(finished, detector, rows, tmp_path, capsys):
    source, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (f"--file={source}", "--tracks=2", "--draws=3")
    assert score(finished, *flags) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == ["line 1", "given", "line 3", "line 4"]
    expected = [each.to_dict() for each in detector.score_batch(rows, **QUICK)]
    for line, wanted in zip(lines, expected, strict=True):
        assert line == json.loads(json.dumps(wanted | {"id": line["id"]}))
    assert score(finished, *flags, f"--out={out}") == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{name: row[name] for name in lines[0]} for row in written] == lines
    assert all(row["format_version"] == artifacts.FORMAT_VERSION for row in written)


BAD_FILES = {
    "json": ('{"prompt": "a"}\n{"prompt"\n', r"rows\.jsonl line 2 is not readable JSON"),
    "prompt": ('{"answer": "a"}\n', r"rows\.jsonl line 1: prompt None; expected prompt \(a text\)"),
    "field": ('{"prompt": "a", "question": "b"}\n', r"rows\.jsonl line 1: unknown question; expected prompt"),
    "answer": ('{"prompt": "a"}\n{"prompt": "a", "answer": 3}\n', r"rows\.jsonl line 2: answer is 3, expected a text"),
    "twice": ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', r"line 2: id 'x' comes twice"),
    "empty": ("\n", r"rows\.jsonl holds no row; expected one JSON object a line"),
    "long": (
        '{"prompt": "a"}\n' + json.dumps({"prompt": "word " * 200}) + "\n",
        r"row line 2: \d+ tokens of the prompt and 8 to be generated are more than",
    ),
}


def refuses(capsys, finished, words, *flags):
    capsys.readouterr()
    assert score(finished, *flags) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert re.search(words, said.err), said.err


@pytest.mark.parametrize("case", list(BAD_FILES))
def test_command__names_the_line_of_a_bad_row_before_it_scores_any(finished, tmp_path, capsys, case):
    content, words = BAD_FILES[case]
    (tmp_path / "rows.jsonl").write_text(content)
    refuses(capsys, finished, words, f"--file={tmp_path}/rows.jsonl", f"--out={tmp_path}/out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_command__refuses_to_replace_a_file(finished, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    refuses(capsys, finished, r"out\.jsonl exists already; name", f"--file={tmp_path}/x", f"--out={tmp_path}/out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_command__refuses_a_run_without_a_detector(finished, tmp_path, capsys):
    run = finished.copy(tmp_path / "run", without=("detect", "evaluate"))
    refuses(capsys, run, r"detector/detector\.json is missing; run jaxsae detect", "--prompt=Who?")
    refuses(
        capsys, type(finished)(tmp_path / "none", finished.questions), "is missing; run jaxsae detect", "--prompt=a"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("saes/evaluation.json", r"saes/evaluation\.json has changed since the detector was fitted; run jaxsae track"),
        ("features.npz", r"features\.npz has changed since"),
        ("answers.jsonl", r"answers\.jsonl has changed since"),
        ("detector/detector.json", r"detector/detector\.json has changed since"),
    ],
)
def test_command__refuses_files_that_the_detector_was_not_fitted_on(finished, tmp_path, capsys, name, words):
    run = finished.copy(tmp_path / "run")
    with open(run.workdir / name, "ab") as file:
        file.write(b"\n")
    refuses(capsys, run, words, "--prompt=Who?")
    (run.workdir / name).unlink()
    refuses(capsys, run, r"is missing( since the detector was fitted)?; run jaxsae", "--prompt=Who?")


def test_command__refuses_another_model(finished, tmp_path, capsys):
    other = shutil.copytree(ASSET, tmp_path / "other", ignore=shutil.ignore_patterns("corpus*", "questions*"))
    assert score(finished, "--prompt=Where does Grobre live?", f"--model={other}", "--tracks=0") == 0
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors[sorted(tensors)[0]].flat[0] += 0.5
    safetensors.numpy.save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    words = (
        rf"the model at {other} \(fingerprint \w{{12}}\) is not the demo_gpt2 \(\w{{12}}\) that .* was made with; say"
    )
    refuses(capsys, finished, words, "--prompt=Who?", f"--model={other}")
    refuses(capsys, finished, "nowhere", "--prompt=Who?", f"--model={tmp_path}/nowhere")


def test_detector__writes_nothing_into_the_run(finished, detector, answers):
    before = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    detector.score(answers[0].prompt, **QUICK)
    assert {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")} == before
