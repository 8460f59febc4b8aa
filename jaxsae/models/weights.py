"""Model folders in Hugging Face's layout: finding them, reading config.json and safetensors, writing them.

A folder holds config.json and either model.safetensors or model.safetensors.index.json with its shards. Reading is
strict: every tensor of the files is used (the mask buffers of older checkpoints excepted), every weight is filled,
shapes, dtypes and finiteness are checked, and the first thing wrong is named in one line. Only the safetensors format
is read.
"""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # before safetensors.numpy, which cannot give bfloat16 otherwise
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding

from jaxsae import artifacts
from jaxsae.artifacts import InputError
from jaxsae.mesh import REPLICATED
from jaxsae.models import gpt2, layers

# config.json's model_type -> the module of pure functions that reads its config, names its tensors and computes it.
# Another family is one more module with the public functions of gpt2.py and one more line here.
FAMILIES = {"gpt2": gpt2}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)

_FLOATS = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}


def locate(source: str | os.PathLike, *, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the local folder of a model and, for a model of the Hub, the commit it is at.

    Args:
        source: a folder, "package://some_package/path/inside", or the name of a model on the Hugging Face Hub, which is
            downloaded unless it is in the local cache.
        revision: branch, tag or commit; for Hub names only.

    Raises:
        InputError: there is no such folder, package or model, the Hub cannot be reached, or it is a .gguf file.
    """
    name = os.fspath(source)
    if name.endswith(".gguf"):
        raise InputError(f"{name}: .gguf files are not supported; give a folder with config.json and {SINGLE_FILE}")
    folder = artifacts.resolve_path(name)
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        folder = _download(name, revision)
        return folder, folder.name
    if not folder.is_dir():
        raise InputError(f"{name} is not a folder; a model is a folder with config.json and {SINGLE_FILE}")
    if revision is not None:
        raise InputError(f"revision = {revision!r} is for models of the Hub, but {name} is a local folder; remove it")
    return folder, None


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub

    patterns = ["config.json", SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        at = "" if revision is None else f" at revision {revision!r}"
        raise InputError(
            f"{name} is no local folder, and the Hugging Face Hub did not give a model of that name{at} ({reason}); "
            "give a folder with config.json and model.safetensors"
        ) from None


def read_config(folder: Path) -> Any:
    """Read config.json and return the config of the model's family.

    Raises:
        InputError: the file is missing or unreadable, or the model is not supported; it names field and value.
    """
    path = folder / "config.json"
    fields = _read_object(path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"{path}: model_type = {model_type!r} is not supported; it is one of {', '.join(FAMILIES)}")
    try:
        return FAMILIES[model_type].read_config(fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; a model folder holds config.json and {SINGLE_FILE}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder; a single file goes before an index.

    Raises:
        InputError: there are none, the index is damaged, or a shard is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".h5", ".msgpack", ".pt")]
        found = f", only {', '.join(others)}: convert it to safetensors" if others else ""
        raise InputError(f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}{found}")
    shards = _read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index} has no weight_map; download the model again")
    paths = []
    for name in sorted(set(map(str, shards.values()))):
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{index} names the shard {name!r}, which is not in {folder}; download the model again")
        paths.append(folder / name)
    return paths


def read_params(folder: Path, config: Any, *, dtype: str, mesh: Mesh | None = None) -> dict[str, Any]:
    """Fill the model's weights from a folder, tensor by tensor, and replicate them over a mesh's devices.

    Matrices that only enter dots are stored in `dtype`; embeddings, norms and biases stay float32.

    Raises:
        InputError: a tensor is missing, unknown, double, of another shape or dtype, or holds NaN or infinity; or a file
            is damaged. It names the tensor or file.
    """
    layers.check_dtype(dtype)
    family = FAMILIES[config.model_type]
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(weight_files(folder), family, stack)
        template = family.abstract_params(config)
        names = {path: _names(family, path, config) for path in _flatten(template)}
        _check_names(tensors, list(itertools.chain(*names.values())), config, folder)
        filled = []
        for (path, own_names), leaf in zip(names.items(), jax.tree.leaves(template), strict=True):
            storage = np.dtype(dtype if family.is_dot_operand(path) else "float32")
            array = _fill(tensors, own_names, leaf.shape, storage, stacked=_is_stacked(path))
            filled.append(jax.device_put(array) if mesh is None else _replicate(array, mesh))
        params = jax.tree.unflatten(jax.tree.structure(template), filled)
        _check_tied_head(tensors, config, family, folder)
    return params


def _replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, REPLICATED), lambda index: array[index])


def _names(family: Any, path: tuple[str, ...], config: Any) -> list[str]:
    """Name the tensors of one weight: one, or one a layer where it is stacked."""
    name = family.tensor_name(path)
    return [name.format(layer=layer) for layer in range(config.n_layer)] if _is_stacked(path) else [name]


def _is_stacked(path: tuple[str, ...]) -> bool:
    return path[0] == "blocks"


def _open_tensors(paths: list[Path], family: Any, stack: contextlib.ExitStack) -> dict[str, tuple[Path, Any, str]]:
    """Map each tensor's name without the base prefix to (path, open file, name there); drop mask buffers."""
    tensors: dict[str, tuple[Path, Any, str]] = {}
    for path in paths:
        with _damage_named(path):
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
        for stored in file.keys():  # noqa: SIM118 (not a mapping)
            name = stored.removeprefix(family.BASE_PREFIX)
            if any(re.fullmatch(pattern, name) for pattern in family.KNOWN_BUFFERS):
                continue
            if name in tensors:
                raise InputError(f"{path} holds tensor {stored} a second time; the first is in {tensors[name][0]}")
            tensors[name] = path, file, stored
    return tensors


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}); download or save the model again") from None


def _check_names(tensors: Mapping[str, Any], wanted: list[str], config: Any, folder: Path) -> None:
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise InputError(f"{folder} lacks {_some(missing)}, which its config.json asks for")
    allowed = {*wanted, *(["lm_head.weight"] if config.tie_word_embeddings else [])}
    unknown = [name for name in tensors if name not in allowed]
    if unknown:
        raise InputError(f"{folder} holds {_some(unknown)}, for which its config.json has no place")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ("tensors " if len(names) > 1 else "tensor ") + ", ".join(names[:5]) + rest


def _check_tied_head(tensors: Mapping[str, Any], config: Any, family: Any, folder: Path) -> None:
    if not config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return
    table = family.tensor_name(family.TIED_TABLE)
    if not np.array_equal(_read(tensors, "lm_head.weight"), _read(tensors, table)):
        raise InputError(
            f"{folder} has tie_word_embeddings true, but lm_head.weight differs from {table}; set it to false in "
            "config.json or remove lm_head.weight"
        )


def _fill(
    tensors: Mapping[str, Any], names: list[str], shape: tuple[int, ...], storage: np.dtype, *, stacked: bool
) -> np.ndarray:
    """Read the tensors of one weight into one array, along its leading layer axis where it is stacked."""
    array = np.empty(shape, storage)
    rows = array if stacked else array[None]
    for row, name in zip(rows, names, strict=True):
        tensor = _read(tensors, name)
        if tensor.shape != row.shape:
            path, _, stored = tensors[name]
            raise InputError(
                f"{path}: tensor {stored} has shape {list(tensor.shape)}, its config.json asks for {list(row.shape)}"
            )
        row[...] = tensor
    return array


def _read(tensors: Mapping[str, Any], name: str) -> np.ndarray:
    path, file, stored = tensors[name]
    with _damage_named(path):
        stored_dtype = file.get_slice(stored).get_dtype()
        if stored_dtype not in _FLOATS:
            raise InputError(f"{path}: tensor {stored} has dtype {stored_dtype}, expected one of {', '.join(_FLOATS)}")
        tensor = file.get_tensor(stored)
    if not np.isfinite(tensor).all():
        raise InputError(f"{path}: tensor {stored} holds NaN or infinite values; the checkpoint is broken")
    return tensor


def save(folder: str | os.PathLike, config: Any, params: Mapping[str, Any]) -> None:
    """Write a model folder in Hugging Face's layout, which transformers and `load` read back to equal logits.

    Args:
        folder: made where it does not exist; config.json and model.safetensors in it are replaced, each atomically.
        params: weights of the config's family, stored in the dtype they have.

    Raises:
        InputError: the weights do not have the names and shapes that the config asks for.
    """
    family, folder, flat = FAMILIES[config.model_type], Path(folder), _flatten(params)
    wanted = _flatten(family.abstract_params(config))
    for path in sorted({*wanted, *flat}):
        given, asked = (list(tree[path].shape) if path in tree else "nothing" for tree in (flat, wanted))
        if given != asked:
            raise InputError(f"params has {given} at {'.'.join(path)}, its config asks for {asked}")
    tensors = {}
    for path, leaf in flat.items():
        rows = np.asarray(leaf) if _is_stacked(path) else np.asarray(leaf)[None]
        for name, row in zip(_names(family, path, config), rows, strict=True):
            tensors[_with_prefix(family, name)] = np.ascontiguousarray(row)
    with artifacts.atomic_write(folder / SINGLE_FILE) as partial:
        safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors writes files for the owner's eyes only
    artifacts.write_text(folder / "config.json", json.dumps(family.write_config(config), indent=2) + "\n")


def _flatten(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(dict(params))
    return {tuple(entry.key for entry in path): leaf for path, leaf in flat}


def _with_prefix(family: Any, name: str) -> str:
    return name if name.startswith("lm_head.") else family.BASE_PREFIX + name
