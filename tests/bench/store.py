"""Print how fast a store is written and read, GB/s: `launch/bench [DIR]` (4 GB in DIR, by default runs/bench)."""

import shutil
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxsae import activations

META = activations.StoreMeta(
    model="bench",
    model_fingerprint="none",
    n_layers=12,
    d_model=768,
    context=128,
    n_tokens=200_064,
    bos_id=0,
    corpus_fingerprint="none",
    compute_batch=8,
)
GIGABYTE = 10**9


def write(dir: Path) -> float:
    """Write every shard with two writes in flight; return GB/s, until all of it is durable."""
    token_ids = np.random.default_rng(0).integers(1, 50_000, META.n_tokens).astype(np.int32)
    store = activations.create(dir, META, token_ids=token_ids)
    rng = np.random.default_rng(1)
    resid = rng.standard_normal((META.n_layers, META.shard_tokens, META.d_model), np.float32).astype(ml_dtypes.bfloat16)
    began, pending = time.perf_counter(), []
    for shard in range(META.n_shards):
        start, stop = META.span(shard)
        pending.append(store.begin_shard(shard, resid[:, : stop - start]))
        if len(pending) > 2:
            pending.pop(0).finish()
    for shard in pending:
        shard.finish()
    return META.n_layers * META.n_tokens * META.d_model * 2 / GIGABYTE / (time.perf_counter() - began)


def read(dir: Path, buffer_tokens: int) -> float:
    """Draw one epoch in batches of 2,048 rows; return GB/s of rows handed out."""
    source = activations.StoreSource(
        activations.open(dir), batch=2048, seed=0, held_out=0.05, buffer_tokens=buffer_tokens
    )
    state, n_bytes, began = source.init(), 0, time.perf_counter()
    for _ in range(source.batches_per_epoch):
        state, acts = source.next(state)
        n_bytes += acts.nbytes
    return n_bytes / GIGABYTE / (time.perf_counter() - began)


if __name__ == "__main__":
    dir = Path(sys.argv[1]) / "bench_store"
    shutil.rmtree(dir, ignore_errors=True)
    print(f"write {write(dir):.2f} GB/s")
    for buffer_tokens in (16_384, 32_768, 65_536):
        print(f"read, buffer of {buffer_tokens} tokens: {read(dir, buffer_tokens):.2f} GB/s")
    shutil.rmtree(dir)
