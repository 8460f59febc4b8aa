"""`jaxsae sweep`: many settings of tracking and detection on one run's features, and what choosing among them is worth.

A setting goes from the kept features to tracks, metrics and detectors, all on the same frozen folds, and leaves a file
of its own. A killed sweep skips the settings whose files are whole and still those of the run.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool

from jaxsae import __version__, artifacts, detection
from jaxsae.artifacts import Features, InputError
from jaxsae.config import RunConfig, SweepAxis, SweepRange
from jaxsae.detection.nesting import quiet_single_threaded_blas
from jaxsae.detection.splits import check_rows, describe_splits, make_folds
from jaxsae.detection.steps import Steps
from jaxsae.detection.sweep import MEASURES, Point, Rows, judge_points, published_error
from jaxsae.pipeline import stages
from jaxsae.pipeline.detect import make_tables, write_rows
from jaxsae.pipeline.links import needs_links
from jaxsae.pipeline.points import Sweep
from jaxsae.pipeline.trials import Search, Trial, label_of, listed_trials, propose_trial
from jaxsae.pipeline.workers import Bench, Workers, n_workers
from jaxsae.progress import Progress, human_seconds
from jaxsae.report import sweep as page

READS = {
    "answers.jsonl": "answer",
    "saes/evaluation.json": "train",
    "features.npz": "track",
    "manifests/features.json": "track",
}
_MEASURE_WORDS = {
    "auroc": "area under the ROC curve of the mean out-of-fold score",
    "accuracy": "at the threshold chosen in inner validation, a decision per (repeat, answer)",
    "f1": "of hallucinated, at the threshold chosen in inner validation, a decision per (repeat, answer)",
}
_CHOICE_WORDS = {
    "nested": "the setting chosen for each outer fold by inner validation, scored on that fold",
    "naive": "the best setting by the rows it is judged on; its interval makes the pick anew in each resample",
    "optimism": "naive minus nested, on the same resamples",
    "gain": "nested minus the config's own setting, on the same resamples",
}


def run(config: RunConfig, workdir: Path, *, config_name: str, command_line: str, redo: bool = False) -> int:
    """Try every setting, judge the choice between them, write results and page, and return 0.

    Raises:
        InputError: the run lacks a file, or a setting cannot be tried on it; nothing has run.
        Interruption: a signal; the settings that were done stay done.
    """
    sweep = prepare(config, workdir, config_name)
    trials = check(sweep)
    stages.StopSignal()
    with stages.lock(workdir):
        if redo and sweep.folder.exists():
            shutil.rmtree(sweep.folder)
        content = _current(sweep)
        if content is None:
            content = _make(sweep, trials, command_line)
        else:
            logging.info("sweep: up to date, skipped")
    print(f"{page.summary(content)}\n\nsweep: {sweep.folder / 'report.html'} (and report.md, figures/, results.csv)")
    return 0


def plan(config: RunConfig, workdir: Path, *, config_name: str, redo: bool = False) -> list[str]:
    """Return what `run` would do, a line each; raises as it does."""
    sweep = prepare(config, workdir, config_name)
    trials = check(sweep)
    if _current(sweep) is not None and not redo:
        return [f"sweep {sweep.name}: up to date ({sweep.folder / 'report.html'})"]
    done = {trial.name for trial in trials if not redo and sweep.read_point(trial) is not None}
    protocol = sweep.protocol
    lines = [
        f"sweep {sweep.name}: would try {len(trials)} settings ({len(done)} of them done) with "
        f"{', '.join(config.sweep.detectors)}, {protocol.folds} folds x {protocol.repeats} repeats, on "
        f"{n_workers(config, len(trials))} processes"
    ]
    if config.sweep.trials is not None:
        n = protocol.folds * protocol.repeats
        lines.append(
            f"and a search of {config.sweep.trials} settings for each of {n} outer folds, {config.sweep.trials * n} "
            f"different ones at most, over {', '.join(axis.name for axis in config.sweep.axes)}"
        )
    lines += [f"  {_outlook(trial)}{' (done)' if trial.name in done else ''}" for trial in trials]
    return [*lines, f"would write {sweep.folder}/report.html, report.md, figures/, results.json, results.csv"]


def _outlook(trial: Trial) -> str:
    changes = ", ".join(f"{name}={value}" for name, value in trial.changes.items())
    return f"{trial.name}: {changes or 'the config as it is'}"


def prepare(config: RunConfig, workdir: Path, config_name: str) -> Sweep:
    """Return a sweep of a run whose files fit each other.

    Raises:
        InputError: a file is missing, or was made anew after those that depend on it.
    """
    for name, stage in READS.items():
        if not (workdir / name).is_file():
            raise InputError(f"{workdir}/{name} is missing: run jaxsae {stage}")
    about = artifacts.read_json(workdir / "manifests" / "features.json", rebuild="delete it and run jaxsae track")
    inputs = {name: artifacts.sha256_file(workdir / name) for name in READS if not name.startswith("manifests/")}
    made_of = about["identity"]["inputs"] | {"features.npz": about["sha256"]}
    for name, digest in inputs.items():
        if made_of.get(name) != digest:
            raise InputError(f"{workdir}/{name} is not the one that the features are of; run jaxsae track")
    if (workdir / "links.npz").is_file():
        inputs["links.npz"] = artifacts.sha256_file(workdir / "links.npz")
    kept = {name: value for name, value in about["identity"]["settings"].items() if name.startswith("features.")}
    return Sweep(config, workdir, config.sweep.name or config_name, inputs, kept)


def check(sweep: Sweep) -> list[Trial]:
    """Return the trials that are known before anything runs.

    Raises:
        InputError: a detector is unknown, a setting cannot be tried on what the run kept, or a search lacks Optuna.
    """
    for name in sweep.config.sweep.detectors:
        if name not in detection.DETECTORS:
            raise InputError(f"sweep.detectors names {name!r}, expected any of {', '.join(detection.DETECTORS)}")
    trials = listed_trials(sweep.config, kept=sweep.kept)
    for trial in trials:
        _check_trial(sweep, trial)
    if sweep.config.sweep.trials is not None:
        for axis in sweep.config.sweep.axes:
            for value in _ends(axis):
                propose_trial(sweep.config, {axis.name: value}, kept=sweep.kept)
        Search(sweep.config.sweep.axes, n_searches=1, seed=sweep.config.seed)  # asks for Optuna
    return trials


def _check_trial(sweep: Sweep, trial: Trial) -> None:
    """Raise InputError for a trial whose detectors are not made, or whose link graph the run does not have."""
    sweep.protocol_of(trial.config)
    changed = [name for name in trial.changes if name.startswith("tracking.links")]
    if changed:
        raise InputError(f"{changed[0]} is of links.npz, which a sweep reads as it is; set it and run jaxsae track")
    if needs_links(trial.config.tracking) and "links.npz" not in sweep.inputs:
        raise InputError(f"setting {trial.name} needs links.npz, which {sweep.workdir} lacks; run jaxsae track")


def _ends(axis: SweepAxis | SweepRange) -> Sequence[Any]:
    """Return the values of an axis, or both ends of a range: if these can be tried, so can all between."""
    return axis.values if isinstance(axis, SweepAxis) else (axis.low, axis.high)


def _current(sweep: Sweep) -> dict[str, Any] | None:
    """Return the content of results.json if it is of this config and run, and its pages are there."""
    path = sweep.folder / "results.json"
    if not path.exists() or not all((sweep.folder / name).exists() for name in ("report.md", "report.html")):
        return None
    try:
        content = artifacts.read_json(path, rebuild="it is made again")
    except InputError as error:
        logging.warning("%s", error)
        return None
    return content if content.get("identity") == _identity(sweep) else None


def _identity(sweep: Sweep) -> str:
    """Return a digest of all that the outcome depends on."""
    settings = sweep.config.select("tracking", "detection", "sweep", "seed")
    settings.pop("sweep.workers")
    return artifacts.fingerprint({"settings": settings, "inputs": sweep.inputs, "code_version": __version__})


def _make(sweep: Sweep, trials: list[Trial], command_line: str) -> dict[str, Any]:
    """Try, judge and write; return the content of results.json."""
    started = time.monotonic()
    bench = Bench.load(sweep)
    split_by = sweep.config.detection.split_by
    tables = make_tables(bench.features, bench.answers, _no_tracks(bench.features), {}, split_by=split_by)
    check_rows(tables, sweep.protocol)
    folds = make_folds(tables, sweep.protocol)
    rows = Rows(tables.labels, tables.group_index, folds)
    splits = describe_splits(tables, folds)
    del tables
    allowed = None
    logging.info("sweep %s: %d settings, %s", sweep.name, len(trials), ", ".join(sweep.config.sweep.detectors))
    n_processes = n_workers(sweep.config, len(trials))
    with Workers(sweep, bench if n_processes == 1 else None, n_processes) as workers:
        del bench  # as large as the features, which each process reads for itself
        with Progress("sweep", len(trials), "settings") as bar:
            points = workers.points(trials, bar)
        if sweep.config.sweep.trials is not None:
            trials, points, allowed = _search(sweep, trials, points, workers, rows)
    content = _judge(sweep, trials, points, rows, allowed)
    content |= {"splits": splits, "command": command_line, "seconds": round(time.monotonic() - started, 3)}
    write_rows(sweep.folder / "results.csv", tidy(content))
    page.write(sweep.folder, content)
    artifacts.write_json(sweep.folder / "results.json", content)  # last: what it is of, all the others are
    for stale in set((sweep.folder / "points").iterdir()) - {sweep.path(trial) for trial in trials}:
        stale.unlink()
    logging.info("sweep: done in %s, %d settings", human_seconds(content["seconds"]), len(trials))
    return content


def _no_tracks(features: Features) -> dict[str, np.ndarray]:
    """Return tracks without metrics, for tables that are asked for labels and groups alone."""
    nothing = np.empty((len(features.ids), 0))
    return {
        "metrics": nothing,
        "metric_names": np.array([], dtype=np.str_),
        "control_names": np.array([], dtype=np.str_),
        "control_metrics": np.empty((0, *nothing.shape)),
    }


def _judge(
    sweep: Sweep,
    trials: Sequence[Trial],
    points: dict[str, Point],
    rows: Rows,
    allowed: dict[str, Bool[np.ndarray, "repeats folds"]] | None,
) -> dict[str, Any]:
    """Return the content of results.json, but for what `_make` adds."""
    sweeping, protocol = sweep.config.sweep, sweep.protocol
    as_it_is = sweep.config.select("tracking", "detection")
    reference = next((t.name for t in trials if t.config.select("tracking", "detection") == as_it_is), None)
    with Progress("intervals", len(trials), "settings") as bar:
        steps = Steps(-1, lambda done, total, what: bar.update(done, what, total=total), total=len(trials))
        with quiet_single_threaded_blas():
            judged = judge_points(
                rows,
                points,
                sweeping.detectors,
                metric=sweeping.metric,
                resamples=protocol.bootstrap,
                seed=protocol.seed,
                reference=reference,
                allowed=allowed,
                steps=steps,
            )
    return {
        "identity": _identity(sweep),
        "name": sweep.name,
        "workdir": str(sweep.workdir),
        "metric": sweeping.metric,
        "detectors": list(sweeping.detectors),
        "protocol": {name: getattr(protocol, name) for name in ("folds", "repeats", "inner", "bootstrap", "seed")},
        "axes": [
            {"name": axis.name, "label": label_of(axis.name, {axis.name: axis.label}), "values": list(_ends(axis))}
            for axis in sweeping.axes
        ],
        "search": None
        if sweeping.trials is None
        else {"trials": sweeping.trials, "searches": protocol.folds * protocol.repeats},
        "counts": {
            "rows": len(rows.labels),
            "groups": int(rows.group.max()) + 1,
            "hallucinated": int(rows.labels.sum()),
            "settings": len(trials),
            "fits": sum(point.n_fits for point in points.values()),
            "unconverged_fits": sum(point.n_unconverged for point in points.values()),
        },
        "reference": reference,
        "published_rows": sweeping.published_rows,
        "trials": [_describe(trial, sweeping.published_rows) for trial in trials],
        "inputs": sweep.inputs,
        **judged,
    }


def _describe(trial: Trial, published_rows: int | None) -> dict[str, Any]:
    errors = {
        name: published_error(name, value, published_rows) if published_rows else None
        for name, value in trial.published.items()
    }
    return {
        "name": trial.name,
        "changes": dict(trial.changes),
        "is_named": trial.is_named,
        "is_reconstructed": trial.is_reconstructed,
        "published": {
            name: {"value": value, "standard_error": errors[name]} for name, value in trial.published.items()
        },
    }


def tidy(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every number of results.json's settings and choices as a row of `results.csv`."""
    published = {trial["name"]: trial["published"] for trial in content["trials"]}
    size = {"n": content["counts"]["rows"], "n_groups": content["counts"]["groups"]}
    lines: list[dict[str, Any]] = []
    for row in content["settings"]:
        for name in MEASURES:
            named = {"table": "settings", "setting": row["setting"], "detector": row["detector"], "measure": name}
            found = {"value": row[name], "ci_low": row[f"{name}_ci_low"], "ci_high": row[f"{name}_ci_high"]}
            others = published[row["setting"]].get(name, {"value": None, "standard_error": None})
            beside = {"published": others["value"], "published_standard_error": others["standard_error"]}
            lines.append(named | found | size | beside | {"definition": _MEASURE_WORDS[name]})
    for choice in content["choices"]:
        measured = [("nested", name, choice["nested"][name]) for name in MEASURES]
        measured += [
            (table, choice["metric"], choice[table])
            for table in ("naive", "optimism", "gain")
            if choice.get(table) is not None
        ]
        for table, name, row in measured:
            setting = row.get("setting", row.get("over", ""))
            named = {"table": table, "setting": setting, "detector": choice["detector"], "measure": name}
            found = {key: row[key] for key in ("value", "ci_low", "ci_high")}
            beside = {"published": None, "published_standard_error": None}
            lines.append(named | found | size | beside | {"definition": _CHOICE_WORDS[table]})
    return lines


def _search(
    sweep: Sweep, trials: list[Trial], points: dict[str, Point], workers: "Workers", rows: Rows
) -> tuple[list[Trial], dict[str, Point], dict[str, Bool[np.ndarray, "repeats folds"]]]:
    """Search for each outer fold; return all trials, their points, and for which folds each may be chosen."""
    metric, n_rounds = MEASURES.index(sweep.config.sweep.metric), sweep.config.sweep.trials or 0
    shape = sweep.protocol.repeats, sweep.protocol.folds
    allowed = {trial.name: np.ones(shape, dtype=bool) for trial in trials}
    by_key = {trial.key: trial for trial in trials}
    folds = list(np.ndindex(*shape))
    search = Search(sweep.config.sweep.axes, n_searches=len(folds), seed=sweep.config.seed)
    with Progress("search", n_rounds, "rounds") as bar:
        for n_done in range(1, n_rounds + 1):
            proposed = [propose_trial(sweep.config, changes, kept=sweep.kept) for changes in search.propose()]
            for trial in proposed:
                by_key.setdefault(trial.key, trial)
            proposed = [by_key[trial.key] for trial in proposed]
            fresh = {trial.name: trial for trial in proposed if trial.name not in points}
            points |= workers.points(list(fresh.values()), None)
            search.learn(
                [
                    float(points[trial.name].inner[metric, :, repeat, fold].max())
                    for trial, (repeat, fold) in zip(proposed, folds, strict=True)
                ]
            )
            for trial, place in zip(proposed, folds, strict=True):
                allowed.setdefault(trial.name, np.zeros(shape, dtype=bool))[place] = True
            bar.update(n_done, f"{len(points)} settings tried")
    return list(by_key.values()), points, allowed
