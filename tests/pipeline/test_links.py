"""The link graph of a run and tracks by it, and tracks at every token of an answer: made once, scored as they are."""

import dataclasses

import numpy as np
import pytest

import jaxsae
from jaxsae import artifacts, sae, tracking

LINKED = {"tracking__association": "links", "tracking__links": "coactivation", "tracking__links_tokens": 2048}
TOKENS = {"tracking__position": "answer_tokens", "features__positions": "('last_prompt','last_answer','answer_tokens')"}
DETECTION = {"detection__bootstrap": 100, "detection__curves": False}


def read_links(run):
    return tracking.LinkGraph.from_arrays(artifacts.read_npz(run.workdir / "links.npz", rebuild=""))


def test_links__are_those_of_the_decoders(finished):
    links = read_links(finished)
    expected = tracking.link_by_weights(sae.Decoders(finished.workdir / "saes"), 16)
    assert links.n_tokens == 0
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(links.arrays()[name], array)


def test_links__are_made_again_only_when_what_they_are_of_changed(finished, tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    run = finished.copy(tmp_path / "run", without=("detect", "evaluate"))
    assert run("track", tracking__top_k=3) == 0
    assert "links.npz is up to date" in caplog.text
    caplog.clear()
    assert run("track", **LINKED) == 0
    assert "links.npz is up to date" not in caplog.text
    assert "features.npz is up to date" in caplog.text
    links = read_links(run)
    assert links.n_tokens == 2048 - 2048 // 64 - _n_inner_bos(run)
    assert np.isfinite(links.null_strengths).all()
    caplog.clear()
    assert run("track", **LINKED) == 0
    assert "track: up to date, skipped" in caplog.text
    assert run("track", tracking__links="none") == 0
    assert not (run.workdir / "links.npz").exists()


def _n_inner_bos(run):
    """Count the BOS tokens among the first 2,048 that do not begin a context."""
    token_ids = np.load(run.workdir / "activations" / "tokens.npz")["token_ids"][:2048].reshape(-1, 64)
    return int((token_ids[:, 1:] == token_ids[0, 0]).sum())


@pytest.fixture(scope="module")
def linked(finished, tmp_path_factory):
    run = finished.copy(tmp_path_factory.mktemp("linked") / "run", without=("track", "detect", "evaluate"))
    assert run("track", **LINKED, tracking__null="matched_activation", tracking__max_missed_layers=1) == 0
    assert run("detect", **DETECTION) == 0
    return run


def test_score__looks_the_links_of_the_run_up(linked):
    detector = jaxsae.Detector.load(linked.workdir)
    kept, answers = _rows(linked)
    arrays = artifacts.read_npz(linked.workdir / "tracks.npz", rebuild="")
    tables = detector.judge.tabulate(answers, kept)
    np.testing.assert_array_equal(tables.track_metrics, arrays["metrics"])
    assert "random_decoders" in arrays["control_names"].tolist()
    together = detector.score_batch([{"prompt": answer.prompt} for answer in answers[:2]], tracks=1, draws=2)
    alone = detector.score(answers[1].prompt, tracks=1, draws=2)
    assert dataclasses.replace(alone, id=together[1].id).to_dict() == together[1].to_dict()


def test_score__refuses_other_links(linked, tmp_path):
    run = linked.copy(tmp_path / "run")
    artifacts.write_npz(run.workdir / "links.npz", dataclasses.replace(read_links(run), n_tokens=1).arrays())
    with pytest.raises(artifacts.InputError, match=r"links.npz has changed since the detector was fitted"):
        jaxsae.Detector.load(run.workdir)


@pytest.fixture(scope="module")
def by_token(finished, tmp_path_factory):
    run = finished.copy(tmp_path_factory.mktemp("tokens") / "run", without=("track", "detect", "evaluate"))
    assert run("track", **TOKENS) == 0
    assert run("detect", **DETECTION) == 0
    assert run("evaluate") == 0
    return run


def test_tracks__at_answer_tokens_are_those_of_each_token_alone(by_token):
    kept, answers = _rows(by_token)
    arrays = artifacts.read_npz(by_token.workdir / "tracks.npz", rebuild="")
    counts = [max(len(answer.answer_ids), 1) for answer in answers]
    assert np.diff(arrays["token_offsets"]).tolist() == counts
    tracks = tracking.Tracks.from_arrays(arrays)
    assert tracks.n_samples == sum(counts)
    assert arrays["metric_names"].tolist() == list(tracking.POOLED_COLUMNS)
    decoders = list(sae.Decoders(by_token.workdir / "saes"))
    for row in (0, 7, len(answers) - 1):
        each = []
        for token in range(counts[row]):
            ids, acts = kept.at(f"answer_{token:02d}")
            one = tracking.track(ids[row : row + 1], acts[row : row + 1], decoders, tracking.TrackerConfig())
            each.append(tracking.divergence_metrics(one)[0])
        expected = np.concatenate([np.mean(each, axis=0), np.max(each, axis=0)])
        np.testing.assert_allclose(arrays["metrics"][row], expected, rtol=1e-12)


def test_score__by_token_is_that_of_the_run_and_says_that_no_track_is_explained(by_token):
    detector = jaxsae.Detector.load(by_token.workdir)
    kept, answers = _rows(by_token)
    arrays = artifacts.read_npz(by_token.workdir / "tracks.npz", rebuild="")
    np.testing.assert_allclose(detector.judge.tabulate(answers, kept).track_metrics, arrays["metrics"], rtol=1e-12)
    score = detector.score(answers[0].prompt)
    assert score.tracks == ()
    assert any("tracking.position=answer_tokens" in warning for warning in score.warnings)
    assert not any("answer_tokens" in warning for warning in detector.score(answers[0].prompt, tracks=0).warnings)


def test_track__at_answer_tokens_that_were_not_kept_is_refused(finished, refuses):
    refuses(
        finished,
        "track",
        "tracking.position is answer_tokens, which features.positions",
        tracking__position="answer_tokens",
    )


def test_links__that_a_setting_needs_are_asked_for(finished, refuses):
    refuses(finished, "track", "set tracking.links=weights", tracking__association="links", tracking__links="none")
    refuses(finished, "track", "set tracking.links=coactivation", tracking__null="matched_activation")


def _rows(run):
    kept = artifacts.read_features(run.workdir / "features.npz")
    return kept, artifacts.read_answers(run.workdir / "answers.jsonl")
