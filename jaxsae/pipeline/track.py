"""Phase 3, second half: answers to SAE features (`features.npz`) and tracks through the layers (`tracks.npz`).

Before the tracks, the graph of latents that are alike in neighbouring layers (`links.npz`), once for a suite.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from jaxsae import artifacts, features, sae, tracking
from jaxsae.artifacts import RESID_POSITIONS, Features, InputError
from jaxsae.config import RunConfig, TrackingConfig
from jaxsae.detection import Family
from jaxsae.pipeline import families, stages
from jaxsae.pipeline.links import Machinery, keep_links, needs_links, read_links
from jaxsae.pipeline.stages import STAGES, Context
from jaxsae.progress import Progress
from jaxsae.tracking.links import Decoders

CONTROLS = ("none", "shuffled", "random_decoders", "neurons")
TOKENS = "answer_tokens"  # the position that is each of the answer's tokens
_BLOCK = 16_384  # tokens followed together: their latents are copied
_CONTROL_SEED = 0  # of shuffled links and random decoders: the same in every run, so that runs compare


def run(config: RunConfig, context: Context) -> None:
    """Write the files; features and links that are still those of this model, suite and answers are not made again.

    Raises:
        InputError: suite, answers and model do not belong together, or a checkpoint file is damaged.
    """
    machinery = Machinery(config, context.workdir)
    kept = _keep_features(config, context, machinery)  # first: it looks whether the SAEs are the model's
    decoders = sae.Decoders(context.workdir / "saes")
    links = keep_links(config, context, machinery)
    arrays = track_arrays(kept, decoders, config.tracking, links=links, concepts=read_concepts(context.workdir))
    artifacts.write_npz(context.workdir / "tracks.npz", arrays)
    context.details = f"{len(kept.ids)} answers, {len(arrays['birth']) / len(kept.ids):.1f} tracks each"


def track_arrays(
    kept: Features,
    decoders: Decoders,
    config: TrackingConfig,
    *,
    links: tracking.LinkGraph | None = None,
    concepts: Int[np.ndarray, "L F"] | None = None,
    controls: Sequence[str] = CONTROLS,
) -> dict[str, np.ndarray]:
    """Return what `tracks.npz` holds: tracks, their metrics and those of controls, and the families of features.

    Args:
        links: the suite's link graph, which not every tracker reads.
        concepts: the concept of each latent; None leaves the families out.

    Raises:
        InputError: the position was not kept, or a checkpoint file is damaged.
    """
    use = links if needs_links(config) else None
    tracks, offsets = follow_all(kept, decoders, config, links=use)
    metrics = measure(tracks, offsets, config)
    of_controls = [_control_metrics(name, kept, tracks, offsets, decoders, config, use) for name in controls]
    per_token = {"token_offsets": offsets} if config.position == TOKENS else {}
    found = {} if concepts is None else follow_families(kept, tracks, decoders, concepts, config, links=use)
    return {
        **tracks.arrays(),
        **per_token,
        "ids": np.array(kept.ids),
        "position": np.array(config.position),
        "metrics": metrics,
        "metric_names": np.array(metric_names(config)),
        "control_names": np.array(controls, dtype=np.str_),
        "control_metrics": np.stack(of_controls) if of_controls else np.empty((0, *metrics.shape)),
        **families.family_arrays(found),
    }


def _control_metrics(
    name: str,
    kept: Features,
    tracks: tracking.Tracks,
    offsets: Int[np.ndarray, " N_and_1"],
    decoders: Decoders,
    config: TrackingConfig,
    links: tracking.LinkGraph | None,
) -> Float[np.ndarray, "N Q"]:
    """Return the metrics of tracks that should know less than the real ones."""
    if name == "neurons":
        return _measure_neurons(kept, config)
    if name == "shuffled":
        control = tracking.shuffle_links(tracks, seed=_CONTROL_SEED)
    elif name == "none":
        unlinked = dataclasses.replace(config, association="none", null="none")
        control = follow_all(kept, decoders, unlinked)[0]
    else:
        control = _follow_aimlessly(kept, decoders, config, links)
    return measure(control, offsets, config)


def _follow_aimlessly(
    kept: Features, decoders: Decoders, config: TrackingConfig, links: tracking.LinkGraph | None
) -> tracking.Tracks:
    """Return the tracks by random directions in place of decoders, or by a graph of the wrong latents."""
    random = tracking.RandomDecoders(decoders, _CONTROL_SEED)
    if config.association == "links" and links is not None:
        return follow_all(kept, random, config, links=tracking.relabel_links(links, seed=_CONTROL_SEED))[0]
    null = "none" if config.null == "none" else "random_pairs"  # of random directions the two nulls are one
    return follow_all(kept, random, dataclasses.replace(config, null=null))[0]


def _measure_neurons(kept: Features, config: TrackingConfig) -> Float[np.ndarray, "N Q"]:
    """Return the metrics of tracks of the residual stream's largest coordinates in place of latents.

    They are those of the tracked position where it keeps a residual stream, else of the last answer token.
    """
    position = config.position if config.position in RESID_POSITIONS else "last_answer"
    resid = kept.resid[:, :, RESID_POSITIONS.index(position)]
    association = "feature_id" if config.association == "links" else config.association
    settings = dataclasses.replace(config, association=association, null="none")
    coordinates = tracking.largest_coordinates(resid, k=config.top_k)
    tracks = follow_latents(*coordinates, tracking.SignedCoordinates(*resid.shape[1:]), settings)
    return measure(tracks, np.arange(len(kept.ids) + 1), config)


def read_concepts(workdir: Path) -> Int[np.ndarray, "L F"]:
    """Return the concept of each latent of a run's suite; without a link graph each latent is its own.

    Raises:
        InputError: the graph or a checkpoint file is damaged.
    """
    if (workdir / "links.npz").exists():
        return tracking.concepts(read_links(workdir))
    decoders = sae.Decoders(workdir / "saes")
    return np.arange(len(decoders) * len(decoders[0])).reshape(len(decoders), -1)


def follow_families(
    kept: Features,
    tracks: tracking.Tracks,
    decoders: Decoders,
    concepts: Int[np.ndarray, "L F"],
    config: TrackingConfig,
    *,
    links: tracking.LinkGraph | None = None,
) -> dict[str, Family]:
    """Return the families of features of the answers' tracks.

    They are of the tracked position (of the last answer token, if it was kept, where every token is tracked) and of the
    last token of the prompt.

    Args:
        tracks: those of `kept` at the tracked position, or what is left of them.
        concepts: the concept of each latent.
    """
    position = config.position
    if position == TOKENS:
        position = "last_answer" if "last_answer" in kept.positions else kept.positions[0]
        tracks = follow_latents(*kept.at(position), decoders, config, links=links)
    followed = {position: tracks}
    if families.PROMPT in kept.positions and position != families.PROMPT:
        followed[families.PROMPT] = follow_latents(*kept.at(families.PROMPT), decoders, config, links=links)
    return families.make_families(kept, followed, decoders, concepts, config)


def follow_all(
    kept: Features, decoders: Decoders, config: TrackingConfig, *, links: tracking.LinkGraph | None = None
) -> tuple[tracking.Tracks, Int[np.ndarray, " N_and_1"]]:
    """Track the features at the config's position: a sample for each answer, or one for each of its tokens.

    One layer's decoder is read at a time; of answers' tokens, `_BLOCK` are followed together.

    Returns:
        The tracks, and the offsets of each answer's samples.

    Raises:
        InputError: the position was not kept, or a checkpoint file is damaged.
    """
    if config.position != TOKENS:
        tracks = follow_latents(*kept.at(config.position), decoders, config, links=links)
        return tracks, np.arange(tracks.n_samples + 1)
    answers, places = _token_places(kept)
    parts = (
        follow_latents(
            kept.feature_ids[answers[start : start + _BLOCK], :, places[start : start + _BLOCK]],
            kept.activations[answers[start : start + _BLOCK], :, places[start : start + _BLOCK]],
            decoders,
            config,
            links=links,
        )
        for start in range(0, len(answers), _BLOCK)
    )
    return tracking.Tracks.concatenate(parts), np.searchsorted(answers, np.arange(len(kept.ids) + 1))


def _token_places(kept: Features) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """Return, for each kept token of each answer, the answer's row and the position's; an empty answer has one."""
    numbers = [name.removeprefix("answer_") for name in kept.positions]
    places = sorted((at for at, number in enumerate(numbers) if number.isdigit()), key=lambda at: int(numbers[at]))
    if not places:
        raise InputError(
            f"features.npz keeps positions {', '.join(kept.positions)}, not {TOKENS}; add it to features.positions"
        )
    counts = np.clip(np.diff(kept.offsets), 1, len(places))
    answers = np.repeat(np.arange(len(kept.ids)), counts)
    within = np.arange(len(answers)) - np.repeat(np.cumsum(counts) - counts, counts)
    return answers, np.array(places)[within]


def measure(
    tracks: tracking.Tracks, offsets: Int[np.ndarray, " N_and_1"], config: TrackingConfig
) -> Float[np.ndarray, "N Q"]:
    """Return the metrics of what `follow_all` gave, a row for each answer; columns are `metric_names`."""
    if config.position == TOKENS:
        return tracking.pooled_metrics(tracks, offsets)
    return tracking.divergence_metrics(tracks)


def metric_names(config: TrackingConfig) -> tuple[str, ...]:
    """Return the columns of `measure`."""
    return tracking.POOLED_COLUMNS if config.position == TOKENS else tracking.DIVERGENCE_COLUMNS


def follow_latents(
    feature_ids: Int[np.ndarray, "N L K"],
    activations: Float[np.ndarray, "N L K"],
    decoders: Decoders,
    config: TrackingConfig,
    *,
    links: tracking.LinkGraph | None = None,
) -> tracking.Tracks:
    """Track the first `config.top_k` of the kept latents with the config's tracker."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(tracking.TrackerConfig)}
    k = config.top_k
    return tracking.track(
        feature_ids[..., :k], activations[..., :k], decoders, tracking.TrackerConfig(**settings), links=links
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
        "arrays": [field.name for field in dataclasses.fields(Features)],
        "model": stages.source_digests(STAGES["answer"], config)["model"],
        "inputs": {name: artifacts.sha256_file(workdir / name) for name in files},
    }
