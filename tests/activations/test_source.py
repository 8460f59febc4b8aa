import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxsae import activations
from jaxsae.artifacts import InputError

BOS = 5
META = activations.StoreMeta(
    model="tiny",
    model_fingerprint="weights-1",
    n_layers=3,
    d_model=4,
    context=60,
    n_tokens=9000,
    bos_id=BOS,
    corpus_fingerprint="corpus-1",
    compute_batch=4,
)
OPTIONS = {"batch": 70, "seed": 11, "held_out": 0.1, "buffer_tokens": 1500}
TRAIN_END = 135 * 60  # 150 contexts, the last 15 held out; inside a block and inside a shard


def numbered(dir, meta=META):
    """Return a store whose rows say which layer and token they are: [layer, token, token + layer, 0...] as raw bits."""
    ids = np.random.default_rng(0).integers(0, 29, size=meta.n_tokens).astype(np.int32)
    layer, token = np.meshgrid(np.arange(meta.n_layers), np.arange(meta.n_tokens), indexing="ij")
    bits = np.zeros((meta.n_layers, meta.n_tokens, meta.d_model), np.uint16)
    bits[..., :3] = np.stack([layer, token, token + layer], axis=-1)
    store = activations.create(dir, meta, token_ids=ids)
    for shard in range(meta.n_shards):
        start, stop = meta.span(shard)
        store.write_shard(shard, bits[:, start:stop].view(ml_dtypes.bfloat16))
    return store


def tokens_of(acts):
    """Return which tokens a batch holds, having checked that all of its layers hold the same ones."""
    bits = acts.view(np.uint16).astype(np.int64)
    np.testing.assert_array_equal(bits[..., 2] - bits[..., 1], bits[..., 0])
    assert (bits[:, :, 1] == bits[0, :, 1]).all()
    return bits[0, :, 1]


def draw(source, n, state=None):
    state = source.init() if state is None else state
    for _ in range(n):
        state, acts = source.next(state)
        yield state, acts


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("numbered"))


def kept_tokens(store):
    return [t for t in range(store.meta.n_tokens) if t % 60 and store.token_ids[t] != BOS]


def stream_by_the_book(store, epoch, *, seed, buffer_tokens):
    """Return an epoch's tokens in order, written as the documentation tells it."""
    kept = set(kept_tokens(store))
    n_blocks = -(-TRAIN_END // 128)
    blocks = np.random.default_rng([seed, epoch, 0]).permutation(n_blocks)
    stream, size = [], buffer_tokens // 128
    for group, first in enumerate(range(0, n_blocks, size)):
        tokens = [
            t for b in sorted(blocks[first : first + size]) for t in range(128 * b, min(128 * b + 128, TRAIN_END))
        ]
        places = [place for place, token in enumerate(tokens) if token in kept]
        order = np.random.default_rng([seed, epoch, 1, group]).permutation(places)
        stream += [tokens[place] for place in order]
    return stream


@pytest.mark.parametrize("buffer_tokens", [128, 1500, 10**6])
@pytest.mark.parametrize("batch", [70, 400])
def test_next__follows_the_documented_order(store, batch, buffer_tokens):
    source = activations.StoreSource(store, **OPTIONS | {"batch": batch, "buffer_tokens": buffer_tokens})
    state = source.init()
    for epoch in range(2):
        stream = stream_by_the_book(store, epoch, seed=11, buffer_tokens=buffer_tokens)
        assert source.n_train_tokens == len(stream)
        assert source.batches_per_epoch == len(stream) // batch
        for index in range(source.batches_per_epoch):
            assert state == {"epoch": epoch, "batch": index}
            state, acts = source.next(state)
            assert acts.shape == (3, batch, 4)
            np.testing.assert_array_equal(tokens_of(acts), stream[index * batch : (index + 1) * batch])
    assert state == {"epoch": 2, "batch": 0}


def test_next__gives_each_kept_training_row_at_most_once_an_epoch(store):
    source = activations.StoreSource(store, **OPTIONS)
    drawn = np.concatenate([tokens_of(acts) for _, acts in draw(source, source.batches_per_epoch)])
    assert len(set(drawn.tolist())) == len(drawn)
    allowed = {t for t in kept_tokens(store) if t < TRAIN_END}
    assert set(drawn.tolist()) <= allowed
    assert len(allowed) - len(drawn) < OPTIONS["batch"]


def test_next__shuffles_within_and_across_groups(store):
    source = activations.StoreSource(store, **OPTIONS | {"batch": 1000})
    _, acts = source.next(source.init())
    tokens = tokens_of(acts)
    assert abs(np.corrcoef(tokens, np.arange(1000))[0, 1]) < 0.2
    assert len(np.unique(tokens // 128)) >= 1000 // 128 + 1
    assert tokens.min() < TRAIN_END / 4
    assert tokens.max() > TRAIN_END * 3 / 4


def test_next__resumes_bit_for_bit_from_any_state(store):
    source = activations.StoreSource(store, **OPTIONS)
    n = source.batches_per_epoch + 20
    states = [source.init()]
    batches = []
    for state, acts in draw(source, n):
        states.append(json.loads(json.dumps(state)))
        batches.append(acts.tobytes())
    for place in np.random.default_rng(0).permutation(n)[:40]:
        assert source.next(states[place])[1].tobytes() == batches[place]  # jumps within one source
    for place in (0, 1, 23, source.batches_per_epoch - 1, source.batches_per_epoch, n - 3):
        resumed = activations.StoreSource(store, **OPTIONS)
        again = [acts.tobytes() for _, acts in draw(resumed, min(3, n - place), states[place])]
        assert again == batches[place : place + 3]


def test_next__does_not_change_the_state_it_was_given(store):
    source = activations.StoreSource(store, **OPTIONS)
    state = source.init()
    _, first = source.next(state)
    assert state == source.init()
    assert source.next(state)[1].tobytes() == first.tobytes()


def test_next__differs_between_seeds_and_epochs(store):
    source = activations.StoreSource(store, **OPTIONS)
    other = activations.StoreSource(store, **OPTIONS | {"seed": 12})
    firsts = [source.next({"epoch": epoch, "batch": 0})[1].tobytes() for epoch in range(3)]
    assert len({*firsts, other.next(other.init())[1].tobytes()}) == 4


def test_next__reads_each_group_once(store, monkeypatch):
    spans = []
    read_spans = activations.Store.read_spans
    monkeypatch.setattr(
        activations.Store,
        "read_spans",
        lambda self, wanted, **options: spans.extend(wanted) or read_spans(self, wanted, **options),
    )
    source = activations.StoreSource(store, **OPTIONS)
    for _ in draw(source, source.batches_per_epoch):
        pass
    # What follows is the next epoch's first group, perhaps.
    assert sorted(spans[:64]) == [(128 * block, min(128 * block + 128, TRAIN_END)) for block in range(64)]
    assert len(spans[64:]) <= 1500 // 128


def test_layers__selects_rows_of_the_same_tokens(store):
    whole = activations.StoreSource(store, **OPTIONS)
    part = activations.StoreSource(store, **OPTIONS, layers=slice(1, 3))
    for (_, acts), (_, some) in zip(draw(whole, 25), draw(part, 25), strict=True):
        assert some.tobytes() == acts[1:3].tobytes()
    assert (part.n_layers, part.d_model) == (2, 4)
    expected = [acts[1:3].tobytes() for acts in whole.held_out_batches(100)]
    assert [acts.tobytes() for acts in part.held_out_batches(100)] == expected


@pytest.mark.parametrize("batch", [64, 100, 5000])
def test_held_out_batches__are_the_last_contexts_kept_rows_in_order(store, batch):
    source = activations.StoreSource(store, **OPTIONS)
    batches = [tokens_of(acts) for acts in source.held_out_batches(batch)]
    expected = [t for t in kept_tokens(store) if t >= TRAIN_END]
    np.testing.assert_array_equal(np.concatenate(batches), expected)
    assert source.n_held_out_tokens == len(expected)
    assert all(len(tokens) == batch for tokens in batches[:-1])
    np.testing.assert_array_equal(source.held_out_contexts(), store.token_ids.reshape(150, 60)[135:])


def test_held_out__may_be_nothing(store):
    source = activations.StoreSource(store, **OPTIONS | {"held_out": 0.0})
    assert list(source.held_out_batches(10)) == []
    assert source.held_out_contexts().shape == (0, 60)
    assert source.n_train_tokens == len(kept_tokens(store))


def test_drop__replaces_the_default_mask(store):
    drop = np.ones(9000, bool)
    drop[::7] = False
    source = activations.StoreSource(store, **OPTIONS, drop=drop)
    drawn = np.concatenate([tokens_of(acts) for _, acts in draw(source, source.batches_per_epoch)])
    assert (drawn % 7 == 0).all()
    assert np.concatenate([tokens_of(acts) for acts in source.held_out_batches(50)]).tolist() == [
        t for t in range(0, 9000, 7) if t >= TRAIN_END
    ]


@pytest.mark.parametrize("n", [1, 500, 3000, None])
def test_sample__is_distinct_training_rows_spread_over_the_store(store, n):
    source = activations.StoreSource(store, **OPTIONS)
    n = source.n_train_tokens if n is None else n
    tokens = tokens_of(source.sample(n, seed=2))
    assert len(set(tokens.tolist())) == n
    assert set(tokens.tolist()) <= {t for t in kept_tokens(store) if t < TRAIN_END}
    np.testing.assert_array_equal(tokens, tokens_of(source.sample(n, seed=2)))
    if n >= 500:
        assert len(np.unique(tokens // 128)) >= 60  # of 64 blocks, the last one with 36 rows
    if n == 500:
        assert tokens.tolist() != tokens_of(source.sample(n, seed=3)).tolist()


MEASURE_PEAKS = """
import os, sys, tracemalloc
sys.path[:0] = sys.argv[2:]
import test_source as t
source = t.activations.StoreSource(t.activations.open(sys.argv[1]), **t.OPTIONS)
tracemalloc.start()
for _ in t.draw(source, source.batches_per_epoch):
    pass
print(tracemalloc.get_traced_memory()[1])
for index in range(source.batches_per_epoch):
    source.next({"epoch": index % 7, "batch": index})
for _ in source.held_out_batches(70):
    pass
print(tracemalloc.get_traced_memory()[1], flush=True)
os._exit(0)
"""


def measure_peaks(dir):
    """Return the most bytes held while an epoch is read in order, and while jumping about and holding out as well."""
    # In a process of its own, which never stops tracing: tracemalloc.stop() beside native threads crashes Python 3.11
    # (python/cpython#128679).
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    command = [sys.executable, "-c", MEASURE_PEAKS, str(dir), *paths]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [int(peak) for peak in run.stdout.split()]


def test_memory__is_that_of_two_groups_whatever_the_store(tmp_path):
    numbered(tmp_path, dataclasses.replace(META, n_tokens=36000, d_model=64))  # 14 MB
    group = 11 * 128 * 3 * 64 * 2
    in_order, in_all = measure_peaks(tmp_path)
    assert 2 * group < in_order < 3 * group  # with a batch and tensorstore's handles
    assert in_all < 8 * group  # groups left while they were being read may still be on their way


def test_next__names_a_damaged_shard(tmp_path):
    store = numbered(tmp_path)
    content = bytearray(store.shard_path(1).read_bytes())
    content[300] ^= 1
    store.shard_path(1).write_bytes(content)
    source = activations.StoreSource(activations.open(tmp_path), **OPTIONS)
    with pytest.raises(InputError, match="c/0/1/0 is damaged"):
        list(draw(source, source.batches_per_epoch))


def test_source__refuses_an_incomplete_store(tmp_path):
    store = numbered(tmp_path)
    store.done_path(1).unlink()
    with pytest.raises(InputError, match=r"lacks 1 of 3 shards \(first 1\); run jaxsae extract"):
        activations.StoreSource(store, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": 1.0}, r"held-out share is in \[0, 1\), got 1\.0"),
        ({"held_out": 0.999}, "share of 0.999 leaves no training context of the 150"),
        ({"buffer_tokens": 127}, "holds at least 128 tokens, got 127"),
        ({"batch": 0}, "got batch 0, seed 11"),
        ({"seed": -1}, "got batch 70, seed -1"),
        ({"batch": 9000}, r"has \d+ training rows, fewer than train.batch=9000"),
        ({"drop": np.zeros(8999, bool)}, "drop mask has 8999 rows, the store 9000"),
        ({"layers": slice(3, 4)}, r"layers slice\(3, 4, None\) is not a contiguous"),
    ],
)
def test_source__refuses_what_it_cannot_do(store, change, message):
    with pytest.raises(InputError, match=message):
        activations.StoreSource(store, **OPTIONS | change)


@pytest.mark.parametrize("state", [{"epoch": 0, "batch": 10**6}, {"epoch": -1, "batch": 0}, {"step": 3}])
def test_next__refuses_a_state_of_another_source(store, state):
    source = activations.StoreSource(store, **OPTIONS)
    with pytest.raises(InputError, match=rf"position .* outside of the {source.batches_per_epoch} batches per epoch"):
        source.next(state)


@pytest.mark.parametrize("n", [0, 9000])
def test_sample__refuses_more_rows_than_there_are(store, n):
    with pytest.raises(InputError, match=f"a sample of {n} rows asked of"):
        activations.StoreSource(store, **OPTIONS).sample(n, seed=0)
