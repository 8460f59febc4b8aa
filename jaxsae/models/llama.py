"""Llama and its kin, Mistral, Qwen2 and Qwen3: their configuration, their modules, and the names of their tensors.

Rotary positions, RMSNorm before attention and MLP, heads of keys and values that serve several heads of queries, a
gated MLP, weights as [out, in]. What tells the four apart is in the config. `jaxsae.models.decoder` runs them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsae.artifacts import InputError
from jaxsae.models import config_fields, layers
from jaxsae.models.config_fields import Rotary
from jaxsae.models.layers import Sight

# Older checkpoints carry the frequencies of the rotary positions.
KNOWN_BUFFERS = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")
BASE_PREFIX = "model."
TIED_TABLE = ("embed_tokens", "weight")
IN_OUT_MODULES: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The fields of Hugging Face's config that decide what the model computes, with its names and Llama's defaults.

    Attributes:
        num_key_value_heads: heads of keys and values; None is as many as of queries.
        head_dim: width of a head; None is hidden_size / num_attention_heads.
        rotary: rotary positions (config.json has them as rope_parameters, or rope_theta and rope_scaling).
        attention_bias: biases on queries, keys, values and the attention's output; Qwen2 has the first three anyway.
        sliding_window: positions that a windowed layer sees, its own among them; None is all.
        windowed_layers: which layers are windowed, by index; None is all, where there is a window.
        initializer_range: standard deviation of fresh weights; unused by inference.
        bos_token_id, eos_token_id: as written; ids outside the vocabulary count as absent (`LanguageModel.bos_id`).
    """

    model_type: str = "llama"
    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rotary: Rotary = config_fields.PLAIN_ROTARY
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        _check_model_type(self.model_type)
        config_fields.check(LlamaConfig, vars(self))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            config_fields.check_multiple(self, "hidden_size", "num_attention_heads")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        config_fields.check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.d_head % 2:
            raise InputError(f"head_dim = {self.head_dim} is odd; rotary positions turn pairs of coordinates")
        if self.rotary.fraction != 1:
            raise InputError(f"partial_rotary_factor = {self.rotary.fraction} is not supported for {self.model_type}")
        for name, allowed in self.kind.fixed.items():
            config_fields.check_fixed(name, getattr(self, name, allowed[-1]), allowed, family=self.model_type)
        if self.windowed_layers is not None:
            self._check_windowed_layers(self.windowed_layers)

    def _check_windowed_layers(self, windowed: tuple[int, ...]) -> None:
        if self.sliding_window is None or not self.kind.has_layer_types:
            raise InputError(
                f"windowed_layers = {windowed} is not supported for {self.model_type} without sliding_window"
            )
        if not windowed or not all(0 <= layer < self.n_layers for layer in windowed):
            raise InputError(f"windowed_layers = {windowed} is not some of layers 0 to {self.n_layers - 1}")

    @property
    def n_layers(self) -> int:
        return self.num_hidden_layers

    @property
    def d_model(self) -> int:
        return self.hidden_size

    @property
    def n_vocab(self) -> int:
        return self.vocab_size

    @property
    def n_positions(self) -> int:
        return self.max_position_embeddings

    @property
    def n_key_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def d_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kind(self) -> "_Kind":
        return _KINDS[self.model_type]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What tells a model_type of the family apart from Llama.

    Attributes:
        defaults: values of absent fields that differ from LlamaConfig's.
        has_qkv_bias: queries, keys and values have biases, whatever attention_bias says; the output then has none.
        has_qk_norm: an RMSNorm over each head of queries and of keys.
        has_layer_types: config.json says layer by layer which are windowed; elsewhere all are, where there is a window.
        fixed: config.json's fields that other kinds compute with, at the values this kind takes.
    """

    architecture: str
    defaults: Mapping[str, Any]
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_layer_types: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


_FULL, _WINDOWED = "full_attention", "sliding_attention"
_QWEN = {"vocab_size": 151_936, "intermediate_size": 22_016, "max_position_embeddings": 32_768}
_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}
_KINDS = {
    "llama": _Kind(
        "LlamaForCausalLM",
        {"bos_token_id": 1, "eos_token_id": 2},
        fixed={"pretraining_tp": (1,), "rope_interleaved": (False,), "sliding_window": (None,)},
    ),
    "mistral": _Kind(
        "MistralForCausalLM",
        {
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        fixed=_NO_BIAS,
    ),
    "qwen2": _Kind(
        "Qwen2ForCausalLM",
        _QWEN | {"num_key_value_heads": 32},
        has_qkv_bias=True,
        has_layer_types=True,
        fixed=_NO_BIAS | {"use_mrope": (False,)},
    ),
    "qwen3": _Kind(
        "Qwen3ForCausalLM",
        _QWEN | {"num_key_value_heads": 32, "head_dim": 128},
        has_qk_norm=True,
        has_layer_types=True,
        fixed={"mlp_bias": (False,)},
    ),
}
# "max_sequence_length", "is_llama_config" and "transformers.js_config" stand in published models; nothing reads them.
_WITHOUT_EFFECT = ("attention_dropout", "is_llama_config", "max_sequence_length", "transformers.js_config")


def read_config(fields: Mapping[str, Any]) -> LlamaConfig:
    """Turn the content of a config.json into a LlamaConfig; dropout has no effect here.

    Raises:
        InputError: a field is unknown, or has a value that is not supported; it names both.
    """
    model_type = fields.get("model_type", "llama")
    _check_model_type(model_type)
    kind = _KINDS[model_type]
    rotary, rest = config_fields.read_rotary(fields)
    windows, rest = _read_windows(rest) if kind.has_layer_types else ({}, rest)
    values = config_fields.read(
        LlamaConfig, rest, family=model_type, required=kind.fixed, without_effect=_WITHOUT_EFFECT
    )
    return LlamaConfig(**{**kind.defaults, **values, **windows, "model_type": model_type, "rotary": rotary})


def _check_model_type(model_type: Any) -> None:
    if model_type not in list(_KINDS):
        raise InputError(f"model_type = {model_type!r} is not supported; it is one of {', '.join(_KINDS)}")


def _read_windows(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read which layers are windowed, and how wide the window is; return that and the other fields."""
    rest = dict(fields)
    is_used, window = rest.pop("use_sliding_window", False), rest.pop("sliding_window", 4096)
    first, layer_types = rest.pop("max_window_layers", 28), rest.pop("layer_types", None)
    n_layers = rest.get("num_hidden_layers", LlamaConfig.num_hidden_layers)
    if not isinstance(is_used, bool):
        raise InputError(f"use_sliding_window = {is_used!r} is neither true nor false")
    for name, value in (("max_window_layers", first), ("num_hidden_layers", n_layers)):
        if type(value) is not int or value < 0:
            raise InputError(f"{name} = {value!r} is not a whole number")
    window = window if is_used else None
    if layer_types is None:
        first = n_layers if window is None else min(first, n_layers)
        layer_types = [_FULL] * first + [_WINDOWED] * (n_layers - first)
    is_list = isinstance(layer_types, (list, tuple)) and len(layer_types) == n_layers
    if not is_list or any(name not in (_FULL, _WINDOWED) for name in layer_types):
        raise InputError(f"layer_types = {layer_types!r}, expected {n_layers} of {_FULL} and {_WINDOWED}")
    windowed = tuple(i for i, name in enumerate(layer_types) if name == _WINDOWED)
    if windowed and window is None:
        raise InputError(
            f"layer_types has {_WINDOWED} for layer {windowed[0]}, but use_sliding_window = {is_used} and no "
            "sliding_window say how wide it is"
        )
    some = windowed if 0 < len(windowed) < n_layers else None
    windows = {"sliding_window": window if windowed else None, "windowed_layers": some}
    config_fields.check(LlamaConfig, windows)
    return windows, rest


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """Return the content of Hugging Face's config.json for `config`, dropout 0."""
    fields = dataclasses.asdict(config) | {"rope_parameters": config.rotary.write(), "attention_dropout": 0.0}
    del fields["rotary"]
    windowed = fields.pop("windowed_layers")
    fields = {name: value for name, value in fields.items() if name not in config.kind.fixed}
    if config.kind.has_layer_types:
        is_used = config.sliding_window is not None
        windowed = range(config.n_layers) if windowed is None else windowed
        fields["use_sliding_window"] = is_used
        fields["layer_types"] = [_WINDOWED if is_used and i in windowed else _FULL for i in range(config.n_layers)]
    return {"architectures": [config.kind.architecture], **fields}


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, key: Array):
        keys = jax.random.split(key, 4)
        d, d_key = config.d_model, config.n_key_heads * config.d_head
        d_query = config.num_attention_heads * config.d_head
        linear = functools.partial(layers.Linear, std=config.initializer_range)
        has_bias = config.attention_bias or config.kind.has_qkv_bias
        self.q_proj = linear(keys[0], d, d_query, has_bias=has_bias)
        self.k_proj = linear(keys[1], d, d_key, has_bias=has_bias)
        self.v_proj = linear(keys[2], d, d_key, has_bias=has_bias)
        self.o_proj = linear(keys[3], d_query, d, has_bias=config.attention_bias)
        if config.kind.has_qk_norm:
            self.q_norm = layers.RMSNorm(config.d_head)
            self.k_norm = layers.RMSNorm(config.d_head)

    def __call__(self, x: Float[Array, "B T D"], config: LlamaConfig, index: Int[Array, ""], sight: Sight, dtype: str):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (layers.split_heads(project(x, dtype), config.d_head) for project in projections)
        if config.kind.has_qk_norm:
            query, key = self.q_norm(query, config.rms_norm_eps), self.k_norm(key, config.rms_norm_eps)
        frequencies = config.rotary.frequencies(config.d_head)
        query, key = (layers.rotate(part, sight.positions, frequencies) for part in (query, key))
        scale, window = config.d_head**-0.5, _window(config, index)
        mixed, sight = sight.attend(query, key, value, scale=scale, dtype=dtype, window=window)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1), dtype), sight


def _window(config: LlamaConfig, index: Int[Array, ""]) -> int | Int[Array, ""] | None:
    """Return how many positions a layer sees; None where no layer is windowed."""
    if config.sliding_window is None or config.windowed_layers is None:
        return config.sliding_window
    windowed = jnp.zeros(config.n_layers, bool).at[jnp.asarray(config.windowed_layers)].set(True)
    return jnp.where(windowed[index], config.sliding_window, config.n_positions)


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, key: Array):
        keys = jax.random.split(key, 3)
        linear = functools.partial(layers.Linear, std=config.initializer_range, has_bias=config.mlp_bias)
        self.gate_proj = linear(keys[0], config.d_model, config.intermediate_size)
        self.up_proj = linear(keys[1], config.d_model, config.intermediate_size)
        self.down_proj = linear(keys[2], config.intermediate_size, config.d_model)

    def __call__(self, x: Float[Array, "B T D"], config: LlamaConfig, dtype: str) -> Float[Array, "B T D"]:
        gate = layers.ACTIVATIONS[config.hidden_act](self.gate_proj(x, dtype))
        return self.down_proj(gate * self.up_proj(x, dtype), dtype)


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, key: Array):
        key_attn, key_mlp = jax.random.split(key)
        self.input_layernorm = layers.RMSNorm(config.d_model)
        self.self_attn = Attention(config, key_attn)
        self.post_attention_layernorm = layers.RMSNorm(config.d_model)
        self.mlp = MLP(config, key_mlp)

    def __call__(self, x: Float[Array, "B T D"], config: LlamaConfig, index: Int[Array, ""], sight: Sight, dtype: str):
        normal = self.input_layernorm(x, config.rms_norm_eps)
        mixed, sight = self.self_attn(normal, config, index, sight, dtype)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x, config.rms_norm_eps), config, dtype), sight


class Model(nnx.Module):
    """All weights of a Llama-like model."""

    def __init__(self, config: LlamaConfig, key: Array):
        key_token, key_blocks, key_head = jax.random.split(key, 3)
        std = config.initializer_range
        self.embed_tokens = layers.Embedding(key_token, config.vocab_size, config.d_model, std=std)
        self.blocks = layers.stack_blocks(
            functools.partial(Block, config), jax.random.split(key_blocks, config.n_layers)
        )
        self.norm = layers.RMSNorm(config.d_model)
        if not config.tie_word_embeddings:
            self.lm_head = layers.Linear(key_head, config.d_model, config.vocab_size, std=std)

    def embed(
        self, token_ids: Int[Array, "B T"], positions: Int[Array, "B T"], config: LlamaConfig
    ) -> Float[Array, "B T D"]:
        """Return what enters the first block; positions come in with the attention."""
        return self.embed_tokens(token_ids)

    def unembed(self, x: Float[Array, "B T D"], config: LlamaConfig, dtype: str) -> Float[Array, "B T V"]:
        """Return the logits of what left the last block."""
        normal, is_tied = self.norm(x, config.rms_norm_eps), config.tie_word_embeddings
        return layers.unembed(normal, self.embed_tokens, dtype) if is_tied else self.lm_head(normal, dtype)


tensor_name = functools.partial(layers.tensor_name, blocks="layers")


def is_dot_operand(path: tuple[str, ...]) -> bool:
    """Say whether a weight only enters dots, so that storing it in the compute dtype loses nothing."""
    return path[-1] == "weight" and (path[-2].endswith("_proj") or path[-2] == "lm_head")
