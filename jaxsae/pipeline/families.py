"""Families of track features of answers: made alike for a run's answers and for a single one that is scored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int

from jaxsae import tracking
from jaxsae.artifacts import Features, InputError
from jaxsae.config import TrackingConfig
from jaxsae.detection import Family
from jaxsae.tracking.links import Decoders

PROMPT = "last_prompt"  # where the answer's first token is chosen
_TOKENS = ("the emitted token", "the best other token")  # of `Features.token_directions`
_CONCEPT_PARTS = ("data", "indices", "indptr", "shape")


def make_families(
    kept: Features,
    followed: Mapping[str, tracking.Tracks],
    decoders: Decoders,
    concepts: Int[np.ndarray, "L F"],
    config: TrackingConfig,
) -> dict[str, Family]:
    """Return every family of the answers' tracks, by name; "prompt" only if the last token of the prompt was followed.

    Profiles and concepts are of the first of `followed`; late births are looked at in all: how far they point at the
    token that was emitted, and at its best rival.

    Args:
        followed: tracks of `kept`, or what is left of them, by position.
        concepts: the concept of each latent.
    """
    position, tracks = next(iter(followed.items()))
    ids, acts = (array[..., : config.top_k] for array in kept.at(position))
    fields = dataclasses.fields(tracking.TrackerConfig)
    tracker = tracking.TrackerConfig(**{field.name: getattr(config, field.name) for field in fields})
    profiles = tracking.layer_profiles(
        tracks,
        tracking.link_costs(tracks, decoders, tracker),
        feature_ids=ids,
        activations=acts,
        recon_error=kept.recon_error_at(position),
        no_match=config.association_threshold,
    )
    births, names = [], []
    for place, each in followed.items():
        births.append(tracking.late_births(each, decoders, kept.token_directions).reshape(each.n_samples, -1))
        names += [f"{name} at {place} for {token}" for token in _TOKENS for name in tracking.LATE_BIRTH_COLUMNS]
    families = {
        "profiles": Family(profiles, tracking.profile_columns(tracks.n_layers)),
        "concepts": Family(tracking.concept_bags(tracks, concepts)),
        "late_births": Family(np.concatenate(births, axis=1), tuple(names)),
    }
    if PROMPT in followed:
        metrics = tracking.divergence_metrics(followed[PROMPT])
        families["prompt"] = Family(metrics, tracking.DIVERGENCE_COLUMNS)
    return families


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
