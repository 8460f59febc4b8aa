"""What lies on disk between the stages: row types, files, versions and fingerprints.

Every file here is written whole or not at all (a temporary file, fsync, rename), carries `format_version` and
`code_version`, and is checked when it is read. A file that cannot be used raises `InputError` with one line that
names the file and the stage that rebuilds it. The schema of each file stands in docs/formats.md.

The axis letters of the whole code base:

    N examples    T positions          B rows in a batch    L layers         D residual width
    F SAE width   K kept features      H heads              C head width     M MLP width
    V vocabulary  R tracks             Q track metrics      P kept positions
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxsae import __version__

FORMAT_VERSION = 1
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, a limit on file sizes
PACKAGE_SCHEME = "package://"
RESID_POSITIONS = ("last_prompt", "last_answer", "answer_mean")
OVERFLOW_BYTES = 2 * 10**9  # a `resid` larger than this lies in a tensorstore beside features.npz


class InputError(ValueError):
    """Say in one line that a user's input, file or configuration cannot be used.

    The message holds what was expected, what came, where, and what to do. The command line prints it and exits with 2.
    """


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place, synced, when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails, as on a full disk, names no file
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write a JSON object with `format_version` and `code_version` in front, atomically."""
    text = json.dumps({**_versions(), **content}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike, *, rebuild: str) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote.

    Args:
        path: the file.
        rebuild: what the user can do to get it again, ending every error: "run jaxsae detect".

    Raises:
        InputError: the file is missing, is not UTF-8 JSON, or has another format version.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {rebuild}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); {rebuild}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object; {rebuild}")
    _check_version(content.get("format_version"), path, rebuild)
    return content


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, each with the versions in front, atomically."""
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**_versions(), **row}, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: str | os.PathLike, *, rebuild: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each non-empty line of a JSONL file; no version is asked for.

    Args:
        rebuild: what the user can do to get the file again, where the project made it.

    Raises:
        InputError: the file is missing, or a line is not UTF-8 or not a JSON object; it names the line.
    """
    path, way_out = Path(path), f"; {rebuild}" if rebuild else ""
    if not path.is_file():
        raise InputError(f"{path} is missing or not a file{way_out}")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise InputError(f"{path} line {number} is not readable JSON: {error}{way_out}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} holds a JSON {type(row).__name__}, expected an object{way_out}")
            yield number, row


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays and the versions to an uncompressed .npz, atomically."""
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **{name: np.asarray(x) for name, x in (_versions() | dict(arrays)).items()})


def read_npz(path: str | os.PathLike, *, rebuild: str, required: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Read every array of a .npz; the zip's CRC of each member is checked.

    Args:
        required: arrays that must be there; damage to the table of contents can hide some.

    Raises:
        InputError: the file is missing, damaged (the member is named), lacks an array or is of another format version.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    name = "its table of contents"
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                arrays[name] = archive[name]
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {rebuild}") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, OSError, EOFError, KeyError) as error:
        raise InputError(f"{path} is damaged at {name} ({error}); {rebuild}") from None
    version = arrays.pop("format_version", None)
    arrays.pop("code_version", None)
    _check_version(None if version is None else version.item(), path, rebuild)
    missing = [name for name in required if name not in arrays]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; {rebuild}")
    return arrays


def resolve_path(text: str | os.PathLike) -> Path:
    """Return a path, where "package://PACKAGE/PATH" stands for a file or folder inside an installed package.

    The package is looked up without running its code.

    Raises:
        InputError: the package is not installed as a folder, lacks that path, or the path leads out of it.
    """
    text = os.fspath(text)
    if not text.startswith(PACKAGE_SCHEME):
        return Path(text).expanduser()
    package, _, inside = text.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec is not None else []
    if not any(root.is_dir() for root in roots):
        raise InputError(f"{text}: no package {package!r} is installed here as a folder; install it, or give a path")
    if ".." in Path(inside).parts or Path(inside).is_absolute():
        raise InputError(f"{text}: the path {inside!r} leaves the package; it must stay inside")
    for path in (root / inside for root in roots):
        if path.exists():
            return path
    raise InputError(f"{text}: package {package} has no {inside!r} (looked in {roots[0]})")


def sha256_file(path: str | os.PathLike) -> str:
    """Return the hex sha256 of a file's bytes, read in 1 MiB pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """Return the hex sha256 of a JSON-like value, the same for equal content whatever the key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _versions() -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "code_version": __version__}


def _check_version(found: Any, path: Path, rebuild: str) -> None:
    if found != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {found}, this jaxsae reads {FORMAT_VERSION}; {rebuild}")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question with the answers that count as right; `group` is the fact that no split may divide.

    Attributes:
        answers: the texts that count as right, the best one first.
        wrong_answers: texts that are known to be wrong, the most tempting one first; may be empty.
        knowledge: text that holds the answer, for a prompt with "{knowledge}"; may be empty.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    group: str
    category: str = ""
    wrong_answers: tuple[str, ...] = ()
    knowledge: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to one question: the language model's own as generated, or one given by the question set.

    Attributes:
        prompt_ids: the token ids the model was given.
        answer_ids: the token ids it generated, before the stop, or those of the given answer; may be empty.
        label: 1 if hallucinated (no right answer in it, or given as wrong), 0 if right.
        logprobs: log-probability of each answer id given all before it, nats, one per answer id.
        entropies: entropy of the model's distribution where it gave each answer id, nats, one per answer id.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    group: str
    category: str
    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    label: int
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]


def write_answers(path: str | os.PathLike, answers: Iterable[Answer]) -> None:
    """Write `answers.jsonl`."""
    write_jsonl(path, (dataclasses.asdict(answer) for answer in answers))


def read_answers(path: str | os.PathLike) -> list[Answer]:
    """Read `answers.jsonl`.

    Raises:
        InputError: a line is damaged, lacks a field, has another format version, or repeats an id.
    """
    rebuild = "run jaxsae answer"
    if not Path(path).is_file():
        raise InputError(f"{path} is missing; {rebuild}")
    names = [field.name for field in dataclasses.fields(Answer)]
    answers, seen = [], set()
    for number, row in read_jsonl(path, rebuild=rebuild):
        _check_version(row.get("format_version"), Path(path), rebuild)
        missing = [name for name in names if name not in row]
        if missing:
            raise InputError(f"{path} line {number} lacks {', '.join(missing)}; {rebuild} --redo")
        values: dict[str, Any] = {
            name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in names
        }
        for name in ("logprobs", "entropies"):
            if len(values[name]) != len(values["answer_ids"]):
                raise InputError(
                    f"{path} line {number} has {len(values[name])} {name} for {len(values['answer_ids'])} answer ids; "
                    f"{rebuild}"
                )
        if row["id"] in seen:
            raise InputError(f"{path} line {number} repeats id {row['id']!r}; {rebuild}")
        seen.add(row["id"])
        answers.append(Answer(**values))
    if not answers:
        raise InputError(f"{path} holds no answer; {rebuild}")
    return answers


@dataclasses.dataclass(frozen=True)
class Features:
    """What the detectors may look at, for N answers: `features.npz`.

    Attributes:
        ids: the answers' ids, in order.
        positions: the P kept positions' names, such as "last_prompt".
        feature_ids: latents with the largest activations; -1 marks an empty slot.
        activations: their activations, descending, in residual units; 0 in empty slots.
        resid: the residual stream at `RESID_POSITIONS`.
        recon_error: squared SAE error over squared distance from the SAE's b_dec, per position.
        token_directions: of the answer's first token, and of the one that the model ranked highest of all others there:
            how its logit, less the mean logit, changes with the last layer's residual stream at the last prompt token,
            logits per residual unit; zeros for an empty answer.
        logprobs: all answers' token log-probabilities in one row, nats.
        offsets: answer n's log-probabilities are `logprobs[offsets[n]:offsets[n + 1]]`.
    """

    ids: tuple[str, ...]
    positions: tuple[str, ...]
    feature_ids: Int[np.ndarray, "N L P K"]
    activations: Float[np.ndarray, "N L P K"]
    resid: Float[np.ndarray, "N L 3 D"]
    recon_error: Float[np.ndarray, "N L P"]
    token_directions: Float[np.ndarray, "N 2 D"]
    logprobs: Float[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " N+1"]

    def at(self, position: str) -> tuple[Int[np.ndarray, "N L K"], Float[np.ndarray, "N L K"]]:
        """Return (feature_ids, activations) at one kept position.

        Raises:
            InputError: the position was not kept.
        """
        if position not in self.positions:
            raise InputError(
                f"features.npz keeps positions {', '.join(self.positions)}, not {position}; add it to "
                "features.positions"
            )
        index = self.positions.index(position)
        return self.feature_ids[:, :, index], self.activations[:, :, index]

    def recon_error_at(self, position: str) -> Float[np.ndarray, "N L"]:
        """Return the SAE errors at a position that `at` has."""
        return self.recon_error[:, :, self.positions.index(position)]

    def last(self, n_layers: int) -> "Features":
        """Return the last answer alone, and of it the first layers."""
        layered = ("feature_ids", "activations", "resid", "recon_error")
        return Features(
            ids=self.ids[-1:],
            positions=self.positions,
            token_directions=self.token_directions[-1:],
            logprobs=self.logprobs[self.offsets[-2] :],
            offsets=self.offsets[-2:] - self.offsets[-2],
            **{name: getattr(self, name)[-1:, :n_layers] for name in layered},
        )


def write_features(path: str | os.PathLike, features: Features) -> None:
    """Write `features.npz`; a `resid` above `OVERFLOW_BYTES` goes to a tensorstore `features.resid.zarr` beside it."""
    path = Path(path)
    arrays = {field.name: np.asarray(getattr(features, field.name)) for field in dataclasses.fields(features)}
    if features.resid.nbytes > OVERFLOW_BYTES:
        _write_overflow(_overflow_path(path), features.resid)
        del arrays["resid"]
    write_npz(path, arrays)


def read_features(path: str | os.PathLike) -> Features:
    """Read `features.npz` and, where it has one, the tensorstore beside it.

    Raises:
        InputError: a file is missing or damaged, or the arrays do not fit each other.
    """
    path, rebuild = Path(path), "run jaxsae track"
    names = [field.name for field in dataclasses.fields(Features)]
    arrays = read_npz(path, rebuild=rebuild, required=[name for name in names if name != "resid"])
    if "resid" not in arrays:
        arrays["resid"] = _read_overflow(_overflow_path(path), f"{rebuild} --redo")
    n = len(arrays["ids"])
    for name in ("feature_ids", "activations", "resid", "recon_error", "token_directions"):
        if len(arrays[name]) != n:
            raise InputError(f"{path} holds {n} ids but {len(arrays[name])} rows of {name}; {rebuild}")
    fields: dict[str, Any] = {name: arrays[name] for name in names}
    fields |= {name: tuple(arrays[name].tolist()) for name in ("ids", "positions")}
    return Features(**fields)


def _overflow_path(path: Path) -> Path:
    return path.with_suffix(".resid.zarr")


def _overflow_spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}


def _write_overflow(path: Path, resid: Float[np.ndarray, "N L 3 D"]) -> None:
    import tensorstore as ts

    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    metadata = {
        "shape": resid.shape,
        "data_type": "float16",
        "codecs": codecs,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [256, *resid.shape[1:]]}},
    }
    spec = _overflow_spec(path) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    try:
        ts.open(spec, create=True, delete_existing=True).result().write(resid).result()
    except ValueError as error:  # tensorstore raises nothing else; the system's error number is in the text
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def _read_overflow(path: Path, rebuild: str) -> Float[np.ndarray, "N L 3 D"]:
    import tensorstore as ts

    try:
        return ts.open(_overflow_spec(path) | {"fill_missing_data_reads": False}).result().read().result()
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is missing or damaged ({str(error)[:200]}); {rebuild}") from None
