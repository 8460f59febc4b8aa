"""Read one answer closely: what the model and the SAEs say of it when it is cut after each of its tokens.

One forward pass serves all cuts, as nothing in the model looks ahead. A text is read alone and padded by its own
length, so that what is said of it never depends on other texts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsae.artifacts import Answer, Features, InputError
from jaxsae.features.encode import check_finite, encode_rows, make_features, pool_rows, token_directions
from jaxsae.models import LanguageModel
from jaxsae.models.scores import token_scores
from jaxsae.sae import SaeSuite

_TEXT_STEP = 16  # texts are padded to a multiple of this, so that few shapes are compiled
_ANSWER_STEP = 8  # and answers to a multiple of this


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was read of one answer of A tokens.

    Attributes:
        cuts: the answer after 1, 2, ... A of its tokens, with log-probabilities and entropies, ids "1" to "A"; an empty
            answer is its own only cut, "0". The text of all but the last is the decoded ids.
        features: a row for each cut.
        token_features: for each layer the active latents [1 + A, F] of the last prompt token and of each answer token.
    """

    cuts: tuple[Answer, ...]
    features: Features
    token_features: tuple[sp.csr_matrix, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the tokens of one answer stand, padded so that few shapes are compiled.

    Attributes:
        token_ids: of prompt and answer, zeros behind them.
        at: the last prompt token, then the answer's; index 0 where the padding is.
        n_answer: A.
    """

    token_ids: Int[np.ndarray, "1 T"]
    at: Int[np.ndarray, " A1"]
    n_answer: int

    @classmethod
    def of(cls, answer: Answer, n_positions: int, names: Sequence[str]) -> "Place":
        """Place an answer in a text of at most `n_positions` tokens, with room for the positions `answer_NN`.

        Raises:
            InputError: prompt and answer are longer.
        """
        ids, n_answer = answer.prompt_ids + answer.answer_ids, len(answer.answer_ids)
        if len(ids) > n_positions:
            raise InputError(
                f"{answer.id}: the prompt has {len(answer.prompt_ids)} tokens and the answer {n_answer}, together "
                f"{len(ids)}; the model's context is {n_positions}"
            )
        token_ids = np.zeros((1, min(-(-len(ids) // _TEXT_STEP) * _TEXT_STEP, n_positions)), np.int32)
        token_ids[0, : len(ids)] = ids
        named = [int(name.removeprefix("answer_")) + 1 for name in names if name.removeprefix("answer_").isdigit()]
        room = max(-(-n_answer // _ANSWER_STEP) * _ANSWER_STEP, _ANSWER_STEP, *named)
        at = np.zeros(1 + room, np.int32)
        first = len(answer.prompt_ids) - 1
        at[: 1 + n_answer] = np.arange(first, len(ids))
        if n_answer == 0:
            at[1] = first  # an empty answer's positions are the last token of the prompt
        return cls(token_ids, at, n_answer)

    @property
    def is_answer(self) -> Bool[np.ndarray, " A"]:
        """Mark the columns that `_pool` counts to the answer."""
        return np.arange(len(self.at) - 1) < max(self.n_answer, 1)


def read_prefixes(lm: LanguageModel, suite: SaeSuite, answer: Answer, *, keep: int, names: tuple[str, ...]) -> Reading:
    """Read one answer; its log-probabilities and entropies are computed here, those of `answer` are not looked at.

    Args:
        suite: of all layers, as jax arrays.
        keep: latents kept for each layer and position (K).
        names: kept positions, spelt out as in `Features.positions`.

    Raises:
        InputError: prompt and answer are longer than the model's context, or a number is not finite.
    """
    place = Place.of(answer, lm.n_positions, names)
    resid = lm.residuals(place.token_ids)[:, 0]
    rows = jnp.take(resid, jnp.asarray(place.at), axis=1).astype(jnp.float32)
    logprobs, entropies = (x[0] for x in next_token_scores(lm, rows[-1:], [answer]))
    cuts = _cut(answer, logprobs, entropies, lm)
    parts, token_features = [], []
    for layer in range(lm.n_layers):
        sae = suite.layer(layer)
        feats, error = _encode(sae, rows[layer])
        pooled = _pool_prefixes(rows[layer], feats, error, jnp.asarray(place.is_answer), names=names, n_kept=keep)
        parts.append({name: np.asarray(x)[: len(cuts)] for name, x in pooled.items()})
        token_features.append(sp.csr_matrix(np.asarray(feats)[: 1 + place.n_answer]))
    arrays = {name: np.stack([part[name] for part in parts], axis=1) for name in parts[0]}
    check_finite(arrays["resid"], cuts)
    arrays["token_directions"] = np.repeat(token_directions(lm, rows[-1, :1], [answer]), len(cuts), axis=0)
    return Reading(cuts, make_features(cuts, arrays, names), tuple(token_features))


def next_token_scores(
    lm: LanguageModel, rows: Float[Array, "B A1 D"], answers: Sequence[Answer]
) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Return log-probabilities and entropies (nats) of each answer's tokens from the last layer's residual stream.

    Args:
        rows: at the last prompt token and at the answer's tokens; as many rows as answers, or more.

    Raises:
        InputError: one is not finite.
    """
    n_rows, width = rows.shape[0], rows.shape[1]
    answer_ids = np.zeros((n_rows, width), np.int32)
    for row, answer in enumerate(answers):
        answer_ids[row, : len(answer.answer_ids)] = answer.answer_ids
    scores = token_scores(lm.logits_from(lm.n_layers - 1, rows), jnp.asarray(answer_ids))
    found: list[list[tuple[float, ...]]] = []
    for values in map(np.asarray, scores):
        found.append(
            [tuple(row[: len(answer.answer_ids)].tolist()) for row, answer in zip(values, answers, strict=False)]
        )
        for answer, of_answer in zip(answers, found[-1], strict=True):
            if not np.isfinite(of_answer).all():
                raise InputError(f"{answer.id}: a log-probability of {lm.name} is not finite; use float32")
    return found[0], found[1]


def _cut(
    answer: Answer, logprobs: tuple[float, ...], entropies: tuple[float, ...], lm: LanguageModel
) -> tuple[Answer, ...]:
    """Return the answer after each of its tokens."""
    n_tokens, cuts = len(answer.answer_ids), []
    for n in range(min(1, n_tokens), n_tokens + 1):
        ids = answer.answer_ids[:n]
        text = answer.answer if n == n_tokens else lm.tokenizer.decode(ids, skip_special_tokens=True).strip()
        scores: dict[str, Any] = {"logprobs": logprobs[:n], "entropies": entropies[:n]}
        cuts.append(dataclasses.replace(answer, id=str(n), answer=text, answer_ids=ids, **scores))
    return tuple(cuts)


@jax.jit
def _encode(sae: SaeSuite, rows: Float[Array, "A1 D"]) -> tuple[Float[Array, "A1 F"], Float[Array, " A1"]]:
    return encode_rows(sae, rows)


@functools.partial(jax.jit, static_argnames=("names", "n_kept"))
def _pool_prefixes(
    rows: Float[Array, "A1 D"],
    feats: Float[Array, "A1 F"],
    error: Float[Array, " A1"],
    is_answer: Bool[Array, " A"],
    *,
    names: tuple[str, ...],
    n_kept: int,
) -> dict[str, Array]:
    """Return one layer's part of `Features` for each cut [A ...], one after the other, to save memory."""

    def one_cut(n_tokens: Int[Array, ""]) -> dict[str, Array]:
        in_answer = (is_answer & (jnp.arange(len(is_answer)) < n_tokens))[None]
        pooled = pool_rows(rows[None], feats[None], error[None], in_answer, names=names, n_kept=n_kept)
        return jax.tree.map(lambda x: x[0], pooled)

    return lax.map(one_cut, 1 + jnp.arange(len(is_answer)))
