"""Phase 3, second half: answers to SAE features (`features.npz`) and tracks through the layers (`tracks.npz`)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from jaxsae import artifacts, features, sae, tracking
from jaxsae.artifacts import Features, InputError
from jaxsae.config import RunConfig, TrackingConfig
from jaxsae.pipeline import families, stages
from jaxsae.pipeline.extract import load_model
from jaxsae.pipeline.stages import STAGES, Context
from jaxsae.progress import Progress
from jaxsae.tracking.links import Decoders

_CONTROL_SEED = 0  # of shuffled links and random decoders: the same in every run, so that runs compare


def run(config: RunConfig, context: Context) -> None:
    """Write both files; features that are still those of this model, suite and answers are not computed again.

    Raises:
        InputError: suite, answers and model do not belong together, or a checkpoint file is damaged.
    """
    kept = _keep_features(config, context)
    tracks = follow(kept, sae.Decoders(context.workdir / "saes"), config.tracking)
    table = tracking.divergence_metrics(tracks)
    controls = _control_metrics(kept, tracks, context.workdir / "saes", config.tracking)
    concepts = read_concepts(context.workdir)
    found = families.make_families(kept, tracks, sae.Decoders(context.workdir / "saes"), concepts, config.tracking)
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
            **families.family_arrays(found),
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
    metrics = {name: tracking.divergence_metrics(control) for name, control in controls.items()}
    return metrics | {"neurons": families.neuron_metrics(kept, config)}


def read_concepts(workdir: Path) -> Int[np.ndarray, "L F"]:
    """Return the concept of each latent of a run's suite."""
    decoders = sae.Decoders(workdir / "saes")
    if len(decoders) < 2:
        return np.arange(len(decoders[0]))[None]
    return tracking.concepts(tracking.link_by_weights(decoders, 1))


def follow(kept: Features, decoders: Decoders, config: TrackingConfig) -> tracking.Tracks:
    """Track the features at one position, reading one layer's decoder at a time.

    Raises:
        InputError: the position was not kept, or a checkpoint file is damaged.
    """
    return families.follow_latents(*kept.at(config.position), decoders, config)


def _keep_features(config: RunConfig, context: Context) -> Features:
    """Return the features, from the file if they are still valid, else computed and written with their identity."""
    path, identity_path = context.workdir / "features.npz", context.workdir / "manifests" / "features.json"
    identity = _identity(config, context.workdir)
    if identity_path.exists() and path.exists():
        have = artifacts.read_json(identity_path, rebuild="delete it and run jaxsae track")
        if have["identity"] == identity and have["sha256"] == artifacts.sha256_file(path):
            logging.info("features.npz is up to date")
            return artifacts.read_features(path)
    lm = load_model(config.model)
    about = artifacts.read_json(context.workdir / "saes" / "suite.json", rebuild="run jaxsae train")
    if about["model_fingerprint"] != lm.fingerprint:
        raise InputError(
            f"saes/ are of {about['model']} (fingerprint {about['model_fingerprint'][:12]}), the config's model is "
            f"{lm.name} ({lm.fingerprint[:12]}); use the model and model.dtype they were trained on"
        )
    suite = sae.load(context.workdir / "saes", arrays="jax")
    answers = artifacts.read_answers(context.workdir / "answers.jsonl")
    with Progress("features", len(answers), "answers") as bar:
        kept = features.encode_answers(
            lm,
            suite,
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
        "arrays": [field.name for field in dataclasses.fields(Features)],
        "model": stages.source_digests(STAGES["answer"], config)["model"],
        "inputs": {name: artifacts.sha256_file(workdir / name) for name in files},
    }
