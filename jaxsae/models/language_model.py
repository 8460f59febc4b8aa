"""One loaded language model: its weights, tokenizer and the compiled functions over token ids.

`load` is the way in. Token ids are checked here, at the door; the families' pure functions below are jitted once per
shape. Everything is causal: padding on the right never changes what stands before it.
"""

import dataclasses
import functools
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxsae import artifacts
from jaxsae.artifacts import InputError
from jaxsae.models import layers, weights
from jaxsae.models.generate import Generation, greedy
from jaxsae.models.weights import FAMILIES

TokenIds = Array | np.ndarray  # integers [B, T]


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model that gives out its residual streams.

    The methods are compiled once per shape. A compiled function of your own takes `params` as an argument and calls
    `family.residuals(config, params, token_ids, dtype=dtype)` and its like, or the weights become its constants.

    Attributes:
        name: what `load` was asked for.
        config: the family's config; `config.model_type` names the family.
        params: weights as a nested dict of jax arrays, those of the blocks stacked along a leading layer axis.
        tokenizer: of transformers; None if the folder has no tokenizer files.
        dtype: compute dtype, "float32" (exact) or "bfloat16" (rounded dot operands, float32 sums and residual stream).
        revision: commit on the Hub; None for a local folder.
        fingerprint: hex sha256 over config, weight and tokenizer files and dtype; equal models have equal results.
    """

    name: str
    config: Any
    params: Any
    tokenizer: Any
    dtype: str
    revision: str | None
    fingerprint: str

    @property
    def family(self) -> ModuleType:
        """The module of pure functions that computes this model, such as `jaxsae.models.gpt2`."""
        return FAMILIES[self.config.model_type]

    @property
    def n_layers(self) -> int:
        return self.config.n_layer

    @property
    def d_model(self) -> int:
        return self.config.n_embd

    @property
    def n_vocab(self) -> int:
        return self.config.vocab_size

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

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = frozenset(),
    ) -> list[Generation]:
        """Continue each prompt greedily; see `jaxsae.models.generate.greedy`."""
        return greedy(
            self.config, self.params, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, dtype=self.dtype
        )

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
    return FAMILIES[config.model_type].residuals(config, params, token_ids, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config, dtype, params, token_ids):
    return FAMILIES[config.model_type].logits(config, params, token_ids, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(config, dtype, params, token_ids):
    return FAMILIES[config.model_type].forward(config, params, token_ids, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits_from(config, dtype, params, layer, resid):
    return FAMILIES[config.model_type].logits_from(config, params, layer, resid, dtype=dtype)


def load(
    source: str | os.PathLike, *, dtype: str = "float32", revision: str | None = None, mesh: Mesh | None = None
) -> LanguageModel:
    """Load a language model and its tokenizer, checking every tensor.

    Args:
        source: a folder in Hugging Face's layout, "package://some_package/path/inside", or the name of a model on the
            Hub.
        dtype: compute dtype, "float32" (exact) or "bfloat16".
        revision: branch, tag or commit; for Hub names only.
        mesh: every weight is replicated over its devices; None is the default device.

    Raises:
        InputError: see `weights.locate`, `weights.read_config`, `weights.read_params`, `load_tokenizer`.
    """
    layers.check_dtype(dtype)
    folder, commit = weights.locate(source, revision=revision)
    config = weights.read_config(folder)
    params = weights.read_params(folder, config, dtype=dtype, mesh=mesh)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    name = os.fspath(source)
    return LanguageModel(name, config, params, tokenizer, dtype, commit, _fingerprint(folder, config, dtype))


def _fingerprint(folder: Path, config: Any, dtype: str) -> str:
    files = [*weights.weight_files(folder), *(folder / name for name in weights.TOKENIZER_FILES)]
    hashes = {path.name: artifacts.sha256_file(path) for path in files if path.is_file()}
    return artifacts.fingerprint([config.model_type, dataclasses.asdict(config), dtype, hashes])


def load_tokenizer(folder: Path, n_vocab: int) -> Any:
    """Load the tokenizer of a model folder; without tokenizer.json or vocab.json + merges.txt it is None.

    Where transformers' class for the model would encode otherwise than tokenizer.json says (it rebuilds a GPT-2
    tokenizer from the vocabulary alone), tokenizer.json is followed.

    Raises:
        InputError: the files are damaged, an id is outside the model's vocabulary, or nothing can be encoded.
    """
    has_json = (folder / "tokenizer.json").is_file()
    if not has_json and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return None
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or the import prints a line about torch
    import transformers

    tokenizer = _from_folder(transformers.AutoTokenizer, folder)
    probes = _probes(tokenizer)
    if has_json and not _agrees(tokenizer, folder / "tokenizer.json", probes):
        tokenizer = _from_folder(transformers.PreTrainedTokenizerFast, folder)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= n_vocab:
        raise InputError(
            f"{folder}: the tokenizer does not fit: its largest id is {highest}, the model's {n_vocab - 1}"
        )
    if not any(tokenizer.encode(text, add_special_tokens=False) for text in probes):
        raise InputError(f"{folder}: the tokenizer does not fit: it encodes every text to no token at all")
    return tokenizer


def _from_folder(tokenizer_class: Any, folder: Path) -> Any:
    try:
        return tokenizer_class.from_pretrained(str(folder), local_files_only=True)
    # tokenizers reports a damaged file as a plain Exception, transformers as whatever it tripped over.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {reason})") from None


def _probes(tokenizer: Any) -> list[str]:
    """Return texts of which a working tokenizer encodes at least one: a sentence, and its own first tokens."""
    first_tokens = [tokenizer.decode([token_id]) for token_id in range(min(len(tokenizer), 32))]
    return ["The capital of France is Paris.", " ".join(first_tokens), *first_tokens]


def _agrees(tokenizer: Any, path: Path, probes: list[str]) -> bool:
    import tokenizers

    exact = tokenizers.Tokenizer.from_file(str(path))
    same_ids = all(
        tokenizer.encode(text, add_special_tokens=False) == exact.encode(text, add_special_tokens=False).ids
        for text in probes
    )
    return same_ids and len(tokenizer) == exact.get_vocab_size(with_added_tokens=True)
