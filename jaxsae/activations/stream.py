"""Shuffled batches of training rows straight from the language model: they touch neither the disk nor the host.

The training rows of an epoch form a list: the contexts in a seeded order, of each the rows that are kept. The lists of
all epochs follow each other without a gap. A buffer on the devices holds N rows of it. Between two refills, M of its
slots are handed out in a seeded random order, batch by batch; the next M rows of the list then take their places. So
every row of an epoch enters the buffer once, and leaves it in exactly one batch. Where the number of batches is known,
no row beyond them enters: after the last refill, the buffer is handed out to its end.

The host knows the token ids: it plans which contexts to run and which row goes to which slot. The devices run the
language model, each on contexts of its own; then one exchange along "layer" brings each layer's rows to the devices
that train its SAE (and one along "latent", where an SAE is spread over devices, to all of these). Nothing travels along
"data": a data shard's rows come from contexts that its own devices run.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, BFloat16, Int, UInt16

from jaxsae import mesh as meshes
from jaxsae.activations.source import count_held_out, dropped_rows
from jaxsae.activations.stream_plan import ByShard, StreamPlan, check_batch, size_stream
from jaxsae.artifacts import InputError
from jaxsae.models import LanguageModel, decoder

_SAMPLE_CONTEXTS = 64  # a sample comes from so many contexts at least, where there are so many
_SAMPLE_SHARE = 0.25  # of a context's rows, at most, unless the sample needs more: 4 rows are computed for each
_ENDLESS = 2**62  # batches of a stream without an end


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a position is.

    Attributes:
        step: batches before it.
        refill: number of the refill before it.
        n_gone: rows handed out since then.
        n_rows: that the stream hands out in all.
    """

    step: int
    refill: int
    n_gone: int
    n_rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Buffer:
    """The shuffle buffer on the devices after a refill, with its slots in the order in which they are handed out."""

    rows: UInt16[Array, "L N D"]
    order: Int[Array, " N"]
    refill: int
    n_rows: int


class StreamSource:
    """Shuffled batches of training rows, computed by the language model as they are needed.

    The last `held_out` share of the contexts never enters a batch; position 0 of a context and BOS tokens never do. The
    position that `next` takes is a few small integers, and the rows of a batch are a function of it and of the seed
    alone. `arrays` gives the buffer as a position finds it: a run that saved both goes on bit for bit after `restore`.
    From a position alone the buffer is filled anew, by all the refills of which a row is still in it.

    The batches do not depend on how many devices share the layers or an SAE. They do on `mesh.data`, since each data
    shard draws its part of a batch from its own part of the buffer. A context whose rows lie on both sides of the edge
    of two refills is run for both. Several processes all plan the same, and their devices all take part.

    The buffer is sharded by layer and data: `2 L N D` bytes, divided by these devices (`StreamSizes.buffer_bytes`).

    Attributes:
        batches_per_epoch: whole batches in an epoch; what is left of its rows begins the next epoch's first batch.
        n_train_tokens: kept rows of the training part.
        n_held_out_tokens: kept rows of the held-out part, without the last if they do not divide by `mesh.data`.
        sizes: of the buffer and its refills.
    """

    def __init__(
        self,
        lm: LanguageModel,
        contexts: Int[np.ndarray, "n T"],
        *,
        bos_id: int | None,
        batch: int,
        seed: int,
        held_out: int | float,
        buffer_tokens: int,
        replace: float,
        forward_batch: int,
        mesh: Mesh,
    ):
        """Plan the stream; nothing is computed before the first batch.

        Args:
            lm: the language model; its weights are copied to those devices of the mesh that lack them.
            contexts: packed token ids, one context a row.
            bos_id: the token whose rows are dropped besides those at position 0; None drops no other.
            batch: rows per batch.
            seed: of every permutation; not negative.
            held_out: share of the contexts, from the end, that is never trained on; 0 <= held_out < 1.
            buffer_tokens: rows in the shuffle buffer, rounded down to whole batches; never more than an epoch.
            replace: share of the buffer that a refill replaces, rounded down to whole batches, at least one.
            forward_batch: contexts in one forward pass of a device, at most.
            mesh: devices for the layers and the rows.

        Raises:
            InputError: the contexts do not fit the model, its weights are split over devices, or an argument is out of
                its range.
        """
        _check_model(lm, contexts)
        n_train = _count_train(len(contexts), held_out, seed)
        kept = ~dropped_rows(contexts.reshape(-1), contexts.shape[1], bos_id=bos_id).reshape(contexts.shape)
        self.n_train_tokens = int(kept[:n_train].sum())
        self.sizes = size_stream(
            n_train_tokens=self.n_train_tokens,
            rows_per_context=self.n_train_tokens / n_train,
            batch=batch,
            buffer_tokens=buffer_tokens,
            replace=replace,
            forward_batch=forward_batch,
            layer_shards=mesh.shape[meshes.LAYER],
            data_shards=mesh.shape[meshes.DATA],
            latent_shards=mesh.shape[meshes.LATENT],
        )
        self.batch, self.seed, self.n_layers, self.d_model = batch, seed, lm.n_layers, lm.d_model
        self.batches_per_epoch = self.n_train_tokens // batch
        n_held_out = int(kept[n_train:].sum())
        self.n_held_out_tokens = n_held_out - n_held_out % self.sizes.data_shards
        self._plan = StreamPlan(contexts, kept, n_train, seed, self.sizes)
        self._mesh, self._config, self._dtype = mesh, lm.config, lm.dtype
        self._params = jax.device_put(lm.params, NamedSharding(mesh, meshes.REPLICATED))
        self._buffer: _Buffer | None = None

    def init(self, n_batches: int | None = None) -> dict[str, int]:
        """Return the position before the first batch.

        Args:
            n_batches: in all; no row is computed that is in none of them. None: the stream has no end.

        Raises:
            InputError: `n_batches` is less than 1.
        """
        if n_batches is not None and n_batches < 1:
            raise InputError(f"a stream has at least 1 batch, got {n_batches}")
        return self._position(0, n_batches)

    def next(self, state: Mapping[str, int]) -> tuple[dict[str, int], BFloat16[Array, "L B D"]]:
        """Return the position after one batch, and the batch's rows on the devices, sharded by layer and data.

        Layers are padded to the mesh with the last one. The call returns when the work is queued, not when it is done.

        Raises:
            InputError: the position does not belong to this stream.
        """
        place = self._place(state)
        return self._position(place.step + 1, state.get("n_batches")), self._take(place, self.batch)

    def peek(self, state: Mapping[str, int], n: int) -> BFloat16[np.ndarray, "L _ D"]:
        """Return `n` rows of this process's layers on the host, fewer where the buffer holds no more.

        Those of the next batches come first, then others of the buffer. Nothing is computed that `next` would not need:
        before the first batch this is a sample at no cost.

        Raises:
            InputError: the position does not belong to this stream, or `n` is less than `mesh.data`.
        """
        place, shards = self._place(state), self.sizes.data_shards
        n_left = self.sizes.held_rows(place.refill, place.n_rows) - place.n_gone
        n_taken = min(n, n_left) // shards * shards
        if n_taken < 1:
            raise InputError(f"at least mesh.data={shards} rows of the buffer are looked at, got {n}")
        return meshes.fetch_batch(self._take(place, n_taken), meshes.local_layers(self.n_layers, self._mesh))

    def arrays(self, state: Mapping[str, int]) -> dict[str, UInt16[Array, "L N D"]]:
        """Return the arrays that a checkpoint saves beside a position: the buffer, as bfloat16's bits.

        They are to be read before the next call of `next`, which may write over them.

        Raises:
            InputError: the position does not belong to this stream.
        """
        return {"buffer": self._fill(self._place(state)).rows}

    def abstract_arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape, dtype and sharding of `arrays`; nothing is computed."""
        shape = (meshes.padded_layers(self.n_layers, self._mesh), self.sizes.buffer_rows, self.d_model)
        sharding = NamedSharding(self._mesh, meshes.BY_LAYER_AND_DATA)
        return {"buffer": jax.ShapeDtypeStruct(shape, jnp.uint16, sharding=sharding)}

    def restore(self, state: Mapping[str, int], arrays: Mapping[str, UInt16[Array, "L N D"]]) -> None:
        """Go on from a position with the arrays saved beside it, which belong to the stream from then on.

        Raises:
            InputError: position or arrays do not belong to this stream.
        """
        place, found, wanted = self._place(state), arrays["buffer"], self.abstract_arrays()["buffer"]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise InputError(
                f"the saved shuffle buffer is {found.dtype} {list(found.shape)}, this run needs {wanted.dtype} "
                f"{list(wanted.shape)}; set mesh.layer and the model back, or train again"
            )
        self._buffer = self._with_order(jax.device_put(found, wanted.sharding), place)

    def held_out_batches(self, batch: int) -> Iterator[BFloat16[Array, "L _ D"]]:
        """Yield the kept held-out rows in order, on the devices as those of `next`; the last batch may be short.

        None come without held-out rows. As many batches are computed together as the contexts of one pass hold.

        Raises:
            InputError: `batch` is not a positive multiple of `mesh.data`.
        """
        shards, plan = self.sizes.data_shards, self._plan
        check_batch(batch, shards)
        contexts, n_rows = np.arange(plan.n_train, len(plan.contexts)), self.n_held_out_tokens
        # One context less than a pass holds: the rows begin and end inside of contexts.
        n_contexts = self.sizes.shard_contexts * shards - 1
        together = max(1, n_contexts * self.n_train_tokens // plan.n_train // batch) * batch
        for low in range(0, n_rows, together):
            tokens = plan.tokens(contexts, low, min(low + together, n_rows))
            pieces = [piece.reshape(shards, -1) for piece in np.split(tokens, range(batch, len(tokens), batch))]
            rows, slots = list(np.concatenate(pieces, axis=1)), [np.arange(len(tokens) // shards)] * shards
            buffer, order = self._write(self._empty(len(tokens)), rows, slots), self._put_slots(slots)
            first = 0
            for piece in pieces:
                yield take_rows(self._mesh, piece.size, buffer, order, np.int32(first))
                first += piece.shape[1]

    def held_out_contexts(self) -> Int[np.ndarray, "n T"]:
        """Return the held-out contexts' token ids, whole: position 0 and BOS are in them."""
        return self._plan.contexts[self._plan.n_train :]

    def sample(self, n: int, *, seed: int) -> BFloat16[np.ndarray, "L n D"]:
        """Return `n` different training rows of this process's layers, on the host, in the order of the corpus.

        They come from random contexts, a quarter of the rows of each, and from 64 contexts at least where there are so
        many: enough for means and scales.

        Raises:
            InputError: `n` is not between 1 and `n_train_tokens`.
        """
        if not 1 <= n <= self.n_train_tokens:
            raise InputError(f"a sample of {n} rows asked of {self.n_train_tokens} training rows")
        rng = np.random.default_rng([self.seed, seed, 2])
        contexts = rng.permutation(self._plan.n_train)
        n_kept = np.cumsum(self._plan.rows_per_context[contexts])
        n_contexts = max(int(np.searchsorted(n_kept, n / _SAMPLE_SHARE)) + 1, _SAMPLE_CONTEXTS)
        candidates = self._plan.tokens(np.sort(contexts[:n_contexts]), 0, int(n_kept[:n_contexts][-1]))
        rows = np.array_split(np.sort(rng.choice(candidates, n, replace=False)), self.sizes.data_shards)
        width, slots = len(rows[0]), [np.arange(len(shard_rows)) for shard_rows in rows]
        bits = meshes.fetch(self._write(self._empty(width * len(rows)), rows, slots))
        found = np.concatenate([shard * width + shard_slots for shard, shard_slots in enumerate(slots)])
        return bits[meshes.local_layers(self.n_layers, self._mesh)][:, found].view(ml_dtypes.bfloat16)

    def _position(self, step: int, n_batches: int | None) -> dict[str, int]:
        epoch, batch = divmod(step, self.batches_per_epoch)
        end = {} if n_batches is None else {"n_batches": n_batches}
        return {"epoch": epoch, "batch": batch} | self._layout() | end

    def _layout(self) -> dict[str, int]:
        """Return what decides, beside seed, contexts and the number of batches, which row is in which slot."""
        return {"buffer": self.sizes.buffer_rows, "refill": self.sizes.refill_rows, "data": self.sizes.data_shards}

    def _place(self, state: Mapping[str, int]) -> "_Place":
        epoch, batch = state.get("epoch", -1), state.get("batch", -1)
        if epoch < 0 or not 0 <= batch < self.batches_per_epoch or not self._layout().items() <= state.items():
            raise InputError(
                f"the reader's position {dict(state)} does not fit a stream of {self.batches_per_epoch} batches per "
                f"epoch with {self._layout()}; set train.batch, train.buffer_tokens, train.held_out, "
                "activations.replace and mesh.data back, or train again"
            )
        step, n_batches = epoch * self.batches_per_epoch + batch, state.get("n_batches", _ENDLESS)
        if step >= n_batches:
            raise InputError(f"the stream ends after {n_batches} batches; give `init` a larger number for more")
        n_rows, n_refill = n_batches * self.batch, self.sizes.refill_rows
        refill = min(step * self.batch // n_refill, self.sizes.last_refill(n_rows))
        return _Place(step, refill, step * self.batch - refill * n_refill, n_rows)

    def _take(self, place: "_Place", n_rows: int) -> BFloat16[Array, "L B D"]:
        """Return the rows that are handed out next, as many of each data shard."""
        buffer, first = self._fill(place), np.int32(place.n_gone // self.sizes.data_shards)
        return take_rows(self._mesh, n_rows, buffer.rows, buffer.order, first)

    def _fill(self, place: "_Place") -> "_Buffer":
        """Return the buffer as a refill leaves it, made by this one or by all of which a row is still in it.

        After the last refill, what is in its empty slots is not defined.
        """
        held, number, n_rows = self._buffer, place.refill, place.n_rows
        if held is not None and (held.refill, held.n_rows) == (number, n_rows):
            return held
        follows = held is not None and (held.refill, held.n_rows) == (number - 1, n_rows)
        rows = self._empty(self.sizes.buffer_rows) if held is None else held.rows
        for refill in range(number if follows else self._plan.oldest_refill(number), number + 1):
            rows = self._write(rows, *self._plan.refill(refill, n_rows))
        self._buffer = self._with_order(rows, place)
        return self._buffer

    def _with_order(self, rows: UInt16[Array, "L N D"], place: "_Place") -> "_Buffer":
        order = self._put_slots(self._plan.order(place.refill, place.n_rows))
        return _Buffer(rows, order, place.refill, place.n_rows)

    def _write(self, buffer: UInt16[Array, "L N D"], rows: ByShard, slots: ByShard) -> UInt16[Array, "L N D"]:
        """Compute rows of each data shard and write them to slots of its part of `buffer`, which is donated."""
        for token_ids, places in self._plan.passes(rows, slots, buffer.shape[1] // self.sizes.data_shards):
            ids = _put(token_ids, NamedSharding(self._mesh, meshes.context_spec(self._mesh)))
            # Without a name, a pass's rows are gone before those of the next are made.
            buffer = write_rows(
                self._mesh,
                buffer,
                residual_bits(self._config, self._dtype, self._mesh, self._params, ids),
                self._put_slots([places]),
            )
        return buffer

    def _empty(self, n_rows: int) -> UInt16[Array, "L N D"]:
        like = self.abstract_arrays()["buffer"]
        return jnp.zeros((like.shape[0], n_rows, like.shape[2]), like.dtype, device=like.sharding)

    def _put_slots(self, slots: ByShard) -> Int[Array, " slots"]:
        return _put(np.concatenate(slots), NamedSharding(self._mesh, meshes.BY_DATA))


def _put(array: Int[np.ndarray, "..."], sharding: NamedSharding) -> Int[Array, "..."]:
    """Place an array that every process has on the devices, as int32."""
    small = array.astype(np.int32)
    return jax.make_array_from_callback(small.shape, sharding, lambda index: small[index])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def residual_bits(
    config: Any, dtype: str, mesh: Mesh, params: Any, token_ids: Int[Array, "contexts T"]
) -> UInt16[Array, "L rows D"]:
    """Run each device's contexts and bring every layer's rows to its layer shard, in one exchange along "layer".

    One along "latent" gives them to all devices that share an SAE. The bits travel as uint16: for bfloat16 itself, XLA
    on a CPU would send float32.

    Args:
        token_ids: contexts sharded over all devices, those of a data shard side by side.

    Returns:
        All positions' rows, the bits of bfloat16, sharded by layer (padded to the mesh with the last one) and data.
    """
    n_padding, latent_axis = meshes.padded_layers(config.n_layers, mesh) - config.n_layers, meshes.latent_axis(mesh)

    def on_device(params: Any, token_ids: Int[Array, "n T"]) -> UInt16[Array, "l m D"]:
        resid = decoder.residuals(config, params, token_ids, dtype=dtype).astype(jnp.bfloat16)
        bits = lax.bitcast_convert_type(resid, jnp.uint16).reshape(config.n_layers, -1, config.d_model)
        padded = jnp.concatenate([bits, jnp.repeat(bits[-1:], n_padding, axis=0)])
        rows = lax.all_to_all(padded, meshes.LAYER, split_axis=0, concat_axis=1, tiled=True)
        return rows if latent_axis is None else lax.all_gather(rows, latent_axis, axis=1, tiled=True, to="invarying")

    specs = (meshes.REPLICATED, meshes.context_spec(mesh))
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=meshes.BY_LAYER_AND_DATA)(params, token_ids)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def write_rows(
    mesh: Mesh, buffer: UInt16[Array, "L N D"], bits: UInt16[Array, "L rows D"], slots: Int[Array, " rows"]
) -> UInt16[Array, "L N D"]:
    """Write rows to slots of their data shard, in place; a slot beyond the last drops its row."""

    def on_device(buffer, bits, slots):
        return buffer.at[:, slots].set(bits, mode="drop", unique_indices=True)

    specs = (meshes.BY_LAYER_AND_DATA, meshes.BY_LAYER_AND_DATA, meshes.BY_DATA)
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=meshes.BY_LAYER_AND_DATA)
    return sharded(buffer, bits, slots)


@functools.partial(jax.jit, static_argnums=(0, 1))
def take_rows(
    mesh: Mesh, n_rows: int, buffer: UInt16[Array, "L N D"], order: Int[Array, " slots"], first: Int[Array, ""]
) -> BFloat16[Array, "L B D"]:
    """Return the rows in the slots that stand in `order` from place `first` on, as many of each data shard.

    Args:
        n_rows: B, of all data shards.
        order: slots of each data shard's part of the buffer.
    """

    def on_device(buffer, order, first):
        slots = lax.dynamic_slice_in_dim(order, first, n_rows // mesh.shape[meshes.DATA])
        return lax.bitcast_convert_type(jnp.take(buffer, slots, axis=1, mode="clip"), jnp.bfloat16)

    specs = (meshes.BY_LAYER_AND_DATA, meshes.BY_DATA, meshes.REPLICATED)
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=meshes.BY_LAYER_AND_DATA)
    return sharded(buffer, order, first)


def _count_train(n_contexts: int, held_out: int | float, seed: int) -> int:
    if not 0 <= held_out < 1:
        raise InputError(f"the held-out share is in [0, 1), got {held_out}")
    if seed < 0:
        raise InputError(f"the seed is not negative, got {seed}")
    n_train = n_contexts - count_held_out(n_contexts, held_out)
    if n_train < 1:
        raise InputError(
            f"a held-out share of {held_out} leaves no training context of {n_contexts}; lower train.held_out or use "
            "more text"
        )
    return n_train


def _check_model(lm: LanguageModel, contexts: Int[np.ndarray, "n T"]) -> None:
    if contexts.size == 0:
        raise InputError(f"there is no context to run (shape {contexts.shape}); the corpus is too small")
    if contexts.shape[1] > lm.n_positions:
        raise InputError(
            f"contexts have {contexts.shape[1]} tokens, {lm.name} takes at most {lm.n_positions}; lower corpus.context"
        )
    lm.check_token_ids(np.array([[contexts.min(), contexts.max()]]))
    if not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(lm.params)):
        raise InputError(
            f"the weights of {lm.name} are in parts over devices, a stream needs them whole on each; set "
            "model.sharding=replicated or activations.source=store"
        )
