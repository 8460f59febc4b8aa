"""The activation store: one zarr array of residual streams `[L, tokens, D]`, written by shards, read by spans.

    resid.zarr      zarr v3, uint16 (bfloat16's bits), shard [L, 4096, D], inner chunk [1, 128, D], crc32c per chunk
    tokens.npz      token_ids int32 [tokens], contexts of equal length one after the other
    meta.json       `StoreMeta` and the sha256 of tokens.npz, of resid.zarr/zarr.json and of itself; written last
    done/<i>.json   shard i is durable: token range, CRC-32 of its values, seconds

A shard counts when its done file exists, so a run killed at any moment leaves whole shards or nothing. Every byte is
under a checksum; a read that fails names the file and how to rebuild that shard alone. Only this file knows
tensorstore.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from absl import logging
from jaxtyping import BFloat16, Int

from jaxsae import __version__, artifacts
from jaxsae.artifacts import DISK_FULL, InputError
from jaxsae.progress import human_bytes

COMPRESSIONS = ("raw", "blosc")
SHARD_TOKENS = 4096
BLOCK_TOKENS = 128
REBUILD = "run jaxsae extract"
_INDEX_CACHE_BYTES = 64 * 2**20  # the shard indices of 10 M tokens of 24 layers take 30 MB
_READS_IN_FLIGHT = 8  # with more, tensorstore's own buffers grow and their page faults take twice the time of a read
_DISK_MARGIN = 0.05  # share of the needed bytes that must stay free besides: file system blocks, logs, later stages


@dataclasses.dataclass(frozen=True)
class StoreMeta:
    """What a store holds and how: the content of `meta.json`.

    Attributes:
        model: the language model's name.
        model_fingerprint: of its weights and configuration.
        n_layers: L, residual streams kept for each token.
        d_model: D, the residual width.
        context: T, tokens per context; contexts follow each other without gaps.
        n_tokens: tokens in the store, a multiple of `context`.
        bos_id: the token that the training source drops, or None.
        corpus_fingerprint: of the text the contexts were packed from.
        compute_batch: contexts per forward pass; it decides the last bits of the values.
        compression: "raw", or "blosc" (lz4 with bitshuffle: lossless, 1.25-1.44x smaller on residual streams).
        dtype: the values' type; the array itself is uint16, which every zarr reader opens.
        shard_tokens: tokens per file.
        block_tokens: tokens per inner chunk, a divisor of `shard_tokens`.
    """

    model: str
    model_fingerprint: str
    n_layers: int
    d_model: int
    context: int
    n_tokens: int
    bos_id: int | None
    corpus_fingerprint: str
    compute_batch: int
    compression: str = "raw"
    dtype: str = "bfloat16"
    shard_tokens: int = SHARD_TOKENS
    block_tokens: int = BLOCK_TOKENS

    @property
    def n_shards(self) -> int:
        """Return the number of shard files; the last may hold fewer tokens."""
        return math.ceil(self.n_tokens / self.shard_tokens)

    def span(self, shard: int) -> tuple[int, int]:
        """Return the first token of a shard and the one after its last."""
        return shard * self.shard_tokens, min((shard + 1) * self.shard_tokens, self.n_tokens)


def create(dir: str | os.PathLike, meta: StoreMeta, *, token_ids: Int[np.ndarray, " tokens"]) -> "Store":
    """Create an empty store; `meta.json` is written last, so that a half-made store is none.

    Raises:
        InputError: the folder already holds a store or its shards, `meta` is not usable, or the disk is full.
    """
    dir = Path(dir)
    _check_meta(meta, len(token_ids))
    if (dir / "meta.json").exists():
        raise InputError(f"{dir} already holds a store; open it, or remove the folder and {REBUILD}")
    if any((dir / "done").glob("*.json")):
        raise InputError(f"{dir} holds finished shards but no meta.json; remove the folder and {REBUILD}")
    with _disk_errors(dir):
        (dir / "done").mkdir(parents=True, exist_ok=True)
        artifacts.write_npz(dir / "tokens.npz", {"token_ids": np.asarray(token_ids, np.int32)})
        ts.open(_array_spec(dir, meta), create=True, delete_existing=True).result()
        content = dataclasses.asdict(meta) | _file_hashes(dir)
        artifacts.write_json(dir / "meta.json", content | {"sha256": _self_hash(content)})
    return open(dir)


def open(dir: str | os.PathLike, *, rebuild: str = REBUILD) -> "Store":
    """Open a store, complete or not, and check everything but the shards.

    Args:
        dir: the `activations/` folder.
        rebuild: what the user can do to get a missing or damaged part again, in every error.

    Raises:
        InputError: meta.json, tokens.npz or zarr.json is missing, damaged or of another format version.
    """
    dir = Path(dir)
    content = artifacts.read_json(dir / "meta.json", rebuild=rebuild)
    again = f"remove {dir} and {rebuild}"
    names = {field.name for field in dataclasses.fields(StoreMeta)}
    written = {name: value for name, value in content.items() if name not in ("format_version", "code_version")}
    recorded = written.pop("sha256", None)
    if recorded != _self_hash(written, content.get("code_version")) or not names <= written.keys():
        raise InputError(f"{dir / 'meta.json'} is damaged: its sha256 does not match its content; {again}")
    for key, found in _file_hashes(dir, again).items():
        if found != written.get(key):
            name = "tokens.npz" if key == "tokens_sha256" else "resid.zarr/zarr.json"
            raise InputError(
                f"{dir / name} is damaged: sha256 {found[:12]}, meta.json has {written[key][:12]}; {again}"
            )
    meta = StoreMeta(**{name: written[name] for name in names})
    token_ids = artifacts.read_npz(dir / "tokens.npz", rebuild=again)["token_ids"]
    array = ts.open(_array_spec(dir, meta), open=True).result()
    return Store(dir, meta, token_ids, rebuild, array, set())


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """An open store. Values are bfloat16, the residual stream after each block.

    Attributes:
        dir: the `activations/` folder.
        meta: what it holds.
        token_ids: the token of each position, int32, whole in memory.
        rebuild: ends every error.
    """

    dir: Path
    meta: StoreMeta
    token_ids: Int[np.ndarray, " tokens"]
    rebuild: str
    _array: ts.TensorStore
    _seen_done: set[int]

    def shard_path(self, shard: int) -> Path:
        """Return the file that holds a shard's values."""
        return self.dir / "resid.zarr" / "c" / "0" / str(shard) / "0"

    def done_path(self, shard: int) -> Path:
        """Return the file that says that a shard is durable."""
        return self.dir / "done" / f"{shard}.json"

    def is_done(self, shard: int) -> bool:
        """Return whether a shard's done file and its data file exist."""
        return self.done_path(shard).exists() and self.shard_path(shard).exists()

    def missing_shards(self) -> list[int]:
        """Return the shards that have to be computed, ascending."""
        return [shard for shard in range(self.meta.n_shards) if not self.is_done(shard)]

    @property
    def is_complete(self) -> bool:
        """Return whether every shard is on disk; their bytes are checked when they are read."""
        return not self.missing_shards()

    def begin_shard(
        self, shard: int, resid: BFloat16[np.ndarray, "L n D"], *, started: float | None = None
    ) -> "PendingShard":
        """Start writing one whole shard; it counts after `PendingShard.finish`. `resid` must not change before that.

        Args:
            shard: its index.
            resid: the values of its token range.
            started: `time.monotonic()` when work on the shard began, for the recorded seconds.

        Raises:
            InputError: the shape is not that of the shard.
        """
        start, stop = self.meta.span(shard)
        expected = (self.meta.n_layers, stop - start, self.meta.d_model)
        if not 0 <= shard < self.meta.n_shards or resid.shape != expected:
            raise InputError(
                f"shard {shard} of the {self.meta.n_shards} of {self.dir} has shape {expected}, got {resid.shape}"
            )
        bits = np.ascontiguousarray(resid).view(np.uint16)
        # A done file left beside a lost data file must not vouch for what is being written.
        self.done_path(shard).unlink(missing_ok=True)
        self._seen_done.discard(shard)
        write = self._array[:, start:stop].write(bits, can_reference_source_data_indefinitely=True)
        content = {"shard": shard, "start": start, "stop": stop, "crc32": zlib.crc32(bits.data)}
        return PendingShard(self, content, time.monotonic() if started is None else started, write)

    def write_shard(self, shard: int, resid: BFloat16[np.ndarray, "L n D"]) -> None:
        """Write one whole shard and mark it done.

        Raises:
            InputError: the shape is not that of the shard, or the disk is full.
        """
        self.begin_shard(shard, resid).finish()

    def read_spans(
        self, spans: Iterable[tuple[int, int]], *, layers: slice = slice(None), into: np.ndarray | None = None
    ) -> BFloat16[np.ndarray, "L n D"]:
        """Read token spans, laid one after the other; only these layers' bytes are read.

        Args:
            spans: first token and the one after the last, of each span.
            layers: contiguous layers.
            into: uint16 [L tokens D] with room for the spans, to read into memory that is there already.

        Raises:
            InputError: a span is outside of the store, or a shard of it is missing or damaged; the file is named.
        """
        chosen = contiguous(layers, self.meta.n_layers)
        pieces = [piece for span in spans for piece in self._pieces(*span)]
        n = sum(stop - start for _, start, stop in pieces)
        bits = np.empty((len(chosen), n, self.meta.d_model), np.uint16) if into is None else into[:, :n]
        target, offset = ts.array(bits, copy=False, write=True), 0
        in_flight: deque[tuple[int, ts.Future]] = deque()
        for shard, start, stop in pieces:
            part = self._array[chosen.start : chosen.stop, start:stop]
            in_flight.append((shard, target[:, offset : offset + stop - start].write(part).commit))
            offset += stop - start
            if len(in_flight) == _READS_IN_FLIGHT:
                self._wait(*in_flight.popleft())
        for shard, piece in in_flight:
            self._wait(shard, piece)
        return bits.view(ml_dtypes.bfloat16)

    def read(self, layers: slice, start: int, stop: int) -> BFloat16[np.ndarray, "L n D"]:
        """Read tokens `start` to `stop` of some layers.

        Raises:
            InputError: the range is outside of the store, or a shard of it is missing or damaged; the file is named.
        """
        return self.read_spans([(start, stop)], layers=layers)

    def verify(self) -> None:
        """Read every byte and compare each shard with the checksum recorded when it was written.

        Raises:
            InputError: a shard is missing, damaged, or not the one that was written; the file is named.
        """
        for shard in range(self.meta.n_shards):
            start, stop = self.meta.span(shard)
            values = self.read(slice(None), start, stop)
            record = artifacts.read_json(self.done_path(shard), rebuild=self._rebuild_shard(shard))
            crc32 = zlib.crc32(values.view(np.uint16).data)
            if (record.get("start"), record.get("stop"), record.get("crc32")) != (start, stop, crc32):
                raise self._broken(
                    shard, f"holds crc32 {crc32} of tokens {start}-{stop}, {self.done_path(shard).name} says otherwise"
                )

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        if not 0 <= start <= stop <= self.meta.n_tokens:
            raise InputError(f"tokens {start} to {stop} asked of {self.dir}, which holds {self.meta.n_tokens}")
        while start < stop:
            shard = start // self.meta.shard_tokens
            if shard not in self._seen_done:
                if not self.is_done(shard):
                    raise self._broken(shard, "is missing or not finished")
                self._seen_done.add(shard)
            end = min(stop, self.meta.span(shard)[1])
            yield shard, start, end
            start = end

    def _wait(self, shard: int, read: ts.Future) -> None:
        try:
            read.result()
        except ValueError as error:
            missing = str(error).startswith("NOT_FOUND")
            what = "is missing or lacks a chunk" if missing else f"is damaged ({_one_line(error)})"
            raise self._broken(shard, what) from None

    def _rebuild_shard(self, shard: int) -> str:
        return f"delete {self.done_path(shard)} if it exists and {self.rebuild}: it computes only what is missing"

    def _broken(self, shard: int, what: str) -> InputError:
        return InputError(f"{self.shard_path(shard)} {what}; {self._rebuild_shard(shard)}")


@dataclasses.dataclass(frozen=True, eq=False)
class PendingShard:
    """A shard on its way to the disk."""

    store: Store
    content: Mapping[str, int]
    started: float
    _write: ts.WriteFutures

    def finish(self) -> None:
        """Wait until the values are durable, then write the shard's done file.

        Raises:
            InputError: the disk is full or not writable; the shard does not count.
        """
        path = self.store.shard_path(self.content["shard"])
        with _disk_errors(path):
            self._write.commit.result()
        seconds = round(time.monotonic() - self.started, 3)
        with _disk_errors(self.store.dir):
            artifacts.write_json(self.store.done_path(self.content["shard"]), dict(self.content) | {"seconds": seconds})


def required_bytes(n_layers: int, n_tokens: int, d_model: int) -> int:
    """Return the bytes of a raw store: chunks of whole blocks with their checksums, shard indices, token ids."""
    n_shards = math.ceil(n_tokens / SHARD_TOKENS)
    chunk = 2 * BLOCK_TOKENS * d_model + 4  # crc32c after each chunk
    index = 16 * n_layers * (SHARD_TOKENS // BLOCK_TOKENS) + 4  # offset and size of each chunk, crc32c
    small_files = 4096 * (n_shards + 4)  # a done file takes one file system block
    return n_layers * math.ceil(n_tokens / BLOCK_TOKENS) * chunk + n_shards * index + 4 * n_tokens + small_files


def check_disk(dir: str | os.PathLike, needed: int) -> None:
    """Log what the store will take and refuse if the disk has not that and 5 % more free.

    Raises:
        InputError: it does not fit; the message has both amounts.
    """
    existing = Path(dir).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed * (1 + _DISK_MARGIN):
        raise InputError(
            f"{dir} needs {human_bytes(needed)} and 5 % to spare, the disk has {human_bytes(free)} free; free some, "
            "lower corpus.n_tokens, use another --workdir, or set activations.source=stream"
        )
    logging.info("%s needs %s, the disk has %s free", dir, human_bytes(needed), human_bytes(free))


def _array_spec(dir: Path, meta: StoreMeta) -> dict[str, Any]:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": 2, "blocksize": 0}
    packing = [{"name": "blosc", "configuration": blosc}] if meta.compression == "blosc" else []
    sharding = {
        "chunk_shape": [1, meta.block_tokens, meta.d_model],
        # The checksum is among the inner codecs: outside of the sharding it would not be checked by partial reads.
        "codecs": [little_endian, *packing, {"name": "crc32c"}],
        "index_codecs": [little_endian, {"name": "crc32c"}],
        "index_location": "end",
    }
    shard_shape = [meta.n_layers, meta.shard_tokens, meta.d_model]
    metadata = {
        "shape": [meta.n_layers, meta.n_tokens, meta.d_model],
        "data_type": "uint16",
        "fill_value": 0,
        "attributes": {"dtype": meta.dtype},
        "dimension_names": ["layer", "token", "residual"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(dir / "resid.zarr") + "/"},
        "metadata": metadata,
        # An all-zero chunk that was not stored would look like a lost one.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "context": {"cache_pool": {"total_bytes_limit": _INDEX_CACHE_BYTES}},
    }


def _check_meta(meta: StoreMeta, n_token_ids: int) -> None:
    if meta.compression not in COMPRESSIONS:
        raise InputError(
            f"activations compression is one of {', '.join(COMPRESSIONS)}, got {meta.compression!r}; choose one of them"
        )
    if meta.n_tokens < 1 or meta.n_tokens % meta.context or meta.n_tokens != n_token_ids:
        raise InputError(
            f"a store holds whole contexts of {meta.context} tokens and one id for each token, got {meta.n_tokens} "
            f"tokens and {n_token_ids} ids"
        )


def contiguous(layers: slice, n_layers: int) -> range:
    """Return the layers that a slice names.

    Raises:
        InputError: there are none, or they do not follow each other.
    """
    chosen = range(n_layers)[layers]
    if len(chosen) == 0 or chosen.step != 1:
        raise InputError(f"layers {layers} is not a contiguous, non-empty part of the store's {n_layers} layers")
    return chosen


def _file_hashes(dir: Path, rebuild: str = REBUILD) -> dict[str, str]:
    files = {"tokens_sha256": dir / "tokens.npz", "zarr_sha256": dir / "resid.zarr" / "zarr.json"}
    for path in files.values():
        if not path.is_file():
            raise InputError(f"{path} is missing; {rebuild}")
    return {key: artifacts.sha256_file(path) for key, path in files.items()}


def _self_hash(content: Mapping[str, Any], code_version: str | None = __version__) -> str:
    return artifacts.fingerprint({**content, "code_version": code_version})


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write of small files or of tensorstore into an InputError that names `path`."""
    advice = "free some space and run jaxsae extract again: it goes on from the last whole shard"
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise InputError(f"{path} could not be written: {error.strerror}; {advice}") from None
    except ValueError as error:  # tensorstore raises nothing else; the status is in the text
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None or int(code[1]) not in DISK_FULL:
            raise
        raise InputError(f"{path} could not be written: {os.strerror(int(code[1]))}; {advice}") from None


def _one_line(error: ValueError) -> str:
    return json.dumps(str(error).split("[tensorstore_spec")[0][:300])[1:-1]
