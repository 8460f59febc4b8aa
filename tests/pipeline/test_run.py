"""All stages, once, on the demo's language model: which files there are, what is in them, what runs again and when."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxsae import artifacts, sae
from jaxsae.activations import open as open_store
from jaxsae.artifacts import resolve_path
from jaxsae.detection.tracks import FAMILIES
from jaxsae.pipeline.families import read_families
from jaxsae.pipeline.stages import STAGES
from jaxsae.progress import read_metrics
from jaxsae.tracking import (
    DIVERGENCE_COLUMNS,
    LATE_BIRTH_COLUMNS,
    LinkGraph,
    Tracks,
    concepts,
    profile_columns,
)

N, N_LAYERS, D_MODEL, N_LATENTS, KEEP = 240, 6, 128, 64, 8


def stages_run(caplog):
    """Return the stages that ran, and those that were skipped, from the log; and forget it."""
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    ran = [name for name in STAGES if any(line.startswith(f"{name}: done in ") for line in lines)]
    return ran, [name for name in STAGES if f"{name}: up to date, skipped" in lines]


@pytest.fixture
def log(caplog):
    caplog.set_level("INFO", logger="absl")
    return caplog


def test_run__leaves_the_files_that_are_documented(finished):
    found = {path.name for path in finished.workdir.iterdir()}
    assert found == {
        *("activations", "saes", "logs", "manifests", "figures", "detector"),
        *("answers.jsonl", "answers_summary.json", "features.npz", "links.npz", "tracks.npz"),
        *("predictions.csv", "metrics.json"),
        "metrics.csv",
        *("report.md", "report.html"),
    }
    assert not list(finished.workdir.rglob("*.partial"))
    documented = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    for name in found - {"manifests"}:
        assert f"`{name}" in documented, name


def test_run__prints_the_results_and_where_the_report_is(finished):
    said = (finished.workdir.parent / "stdout.txt").read_text()
    for words in ("Sparse autoencoders", "tracks_best", "noise canary", f"report: {finished.workdir}/report.html"):
        assert words in said


def test_store__holds_every_token_of_the_corpus(finished):
    store = open_store(finished.workdir / "activations")
    assert (store.meta.n_layers, store.meta.n_tokens, store.meta.d_model) == (N_LAYERS, 16_384, D_MODEL)
    assert store.is_complete
    store.verify()
    assert (store.token_ids.reshape(-1, 64)[:, 0] == store.meta.bos_id).all()


def test_saes__are_whole_and_measured(finished):
    folder = finished.workdir / "saes"
    best, last = sae.load(folder), sae.load(folder, which="last")
    assert best.W_dec.shape == last.W_dec.shape == (N_LAYERS, N_LATENTS, D_MODEL)
    rows = artifacts.read_json(folder / "evaluation.json", rebuild="")["rows"]
    assert [row["layer"] for row in rows] == list(range(N_LAYERS))
    numbers = ("mse", "fvu", "pca_fvu", "l0_train", "l0_inference", "dead", "best_step", "delta_ce", "kl")
    for row in rows:
        assert set(row) >= {*numbers, "delta_ce_zero", "delta_ce_mean"}
        assert 0 < row["fvu"] < 1
        assert row["l0_inference"] <= 4
        assert 0 <= row["delta_ce"] < row["delta_ce_zero"]
        assert row["best_step"] in (20, 40, 60, 80)


def test_log__has_a_row_for_each_evaluation(finished):
    rows = read_metrics(finished.workdir / "logs" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [20, 40, 60, 80]
    names = ("eval/fvu", "eval/mse", "eval/l0", "train/loss", "train/l0", "train/dead")
    assert set(rows[0]) == {"step"} | {f"{name}/layer_{layer:02d}" for name in names for layer in range(N_LAYERS)}
    assert list((finished.workdir / "logs").glob("events.out.tfevents.*"))
    assert rows[-1]["eval/fvu/layer_00"] < rows[0]["eval/fvu/layer_00"]


def test_answers__carry_the_documented_fields(finished):
    answers = artifacts.read_answers(finished.workdir / "answers.jsonl")
    asked = [json.loads(line) for line in finished.questions.read_text().splitlines()]
    assert [answer.id for answer in answers] == [row["id"] for row in asked]
    row = json.loads((finished.workdir / "answers.jsonl").read_text().splitlines()[0])
    assert set(row) == {
        *("format_version", "code_version", "id", "question", "answers", "group", "category"),
        *("prompt", "prompt_ids", "answer", "answer_ids", "label", "logprobs", "entropies"),
    }
    labels = [answer.label for answer in answers]
    assert 30 <= sum(labels) <= 210
    for answer in answers:
        assert len(answer.logprobs) == len(answer.answer_ids)
        assert max(answer.logprobs, default=0.0) <= 0
        assert len(answer.entropies) == len(answer.answer_ids)
        assert min(answer.entropies, default=0.0) >= 0
        assert answer.prompt == answer.question
        is_right = any(right in answer.answer for right in answer.answers)
        assert answer.label == int(not is_right)  # names of the demo's world are no part of one another


def test_features__are_of_these_answers(finished):
    features = artifacts.read_features(finished.workdir / "features.npz")
    answers = artifacts.read_answers(finished.workdir / "answers.jsonl")
    assert features.ids == tuple(answer.id for answer in answers)
    assert features.positions == ("last_prompt", "last_answer", "answer_max")
    assert features.feature_ids.shape == features.activations.shape == (N, N_LAYERS, 3, KEEP)
    assert features.resid.shape == (N, N_LAYERS, 3, D_MODEL)
    assert features.logprobs.tolist() == np.float32([p for answer in answers for p in answer.logprobs]).tolist()


def test_tracks__are_of_these_answers(finished):
    arrays = artifacts.read_npz(finished.workdir / "tracks.npz", rebuild="")
    tracks = Tracks.from_arrays(arrays)
    assert (tracks.n_samples, tracks.n_layers) == (N, N_LAYERS)
    assert arrays["metrics"].shape == (N, 26)
    assert tuple(arrays["metric_names"].tolist()) == DIVERGENCE_COLUMNS
    assert arrays["ids"].tolist() == list(artifacts.read_features(finished.workdir / "features.npz").ids)
    assert arrays["position"].item() == "last_answer"


def test_track_families__are_of_these_answers_and_concepts_of_the_links(finished):
    arrays = artifacts.read_npz(finished.workdir / "tracks.npz", rebuild="")
    families = read_families(arrays, "tracks.npz")
    graph = LinkGraph.from_arrays(artifacts.read_npz(finished.workdir / "links.npz", rebuild=""))
    n_concepts = int(concepts(graph).max()) + 1
    shapes = {name: family.matrix.shape for name, family in families.items()}
    n_late = 2 * 2 * len(LATE_BIRTH_COLUMNS)  # two positions, two tokens
    assert shapes == {
        "prompt": (N, 26),
        "profiles": (N, len(profile_columns(N_LAYERS))),
        "concepts": (N, 7 * n_concepts),
        "late_births": (N, n_late),
    }
    kept = artifacts.read_features(finished.workdir / "features.npz")
    at = families["profiles"].columns.index("sae_error_00")
    np.testing.assert_array_equal(
        families["profiles"].matrix[:, at : at + N_LAYERS], kept.recon_error[:, :, kept.positions.index("last_answer")]
    )
    assert arrays["control_names"].tolist() == ["none", "shuffled", "random_decoders", "neurons"]
    assert arrays["control_metrics"].shape == (4, N, 26)


def test_predictions__have_the_documented_columns_and_each_answer_once_per_detector_and_repeat(finished):
    with open(finished.workdir / "predictions.csv", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == ["id", "group", "repeat", "fold", "label", "detector", "score", "probability"]
    answers = {answer.id: answer for answer in artifacts.read_answers(finished.workdir / "answers.jsonl")}
    keys = [(row["detector"], row["repeat"], row["id"]) for row in rows]
    assert len(set(keys)) == len(keys)
    detectors = {row["detector"] for row in rows}
    assert len(keys) == len(detectors) * N
    assert {row["fold"] for row in rows} == {"0", "1", "2"}
    for row in rows:
        assert int(row["label"]) == answers[row["id"]].label
        assert row["group"] == answers[row["id"]].group
        assert 0 <= float(row["probability"]) <= 1
    folds_of_group = {(row["repeat"], row["group"]): set() for row in rows}
    for row in rows:
        folds_of_group[row["repeat"], row["group"]].add(row["fold"])
    assert all(len(folds) == 1 for folds in folds_of_group.values())


def test_metrics__have_the_documented_keys(finished):
    metrics = artifacts.read_json(finished.workdir / "metrics.json", rebuild="")
    assert set(metrics) >= {"format_version", "detection", "canary", "sae", "seconds", "peak_bytes"}
    names = [row["name"] for row in metrics["detection"]]
    for family in ("class_prior", "length", "answer_tfidf", "logprob_mean", "logprob_min", "probe_last_prompt"):
        assert family in names
    assert {"sae_logistic", "tracks_forest", "tracks_best", "tracks_late_births", "tracks_neurons"} <= set(names)
    assert {row["family"] for row in metrics["ablations"]} == set(FAMILIES)
    for row in metrics["detection"]:
        keys = {"name", "n", "auroc", "ci_low", "ci_high", "pr_auc", "base_rate", "brier"}
        assert set(row) >= keys | {"accuracy", "precision", "recall", "f1"}
        assert row["n"] == N
        assert 0 <= row["ci_low"] <= row["ci_high"] <= 1
    assert set(metrics["canary"]) >= {"auroc", "ci_low", "ci_high"}
    evaluation = artifacts.read_json(finished.workdir / "saes" / "evaluation.json", rebuild="")["rows"]
    assert metrics["sae"] == [
        {key: row[key] for key in ("layer", "mse", "fvu", "l0_train", "l0_inference", "dead", "delta_ce")}
        for row in evaluation
    ]
    for name in ("seconds", "peak_bytes"):
        assert list(metrics[name]) == ["extract", "train", "answer", "track", "detect"]
        assert min(metrics[name].values()) > 0


def test_records__name_what_each_stage_read_and_wrote(finished):
    for name, stage in STAGES.items():
        record = artifacts.read_json(finished.workdir / "manifests" / f"{name}.json", rebuild="")
        graph = ["links.npz"] if name == "track" else []  # which other settings go without
        assert list(record["outputs"]) == [*stage.writes, *graph]
        for file, digest in record["outputs"].items():
            assert artifacts.sha256_file(finished.workdir / file) == digest
        assert set(record["inputs"]) == {*stage.sources, *stage.reads}
        assert record["output_bytes"] > 0


def test_report__is_of_this_run(finished):
    html = (finished.workdir / "report.html").read_text(encoding="utf-8")
    metrics = artifacts.read_json(finished.workdir / "metrics.json", rebuild="")
    method = next(row for row in metrics["detection"] if row["name"] == "tracks_best")
    assert f"{method['auroc']:.3f}" in html
    assert not re.search(r'(src|href)="(?!#|data:)', html)  # one file, readable offline
    assert {path.suffix for path in (finished.workdir / "figures").iterdir()} == {".png"}


def test_run__a_second_time_skips_everything(finished, log, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    first = (finished.workdir.parent / "stdout.txt").read_text()
    assert finished("run") == 0
    assert stages_run(log) == ([], list(STAGES))
    assert capsys.readouterr().out == first
    after = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    assert {path for path in before if before[path] != after.get(path)} == set()
    assert before.keys() == after.keys()


def test_dry_run__of_a_finished_run_finds_everything_up_to_date(finished, capsys):
    assert finished("run", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: up to date" for name in STAGES]


def test_dry_run__tells_what_a_changed_setting_brings(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    assert finished("run", "--dry-run", tracking__gate="after", train__lr=0.5) == 0
    assert capsys.readouterr().out.splitlines() == [
        "extract: up to date",
        "train: refuses to replace its outcome: train.lr was 0.001, is 0.5; --redo replaces it",
        "answer: up to date",
        "track: would run again: tracking.gate was 'before', is 'after'",
        "detect: would run again if track leaves something else",
        "evaluate: would run again if track or detect leaves something else",
    ]
    assert finished("train", "--dry-run", "--redo", train__lr=0.5) == 0
    assert capsys.readouterr().out.splitlines() == ["train: would run"]
    assert before == {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}


def test_dry_run__of_a_new_workdir_would_run_all_and_makes_nothing(finished, tmp_path, capsys):
    run = type(finished)(tmp_path / "new", finished.questions)
    assert run("run", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: would run" for name in STAGES]
    assert run("train", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: cannot run: activations/meta.json is missing: run jaxsae extract"
    ]
    assert run("run", "--dry-run", questions__path=tmp_path / "none.jsonl") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"answer: cannot run: questions.path {tmp_path}/none.jsonl does not exist"
    assert lines[4] == "detect: cannot run: answers.jsonl is missing: run jaxsae answer"
    assert not any(tmp_path.iterdir())


def test_changed_detection__runs_detect_and_evaluate_alone(finished, tmp_path, log):
    run = finished.copy(tmp_path / "run")
    title = "Another & <script>title</script>"
    assert run("run", detection__bootstrap=120, report__title=title) == 0
    assert stages_run(log) == (["detect", "evaluate"], ["extract", "train", "answer", "track"])
    old, new = (artifacts.read_json(one.workdir / "metrics.json", rebuild="") for one in (finished, run))
    assert (old["config"]["bootstrap"], new["config"]["bootstrap"]) == (100, 120)
    assert [row["auroc"] for row in old["detection"]] == [row["auroc"] for row in new["detection"]]
    assert "Another &amp; &lt;script&gt;title" in (run.workdir / "report.html").read_text(encoding="utf-8")
    assert run("detect", detection__bootstrap=120) == 0
    assert stages_run(log) == ([], ["detect"])


def test_changed_tracking__keeps_the_features(finished, tmp_path, log, capsys):
    run = finished.copy(tmp_path / "run")
    made = (run.workdir / "features.npz").stat().st_mtime_ns
    assert run("track", tracking__top_k=3) == 0
    assert "features.npz is up to date" in log.text
    assert stages_run(log) == (["track"], [])
    assert (run.workdir / "features.npz").stat().st_mtime_ns == made
    old, new = (artifacts.read_npz(one.workdir / "tracks.npz", rebuild="") for one in (finished, run))
    assert len(new["birth"]) < len(old["birth"])
    capsys.readouterr()
    assert run("run", "--dry-run", tracking__top_k=3) == 0
    again = "would run again: tracks.npz has changed"
    assert capsys.readouterr().out.splitlines()[3:] == ["track: up to date", f"detect: {again}", f"evaluate: {again}"]


def test_changed_features__are_computed_again(finished, tmp_path, log):
    run = finished.copy(tmp_path / "run", without=("detect", "evaluate"))
    assert run("track", features__keep=9) == 0
    assert stages_run(log) == (["track"], [])
    assert artifacts.read_features(run.workdir / "features.npz").feature_ids.shape[-1] == 9
    old, new = (artifacts.read_npz(one.workdir / "tracks.npz", rebuild="") for one in (finished, run))
    np.testing.assert_array_equal(old["metrics"], new["metrics"])  # top_k is still 8


def test_changed_report__runs_evaluate_alone(finished, capsys):
    assert finished("run", "--dry-run", report__title="Another") == 0
    *others, last = capsys.readouterr().out.splitlines()
    assert others == [f"{name}: up to date" for name in STAGES if name != "evaluate"]
    assert last == "evaluate: would run again: report.title was None, is 'Another'"


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        (
            "extract",
            {"corpus__n_tokens": 8192},
            r"another extract: corpus\.n_tokens was 16384, is 8192; use a new --wor",
        ),
        (
            "train",
            {"train__lr": 0.5},
            r"another train: train\.lr was 0\.001, is 0\.5; use a new --workdir, or jaxsae t",
        ),
        ("run", {"train__lr": 0.5}, r"another train: train\.lr was 0\.001, is 0\.5; .* jaxsae train --redo"),
        ("train", {"seed": 4, "sae__k": 5}, r"another train: sae\.k was 4, is 5 \(and 1 more\)"),
        ("answer", {"questions__max_new_tokens": 3}, r"another answer: questions\.max_new_tokens was 8, is 3"),
        ("answer", {"model__dtype": "bfloat16"}, r"another answer: model\.dtype was 'float32', is 'bfloat16'"),
    ],
)
def test_changed_setting_of_an_expensive_stage__is_refused_by_name(finished, refuses, command, changes, words):
    refuses(finished, command, words, **changes)


def test_changed_questions_of_the_same_name__are_refused(finished, refuses, tmp_path):
    run = finished.copy(tmp_path / "run")
    path = shutil.copy(finished.questions, tmp_path / "questions.jsonl")
    record = run.workdir / "manifests" / "answer.json"
    record.write_text(record.read_text().replace(str(finished.questions), str(path)))
    path.write_text(path.read_text().replace("?", "!", 1))
    refuses(
        run, "answer", r"was made by another answer: questions has changed; use a new --workdir", questions__path=path
    )


def test_another_model__is_refused_by_name(finished, refuses, tmp_path):
    other = shutil.copytree(resolve_path("package://jaxsae/assets/demo_gpt2"), tmp_path / "other")
    refuses(finished, "run", rf"another extract: model\.path was .*demo_gpt2', is '{other}'", model__path=other)


def test_model_of_other_weights__does_not_fit_the_saes(finished, refuses, tmp_path):
    """The track stage looks at the weights and not at names: a suite of other weights is refused."""
    run = finished.copy(tmp_path / "run", without=("answer", "track", "detect", "evaluate"))
    about = artifacts.read_json(run.workdir / "saes" / "suite.json", rebuild="")
    about.pop("format_version")
    artifacts.write_json(run.workdir / "saes" / "suite.json", about | {"model_fingerprint": "0123456789abcdef"})
    shutil.copy(finished.workdir / "answers.jsonl", run.workdir)
    words = r"saes/ are of .*demo_gpt2 \(fingerprint 0123456789ab\), the config's model is .*demo_gpt2 \([0-9a-f]{12}\)"
    refuses(run, "track", words)


def test_redo__replaces_what_other_settings_made(finished, tmp_path, log):
    run = finished.copy(tmp_path / "run", without=("train", "track", "detect", "evaluate"))
    assert run("answer", "--redo", questions__max_new_tokens=1) == 0
    assert stages_run(log) == (["answer"], [])
    answers = artifacts.read_answers(run.workdir / "answers.jsonl")
    assert max(len(answer.answer_ids) for answer in answers) == 1
    record = artifacts.read_json(run.workdir / "manifests" / "answer.json", rebuild="")
    assert record["settings"]["questions.max_new_tokens"] == 1


def test_lost_output__is_made_again(finished, tmp_path, log):
    run = finished.copy(tmp_path / "run", without=("detect", "evaluate"))
    path = run.workdir / "features.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000] + bytes(1000))
    assert run("track") == 0
    assert "(again: features.npz is missing or damaged)" in log.text
    assert stages_run(log) == (["track"], [])
    for name in ("features.npz", "tracks.npz"):
        old, new = (artifacts.read_npz(one.workdir / name, rebuild="") for one in (finished, run))
        assert old.keys() == new.keys()
        for array in old:
            np.testing.assert_array_equal(old[array], new[array], err_msg=array)
