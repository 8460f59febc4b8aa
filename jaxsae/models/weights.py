"""Fill a model's weights from a checkpoint, part by part straight to their devices; write them as a model folder.

Reading is strict: every tensor of the checkpoint is used (the mask buffers of older ones excepted), every weight is
filled, shapes, dtypes and finiteness are checked, and the first thing wrong is named in one line. On the host there is
never more than one device's part of one weight beside what the devices hold; on CPU the arrays are the weights.
"""

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding

from jaxsae import artifacts
from jaxsae.artifacts import InputError
from jaxsae.mesh import param_sharding
from jaxsae.models import decoder, families, layers
from jaxsae.models.checkpoints import CONFIG_FILE, SINGLE_FILE, Checkpoint, StoredTensor

# Of a tensor that is read at once, as float32; dequantisation holds some three times as much for a moment. SmolLM2's
# .gguf file takes as long with 8 MiB (0.8 s of CPU), 1.4 times as long with 1 MiB.
CHUNK_BYTES = 2 * 2**20
_ALIGNMENT = 64  # bytes; jax on CPU takes an array over without a copy if it begins at a multiple


def read_config(checkpoint: Checkpoint) -> Any:
    """Return the config of the model's family.

    Raises:
        InputError: the model is not supported; it names field and value.
    """
    try:
        return families.of(checkpoint.fields.get("model_type")).read_config(checkpoint.fields)
    except InputError as error:
        where = checkpoint.path / CONFIG_FILE if checkpoint.path.is_dir() else checkpoint.path
        raise InputError(f"{where}: {error}") from None


def read_params(
    checkpoint: Checkpoint, config: Any, *, dtype: str, mesh: Mesh | None = None, sharding: str = "replicated"
) -> dict[str, Any]:
    """Fill the model's weights, and place each as soon as it is read.

    Matrices that only enter dots are stored in `dtype`; embeddings, norms and biases stay float32.

    Args:
        mesh: devices to place the weights on; None is the default device.
        sharding: "replicated", or "split" for the matrices in parts over all its devices (`mesh.param_sharding`).

    Raises:
        InputError: a tensor is missing, unknown, double, of another shape or dtype, or holds NaN or infinity; or a file
            is damaged. It names the tensor or file.
    """
    layers.check_dtype(dtype)
    family, template = families.of(config.model_type), decoder.abstract_params(config)
    tensors = _without_prefix(checkpoint, family)
    names = {path: _names(family, path, config) for path in _flatten(template)}
    _check_names(tensors, list(itertools.chain(*names.values())), config, checkpoint)
    filled = []
    for (path, own_names), leaf in zip(names.items(), jax.tree.leaves(template), strict=True):
        shape, is_turned = leaf.shape[1:] if _is_stacked(path) else leaf.shape, _is_turned(family, path)
        sources = [tensors[name] for name in own_names]
        _check_shapes(sources, shape[::-1] if is_turned else shape, checkpoint)
        sources = [_turned(tensor) for tensor in sources] if is_turned else sources
        weight = _Weight(sources, leaf.shape, np.dtype(dtype if family.is_dot_operand(path) else "float32"))
        placement = None if mesh is None else param_sharding(path, leaf.shape, mesh, sharding)
        filled.append(weight.place(placement))
    params = jax.tree.unflatten(jax.tree.structure(template), filled)
    _check_tied_head(tensors, config, family, checkpoint)
    return params


def _names(family: Any, path: tuple[str, ...], config: Any) -> list[str]:
    """Name the tensors of one weight: one, or one a layer where it is stacked."""
    name = family.tensor_name(path)
    return [name.format(layer=layer) for layer in range(config.n_layers)] if _is_stacked(path) else [name]


def _is_stacked(path: tuple[str, ...]) -> bool:
    return path[0] == "blocks"


def _is_turned(family: Any, path: tuple[str, ...]) -> bool:
    """Say whether checkpoints have the transpose of a weight."""
    return path[-1] == "weight" and path[-2] in family.IN_OUT_MODULES


def _turned(tensor: StoredTensor) -> StoredTensor:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        return tensor.read(index[::-1]).T

    return dataclasses.replace(tensor, shape=tensor.shape[::-1], read=read, axis=1 - tensor.axis)


def _without_prefix(checkpoint: Checkpoint, family: Any) -> dict[str, StoredTensor]:
    """Return the tensors by their names without the base prefix, mask buffers left out."""
    tensors: dict[str, StoredTensor] = {}
    for stored, tensor in checkpoint.tensors.items():
        name = stored.removeprefix(family.BASE_PREFIX)
        if any(re.fullmatch(pattern, name) for pattern in family.KNOWN_BUFFERS):
            continue
        if name in tensors:
            first = tensors[name].path
            raise InputError(f"{tensor.path} holds tensor {stored} a second time; the first is in {first}")
        tensors[name] = tensor
    return tensors


def _check_names(tensors: Mapping[str, Any], wanted: list[str], config: Any, checkpoint: Checkpoint) -> None:
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise InputError(f"{checkpoint.path} lacks {_some(missing)}, which {checkpoint.about} asks for")
    allowed = {*wanted, *(["lm_head.weight"] if config.tie_word_embeddings else [])}
    unknown = [name for name in tensors if name not in allowed]
    if unknown:
        raise InputError(f"{checkpoint.path} holds {_some(unknown)}, for which {checkpoint.about} has no place")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ("tensors " if len(names) > 1 else "tensor ") + ", ".join(names[:5]) + rest


def _check_shapes(sources: Sequence[StoredTensor], shape: tuple[int, ...], checkpoint: Checkpoint) -> None:
    for tensor in sources:
        if tensor.shape != shape:
            raise InputError(
                f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, {checkpoint.about} asks for "
                f"{list(shape)}"
            )


class _Weight:
    """One weight on its way from the tensors of a checkpoint, one a layer where it is stacked, to its devices."""

    def __init__(self, sources: Sequence[StoredTensor], shape: tuple[int, ...], dtype: np.dtype):
        self.sources, self.shape, self.dtype = sources, shape, dtype
        self.is_stacked = len(shape) > len(sources[0].shape)

    def place(self, sharding: NamedSharding | None) -> jax.Array:
        """Read the weight to its devices, one part after the other; the default device without a sharding."""
        if sharding is None:
            return jax.block_until_ready(jax.device_put(self.read(tuple(slice(0, size) for size in self.shape))))
        owners: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(self.shape).items():
            assert index is not None  # it is only for devices of other processes
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
            owners.setdefault(bounds, []).append(device)
        arrays = []
        for bounds, devices in owners.items():
            part = self.read(tuple(slice(start, stop) for start, stop in bounds))
            arrays += [jax.device_put(part, device) for device in devices]
            jax.block_until_ready(arrays[-len(devices) :])  # or the next part is read while this one is still held
        return jax.make_array_from_single_device_arrays(self.shape, sharding, arrays)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Return the part of the weight under `index`, whose slices have bounds and step 1."""
        array = _aligned([part.stop - part.start for part in index], self.dtype)
        if not self.is_stacked:
            _copy(self.sources[0], index, array)
            return array
        for row, source in zip(array, self.sources[index[0]], strict=True):
            _copy(source, index[1:], row)
        return array


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


def _copy(tensor: StoredTensor, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Read the part of a tensor under `index` into `out`, a chunk at a time along its cheap axis."""
    axis, n = tensor.axis, out.shape[tensor.axis]
    step = max(1, CHUNK_BYTES * n // max(1, 4 * out.size))
    for start in range(0, n, step):
        stop = min(start + step, n)
        own = list(index)
        own[axis] = slice(index[axis].start + start, index[axis].start + stop)
        chunk = tensor.read(tuple(own))
        if not np.isfinite(chunk).all():
            raise InputError(
                f"{tensor.path}: tensor {tensor.name} holds NaN or infinite values; the checkpoint is broken"
            )
        out[(slice(None),) * axis + (slice(start, stop),)] = chunk


def _check_tied_head(tensors: Mapping[str, StoredTensor], config: Any, family: Any, checkpoint: Checkpoint) -> None:
    if not config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return
    name = family.tensor_name(family.TIED_TABLE)
    head, table = tensors["lm_head.weight"], tensors[name]
    step = max(1, CHUNK_BYTES // (4 * math.prod(table.shape[1:])))
    columns = tuple(slice(0, size) for size in table.shape[1:])
    starts = range(0, table.shape[0], step)
    parts = ((slice(start, min(start + step, table.shape[0])), *columns) for start in starts)
    if head.shape != table.shape or not all(np.array_equal(head.read(part), table.read(part)) for part in parts):
        raise InputError(
            f"{checkpoint.path} has tie_word_embeddings true, but lm_head.weight differs from {name}; set it to false "
            f"in {CONFIG_FILE} or remove lm_head.weight"
        )


def save(folder: str | os.PathLike, config: Any, params: Mapping[str, Any]) -> None:
    """Write a model folder in Hugging Face's layout, which transformers and `load` read back to equal logits.

    Args:
        folder: made where it does not exist; config.json and model.safetensors in it are replaced, each atomically.
        params: weights of the config's family, stored in the dtype they have.

    Raises:
        InputError: the weights do not have the names and shapes that the config asks for.
    """
    family, folder, flat = families.of(config.model_type), Path(folder), _flatten(params)
    wanted = _flatten(decoder.abstract_params(config))
    for path in sorted({*wanted, *flat}):
        given, asked = (list(tree[path].shape) if path in tree else "nothing" for tree in (flat, wanted))
        if given != asked:
            raise InputError(f"params has {given} at {'.'.join(path)}, its config asks for {asked}")
    tensors = {}
    for path, leaf in flat.items():
        rows = np.asarray(leaf) if _is_stacked(path) else np.asarray(leaf)[None]
        for name, row in zip(_names(family, path, config), rows, strict=True):
            stored = row.T if _is_turned(family, path) else row
            tensors[_with_prefix(family, name)] = np.ascontiguousarray(stored)
    with artifacts.atomic_write(folder / SINGLE_FILE) as partial:
        safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors writes files for the owner's eyes only
    artifacts.write_text(folder / CONFIG_FILE, json.dumps(family.write_config(config), indent=2) + "\n")


def _flatten(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(dict(params))
    return {tuple(entry.key for entry in path): leaf for path, leaf in flat}


def _with_prefix(family: Any, name: str) -> str:
    return name if name.startswith("lm_head.") else family.BASE_PREFIX + name
