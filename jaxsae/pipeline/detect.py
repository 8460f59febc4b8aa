"""Phase 4: features and tracks to judged detectors: `metrics.json`, `predictions.csv`, `detector/`."""

import csv
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jaxsae import artifacts, detection
from jaxsae.artifacts import InputError
from jaxsae.config import RunConfig
from jaxsae.pipeline.families import read_families
from jaxsae.pipeline.stages import STAGES, Context, peak_bytes, read_record
from jaxsae.progress import Progress

PREDICTION_COLUMNS = ("id", "group", "repeat", "fold", "label", "detector", "score", "probability")
CURVES = ("logprob_sum", "probe_last_answer", "sae_logistic", "tracks_logistic")  # of each kind one, none slow
_SAE_KEYS = ("layer", "mse", "fvu", "l0_train", "l0_inference", "dead", "delta_ce")


def run(config: RunConfig, context: Context) -> None:
    """Judge every detector on the same grouped folds, and fit the one to keep on all rows.

    Raises:
        InputError: a file is damaged, they do not belong together, or there are too few answers of a class.
    """
    started = time.monotonic()
    workdir = context.workdir
    tables = read_tables(workdir, split_by=config.detection.split_by)
    protocol = protocol_of(config, families=_families(config, tables))
    if config.detection.curves:
        protocol = dataclasses.replace(protocol, curves=tuple(name for name in CURVES if name in protocol.judged))
    with Progress("detect", 1, "steps") as bar:
        results = detection.evaluate(
            tables, protocol, progress=lambda done, total, what: bar.update(done, what, total=total)
        )
    detection.fit_detector(tables, protocol).save(workdir / "detector")
    _write_predictions(workdir / "predictions.csv", results.predictions)
    write_rows(workdir / "metrics.csv", detection.tidy(results))
    artifacts.write_json(workdir / "metrics.json", _metrics(results, context, time.monotonic() - started))
    method = next(row for row in results.detection if row["name"] == protocol.method)
    canary = results.canary
    context.details = (
        f"{protocol.method} AUROC {method['auroc']:.3f} [{method['ci_low']:.3f}, {method['ci_high']:.3f}], "
        f"canary {canary['auroc']:.3f} [{canary['ci_low']:.3f}, {canary['ci_high']:.3f}]"
    )


def protocol_of(config: RunConfig, **others: Any) -> detection.ProtocolConfig:
    """Return how detectors are fitted and judged by a run's settings; `others` are fields that no setting is behind."""
    names = [field.name for field in dataclasses.fields(config.detection) if field.name not in ("curves", "split_by")]
    chosen = {name: getattr(config.detection, name) for name in names}
    return detection.ProtocolConfig(seed=config.seed, **chosen | others)


def _families(config: RunConfig, tables: detection.Tables) -> tuple[str, ...]:
    """Return the config's families that were made; `prompt` is not where the last token of the prompt was not kept."""
    families = tuple(name for name in config.detection.families if name in ("metrics", *tables.track_families))
    if "prompt" in set(config.detection.families) - set(families):
        logging.info("track family prompt is left out: features.positions keeps no last_prompt")
    return families


def read_tables(workdir: Path, *, split_by: str = "question") -> detection.Tables:
    """Return a run's answers as rows for the detectors, in groups as `detection.split_by` says.

    Raises:
        InputError: a file is missing or damaged, they do not belong together, or an answer has no category.
    """
    answers = artifacts.read_answers(workdir / "answers.jsonl")
    features = artifacts.read_features(workdir / "features.npz")
    path, required = workdir / "tracks.npz", ("ids", "metrics", "metric_names")
    tracks = artifacts.read_npz(path, rebuild="run jaxsae track", required=required)
    if tracks["ids"].tolist() != list(features.ids):
        raise InputError(f"{workdir}/tracks.npz and features.npz are of different answers; run jaxsae track")
    if "control_names" not in tracks or "control_metrics" not in tracks:
        raise InputError(f"{path} has no controls, as an older version wrote it; run jaxsae track --redo")
    return make_tables(features, answers, tracks, read_families(tracks, path), split_by=split_by)


def make_tables(
    features: artifacts.Features,
    answers: list[artifacts.Answer],
    tracks: dict[str, np.ndarray],
    families: Mapping[str, detection.Family],
    *,
    split_by: str,
) -> detection.Tables:
    """Return answers, their features and what `tracks.npz` holds as rows for the detectors.

    Raises:
        InputError: they are to be split by category, and one has none.
    """
    if split_by == "category":
        without = next((answer.id for answer in answers if not answer.category), None)
        if without is not None:
            raise InputError(f"answer {without} has no category; set detection.split_by=question")
        answers = [dataclasses.replace(answer, group=answer.category) for answer in answers]
    controls = dict(zip(tracks["control_names"].tolist(), tracks["control_metrics"], strict=True))
    names = tracks["metric_names"].tolist()
    return detection.build_tables(
        features, answers, tracks["metrics"], names, track_controls=controls, track_families=families
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of equal keys as CSV, a number that is not defined as an empty cell."""
    with artifacts.atomic_write(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_predictions(path: Path, predictions: dict[str, np.ndarray]) -> None:
    with artifacts.atomic_write(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(PREDICTION_COLUMNS)
        writer.writerows(zip(*(predictions[name].tolist() for name in PREDICTION_COLUMNS), strict=True))


def _metrics(results: detection.Results, context: Context, seconds: float) -> dict[str, Any]:
    """Return the content of metrics.json: what detectors and SAEs reached, and what each stage so far took."""
    evaluation = artifacts.read_json(context.workdir / "saes" / "evaluation.json", rebuild="run jaxsae train")
    records = {name: read_record(context.workdir, stage) for name, stage in STAGES.items()}
    done = {
        name: record for name, record in records.items() if record is not None and name not in ("detect", "evaluate")
    }
    return {
        **results.summary(),
        "sae": [{key: row[key] for key in _SAE_KEYS} for row in evaluation["rows"]],
        "seconds": {name: record["seconds"] for name, record in done.items()} | {"detect": round(seconds, 3)},
        "peak_bytes": {name: record["peak_bytes"] for name, record in done.items()} | {"detect": peak_bytes()},
    }
