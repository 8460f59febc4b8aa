"""Shuffled batches of training rows from a complete store: order and position are functions of a seed and two numbers.

Position 0 of each context and BOS tokens are never returned. Nothing has to be saved to go on from a position, and
memory does not grow with the store.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Bool, Int

from jaxsae.activations.store import Store, StoreMeta, contiguous
from jaxsae.artifacts import InputError


def dropped_rows(
    token_ids: Int[np.ndarray, " tokens"], context: int, *, bos_id: int | None
) -> Bool[np.ndarray, " tokens"]:
    """Mark position 0 of each context and every BOS token: attention sinks, 100 times the norm of other rows."""
    drop = np.zeros(len(token_ids), bool)
    drop[::context] = True
    return drop if bos_id is None else drop | (token_ids == bos_id)


def count_held_out(n_contexts: int, share: int | float) -> int:
    """Return how many contexts, from the end, are never trained on: at least one, unless the share is 0."""
    return max(1, round(share * n_contexts)) if share > 0 else 0


class StoreSource:
    """Shuffled batches of training rows of a complete store; batch and epoch number are the whole state.

    The last `held_out` share of the contexts never enters a batch. In each epoch the 128-token blocks of the training
    part are permuted; groups of `buffer_tokens // 128` blocks are read into memory and the kept rows of a group are
    permuted; batch b is rows `[b * batch, (b + 1) * batch)` of the groups laid one after the other. The rows left at
    the end of an epoch, fewer than a batch, are not used in it. Every permutation is a function of the seed, the
    epoch and the group, so that any state can be resumed exactly. A thread reads the next group meanwhile: two
    groups, `4 * buffer_tokens * L * D` bytes, are in memory, whatever the store's size.

    Attributes:
        batches_per_epoch: whole batches in an epoch.
        n_train_tokens: kept rows of the training part.
        n_held_out_tokens: kept rows of the held-out part.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch: int,
        seed: int,
        held_out: int | float,
        buffer_tokens: int,
        layers: slice = slice(None),
        drop: Bool[np.ndarray, " tokens"] | None = None,
    ):
        """Plan the reading of `store`.

        Args:
            store: a complete store.
            batch: rows per batch.
            seed: of every permutation; not negative.
            held_out: share of the contexts, from the end, that is never trained on; 0 <= held_out < 1.
            buffer_tokens: tokens shuffled together; at least one block.
            layers: contiguous layers to read.
            drop: rows never returned; position 0 of each context and every BOS token when None.

        Raises:
            InputError: the store lacks shards, or an argument is out of its range.
        """
        meta = store.meta
        missing = store.missing_shards()
        if missing:
            raise InputError(
                f"{store.dir} lacks {len(missing)} of {meta.n_shards} shards (first {missing[0]}); {store.rebuild}"
            )
        if drop is None:
            drop = dropped_rows(store.token_ids, meta.context, bos_id=meta.bos_id)
        _check_source(meta, batch, seed, held_out, buffer_tokens, len(drop))
        chosen = contiguous(layers, meta.n_layers)
        n_contexts = meta.n_tokens // meta.context
        n_held_out = count_held_out(n_contexts, held_out)
        if n_held_out >= n_contexts:
            raise InputError(
                f"a held-out share of {held_out} leaves no training context of the {n_contexts} of {store.dir}; lower "
                "the share or extract more tokens"
            )
        self.store, self.batch, self.seed = store, batch, seed
        self.n_layers, self.d_model = len(chosen), meta.d_model
        self._layers = slice(chosen.start, chosen.stop)
        self._kept = ~drop
        self._n_train_contexts = n_contexts - n_held_out
        self._train_end = self._n_train_contexts * meta.context
        n_blocks = math.ceil(self._train_end / meta.block_tokens)
        self._group_blocks = min(buffer_tokens // meta.block_tokens, n_blocks)
        starts = np.arange(0, self._train_end, meta.block_tokens)
        self._kept_per_block = np.add.reduceat(self._kept[: self._train_end].astype(np.int64), starts)
        self.n_train_tokens = int(self._kept_per_block.sum())
        self.n_held_out_tokens = int(self._kept[self._train_end :].sum())
        self.batches_per_epoch = self.n_train_tokens // batch
        if self.batches_per_epoch == 0:
            raise InputError(
                f"{store.dir} has {self.n_train_tokens} training rows, fewer than train.batch={batch}; lower "
                "train.batch or extract more tokens"
            )
        self._plans: dict[int, _Epoch] = {}
        self._groups: dict[tuple[int, int], _Rows] = {}
        self._spare: np.ndarray | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="activations")

    def init(self) -> dict[str, int]:
        """Return the state before the first batch."""
        return {"epoch": 0, "batch": 0}

    def next(self, state: Mapping[str, int]) -> tuple[dict[str, int], BFloat16[np.ndarray, "L B D"]]:
        """Return the state after one batch and the batch's rows; the same state always gives the same bytes.

        Raises:
            InputError: the state does not belong to this source, or a shard is missing or damaged.
        """
        epoch, index = self._position(state)
        plan = self._plan(epoch)
        low, high = index * self.batch, (index + 1) * self.batch
        first, last = (int(group) for group in np.searchsorted(plan.ends, [low, high - 1], side="right"))
        touched = [(epoch, group) for group in range(first, last + 1)]
        is_last = index + 1 == self.batches_per_epoch
        following = (epoch + 1, 0) if is_last or last + 1 == len(plan.ends) else (epoch, last + 1)
        self._keep([*touched, following])
        bits = self._gather(touched, low, high)
        self._keep([touched[-1], following])
        self._group(*following)
        position = {"epoch": epoch + 1, "batch": 0} if is_last else {"epoch": epoch, "batch": index + 1}
        return position, bits.view(ml_dtypes.bfloat16)

    def held_out_batches(self, batch: int) -> Iterator[BFloat16[np.ndarray, "L _ D"]]:
        """Yield the kept held-out rows in storage order; the last batch may be short, none come without held-out rows.

        Raises:
            InputError: a shard is missing or damaged.
        """
        tokens = self._train_end + np.flatnonzero(self._kept[self._train_end :])
        yield from self._in_order(np.split(tokens, range(batch, len(tokens), batch)))

    def held_out_contexts(self) -> Int[np.ndarray, "n T"]:
        """Return the held-out contexts' token ids, whole: position 0 and BOS are in them."""
        return self.store.token_ids.reshape(-1, self.store.meta.context)[self._n_train_contexts :]

    def sample(self, n: int, *, seed: int) -> BFloat16[np.ndarray, "L n D"]:
        """Return `n` different training rows from blocks spread over the store, in storage order.

        Rows come from about n / 32 random blocks (32 rows of a block cost one read), at least 64 where there are so
        many: enough for means and scales.

        Raises:
            InputError: `n` is not between 1 and `n_train_tokens`.
        """
        if not 1 <= n <= self.n_train_tokens:
            raise InputError(f"a sample of {n} rows asked of {self.n_train_tokens} training rows of {self.store.dir}")
        rng = np.random.default_rng([self.seed, seed, 2])
        blocks = rng.permutation(len(self._kept_per_block))
        enough = int(np.searchsorted(np.cumsum(self._kept_per_block[blocks]), n)) + 1
        blocks = np.sort(blocks[: max(enough, 64, math.ceil(n / 32))])
        candidates = self._tokens(blocks)
        candidates = candidates[self._kept[candidates]]
        chosen = np.sort(rng.choice(candidates, n, replace=False))
        block_rank = np.unique(chosen // self.store.meta.block_tokens, return_inverse=True)[1]
        cuts = np.flatnonzero(np.diff(block_rank // self._group_blocks)) + 1
        bits = np.empty((self.n_layers, n, self.d_model), np.uint16)
        offset = 0
        for rows in self._in_order(np.split(chosen, cuts)):
            bits[:, offset : offset + rows.shape[1]] = rows.view(np.uint16)
            offset += rows.shape[1]
        return bits.view(ml_dtypes.bfloat16)

    def _position(self, state: Mapping[str, int]) -> tuple[int, int]:
        epoch, index = state.get("epoch", -1), state.get("batch", -1)
        if epoch < 0 or not 0 <= index < self.batches_per_epoch:
            raise InputError(
                f"the reader's position {dict(state)} is outside of the {self.batches_per_epoch} batches per epoch of "
                f"{self.store.dir}; the store, train.batch or the held-out share changed: train again"
            )
        return epoch, index

    def _plan(self, epoch: int) -> "_Epoch":
        if epoch not in self._plans:
            self._plans = {e: plan for e, plan in self._plans.items() if abs(e - epoch) == 1}
            blocks = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self._kept_per_block))
            sums = np.add.reduceat(self._kept_per_block[blocks], np.arange(0, len(blocks), self._group_blocks))
            self._plans[epoch] = _Epoch(blocks, np.cumsum(sums))
        return self._plans[epoch]

    def _gather(self, touched: list[tuple[int, int]], low: int, high: int) -> np.ndarray:
        """Copy rows `low` to `high` of an epoch out of the groups that hold them."""
        bits = np.empty((self.n_layers, high - low, self.d_model), np.uint16)
        # All of the batch's groups are being read before the first is waited for.
        groups = [self._group(*key) for key in touched]
        for (epoch, group), rows in zip(touched, groups, strict=True):
            begin = int(self._plan(epoch).ends[group - 1]) if group else 0
            wanted = rows.order[max(low - begin, 0) : high - begin]
            offset = max(begin - low, 0)
            rows.gather(wanted, bits[:, offset : offset + len(wanted)])
        return bits

    def _keep(self, keys: list[tuple[int, int]]) -> None:
        """Forget the other groups. The memory of one that was read whole is used again: fresh pages cost a third."""
        for key in self._groups.keys() - set(keys):
            rows = self._groups.pop(key)
            if not rows.read.cancel() and rows.read.done() and rows.read.exception() is None:
                self._spare = rows.memory

    def _group(self, epoch: int, group: int) -> "_Rows":
        if (epoch, group) not in self._groups:
            first = group * self._group_blocks
            # Sorted within the group, the reads go forward through the files; the rows are permuted afterwards.
            blocks = np.sort(self._plan(epoch).blocks[first : first + self._group_blocks])
            kept = np.flatnonzero(self._kept[self._tokens(blocks)])
            order = np.random.default_rng([self.seed, epoch, 1, group]).permutation(kept)
            self._groups[epoch, group] = self._begin(blocks, order, end=self._train_end, memory=self._memory())
        return self._groups[epoch, group]

    def _tokens(self, blocks: Int[np.ndarray, " blocks"]) -> Int[np.ndarray, " tokens"]:
        size = self.store.meta.block_tokens
        tokens = (blocks[:, None] * size + np.arange(size)).ravel()
        return tokens[tokens < self._train_end]

    def _memory(self) -> np.ndarray:
        memory, self._spare = self._spare, None
        if memory is None:
            memory = np.empty(
                (self.n_layers, self._group_blocks * self.store.meta.block_tokens, self.d_model), np.uint16
            )
        return memory

    def _begin(
        self,
        blocks: Int[np.ndarray, " blocks"],
        order: Int[np.ndarray, " rows"],
        *,
        end: int,
        memory: np.ndarray | None = None,
    ) -> "_Rows":
        size = self.store.meta.block_tokens
        spans = [(int(block) * size, min(int(block + 1) * size, end)) for block in blocks]
        read = self._reader.submit(self.store.read_spans, spans, layers=self._layers, into=memory)
        return _Rows(read, order, memory)

    def _in_order(self, pieces: list[Int[np.ndarray, " _"]]) -> Iterator[BFloat16[np.ndarray, "L _ D"]]:
        """Yield the rows of each piece of ascending token positions; the next piece is read meanwhile."""
        size = self.store.meta.block_tokens
        ahead: _Rows | None = None
        for piece in [*pieces, None]:
            current, ahead = ahead, None
            if piece is not None and len(piece):
                blocks, rank = np.unique(piece // size, return_inverse=True)
                ahead = self._begin(blocks, rank * size + piece % size, end=self.store.meta.n_tokens)
            if current is not None:
                bits = np.empty((self.n_layers, len(current.order), self.d_model), np.uint16)
                current.gather(current.order, bits)
                yield bits.view(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, eq=False)
class _Epoch:
    """One epoch's order of blocks, and the number of kept rows up to the end of each group."""

    blocks: Int[np.ndarray, " blocks"]
    ends: Int[np.ndarray, " groups"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Blocks read or being read, and the order of the rows that are wanted of them."""

    read: Future
    order: Int[np.ndarray, " rows"]
    memory: np.ndarray | None

    def gather(self, wanted: np.ndarray, into: np.ndarray) -> None:
        """Copy rows into a uint16 array [L rows D]."""
        values = self.read.result().view(np.uint16)
        for layer in range(len(values)):
            # mode="clip" lets NumPy write into `into` without a copy; the indices are in range.
            np.take(values[layer], wanted, axis=0, out=into[layer], mode="clip")


def _check_source(
    meta: StoreMeta, batch: int, seed: int, held_out: int | float, buffer_tokens: int, n_drop: int
) -> None:
    if not 0 <= held_out < 1:
        raise InputError(f"the held-out share is in [0, 1), got {held_out}")
    if buffer_tokens < meta.block_tokens:
        raise InputError(f"the shuffle buffer holds at least {meta.block_tokens} tokens, got {buffer_tokens}")
    if batch < 1 or seed < 0:
        raise InputError(f"a batch has at least 1 row and the seed is not negative, got batch {batch}, seed {seed}")
    if n_drop != meta.n_tokens:
        raise InputError(f"the drop mask has {n_drop} rows, the store {meta.n_tokens} tokens")
