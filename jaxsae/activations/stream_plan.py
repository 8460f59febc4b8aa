"""What the host decides of a stream: its sizes, which row goes to which slot, which contexts each forward pass runs.

All of it is a function of the token ids, a few settings and a seed; no device takes part.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from jaxsae.artifacts import InputError

ByShard = list[Int[np.ndarray, " _"]]  # rows or slots, of each data shard


@dataclasses.dataclass(frozen=True)
class StreamSizes:
    """How much the buffer holds and what a refill takes, all devices together unless it says otherwise.

    Attributes:
        buffer_rows: N, the buffer's slots; a whole number of batches.
        refill_rows: M, the rows handed out before a refill and replaced by it; a whole number of batches.
        passes: forward passes in a refill; now and then one more, where many rows are dropped.
        pass_contexts: contexts that one device runs in one pass.
        layer_shards, data_shards, latent_shards: the mesh.
    """

    buffer_rows: int
    refill_rows: int
    passes: int
    pass_contexts: int
    layer_shards: int
    data_shards: int
    latent_shards: int

    @property
    def shard_contexts(self) -> int:
        """Return the contexts that the devices of a data shard run in one pass."""
        return self.pass_contexts * self.layer_shards * self.latent_shards

    @property
    def refill_contexts(self) -> int:
        """Return the contexts that a refill runs, with those that fill up the last pass."""
        return self.passes * self.shard_contexts * self.data_shards

    def last_refill(self, n_rows: int) -> int:
        """Return the number of the last refill of a stream that hands out so many rows; 0 is the first fill."""
        return max(0, -((self.buffer_rows - n_rows) // self.refill_rows))

    def held_rows(self, refill: int, n_rows: int) -> int:
        """Return the rows that the buffer holds after a refill: all slots are full, but for some after the last."""
        return min(self.buffer_rows, n_rows - refill * self.refill_rows)

    def buffer_bytes(self, n_layers: int, d_model: int) -> int:
        """Return the bytes of the buffer on each device: 2 D N ceil(L / layer shards) / data shards."""
        return 2 * d_model * -(-n_layers // self.layer_shards) * (self.buffer_rows // self.data_shards)

    def pass_bytes(self, n_layers: int, d_model: int, context: int) -> int:
        """Return the bytes of a pass's rows on each device, beside the blocks' own, at the most.

        They are float32 first; an exchange then has what it sends and what it receives in memory, both bfloat16.
        """
        padded = self.layer_shards * -(-n_layers // self.layer_shards)
        received = padded * (1 if self.latent_shards == 1 else 1 + self.latent_shards)
        return (4 * n_layers + 2 * padded + 2 * received) * self.pass_contexts * context * d_model


def size_stream(
    *,
    n_train_tokens: int,
    rows_per_context: int | float,
    batch: int,
    buffer_tokens: int,
    replace: float,
    forward_batch: int,
    layer_shards: int,
    data_shards: int,
    latent_shards: int,
) -> StreamSizes:
    """Derive the sizes of a stream from the settings.

    The buffer holds no more than an epoch. The passes of a refill share its contexts out evenly, so that few are run
    only to fill up the last one. Each data shard's part of the rows begins and ends inside of contexts, which takes it
    one context more than the rows would fill.

    Args:
        n_train_tokens: rows in an epoch.
        rows_per_context: kept rows of a context, on average.
        batch: rows in a batch.
        buffer_tokens: rows in the buffer, at most.
        replace: share of the buffer that a refill replaces.
        forward_batch: contexts in one forward pass of a device, at most.

    Raises:
        InputError: a setting is out of its range, or there are fewer rows than a batch.
    """
    check_batch(batch, data_shards)
    if forward_batch < 1:
        raise InputError(f"a forward pass has at least 1 context, got activations.batch {forward_batch}")
    if not 0 < replace <= 1:
        raise InputError(
            f"the share of the buffer that a refill replaces is in (0, 1], got {replace}; set activations.replace"
        )
    if buffer_tokens < batch:
        raise InputError(
            f"the shuffle buffer holds at least a batch of {batch}, got {buffer_tokens}; raise train.buffer_tokens"
        )
    if n_train_tokens < batch:
        raise InputError(
            f"the corpus has {n_train_tokens} training rows, fewer than train.batch={batch}; lower train.batch or use "
            "more text"
        )
    n_batches = min(buffer_tokens, n_train_tokens) // batch
    refill_rows = max(1, math.floor(replace * n_batches)) * batch
    needed = math.ceil(refill_rows / data_shards / rows_per_context) + 1
    runners = layer_shards * latent_shards
    passes = math.ceil(needed / (runners * forward_batch))
    return StreamSizes(
        buffer_rows=n_batches * batch,
        refill_rows=refill_rows,
        passes=passes,
        pass_contexts=math.ceil(needed / (runners * passes)),
        layer_shards=layer_shards,
        data_shards=data_shards,
        latent_shards=latent_shards,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class StreamPlan:
    """What the host decides: the list of rows, the slots that are handed out, the contexts of each forward pass.

    A row of the list is known by a number, epoch * tokens of the corpus + token. Every permutation is a function of the
    seed, the epoch or refill, and the data shard.

    Attributes:
        kept: of all contexts, also those held out.
        n_train: contexts that are trained on, from the first.
    """

    contexts: Int[np.ndarray, "n T"]
    kept: Bool[np.ndarray, "n T"]
    n_train: int
    seed: int
    sizes: StreamSizes

    @functools.cached_property
    def rows_per_context(self) -> Int[np.ndarray, " n"]:
        """Return the kept rows of each context."""
        return self.kept.sum(axis=1)

    def tokens(self, contexts: Int[np.ndarray, " m"], low: int, high: int) -> Int[np.ndarray, " rows"]:
        """Return those from `low` to `high` of the kept tokens of contexts laid one after the other."""
        ends = np.cumsum(self.rows_per_context[contexts])
        first, last = np.searchsorted(ends, [low, high - 1], side="right")
        touched = contexts[first : last + 1]
        begin = ends[first] - self.rows_per_context[touched[0]]
        places, positions = np.nonzero(self.kept[touched])
        return (touched[places] * self.contexts.shape[1] + positions)[low - begin : high - begin]

    def rows(self, start: int, stop: int) -> Int[np.ndarray, " rows"]:
        """Return rows of the list of all epochs."""
        per_epoch, pieces = int(self.rows_per_context[: self.n_train].sum()), []
        while start < stop:
            epoch, low = divmod(start, per_epoch)
            high = min(low + stop - start, per_epoch)
            contexts = np.random.default_rng([self.seed, epoch, 0]).permutation(self.n_train)
            pieces.append(epoch * self.contexts.size + self.tokens(contexts, low, high))
            start += high - low
        return np.concatenate(pieces)

    def refill(self, number: int, n_rows: int) -> tuple[ByShard, ByShard]:
        """Return the rows that a refill computes, and their slots, of each data shard; number 0 is the first fill.

        Args:
            n_rows: that the stream hands out; none after them is computed.
        """
        shards, n_buffer, n_refill = self.sizes.data_shards, self.sizes.buffer_rows, self.sizes.refill_rows
        start = n_buffer + (number - 1) * n_refill if number else 0
        stop = min(n_buffer + number * n_refill, n_rows)
        slots = [free[: (stop - start) // shards] for free in self._free_slots(number)]
        return np.split(self.rows(start, stop), shards), slots

    def order(self, refill: int, n_rows: int) -> ByShard:
        """Return the slots of each data shard in the order in which they are handed out after a refill.

        Before the next refill the first M are. After the last one all are but the empty slots, for which the stream has
        no row left: these stand at the end.
        """
        n_empty = (self.sizes.buffer_rows - self.sizes.held_rows(refill, n_rows)) // self.sizes.data_shards
        empty = [free[len(free) - n_empty :] for free in self._free_slots(refill)]
        orders = zip(self._permutations(refill), empty, strict=True)
        return [np.append(order[~np.isin(order, slots)], slots) for order, slots in orders]

    def _free_slots(self, refill: int) -> ByShard:
        """Return the slots of each data shard that a refill may write: those handed out before it, or all at first."""
        if refill == 0:
            return [np.arange(self.sizes.buffer_rows // self.sizes.data_shards)] * self.sizes.data_shards
        n_free = self.sizes.refill_rows // self.sizes.data_shards
        return [order[:n_free] for order in self._permutations(refill - 1)]

    def _permutations(self, refill: int) -> ByShard:
        n_slots = self.sizes.buffer_rows // self.sizes.data_shards
        keys = ([self.seed, refill, 1, shard] for shard in range(self.sizes.data_shards))
        return [np.random.default_rng(key).permutation(n_slots) for key in keys]

    def oldest_refill(self, refill: int) -> int:
        """Return the first of the refills up to this one of which a row is still in the buffer."""
        shards = self.sizes.data_shards
        is_newer = np.zeros((shards, self.sizes.buffer_rows // shards), bool)
        for number in range(refill, 0, -1):
            np.put_along_axis(is_newer, np.stack(self._free_slots(number)), True, axis=1)
            if is_newer.all():
                return number
        return 0

    def passes(
        self, rows: ByShard, slots: ByShard, n_slots: int
    ) -> Iterator[tuple[Int[np.ndarray, "contexts T"], Int[np.ndarray, " places"]]]:
        """Yield the contexts of each forward pass, and the slot of each of their positions.

        Both are laid out by data shard. Positions that are not wanted have slots beyond the last, each another one.

        Args:
            rows: of each data shard.
            slots: of these rows.
            n_slots: of a data shard.
        """
        context, per_pass = self.contexts.shape[1], self.sizes.shard_contexts
        visited = [np.unique(shard_rows // context, return_inverse=True) for shard_rows in rows]
        for low in range(0, max(len(visits) for visits, _ in visited), per_pass):
            token_ids, places = [], []
            for shard_rows, shard_slots, (visits, visit) in zip(rows, slots, visited, strict=True):
                here = visits[low : low + per_pass] % len(self.contexts)
                # Context 0 fills up: all passes are of one size, on which the bits of a GEMM's rows depend.
                token_ids.append(self.contexts[np.pad(here, (0, per_pass - len(here)))])
                is_here = (visit >= low) & (visit < low + per_pass)
                place = n_slots + np.arange(per_pass * context)
                place[(visit[is_here] - low) * context + shard_rows[is_here] % context] = shard_slots[is_here]
                places.append(place)
            yield np.concatenate(token_ids), np.concatenate(places)


def check_batch(batch: int, data_shards: int) -> None:
    """Refuse a batch that the data shards cannot share out evenly."""
    if batch < 1 or batch % data_shards:
        raise InputError(
            f"train.batch is a positive multiple of mesh.data={data_shards}, got {batch}; change one of them"
        )
