"""Families of track features of answers: made alike for a run's answers and for a single one that is scored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int

from jaxsae import tracking
from jaxsae.artifacts import RESID_POSITIONS, Features, InputError
from jaxsae.config import TrackingConfig
from jaxsae.detection import Family
from jaxsae.tracking.links import Decoders

_PROMPT = "last_prompt"  # where the answer's first token is chosen
_TOKENS = ("the emitted token", "the best other token")  # of `Features.token_directions`
_NEURON_POSITION = "last_answer"  # where `neurons` looks if the tracked position keeps no residual stream
_CONCEPT_PARTS = ("data", "indices", "indptr", "shape")


def tracker_config(config: TrackingConfig) -> tracking.TrackerConfig:
    """Return the tracker's settings among those of a run."""
    fields = dataclasses.fields(tracking.TrackerConfig)
    return tracking.TrackerConfig(**{field.name: getattr(config, field.name) for field in fields})


def follow_latents(
    feature_ids: np.ndarray, activations: np.ndarray, decoders: Decoders, config: TrackingConfig
) -> tracking.Tracks:
    """Track the first `config.top_k` of the kept latents [N L K] with the config's tracker."""
    k = config.top_k
    return tracking.track(
        feature_ids[..., :k], activations[..., :k].astype(np.float64), decoders, tracker_config(config)
    )


def make_families(
    kept: Features,
    tracks: tracking.Tracks,
    decoders: Decoders,
    concepts: Int[np.ndarray, "L F"],
    config: TrackingConfig,
) -> dict[str, Family]:
    """Return every family of the answers' tracks, by name; "prompt" only if the last token of the prompt was kept.

    Profiles and concepts are those of the tracked position; late births are looked at there and at the last token of
    the prompt, which has tracks of its own: how far they point at the token that was emitted, and at its best rival.

    Args:
        tracks: those of `kept` at the tracked position, or what is left of them.
        concepts: the concept of each latent.
    """
    ids, acts = (array[..., : config.top_k] for array in kept.at(config.position))
    costs = tracking.link_costs(tracks, decoders, tracker_config(config))
    profiles = tracking.layer_profiles(
        tracks,
        costs,
        feature_ids=ids,
        activations=acts,
        recon_error=kept.recon_error_at(config.position),
        no_match=config.association_threshold,
    )
    by_position = {config.position: tracks}
    if _PROMPT in kept.positions and config.position != _PROMPT:
        by_position[_PROMPT] = follow_latents(*kept.at(_PROMPT), decoders, config)
    births, names = [], []
    for position, followed in by_position.items():
        for index, token in enumerate(_TOKENS):
            births.append(tracking.late_births(followed, decoders, kept.token_directions[:, index]))
            names += [f"{name} at {position} for {token}" for name in tracking.LATE_BIRTH_COLUMNS]
    at_prompt = by_position.get(_PROMPT)
    prompt = None if at_prompt is None else tracking.divergence_metrics(at_prompt)
    return ({} if prompt is None else {"prompt": Family(prompt, tracking.DIVERGENCE_COLUMNS)}) | {
        "profiles": Family(profiles, tracking.profile_columns(tracks.n_layers)),
        "concepts": Family(tracking.concept_bags(tracks, concepts)),
        "late_births": Family(np.concatenate(births, axis=1), tuple(names)),
    }


def neuron_metrics(kept: Features, config: TrackingConfig) -> np.ndarray:
    """Return the metrics [N Q] of tracks of the residual stream's largest coordinates in place of latents.

    They are those of the tracked position where it keeps a residual stream, else of the last answer token.
    """
    position = config.position if config.position in RESID_POSITIONS else _NEURON_POSITION
    resid = kept.resid[:, :, RESID_POSITIONS.index(position)]
    ids, sizes = tracking.largest_coordinates(resid, k=config.top_k)
    tracks = follow_latents(ids, sizes, tracking.SignedCoordinates(*resid.shape[1:]), config)
    return tracking.divergence_metrics(tracks)


def family_arrays(families: Mapping[str, Family]) -> dict[str, np.ndarray]:
    """Return the families as arrays, for an .npz; `read_families` is the way back."""
    arrays: dict[str, np.ndarray] = {}
    for name, family in families.items():
        if isinstance(family.matrix, sp.csr_matrix):
            arrays |= {f"{name}_{part}": np.asarray(getattr(family.matrix, part)) for part in _CONCEPT_PARTS}
        else:
            arrays |= {name: np.asarray(family.matrix), f"{name}_names": np.array(family.columns)}
    return arrays


def read_families(arrays: Mapping[str, Any], path: Any) -> dict[str, Family]:
    """Return what `family_arrays` gave.

    Raises:
        InputError: an older version wrote the file, which has none.
    """
    parts = [f"concepts_{part}" for part in _CONCEPT_PARTS]
    dense = [name for name in ("prompt", "profiles", "late_births") if name != "prompt" or "prompt" in arrays]
    missing = [name for name in (*parts, *dense, *(f"{name}_names" for name in dense)) if name not in arrays]
    if missing:
        raise InputError(f"{path} has no {missing[0]}, as an older version wrote it; run jaxsae track --redo")
    data, indices, indptr, shape = (arrays[name] for name in parts)
    bags = Family(sp.csr_matrix((data, indices, indptr), shape=tuple(shape.tolist())))
    return {name: Family(arrays[name], tuple(arrays[f"{name}_names"].tolist())) for name in dense} | {"concepts": bags}
