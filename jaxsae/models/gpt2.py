"""GPT-2: its configuration, its modules, and the names of its tensors.

Learned positions, LayerNorm before attention and MLP, one projection for queries, keys and values; checkpoints have
weights as [in, out]. `jaxsae.models.decoder` runs it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsae.models import config_fields, layers
from jaxsae.models.layers import Sight

ARCHITECTURE = "GPT2LMHeadModel"
# Buffers of older checkpoints: the causal mask and the value it put on masked scores.
KNOWN_BUFFERS = (r"h\.\d+\.attn\.bias", r"h\.\d+\.attn\.masked_bias")
BASE_PREFIX = "transformer."
TIED_TABLE = ("wte", "weight")
IN_OUT_MODULES = frozenset({"c_attn", "c_fc", "c_proj"})


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
        config_fields.check(GPT2Config, vars(self))
        config_fields.check_multiple(self, "n_embd", "n_head")

    @property
    def n_layers(self) -> int:
        return self.n_layer

    @property
    def d_model(self) -> int:
        return self.n_embd

    @property
    def n_vocab(self) -> int:
        return self.vocab_size

    @property
    def n_key_heads(self) -> int:
        return self.n_head

    @property
    def d_head(self) -> int:
        return self.n_embd // self.n_head

    @property
    def d_inner(self) -> int:
        """Width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


# Other names under which Hugging Face accepts the same field.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
_WITHOUT_EFFECT = (
    *("n_ctx", "predict_special_tokens", *_DROPOUT),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
)


def read_config(fields: Mapping[str, Any]) -> GPT2Config:
    """Turn the content of a config.json into a GPT2Config; dropout and other heads have no effect here.

    Raises:
        InputError: a field is unknown, is given twice, or has a value that is not supported; it names both.
    """
    values = config_fields.read(
        GPT2Config,
        fields,
        family="GPT-2",
        aliases=_ALIASES,
        required={"n_special": (0,)},
        without_effect=_WITHOUT_EFFECT,
    )
    return GPT2Config(**values)


def write_config(config: GPT2Config) -> dict[str, Any]:
    """Return the content of Hugging Face's config.json for `config`, dropout rates 0."""
    rates = dict.fromkeys(_DROPOUT, 0.0)
    return {"architectures": [ARCHITECTURE], "model_type": "gpt2", **dataclasses.asdict(config), **rates}


class Attention(nnx.Module):
    def __init__(self, config: GPT2Config, key: Array):
        key_in, key_out = jax.random.split(key)
        std, d = config.initializer_range, config.n_embd
        self.c_attn = layers.Linear(key_in, d, 3 * d, std=std, has_bias=True)
        self.c_proj = layers.Linear(key_out, d, d, std=std / math.sqrt(2 * config.n_layer), has_bias=True)

    def __call__(self, x: Float[Array, "B T D"], config: GPT2Config, index: Int[Array, ""], sight: Sight, dtype: str):
        heads = (*x.shape[:2], config.n_head, config.d_head)
        query, key, value = (part.reshape(heads) for part in jnp.split(self.c_attn(x, dtype), 3, axis=-1))
        scale = heads[-1] ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale = scale / (index + 1)
        mixed, sight = sight.attend(query, key, value, scale=scale, dtype=dtype)
        return self.c_proj(mixed.reshape(x.shape), dtype), sight


class MLP(nnx.Module):
    def __init__(self, config: GPT2Config, key: Array):
        key_in, key_out = jax.random.split(key)
        std, d, d_inner = config.initializer_range, config.n_embd, config.d_inner
        self.c_fc = layers.Linear(key_in, d, d_inner, std=std, has_bias=True)
        self.c_proj = layers.Linear(key_out, d_inner, d, std=std / math.sqrt(2 * config.n_layer), has_bias=True)

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

    def __call__(self, x: Float[Array, "B T D"], config: GPT2Config, index: Int[Array, ""], sight: Sight, dtype: str):
        mixed, sight = self.attn(self.ln_1(x, config.layer_norm_epsilon), config, index, sight, dtype)
        x = x + mixed
        return x + self.mlp(self.ln_2(x, config.layer_norm_epsilon), config, dtype), sight


class Model(nnx.Module):
    """All weights of a GPT-2."""

    def __init__(self, config: GPT2Config, key: Array):
        key_token, key_position, key_blocks, key_head = jax.random.split(key, 4)
        std = config.initializer_range
        self.wte = layers.Embedding(key_token, config.vocab_size, config.n_embd, std=std)
        self.wpe = layers.Embedding(key_position, config.n_positions, config.n_embd, std=std)
        keys = jax.random.split(key_blocks, config.n_layer)
        self.blocks = layers.stack_blocks(functools.partial(Block, config), keys)
        self.ln_f = layers.LayerNorm(config.n_embd)
        if not config.tie_word_embeddings:
            self.lm_head = layers.Linear(key_head, config.n_embd, config.vocab_size, std=std)

    def embed(
        self, token_ids: Int[Array, "B T"], positions: Int[Array, "B T"], config: GPT2Config
    ) -> Float[Array, "B T D"]:
        """Return what enters the first block."""
        return self.wte(token_ids) + self.wpe(positions)

    def unembed(self, x: Float[Array, "B T D"], config: GPT2Config, dtype: str) -> Float[Array, "B T V"]:
        """Return the logits of what left the last block."""
        normal = self.ln_f(x, config.layer_norm_epsilon)
        return layers.unembed(normal, self.wte, dtype) if config.tie_word_embeddings else self.lm_head(normal, dtype)


tensor_name = functools.partial(layers.tensor_name, blocks="h")


def is_dot_operand(path: tuple[str, ...]) -> bool:
    """Say whether a weight only enters dots, so that storing it in the compute dtype loses nothing."""
    return path[-1] == "weight" and path[-2] in ("c_attn", "c_fc", "c_proj", "lm_head")
