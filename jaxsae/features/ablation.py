"""Take latents out of the language model while it reads an answer, and read it again: what did they do?

At the output of each block the latents named for that layer are encoded where the answer is read (at the last prompt
token and at every answer token) and what they add to the residual stream there, activation times decoder row, is
subtracted before the next block runs. What an SAE leaves unexplained stays in the stream. A latent that an earlier
ablation has already silenced adds nothing, so nothing is subtracted twice.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsae.artifacts import Answer, Features, InputError
from jaxsae.features.encode import check_finite, keep_features, make_features, token_directions
from jaxsae.features.prefixes import Place, next_token_scores
from jaxsae.models import LanguageModel, decoder
from jaxsae.sae import SaeSuite

_ROWS = 8  # ablations in a forward pass
_SLOT_STEP = 4  # latents of a layer are padded to a multiple of this, so that few shapes are compiled


def read_ablated(
    lm: LanguageModel,
    suite: SaeSuite,
    answer: Answer,
    latents: Sequence[Sequence[tuple[int, int]]],
    *,
    keep: int,
    names: tuple[str, ...],
) -> tuple[tuple[Answer, ...], Features]:
    """Read one answer once for each ablation; return it with the changed log-probabilities, and its features.

    Args:
        latents: for each of N ablations the (layer, latent) pairs to take out; none leaves the model as it is.
        keep, names: as for `read_prefixes`.

    Raises:
        InputError: a layer or a latent does not exist, the text does not fit the context, or a number is not finite.
    """
    place = Place.of(answer, lm.n_positions, names)
    answers: list[Answer] = []
    parts: list[dict[str, np.ndarray]] = []
    n_slots = max((_most_in_a_layer(pairs) for pairs in latents), default=0)
    n_slots = max(_SLOT_STEP, -(-n_slots // _SLOT_STEP) * _SLOT_STEP)
    is_read = np.arange(len(place.at)) <= place.n_answer
    for start in range(0, len(latents), _ROWS):
        chosen = latents[start : start + _ROWS]
        slots = _slots(chosen, lm.n_layers, suite.n_latents, n_slots)
        token_ids, at = np.repeat(place.token_ids, _ROWS, axis=0), np.repeat(place.at[None], _ROWS, axis=0)
        resid = _residuals(lm.config, lm.dtype, lm.params, suite, lm.check_token_ids(token_ids), at, is_read, slots)
        in_answer = np.repeat(place.is_answer[None], _ROWS, axis=0)
        kept = keep_features(suite, resid, at[:, 0], at[:, 1:], in_answer, names=names, n_kept=keep)
        parts.append({name: np.moveaxis(np.asarray(x), 1, 0)[: len(chosen)] for name, x in kept.items()})
        last = jnp.take_along_axis(resid[-1], jnp.asarray(at)[..., None], axis=1)
        again = [dataclasses.replace(answer, id=str(start + row)) for row in range(len(chosen))]
        scores = next_token_scores(lm, last, again)
        answers += [
            dataclasses.replace(one, logprobs=logprobs, entropies=entropies)
            for one, logprobs, entropies in zip(again, *scores, strict=True)
        ]
        check_finite(parts[-1]["resid"], again)
        parts[-1]["token_directions"] = token_directions(lm, last[:, 0], again)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return tuple(answers), make_features(answers, arrays, names)


def _most_in_a_layer(pairs: Sequence[tuple[int, int]]) -> int:
    layers = [layer for layer, _ in pairs]
    return max((layers.count(layer) for layer in set(layers)), default=0)


def _slots(
    ablations: Sequence[Sequence[tuple[int, int]]], n_layers: int, n_latents: int, n_slots: int
) -> Int[np.ndarray, "L B S"]:
    """Return the latents to take out of each row at each layer, -1 in empty slots."""
    slots = np.full((n_layers, _ROWS, n_slots), -1, np.int32)
    for row, pairs in enumerate(ablations):
        for layer in sorted({layer for layer, _ in pairs}):
            ids = sorted({latent for at, latent in pairs if at == layer})
            if not 0 <= layer < n_layers or ids[0] < 0 or ids[-1] >= n_latents:
                raise InputError(
                    f"latents {ids} of layer {layer} are to be ablated, the suite has {n_latents} of {n_layers} layers"
                )
            slots[layer, row, : len(ids)] = ids
    return slots


@functools.partial(jax.jit, static_argnums=(0, 1))
def _residuals(
    config: Any,
    dtype: str,
    params: Any,
    suite: SaeSuite,
    token_ids: Int[Array, "B T"],
    at: Int[Array, "B A1"],
    is_read: Bool[Array, " A1"],
    slots: Int[Array, "L B S"],
) -> Float[Array, "L B T D"]:
    """Return the residual streams of the ablated model."""

    def ablate(layer: Int[Array, ""], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        sae = suite.layer(layer)
        feats = sae.encode(jnp.take_along_axis(x, at[..., None], axis=1))
        ids, is_real = jnp.maximum(slots[layer], 0), slots[layer] >= 0
        acts = jnp.take_along_axis(feats, ids[:, None, :], axis=-1) * is_real[:, None, :] * is_read[:, None]
        share = jnp.einsum("bas,bsd->bad", acts, sae.W_dec[ids], precision=jax.lax.Precision.HIGHEST)
        return x.at[jnp.arange(len(x))[:, None], at].add(-share)

    return decoder.residuals(config, params, token_ids, dtype=dtype, edit=ablate)
