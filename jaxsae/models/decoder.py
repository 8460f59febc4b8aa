"""Run a language model of any family: residual streams, logits, a replaced residual stream, and one token at a time.

Pure functions of a config, a pytree of weights and token ids, all of which can be jitted and differentiated. The
weights are a nested dict whose paths are Hugging Face's names, with those of the blocks stacked under `blocks` and
matrices as [out, in] (`blocks/attn/c_attn/weight` of GPT-2 is [L, 3D, D]). `dtype` is the compute dtype, "float32" or
"bfloat16". Dropout is never applied, and the values of token ids are not checked here (`LanguageModel` does).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsae.artifacts import InputError
from jaxsae.models import families, layers
from jaxsae.models.layers import Sight

Edit = Callable[[Any, Any], Any]  # (layer, which is traced; x [B T D]) -> x [B T D]


def init(config: Any, key: Array) -> dict[str, Any]:
    """Return fresh float32 weights: normal with the config's `initializer_range`, norms 1, biases 0."""
    return nnx.to_pure_dict(nnx.split(families.of(config.model_type).Model(config, key))[1])


def abstract_params(config: Any) -> dict[str, Any]:
    """Return the pytree of `init` with shapes and dtypes in place of arrays; nothing is computed."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def forward(
    config: Any, params: Mapping[str, Any], token_ids: Int[Array | np.ndarray, "B T"], *, dtype: str = "float32"
) -> tuple[Float[Array, "L B T D"], Float[Array, "B T V"]]:
    """Return the residual stream after every block (before the final norm) and the logits, from one pass."""
    model = _merge(config, params)
    last, resid, _ = _run(config, model, token_ids, dtype, keep="residuals")
    return resid, model.unembed(last, config, dtype)


def residuals(
    config: Any,
    params: Mapping[str, Any],
    token_ids: Int[Array | np.ndarray, "B T"],
    *,
    dtype: str = "float32",
    edit: Edit | None = None,
) -> Float[Array, "L B T D"]:
    """Return the residual stream after every block, before the final norm.

    Args:
        edit: `edit(layer, x) -> x` replaces the output of each block before it is kept and the next block reads it.
    """
    return _run(config, _merge(config, params), token_ids, dtype, keep="residuals", edit=edit)[1]


def logits(
    config: Any, params: Mapping[str, Any], token_ids: Int[Array | np.ndarray, "B T"], *, dtype: str = "float32"
) -> Float[Array, "B T V"]:
    """Return the logits at every position, keeping no residual stream."""
    model = _merge(config, params)
    return model.unembed(_run(config, model, token_ids, dtype)[0], config, dtype)


def logits_from(
    config: Any,
    params: Mapping[str, Any],
    layer: layers.LayerIndex,
    resid: Float[Array | np.ndarray, "B T D"],
    *,
    dtype: str = "float32",
) -> Float[Array, "B T V"]:
    """Return the logits when `resid` is the output of block `layer` (from 0; may be traced)."""
    layers.check_dtype(dtype)
    model, x = _merge(config, params), jnp.asarray(resid, jnp.float32)
    apply, sight = _apply(config, dtype), Sight(_positions(*x.shape[:2]))
    last = layers.scan_blocks_after(model.blocks, layer, x, sight, apply, n_layers=config.n_layers)
    return model.unembed(last, config, dtype)


def logit_directions(
    config: Any,
    params: Mapping[str, Any],
    resid: Float[Array | np.ndarray, "B D"],
    token_ids: Int[Array | np.ndarray, " B"],
    *,
    dtype: str = "float32",
) -> Float[Array, "B D"]:
    """Return how each row's token gains on the mean logit as the residual stream of the last layer changes.

    It is the derivative, at `resid` (before the final norm), of the token's logit minus the mean over the vocabulary,
    in logits per residual unit. The final norm is in it to first order: its gain, its centring, and its scale, by which
    a direction along `resid` itself changes nothing.
    """
    layers.check_dtype(dtype)
    model, ids = _merge(config, params), jnp.asarray(token_ids)[:, None]

    def gain(x: Float[Array, "B D"]) -> Float[Array, ""]:
        scores = model.unembed(x[:, None], config, dtype)[:, 0].astype(jnp.float32)
        return jnp.sum(jnp.take_along_axis(scores, ids, axis=-1)[:, 0] - jnp.mean(scores, axis=-1))

    return jax.grad(gain)(jnp.asarray(resid, jnp.float32))


def prefill(
    config: Any,
    params: Mapping[str, Any],
    token_ids: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    *,
    n_slots: int,
    dtype: str = "float32",
) -> tuple[Float[Array, "B V"], Sight]:
    """Return the logits after each prompt, and the keys and values of all layers for `step` to go on from.

    Keys and values are kept in the compute dtype: a dot would round them to it anyway.

    Args:
        token_ids: prompts, padded on the right with anything: what stands behind a prompt is never seen.
        lengths: tokens of each prompt, at least 1.
        n_slots: positions that the keys and values have room for, at least T.
    """
    model = _merge(config, params)
    last, _, sight = _run(config, model, token_ids, dtype, keep="sight")
    ends = jnp.take_along_axis(last, (jnp.asarray(lengths) - 1)[:, None, None], axis=1)
    room = [(0, 0), (0, 0), (0, 0), (0, n_slots - token_ids.shape[1]), (0, 0)]
    keys, values = (jnp.pad(part.astype(dtype), room) for part in (sight.keys, sight.values))
    return model.unembed(ends, config, dtype)[:, 0], Sight(jnp.asarray(lengths)[:, None], keys, values)


def unstack_sight(sight: Sight) -> Sight:
    """Return the sight of all layers as `step` asks for it with unstacked weights."""
    stacked: Any = sight
    return Sight(sight.positions, tuple(stacked.keys), tuple(stacked.values))


def step(
    config: Any, params: Mapping[str, Any], token_ids: Int[Array, " B"], sight: Sight, *, dtype: str = "float32"
) -> tuple[Float[Array, "B V"], Float[Array, "L B D"], Sight]:
    """Run one more token a row, at `sight.positions`.

    Args:
        params: with stacked blocks, or a tuple of one dict a block in their place, which is faster on a CPU
            (`layers.unroll_blocks`).
        sight: of `prefill` or the step before; with unstacked weights through `unstack_sight`.

    Returns:
        The logits of the token after it, its residual stream after every block, and what the next step sees.
    """
    layers.check_dtype(dtype)
    if isinstance(params["blocks"], tuple):
        model = _merge(config, {**params, "blocks": params["blocks"][0]})
        graph, _ = nnx.split(model.blocks)
        blocks = [nnx.merge(graph, block) for block in params["blocks"]]
        x = model.embed(token_ids[:, None], sight.positions, config)
        last, resid, seen = layers.unroll_blocks(blocks, x, sight, _apply(config, dtype))
    else:
        model = _merge(config, params)
        last, resid, seen = _run_blocks(config, model, token_ids[:, None], sight, dtype, keep="residuals sight")
    return model.unembed(last, config, dtype)[:, 0], resid[:, :, 0], Sight(sight.positions + 1, seen.keys, seen.values)


@functools.lru_cache(maxsize=16)
def _graph(config: Any) -> Any:
    family = families.of(config.model_type)
    return jax.eval_shape(lambda: nnx.split(family.Model(config, jax.random.key(0))))[0]


def _merge(config: Any, params: Mapping[str, Any]) -> Any:
    return nnx.merge(_graph(config), params)


def _apply(config: Any, dtype: str, edit: Edit | None = None) -> Any:
    if edit is None:
        return lambda block, index, x, sight: block(x, config, index, sight, dtype)

    def apply(block: Any, index: Any, x: Any, sight: Sight) -> tuple[Any, Sight]:
        x, seen = block(x, config, index, sight, dtype)
        return edit(index, x), seen

    return apply


def _positions(n_rows: int, n_tokens: int) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(n_tokens), (n_rows, n_tokens))


def _run(config: Any, model: Any, token_ids: Any, dtype: str, *, keep: str = "", edit: Edit | None = None) -> Any:
    layers.check_dtype(dtype)
    n_rows, n_tokens = token_ids.shape
    if n_tokens > config.n_positions:
        raise InputError(f"a text of {n_tokens} tokens is longer than the model's context, {config.n_positions}")
    sight = Sight(_positions(n_rows, n_tokens))
    return _run_blocks(config, model, jnp.asarray(token_ids), sight, dtype, keep=keep, edit=edit)


def _run_blocks(
    config: Any, model: Any, token_ids: Any, sight: Sight, dtype: str, *, keep: str, edit: Edit | None = None
) -> Any:
    x, apply = model.embed(token_ids, sight.positions, config), _apply(config, dtype, edit)
    return layers.scan_blocks(model.blocks, x, sight, apply, n_layers=config.n_layers, keep=keep)
