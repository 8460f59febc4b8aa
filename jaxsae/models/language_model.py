"""One loaded language model: its weights, tokenizer and the compiled functions over token ids.

`load` is the way in. Token ids are checked here, at the door; the families' pure functions below are jitted once per
shape. Everything is causal: padding on the right never changes what stands before it.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxsae import artifacts
from jaxsae.artifacts import InputError
from jaxsae.models import checkpoints, decoder, generate, layers, weights
from jaxsae.models.checkpoints import Checkpoint
from jaxsae.models.generate import GenerateConfig, Generation

TokenIds = Array | np.ndarray  # integers [B, T]


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model that gives out its residual streams.

    The methods are compiled once per shape. A compiled function of your own takes `params` as an argument and calls
    `decoder.residuals(config, params, token_ids, dtype=dtype)` and its like, or the weights become its constants.

    Attributes:
        name: what `load` was asked for.
        config: the family's config; `config.model_type` names the family.
        params: weights as a nested dict of jax arrays, those of the blocks stacked along a leading layer axis.
        tokenizer: of transformers; None if the checkpoint has none.
        dtype: compute dtype, "float32" (exact) or "bfloat16" (rounded dot operands, float32 sums and residual stream).
        revision: commit on the Hub; None for what lies on this disk.
        eos_ids: the ids that end a text: those of the config and generation_config.json, a .gguf file's end of turn.
        fingerprint: hex sha256 over config, weight and tokenizer files and dtype; equal models have equal results.
    """

    name: str
    config: Any
    params: Any
    tokenizer: Any
    dtype: str
    revision: str | None
    fingerprint: str
    eos_ids: frozenset[int] = frozenset()

    @property
    def n_layers(self) -> int:
        return self.config.n_layers

    @property
    def d_model(self) -> int:
        return self.config.d_model

    @property
    def n_vocab(self) -> int:
        return self.config.n_vocab

    @property
    def n_positions(self) -> int:
        return self.config.n_positions

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-sequence token; None if it is unset or outside the vocabulary."""
        return self._special_id(self.config.bos_token_id)

    @property
    def eos_id(self) -> int | None:
        """Id of the (first) end-of-sequence token; None if it is unset or outside the vocabulary."""
        return self._special_id(self.config.eos_token_id)

    def _special_id(self, written: int | tuple[int, ...] | None) -> int | None:
        ids = written if isinstance(written, tuple) else (written,)
        return next((i for i in ids if i is not None and 0 <= i < self.n_vocab), None)

    def residuals(self, token_ids: TokenIds) -> Float[Array, "L B T D"]:
        """Return the residual stream after every block, before the final norm.

        Raises:
            InputError: the ids are not integers [B, T] within the vocabulary and the context, or there are none.
        """
        return _residuals(self.config, self.dtype, self.params, self.check_token_ids(token_ids))

    def logits(self, token_ids: TokenIds) -> Float[Array, "B T V"]:
        """Return the logits of the next token at every position; raises as `residuals` does."""
        return _logits(self.config, self.dtype, self.params, self.check_token_ids(token_ids))

    def residuals_and_logits(self, token_ids: TokenIds) -> tuple[Float[Array, "L B T D"], Float[Array, "B T V"]]:
        """Return both from one forward pass; raises as `residuals` does."""
        return _forward(self.config, self.dtype, self.params, self.check_token_ids(token_ids))

    def logits_from(
        self, layer: int | np.integer | Array, resid: Float[Array | np.ndarray, "B T D"]
    ) -> Float[Array, "B T V"]:
        """Return the logits when `resid` stands in for the output of block `layer`.

        Args:
            layer: from 0; a traced integer is as good as a number, and all layers share one compiled program.

        Raises:
            InputError: the layer or the shape of `resid` does not fit the model.
        """
        if not isinstance(layer, jax.core.Tracer) and not 0 <= int(layer) < self.n_layers:
            raise InputError(f"layer is {int(layer)}, but {self.name} has layers 0 to {self.n_layers - 1}")
        if resid.shape[-1] != self.d_model or resid.size == 0:
            raise InputError(f"resid has shape {list(resid.shape)}, {self.name} asks for [B, T, {self.d_model}]")
        return _logits_from(self.config, self.dtype, self.params, jnp.asarray(layer), jnp.asarray(resid))

    def logit_directions(
        self, resid: Float[Array | np.ndarray, "B D"], token_ids: Array | np.ndarray
    ) -> Float[Array, "B D"]:
        """Return how the logit of each row's token changes with the last layer's residual stream `resid`.

        See `decoder.logit_directions`; `token_ids` are integers [B] of the vocabulary.
        """
        return _logit_directions(self.config, self.dtype, self.params, jnp.asarray(resid), jnp.asarray(token_ids))

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = frozenset(),
        stop_strings: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        keep_residuals: bool = False,
        n_rows: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Continue each prompt, greedily unless `temperature` is above 0; see `generate.GenerateConfig`.

        Args:
            prompts: their token ids; `jaxsae.data.encode_prompt` makes them of a text.
            on_progress: called after each batch with the number of prompts continued so far.

        Raises:
            InputError: see `jaxsae.models.generate.generate`; prompts are named by index.
        """
        how = GenerateConfig(max_new_tokens, stop_ids, stop_strings, temperature, top_p, seed, keep_residuals, n_rows)
        shared = {"tokenizer": self.tokenizer, "dtype": self.dtype, "on_progress": on_progress}
        return generate.generate(self.config, self.params, prompts, how, **shared)

    def check_token_ids(self, token_ids: TokenIds) -> Array:
        """Return the ids as int32; values inside a jit cannot be looked at, only their shape and dtype.

        Raises:
            InputError: see `residuals`; the message holds the offending value.
        """
        if not jnp.issubdtype(token_ids.dtype, jnp.integer):
            raise InputError(f"token ids have dtype {token_ids.dtype}, expected integers")
        if token_ids.ndim != 2 or token_ids.size == 0:
            raise InputError(f"token ids have shape {list(token_ids.shape)}, expected [B, T], neither of them 0")
        if token_ids.shape[1] > self.n_positions:
            raise InputError(
                f"a text of {token_ids.shape[1]} tokens is longer than the context of {self.name}, {self.n_positions}"
            )
        if not isinstance(token_ids, jax.core.Tracer):
            low, high = int(token_ids.min()), int(token_ids.max())
            if low < 0 or high >= self.n_vocab:
                worst = low if low < 0 else high
                raise InputError(f"token id {worst} is outside the vocabulary of {self.name}, 0 to {self.n_vocab - 1}")
        return jnp.asarray(token_ids, jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _residuals(config, dtype, params, token_ids):
    return decoder.residuals(config, params, token_ids, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config, dtype, params, token_ids):
    return decoder.logits(config, params, token_ids, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(config, dtype, params, token_ids):
    return decoder.forward(config, params, token_ids, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits_from(config, dtype, params, layer, resid):
    return decoder.logits_from(config, params, layer, resid, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logit_directions(config, dtype, params, resid, token_ids):
    return decoder.logit_directions(config, params, resid, token_ids, dtype=dtype)


def load(
    source: str | os.PathLike,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    mesh: Mesh | None = None,
    sharding: str = "replicated",
) -> LanguageModel:
    """Load a language model and its tokenizer, checking every tensor.

    Args:
        source: a folder in Hugging Face's layout, a .gguf file, "package://some_package/path/inside" for one of them,
            the name of a model on the Hub, or "owner/model:file.gguf" for one file there.
        dtype: compute dtype, "float32" (exact) or "bfloat16".
        revision: branch, tag or commit; for Hub names only.
        mesh: devices to place the weights on; None is the default device.
        sharding: on a mesh, "replicated" for every weight whole on every device, or "split" for the matrices in parts
            over all devices, for models that one device cannot hold.

    Raises:
        InputError: `sharding` is "split" without a mesh; or see `checkpoints.locate`, `checkpoints.open_checkpoint`,
            `weights.read_config`, `weights.read_params` and `tokenizer.check`.
    """
    layers.check_dtype(dtype)
    if mesh is None and sharding != "replicated":
        raise InputError(f"sharding is {sharding!r}, which needs a mesh of devices; pass mesh, or leave it replicated")
    path, commit = checkpoints.locate(source, revision=revision)
    with checkpoints.open_checkpoint(path) as checkpoint:
        config = weights.read_config(checkpoint)
        params = weights.read_params(checkpoint, config, dtype=dtype, mesh=mesh, sharding=sharding)
        return LanguageModel(
            name=os.fspath(source),
            config=config,
            params=params,
            tokenizer=checkpoint.make_tokenizer(config.n_vocab),
            dtype=dtype,
            revision=commit,
            fingerprint=_fingerprint(checkpoint, config, dtype),
            eos_ids=_eos_ids(checkpoint, config),
        )


def _eos_ids(checkpoint: Checkpoint, config: Any) -> frozenset[int]:
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    return frozenset(i for i in (*ends, *checkpoint.stop_ids) if i is not None and 0 <= i < config.n_vocab)


def _fingerprint(checkpoint: Checkpoint, config: Any, dtype: str) -> str:
    hashes = {path.name: artifacts.sha256_file(path) for path in checkpoint.files}
    return artifacts.fingerprint([config.model_type, dataclasses.asdict(config), dtype, hashes])
