"""GPT-2 as pure functions over a pytree of weights: configuration, initialisation, forward pass.

The weights are a nested dict whose paths are Hugging Face's names (`wte/weight`, `ln_f/bias`), with those of the
blocks stacked under `blocks` (`blocks/attn/c_attn/weight` is [L, D, 3D]). All functions here can be jitted and
differentiated; `dtype` is the compute dtype, "float32" or "bfloat16". Dropout is never applied, and token ids are not
checked here (`LanguageModel` does).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsae.artifacts import InputError
from jaxsae.models import layers

ARCHITECTURE = "GPT2LMHeadModel"
# Buffers of older checkpoints: the causal mask and the value it put on masked scores.
KNOWN_BUFFERS = (r"h\.\d+\.attn\.bias", r"h\.\d+\.attn\.masked_bias")
BASE_PREFIX = "transformer."
TIED_TABLE = ("wte", "weight")


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The fields of Hugging Face's GPT2Config that decide what the model computes, with its names and defaults.

    Attributes:
        n_inner: width of the MLP; None is 4 * n_embd.
        scale_attn_by_inverse_layer_idx: divide block i's attention scores by i + 1 (i from 0).
        reorder_and_upcast_attn: asks for attention scores in float32, which they always are here.
        initializer_range: standard deviation of fresh weights; unused by inference.
        bos_token_id, eos_token_id: as written; ids outside the vocabulary count as absent (`LanguageModel.bos_id`).
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    model_type = "gpt2"

    def __post_init__(self):
        _check(dataclasses.asdict(self))

    @property
    def d_inner(self) -> int:
        """Width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


def _check(values: Mapping[str, Any]) -> None:
    """Refuse a field's value that is of the wrong type or not supported, naming both; absent fields have defaults."""
    fields = _DEFAULTS | dict(values)
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        value = fields[name]
        if (type(value) is not int or value < 1) and not (name == "n_inner" and value is None):
            raise InputError(f"{name} = {value!r} is not a positive integer")
    if fields["n_embd"] % fields["n_head"]:
        raise InputError(f"n_embd = {fields['n_embd']} is not a multiple of n_head = {fields['n_head']}")
    if fields["activation_function"] not in list(layers.ACTIVATIONS):
        known = ", ".join(layers.ACTIVATIONS)
        raise InputError(
            f"activation_function = {fields['activation_function']!r} is not supported; take one of {known}"
        )
    for name in ("layer_norm_epsilon", "initializer_range"):
        if type(fields[name]) not in (int, float) or not 0 <= fields[name] < math.inf:
            raise InputError(f"{name} = {fields[name]!r} is not a number >= 0")
    for name in [name for name, default in _DEFAULTS.items() if isinstance(default, bool)]:
        if not isinstance(fields[name], bool):
            raise InputError(f"{name} = {fields[name]!r} is neither true nor false")
    for name in ("bos_token_id", "eos_token_id"):
        ids = fields[name] if isinstance(fields[name], tuple) else (fields[name],)
        if any(token_id is not None and type(token_id) is not int for token_id in ids):
            raise InputError(f"{name} = {fields[name]!r} is not a token id")


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(GPT2Config)}

# Other names under which Hugging Face accepts the same field.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Fields that would change the computation, with the values that leave it as it is.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "auto_map": (None,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}
# Fields that inference does not depend on: book-keeping, training, other heads, HF's own generation.
_WITHOUT_EFFECT = """
    architectures attn_implementation dtype finetuning_task gradient_checkpointing id2label is_decoder label2id
    model_type n_ctx num_labels output_attentions output_hidden_states output_past pad_token_id prefix problem_type
    return_dict sep_token_id task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers_version use_bfloat16 use_cache
    attn_pdrop embd_pdrop resid_pdrop
    predict_special_tokens summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""


def read_config(fields: Mapping[str, Any]) -> GPT2Config:
    """Turn the content of a config.json into a GPT2Config.

    Dropout rates, fields of other heads and of HF's generation, and names that begin with an underscore have no effect
    on what is computed here and are passed over; any other field that is not understood is an error.

    Raises:
        InputError: a field is unknown, is given twice, or has a value that is not supported; it names both.
    """
    values: dict[str, Any] = {}
    for name, value in fields.items():
        target = _ALIASES.get(name, name)
        if target in _DEFAULTS:
            if target in values and values[target] != value:
                raise InputError(f"{name} = {value!r} contradicts {target} = {values[target]!r}")
            values[target] = tuple(value) if isinstance(value, list) else value
        elif name in _REQUIRED:
            if value not in _REQUIRED[name]:
                raise InputError(f"{name} = {value!r} is not supported for GPT-2, expected {_REQUIRED[name][-1]!r}")
        elif name not in _WITHOUT_EFFECT.split() and not name.startswith("_"):
            raise InputError(f"{name} = {value!r} is no field of GPT-2; remove it if it does not change the model")
    _check(values)
    for name in {"layer_norm_epsilon", "initializer_range"} & values.keys():
        values[name] = float(values[name])
    return GPT2Config(**values)


def write_config(config: GPT2Config) -> dict[str, Any]:
    """Return the content of Hugging Face's config.json for `config`, dropout rates 0."""
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return {"architectures": [ARCHITECTURE], "model_type": "gpt2", **dataclasses.asdict(config), **rates}


class Attention(nnx.Module):
    def __init__(self, config: GPT2Config, key: Array):
        key_in, key_out = jax.random.split(key)
        std, d = config.initializer_range, config.n_embd
        self.c_attn = layers.Projection(key_in, d, 3 * d, std=std)
        self.c_proj = layers.Projection(key_out, d, d, std=std / math.sqrt(2 * config.n_layer))

    def __call__(self, x: Float[Array, "B T D"], config: GPT2Config, index: Int[Array, ""], dtype: str):
        heads = (*x.shape[:2], config.n_head, config.n_embd // config.n_head)
        query, key, value = (part.reshape(heads) for part in jnp.split(self.c_attn(x, dtype), 3, axis=-1))
        scale = heads[-1] ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale = scale / (index + 1)
        mixed = layers.causal_attention(query, key, value, scale=scale, dtype=dtype)
        return self.c_proj(mixed.reshape(x.shape), dtype)


class MLP(nnx.Module):
    def __init__(self, config: GPT2Config, key: Array):
        key_in, key_out = jax.random.split(key)
        std = config.initializer_range
        self.c_fc = layers.Projection(key_in, config.n_embd, config.d_inner, std=std)
        self.c_proj = layers.Projection(key_out, config.d_inner, config.n_embd, std=std / math.sqrt(2 * config.n_layer))

    def __call__(self, x: Float[Array, "B T D"], config: GPT2Config, dtype: str) -> Float[Array, "B T D"]:
        activation = layers.ACTIVATIONS[config.activation_function]
        return self.c_proj(activation(self.c_fc(x, dtype)), dtype)


class Block(nnx.Module):
    def __init__(self, config: GPT2Config, key: Array):
        key_attn, key_mlp = jax.random.split(key)
        self.ln_1 = layers.LayerNorm(config.n_embd)
        self.attn = Attention(config, key_attn)
        self.ln_2 = layers.LayerNorm(config.n_embd)
        self.mlp = MLP(config, key_mlp)

    def __call__(self, x: Float[Array, "B T D"], config: GPT2Config, index: Int[Array, ""], dtype: str):
        x = x + self.attn(self.ln_1(x, config.layer_norm_epsilon), config, index, dtype)
        return x + self.mlp(self.ln_2(x, config.layer_norm_epsilon), config, dtype)


class Head(nnx.Module):
    """An output matrix of its own, [V, D]; absent where the input embeddings serve as one."""

    def __init__(self, config: GPT2Config, key: Array):
        self.weight = nnx.Param(config.initializer_range * jax.random.normal(key, (config.vocab_size, config.n_embd)))


class GPT2(nnx.Module):
    """All weights, built by `init` and put together again by `_merge`; the functions below say what is computed."""

    def __init__(self, config: GPT2Config, key: Array):
        key_token, key_position, key_blocks, key_head = jax.random.split(key, 4)
        std = config.initializer_range
        self.wte = layers.Embedding(key_token, config.vocab_size, config.n_embd, std=std)
        self.wpe = layers.Embedding(key_position, config.n_positions, config.n_embd, std=std)
        keys = jax.random.split(key_blocks, config.n_layer)
        self.blocks = layers.stack_blocks(functools.partial(Block, config), keys)
        self.ln_f = layers.LayerNorm(config.n_embd)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config, key_head)


def init(config: GPT2Config, key: Array) -> dict[str, Any]:
    """Return fresh float32 weights: normal with `initializer_range`, GPT-2's 1/sqrt(2L) on the residual projections."""
    return nnx.to_pure_dict(nnx.split(GPT2(config, key))[1])


def abstract_params(config: GPT2Config) -> dict[str, Any]:
    """Return the pytree of `init` with shapes and dtypes in place of arrays; nothing is computed."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def forward(
    config: GPT2Config, params: Mapping[str, Any], token_ids: Int[Array | np.ndarray, "B T"], *, dtype: str = "float32"
) -> tuple[Float[Array, "L B T D"], Float[Array, "B T V"]]:
    """Return the residual stream after every block (before the final norm) and the logits, from one pass."""
    model = _merge(config, params)
    last, resid = _run(config, model, token_ids, dtype, keep=True)
    return resid, _head(config, model, last, dtype)


def residuals(
    config: GPT2Config, params: Mapping[str, Any], token_ids: Int[Array | np.ndarray, "B T"], *, dtype: str = "float32"
) -> Float[Array, "L B T D"]:
    """Return the residual stream after every block, before the final norm."""
    return _run(config, _merge(config, params), token_ids, dtype, keep=True)[1]


def logits(
    config: GPT2Config, params: Mapping[str, Any], token_ids: Int[Array | np.ndarray, "B T"], *, dtype: str = "float32"
) -> Float[Array, "B T V"]:
    """Return the logits at every position, keeping no residual stream."""
    model = _merge(config, params)
    return _head(config, model, _run(config, model, token_ids, dtype, keep=False)[0], dtype)


def logits_at(
    config: GPT2Config,
    params: Mapping[str, Any],
    token_ids: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, " B"],
    *,
    dtype: str = "float32",
) -> Float[Array, "B V"]:
    """Return the logits at one position a row; the head runs on that position only."""
    model = _merge(config, params)
    last = _run(config, model, token_ids, dtype, keep=False)[0]
    chosen = jnp.take_along_axis(last, jnp.asarray(positions)[:, None, None], axis=1)
    return _head(config, model, chosen, dtype)[:, 0]


def logits_from(
    config: GPT2Config,
    params: Mapping[str, Any],
    layer: layers.LayerIndex,
    resid: Float[Array | np.ndarray, "B T D"],
    *,
    dtype: str = "float32",
) -> Float[Array, "B T V"]:
    """Return the logits when `resid` is the output of block `layer` (from 0; may be traced)."""
    layers.check_dtype(dtype)
    model, x = _merge(config, params), jnp.asarray(resid, jnp.float32)
    apply = functools.partial(_apply_block, config, dtype)
    last = layers.scan_blocks_after(model.blocks, layer, x, apply, n_layers=config.n_layer)
    return _head(config, model, last, dtype)


@functools.lru_cache(maxsize=16)
def _graph(config: GPT2Config) -> Any:
    return jax.eval_shape(lambda: nnx.split(GPT2(config, jax.random.key(0))))[0]


def _merge(config: GPT2Config, params: Mapping[str, Any]) -> GPT2:
    return nnx.merge(_graph(config), params)


def _apply_block(config, dtype, block, index, x):
    return block(x, config, index, dtype)


def _run(config, model, token_ids, dtype, *, keep):
    layers.check_dtype(dtype)
    n_tokens = token_ids.shape[1]
    if n_tokens > config.n_positions:
        raise InputError(f"a text of {n_tokens} tokens is longer than the model's context, {config.n_positions}")
    x = model.wte(jnp.asarray(token_ids)) + model.wpe(jnp.arange(n_tokens))
    apply = functools.partial(_apply_block, config, dtype)
    return layers.scan_blocks(model.blocks, x, apply, n_layers=config.n_layer, keep=keep)


def _head(config, model, x, dtype):
    table = model.wte if config.tie_word_embeddings else model.lm_head
    normal = model.ln_f(x, config.layer_norm_epsilon)
    return layers.einsum("btd,vd->btv", normal, table.weight[...], dtype)


def tensor_name(path: tuple[str, ...]) -> str:
    """Return the checkpoint's name of a weight, without `transformer.`; `{layer}` stands for the block's index."""
    name = ".".join(path)
    return "h.{layer}." + name.removeprefix("blocks.") if path[0] == "blocks" else name


def is_dot_operand(path: tuple[str, ...]) -> bool:
    """Say whether a weight only enters dots, so that storing it in the compute dtype loses nothing."""
    return path[-1] == "weight" and path[-2] in ("c_attn", "c_fc", "c_proj", "lm_head")
