"""GGUF files of llama.cpp: metadata to Hugging Face's config fields, tensors dequantised under Hugging Face's names.

Architectures: llama (Llama, Mistral, SmolLM2 and all that llama.cpp files under it), qwen2, qwen3, gpt2, phi2. The
converter of llama.cpp changes more than names, and that is undone here: it reorders the rows of Llama's queries and
keys, transposes GPT-2's matrices, and may fuse Phi's three projections. Every metadata key of the architecture is
either understood or an error.

A sliding window of Mistral that the file does not state is not applied: llama.cpp's converter leaves it out.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from jaxsae.artifacts import InputError
from jaxsae.models import tokenizer
from jaxsae.models.checkpoints import Checkpoint, StoredTensor

_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def open_file(path: Path) -> Checkpoint:
    """Read a file's metadata; its tensors are read when they are asked for.

    Raises:
        InputError: the file is no GGUF, damaged, truncated or one part of several, its architecture is not supported,
            or a metadata key is missing, unknown or has a value that is not supported; it names the key.
    """
    metadata, raw = _read(path)
    architecture = metadata.get("general.architecture")
    if architecture not in list(_ARCHITECTURES):
        raise InputError(
            f"{path}: architecture {architecture!r} is not supported; it is one of {', '.join(_ARCHITECTURES)}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError(f"{path} is one of {metadata['split.count']} parts; merge them with llama-gguf-split --merge")
    keys = _Keys(path, architecture, metadata)
    fields = _ARCHITECTURES[architecture].read_fields(keys, raw)
    keys.check_rest()
    return Checkpoint(
        path=path,
        about="its metadata",
        fields=fields,
        tensors=_tensors(path, _ARCHITECTURES[architecture], fields, raw),
        stop_ids=tuple(token_id for key, token_id in keys.special_ids().items() if key in _STOP_KEYS),
        files=(path,),
        make_tokenizer=lambda n_vocab: tokenizer.from_gguf(path, metadata, n_vocab),
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata by key, and the package's tensors by name, their data mapped from the file."""
    import gguf

    try:
        reader = _reader_class()(path)
        metadata = {
            name: field.parts[field.data[0]] if field.types[0] == gguf.GGUFValueType.ARRAY else field.contents()
            for name, field in reader.fields.items()
        }
    # The package checks little: a damaged file runs into whatever comes first.
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is no GGUF file, or damaged or truncated ({reason}); download or convert the model again"
        ) from None
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise InputError(f"{path} is big-endian, which is not supported; convert the model again as little-endian")
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


@functools.cache
def _reader_class() -> Any:
    """Return the package's reader with two of its methods replaced; made on first use, for a late import."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # The package's own gives what is left at the end of the file, and may count up to a damaged length.
            part = super()._get(offset, dtype, count, override_order)
            if len(part) != count:
                raise ValueError(f"it ends within the {count} values at byte {offset}")
            return part

        def _get_field_parts(self, orig_offs, raw_type):
            # The package's own keeps two array objects a token: 150 MB and seconds for 100,000 tokens and merges.
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
            count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
            if kind == gguf.GGUFValueType.STRING:
                values, end = _read_texts(self.data, start, count, "little" if self.byte_order == "I" else "big")
            elif kind in self.gguf_scalar_to_np:
                array = self._get(start, self.gguf_scalar_to_np[kind], count)
                values, end = array.tolist(), start + array.nbytes
            else:
                raise ValueError(f"an array of {kind.name}")
            return end - orig_offs, [values], [0], [gguf.GGUFValueType.ARRAY, kind]

    return Reader


def _read_texts(content: np.ndarray, start: int, count: int, order: Literal["little", "big"]) -> tuple[list[str], int]:
    """Return `count` texts, each after its length in 8 bytes, and where they end."""
    view, texts = content.data, []
    for _ in range(count):
        begin = start + 8
        start = begin + int.from_bytes(view[begin - 8 : begin], order)
        if not begin <= start <= len(view):
            raise ValueError(f"it ends within the text at byte {begin}")
        texts.append(str(view[begin:start], "utf-8"))
    return texts, start


@dataclasses.dataclass
class _Keys:
    """The metadata keys of the file's architecture, each taken once, so that what is left was not understood."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    taken: set[str] = dataclasses.field(default_factory=set)

    def integer(self, key: str, default: int | None = None) -> int:
        return self._take(key, default, lambda value: type(value) is int and value > 0, "a positive integer")

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._take(key, default, _is_positive, "a number > 0"))

    def fixed(self, key: str, *expected: Any) -> None:
        """Refuse a key with another value than the expected ones; an absent key is as expected."""
        value = self._take(key, expected[-1], lambda value: True, "")
        if value not in expected:
            raise InputError(f"{self._name(key)} = {value!r} is not supported, expected {expected[-1]!r}")

    def text(self, key: str, default: str) -> str:
        return self._take(key, default, lambda value: isinstance(value, str), "a text")

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def skip(self, *keys: str) -> None:
        """Pass over keys that do not change what is computed."""
        self.taken |= {f"{self.architecture}.{key}" for key in keys}

    def _take(self, key: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
        name = f"{self.architecture}.{key}"
        self.taken.add(name)
        if name not in self.metadata and default is None:
            raise InputError(f"{self.path} lacks the metadata key {name}; convert the model again")
        value = self.metadata.get(name, default)
        if not is_valid(value):
            raise InputError(f"{self._name(key)} = {value!r} is not {expected}")
        return value

    def _name(self, key: str) -> str:
        return f"{self.path}: {self.architecture}.{key}"

    def check_rest(self) -> None:
        prefix = self.architecture + "."
        rest = [key for key in self.metadata if key.startswith(prefix) and key not in self.taken]
        if rest:
            raise InputError(
                f"{self.path}: {rest[0]} = {self.metadata[rest[0]]!r} is no metadata key that is understood for "
                f"{self.architecture}; convert the model to a folder of safetensors"
            )

    def special_ids(self) -> dict[str, int]:
        """Return the ids of special tokens by the last part of their key, such as eos_token_id."""
        pattern = re.compile(r"tokenizer\.ggml\.(\w+_token_id)")
        ids = {found[1]: value for key, value in self.metadata.items() if (found := pattern.fullmatch(key))}
        for name, token_id in ids.items():
            if type(token_id) is not int:
                raise InputError(f"{self.path}: tokenizer.ggml.{name} = {token_id!r} is not a token id")
        return ids


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _common(keys: _Keys, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Read what every architecture states."""
    if "token_embd.weight" not in raw:
        raise InputError(f"{keys.path} lacks tensor token_embd.weight; convert the model again")
    n_vocab = int(raw["token_embd.weight"].shape[-1])
    keys.fixed("vocab_size", n_vocab)
    keys.fixed("expert_count", 0)
    keys.fixed("expert_used_count", 0)
    keys.fixed("attention.causal", True)
    keys.skip("tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual")
    ids = keys.special_ids()
    return {
        "vocab_size": n_vocab,
        "tie_word_embeddings": "output.weight" not in raw,
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": ids.get("eos_token_id"),
    }


def _gpt2_fields(keys: _Keys, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        **_common(keys, raw),
        "n_positions": keys.integer("context_length"),
        "n_embd": keys.integer("embedding_length"),
        "n_layer": keys.integer("block_count"),
        "n_head": keys.integer("attention.head_count"),
        "n_inner": keys.integer("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
    }


def _sizes(keys: _Keys, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Read the sizes of the architectures with rotary positions."""
    n_heads = keys.integer("attention.head_count")
    return {
        **_common(keys, raw),
        "max_position_embeddings": keys.integer("context_length"),
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", n_heads),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
    }


def _phi_fields(keys: _Keys, raw: Mapping[str, Any]) -> dict[str, Any]:
    sizes = _sizes(keys, raw)
    d_head, rest = divmod(sizes["hidden_size"], sizes["num_attention_heads"])
    if rest:
        raise InputError(
            f"{keys.path}: phi2.embedding_length = {sizes['hidden_size']} is not a multiple of "
            f"phi2.attention.head_count = {sizes['num_attention_heads']}"
        )
    keys.fixed("rope.scaling.type", "none")
    return {
        "model_type": "phi",
        **sizes,
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "partial_rotary_factor": keys.integer("rope.dimension_count", d_head) / d_head,
    }


def _llama_fields(keys: _Keys, raw: Mapping[str, Any]) -> dict[str, Any]:
    sizes = _sizes(keys, raw)
    d_head = keys.integer("attention.key_length", sizes["hidden_size"] // sizes["num_attention_heads"])
    keys.fixed("attention.value_length", d_head)
    keys.fixed("rope.dimension_count", d_head)
    fields = {
        "model_type": keys.architecture,
        **sizes,
        "head_dim": d_head,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
    }
    scaling = _rope_scaling(keys, raw, d_head, sizes["rope_theta"])
    if scaling is not None:
        fields["rope_scaling"] = scaling
    if keys.architecture in ("llama", "qwen3"):
        fields["attention_bias"] = "blk.0.attn_q.bias" in raw
    if keys.architecture == "llama":
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in raw
        if keys.has("attention.sliding_window"):
            del fields["attention_bias"], fields["mlp_bias"]
            fields |= {"model_type": "mistral", "sliding_window": keys.integer("attention.sliding_window")}
    return fields


def _rope_scaling(keys: _Keys, raw: Mapping[str, Any], d_head: int, theta: float) -> dict[str, Any] | None:
    """Return config.json's rope_scaling from the keys, or from the divisors that llama.cpp stores for Llama 3."""
    keys.skip("rope.scaling.original_context_length")  # without effect where nothing is scaled
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = keys.text("rope.scaling.type", "linear" if factor != 1 else "none")
    divisors = _Dequantised(keys.path, raw["rope_freqs.weight"])[:] if "rope_freqs.weight" in raw else np.ones(1)
    if kind == "none" or (kind == "linear" and factor == 1):
        return _llama3_scaling(keys.path, divisors, d_head, theta) if (divisors != 1).any() else None
    if (divisors != 1).any():
        raise InputError(f"{keys.path} has rope.scaling.type {kind!r} and rope_freqs.weight; one of them is expected")
    scaling = {"rope_type": kind, "factor": factor}
    if keys.has("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    return scaling


def _llama3_scaling(path: Path, divisors: Float[np.ndarray, " C_half"], d_head: int, theta: float) -> dict[str, Any]:
    """Return the rope_scaling of Llama 3.1 and later whose divisors of the frequencies are the given ones.

    Only the stretch (the largest divisor) differs from model to model, not where the slow frequencies begin and end.
    """
    factor = float(divisors.max())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 * theta ** -(np.arange(0, d_head, 2) / d_head) / (2 * np.pi)
    kept = np.clip((turns - 1) / 3, 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(
            f"{path}: rope_freqs.weight holds other divisors than Llama 3's with a factor of {factor:g}, "
            "which is not supported; convert the model to a folder of safetensors"
        )
    return scaling


_BLOCK_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_PHI = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_BLOCK_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How one architecture is read.

    Attributes:
        read_fields: makes config.json's fields.
        outer: names of the tensors outside the blocks, without .weight and .bias.
        block: what the blocks are called, and the names inside one.
        reordered: tensors whose rows the converter reorders, by the field that counts their heads.
        transposed: whether the blocks' matrices are stored as [out, in] where Hugging Face has [in, out].
    """

    read_fields: Callable[[_Keys, Mapping[str, Any]], dict[str, Any]]
    outer: Mapping[str, str]
    block: tuple[str, Mapping[str, str]]
    reordered: Mapping[str, str] = dataclasses.field(default_factory=dict)
    transposed: bool = False

    def rename(self, name: str) -> str:
        """Return Hugging Face's name of a tensor, or the name itself where the architecture has no such tensor."""
        stem, _, kind = name.rpartition(".")
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        prefix, inner = self.block
        if found and found[2] in inner:
            return f"{prefix}.{int(found[1])}.{inner[found[2]]}.{kind}"
        return f"{self.outer[stem]}.{kind}" if stem in self.outer else name


_OUTER_LLAMA = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = _Architecture(_llama_fields, _OUTER_LLAMA, ("model.layers", _BLOCK_LLAMA))
_ARCHITECTURES = {
    "gpt2": _Architecture(
        _gpt2_fields,
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        ("transformer.h", _BLOCK_GPT2),
        transposed=True,
    ),
    "llama": dataclasses.replace(_LLAMA, reordered={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}),
    "phi2": _Architecture(
        _phi_fields, _OUTER_LLAMA | {"output_norm": "model.final_layernorm"}, ("model.layers", _BLOCK_PHI)
    ),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def _tensors(
    path: Path, architecture: _Architecture, fields: Mapping[str, Any], raw: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in raw.items():
        stem = name.rpartition(".")[0].rpartition(".")[2]
        if name == "rope_freqs.weight" and architecture.read_fields is _llama_fields:
            continue  # read with the config
        if stem == "attn_qkv" and not architecture.transposed:
            tensors |= _split(path, architecture, fields, tensor)
            continue
        rows = _original_rows(tensor, fields[count]) if (count := architecture.reordered.get(stem)) else None
        is_matrix = name.startswith("blk.") and len(tensor.shape) == 2
        tensors[architecture.rename(name)] = _stored(
            path, tensor, rows=rows, transposed=architecture.transposed and is_matrix
        )
    return tensors


def _split(path: Path, architecture: _Architecture, fields: Mapping[str, Any], tensor: Any) -> dict[str, StoredTensor]:
    """Return queries, keys and values of a fused projection as three tensors."""
    d_head = fields["hidden_size"] // fields["num_attention_heads"]
    heads = [fields[f"num_{kind}_heads"] for kind in ("attention", "key_value", "key_value")]
    ends = np.cumsum([d_head * count for count in heads])
    if ends[-1] != tensor.shape[-1]:
        raise InputError(f"{path}: tensor {tensor.name} has {tensor.shape[-1]} rows, its metadata asks for {ends[-1]}")
    return {
        architecture.rename(tensor.name.replace("attn_qkv", part)): _stored(path, tensor, rows=rows)
        for part, rows in zip(("attn_q", "attn_k", "attn_v"), np.split(np.arange(ends[-1]), ends[:-1]), strict=True)
    }


def _original_rows(tensor: Any, n_heads: int) -> np.ndarray | None:
    """Return where the rows of Hugging Face's order lie: rows i and i + C/2 of a head are stored side by side."""
    n_rows = int(tensor.shape[-1])
    if n_rows % (2 * n_heads):
        return None  # of another shape than the metadata asks for, which is reported with the others
    return np.arange(n_rows).reshape(n_heads, n_rows // n_heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _stored(path: Path, tensor: Any, *, rows: np.ndarray | None = None, transposed: bool = False) -> StoredTensor:
    """Return a tensor to be read in parts; a part is dequantised for itself, along whole rows of the file.

    Args:
        rows: the rows of the file that make the tensor, in order; None is all of them.
        transposed: whether the tensor is the transpose of what the file has.
    """
    values = _Dequantised(path, tensor)
    shape = [int(size) for size in reversed(tensor.shape)]
    if rows is not None:
        shape[0] = len(rows)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        index = index[::-1] if transposed else index
        own = values[index[0] if rows is None else rows[index[0]]]
        own = own[:, index[1]] if len(index) == 2 else own
        return own.T if transposed else own

    stored = tuple(reversed(shape) if transposed else shape)
    return StoredTensor(path, tensor.name, stored, read, axis=1 if transposed else 0)


@dataclasses.dataclass(frozen=True)
class _Dequantised:
    """A tensor of the file whose rows are dequantised when they are indexed."""

    path: Path
    tensor: Any

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        import gguf.quants

        try:
            return gguf.quants.dequantize(self.tensor.data[rows], self.tensor.tensor_type)
        except NotImplementedError:
            raise InputError(
                f"{self.path}: tensor {self.tensor.name} has the type {self.tensor.tensor_type.name}, which the "
                "package gguf cannot turn into numbers; take a file of another quantisation"
            ) from None
