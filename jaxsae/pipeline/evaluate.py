"""Phase 5: everything measured so far to a report: `report.md`, `report.html`, `figures/`."""

import csv
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from jaxsae import artifacts, report, tracking
from jaxsae.artifacts import Answer, InputError
from jaxsae.config import RunConfig
from jaxsae.pipeline.stages import STAGES, Context, read_record, tree_bytes
from jaxsae.progress import read_metrics

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "transformers", "numpy", "scikit-learn")


def run(config: RunConfig, context: Context) -> None:
    """Write the report.

    Raises:
        InputError: a file of an earlier stage is damaged.
    """
    written = report.write(context.workdir, gather(config, context))
    context.details = f"{len(written)} files; read {context.workdir / 'report.html'}"


def gather(config: RunConfig, context: Context) -> report.ReportInputs:
    """Collect what the report says from the workdir's files.

    Raises:
        InputError: a file is missing or damaged; it is named, with the stage to run.
    """
    workdir = context.workdir
    metrics = artifacts.read_json(workdir / "metrics.json", rebuild="run jaxsae detect")
    evaluation = artifacts.read_json(workdir / "saes" / "evaluation.json", rebuild="run jaxsae train")
    about = artifacts.read_json(workdir / "saes" / "suite.json", rebuild="run jaxsae train")
    answers = artifacts.read_answers(workdir / "answers.jsonl")
    scores = read_predictions(workdir / "predictions.csv", column="score")
    probabilities = read_predictions(workdir / "predictions.csv", column="probability")
    method = metrics["config"]["method"]
    comparisons = {row["name"]: row for row in metrics["differences"]}
    over_baseline, over_stack = f"{method}_over_best_baseline", "stack_tracks_over_stack"
    return report.ReportInputs(
        config_name=config.report.title or context.config_name,
        command=context.command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=config.flat(),
        host=host(),
        model={"name": about["model"], "n_layers": about["n_layers"], "d_model": about["d_model"]},
        sae_spec={
            "architecture": about["architecture"],
            "n_latents": about["n_latents"],
            "k": about["k"],
            "tokens": about["total_tokens"],
            "steps": about["total_steps"],
            "batch": about["batch"],
        },
        phases=phases(workdir),
        sae=evaluation["rows"],
        history=history(workdir, about["batch"]),
        detection=metrics["detection"],
        canary=metrics["canary"],
        by_category=metrics["by_category"],
        differences=metrics["differences"],
        counts=counts(metrics["counts"]),
        predictions=scores,
        probabilities={name: averaged for name, (_, averaged, _) in probabilities.items()},
        method=method,
        best_baseline=comparisons.get(over_baseline, {}).get("b"),
        pass_difference=over_baseline if over_baseline in comparisons else None,
        tracks_difference=over_stack if over_stack in comparisons else None,
        examples=examples(workdir, answers, probabilities[method][1] if method in probabilities else None),
        disk_bytes={
            name: tree_bytes(workdir / name)
            for stage in STAGES.values()
            for name in stage.clears
            if (workdir / name).exists() and stage.name != "evaluate"
        },
    )


def counts(found: dict[str, Any]) -> dict[str, Any]:
    """Return the answers' counts under the report's names."""

    def of(row: dict[str, Any]) -> dict[str, Any]:
        return {"right": row["right"], "wrong": row["hallucinated"]}

    by_category = {name: of(row) for name, row in found["categories"].items()}
    kept = {"rows": found["rows"], "groups": found["groups"], "empty": found["empty_answers"]}
    return {**kept, **of(found), "by_category": by_category}


def read_predictions(path: Path, *, column: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return detector -> (labels, the column averaged over repeats, groups), one entry an answer.

    Raises:
        InputError: the file is missing, or a line is damaged.
    """
    rows: dict[str, dict[str, list]] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, strict=True):
                answers = rows.setdefault(row["detector"], {})
                entry = answers.setdefault(row["id"], [int(row["label"]), [], row["group"]])
                entry[1].append(float(row[column]))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run jaxsae detect") from None
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error!r}); run jaxsae detect") from None
    return {
        detector: (
            np.array([label for label, _, _ in entries.values()]),
            np.array([np.mean(scores) for _, scores, _ in entries.values()]),
            np.array([group for _, _, group in entries.values()]),
        )
        for detector, entries in rows.items()
    }


def phases(workdir: Path) -> list[dict[str, Any]]:
    """Return a row per stage: its status, seconds, memory and bytes on disk, from the records."""
    rows = []
    for name, stage in STAGES.items():
        if name == "evaluate":
            continue
        record = read_record(workdir, stage)
        if record is None:
            rows.append({"name": name, "status": "missing", "seconds": None, "output_bytes": None, "peak_bytes": None})
            continue
        kept = {key: record[key] for key in ("seconds", "output_bytes", "peak_bytes")}
        rows.append({"name": name, "status": "done", "detail": record["details"], **kept})
    return rows


def history(workdir: Path, batch: int) -> list[dict[str, Any]]:
    """Return a row per evaluation and layer from the training log."""
    names = {"eval/fvu": "fvu", "eval/mse": "mse", "eval/l0": "l0", "train/dead": "dead", "train/loss": "loss"}
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for entry in read_metrics(workdir / "logs" / "metrics.jsonl"):
        for flat, number in entry.items():
            name, _, layer = flat.rpartition("/layer_")
            if name in names:
                key = (entry["step"], int(layer))
                start = {"step": key[0], "tokens": key[0] * batch, "layer": key[1]}
                rows.setdefault(key, start)[names[name]] = number
    return [rows[key] for key in sorted(rows)]


def examples(workdir: Path, answers: list[Answer], scores: np.ndarray | None) -> list[dict[str, Any]]:
    """Return one right and one wrong answer, each the median one of its label by the method's score, with tracks."""
    if scores is None:
        return []
    arrays = artifacts.read_npz(workdir / "tracks.npz", rebuild="run jaxsae track")
    tracks = tracking.Tracks.from_arrays(arrays)
    labels = np.array([answer.label for answer in answers])
    rows = []
    for label in (0, 1):
        members = np.flatnonzero(labels == label)
        index = int(members[np.argsort(scores[members], kind="stable")[len(members) // 2]])
        answer = answers[index]
        rows.append(
            {
                "question": answer.prompt,
                "answer": answer.answer,
                "expected": " / ".join(answer.answers),
                "label": label,
                "score": float(scores[index]),
                "tracks": _tracks_of(tracks, index),
            }
        )
    return rows


def _tracks_of(tracks: tracking.Tracks, sample: int) -> list[dict[str, Any]]:
    rows = []
    for track in range(tracks.sample_offsets[sample], tracks.sample_offsets[sample + 1]):
        at = slice(tracks.observation_offsets[track], tracks.observation_offsets[track + 1])
        rows.append(
            {
                "birth": int(tracks.birth[track]),
                "death": int(tracks.death[track]),
                "layers": tracks.layer[at].tolist(),
                "features": tracks.feature_id[at].tolist(),
                "activations": tracks.activation[at].tolist(),
            }
        )
    return rows


def host() -> dict[str, Any]:
    """Return what the run ran on: machine, cores, memory, and the packages' versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "machine": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
