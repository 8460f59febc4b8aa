"""`jaxsae transfer`: two runs of the same SAEs on different questions, and what it refuses."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

from jaxsae import artifacts, cli
from jaxsae.artifacts import resolve_path
from jaxsae.detection.transfer import TRANSFERRED

ASSET = "package://jaxsae/assets/demo_gpt2"


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    """The same SAEs on 150 questions about other facts, as far as `jaxsae track`."""
    folder = tmp_path_factory.mktemp("other")
    known = {json.loads(line)["group"] for line in finished.questions.read_text().splitlines()}
    lines = resolve_path(f"{ASSET}/questions.jsonl").read_text(encoding="utf-8").splitlines()
    first_of_fact = {json.loads(line)["group"]: line for line in reversed(lines)}
    fresh = [line for group, line in first_of_fact.items() if group not in known]
    (folder / "questions.jsonl").write_text("".join(f"{line}\n" for line in fresh[:: len(fresh) // 150][:150]))
    run = finished.copy(folder / "elsewhere", without=("answer", "track", "detect", "evaluate"))
    for command in ("answer", "track"):
        assert run(command, questions__path=folder / "questions.jsonl") == 0
    return run


def transfer(*words):
    return cli.run(["jaxsae", "transfer", *map(str, words)])


def test_transfer__writes_a_row_for_every_pair_and_detector_and_prints_the_matrix(finished, other, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    assert transfer(finished.workdir, other.workdir, f"--out={tmp_path}", "--bootstrap=100", "--verbosity=-1") == 0
    said = capsys.readouterr().out
    rows = artifacts.read_json(tmp_path / "transfer.json", rebuild="")["rows"]
    pairs = {(row["train"], row["test"], row["detector"]) for row in rows}
    assert len(rows) == len(pairs) == 4 * len(TRANSFERRED)
    for row in rows:
        assert row["n"] + row["n_left_out"] == (240 if row["test"] == "run" else 150)
        assert row["definition"]
        assert row["ci_low"] <= row["auroc"] <= row["ci_high"]
    with open(tmp_path / "transfer.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["auroc"]) for row in table], [row["auroc"] for row in rows])
    (line,) = (line for line in said.splitlines() if line.startswith("stack_tracks") and " run " in line)
    shown = [f"{row['auroc']:.3f}" for row in rows if (row["train"], row["detector"]) == ("run", "stack_tracks")]
    assert line.split()[2:] == shown
    assert {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")} == before


@pytest.mark.parametrize(
    ("n_runs", "out", "words"),
    [
        (1, "--out=OUT", r"takes two or more runs with folders of different names, got \['run'\]"),
        (2, "--out=OUT", r"of different names, got \['run', 'run'\]"),
        (2, "", r"--out is missing; name a folder for transfer.csv and transfer.json"),
    ],
)
def test_transfer__refuses_what_is_no_pair_of_runs(finished, tmp_path, capsys, n_runs, out, words):
    flags = [out.replace("OUT", str(tmp_path / "out"))] if out else []
    assert transfer(*[finished.workdir] * n_runs, *flags) == 2
    assert_one_line(capsys, words)
    assert not (tmp_path / "out").exists()


def test_transfer__refuses_other_saes_and_tracks_without_controls(finished, other, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(other.workdir, copy)
    evaluation = json.loads((copy / "saes" / "evaluation.json").read_text())
    artifacts.write_json(copy / "saes" / "evaluation.json", evaluation | {"held_out_tokens": 1})
    assert transfer(finished.workdir, copy, f"--out={tmp_path / 'out'}") == 2
    assert_one_line(capsys, r"copy/saes and .*run/saes are different SAEs")
    shutil.copy(finished.workdir / "saes" / "evaluation.json", copy / "saes" / "evaluation.json")
    arrays = artifacts.read_npz(copy / "tracks.npz", rebuild="")
    del arrays["control_metrics"]
    artifacts.write_npz(copy / "tracks.npz", arrays)
    assert transfer(finished.workdir, copy, f"--out={tmp_path / 'out'}") == 2
    assert_one_line(capsys, r"tracks\.npz has no controls, as an older version wrote it; run jaxsae track --redo")


def test_transfer__refuses_runs_tracked_by_other_settings(finished, other, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(other.workdir, copy)
    path = copy / "manifests" / "track.json"
    record = json.loads(path.read_text())
    artifacts.write_json(path, record | {"settings": record["settings"] | {"tracking.top_k": 3}})
    assert transfer(finished.workdir, copy, f"--out={tmp_path / 'out'}") == 2
    assert_one_line(capsys, r"copy was tracked with tracking\.top_k=3, .*run with 8; run jaxsae track and detect")
    path.unlink()
    assert transfer(finished.workdir, copy, f"--out={tmp_path / 'out'}") == 2
    assert_one_line(capsys, r"track\.json is missing; run jaxsae track")
    assert not (tmp_path / "out").exists()


def assert_one_line(capsys, words):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxsae: ")
    assert re.search(words, line), line
