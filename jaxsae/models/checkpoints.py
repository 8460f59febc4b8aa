"""What a model's files hold, whatever their format: config fields, tensors to be read in parts, a tokenizer, stop ids.

Two formats are read: a folder in Hugging Face's layout (config.json, model.safetensors or its shards, tokenizer files)
and a .gguf file. Both give Hugging Face's names and shapes. Nothing is read before it is asked for, and damage is named
in one line. Where a folder has no safetensors, pytorch_model.bin or its shards are read, by `torch_file`: no pickle is
ever run.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # before safetensors.numpy, which cannot give bfloat16 otherwise
import numpy as np
import safetensors
import safetensors.numpy

from jaxsae import artifacts
from jaxsae.artifacts import InputError
from jaxsae.models import tokenizer, torch_file

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# A single file goes before shards, and safetensors before what torch.save wrote.
_WEIGHTS = ((SINGLE_FILE, INDEX_FILE), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
GGUF_SUFFIX = ".gguf"

_FLOATS = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_HUB_NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, unread.

    Attributes:
        path: the file it lies in.
        name: how that file calls it.
        shape: axis sizes, as Hugging Face's checkpoints have them.
        read: `read((rows, columns))` returns the part under slices with bounds and step 1, as floats.
        axis: the axis along which a part costs its share of the whole; others may cost the whole.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened.

    Attributes:
        path: folder or file.
        about: what says how the model is built, for messages: "its config.json".
        fields: the content of Hugging Face's config.json.
        tensors: by Hugging Face's names; what has no place in the model is among them under the name it has.
        stop_ids: tokens that end an answer beside the config's end-of-text.
        files: all that decide what the model computes, for its fingerprint.
        make_tokenizer: makes the tokenizer, given the model's vocabulary size; None where the files hold none.
    """

    path: Path
    about: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    stop_ids: tuple[int, ...]
    files: tuple[Path, ...]
    make_tokenizer: Callable[[int], Any]


def locate(source: str | os.PathLike, *, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the local folder or .gguf file of a model and, for a model of the Hub, the commit it is at.

    Args:
        source: a folder, a .gguf file, "package://some_package/path/inside" for one of them, the name of a model on the
            Hugging Face Hub, or "owner/model:file.gguf" for one file there. What is on the Hub is downloaded unless it
            is in the local cache.
        revision: branch, tag or commit; for Hub names only.

    Raises:
        InputError: there is no such folder, file, package or model, or the Hub cannot be reached.
    """
    name = os.fspath(source)
    path = artifacts.resolve_path(name)
    repository, _, file = name.partition(":")
    if not path.exists() and file.endswith(GGUF_SUFFIX) and re.fullmatch(_HUB_NAME, repository):
        return _download(repository, revision, file=file)
    if not path.exists() and not name.endswith(GGUF_SUFFIX) and re.fullmatch(_HUB_NAME, name):
        return _download(name, revision)
    if name.endswith(GGUF_SUFFIX) and not path.is_file():
        raise InputError(f"{name} is missing or not a file; give the path of a {GGUF_SUFFIX} file")
    if not name.endswith(GGUF_SUFFIX) and not path.is_dir():
        raise InputError(
            f"{name} is not a folder; a model is a folder with {CONFIG_FILE} and {SINGLE_FILE}, or a {GGUF_SUFFIX} file"
        )
    if revision is not None:
        raise InputError(f"revision = {revision!r} is for models of the Hub, but {name} is on this disk; remove it")
    return path, None


def _download(name: str, revision: str | None, *, file: str | None = None) -> tuple[Path, str]:
    import huggingface_hub

    patterns = [CONFIG_FILE, GENERATION_FILE, SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors", *tokenizer.FILES]
    older = [*_WEIGHTS[1], "pytorch_model-*-of-*.bin"]
    try:
        if file is not None:
            path = Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
        else:
            path = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
            if not any((path / one).exists() for one in _WEIGHTS[0]):
                path = Path(huggingface_hub.snapshot_download(name, revision=path.name, allow_patterns=older))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        at = "" if revision is None else f" at revision {revision!r}"
        what = "a model of that name" if file is None else f"its file {file}"
        raise InputError(
            f"{name} is no local folder, and the Hugging Face Hub did not give {what}{at} ({reason}); give a folder "
            f"with {CONFIG_FILE} and {SINGLE_FILE}, or a {GGUF_SUFFIX} file"
        ) from None
    return path, path.parents[len(Path(file).parts) - 1].name if file is not None else path.name


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open a folder in Hugging Face's layout or a .gguf file; its tensors can be read inside the block.

    Raises:
        InputError: a file is missing or damaged; it is named.
    """
    if path.suffix == GGUF_SUFFIX:
        from jaxsae.models import gguf

        yield gguf.open_file(path)
        return
    fields = read_object(path / CONFIG_FILE)
    files = weight_files(path)
    with contextlib.ExitStack() as stack:
        yield Checkpoint(
            path=path,
            about=f"its {CONFIG_FILE}",
            fields=fields,
            tensors=_open_tensors(files, stack),
            stop_ids=_read_stop_ids(path / GENERATION_FILE),
            files=(*files, *(file for name in tokenizer.FILES if (file := path / name).is_file())),
            make_tokenizer=lambda n_vocab: tokenizer.from_folder(path, n_vocab),
        )


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file of a model folder holds.

    Raises:
        InputError: the file is missing or unreadable, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; a model folder holds {CONFIG_FILE} and {SINGLE_FILE}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def _read_stop_ids(path: Path) -> tuple[int, ...]:
    """Return the end-of-text ids of generation_config.json, none where there is no such file."""
    given = read_object(path).get("eos_token_id") if path.is_file() else None
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(token_id) is int for token_id in ids):
        raise InputError(f"{path}: eos_token_id = {given!r} is neither a token id nor a list of them")
    return tuple(ids)


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a model folder.

    Raises:
        InputError: there are none, the index is damaged, or a shard is missing.
    """
    for single, index in _WEIGHTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder, folder / index)
    raise InputError(f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}{_other_weights(folder)}")


def _shards(folder: Path, index: Path) -> list[Path]:
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index} has no weight_map; download the model again")
    paths = []
    for name in sorted(set(map(str, shards.values()))):
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{index} names the shard {name!r}, which is not in {folder}; download the model again")
        paths.append(folder / name)
    return paths


def _other_weights(folder: Path) -> str:
    """Say which files of other formats a folder holds, and what to do with them."""
    names = [
        path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".h5", ".msgpack", ".pt", ".pth")
    ]
    files = [path.name for path in sorted(folder.iterdir()) if path.suffix == GGUF_SUFFIX]
    if files:
        return f"; give the path of {files[0]} itself"
    if names:
        return (
            f", only {', '.join(names)}, which may run code when opened: convert it to safetensors where you trust it "
            "(transformers' save_pretrained writes them)"
        )
    return ""


def _open_tensors(paths: list[Path], stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        opened = _open_torch_file(path) if path.suffix == ".bin" else _open_safetensors(path, stack)
        for name, tensor in opened.items():
            if name in tensors:
                raise InputError(f"{path} holds tensor {name} a second time; the first is in {tensors[name].path}")
            tensors[name] = tensor
    return tensors


def _open_torch_file(path: Path) -> dict[str, StoredTensor]:
    def make_read(name, tensor):
        def read(index: tuple[slice, ...]) -> np.ndarray:
            if tensor.dtype not in _FLOATS.values():
                raise InputError(_wrong_dtype(path, name, tensor.dtype.name))
            return tensor[index]

        return read

    tensors = torch_file.read_tensors(path)
    return {name: StoredTensor(path, name, tensor.shape, make_read(name, tensor)) for name, tensor in tensors.items()}


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    with _damage_named(path):
        file = stack.enter_context(safetensors.safe_open(path, framework="np"))
        return {name: _stored(path, file, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _wrong_dtype(path: Path, name: str, dtype: str) -> str:
    return f"{path}: tensor {name} has dtype {dtype}, expected one of {', '.join(_FLOATS)}"


def _stored(path: Path, file: Any, name: str) -> StoredTensor:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        with _damage_named(path):
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in _FLOATS:
                raise InputError(_wrong_dtype(path, name, tensor.get_dtype()))
            return tensor[index]

    return StoredTensor(path, name, tuple(file.get_slice(name).get_shape()), read)


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}); download or save the model again") from None
