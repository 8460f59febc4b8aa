import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from jaxsae import activations, artifacts
from jaxsae.activations import source
from jaxsae.artifacts import InputError

REPOSITORY = Path(__file__).parents[2]
META = activations.StoreMeta(
    model="tiny",
    model_fingerprint="weights-1",
    n_layers=3,
    d_model=8,
    context=60,
    n_tokens=9000,  # two whole shards, and one whose last chunk is partial
    bos_id=5,
    corpus_fingerprint="corpus-1",
    compute_batch=4,
)


def token_ids(meta=META):
    return np.random.default_rng(0).integers(0, 97, size=meta.n_tokens).astype(np.int32)


def any_bits(meta=META):
    """Return every kind of bit pattern, NaN payloads and a shard of zeros among them."""
    bits = np.random.default_rng(1).integers(
        0, 2**16, size=(meta.n_layers, meta.n_tokens, meta.d_model), dtype=np.uint16
    )
    bits[:, 4096:8192] = 0
    return bits


def write_all(dir, meta=META, bits=None):
    bits = any_bits(meta) if bits is None else bits
    store = activations.create(dir, meta, token_ids=token_ids(meta))
    for shard in range(meta.n_shards):
        start, stop = meta.span(shard)
        store.write_shard(shard, bits[:, start:stop].view(ml_dtypes.bfloat16))
    return activations.open(dir)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    dir = tmp_path_factory.mktemp("written") / "activations"
    write_all(dir)
    return dir


@pytest.fixture
def dir(written, tmp_path):
    return shutil.copytree(written, tmp_path / "activations")


def flip(path, position, mask=1):
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


@pytest.mark.parametrize("compression", ["raw", "blosc"])
def test_read__returns_the_bits_that_were_written(tmp_path, compression):
    meta = dataclasses.replace(META, compression=compression)
    store = write_all(tmp_path, meta)
    assert store.meta == meta
    assert store.is_complete
    for layers, start, stop in [(slice(None), 0, 9000), (slice(1, 3), 4000, 8300), (slice(2, 3), 8999, 9000)]:
        values = store.read(layers, start, stop)
        assert values.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(values.view(np.uint16), any_bits()[layers, start:stop])
    np.testing.assert_array_equal(store.token_ids, token_ids())
    store.verify()


def test_read_spans__lays_spans_one_after_the_other(written):
    spans = [(256, 384), (4090, 4100), (0, 7), *((token, token + 1) for token in range(9000 - 20, 9000))]
    values = activations.open(written).read_spans(spans, layers=slice(0, 2))
    expected = np.concatenate([any_bits()[:2, start:stop] for start, stop in spans], axis=1)
    np.testing.assert_array_equal(values.view(np.uint16), expected)


def test_array__is_plain_zarr_v3_of_uint16(written):
    array = json.loads((written / "resid.zarr" / "zarr.json").read_text())
    assert (array["zarr_format"], array["node_type"], array["data_type"]) == (3, "array", "uint16")
    assert array["shape"] == [3, 9000, 8]
    assert array["attributes"] == {"dtype": "bfloat16"}
    assert array["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": [3, 4096, 8]}}
    (sharding,) = array["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [1, 128, 8]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]


def test_shard_file__decodes_by_the_zarr_specification_alone(written):
    content = (written / "resid.zarr" / "c" / "0" / "2" / "0").read_bytes()
    n_chunks = 3 * 32
    index = np.frombuffer(content[-(16 * n_chunks + 4) : -4], "<u8").reshape(3, 32, 2)
    bits = any_bits()[:, 8192:]
    for layer in range(3):
        for chunk in range(7):
            offset, size = (int(number) for number in index[layer, chunk])
            assert size == 128 * 8 * 2 + 4
            values = np.frombuffer(content[offset : offset + size - 4], "<u2").reshape(128, 8)
            expected = bits[layer, chunk * 128 : (chunk + 1) * 128]
            np.testing.assert_array_equal(values[: len(expected)], expected)
    assert (index[:, 7:] == 2**64 - 1).all()  # chunks after the last token are not stored


def test_required_bytes__is_what_a_raw_store_takes(tmp_path):
    meta = dataclasses.replace(META, d_model=48)
    write_all(tmp_path, meta, np.zeros((3, 9000, 48), np.uint16))
    large = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"]
    on_disk = sum(path.stat().st_size for path in large)
    small_files = 4096 * (meta.n_shards + 4)
    needed = activations.required_bytes(3, 9000, 48)
    assert on_disk <= needed <= on_disk + small_files


def test_check_disk__refuses_with_both_amounts(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 104 * 10**7))
    activations.check_disk(tmp_path / "not" / "there", 99 * 10**7)
    with pytest.raises(InputError, match=r"needs 953\.7 MiB and 5 % to spare, the disk has 991\.8 MiB free"):
        activations.check_disk(tmp_path / "not" / "there", 10**9)


def test_read__reads_only_the_bytes_of_the_layers_asked(written):
    def bytes_read():
        (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return metric["values"][0]["value"]

    before = bytes_read()
    activations.open(written).read(slice(1, 2), 0, 4096)
    one_layer = 32 * (128 * 8 * 2 + 4)
    index = 16 * 3 * 32 + 4
    assert bytes_read() - before <= one_layer + index + len((written / "resid.zarr" / "zarr.json").read_bytes())


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_read__detects_a_flipped_byte_anywhere_in_a_shard(dir, shard):
    path = activations.open(dir).shard_path(shard)
    size = path.stat().st_size
    index_bytes = 16 * 3 * 32 + 4
    places = np.random.default_rng(shard).integers(0, size, size=30).tolist()
    for place in [0, *places, size - index_bytes, size - 5, size - 1]:
        flip(path, place, mask=1 << (place % 8))
        store = activations.open(dir)
        with pytest.raises(InputError) as error:
            store.read(slice(None), *store.meta.span(shard))
        assert f"{path} is damaged" in str(error.value)
        assert f"delete {store.done_path(shard)}" in str(error.value)
        assert "run jaxsae extract" in str(error.value)
        flip(path, place, mask=1 << (place % 8))
    activations.open(dir).verify()


@pytest.mark.parametrize("name", ["meta.json", "tokens.npz", "resid.zarr/zarr.json"])
def test_open__detects_a_flipped_byte_anywhere(dir, name):
    size = (dir / name).stat().st_size
    # All kinds of bytes: tokens.npz has its headers and its table of contents at the two ends.
    for place in {*range(0, size, 601), *range(0, min(size, 800), 5), *range(max(0, size - 600), size, 5)}:
        flip(dir / name, place)
        with pytest.raises(InputError, match=r"meta\.json|tokens\.npz|zarr\.json"):
            activations.open(dir)
        flip(dir / name, place)
    activations.open(dir)


@pytest.mark.parametrize("name", ["meta.json", "tokens.npz", "resid.zarr/zarr.json"])
def test_open__names_a_missing_file(dir, name):
    (dir / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing; .*run it again"):
        activations.open(dir, rebuild="run it again")


def test_open__names_another_format_version(dir):
    meta = json.loads((dir / "meta.json").read_text())
    (dir / "meta.json").write_text(json.dumps(meta | {"format_version": 0}))
    with pytest.raises(InputError, match="has format_version 0, this jaxsae reads 1"):
        activations.open(dir)


@pytest.mark.parametrize("lost", ["done", "data", "both"])
def test_read__names_a_missing_shard(dir, lost):
    store = activations.open(dir)
    if lost != "data":
        store.done_path(1).unlink()
    if lost != "done":
        store.shard_path(1).unlink()
    store = activations.open(dir)
    assert store.missing_shards() == [1]
    assert not store.is_complete
    store.read(slice(None), 0, 4096)
    with pytest.raises(InputError, match=r"c/0/1/0 is missing or not finished; delete .*done/1\.json"):
        store.read(slice(None), 4000, 4200)


def test_read__names_a_shard_lost_after_it_was_seen(dir):
    store = activations.open(dir)
    store.read(slice(None), 4200, 4300)
    store.shard_path(1).unlink()
    with pytest.raises(InputError, match="c/0/1/0 is missing or lacks a chunk"):
        store.read(slice(None), 5000, 5100)


def test_read__does_not_take_a_missing_chunk_for_zeros(dir):
    store = activations.open(dir)
    shutil.rmtree(store.shard_path(0).parent)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{dir}/resid.zarr/"}}
    ts.open(spec).result()[:, :128].write(np.ones((3, 128, 8), np.uint16)).result()
    activations.open(dir).read(slice(None), 0, 128)
    with pytest.raises(InputError, match="c/0/0/0 is missing or lacks a chunk"):
        activations.open(dir).read(slice(None), 128, 256)


def test_verify__detects_a_shard_in_the_place_of_another(dir):
    store = activations.open(dir)
    shutil.copy(store.shard_path(0), store.shard_path(1))
    store.read(slice(None), 4096, 8192)
    with pytest.raises(InputError, match=r"c/0/1/0 holds crc32 \d+ of tokens 4096-8192, 1\.json says otherwise"):
        activations.open(dir).verify()


def test_write_shard__mends_a_damaged_shard(dir):
    store = activations.open(dir)
    before = store.shard_path(2).read_bytes()
    flip(store.shard_path(2), 100)
    store.done_path(2).unlink()
    store.write_shard(2, any_bits()[:, 8192:].view(ml_dtypes.bfloat16))
    assert store.shard_path(2).read_bytes() == before
    store.verify()


def test_begin_shard__does_not_count_before_it_is_durable(tmp_path):
    store = activations.create(tmp_path, META, token_ids=token_ids())
    pending = store.begin_shard(0, any_bits()[:, :4096].view(ml_dtypes.bfloat16))
    assert store.missing_shards() == [0, 1, 2]
    pending.finish()
    assert store.missing_shards() == [1, 2]
    record = artifacts.read_json(store.done_path(0), rebuild="")
    assert (record["shard"], record["start"], record["stop"]) == (0, 0, 4096)
    assert 0 <= record["seconds"] < 60


def test_write_shard__refuses_another_shape(tmp_path):
    store = activations.create(tmp_path, META, token_ids=token_ids())
    with pytest.raises(InputError, match=r"shard 2 of the 3 .* has shape \(3, 808, 8\), got \(3, 4096, 8\)"):
        store.write_shard(2, np.zeros((3, 4096, 8), ml_dtypes.bfloat16))


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (8999, 9001), (7, 3)])
def test_read__refuses_tokens_outside_of_the_store(written, start, stop):
    with pytest.raises(InputError, match=f"tokens {start} to {stop} asked of .* holds 9000"):
        activations.open(written).read(slice(None), start, stop)


@pytest.mark.parametrize("layers", [slice(3, 5), slice(0, 3, 2), slice(2, 1)])
def test_read__refuses_layers_that_are_no_part_of_the_store(written, layers):
    with pytest.raises(InputError, match=r"layers slice\(.*not a contiguous, non-empty part of the store's 3 layers"):
        activations.open(written).read(layers, 0, 5)


def test_create__never_overwrites(dir):
    with pytest.raises(InputError, match="already holds a store"):
        activations.create(dir, META, token_ids=token_ids())
    (dir / "meta.json").unlink()
    with pytest.raises(InputError, match=r"holds finished shards but no meta\.json"):
        activations.create(dir, META, token_ids=token_ids())


def test_create__goes_over_a_half_made_store(tmp_path):
    activations.create(tmp_path, META, token_ids=token_ids())
    (tmp_path / "meta.json").unlink()
    assert activations.create(tmp_path, META, token_ids=token_ids()).missing_shards() == [0, 1, 2]


def test_create__refuses_an_unknown_compression(tmp_path):
    with pytest.raises(InputError, match="one of raw, blosc, got 'zstd'"):
        activations.create(tmp_path, dataclasses.replace(META, compression="zstd"), token_ids=token_ids())
    assert list(tmp_path.iterdir()) == []


def test_create__refuses_ids_that_are_not_whole_contexts(tmp_path):
    with pytest.raises(InputError, match=r"whole contexts of 60 tokens .* got 9000 tokens and 8999 ids"):
        activations.create(tmp_path, META, token_ids=token_ids()[:-1])


@pytest.mark.parametrize(("writer", "file"), [("write_npz", "tokens.npz"), ("write_json", "0.json")])
def test_disk_errors__of_small_files_are_input_errors(tmp_path, monkeypatch, writer, file):
    write = getattr(artifacts, writer)

    def full(path, content):
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(artifacts, writer, full)
    with pytest.raises(InputError, match="could not be written: No space left on device; free some space"):
        write_all(tmp_path)
    assert not list(tmp_path.glob("done/*.json"))


WRITE_UNTIL_FULL = """
import resource, sys
sys.path[:0] = sys.argv[2:4]
import test_store
if sys.argv[4] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # a whole shard takes 198 kB
try:
    test_store.write_all(test_store.Path(sys.argv[1]))
except test_store.InputError as error:
    print(error, *sorted(path.name for path in test_store.Path(sys.argv[1]).glob("done/*")), sep="|")
"""


def run_until_full(dir, how, *, prefix=()):
    paths = [str(REPOSITORY), str(Path(__file__).parent)]
    command = [*prefix, sys.executable, "-c", WRITE_UNTIL_FULL, str(dir), *paths, how]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=dir)


def test_write_shard__stops_at_a_file_size_limit_and_counts_nothing(tmp_path):
    run = run_until_full(tmp_path, "limit")
    assert run.stdout.startswith(f"{tmp_path}/resid.zarr/c/0/0/0 could not be written: File too large"), run.stderr
    assert run.stdout.strip().endswith("goes on from the last whole shard")


def test_write_shard__stops_on_a_full_disk_and_counts_only_whole_shards(tmp_path):
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    small = f'mount -t tmpfs -o size=350k none "{tmp_path}"'
    if shutil.which("unshare") is None or subprocess.run([*mount, small], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here without privileges")
    run = run_until_full(tmp_path, "disk", prefix=[*mount, small + ' && exec "$0" "$@"'])
    error, *done = run.stdout.strip().split("|")
    assert error.startswith(f"{tmp_path}/resid.zarr/c/0/1/0 could not be written: No space left on device"), run.stderr
    assert done == ["0.json"]


def test_dropped_rows__are_position_0_and_bos():
    ids = np.array([5, 1, 2, 7, 5, 3], np.int32)
    assert source.dropped_rows(ids, 3, bos_id=5).tolist() == [True, False, False, True, True, False]
    assert source.dropped_rows(ids, 3, bos_id=None).tolist() == [True, False, False, True, False, False]
