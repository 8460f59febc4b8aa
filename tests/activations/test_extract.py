import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsae import activations
from jaxsae.artifacts import InputError

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("tiny_lm.py")
tiny_lm = runpy.run_path(str(SCRIPT))
TinyLM, make_contexts = tiny_lm["TinyLM"], tiny_lm["contexts"]
N, CONTEXT, BATCH = 500, 48, 40  # 24,000 tokens: 5 whole shards and a partial one, all edges inside contexts
OPTIONS = {"bos_id": 30, "corpus_fingerprint": "corpus-1", "batch": BATCH}
SCRIPT_OPTIONS = [f"n={N}", f"context={CONTEXT}", f"batch={BATCH}"]


def start(dir, *options):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(dir), *SCRIPT_OPTIONS, *options], env=environment)


def files_of(dir):
    """Return the bytes of everything but the done files, which hold seconds."""
    paths = [path for path in dir.rglob("*") if path.is_file() and path.parent.name != "done"]
    return {str(path.relative_to(dir)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    dir = tmp_path_factory.mktemp("whole") / "activations"
    assert start(dir).wait(timeout=60) == 0
    return dir


@pytest.fixture
def dir(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "activations")


class TableLM:
    """A model whose residual stream is a saved array, looked up by token id."""

    name, fingerprint, n_positions = "table", "table-1", 64

    def __init__(self, table):
        self.table, (self.n_layers, _, self.d_model) = jnp.asarray(table), table.shape

    def residuals(self, token_ids):
        return self.table[:, token_ids]


@pytest.mark.parametrize("compression", ["raw", "blosc"])
@pytest.mark.parametrize(
    ("n", "context", "batch"), [(70, 64, 7), (90, 60, 1000), (4, 5000, 3), (1, 3, 2), (100, 50, 1)]
)
def test_extract__stores_a_saved_array_rounded_to_bfloat16(tmp_path, n, context, batch, compression):
    table = np.random.default_rng(0).normal(size=(2, n * context, 5)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    lm = TableLM(np.load(tmp_path / "table.npy"))
    lm.n_positions = context
    ids = np.random.default_rng(1).permutation(n * context).reshape(n, context).astype(np.int32)
    store = activations.extract(
        lm, ids, tmp_path / "store", bos_id=None, corpus_fingerprint="c", batch=batch, compression=compression
    )
    expected = table[:, ids.reshape(-1)].astype(ml_dtypes.bfloat16)
    assert store.read(slice(None), 0, n * context).tobytes() == expected.tobytes()
    np.testing.assert_array_equal(store.token_ids, ids.reshape(-1))


def test_extract__of_another_process_is_the_model_s_residual_stream(whole):
    store = activations.open(whole)
    store.verify()
    expected = np.asarray(TinyLM().residuals(make_contexts(N, CONTEXT))).reshape(3, N * CONTEXT, 8)
    values = store.read(slice(None), 0, N * CONTEXT).astype(np.float32)
    # Half a unit of bfloat16's 8 significant bits, and float32 noise near zero.
    np.testing.assert_allclose(values, expected, rtol=2**-8, atol=1e-6)
    meta = store.meta
    assert (meta.model, meta.model_fingerprint, meta.corpus_fingerprint) == ("tiny", "tiny-weights-1", "corpus-1")
    assert (meta.n_layers, meta.d_model, meta.context, meta.n_tokens, meta.bos_id) == (3, 8, CONTEXT, N * CONTEXT, 30)


def test_extract__runs_every_forward_pass_in_one_shape(tmp_path):
    lm = TinyLM()
    activations.extract(lm, make_contexts(N, CONTEXT), tmp_path, **OPTIONS)
    assert set(lm.shapes) == {(BATCH, CONTEXT)}


def test_extract__needs_no_larger_pass_than_a_shard(tmp_path):
    lm = TinyLM()
    activations.extract(lm, make_contexts(150, 64), tmp_path, **OPTIONS | {"batch": 1000})
    assert lm.shapes == [(64, 64)] * 3


def test_extract__of_two_processes_is_the_store_of_one(whole, tmp_path):
    # The second starts first and has to wait for the store.
    processes = [start(tmp_path / "activations", "count=2", f"index={index}") for index in (1, 0)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert files_of(tmp_path / "activations") == files_of(whole)
    activations.open(tmp_path / "activations").verify()


def test_extract__owns_every_second_shard_of_two(tmp_path):
    store = activations.extract(
        TinyLM(), make_contexts(N, CONTEXT), tmp_path, **OPTIONS, process_index=0, process_count=2
    )
    assert store.missing_shards() == [1, 3, 5]


def test_extract__killed_twice_and_resumed_is_the_same_store(whole, tmp_path):
    dir = tmp_path / "activations"
    counts = []
    for wanted in (1, 3):
        process = start(dir, "delay=0.15")
        deadline = time.monotonic() + 60
        while len(list(dir.glob("done/*.json"))) < wanted:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        counts.append(len(list(dir.glob("done/*.json"))))
    assert counts[0] < counts[1] < 6
    assert start(dir).wait(timeout=60) == 0
    assert {name: content for name, content in files_of(dir).items() if "__lock" not in name} == files_of(whole)
    activations.open(dir).verify()


def test_extract__computes_a_deleted_shard_alone(whole, dir):
    store = activations.open(dir)
    content = bytearray(store.shard_path(2).read_bytes())
    content[1000] ^= 4
    store.shard_path(2).write_bytes(content)
    with pytest.raises(InputError, match=r"c/0/2/0 is damaged .*delete .*done/2\.json"):
        store.verify()
    store.done_path(2).unlink()
    lm = TinyLM()
    activations.extract(lm, make_contexts(N, CONTEXT), dir, **OPTIONS)
    assert len(lm.shapes) == 3  # 87 contexts touch shard 2, in passes of 40
    assert files_of(dir) == files_of(whole)


def test_extract__of_a_complete_store_computes_nothing(dir):
    lm = TinyLM()
    store = activations.extract(lm, make_contexts(N, CONTEXT), dir, **OPTIONS)
    assert store.is_complete
    assert lm.shapes == []
    assert activations.extract(lm, make_contexts(N, CONTEXT), dir, **OPTIONS | {"batch": 9}).is_complete


def test_should_stop__leaves_a_store_that_goes_on(whole, tmp_path):
    polls = iter([False, True])
    store = activations.extract(
        TinyLM(), make_contexts(N, CONTEXT), tmp_path / "a", **OPTIONS, should_stop=lambda: next(polls)
    )
    assert store.missing_shards() == [2, 3, 4, 5]
    assert activations.extract(TinyLM(), make_contexts(N, CONTEXT), tmp_path / "a", **OPTIONS).is_complete
    assert files_of(tmp_path / "a") == files_of(whole)


def test_progress__counts_durable_shards_of_this_process(dir):
    for shard in (1, 4):
        (dir / "done" / f"{shard}.json").unlink()
    calls = []

    def progress(done, total, seconds):
        assert len(list(dir.glob("done/*.json"))) == done
        calls.append((done, total, seconds))

    activations.extract(TinyLM(), make_contexts(N, CONTEXT), dir, **OPTIONS, progress=progress)
    assert [call[:2] for call in calls] == [(5, 6), (6, 6)]
    assert 0 < calls[0][2] <= calls[1][2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, "model 'tiny', this run has 'other'"),
        ({"fingerprint": "w2"}, "model_fingerprint 'tiny-weights-1', this run has 'w2'"),
        ({"n_layers": 4}, "n_layers 3, this run has 4"),
        ({"d_model": 9}, "d_model 8, this run has 9"),
        ({"bos_id": None}, "bos_id 30, this run has None"),
        ({"context": 24}, "context 48, this run has 24"),
        ({"n": 499}, "n_tokens 24000, this run has 23952"),
        ({"corpus_fingerprint": "corpus-2"}, "corpus_fingerprint 'corpus-1', this run has 'corpus-2'"),
        ({"compression": "blosc"}, "compression 'raw', this run has 'blosc'"),
        ({"token": 17}, r"holds token \d+ at position 17, this run has \d+"),
    ],
)
@pytest.mark.parametrize("process_index", [0, 1])
def test_extract__never_writes_into_another_store(whole, change, message, process_index):
    lm, before = TinyLM(), files_of(whole)
    for name in ("name", "fingerprint", "n_layers", "d_model"):
        setattr(lm, name, change.get(name, getattr(lm, name)))
    ids = make_contexts(N, CONTEXT)
    if "context" in change:
        ids = ids.reshape(-1, change["context"])
    if "token" in change:
        ids.reshape(-1)[change["token"]] += 1
    options = OPTIONS | {
        name: change[name] for name in ("bos_id", "corpus_fingerprint", "compression") if name in change
    }
    with pytest.raises(InputError, match=f"{message}; .*use another --workdir, or remove .* and run jaxsae extract"):
        activations.extract(
            lm, ids[: change.get("n", N * 2)], whole, **options, process_index=process_index, process_count=2
        )
    assert files_of(whole) == before


def test_extract__refuses_another_batch_in_mid_store(dir):
    (dir / "done" / "3.json").unlink()
    with pytest.raises(InputError, match="compute_batch 40, this run has 39"):
        activations.extract(TinyLM(), make_contexts(N, CONTEXT), dir, **OPTIONS | {"batch": 39})


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (-np.inf, "float32"), (3.4e38, "float32")])
def test_extract__names_layer_and_context_that_are_not_finite(tmp_path, value, dtype):
    table = np.zeros((2, 31, 5), dtype)
    table[1, 13, 2] = value  # 3.4e38 is finite in float32 and infinite in bfloat16
    ids = np.zeros((300, 48), np.int32)
    ids[121, 7] = 13  # tokens 5808 to 5856, in shard 1
    with pytest.raises(InputError, match=r"table is NaN or infinite after layer 1 in context 121 \(shard 1\)"):
        activations.extract(TableLM(table), ids, tmp_path, **OPTIONS)
    assert 1 in activations.open(tmp_path).missing_shards()


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((0, 48), {}, r"no context to extract \(shape \(0, 48\)\)"),
        ((2, 65), {}, "contexts have 65 tokens, tiny takes at most 64; lower corpus.context"),
        ((2, 48), {"batch": 0}, "at least 1 context, got batch 0"),
        ((2, 48), {"process_index": 2, "process_count": 2}, "process 2 of 2 does not exist"),
        ((2, 48), {"compression": "zip"}, "one of raw, blosc, got 'zip'"),
    ],
)
def test_extract__refuses_what_it_cannot_do(tmp_path, shape, change, message):
    with pytest.raises(InputError, match=message):
        activations.extract(TinyLM(), np.zeros(shape, np.int32), tmp_path / "a", **OPTIONS | change)
    assert not (tmp_path / "a").exists()


def test_extract__refuses_a_disk_too_small_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**6))
    with pytest.raises(InputError, match=r"needs 1\.\d MiB and 5 % to spare, the disk has 976\.6 KiB free"):
        activations.extract(TinyLM(), make_contexts(N, CONTEXT), tmp_path / "a", **OPTIONS)
    assert not (tmp_path / "a").exists()


def test_extract__asks_the_disk_only_for_what_is_missing(dir, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 4 * 10**5))
    (dir / "done" / "3.json").unlink()
    assert activations.extract(TinyLM(), make_contexts(N, CONTEXT), dir, **OPTIONS).is_complete


def test_extract__does_not_wait_for_process_0_for_ever(tmp_path):
    with pytest.raises(InputError, match=r"meta\.json did not appear within 0\.2 s; is process 0 running"):
        activations.extract(
            TinyLM(), make_contexts(9, 48), tmp_path, **OPTIONS, process_index=1, process_count=2, wait_seconds=0.2
        )
