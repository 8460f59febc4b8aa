"""Rows straight from the language model: their order, the same rows as a store's, exact resume, what travels."""

import ast
import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxsae import activations
from jaxsae import mesh as meshes
from jaxsae.activations import stream, stream_plan
from jaxsae.artifacts import InputError
from jaxsae.models import LanguageModel, decoder, gpt2

N_LAYERS, D_MODEL, VOCABULARY, BOS, CONTEXT, N_CONTEXTS, N_HELD_OUT = 3, 8, 51, 50, 13, 40, 4
CONFIG = gpt2.GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=2)
OPTIONS = {"batch": 24, "seed": 7, "held_out": 0.1, "buffer_tokens": 200, "replace": 0.5, "forward_batch": 4}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


def make_lm():
    """Return a GPT-2 whose weights are large enough for every row to be another one."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jax.numpy.asarray(rng.normal(0, 0.3, x.shape), "float32"), decoder.abstract_params(CONFIG)
    )
    return LanguageModel("tiny", CONFIG, params, None, "float32", None, "weights-1")


def make_contexts():
    """Return contexts with BOS in them, many times in some; none begins as another does, so that all rows differ."""
    rng = np.random.default_rng(2)
    ids = rng.integers(0, BOS, size=(N_CONTEXTS, CONTEXT)).astype(np.int32)
    ids[rng.random(ids.shape) < rng.choice([0.0, 0.05, 0.5], size=(N_CONTEXTS, 1))] = BOS
    ids[:, 0] = rng.permutation(BOS)[:N_CONTEXTS]
    return ids


LM, CONTEXTS = make_lm(), make_contexts()
KEPT = ((CONTEXTS != BOS) & (np.arange(CONTEXT) > 0)).ravel()
N_TRAIN = N_CONTEXTS - N_HELD_OUT
TRAIN = np.flatnonzero(KEPT[: N_TRAIN * CONTEXT])
HELD_OUT = N_TRAIN * CONTEXT + np.flatnonzero(KEPT[N_TRAIN * CONTEXT :])


def make_source(layer=1, data=1, latent=1, *, lm=LM, contexts=CONTEXTS, **options):
    mesh = meshes.make_mesh(N_LAYERS, layer=layer, data=data, latent=latent)
    return activations.StreamSource(lm, contexts, bos_id=BOS, mesh=mesh, **OPTIONS | options)


def draw(source, n, state=None):
    state = source.init() if state is None else state
    for _ in range(n):
        state, acts = source.next(state)
        yield state, acts


def bits_of(acts):
    return np.asarray(acts).view(np.uint16)


ROWS = np.asarray(LM.residuals(CONTEXTS)).reshape(N_LAYERS, -1, D_MODEL)


def tokens_of(acts):
    """Return which tokens rows are of; all layers, the padding too, hold the model's own rows of these tokens.

    Within bfloat16's rounding: the last bits depend on how many contexts are run together.
    """
    rows = bits_of(acts).view(ml_dtypes.bfloat16).astype(np.float32)
    tokens = np.square(rows[0, :, None] - ROWS[0]).sum(-1).argmin(axis=1)
    expected = ROWS[np.minimum(np.arange(len(rows)), N_LAYERS - 1)][:, tokens]
    np.testing.assert_allclose(rows, expected, rtol=2**-8, atol=1e-5)
    return tokens


def batches_by_the_book(*, batch, n_buffer, n_refill, data, n_batches=10**6):
    """Yield the tokens of every batch, written as the documentation tells it."""

    def rows():
        for epoch in itertools.count():
            for context in np.random.default_rng([7, epoch, 0]).permutation(N_TRAIN):
                yield from (t for t in range(context * CONTEXT, (context + 1) * CONTEXT) if KEPT[t])

    one_by_one = itertools.islice(rows(), n_batches * batch)

    def take(n):
        """Return the next n rows, a list for each data shard; None are those that the stream does not need."""
        taken = np.array(list(itertools.islice(one_by_one, n))).reshape(data, -1).tolist()
        return [shard + [None] * (n // data - len(shard)) for shard in taken]

    buffers, n_left = take(n_buffer), n_batches * batch - n_buffer
    for refill in itertools.count():
        drawn = [np.random.default_rng([7, refill, 1, shard]).permutation(n_buffer // data) for shard in range(data)]
        if n_left > 0:
            drawn = [slots[: n_refill // data] for slots in drawn]
        handed_out = [[buffers[q][slot] for slot in drawn[q] if buffers[q][slot] is not None] for q in range(data)]
        for low in range(0, len(handed_out[0]), batch // data):
            yield [row for shard in handed_out for row in shard[low : low + batch // data]]
        if n_left <= 0:
            return
        for buffer, slots, fresh in zip(buffers, drawn, take(n_refill), strict=True):
            for slot, row in zip(slots, fresh, strict=True):
                buffer[slot] = row
        n_left -= n_refill


@pytest.mark.parametrize(
    ("mesh", "options", "n_buffer", "n_refill"),
    [
        ((1, 1), {}, 192, 96),
        ((4, 2), {}, 192, 96),
        ((2, 2, 2), {}, 192, 96),
        ((2, 3), {"forward_batch": 1}, 192, 96),
        ((1, 2), {"replace": 1.0}, 192, 192),
        ((1, 1), {"replace": 0.01, "buffer_tokens": 10**6}, len(TRAIN) // 24 * 24, 24),
        ((3, 1), {"buffer_tokens": 24}, 24, 24),
    ],
)
def test_next__follows_the_documented_order_over_epochs(mesh, options, n_buffer, n_refill):
    source, (layer, data) = make_source(*mesh, **options), mesh[:2]
    assert (source.sizes.buffer_rows, source.sizes.refill_rows) == (n_buffer, n_refill)
    assert source.n_train_tokens == len(TRAIN)
    assert source.batches_per_epoch == len(TRAIN) // 24
    expected = batches_by_the_book(batch=24, n_buffer=n_buffer, n_refill=n_refill, data=data)
    n_batches = int(2.5 * source.batches_per_epoch)
    for (_, acts), tokens in zip(draw(source, n_batches), expected, strict=False):
        assert acts.dtype == ml_dtypes.bfloat16
        assert acts.shape == (-(-N_LAYERS // layer) * layer, 24, D_MODEL)
        assert acts.sharding == NamedSharding(
            source.abstract_arrays()["buffer"].sharding.mesh, meshes.BY_LAYER_AND_DATA
        )
        np.testing.assert_array_equal(tokens_of(acts), tokens)


@pytest.fixture
def computed(monkeypatch):
    """Return the list of the rows that are computed from now on: by pass, the slots that they go to."""
    passes, plan_passes = [], stream_plan.StreamPlan.passes

    def watched(plan, rows, slots, n_slots):
        for token_ids, places in plan_passes(plan, rows, slots, n_slots):
            passes.append(np.flatnonzero(places < n_slots))
            yield token_ids, places

    monkeypatch.setattr(stream_plan.StreamPlan, "passes", watched)
    return passes


@pytest.mark.parametrize("n_batches", [1, 7, 8, 9, 11, 12, 13, 30])  # the buffer holds 8, a refill replaces 4 of them
@pytest.mark.parametrize(("layer", "data"), [(1, 1), (2, 2)])
def test_next__of_a_stream_with_an_end_computes_what_it_hands_out_and_no_more(computed, n_batches, layer, data):
    source = make_source(layer, data)
    drawn = list(draw(source, n_batches, source.init(n_batches)))
    expected = list(batches_by_the_book(batch=24, n_buffer=192, n_refill=96, data=data, n_batches=n_batches))
    assert len(expected) == n_batches
    for (_, acts), tokens in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(tokens_of(acts), tokens)
    times = collections.Counter(np.concatenate(expected).tolist())
    assert max(times.values()) - min(times.values()) <= 1
    assert sum(map(len, computed)) == n_batches * 24
    with pytest.raises(InputError, match=f"the stream ends after {n_batches} batches"):
        source.next(drawn[-1][0])


def test_next__of_one_source_with_one_end_after_another():
    source = make_source()
    # Nine end after one refill, in part; from batch 8 on, 20 have made two.
    for n_batches, first, n_drawn in [
        (9, 0, 9),
        (20, 0, 10),
        (9, 0, 9),
        (20, 8, 4),
        (5, 0, 5),
        (None, 0, 12),
        (13, 0, 13),
    ]:
        book = batches_by_the_book(batch=24, n_buffer=192, n_refill=96, data=1, n_batches=n_batches or 10**6)
        drawn = draw(source, n_drawn, source.init(n_batches) | {"batch": first})
        for (_, acts), tokens in zip(drawn, itertools.islice(book, first, None), strict=False):
            np.testing.assert_array_equal(tokens_of(acts), tokens)


@pytest.mark.parametrize("n_batches", [0, -1])
def test_init__refuses_a_stream_of_no_batch(n_batches):
    with pytest.raises(InputError, match=f"a stream has at least 1 batch, got {n_batches}"):
        make_source().init(n_batches)


@pytest.mark.parametrize(("layer", "data", "n_batches"), [(1, 1, None), (3, 1, 13), (2, 2, 13), (1, 2, 3)])
def test_peek__gives_the_rows_of_the_next_batches_and_computes_no_others(computed, layer, data, n_batches):
    source = make_source(layer, data)
    state, n_held, total = source.init(n_batches), [], n_batches or 12
    for _ in range(total):
        is_one_over = data == 2  # which the data shards do not share: it is left out
        peeked, held = source.peek(state, 24 + is_one_over), source.peek(state, 10**6)
        n_held.append(held.shape[1])
        state, acts = source.next(state)
        np.testing.assert_array_equal(peeked.view(np.uint16), bits_of(acts)[:N_LAYERS])
        by_shard = held.view(np.uint16).reshape(N_LAYERS, data, -1, D_MODEL)[:, :, : 24 // data]
        np.testing.assert_array_equal(by_shard.reshape(N_LAYERS, 24, D_MODEL), bits_of(acts)[:N_LAYERS])
    expected = {  # 8 batches, after each refill of 4 again, and at the end what there is
        3: [3, 2, 1],
        12: [8, 7, 6, 5, 8, 7, 6, 5, 8, 7, 6, 5],
        13: [8, 7, 6, 5, 8, 7, 6, 5, 5, 4, 3, 2, 1],
    }
    assert n_held == [24 * n for n in expected[total]]
    assert sum(map(len, computed)) == 24 * (n_batches or 8 + 2 * 4)
    with pytest.raises(InputError, match=f"at least mesh.data={data} rows of the buffer are looked at, got 0"):
        source.peek(source.init(), 0)


@pytest.mark.parametrize(("layer", "data"), [(1, 1), (2, 2)])
def test_next__hands_out_every_kept_training_row_once_an_epoch(layer, data):
    source = make_source(layer, data)
    drawn = list(draw(source, 44))  # eleven times what is handed out between two refills
    tokens = [*(acts for _, acts in drawn), source.arrays(drawn[-1][0])["buffer"]]
    times = collections.Counter(np.concatenate([tokens_of(acts) for acts in tokens]).tolist())
    epochs, rest = divmod(192 + 11 * 96, len(TRAIN))
    assert set(times) == set(TRAIN.tolist())
    assert collections.Counter(times.values()) == {epochs: len(TRAIN) - rest, epochs + 1: rest}


def test_next__mixes_the_contexts_of_the_buffer():
    source = make_source(buffer_tokens=10**6)
    for _, acts in draw(source, 10):
        contexts = tokens_of(acts) // CONTEXT
        assert len(set(contexts.tolist())) >= 10
        assert abs(np.corrcoef(contexts, np.arange(24))[0, 1]) < 0.7


def test_next__differs_between_seeds_and_epochs():
    source = make_source()
    starts = [source.next({**source.init(), "epoch": epoch})[1] for epoch in range(3)]
    other = make_source(seed=8)
    assert len({bits_of(acts).tobytes() for acts in (*starts, other.next(other.init())[1])}) == 4


@pytest.mark.parametrize(("layer", "data"), [(1, 1), (4, 2)])
def test_next__gives_the_stores_rows_bit_for_bit(tmp_path, layer, data):
    source = make_source(layer, data)
    store = activations.extract(
        LM, CONTEXTS, tmp_path, bos_id=BOS, corpus_fingerprint="c", batch=source.sizes.pass_contexts
    )
    stored = activations.StoreSource(store, batch=24, seed=3, held_out=0.1, buffer_tokens=128)
    assert stored.n_train_tokens == source.n_train_tokens
    streamed = [bits_of(acts)[:N_LAYERS] for _, acts in draw(source, 3 * source.batches_per_epoch)]
    rows = store.read(slice(None), 0, CONTEXTS.size).view(np.uint16)
    for bits in streamed:
        np.testing.assert_array_equal(bits, rows[:, tokens_of(bits)])
    assert len(np.unique(np.concatenate(streamed, axis=1)[0], axis=0)) == len(TRAIN)
    held_out = np.concatenate([bits_of(acts)[:N_LAYERS] for acts in source.held_out_batches(24)], axis=1)
    expected = np.concatenate([acts.view(np.uint16) for acts in stored.held_out_batches(24)], axis=1)
    np.testing.assert_array_equal(held_out, expected[:, : source.n_held_out_tokens])


@pytest.mark.parametrize(
    ("layer", "data", "options", "n_batches"),
    [
        (1, 1, {}, None),
        (2, 2, {"replace": 0.25}, None),
        (1, 1, {"buffer_tokens": 48}, None),  # 44 refills, few of them in the buffer
        (1, 1, {}, 44),
        (2, 2, {"replace": 0.4}, 44),  # three batches a refill: the last writes one
    ],
)
def test_next__resumes_bit_for_bit_with_the_saved_buffer_and_without(layer, data, options, n_batches):
    n = 44
    source = make_source(layer, data, **options)
    saved, batches = [], []
    state = source.init(n_batches)
    for _ in range(n):
        saved.append((json.loads(json.dumps(state)), np.asarray(source.arrays(state)["buffer"])))
        state, acts = source.next(state)
        batches.append(bits_of(acts).tobytes())
    for place in (0, 1, 7, 8, 15, 16, 31, 40):
        position, buffer = saved[place]
        resumed = make_source(layer, data, **options)
        resumed.restore(position, {"buffer": jax.device_put(buffer, resumed.abstract_arrays()["buffer"].sharding)})
        again = [bits_of(acts).tobytes() for _, acts in draw(resumed, 4, position)]
        assert again == batches[place : place + 4]
    for place in (40, 3, 21, 20, 39, 0, 43):  # anywhere in one source, from the position alone
        if n_batches is None:  # else there are empty slots at the end
            np.testing.assert_array_equal(source.arrays(saved[place][0])["buffer"], saved[place][1])
        assert bits_of(source.next(saved[place][0])[1]).tobytes() == batches[place]


@pytest.fixture
def refills(monkeypatch):
    """Return the list of refills that are made from now on."""
    numbers, refill = [], stream_plan.StreamPlan.refill
    monkeypatch.setattr(
        stream_plan.StreamPlan, "refill", lambda plan, number, n: numbers.append(number) or refill(plan, number, n)
    )
    return numbers


def test_next__fills_the_buffer_anew_by_few_refills(refills):
    source = make_source()
    source.next({**source.init(), "epoch": 100})
    assert refills == list(range(refills[0], refills[-1] + 1))
    assert refills[-1] == 100 * source.batches_per_epoch // 4
    assert 4 <= len(refills) <= 25  # halves of what is left: log2 of 192 slots, and a few


def test_restore__takes_the_saved_buffer_and_computes_nothing(refills):
    source = make_source()
    state = {**source.init(), "epoch": 100}
    ones = jax.tree.map(lambda like: jax.numpy.ones(like.shape, like.dtype), source.abstract_arrays())
    source.restore(state, ones)
    assert (bits_of(source.next(state)[1]) == 1).all()
    assert refills == []


def test_next__does_not_wait_for_the_language_model(monkeypatch):
    gate, passed = threading.Event(), []

    def wait(token_ids):
        passed.append(gate.wait(0 if passed else 30))
        return token_ids

    def held_up(config, params, token_ids, *, dtype):
        ids = jax.pure_callback(wait, jax.ShapeDtypeStruct(token_ids.shape, token_ids.dtype), token_ids)
        return residuals(config, params, ids, dtype=dtype)

    residuals = decoder.residuals
    monkeypatch.setattr(decoder, "residuals", held_up)
    config = dataclasses.replace(CONFIG, vocab_size=VOCABULARY + 1)  # compiled anew, with the gate in it
    table = np.ones((VOCABULARY + 1, D_MODEL), np.float32)
    params = jax.tree.map(jax.numpy.asarray, LM.params | {"wte": {"weight": table}})
    # Of one device alone, a CPU would run programs as they are called.
    source = make_source(2, 2, lm=dataclasses.replace(LM, config=config, params=params))
    *_, (_, acts) = draw(source, 10)
    is_ready = acts.is_ready()
    gate.set()
    acts.block_until_ready()
    assert not is_ready
    assert passed
    assert all(passed)


def lowered(layer, data, latent=1):
    """Return the programs of a refill and of a batch, compiled."""
    source = make_source(layer, data, latent, buffer_tokens=240)
    mesh, sizes = source.abstract_arrays()["buffer"].sharding.mesh, source.sizes

    def like(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    n_contexts = sizes.shard_contexts * data
    n_padded, rows = meshes.padded_layers(N_LAYERS, mesh), n_contexts * CONTEXT
    by_both, by_data = meshes.BY_LAYER_AND_DATA, meshes.BY_DATA
    ids = like((n_contexts, CONTEXT), np.int32, meshes.context_spec(mesh))
    params = jax.tree.map(lambda x: like(x.shape, x.dtype, meshes.REPLICATED), LM.params)
    buffer = like((n_padded, 100 * sizes.buffer_rows, D_MODEL), np.uint16, by_both)
    bits, slots = like((n_padded, rows, D_MODEL), np.uint16, by_both), like((rows,), np.int32, by_data)
    return {
        "residuals": stream.residual_bits.lower(CONFIG, "float32", mesh, params, ids).compile(),
        "write": stream.write_rows.lower(mesh, buffer, bits, slots).compile(),
        "take": stream.take_rows.lower(mesh, 24, buffer, slots, np.int32(0)).compile(),
    }, buffer


def collectives(program):
    """Return name, types and groups of devices of each collective of a compiled program."""
    lines = re.findall(rf"= (.*) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*)", program.as_text())
    groups = (re.search(r"replica_groups=([^a-z]*),", rest)[1] for _, _, rest in lines)
    return [
        (name, set(re.findall(r"(\w+)\[", types)), group) for (types, name, _), group in zip(lines, groups, strict=True)
    ]


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ((1, 1), []),
        ((4, 2), [("all-to-all", {"u16"}, "{{0,2,4,6},{1,3,5,7}}")]),
        (
            (2, 2, 2),
            [
                ("all-to-all", {"u16"}, "{{0,4},{1,5},{2,6},{3,7}}"),
                ("all-gather", {"u16"}, "{{0,1},{2,3},{4,5},{6,7}}"),
            ],
        ),
    ],
)
def test_refill__is_one_exchange_along_layer_of_16_bits_a_number__and_one_along_latent(mesh, expected):
    programs, _ = lowered(*mesh)
    assert collectives(programs["residuals"]) == expected
    assert collectives(programs["write"]) == collectives(programs["take"]) == []


def test_refill__writes_in_place():
    programs, buffer = lowered(4, 2)
    per_device = buffer.size * 2 // 8
    memory = programs["write"].memory_analysis()
    assert memory.alias_size_in_bytes == per_device
    assert memory.temp_size_in_bytes < per_device / 10
    assert programs["take"].memory_analysis().temp_size_in_bytes < per_device / 10


@pytest.mark.parametrize(("layer", "data"), [(1, 1), (4, 2)])
def test_sizes__are_those_of_the_arrays(layer, data):
    source = make_source(layer, data)
    buffer = source.arrays(source.init())["buffer"]
    assert {part.data.nbytes for part in buffer.addressable_shards} == {source.sizes.buffer_bytes(N_LAYERS, D_MODEL)}
    assert len(buffer.addressable_shards) == layer * data
    like = source.abstract_arrays()["buffer"]
    assert (buffer.shape, buffer.dtype, buffer.sharding) == (like.shape, like.dtype, like.sharding)


def test_size_stream__shares_a_refills_contexts_out_evenly():
    settings = {"n_train_tokens": 10**7, "rows_per_context": 1023.0, "batch": 4096, "buffer_tokens": 131_072}
    for mesh, passes, pass_contexts in [
        ((1, 1, 1), 5, 14),
        ((8, 1, 1), 1, 9),
        ((4, 2, 1), 1, 9),
        ((2, 1, 4), 1, 9),
        ((1, 4, 1), 2, 9),
    ]:
        shards = dict(zip(("layer_shards", "data_shards", "latent_shards"), mesh, strict=True))
        sizes = stream_plan.size_stream(**settings, **shards, replace=0.5, forward_batch=16)
        assert (sizes.buffer_rows, sizes.refill_rows) == (131_072, 65_536)
        assert (sizes.passes, sizes.pass_contexts) == (passes, pass_contexts)
        assert sizes.refill_contexts == passes * pass_contexts * math.prod(mesh)
        assert 65_536 / 1023 + mesh[1] <= sizes.refill_contexts <= 1.15 * 65_536 / 1023 + mesh[1]
    assert sizes.buffer_bytes(24, 1024) == 24 * 131_072 // 4 * 1024 * 2


@pytest.mark.parametrize(("layer", "data", "batch"), [(1, 1, 10), (4, 2, 100), (1, 5, 10)])
def test_held_out_batches__are_the_last_contexts_kept_rows_in_order(layer, data, batch):
    source = make_source(layer, data, batch=30)
    batches = [tokens_of(acts) for acts in source.held_out_batches(batch)]
    n_whole = len(HELD_OUT) - len(HELD_OUT) % data
    np.testing.assert_array_equal(np.concatenate(batches), HELD_OUT[:n_whole])
    assert source.n_held_out_tokens == n_whole
    assert all(len(tokens) == batch for tokens in batches[:-1])
    np.testing.assert_array_equal(source.held_out_contexts(), CONTEXTS[N_TRAIN:])


def test_held_out_batches__do_not_disturb_the_stream():
    source = make_source()
    expected = [bits_of(acts).tobytes() for _, acts in draw(make_source(), 6)]
    found = []
    for _, acts in draw(source, 6):
        found.append(bits_of(acts).tobytes())
        assert next(source.held_out_batches(24)).shape == (N_LAYERS, 24, D_MODEL)
        source.sample(10, seed=1)
    assert found == expected


def test_held_out__may_be_nothing():
    source = make_source(held_out=0.0)
    assert list(source.held_out_batches(24)) == []
    assert source.held_out_contexts().shape == (0, CONTEXT)
    assert source.n_train_tokens == KEPT.sum()


@pytest.mark.parametrize(("layer", "data"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("n", [1, 75, len(TRAIN)])
def test_sample__is_distinct_training_rows_in_order(layer, data, n):
    source = make_source(layer, data)
    rows = source.sample(n, seed=2)
    tokens = tokens_of(rows)
    assert rows.shape == (N_LAYERS, n, D_MODEL)
    assert (np.diff(tokens) > 0).all()
    assert set(tokens.tolist()) <= set(TRAIN.tolist())
    np.testing.assert_array_equal(tokens, tokens_of(make_source().sample(n, seed=2)))
    if n == 75:
        assert len(set((tokens // CONTEXT).tolist())) > 20
        assert tokens.tolist() != tokens_of(source.sample(n, seed=3)).tolist()


def test_sample__takes_a_quarter_of_a_context_where_there_are_many(monkeypatch):
    contexts = np.tile(CONTEXTS, (20, 1))
    source, n_contexts = make_source(contexts=contexts), []
    residual_bits = stream.residual_bits
    monkeypatch.setattr(stream, "residual_bits", lambda *args: n_contexts.append(len(args[-1])) or residual_bits(*args))
    tokens_of(source.sample(900, seed=1))
    needed = 4 * 900 * (20 * N_CONTEXTS - 80) / source.n_train_tokens
    assert 0.8 * needed < sum(n_contexts) < 1.05 * needed  # of some, none of the few rows was chosen


RUN = """
import sys
sys.path[:0] = sys.argv[1:]
import jax
jax.config.update("jax_platforms", "cpu")
from jaxsae import mesh as meshes
meshes.start_processes()
import test_stream
print(test_stream.facts_of_a_run())
"""


def samples_of(source):
    return source.sample(33, seed=0), source.peek(source.init(9), 48)


def facts_of_a_run():
    """Return a digest of what a stream over four devices gives, of all processes, and one of this process's samples."""
    source, batches, sampled = make_source(2, 2), hashlib.sha256(), hashlib.sha256()
    for acts in [*(acts for _, acts in draw(source, 9, source.init(9))), *source.held_out_batches(24)]:
        batches.update(meshes.fetch(acts).tobytes())
    layers = meshes.local_layers(N_LAYERS, meshes.make_mesh(N_LAYERS, layer=2, data=2))
    for rows in samples_of(source):
        sampled.update(rows.tobytes())
    return {"layers": [layers.start, layers.stop], "batches": batches.hexdigest(), "sampled": sampled.hexdigest()}


def test_two_processes__give_what_one_gives():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    names = {"JAXSAE_COORDINATOR": f"localhost:{port}", "JAXSAE_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "2"}
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, *paths],
            env={**os.environ, **names, "JAXSAE_PROCESS": str(index)}, stdout=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        facts = [ast.literal_eval(process.communicate(timeout=100)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    alone, samples = facts_of_a_run(), samples_of(make_source(2, 2))
    assert [each["batches"] for each in facts] == [alone["batches"]] * 2
    assert [each["layers"] for each in facts] == [[0, 2], [2, 3]]
    own = [b"".join(rows[slice(*each["layers"])].tobytes() for rows in samples) for each in facts]
    parts = [hashlib.sha256(rows).hexdigest() for rows in own]
    assert [each["sampled"] for each in facts] == parts


def long_contexts():
    return np.zeros((4, CONFIG.n_positions + 1), np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "train.batch is a positive multiple of mesh.data=1, got 0"),
        ({"data": 2, "batch": 23}, "train.batch is a positive multiple of mesh.data=2, got 23"),
        ({"batch": 400, "buffer_tokens": 400}, rf"has {len(TRAIN)} training rows, fewer than train.batch=400"),
        ({"buffer_tokens": 23}, "buffer holds at least a batch of 24, got 23; raise train.buffer_tokens"),
        ({"replace": 0.0}, r"replaces is in \(0, 1\], got 0.0; set activations.replace"),
        ({"replace": 1.1}, r"replaces is in \(0, 1\], got 1.1; set activations.replace"),
        ({"forward_batch": 0}, "at least 1 context, got activations.batch 0"),
        ({"held_out": 1.0}, r"held-out share is in \[0, 1\), got 1\.0"),
        ({"held_out": 0.999}, "share of 0.999 leaves no training context of 40"),
        ({"seed": -1}, "seed is not negative, got -1"),
        ({"contexts": CONTEXTS[:0]}, r"no context to run \(shape \(0, 13\)\)"),
        ({"contexts": CONTEXTS + 1}, "token id 51 is outside the vocabulary of tiny, 0 to 50"),
        ({"contexts": long_contexts()}, "contexts have 17 tokens, tiny takes at most 16; lower corpus.context"),
    ],
)
def test_source__refuses_what_it_cannot_do(change, message):
    with pytest.raises(InputError, match=message):
        make_source(**change)


def test_source__refuses_weights_in_parts():
    split = NamedSharding(meshes.make_mesh(2), meshes.BY_LAYER)
    head = LM.params["wpe"]["weight"]
    params = LM.params | {"wpe": {"weight": jax.device_put(head, split)}}
    with pytest.raises(
        InputError, match=r"weights of tiny are in parts .* set model.sharding=replicated or activations"
    ):
        make_source(lm=dataclasses.replace(LM, params=params))


@pytest.mark.parametrize(
    "change", [{"batch": 10**6}, {"epoch": -1}, {"buffer": 96}, {"refill": 24}, {"data": 2}, {"data": None}]
)
def test_next__refuses_a_position_of_another_stream(change):
    source = make_source()
    state = {name: value for name, value in (source.init() | change).items() if value is not None}
    for use in (source.next, source.arrays, lambda state: source.restore(state, {})):
        with pytest.raises(
            InputError, match=r"position \{.*\} does not fit a stream of 13 batches per epoch with .*192"
        ):
            use(state)


def test_restore__refuses_a_buffer_of_another_shape():
    source = make_source(2)
    with pytest.raises(InputError, match=r"buffer is uint16 \[3, 192, 8\], this run needs uint16 \[4, 192, 8\]"):
        source.restore(source.init(), make_source(1).arrays(source.init()))


@pytest.mark.parametrize("n", [0, len(TRAIN) + 1])
def test_sample__refuses_more_rows_than_there_are(n):
    with pytest.raises(InputError, match=f"a sample of {n} rows asked of {len(TRAIN)} training rows"):
        make_source().sample(n, seed=0)


def test_held_out_batches__refuse_a_size_that_the_shards_do_not_divide():
    with pytest.raises(InputError, match=r"mesh\.data=2, got 25"):
        next(make_source(1, 2).held_out_batches(25))
