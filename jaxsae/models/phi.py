"""Phi-1, Phi-1.5 and Phi-2: their configuration, their modules, and the names of their tensors.

Attention and MLP side by side on one LayerNorm, rotary positions on a part of each head, biases everywhere, the output
matrix's among them, weights as [out, in]. `jaxsae.models.decoder` runs them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsae.artifacts import InputError
from jaxsae.models import config_fields, layers
from jaxsae.models.config_fields import Rotary
from jaxsae.models.layers import Sight

ARCHITECTURE = "PhiForCausalLM"
KNOWN_BUFFERS = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
BASE_PREFIX = "model."
TIED_TABLE = ("embed_tokens", "weight")
IN_OUT_MODULES: frozenset[str] = frozenset()
_HALF_ROTARY = Rotary(fraction=0.5)


@dataclasses.dataclass(frozen=True)
class PhiConfig:
    """The fields of Hugging Face's PhiConfig that decide what the model computes, with its names and defaults.

    Attributes:
        num_key_value_heads: heads of keys and values; None is as many as of queries.
        head_dim: width of a head; None is hidden_size / num_attention_heads.
        rotary: rotary positions (config.json has them as rope_parameters, or rope_theta and partial_rotary_factor).
        qk_layernorm: a LayerNorm over each head of queries and of keys.
        initializer_range: standard deviation of fresh weights; unused by inference.
        bos_token_id, eos_token_id: as written; ids outside the vocabulary count as absent (`LanguageModel.bos_id`).
    """

    vocab_size: int = 51_200
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rotary: Rotary = _HALF_ROTARY
    qk_layernorm: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    model_type = "phi"

    def __post_init__(self):
        config_fields.check(PhiConfig, vars(self))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            config_fields.check_multiple(self, "hidden_size", "num_attention_heads")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        config_fields.check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.tie_word_embeddings:
            raise InputError("tie_word_embeddings = True is not supported for Phi, expected False")
        n_turning = int(self.d_head * self.rotary.fraction)
        if n_turning % 2 or not 0 < n_turning <= self.d_head:
            raise InputError(
                f"partial_rotary_factor = {self.rotary.fraction} turns {self.d_head * self.rotary.fraction:g} of the "
                f"{self.d_head} coordinates of a head, expected an even number of them, at least 2"
            )

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


_DROPOUT = ("attention_dropout", "embd_pdrop", "resid_pdrop")


def read_config(fields: Mapping[str, Any]) -> PhiConfig:
    """Turn the content of a config.json into a PhiConfig; dropout has no effect here.

    Raises:
        InputError: a field is unknown, or has a value that is not supported; it names both.
    """
    rotary, rest = config_fields.read_rotary(fields, fraction=0.5)
    values = config_fields.read(PhiConfig, rest, family="Phi", without_effect=_DROPOUT)
    return PhiConfig(**values, rotary=rotary)


def write_config(config: PhiConfig) -> dict[str, Any]:
    """Return the content of Hugging Face's config.json for `config`, dropout rates 0."""
    fields = dataclasses.asdict(config) | dict.fromkeys(_DROPOUT, 0.0)
    del fields["rotary"]
    rope_parameters = config.rotary.write() | {"partial_rotary_factor": config.rotary.fraction}
    return {"architectures": [ARCHITECTURE], "model_type": "phi", **fields, "rope_parameters": rope_parameters}


class Attention(nnx.Module):
    def __init__(self, config: PhiConfig, key: Array):
        keys = jax.random.split(key, 4)
        d, d_key = config.d_model, config.n_key_heads * config.d_head
        d_query = config.num_attention_heads * config.d_head
        linear = functools.partial(layers.Linear, std=config.initializer_range, has_bias=True)
        self.q_proj, self.k_proj = linear(keys[0], d, d_query), linear(keys[1], d, d_key)
        self.v_proj, self.dense = linear(keys[2], d, d_key), linear(keys[3], d_query, d)
        if config.qk_layernorm:
            self.q_layernorm = layers.LayerNorm(config.d_head)
            self.k_layernorm = layers.LayerNorm(config.d_head)

    def __call__(self, x: Float[Array, "B T D"], config: PhiConfig, sight: Sight, dtype: str):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (layers.split_heads(project(x, dtype), config.d_head) for project in projections)
        if config.qk_layernorm:
            query, key = self.q_layernorm(query, config.layer_norm_eps), self.k_layernorm(key, config.layer_norm_eps)
        frequencies = config.rotary.frequencies(config.d_head)
        query, key = (layers.rotate(part, sight.positions, frequencies) for part in (query, key))
        mixed, sight = sight.attend(query, key, value, scale=config.d_head**-0.5, dtype=dtype)
        return self.dense(mixed.reshape(*x.shape[:2], -1), dtype), sight


class MLP(nnx.Module):
    def __init__(self, config: PhiConfig, key: Array):
        key_in, key_out = jax.random.split(key)
        linear = functools.partial(layers.Linear, std=config.initializer_range, has_bias=True)
        self.fc1 = linear(key_in, config.d_model, config.intermediate_size)
        self.fc2 = linear(key_out, config.intermediate_size, config.d_model)

    def __call__(self, x: Float[Array, "B T D"], config: PhiConfig, dtype: str) -> Float[Array, "B T D"]:
        return self.fc2(layers.ACTIVATIONS[config.hidden_act](self.fc1(x, dtype)), dtype)


class Block(nnx.Module):
    def __init__(self, config: PhiConfig, key: Array):
        key_attn, key_mlp = jax.random.split(key)
        self.input_layernorm = layers.LayerNorm(config.d_model)
        self.self_attn = Attention(config, key_attn)
        self.mlp = MLP(config, key_mlp)

    def __call__(self, x: Float[Array, "B T D"], config: PhiConfig, index: Int[Array, ""], sight: Sight, dtype: str):
        normal = self.input_layernorm(x, config.layer_norm_eps)
        mixed, sight = self.self_attn(normal, config, sight, dtype)
        return x + mixed + self.mlp(normal, config, dtype), sight


class Model(nnx.Module):
    """All weights of a Phi model."""

    def __init__(self, config: PhiConfig, key: Array):
        key_token, key_blocks, key_head = jax.random.split(key, 3)
        std = config.initializer_range
        self.embed_tokens = layers.Embedding(key_token, config.vocab_size, config.d_model, std=std)
        self.blocks = layers.stack_blocks(
            functools.partial(Block, config), jax.random.split(key_blocks, config.n_layers)
        )
        self.final_layernorm = layers.LayerNorm(config.d_model)
        self.lm_head = layers.Linear(key_head, config.d_model, config.vocab_size, std=std, has_bias=True)

    def embed(
        self, token_ids: Int[Array, "B T"], positions: Int[Array, "B T"], config: PhiConfig
    ) -> Float[Array, "B T D"]:
        """Return what enters the first block; positions come in with the attention."""
        return self.embed_tokens(token_ids)

    def unembed(self, x: Float[Array, "B T D"], config: PhiConfig, dtype: str) -> Float[Array, "B T V"]:
        """Return the logits of what left the last block."""
        return self.lm_head(self.final_layernorm(x, config.layer_norm_eps), dtype)


tensor_name = functools.partial(layers.tensor_name, blocks="layers")


def is_dot_operand(path: tuple[str, ...]) -> bool:
    """Say whether a weight only enters dots, so that storing it in the compute dtype loses nothing."""
    return path[-1] == "weight" and path[-2] in ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head")
