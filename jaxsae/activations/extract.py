"""Write the residual stream of every layer of a language model to a store, shard by shard.

Each shard is computed from its own contexts in forward passes of one fixed size, so that its bytes do not depend on
what else was computed in this run: a run that was killed and started again gives the same store, bit for bit. A
context that crosses the edge of two shards is computed for both. Host h of H computes the shards i with i % H == h.
"""

import dataclasses
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, BFloat16, Bool, Float, Int

from jaxsae.activations import store as stores
from jaxsae.activations.store import PendingShard, Store, StoreMeta
from jaxsae.artifacts import InputError

_WRITES_IN_FLIGHT = 2  # one shard is written while another waits for the disk and a third is computed
_POLL_SECONDS = 0.1


@runtime_checkable
class ResidualModel(Protocol):
    """What `extract` needs of a language model."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_positions(self) -> int: ...

    def residuals(self, token_ids: Int[np.ndarray, "B T"]) -> Float[Array, "L B T D"]:
        """Return the residual stream after every block."""
        ...


def extract(
    lm: ResidualModel,
    contexts: Int[np.ndarray, "n T"],
    dir: str | os.PathLike,
    *,
    bos_id: int | None,
    corpus_fingerprint: str,
    batch: int,
    compression: str = "raw",
    process_index: int = 0,
    process_count: int = 1,
    progress: Callable[[int, int, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    wait_seconds: float = 600.0,
) -> Store:
    """Compute and write the shards that this process owns and that are not on disk yet.

    Process 0 creates the store; the others wait for it, and nobody waits for the others at the end.

    Args:
        lm: the language model.
        contexts: packed token ids, one context a row.
        dir: the `activations/` folder.
        bos_id: the token that starts each context and divides documents; the training source drops it. None
            when no token does.
        corpus_fingerprint: of the text the contexts come from.
        batch: contexts per forward pass, at most as many as one shard needs.
        compression: "raw" or "blosc".
        process_index: this process, from 0.
        process_count: processes that write the store together.
        progress: called after each durable shard with this process's shards done and in all, and the seconds so far.
        should_stop: asked after each shard; when it answers True the store is returned incomplete.
        wait_seconds: how long processes other than 0 wait for the store to be created.

    Returns:
        The open store; `is_complete` says whether all processes' shards are there.

    Raises:
        InputError: the contexts do not fit the model, the store there is another one, the disk is too small, or
            residuals are not finite.
    """
    _check_arguments(lm, contexts, batch, process_index, process_count)
    meta = StoreMeta(
        model=lm.name,
        model_fingerprint=lm.fingerprint,
        n_layers=lm.n_layers,
        d_model=lm.d_model,
        context=contexts.shape[1],
        n_tokens=contexts.size,
        bos_id=bos_id,
        corpus_fingerprint=corpus_fingerprint,
        compute_batch=batch,
        compression=compression,
    )
    if process_index == 0:
        store = _open_or_create(Path(dir), meta, contexts)
    else:
        store = _wait_for(Path(dir), wait_seconds)
        _check_same(store, meta, contexts)
    owned = range(process_index, meta.n_shards, process_count)
    missing = [shard for shard in owned if not store.is_done(shard)]
    writer = _Writer(len(owned), len(owned) - len(missing), progress)
    for shard, resid, started in _shards(lm, store, contexts, missing):
        writer.add(store.begin_shard(shard, resid, started=started))
        if should_stop is not None and should_stop():
            break
    writer.finish()
    return store


class _Writer:
    """Keeps at most two shards on their way to the disk, and reports each one that arrived."""

    def __init__(self, n_owned: int, n_done: int, progress: Callable[[int, int, float], None] | None):
        self._n_owned, self._n_done, self._progress = n_owned, n_done, progress
        self._began = time.monotonic()
        self._pending: deque[PendingShard] = deque()

    def add(self, pending: PendingShard) -> None:
        self._pending.append(pending)
        if len(self._pending) > _WRITES_IN_FLIGHT:
            self._finish_oldest()

    def finish(self) -> None:
        while self._pending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        self._pending.popleft().finish()
        self._n_done += 1
        if self._progress is not None:
            self._progress(self._n_done, self._n_owned, time.monotonic() - self._began)


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One forward pass: the `n_contexts` contexts from `first` on, padded to `size`, for one shard."""

    shard: int
    first: int
    n_contexts: int
    size: int
    is_last_of_shard: bool


def _shards(
    lm: ResidualModel, store: Store, contexts: Int[np.ndarray, "n T"], shards: Iterable[int]
) -> Iterator[tuple[int, BFloat16[np.ndarray, "L n D"], float]]:
    """Yield each shard, its values and when its computation began (`time.monotonic()`)."""
    meta = store.meta
    resid, started = None, time.monotonic()
    for step, values in _forward(lm, contexts, _passes(meta, shards)):
        start, stop = meta.span(step.shard)
        if resid is None:
            resid = np.empty((meta.n_layers, stop - start, meta.d_model), ml_dtypes.bfloat16)
        first = step.first * meta.context
        low, high = max(start, first), min(stop, first + step.n_contexts * meta.context)
        flat = values.reshape(meta.n_layers, -1, meta.d_model)
        resid[:, low - start : high - start] = flat[:, low - first : high - first]
        if step.is_last_of_shard:
            yield step.shard, resid, started
            resid, started = None, time.monotonic()


def _passes(meta: StoreMeta, shards: Iterable[int]) -> Iterator[_Pass]:
    size = _pass_contexts(meta)
    for shard in shards:
        start, stop = meta.span(shard)
        last = math.ceil(stop / meta.context)
        for first in range(start // meta.context, last, size):
            yield _Pass(shard, first, min(size, last - first), size, first + size >= last)


def _pass_contexts(meta: StoreMeta) -> int:
    """Return the contexts per pass: the batch, but no more than any whole shard can need."""
    whole, crosses = divmod(meta.shard_tokens, meta.context)
    return min(meta.compute_batch, whole + 2 if crosses else whole)


def _forward(
    lm: ResidualModel, contexts: Int[np.ndarray, "n T"], passes: Iterator[_Pass]
) -> Iterator[tuple[_Pass, BFloat16[np.ndarray, "L B T D"]]]:
    """Yield each pass with its residuals; the next pass is dispatched before one is fetched."""
    ahead: tuple[_Pass, tuple[Array, Array]] | None = None
    for step in [*passes, None]:
        current, ahead = ahead, None
        if step is not None:
            ahead = step, _rounded(lm.residuals(_padded(contexts, step)))
        if current is not None:
            values, is_finite = (np.asarray(array) for array in current[1])
            _check_finite(lm, current[0], is_finite)
            yield current[0], values


def _padded(contexts: Int[np.ndarray, "n T"], step: _Pass) -> Int[np.ndarray, "B T"]:
    """Return the contexts of a pass, the last one repeated: the bits of a GEMM's rows depend on their number."""
    rows = step.first + np.minimum(np.arange(step.size), step.n_contexts - 1)
    return contexts[rows]


@jax.jit
def _rounded(resid: Float[Array, "L B T D"]) -> tuple[BFloat16[Array, "L B T D"], Bool[Array, "L B"]]:
    """Round to bfloat16 and say which contexts are finite in which layer, before anything leaves the device."""
    rounded = resid.astype(jnp.bfloat16)
    return rounded, jnp.isfinite(rounded).all(axis=(2, 3))


def _check_finite(lm: ResidualModel, step: _Pass, is_finite: Bool[np.ndarray, "L B"]) -> None:
    bad = np.argwhere(~is_finite)
    if len(bad):
        layer, row = bad[0]
        context = step.first + min(int(row), step.n_contexts - 1)
        raise InputError(
            f"the residual stream of {lm.name} is NaN or infinite after layer {layer} in context {context} (shard "
            f"{step.shard}); check the model's weights, or set model.dtype=float32"
        )


def _check_arguments(
    lm: ResidualModel, contexts: Int[np.ndarray, "n T"], batch: int, process_index: int, process_count: int
) -> None:
    n, context = contexts.shape
    if n == 0 or context == 0:
        raise InputError(f"there is no context to extract (shape {contexts.shape}); the corpus is too small")
    if context > lm.n_positions:
        raise InputError(
            f"contexts have {context} tokens, {lm.name} takes at most {lm.n_positions}; lower corpus.context"
        )
    if batch < 1:
        raise InputError(f"a forward pass has at least 1 context, got batch {batch}")
    if not 0 <= process_index < process_count:
        raise InputError(f"process {process_index} of {process_count} does not exist; they count from 0")


def _open_or_create(dir: Path, meta: StoreMeta, contexts: Int[np.ndarray, "n T"]) -> Store:
    if (dir / "meta.json").exists():
        store = stores.open(dir)
        _check_same(store, meta, contexts)
        n_missing = sum(stop - start for start, stop in map(meta.span, store.missing_shards()))
        if n_missing:
            stores.check_disk(dir, stores.required_bytes(meta.n_layers, n_missing, meta.d_model))
        return store
    stores.check_disk(dir, stores.required_bytes(meta.n_layers, meta.n_tokens, meta.d_model))
    return stores.create(dir, meta, token_ids=contexts.reshape(-1).astype(np.int32))


def _wait_for(dir: Path, wait_seconds: float) -> Store:
    until = time.monotonic() + wait_seconds
    while not (dir / "meta.json").exists():
        if time.monotonic() > until:
            raise InputError(
                f"{dir / 'meta.json'} did not appear within {wait_seconds:g} s; is process 0 running, with the same "
                "--workdir on a shared file system?"
            )
        time.sleep(_POLL_SECONDS)
    return stores.open(dir)


def _check_same(store: Store, meta: StoreMeta, contexts: Int[np.ndarray, "n T"]) -> None:
    for field in dataclasses.fields(StoreMeta):
        held, asked = getattr(store.meta, field.name), getattr(meta, field.name)
        # The batch decides the last bits of shards still to come, nothing about those that are there.
        if held != asked and (field.name != "compute_batch" or not store.is_complete):
            raise InputError(
                f"{store.dir} holds activations with {field.name} {held!r}, this run has {asked!r}; set it back, use "
                f"another --workdir, or remove {store.dir} and run jaxsae extract"
            )
    differs = np.flatnonzero(store.token_ids != contexts.reshape(-1))
    if len(differs):
        place = int(differs[0])
        raise InputError(
            f"{store.dir} holds token {store.token_ids[place]} at position {place}, this run has "
            f"{contexts.reshape(-1)[place]}; use another --workdir, or remove {store.dir} and run jaxsae extract"
        )
