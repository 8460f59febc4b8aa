"""Phase 3, second half: answers to SAE features (`features.npz`) and tracks through the layers (`tracks.npz`).

Before the tracks, the graph of latents that are alike in neighbouring layers (`links.npz`), once for a suite.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from jaxsae import artifacts, features, sae, tracking
from jaxsae.artifacts import Features
from jaxsae.config import RunConfig, TrackingConfig
from jaxsae.pipeline import stages
from jaxsae.pipeline.links import Machinery, keep_links
from jaxsae.pipeline.stages import STAGES, Context
from jaxsae.progress import Progress
from jaxsae.tracking.links import Decoders

_CONTROL_SEED = 0  # of shuffled links and random decoders: the same in every run, so that runs compare


def run(config: RunConfig, context: Context) -> None:
    """Write the files; features and links that are still those of this model, suite and answers are not made again.

    Raises:
        InputError: suite, answers and model do not belong together, or a checkpoint file is damaged.
    """
    machinery = Machinery(config, context.workdir)
    kept = _keep_features(config, context, machinery)
    links = keep_links(config, context, machinery)
    tracks = follow(kept, sae.Decoders(context.workdir / "saes"), config.tracking)
    table = tracking.divergence_metrics(tracks)
    controls = _control_metrics(kept, tracks, context.workdir / "saes", config.tracking)
    artifacts.write_npz(
        context.workdir / "tracks.npz",
        {
            **tracks.arrays(),
            "ids": np.array(kept.ids),
            "position": np.array(config.tracking.position),
            "metrics": table,
            "metric_names": np.array(tracking.DIVERGENCE_COLUMNS),
            "control_names": np.array(list(controls)),
            "control_metrics": np.stack(list(controls.values())),
        },
    )
    context.details = f"{len(kept.ids)} answers, {len(tracks.birth) / len(kept.ids):.1f} tracks each"


def _control_metrics(
    kept: Features, tracks: tracking.Tracks, suite_dir: Path, config: TrackingConfig
) -> dict[str, np.ndarray]:
    """Return the metrics [N Q] of tracks that should know less than the real ones, by the control's name."""
    random = tracking.RandomDecoders(sae.Decoders(suite_dir), _CONTROL_SEED)
    controls = {
        "none": follow(kept, sae.Decoders(suite_dir), dataclasses.replace(config, association="none")),
        "shuffled": tracking.shuffle_links(tracks, seed=_CONTROL_SEED),
        "random_decoders": follow(kept, random, config),
    }
    return {name: tracking.divergence_metrics(control) for name, control in controls.items()}


def follow(kept: Features, decoders: Decoders, config: TrackingConfig) -> tracking.Tracks:
    """Track the features at one position, reading one layer's decoder at a time.

    Raises:
        InputError: the position was not kept, or a checkpoint file is damaged.
    """
    return follow_latents(*kept.at(config.position), decoders, config)


def follow_latents(
    feature_ids: Int[np.ndarray, "N L K"],
    activations: Float[np.ndarray, "N L K"],
    decoders: Decoders,
    config: TrackingConfig,
) -> tracking.Tracks:
    """Track the first `config.top_k` of the kept latents with the config's tracker."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(tracking.TrackerConfig)}
    k = config.top_k
    return tracking.track(
        feature_ids[..., :k], activations[..., :k].astype(np.float64), decoders, tracking.TrackerConfig(**settings)
    )


def _keep_features(config: RunConfig, context: Context, machinery: Machinery) -> Features:
    """Return the features, from the file if they are still valid, else computed and written with their identity."""
    path, identity_path = context.workdir / "features.npz", context.workdir / "manifests" / "features.json"
    identity = _identity(config, context.workdir)
    if identity_path.exists() and path.exists():
        have = artifacts.read_json(identity_path, rebuild="delete it and run jaxsae track")
        if have["identity"] == identity and have["sha256"] == artifacts.sha256_file(path):
            logging.info("features.npz is up to date")
            return artifacts.read_features(path)
    answers = artifacts.read_answers(context.workdir / "answers.jsonl")
    with Progress("features", len(answers), "answers") as bar:
        kept = features.encode_answers(
            machinery.lm,
            machinery.suite,
            answers,
            keep=config.features.keep,
            positions=config.features.positions,
            batch=config.questions.batch,
            on_batch=bar.update,
        )
    artifacts.write_features(path, kept)
    artifacts.write_json(identity_path, {"identity": identity, "sha256": artifacts.sha256_file(path)})
    return kept


def _identity(config: RunConfig, workdir: Path) -> dict[str, Any]:
    files = ("answers.jsonl", "saes/evaluation.json")
    return {
        "settings": config.select("model", "features"),
        "model": stages.source_digests(STAGES["answer"], config)["model"],
        "inputs": {name: artifacts.sha256_file(workdir / name) for name in files},
    }
