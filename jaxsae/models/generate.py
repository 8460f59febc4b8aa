"""Continue prompts, greedily or by sampling: tokens, their log-probabilities and their residual streams.

Prompts are padded on the right to a few lengths and run in batches of a few sizes, so that few programs are compiled;
attention is causal, so the padding changes nothing. A prompt is read once; after that each token costs one step over
the kept keys and values. `STEPS_PER_DISPATCH` steps run on the device at a time; in between, the host looks for stop
strings, which several tokens may spell together.
"""

import dataclasses
import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsae.artifacts import InputError
from jaxsae.models import decoder
from jaxsae.models.scores import token_scores

TOKENS_PER_BATCH = 2048  # rows times length of one forward pass
STEPS_PER_DISPATCH = 8  # most tokens a row makes in vain after a stop string


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
        answer_ids: the tokens generated before the stop token or stop string, or all `max_new_tokens` of them.
        logprobs: log-probability of each answer id given all before it, nats; of the model's own distribution
            (temperature 1, all tokens), however it was drawn.
        entropies: entropy of that distribution over all tokens, nats, one per answer id.
        stopped: whether a stop token or a stop string ended it.
        residuals: the residual stream after every block at each answer id, from the passes that generated the answer;
            None if it was not asked for.
    """

    answer_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    stopped: bool
    residuals: Float[np.ndarray, "L T D"] | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to continue prompts.

    Attributes:
        max_new_tokens: most tokens of an answer.
        stop_ids: tokens that end an answer and are not part of it (see `stop_token_ids`).
        stop_strings: texts that end an answer; its last token is the last one that ends before the text begins. The
            answer alone is searched, not the prompt.
        temperature: 0 takes the most probable token (ties: the lowest id); above 0 the logits are divided by it and a
            token is drawn.
        top_p: draw from the fewest most probable tokens that hold this share of the probability, 0 to 1; tokens as
            probable as the last of these count too.
        seed: of the draws. A prompt's draws depend on the seed, its ids and how many equal prompts stand before it,
            not on the other prompts.
        keep_residuals: whether to return the residual streams of the answers.
        n_rows: rows of every batch; None takes as few as hold the prompts. With a number, an answer does not depend on
            how many prompts there are, to the last bit.
    """

    max_new_tokens: int
    stop_ids: Collection[int] = frozenset()
    stop_strings: Sequence[str] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    keep_residuals: bool = False
    n_rows: int | None = None


def generate(
    config: Any,
    params: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    how: GenerateConfig,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    on_progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue each prompt up to a stop token, a stop string or `max_new_tokens`; no prompts give an empty list.

    Log-probabilities and residual streams may differ in their last digits between batch sizes (see `n_rows`).

    Args:
        tokenizer: of transformers, to read the answers with; needed for stop strings only.
        on_progress: called after each batch with the number of prompts continued so far.

    Raises:
        InputError: a prompt is empty, does not fit into the context together with `max_new_tokens`, or holds an id
            outside the vocabulary; a value of `how` is out of its range; or the logits are not finite. Prompts are
            named by index.
    """
    _check_how(config, how, tokenizer)
    _check_prompts(config, prompts, how.max_new_tokens)
    if not prompts:
        return []
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[min(_padded_length(len(prompt)), config.n_positions - how.max_new_tokens)].append(index)
    call = _Call(config, dtype, params, _unstack(params), how, tokenizer, _controls(config, how))
    draw_keys = _draw_keys(prompts, how.seed)
    generations: dict[int, Generation] = {}
    for length, indices in sorted(by_length.items()):
        n_rows = how.n_rows or _n_rows(len(indices), length + how.max_new_tokens)
        for start in range(0, len(indices), n_rows):
            batch = indices[start : start + n_rows]
            rows = _pad([prompts[index] for index in batch], n_rows, length)
            state = call.start(*rows, np.resize(draw_keys[batch], (n_rows, 2)))
            generations.update(zip(batch, _continue_batch(call, state, batch), strict=True))
            if on_progress is not None:
                on_progress(len(generations))
    return [generations[index] for index in range(len(prompts))]


def _check_how(config: Any, how: GenerateConfig, tokenizer: Any) -> None:
    if how.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {how.max_new_tokens}, expected at least 1")
    for token_id in how.stop_ids:
        if not 0 <= token_id < config.n_vocab:
            raise InputError(f"stop id {token_id} is outside the vocabulary, 0 to {config.n_vocab - 1}")
    if isinstance(how.stop_strings, str):
        raise InputError(f"stop_strings is the string {how.stop_strings!r}, expected a list of strings")
    if how.stop_strings:
        _check_stop_strings(tokenizer, list(how.stop_strings))
    if not 0 <= how.temperature < float("inf"):
        raise InputError(f"temperature is {how.temperature}, expected 0 (greedy) or a number above it")
    if not 0 < how.top_p <= 1:
        raise InputError(f"top_p is {how.top_p}, expected a number above 0 and at most 1")
    if how.top_p < 1 and how.temperature == 0:
        raise InputError(f"top_p is {how.top_p}, which has no effect at temperature 0; set a temperature or leave it 1")
    if how.n_rows is not None and how.n_rows < 1:
        raise InputError(f"n_rows is {how.n_rows}, expected at least 1")


def _check_stop_strings(tokenizer: Any, strings: list[str]) -> None:
    if tokenizer is None:
        raise InputError(f"stop strings {strings} need a tokenizer, and the model's folder has no tokenizer files")
    if "" in strings:
        raise InputError(f"stop strings {strings} hold an empty string, which every token contains")


def _check_prompts(config: Any, prompts: Sequence[Any], max_new_tokens: int) -> None:
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise InputError(
                f"prompt {index} is a text; give its token ids, jaxsae.data.encode_prompt(text, tokenizer)"
            )
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
        outside = ids[(ids < 0) | (ids >= config.n_vocab)]
        if outside.size:
            raise InputError(
                f"prompt {index} holds token id {outside[0]}, outside the vocabulary, 0 to {config.n_vocab - 1}"
            )


def _unstack(params: Any) -> Any:
    """On a CPU, put one dict a block in place of the stacked blocks; its arrays lie in the stacks, nothing is copied.

    The scan over the stacks would copy each layer out of them for every token.
    """
    stacked, tree = jax.tree.flatten(params["blocks"])
    device, *others = stacked[0].devices()
    if others or device.platform != "cpu":
        return params
    # What does not begin at a multiple of 64 bytes is copied after all: biases and norms of the narrowest models.
    by_layer = zip(*(jax.device_put(list(np.asarray(leaf)), device, may_alias=True) for leaf in stacked), strict=True)
    return {**params, "blocks": tuple(jax.tree.unflatten(tree, leaves) for leaves in by_layer)}


def _draw_keys(prompts: Sequence[Sequence[int] | np.ndarray], seed: int) -> UInt32[np.ndarray, "N 2"]:
    """Derive 64 bits for each prompt from the seed, its ids and the number of equal prompts before it."""
    n_seen: Counter[bytes] = Counter()
    digests = []
    for prompt in prompts:
        ids = np.asarray(prompt, np.int64).tobytes()
        digests.append(hashlib.sha256(f"{seed} {n_seen[ids]} ".encode() + ids).digest()[:8])
        n_seen[ids] += 1
    return np.frombuffer(b"".join(digests), "<u4").astype(np.uint32).reshape(-1, 2)


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


@dataclasses.dataclass(frozen=True)
class _Call:
    """What all batches of a call share; `step_params` are `params`, with unstacked blocks where that is faster."""

    config: Any
    dtype: str
    params: Any
    step_params: Any
    how: GenerateConfig
    tokenizer: Any
    controls: dict[str, Any]

    def start(self, ids: Any, lengths: Any, draw_keys: Any) -> dict[str, Any]:
        """Read the prompts and choose the first token of each row."""
        is_unstacked, n_new = isinstance(self.step_params["blocks"], tuple), self.how.max_new_tokens
        controls = {**self.controls, "draw_keys": draw_keys}
        return _start(self.config, self.dtype, n_new, is_unstacked, self.params, ids, lengths, controls)

    def advance(self, state: dict[str, Any], n_steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run up to `n_steps` tokens a row, at most `STEPS_PER_DISPATCH`, until every row has stopped."""
        keep = self.how.keep_residuals
        return _advance(self.config, self.dtype, keep, self.step_params, state, self.controls, np.int32(n_steps))


def _controls(config: Any, how: GenerateConfig) -> dict[str, Any]:
    controls: dict[str, Any] = {"is_stop": np.zeros(config.n_vocab, bool)}
    controls["is_stop"][list(how.stop_ids)] = True
    if how.temperature > 0:
        controls["temperature"] = np.float32(how.temperature)
    if how.top_p < 1:
        controls["top_p"] = np.float32(how.top_p)
    return controls


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(
    config: Any,
    dtype: str,
    n_new: int,
    is_unstacked: bool,
    params: Any,
    ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    controls: dict[str, Any],
) -> dict[str, Any]:
    n_slots = ids.shape[1] + n_new
    logits, sight = decoder.prefill(config, params, ids, jnp.maximum(lengths, 1), n_slots=n_slots, dtype=dtype)
    token, logprob, entropy = _choose(logits, controls, jnp.int32(0))
    return {
        "token": token,
        "logprob": logprob,
        "entropy": entropy,
        "n_chosen": jnp.int32(1),
        "stopped": (lengths == 0) | controls["is_stop"][token],
        "draw_keys": controls["draw_keys"],
        "sight": decoder.unstack_sight(sight) if is_unstacked else sight,
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _advance(
    config: Any,
    dtype: str,
    keep_residuals: bool,
    params: Any,
    state: dict[str, Any],
    controls: dict[str, Any],
    n_steps: Int[Array, ""],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the token of each row and choose the next, again and again; return the state and what each step made."""
    n_rows = len(state["token"])
    made = {
        "n_run": jnp.int32(0),
        "answer_ids": jnp.zeros((STEPS_PER_DISPATCH, n_rows), jnp.int32),
        "logprobs": jnp.zeros((STEPS_PER_DISPATCH, n_rows), jnp.float32),
        "entropies": jnp.zeros((STEPS_PER_DISPATCH, n_rows), jnp.float32),
    }
    if keep_residuals:
        made["residuals"] = jnp.zeros((STEPS_PER_DISPATCH, config.n_layers, n_rows, config.d_model), jnp.float32)

    def body(carry):
        state, made = carry
        logits, resid, sight = decoder.step(config, params, state["token"], state["sight"], dtype=dtype)
        how = {**controls, "draw_keys": state["draw_keys"]}
        token, logprob, entropy = _choose(logits, how, state["n_chosen"])
        at, stopped = made["n_run"], state["stopped"] | controls["is_stop"][token]
        fresh = {"answer_ids": token, "logprobs": logprob, "entropies": entropy, "residuals": resid}
        made = {name: made[name].at[at].set(fresh[name]) for name in made if name != "n_run"} | {"n_run": at + 1}
        state = {**state, "token": token, "logprob": logprob, "entropy": entropy, "stopped": stopped, "sight": sight}
        return {**state, "n_chosen": state["n_chosen"] + 1}, made

    def goes_on(carry):
        state, made = carry
        return (made["n_run"] < n_steps) & ~state["stopped"].all()

    return jax.lax.while_loop(goes_on, body, (state, made))


def _choose(
    logits: Float[Array, "B V"], controls: Mapping[str, Any], index: Int[Array, ""]
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Choose the token at `index` of each answer; return it, its log-probability and the entropy, at temperature 1."""
    scores = _noisy_scores(logits, controls, index) if "temperature" in controls else logits
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return token, *token_scores(logits, token)


def _noisy_scores(
    logits: Float[Array, "B V"], controls: Mapping[str, Any], index: Int[Array, ""]
) -> Float[Array, "B V"]:
    """Return scores the largest of which is a draw from softmax(logits / temperature), or from its top p.

    Source: the Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030, eq. (3).
    """
    scaled = logits / controls["temperature"]
    if "top_p" in controls:
        scaled = jnp.where(_is_in_top_p(jax.nn.softmax(scaled, axis=-1), controls["top_p"]), scaled, -jnp.inf)

    def noise(bits):
        key = jax.random.fold_in(jax.random.wrap_key_data(bits, impl="threefry2x32"), index)
        return jax.random.gumbel(key, logits.shape[1:])

    return scaled + jax.vmap(noise)(controls["draw_keys"])


def _is_in_top_p(probs: Float[Array, "B V"], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """Mark the fewest most probable tokens whose probabilities sum to `top_p` or more, and ties of the last of them.

    The probability of the last is found by halving over the bits of a float32, whose order is that of their values:
    exact, and on a CPU many times faster than a sort of the vocabulary.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        is_enough = jnp.where(probs >= threshold[:, None], probs, 0.0).sum(-1) >= top_p
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    above_one = int(np.float32(1.0).view(np.int32)) + 1
    bounds = (jnp.zeros(len(probs), jnp.int32), jnp.full(len(probs), above_one, jnp.int32))
    last, _ = jax.lax.fori_loop(0, 31, halve, bounds)
    return probs >= jax.lax.bitcast_convert_type(last, jnp.float32)[:, None]


def _continue_batch(call: _Call, state: dict[str, Any], batch: Sequence[int]) -> list[Generation]:
    """Run a batch to its end; `batch` holds the indices of the prompts in its first rows."""
    how, ends = call.how, dict.fromkeys(range(len(batch)))
    first = {"answer_ids": "token", "logprobs": "logprob", "entropies": "entropy"}
    made = {name: [np.asarray(state[one])[None]] for name, one in first.items()}
    made |= {"residuals": []} if how.keep_residuals else {}
    # The last token needs a pass of its own only for its residual stream.
    n_left = how.max_new_tokens if how.keep_residuals else how.max_new_tokens - 1
    _find_ends(call, made, ends)
    while n_left and None in ends.values():
        stopped = np.array([ends.get(row, 0) is not None for row in range(len(state["token"]))])
        state, fresh = call.advance({**state, "stopped": stopped}, min(n_left, STEPS_PER_DISPATCH))
        n_run = int(fresh["n_run"])
        for name, parts in made.items():
            parts.append(np.asarray(fresh[name])[:n_run])
        n_left -= n_run
        _find_ends(call, made, ends)
    whole = {name: np.concatenate(parts) for name, parts in made.items()}
    return [_generation(whole, row, ends[row], how.max_new_tokens, index) for row, index in enumerate(batch)]


def _find_ends(call: _Call, made: Mapping[str, list[np.ndarray]], ends: dict[int, int | None]) -> None:
    """Note in `ends`, for each row that goes on, how many tokens stand before a stop token or stop string."""
    answer_ids = np.concatenate(made["answer_ids"])[: call.how.max_new_tokens]
    for row in (row for row, end in ends.items() if end is None):
        ids = answer_ids[:, row]
        stops = np.flatnonzero(call.controls["is_stop"][ids])
        end = int(stops[0]) if stops.size else None
        if call.how.stop_strings:
            before = _n_before_stop_string(call.tokenizer, call.how.stop_strings, ids[:end].tolist())
            end = end if before is None else before
        ends[row] = end


def _n_before_stop_string(tokenizer: Any, strings: Sequence[str], ids: list[int]) -> int | None:
    """Return how many tokens end before the stop string that is complete first begins; None if there is none."""

    def read(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text = read(ids)
    found = [(text.find(string) + len(string), text.find(string)) for string in strings if string in text]
    if not found:
        return None
    kept = text[: min(found)[1]]
    # In the middle of a character of several bytes what is read is no beginning of the text.
    return max(n for n in range(len(ids)) if kept.startswith(read(ids[:n])))


def _generation(
    whole: Mapping[str, np.ndarray], row: int, end: int | None, max_new_tokens: int, index: int
) -> Generation:
    stopped, n_tokens = end is not None, max_new_tokens if end is None else end
    logprobs = whole["logprobs"][:max_new_tokens, row]
    if not np.isfinite(logprobs[: n_tokens + 1]).all():
        raise InputError(f"the logits for prompt {index} are not finite; the model overflows or its weights are broken")
    residuals = whole["residuals"][:n_tokens, :, row].swapaxes(0, 1).copy() if "residuals" in whole else None
    ids, entropies = (tuple(whole[name][:n_tokens, row].tolist()) for name in ("answer_ids", "entropies"))
    return Generation(ids, tuple(logprobs[:n_tokens].tolist()), entropies, stopped, residuals)


def stop_token_ids(tokenizer: Any, strings: Iterable[str]) -> frozenset[int]:
    """Return the ids of all tokens whose text contains one of `strings`, and the tokenizer's end-of-sequence id.

    A string that only several tokens spell together is none of them; `GenerateConfig.stop_strings` finds it too.

    Raises:
        InputError: there is no tokenizer, or a string is empty (it is in every token).
    """
    strings = [strings] if isinstance(strings, str) else list(strings)
    _check_stop_strings(tokenizer, strings)
    ids = sorted(set(tokenizer.get_vocab().values()))
    texts = (tokenizer.decode([token_id], clean_up_tokenization_spaces=False) for token_id in ids)
    stops = {token_id for token_id, text in zip(ids, texts, strict=True) if any(s in text for s in strings)}
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return frozenset(stops)
