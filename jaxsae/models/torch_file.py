"""Weights that torch.save wrote (pytorch_model.bin), read without running them.

Such a file is a zip archive: data.pkl, a pickle that says which part of which storage each tensor is, and the storages'
bytes as they are. A pickle is a program that may do anything, so it is never handed to an unpickler. Its operations are
gone through one by one here, and only those of a state dict are known: texts, small numbers, tuples, dicts, and the few
names below, none of which is imported. Whatever else stands in the file is named and refused.
"""

import dataclasses
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxsae.artifacts import InputError

_DTYPES = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_LOCAL_HEADER = struct.Struct("<26x2H")  # in front of a member's bytes; ends with the lengths of what stands between
_SAFELY = "convert the model to safetensors where you trust it (transformers' save_pretrained writes them)"


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict by name, mapped from the file and not yet read.

    Raises:
        InputError: the file is damaged, truncated or of torch before 1.6, or holds anything but tensors by name, and
            then it names what.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root, program = _open_program(archive)
            members = {member.filename: member for member in archive.infolist()}
        content, stored = np.memmap(path, np.uint8, mode="r"), _run(program)
        if not isinstance(stored, dict):
            raise _RefusedError(f"{_kind(stored)} in place of tensors by name")
        return {name: _map(content, members, root, name, tensor) for name, tensor in stored.items()}
    except _RefusedError as error:
        what = " ".join(str(error).split())
        raise InputError(f"{path} holds {what}, which is not read; {_SAFELY}") from None
    # A damaged file runs into whatever comes first.
    except (zipfile.BadZipFile, OSError, ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is damaged or truncated, or of torch before 1.6 ({reason}); download the model again, or {_SAFELY}"
        ) from None


class _RefusedError(Exception):
    """What a file holds beside tensors by name."""


def _open_program(archive: zipfile.ZipFile) -> tuple[str, bytes]:
    """Return the folder inside the archive, with its slash, and the pickle in it."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _RefusedError(f"the compressed or encrypted part {member.filename}")
    names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError(f"it holds {len(names)} data.pkl")
    root = names[0].removesuffix("data.pkl")
    order = root + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise _RefusedError("big-endian numbers")
    return root, archive.read(names[0])


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name that the program mentions; what it stands for is not imported."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Part of a storage; offset and strides count its elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _kind(part: Any) -> str:
    return type(part).__name__.strip("_").lower()


def _make_dict() -> dict[str, Any]:
    return {}


def _make_tensor(storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> _Tensor:
    if metadata or not isinstance(storage, _Storage):
        raise _RefusedError("a tensor that is not simply numbers")  # metadata may say to negate them
    return _Tensor(storage, offset, shape, strides)


def _make_parameter(tensor, requires_grad, hooks) -> _Tensor:
    return tensor


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _make_dict,
    "torch._utils._rebuild_parameter": _make_parameter,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MARK = object()


def _run(program: bytes) -> Any:
    """Return what a pickle makes of the operations and names that are known.

    Raises:
        _RefusedError: there is another operation or name.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for operation, argument, _ in pickletools.genops(program):
        name = operation.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "STOP"):
            _step(stack, name, argument)
    return stack.pop()


def _step(stack: list[Any], name: str, argument: Any) -> None:
    match name:
        case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
            stack.append(argument)
        case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
            stack.append(_CONSTANTS[name])
        case "EMPTY_DICT":
            stack.append({})
        case "MARK":
            stack.append(_MARK)
        case "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        case "SETITEM":
            *_, entry, value = stack[-2:]
            del stack[-2:]
            _set_items(stack[-1], [entry, value])
        case "SETITEMS":
            items = _pop_to_mark(stack)
            _set_items(stack[-1], items)
        case "GLOBAL":
            stack.append(_known_name(argument))
        case "BINPERSID":
            stack.append(_find_storage(*stack.pop()))
        case "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        case "BUILD":
            stack.pop()  # attributes of a state dict: the versions of its modules
        case _:
            raise _RefusedError(f"the pickle operation {name}")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    at = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), None)
    if at is None:
        raise ValueError("a group in its pickle has no beginning")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _set_items(target: dict[str, Any], items: list[Any]) -> None:
    for name, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(name, str):
            raise _RefusedError(f"{_kind(name)} in place of a tensor's name")
        target[name] = value


def _known_name(argument: str) -> _Name:
    name = argument.replace(" ", ".")
    if name not in _CALLS and name not in _DTYPES:
        raise _RefusedError(f"the name {name}")
    return _Name(name)


def _find_storage(kind: Any, type: Any, key: Any, location: Any, size: Any) -> _Storage:
    if kind != "storage" or not isinstance(type, _Name) or not isinstance(key, str):
        raise _RefusedError("something else than numbers")
    return _Storage(key, _DTYPES[type.name], size)


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(function, _Name) or function.name not in _CALLS:
        raise _RefusedError("a call of something that is no function")
    return _CALLS[function.name](*arguments)


def _map(content: np.ndarray, members: Mapping[str, zipfile.ZipInfo], root: str, name: str, tensor: Any) -> np.ndarray:
    if not isinstance(tensor, _Tensor):
        raise _RefusedError(f"{_kind(tensor)} in place of the tensor {name}")
    storage, member = tensor.storage, members[f"{root}data/{tensor.storage.key}"]
    between = _LOCAL_HEADER.unpack_from(content.data, member.header_offset)
    start = member.header_offset + _LOCAL_HEADER.size + sum(between)
    own = content[start : start + member.file_size]
    n_bytes = storage.dtype.itemsize
    if len(own) != n_bytes * storage.size:
        raise ValueError(f"tensor {name} has {len(own)} bytes of {n_bytes * storage.size}")
    strides = [n_bytes * stride for stride in tensor.strides]
    return np.ndarray(tensor.shape, storage.dtype, own, n_bytes * tensor.offset, strides)  # refuses to leave its bytes
