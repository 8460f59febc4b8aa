"""Run answers through the language model and the SAEs, and keep the strongest latents at chosen positions.

Positions of an answer: `last_prompt`; `first_answer`, `last_answer`; `answer_max` and `answer_mean`, features pooled
over the answer's tokens; `answer_tokens`, each answer token by its number (`answer_00`, ...; empty beyond the answer's
end). An empty answer has no token of its own: its answer positions are the last token of the prompt, the state in
which the model decided to say nothing.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsae.artifacts import RESID_POSITIONS, Answer, Features, InputError
from jaxsae.models import LanguageModel
from jaxsae.sae import SaeSuite

_SINGLE = ("last_prompt", "first_answer", "last_answer")
_POOLED = ("answer_max", "answer_mean")
_LENGTH_STEP = 16  # texts are padded to a multiple of this, so that few shapes are compiled


def expand_positions(positions: Sequence[str], n_answer_tokens: int) -> tuple[str, ...]:
    """Return the kept positions' names, `answer_tokens` spelt out for answers of up to `n_answer_tokens` tokens.

    Raises:
        InputError: a name is not among those the module describes, or there is none.
    """
    known = (*_SINGLE, *_POOLED, "answer_tokens")
    unknown = [name for name in positions if name not in known]
    if unknown or not positions:
        raise InputError(f"features.positions holds {unknown or 'nothing'}, expected names among {', '.join(known)}")
    expanded: list[str] = []
    for name in positions:
        each = [f"answer_{token:02d}" for token in range(n_answer_tokens)] if name == "answer_tokens" else [name]
        expanded += [name for name in each if name not in expanded]
    return tuple(expanded)


def encode_answers(
    lm: LanguageModel,
    suite: SaeSuite,
    answers: Sequence[Answer],
    *,
    keep: int,
    positions: Sequence[str],
    batch: int,
    on_batch: Callable[[int], None] = lambda n_done: None,
) -> Features:
    """Return the features of every answer, from one forward pass over prompt and answer each.

    Args:
        suite: of all layers, as jax arrays.
        keep: latents kept for each layer and position (K).
        positions: names as the module describes them.
        batch: texts in a forward pass.
        on_batch: called with the number of answers done.

    Raises:
        InputError: suite and model differ in layers or width, a text is longer than the model's context, or a residual
            stream is not finite in float16.
    """
    if (suite.W_enc.shape[0], suite.d_model) != (lm.n_layers, lm.d_model):
        raise InputError(
            f"the SAEs are of {suite.W_enc.shape[0]} layers of width {suite.d_model}, {lm.name} has {lm.n_layers} of "
            f"width {lm.d_model}; train SAEs of this model"
        )
    longest = max(len(answer.answer_ids) for answer in answers)
    names = expand_positions(positions, max(longest, 1))
    rows: list[dict[str, np.ndarray]] = []
    order: list[int] = []
    for members, length in _batches(answers, batch):
        chosen = [answers[i] for i in members]
        texts = _Texts.of(chosen, batch, _padded(length, lm.n_positions, chosen), max(longest, 1))
        resid = lm.residuals(texts.token_ids)
        kept = keep_features(suite, resid, texts.prompt_end, texts.answer_at, texts.in_answer, names=names, n_kept=keep)
        rows.append({name: np.moveaxis(np.asarray(x), 1, 0)[: len(members)] for name, x in kept.items()})
        ends = resid[-1][jnp.arange(batch), jnp.asarray(texts.prompt_end)]
        rows[-1]["token_directions"] = token_directions(lm, ends, chosen)
        check_finite(rows[-1]["resid"], chosen)
        order += members
        on_batch(len(order))
    back = np.argsort(order)
    arrays = {name: np.concatenate([row[name] for row in rows])[back] for name in rows[0]}
    return make_features(answers, arrays, names)


def token_directions(
    lm: LanguageModel, ends: Float[Array, "B D"], answers: Sequence[Answer]
) -> Float[np.ndarray, "rows 2 D"]:
    """Return `Features.token_directions` of each answer.

    Args:
        ends: the last layer's residual stream at the last prompt token; as many rows as answers, or more.
    """
    emitted = np.zeros(len(ends), np.int32)
    emitted[: len(answers)] = [answer.answer_ids[0] if answer.answer_ids else 0 for answer in answers]
    logits = lm.logits_from(lm.n_layers - 1, ends[:, None])[:, 0]
    others = jnp.where(jnp.arange(logits.shape[1]) == emitted[:, None], -jnp.inf, logits)
    tokens = emitted, jnp.argmax(others, axis=1)
    directions = np.stack([np.asarray(lm.logit_directions(ends, each), np.float32) for each in tokens], axis=1)
    is_empty = [not answer.answer_ids for answer in answers]
    return np.where(np.array(is_empty)[:, None, None], np.float32(0), directions[: len(answers)])


def make_features(answers: Sequence[Answer], arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> Features:
    """Return the `Features` of answers that carry their own log-probabilities."""
    return Features(
        ids=tuple(answer.id for answer in answers),
        positions=names,
        logprobs=np.array([p for answer in answers for p in answer.logprobs], np.float32),
        offsets=np.cumsum([0, *(len(answer.logprobs) for answer in answers)]),
        **arrays,
    )


def _batches(answers: Sequence[Answer], batch: int) -> Iterator[tuple[list[int], int]]:
    """Yield (indices, longest text) of batches of texts of like length."""
    lengths = [len(answer.prompt_ids) + len(answer.answer_ids) for answer in answers]
    order = sorted(range(len(answers)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        yield members, lengths[members[-1]]


def _padded(length: int, n_positions: int, answers: Sequence[Answer]) -> int:
    if length > n_positions:
        longest = max(answers, key=lambda answer: len(answer.prompt_ids) + len(answer.answer_ids))
        raise InputError(
            f"question {longest.id}: prompt and answer have {length} tokens, the model's context is {n_positions}"
        )
    return min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, n_positions)


class _Texts:
    """A batch of texts as arrays: ids, padded on the right, and where prompt and answer are."""

    def __init__(self, n_rows: int, length: int, n_answer_tokens: int) -> None:
        self.token_ids: Int[np.ndarray, "B T"] = np.zeros((n_rows, length), np.int32)
        self.prompt_end: Int[np.ndarray, " B"] = np.zeros(n_rows, np.int32)
        self.answer_at: Int[np.ndarray, "B A"] = np.zeros((n_rows, n_answer_tokens), np.int32)
        self.in_answer: Bool[np.ndarray, "B A"] = np.zeros((n_rows, n_answer_tokens), bool)
        self.in_answer[:, 0] = True

    @classmethod
    def of(cls, answers: Sequence[Answer], n_rows: int, length: int, n_answer_tokens: int) -> "_Texts":
        texts = cls(n_rows, length, n_answer_tokens)
        for row, answer in enumerate(answers):
            ids = answer.prompt_ids + answer.answer_ids
            texts.token_ids[row, : len(ids)] = ids
            texts.prompt_end[row] = len(answer.prompt_ids) - 1
            at = np.arange(len(answer.prompt_ids), len(ids)) if answer.answer_ids else texts.prompt_end[row : row + 1]
            texts.answer_at[row, : len(at)] = at
            texts.in_answer[row, : len(at)] = True
        return texts


@functools.partial(jax.jit, static_argnames=("names", "n_kept"))
def keep_features(
    suite: SaeSuite,
    resid: Float[Array, "L B T D"],
    prompt_end: Int[Array, " B"],
    answer_at: Int[Array, "B A"],
    in_answer: Bool[Array, "B A"],
    *,
    names: tuple[str, ...],
    n_kept: int,
) -> dict[str, Array]:
    """Return the batch's part of `Features`, each array [L B ...]; one layer after the other, to save memory."""
    at = jnp.concatenate([prompt_end[:, None], answer_at], axis=1)

    def one_layer(layer: tuple[SaeSuite, Float[Array, "B T D"]]) -> dict[str, Array]:
        sae, stream = layer
        rows = jnp.take_along_axis(stream.astype(jnp.float32), at[..., None], axis=1)
        feats, error = encode_rows(sae, rows)
        return pool_rows(rows, feats, error, in_answer, names=names, n_kept=n_kept)

    return lax.map(one_layer, (suite, resid))


def encode_rows(sae: SaeSuite, rows: Float[Array, "*axes D"]) -> tuple[Float[Array, "*axes F"], Float[Array, "*axes"]]:
    """Return one layer's features, and the squared SAE error over the squared distance from b_dec."""
    feats = sae.encode(rows)
    return feats, jnp.sum((rows - sae.decode(feats)) ** 2, axis=-1) / jnp.sum((rows - sae.b_dec) ** 2, axis=-1)


def pool_rows(
    rows: Float[Array, "B A1 D"],
    feats: Float[Array, "B A1 F"],
    error: Float[Array, "B A1"],
    in_answer: Bool[Array, "B A"],
    *,
    names: tuple[str, ...],
    n_kept: int,
) -> dict[str, Array]:
    """Return one layer's part of `Features` [B ...]; column 0 is the last prompt token, the answer's tokens follow."""
    last, n_latents = jnp.sum(in_answer, axis=1), feats.shape[-1]
    pools = [_pool(name, feats, error[..., None], in_answer, last) for name in names]
    activations, ids = lax.top_k(jnp.stack([pooled for pooled, _ in pools], axis=1), min(n_kept, n_latents))
    missing = [(0, 0), (0, 0), (0, max(0, n_kept - n_latents))]
    kept_resid = [_pool(name, rows, rows, in_answer, last)[0] for name in RESID_POSITIONS]
    return {
        "feature_ids": jnp.pad(jnp.where(activations > 0, ids, -1), missing, constant_values=-1),
        "activations": jnp.pad(jnp.maximum(activations, 0.0), missing),
        "recon_error": jnp.stack([pooled_error[:, 0] for _, pooled_error in pools], axis=1),
        "resid": jnp.stack(kept_resid, axis=1).astype(jnp.float16),
    }


def _pool(
    name: str,
    rows: Float[Array, "B A1 X"],
    others: Float[Array, "B A1 Y"],
    in_answer: Bool[Array, "B A"],
    last: Int[Array, " B"],
) -> tuple[Float[Array, "B X"], Float[Array, "B Y"]]:
    """Return `rows` and `others` at a position; column 0 is the last prompt token, the answer's tokens follow.

    Max pooling takes the largest of `rows`, but the mean of `others`.
    """
    if name in _POOLED:
        weights = in_answer[..., None] / jnp.sum(in_answer, axis=1)[:, None, None]
        mean = jnp.sum(rows[:, 1:] * weights, axis=1)
        largest = jnp.max(jnp.where(in_answer[..., None], rows[:, 1:], -jnp.inf), axis=1)
        return largest if name == "answer_max" else mean, jnp.sum(others[:, 1:] * weights, axis=1)
    first = jnp.ones_like(last)
    column = {"last_prompt": jnp.zeros_like(last), "first_answer": first, "last_answer": last}.get(name)
    if column is not None:
        index = column[:, None, None]
        return jnp.take_along_axis(rows, index, axis=1)[:, 0], jnp.take_along_axis(others, index, axis=1)[:, 0]
    token = int(name.removeprefix("answer_"))
    here = in_answer[:, token, None]
    return jnp.where(here, rows[:, 1 + token], 0.0), jnp.where(here, others[:, 1 + token], 0.0)


def check_finite(resid: Float[np.ndarray, "B L 3 D"], answers: Sequence[Answer]) -> None:
    """Raise InputError, naming answer and layer, if a kept residual stream overflowed."""
    is_bad = ~np.isfinite(resid).all(axis=(2, 3))
    if is_bad.any():
        row, layer = np.argwhere(is_bad)[0]
        raise InputError(
            f"question {answers[row].id}: the residual stream of layer {layer} is not finite in float16 (limit 65504)"
        )
