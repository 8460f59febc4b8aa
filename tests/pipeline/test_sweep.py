"""`jaxsae sweep` on a small run: equal to detect, the same with any processes, resumable, and what it refuses."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxsae import artifacts, cli
from jaxsae.pipeline.sweep import tidy

ROOT = Path(__file__).parents[2]
DETECTORS = ("tracks_forest", "tracks_logistic", "tracks_shuffled", "stack_tracks")
PATIENCE = 240  # seconds until a moment must have come

# The first test waits for a whole run, another starts three processes that start two each.
pytestmark = pytest.mark.timeout(900)


HEAD = """\
from jaxsae.config import SweepAxis, SweepRange, SweepSetting, read


def get_config():
    config = read("{root}/configs/demo.py")
    sweep = config.sweep
    {body}
    return config
"""


def write_config(path, body):
    """Write a sweep's config file that builds on the demo's."""
    path.write_text(HEAD.format(root=ROOT, body=body))
    return path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Four settings, two of them of the same tracks, and two cheap detectors."""
    return write_config(
        tmp_path_factory.mktemp("configs") / "grid.py",
        "sweep.axes = (SweepAxis('tracking.top_k', (2, 8)), SweepAxis('detection.trees', (3, 6)))",
    )


def argv(run, config, *flags, **changes):
    """Return a sweep's command line on a run, whose settings it shares."""
    wanted = dict(run.settings) | {"questions.path": run.questions, "sweep.detectors": "('tracks_forest','length')"}
    wanted |= {name.replace("__", "."): setting for name, setting in changes.items()}
    overrides = [f"--config.{name}={setting}" for name, setting in wanted.items()]
    return ["jaxsae", "sweep", f"--config={config}", f"--workdir={run.workdir}", *overrides, *flags]


def sweep(run, config, *flags, **changes):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers, hook = {number: signal.getsignal(number) for number in numbers}, sys.unraisablehook
    try:
        return cli.run(argv(run, config, *flags, **changes))
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


def outcome(run, name="grid"):
    """Return what results.json says, without the time it took and the command."""
    content = artifacts.read_json(run.workdir / "sweep" / name / "results.json", rebuild="")
    return {key: value for key, value in content.items() if key not in ("seconds", "command", "workdir")}


@pytest.fixture(scope="module")
def swept(finished, grid, tmp_path_factory):
    run = finished.copy(tmp_path_factory.mktemp("swept") / "run")
    assert sweep(run, grid, sweep__workers=1) == 0
    return run


def test_sweep__of_one_setting_gives_the_numbers_of_track_and_detect_with_it(finished, tmp_path):
    changed = {"tracking__association": "greedy", "tracking__top_k": 5, "detection__trees": 7}
    plain = finished.copy(tmp_path / "plain", without=("track", "detect", "evaluate"))
    for name in ("features.npz", "manifests/features.json"):
        shutil.copy(finished.workdir / name, plain.workdir / name)
    assert plain("track", **changed) == 0
    assert plain("detect", **changed) == 0
    config = write_config(
        tmp_path / "one.py",
        "sweep.settings = (SweepSetting('mine', {'tracking.association': 'greedy', 'tracking.top_k': 5, "
        "'detection.trees': 7}),)",
    )
    run = finished.copy(tmp_path / "run")
    assert sweep(run, config, sweep__detectors=DETECTORS) == 0
    metrics = {row["name"]: row for row in json.loads((plain.workdir / "metrics.json").read_text())["detection"]}
    found = outcome(run, "one")
    assert [row["detector"] for row in found["settings"]] == list(DETECTORS)
    keys = {"auroc": "auroc", "auroc_ci_low": "ci_low", "auroc_ci_high": "ci_high", "accuracy": "accuracy", "f1": "f1"}
    for row in found["settings"]:
        theirs = metrics[row["detector"]]
        assert {key: row[key] for key in keys} == pytest.approx(
            {key: theirs[of] for key, of in keys.items()}, abs=1e-14
        )
    for choice, row in zip(found["choices"][:-1], found["settings"], strict=True):
        assert choice["nested"]["auroc"]["value"] == choice["naive"]["value"] == row["auroc"]
        assert choice["optimism"]["value"] == choice["optimism"]["ci_low"] == choice["optimism"]["ci_high"] == 0


def test_sweep__writes_a_page_tables_and_a_row_for_every_number(swept, capsys):
    folder = swept.workdir / "sweep" / "grid"
    found = outcome(swept)
    assert found["counts"]["settings"] == 4
    assert [trial["name"] for trial in found["trials"]] == [f"top_k={k}, trees={n}" for k in (2, 8) for n in (3, 6)]
    assert {(row["setting"], row["detector"]) for row in found["settings"]} == {
        (trial["name"], detector) for trial in found["trials"] for detector in ("tracks_forest", "length")
    }
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(tidy(artifacts.read_json(folder / "results.json", rebuild=""))) == 8 * 3 + 3 * 3 + 3 * 2
    (nested,) = (row for row in rows if (row["table"], row["detector"], row["measure"]) == ("nested", "any", "auroc"))
    assert float(nested["value"]) == found["choices"][-1]["nested"]["auroc"]["value"]
    assert "Picking the best by the rows themselves" in (folder / "report.md").read_text(encoding="utf-8")
    assert {path.name for path in (folder / "figures").iterdir()} == {
        *("choices.png", "settings_tracks_forest.png", "settings_length.png")
    }
    assert len(list((folder / "points").iterdir())) == 4
    assert not (swept.workdir / ".lock").exists()


def test_sweep__follows_tracks_anew_where_a_setting_changes_them(swept):
    """One process keeps the last tracks: two settings of other tracks would else have the same forest on the same."""
    rows = outcome(swept)["settings"]
    aurocs = {row["setting"]: row["auroc"] for row in rows if row["detector"] == "tracks_forest"}
    assert len(set(aurocs.values())) == 4
    assert len({row["auroc"] for row in rows if row["detector"] == "length"}) == 1


def test_sweep__leaves_the_run_as_it_was(finished, swept):
    before, after = contents(finished.workdir), contents(swept.workdir)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("sweep/grid/") for name in after.keys() - before.keys())


def test_sweep__in_two_processes_gives_the_same_numbers(finished, swept, grid, tmp_path):
    run = finished.copy(tmp_path / "run")
    assert sweep(run, grid, sweep__workers=2) == 0
    assert outcome(run) == outcome(swept)
    of_one, of_two = (each.workdir / "sweep" / "grid" / "points" for each in (swept, run))
    for path in of_one.iterdir():
        one, two = (artifacts.read_npz(folder / path.name, rebuild="") for folder in (of_one, of_two))
        for name, array in one.items():
            np.testing.assert_array_equal(two[name], array)


def test_sweep__that_was_cut_short_goes_on_and_makes_damaged_points_again(swept, grid, tmp_path, caplog, capsys):
    run = swept.copy(tmp_path / "run")
    folder = run.workdir / "sweep" / "grid"
    missing, damaged, *whole = sorted((folder / "points").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in whole}
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    (folder / "points" / "0123456789abcdef.npz").write_bytes(b"of settings that are no more")
    (folder / "results.json").unlink()
    capsys.readouterr()
    assert sweep(run, grid, "--dry-run") == 0
    assert "would try 4 settings (2 of them done)" in capsys.readouterr().out
    assert sweep(run, grid) == 0
    assert re.search(rf"{damaged.name} is damaged at .*; it is made again", caplog.text)
    assert {path: path.stat().st_mtime_ns for path in whole} == kept
    assert sorted((folder / "points").iterdir()) == sorted([missing, damaged, *whole])
    assert outcome(run) == outcome(swept)


def test_sweep__that_is_done_is_skipped_until_told_to_redo(swept, grid, tmp_path, capsys):
    run = swept.copy(tmp_path / "run")
    before = contents(run.workdir)
    assert sweep(run, grid) == 0
    assert contents(run.workdir) == before
    assert "Chosen inside validation, 4 settings of 2 detectors reach AUROC" in capsys.readouterr().out
    assert sweep(run, grid, "--dry-run") == 0
    assert "sweep grid: up to date" in capsys.readouterr().out
    assert sweep(run, grid, "--dry-run", "--redo") == 0
    assert "would try 4 settings (0 of them done)" in capsys.readouterr().out
    assert contents(run.workdir) == before
    assert sweep(run, grid, "--redo", sweep__metric="f1") == 0
    assert outcome(run)["metric"] == "f1"


def test_sweep__after_the_answers_changed_asks_for_track(swept, grid, tmp_path, capsys):
    run = swept.copy(tmp_path / "run")
    path = run.workdir / "answers.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"label": 1', '"label": 0', 1), encoding="utf-8")
    capsys.readouterr()
    assert sweep(run, grid) == 2
    assert "answers.jsonl is not the one that the features are of; run jaxsae track" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "changes", "words"),
    [
        (
            "sweep.settings = (SweepSetting('wide', {'tracking.top_k': 9}),)",
            {},
            r"setting wide tracks 9 latents a layer \(tracking.top_k\), the run kept 8; run jaxsae track with --config",
        ),
        ("sweep.axes = ()", {}, "the config sweeps nothing; name settings in sweep.settings or axes in sweep.axes"),
        (
            "sweep.settings = (SweepSetting('a'),)",
            {"sweep__detectors": "('tracks_tree',)"},
            "sweep.detectors names 'tracks_tree', expected any of class_prior, length",
        ),
        (
            "sweep.settings = ('a',)",
            {},
            r"sweep.settings holds 'a', expected SweepSetting \(jaxsae.config\), in a config",
        ),
        (
            "sweep.settings = (SweepSetting('a'),); sweep.name = '../a'",
            {},
            "sweep.name is '../a', expected the name of a",
        ),
        (
            "sweep.settings = (SweepSetting('a'),); sweep.detectors = ()",
            {"sweep__detectors": "()"},
            "detectors is empty",
        ),
        (
            "sweep.axes = (SweepAxis('tracking.gate', ('before', 'after')),); sweep.trials = 3",
            {},
            "needs Optuna: launch/install sweep",
        ),
        (
            "sweep.axes = (SweepRange('tracking.top_k', 2, 20),); sweep.trials = 3",
            {},
            "setting top_k=20 tracks 20 latents a layer .*, the run kept 8",
        ),
        (
            "sweep.settings = (SweepSetting('a', {'tracking.links_per_latent': 3}),)",
            {},
            "tracking.links_per_latent is of links.npz, which a sweep reads as it is; set it and run jaxsae track",
        ),
        (
            "sweep.settings = (SweepSetting('a', {'detection.families': ('metrics',)}),)",
            {"sweep__detectors": "('length','tracks_profiles')"},
            "sweep.detectors names tracks_profiles, whose family profiles of features is left out",
        ),
    ],
)
def test_sweep__that_cannot_be_refuses_in_one_line_and_writes_nothing(
    finished, tmp_path, capsys, monkeypatch, body, changes, words
):
    if words.startswith("needs Optuna: "):
        monkeypatch.setitem(sys.modules, "optuna", None)
    config = write_config(tmp_path / "mine.py", body)
    before = contents(finished.workdir)
    for flags in ((), ("--dry-run",)):
        capsys.readouterr()
        assert sweep(finished, config, *flags, **changes) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("jaxsae: ")
        assert re.search(words, line), line
    assert contents(finished.workdir) == before


@pytest.mark.parametrize(
    ("name", "maker"), [("features.npz", "track"), ("answers.jsonl", "answer"), ("manifests/features.json", "track")]
)
def test_sweep__without_a_file_of_the_run_names_the_stage(swept, grid, tmp_path, capsys, name, maker):
    run = swept.copy(tmp_path / "run")
    (run.workdir / name).unlink()
    capsys.readouterr()
    assert sweep(run, grid) == 2
    assert f"{name} is missing: run jaxsae {maker}" in capsys.readouterr().err


def start(run, config, stderr, environment, **changes):
    line = [sys.executable, "-m", "jaxsae.cli", *argv(run, config, **changes)[1:]]
    with open(stderr, "w") as file:
        return subprocess.Popen(
            line,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
        )


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def members(session):
    """Return the living processes of a session."""
    listed = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if not line.split()[1].startswith("Z")]


def test_sweep__that_is_killed_or_interrupted_leaves_no_process_and_goes_on(
    finished, swept, grid, environment, tmp_path
):
    run = finished.copy(tmp_path / "run")
    points = run.workdir / "sweep" / "grid" / "points"
    for number, code, group in ((signal.SIGKILL, -9, False), (signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)):
        n_points = len(list(points.iterdir())) if points.exists() else 0
        with start(run, grid, tmp_path / "stderr.txt", environment, sweep__workers=2) as process:
            try:
                wait_for(lambda: (run.workdir / ".lock").exists(), process)
                wait_for(lambda n=n_points: points.exists() and len(list(points.glob("*.npz"))) > n, process)
                os.killpg(process.pid, number) if group else process.send_signal(number)
                assert process.wait(PATIENCE) == code
            finally:
                process.kill()
        deadline = time.monotonic() + 30
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert members(process.pid) == []
        said = (tmp_path / "stderr.txt").read_text()
        assert "Traceback" not in said, said
        if number != signal.SIGKILL:
            assert said.splitlines()[-1] == "jaxsae: interrupted; the same command goes on from here"
        for path in sorted(points.glob("*.npz"))[1:]:  # something is left to be stopped at
            path.unlink()
    assert sweep(run, grid) == 0
    assert outcome(run) == outcome(swept)


def test_search__tries_the_same_again_and_goes_on(finished, tmp_path, capsys):
    pytest.importorskip("optuna")
    config = write_config(
        tmp_path / "search.py",
        "sweep.settings = (SweepSetting('as it is'),); sweep.axes = (SweepRange('tracking.top_k', 1, 8), "
        "SweepAxis('tracking.gate', ('before', 'after'))); sweep.trials = 12",
    )
    changes = {"sweep__detectors": "('tracks_logistic','length')"}
    run = finished.copy(tmp_path / "run")
    assert sweep(run, config, "--dry-run", **changes) == 0
    said = capsys.readouterr().out
    assert (
        "and a search of 12 settings for each of 3 outer folds, 36 different ones at most, over tracking.top_k" in said
    )
    assert sweep(run, config, sweep__workers=1, **changes) == 0
    first = outcome(run, "search")
    assert first["search"]["searches"] == 3
    assert first["counts"]["settings"] == len(first["trials"]) <= 1 + 15  # as it is is one of 16
    names = [trial["name"] for trial in first["trials"]]
    assert names[0] == "as it is"
    for row in first["choices"][0]["chosen"]:
        assert row["n_candidates"] <= 13
    folder = run.workdir / "sweep" / "search"
    for path in sorted((folder / "points").iterdir())[::2]:
        path.unlink()
    (folder / "results.json").unlink()
    assert sweep(run, config, sweep__workers=2, **changes) == 0
    assert outcome(run, "search") == first
