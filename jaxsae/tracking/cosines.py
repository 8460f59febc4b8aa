"""Cosines of decoder rows: of many pairs to the precision of float32, with a bound, and of chosen pairs in float64.

Where every pair of a track and a feature is to be looked at, nearly all the time goes into gathering decoder rows and
multiplying them. Float32 is enough to see which few pairs can matter; those are asked for again.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from jaxsae.artifacts import InputError

VECTOR_BYTES = 2**19  # gathered decoder rows of a few samples: they stay in a core's own cache
DOT_ROWS = 128  # rows gathered for float64 sums at a time, for the same reason
SINGLE_NORMS = (1e-12, 1e12)  # between these a product of two float32 rows neither overflows nor vanishes
TILE = 8  # rows of a small product; of 8, 12, 16 and 24 the fastest where small ones are


@dataclasses.dataclass(frozen=True)
class _Rows:
    """One layer's decoder rows, and 1 / norm of those in use: 0 where the norm is 0.

    `is_single`: products of its rows in float32 have no more error than rounding makes, and the norms are float32.
    """

    vectors: Float[np.ndarray, "F D"]
    inverse_norms: Float[np.ndarray, " F"]
    is_single: bool


class Cosines:
    """The decoder rows of a few layers, and cosines between them."""

    def __init__(self) -> None:
        """Hold no layer."""
        self._window: dict[int, _Rows] = {}
        self._buffers: dict[str, np.ndarray] = {}

    def forget(self, layer: int) -> None:
        """Let go of a layer's rows."""
        self._window.pop(layer, None)

    def vectors(self, layer: int) -> Float[np.ndarray, "F D"]:
        """Return a layer's rows."""
        return self._window[layer].vectors

    def add(self, layer: int, decoder: np.ndarray, ids: Int[np.ndarray, "N K"], first: int = 0) -> None:
        """Take up a layer's rows, of which those of `ids` are going to be used; -1 is none.

        Args:
            first: the number of the first of the samples.

        Raises:
            InputError: the decoder is no matrix, is of another width than those before, has too few rows, or one in use
                is not finite; it names layer, sample and latent.
        """
        if decoder.ndim != 2:
            raise InputError(f"decoder of layer {layer} has shape {decoder.shape}, expected [latents, width]")
        for other, known in self._window.items():
            if known.vectors.shape[1] != decoder.shape[1]:
                raise InputError(
                    f"decoder of layer {layer} is {decoder.shape[1]} wide, that of layer {other} "
                    f"{known.vectors.shape[1]}; give decoders of one model"
                )
        largest = ids.max(initial=-1)
        if largest >= len(decoder):
            sample = first + int(np.argmax(ids.max(axis=1) == largest))
            raise InputError(
                f"feature id {largest} in sample {sample}, layer {layer}: the decoder has {len(decoder)} latents, "
                "expected ids below that; use the SAEs that made the features"
            )
        if decoder.dtype not in (np.float32, np.float64):
            decoder = decoder.astype(np.float64)
        is_used = np.zeros(len(decoder), bool)
        is_used[ids[ids >= 0]] = True
        self._window[layer] = _measure(decoder, np.flatnonzero(is_used), layer)

    def screen(
        self,
        row_ids: Int[np.ndarray, "N R"],
        row_layers: Int[np.ndarray, "N R"],
        col_ids: Int[np.ndarray, "N K"],
        layer: int,
    ) -> tuple[Float[np.ndarray, "N R K"], float]:
        """Return the cosines of each sample's rows with its columns, which are of `layer`, and their largest error.

        The cosine is 0 if a norm is 0. Rows and columns of id -1 hold some latent's values; nobody may read them.
        """
        is_single = all(rows.is_single for rows in self._window.values())
        n_samples, n_rows, n_cols = (*row_ids.shape, col_ids.shape[1])
        d_model = self._window[layer].vectors.shape[1]
        dtype = np.dtype(np.float32 if is_single else np.float64)
        tile = TILE if is_single and _prefers_tiles() else n_rows
        n_padded = -(-n_rows // tile) * tile
        step = max(1, VECTOR_BYTES // (dtype.itemsize * (n_padded + n_cols) * d_model))
        n_most = min(step, n_samples)
        before = self._buffer("before", (n_most, n_padded, d_model), dtype)
        after = self._buffer("after", (n_most, n_cols, d_model), dtype)
        cos = np.empty((n_samples, n_padded // tile, tile, n_cols), dtype)
        for part in blocks(n_samples, step):
            n = part.stop - part.start
            self._gather(before[:n, :n_rows], row_ids[part], row_layers[part], layer)
            _take(self._window[layer].vectors, col_ids[part], after[:n])
            tiles = before[:n].reshape(n, n_padded // tile, tile, d_model)
            np.matmul(tiles, after[:n, None].transpose(0, 1, 3, 2), out=cos[part])
        cos = cos.reshape(n_samples, n_padded, n_cols)[:, :n_rows]
        cos *= self._inverse_norms(row_ids, row_layers, layer)[:, :, None]
        cos *= self._window[layer].inverse_norms[col_ids][:, None, :]
        # |float32 sum - exact| <= D u sum |x y|, u = 2^-24, of the product and by half of each squared norm; scaling
        # and rows of float64 add a few u. Norms may be float32 where products are not.
        return cos, (2 * d_model + 16) * 2.0**-24

    def exact(
        self,
        row_ids: Int[np.ndarray, " pairs"],
        row_layers: Int[np.ndarray, " pairs"],
        col_ids: Int[np.ndarray, " pairs"],
        layer: int,
    ) -> Float[np.ndarray, " pairs"]:
        """Return the cosines of single pairs, summed in float64; 0 if a norm is 0."""
        products, d_model = np.empty((3, len(row_ids))), self._window[layer].vectors.shape[1]
        dtype = np.result_type(*(rows.vectors.dtype for rows in self._window.values()))
        left, right = (self._buffer(side, (DOT_ROWS, d_model), dtype) for side in ("left", "right"))
        for part in blocks(len(row_ids), DOT_ROWS):
            n = part.stop - part.start
            self._gather(left[:n], row_ids[part], row_layers[part], layer)
            _take(self._window[layer].vectors, col_ids[part], right[:n])
            for product, (one, other) in zip(products, ((left, right), (left, left), (right, right)), strict=True):
                np.einsum("pd,pd->p", one[:n], other[:n], dtype=np.float64, out=product[part])
        norms = np.sqrt(products[1]) * np.sqrt(products[2])
        return np.divide(products[0], norms, out=np.zeros(len(row_ids)), where=norms > 0)

    def exact_block(
        self,
        row_ids: Int[np.ndarray, " R"],
        row_layers: Int[np.ndarray, " R"],
        col_ids: Int[np.ndarray, " K"],
        layer: int,
    ) -> Float[np.ndarray, "R K"]:
        """Return the cosines of all pairs of some rows and columns, by a product in float64; 0 if a norm is 0."""
        d_model = self._window[layer].vectors.shape[1]
        left, right = np.empty((len(row_ids), d_model)), np.empty((len(col_ids), d_model))
        self._gather(left, row_ids, row_layers, layer)
        _take(self._window[layer].vectors, col_ids, right)
        for rows in (left, right):
            norms = np.sqrt(np.einsum("fd,fd->f", rows, rows))
            rows *= np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)[:, None]
        return left @ right.T

    def _gather(self, out: np.ndarray, ids: np.ndarray, layers: np.ndarray, now: int) -> None:
        """Write to `out` rows of the layers before `now` that are held."""
        earlier = [layer for layer in self._window if layer != now]
        if len(earlier) == 1:
            _take(self._window[earlier[0]].vectors, ids, out)
            return
        out[...] = 0  # where padding is of a layer that is not held
        for layer in earlier:
            is_here = layers == layer
            out[is_here] = self._window[layer].vectors[ids[is_here]]

    def _inverse_norms(
        self, ids: Int[np.ndarray, "N R"], layers: Int[np.ndarray, "N R"], now: int
    ) -> Float[np.ndarray, "N R"]:
        earlier = {layer: rows.inverse_norms for layer, rows in self._window.items() if layer != now}
        if len(earlier) == 1:
            return next(iter(earlier.values()))[ids]
        inverse = np.zeros(ids.shape)
        for layer, norms in earlier.items():
            is_here = layers == layer
            inverse[is_here] = norms[ids[is_here]]
        return inverse

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return memory that was used before where it is large enough: fresh pages would cost a third more."""
        size, buffer = int(np.prod(shape)), self._buffers.get(name)
        if buffer is None or buffer.size < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = np.zeros(size, dtype)
        return buffer[:size].reshape(shape)


def blocks(n: int, step: int) -> Iterator[slice]:
    """Cut 0 to n into slices of `step`."""
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


@functools.cache
def _prefers_tiles() -> bool:
    """Say whether products of `TILE` rows at a time are faster here than those of all rows of a sample.

    OpenBLAS has kernels for small products of rows with rows on processors with AVX-512, nearly twice as fast there as
    its general one, which is faster elsewhere. Either way the float32 sums are within the same bound.
    """
    rows, seconds = np.ones((48, 512), np.float32), []
    for tile in (48, TILE):
        tiles, out = rows.reshape(48 // tile, tile, 512), np.empty((48 // tile, tile, 48), np.float32)
        times = []
        for _ in range(9):
            began = time.perf_counter()
            np.matmul(tiles, rows.T, out=out)
            times.append(time.perf_counter() - began)
        seconds.append(min(times))
    return seconds[1] < seconds[0]


def _take(vectors: Float[np.ndarray, "F D"], ids: np.ndarray, out: np.ndarray) -> None:
    """Copy rows to `out`; for the id -1 of padding, the last one."""
    if vectors.dtype == out.dtype:
        vectors.take(ids, axis=0, out=out, mode="wrap")
    else:
        out[...] = vectors[ids]


def _measure(decoder: Float[np.ndarray, "F D"], used: Int[np.ndarray, " used"], layer: int) -> _Rows:
    """Return the rows with their norms: in float32 if all in use can be multiplied in float32."""
    low, high = SINGLE_NORMS
    with np.errstate(over="ignore", invalid="ignore"):
        norms = _norms(decoder, used, np.float32)
    is_doubtful = ~((norms[used] > low) & (norms[used] < high))
    if is_doubtful.any():
        doubtful = used[is_doubtful]
        exact = _norms(decoder, doubtful, np.float64)[doubtful]
        if not np.isfinite(exact).all():
            latent = doubtful[~np.isfinite(exact)][0]
            raise InputError(f"decoder of layer {layer}, latent {latent} is not finite; train or export the SAE again")
        norms[doubtful] = 0
        if exact.any():
            norms = _norms(decoder, used, np.float64)
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return _Rows(decoder, inverse, norms.dtype == np.float32)


def _norms(decoder: Float[np.ndarray, "F D"], used: Int[np.ndarray, " used"], dtype: type) -> np.ndarray:
    """Return the norms of the rows that are used, 0 elsewhere."""
    norms: np.ndarray = np.zeros(len(decoder), dtype)
    is_dense = 2 * len(used) > len(decoder)  # then a copy of the rows in use would cost more than the others do
    for part in blocks(len(decoder) if is_dense else len(used), DOT_ROWS):
        at = part if is_dense else used[part]
        rows: np.ndarray = decoder[at].astype(dtype, copy=False)
        norms[at] = np.sqrt(np.einsum("fd,fd->f", rows, rows))
    if is_dense:
        is_used = np.zeros(len(decoder), bool)
        is_used[used] = True
        norms[~is_used] = 0
    return norms
