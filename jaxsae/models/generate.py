"""Greedy answers with the log-probability of each token, and the token ids that end an answer.

Prompts are padded on the right to a few lengths and run in batches of a fixed number of rows, so that few programs
are compiled; attention is causal, so the padding changes nothing. Each step runs the whole text again: there is no
key-value cache.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxsae.artifacts import InputError
from jaxsae.models.weights import FAMILIES

TOKENS_PER_BATCH = 2048  # rows times length of one forward pass


@dataclasses.dataclass(frozen=True)
class Generation:
    """One greedy continuation.

    Attributes:
        answer_ids: the tokens generated before the stop token, or all `max_new_tokens` of them.
        logprobs: log-probability of each answer id given all before it, nats.
        stopped: whether a stop token ended it.
    """

    answer_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool


def greedy(
    config: Any,
    params: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = frozenset(),
    dtype: str = "float32",
) -> list[Generation]:
    """Continue each prompt with its most probable token, up to a stop token or `max_new_tokens`.

    Ties go to the lowest id. The number of rows of a batch depends on how many prompts of about one length there are,
    and a log-probability may differ in its last digits between batch sizes. No prompts give an empty list.

    Raises:
        InputError: a prompt is empty, does not fit into the context together with `max_new_tokens`, or holds an id
            outside the vocabulary; a stop id is outside it; or the logits are not finite. Prompts are named by index.
    """
    _check(config, prompts, max_new_tokens, stop_ids)
    is_stop = np.zeros(config.vocab_size, bool)
    is_stop[list(stop_ids)] = True
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[min(_padded_length(len(prompt)), config.n_positions - max_new_tokens)].append(index)
    generations: dict[int, Generation] = {}
    for length, indices in sorted(by_length.items()):
        n_rows = _n_rows(len(indices), length + max_new_tokens)
        for start in range(0, len(indices), n_rows):
            batch = indices[start : start + n_rows]
            ids, lengths = _pad([prompts[index] for index in batch], n_rows, length + max_new_tokens)
            decoded = _decode(config, dtype, max_new_tokens, params, ids, lengths, is_stop)
            generations.update(zip(batch, _unpack(decoded, batch), strict=True))
    return [generations[index] for index in range(len(prompts))]


def _check(config: Any, prompts: Sequence[Any], max_new_tokens: int, stop_ids: Collection[int]) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    for token_id in stop_ids:
        if not 0 <= token_id < config.vocab_size:
            raise InputError(f"stop id {token_id} is outside the vocabulary, 0 to {config.vocab_size - 1}")
    for index, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.size == 0:
            raise InputError(f"prompt {index} has shape {list(ids.shape)}, expected a row of at least one token id")
        if not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"prompt {index} has dtype {ids.dtype}, expected integer token ids")
        if ids.size + max_new_tokens > config.n_positions:
            raise InputError(
                f"prompt {index} has {ids.size} tokens, which with max_new_tokens = {max_new_tokens} does not fit into "
                f"the context of {config.n_positions}; shorten it"
            )
        outside = ids[(ids < 0) | (ids >= config.vocab_size)]
        if outside.size:
            raise InputError(
                f"prompt {index} holds token id {outside[0]}, outside the vocabulary, 0 to {config.vocab_size - 1}"
            )


def _padded_length(length: int) -> int:
    """Round up to 8, 12, 16, 24, 32, 48, ...: at most half more than needed (from 8 on), two programs per doubling."""
    step = max(4, 1 << max(0, (length - 1).bit_length() - 2))
    return max(8, -(-length // step) * step)


def _n_rows(n_prompts: int, length: int) -> int:
    """Choose the rows of a batch: a power of two, enough for all prompts, at most `TOKENS_PER_BATCH` tokens."""
    most = max(1, TOKENS_PER_BATCH // length)
    return min(1 << (most.bit_length() - 1), 1 << (n_prompts - 1).bit_length())


def _pad(
    prompts: Sequence[Sequence[int] | np.ndarray], n_rows: int, length: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Put prompts into [n_rows, length], zeros on the right; rows without a prompt have length 0."""
    ids, lengths = np.zeros((n_rows, length), np.int32), np.zeros(n_rows, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return ids, lengths


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    config: Any,
    dtype: str,
    n_new: int,
    params: Any,
    ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    is_stop: Bool[Array, " V"],
) -> dict[str, Array]:
    """Run the greedy loop until every row has stopped; rows of length 0 count as stopped."""
    logits_at = FAMILIES[config.model_type].logits_at
    rows = jnp.arange(ids.shape[0])

    def step(state):
        at = state["step"]
        position = jnp.maximum(lengths + at - 1, 0)
        logits = logits_at(config, params, state["ids"], position, dtype=dtype)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logprob = jax.nn.log_softmax(logits)[rows, token]
        stopped = state["stopped"] | is_stop[token]
        written = jnp.where(stopped, state["ids"][rows, position + 1], token)
        return {
            "step": at + 1,
            "ids": state["ids"].at[rows, position + 1].set(written),
            "logprobs": state["logprobs"].at[:, at].set(jnp.where(state["stopped"], 0.0, logprob)),
            "n_tokens": state["n_tokens"] + ~stopped,
            "stopped": stopped,
        }

    start = {
        "step": jnp.int32(0),
        "ids": jnp.asarray(ids),
        "logprobs": jnp.zeros((len(rows), n_new), jnp.float32),
        "n_tokens": jnp.zeros(len(rows), jnp.int32),
        "stopped": lengths == 0,
    }
    final = jax.lax.while_loop(lambda state: (state["step"] < n_new) & ~state["stopped"].all(), step, start)
    answers = lengths[:, None] + jnp.arange(n_new)
    return {**final, "answer_ids": jnp.take_along_axis(final["ids"], answers, axis=1)}


def _unpack(decoded: Mapping[str, Array], batch: Sequence[int]) -> Iterable[Generation]:
    host = {name: np.asarray(value) for name, value in decoded.items()}
    for row, index in enumerate(batch):
        if not np.isfinite(host["logprobs"][row]).all():
            raise InputError(
                f"the logits for prompt {index} are not finite; the model overflows or its weights are broken"
            )
        n_tokens = int(host["n_tokens"][row])
        yield Generation(
            tuple(host["answer_ids"][row, :n_tokens].tolist()),
            tuple(host["logprobs"][row, :n_tokens].tolist()),
            bool(host["stopped"][row]),
        )


def stop_token_ids(tokenizer: Any, strings: Iterable[str]) -> frozenset[int]:
    """Return the ids of all tokens whose text contains one of `strings`, and the tokenizer's end-of-sequence id.

    A string that only several tokens spell together never stops an answer.

    Raises:
        InputError: there is no tokenizer, or a string is empty (it is in every token).
    """
    strings = [strings] if isinstance(strings, str) else list(strings)
    if tokenizer is None:
        raise InputError(f"stop strings {strings} need a tokenizer, and the model's folder has no tokenizer files")
    if "" in strings:
        raise InputError(f"stop strings {strings} hold an empty string, which every token contains")
    ids = sorted(set(tokenizer.get_vocab().values()))
    texts = (tokenizer.decode([token_id], clean_up_tokenization_spaces=False) for token_id in ids)
    stops = {token_id for token_id, text in zip(ids, texts, strict=True) if any(s in text for s in strings)}
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return frozenset(stops)
