"""Tracks: SAE features followed through the layers.

Samples are independent of each other, layers follow one another: the outer loop runs over layers, and each step is
done for blocks of samples. A step holds `max_missed_layers` + 2 decoders and a block of gathered decoder rows; beyond
those, memory is the input, the output and a few arrays [N, K].
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsae.artifacts import InputError
from jaxsae.tracking.associate import (
    TrackerConfig,
    assign_by_id,
    assign_greedy,
    assign_hungarian,
    decisive_cosines,
    pair_costs,
)
from jaxsae.tracking.links import Decoders

PAIR_BYTES = 8 * 2**20  # cost matrices of a block of samples; larger ones were not faster
VECTOR_BYTES = 2 * 2**20
DOT_ROWS = 128  # vectors gathered for float64 sums at a time: they stay in the cache
SINGLE_NORMS = (1e-12, 1e12)  # between these a product of two float32 vectors neither overflows nor vanishes
FEW_PAIRS = 0.06  # share of the pairs up to which single dot products are cheaper than a float64 matrix product


@dataclasses.dataclass(frozen=True)
class Tracks:
    """All tracks of N samples as flat arrays; a sample's tracks stand in the order of their creation.

    A track lives at layer l if birth <= l and (death < 0 or death >= l). Its activation there is its observation, and
    0 in a layer that it missed: between two observations, or after the last one while it is alive at the end.

    Attributes:
        sample_offsets: [N + 1]; sample n's tracks are `birth[sample_offsets[n]:sample_offsets[n + 1]]`, and so on.
        birth: layer of the first observation.
        death: layer of the last observation, or -1 for a track alive at the end.
        observation_offsets: [R + 1]; track r's observations are `layer[observation_offsets[r]:...[r + 1]]`.
        layer: layer of each observation, ascending within a track.
        feature_id: latent of each observation, in that layer's SAE.
        activation: its activation, divided by the sample's mean in that layer if the tracker normalised.
        n_layers: L.
    """

    sample_offsets: Int[np.ndarray, " N_and_1"]
    birth: Int[np.ndarray, " R"]
    death: Int[np.ndarray, " R"]
    observation_offsets: Int[np.ndarray, " R+1"]
    layer: Int[np.ndarray, " observations"]
    feature_id: Int[np.ndarray, " observations"]
    activation: Float[np.ndarray, " observations"]
    n_layers: int

    @property
    def n_samples(self) -> int:
        """N."""
        return len(self.sample_offsets) - 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every field as an array, for an .npz; `from_arrays` is the way back."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Tracks":
        """Build tracks from what `arrays` gave; other names in `arrays` are left alone.

        Raises:
            InputError: a name is missing, has another type or number of axes, or the arrays contradict each other.
        """
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in arrays:
                raise InputError(f"tracks lack the array {field.name}; run jaxsae track")
            fields[field.name] = _typed(field.name, np.asarray(arrays[field.name]))
        fields["n_layers"] = int(fields["n_layers"])
        _check_offsets("sample_offsets", fields["sample_offsets"], len(fields["birth"]), "tracks")
        _check_lengths(fields, "birth", ("death",), "tracks")
        _check_lengths(fields, "layer", ("feature_id", "activation"), "observations")
        _check_offsets("observation_offsets", fields["observation_offsets"], len(fields["layer"]), "observations")
        if len(fields["observation_offsets"]) != len(fields["birth"]) + 1:
            raise InputError(
                f"tracks hold {len(fields['birth'])} births but {len(fields['observation_offsets'])} "
                "observation_offsets, expected one more; run jaxsae track"
            )
        tracks = cls(**fields)
        _check_lives(tracks)
        return tracks


def track(
    feature_ids: Int[np.ndarray, "N L K"] | np.ndarray,
    activations: Float[np.ndarray, "N L K"] | np.ndarray,
    decoders: Decoders,
    config: TrackerConfig,
) -> Tracks:
    """Follow each sample's features through L layers; the tracks are those of arithmetic in float64.

    At layer 0 each feature above `birth_threshold` starts a track. At each later layer the living tracks are matched
    with the features as `config.association` says; a matched track takes the feature as its observation, whatever its
    activation; an unmatched one that has missed more than `max_missed_layers` layers ends at its last observation;
    then each unmatched feature above the threshold starts a track, in the order of the features.

    Args:
        feature_ids: latent of each slot; -1 marks an empty one.
        activations: descending, 0 in empty slots; a slot of activation 0 counts as empty whatever its id.
        decoders: row f of item l is the decoder vector of latent f of layer l. Each item is read once, in order. All
            widths D agree, because vectors of neighbouring layers are compared.
        config: the tracker's settings.

    Raises:
        InputError: shapes, ids, activations or decoders do not fit each other, or hold what cannot be; it names
            sample, layer and value.
    """
    feature_ids, activations = np.asarray(feature_ids), np.asarray(activations)
    _check_shapes(feature_ids, activations, decoders)
    for layer in range(feature_ids.shape[1]):
        _check_layer(feature_ids[:, layer].astype(np.int64), activations[:, layer], layer)

    n_samples, n_layers, _ = feature_ids.shape
    living = _Living.none(n_samples)
    log = _Log(n_samples)
    window: dict[int, _Decoder] = {}
    for layer in range(n_layers):
        window.pop(layer - config.max_missed_layers - 2, None)
        features = _Features.at(layer, feature_ids, activations, config)
        window[layer] = _read_decoder(decoders, features, window)
        features.inverse_norms = window[layer].inverse_norms[features.ids]
        assignment = _associate(living, features, window, config)
        living = _advance(living, features, assignment, log, config)
    return log.tracks(living, lambda layer: _Features.at(layer, feature_ids, activations, config))


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """One layer's decoder vectors, and 1 / norm of those that its features use: 0 where the norm is 0.

    `is_single`: products of its vectors in float32 have no more error than rounding makes.
    """

    vectors: Float[np.ndarray, "F D"]
    inverse_norms: Float[np.ndarray, " F"]
    is_single: bool


@dataclasses.dataclass
class _Features:
    """The features of one layer: N rows of K slots, the first `count` of them real."""

    layer: int
    count: Int[np.ndarray, " N"]
    ids: Int[np.ndarray, "N K"]
    activations: Float[np.ndarray, "N K"]
    inverse_norms: Float[np.ndarray, "N K"]

    @classmethod
    def at(cls, layer: int, feature_ids: np.ndarray, activations: np.ndarray, config: TrackerConfig) -> "_Features":
        acts = activations[:, layer].astype(np.float64)
        is_real = acts > 0
        if config.normalise_activations:
            count = is_real.sum(axis=1, keepdims=True)
            acts /= np.where(count > 0, acts.sum(axis=1, keepdims=True) / np.maximum(count, 1), 1.0)
        ids = np.where(is_real, feature_ids[:, layer].astype(np.int64), -1)
        return cls(layer, is_real.sum(axis=1), ids, acts, np.zeros_like(acts))


@dataclasses.dataclass
class _Living:
    """The living tracks of each sample in creation order: N rows, padded on the right, the first `count` real.

    `number` counts a sample's tracks from 0. The other fields are the last observation's.
    """

    count: Int[np.ndarray, " N"]
    number: Int[np.ndarray, "N S"]
    layer: Int[np.ndarray, "N S"]
    ids: Int[np.ndarray, "N S"]
    activations: Float[np.ndarray, "N S"]
    inverse_norms: Float[np.ndarray, "N S"]

    @classmethod
    def none(cls, n_samples: int) -> "_Living":
        empty, nothing = np.zeros((n_samples, 0), np.int64), np.zeros((n_samples, 0))
        return cls(np.zeros(n_samples, np.int64), empty, empty, empty, nothing, nothing)

    def columns(self) -> tuple[np.ndarray, ...]:
        return self.number, self.layer, self.ids, self.activations, self.inverse_norms

    def is_real(self) -> Bool[np.ndarray, "N S"]:
        return np.arange(self.number.shape[1]) < self.count[:, None]


class _Log:
    """Which track each feature belongs to, layer by layer; `tracks` sorts the features by track."""

    def __init__(self, n_samples: int):
        self.n_tracks = np.zeros(n_samples, np.int64)
        self.numbers: list[Int[np.ndarray, "N K"]] = []

    def observe(self, number: Int[np.ndarray, "N K"]) -> None:
        """Note each feature's track by its number in the sample, or -1."""
        self.numbers.append(number.astype(np.int32))

    def tracks(self, living: "_Living", features_at: Callable[[int], _Features]) -> Tracks:
        """Return the tracks; `living` are those alive at the end."""
        sample_offsets = np.concatenate([[0], np.cumsum(self.n_tracks)])
        n_tracks, n_layers = int(sample_offsets[-1]), len(self.numbers)
        lengths = np.zeros(n_tracks, np.int64)
        for number in self.numbers:
            lengths[_owners(number, sample_offsets)[1]] += 1  # a track takes at most one feature of a layer
        observation_offsets = np.concatenate([[0], np.cumsum(lengths)])
        n_observations = int(observation_offsets[-1])
        layers, ids = np.empty(n_observations, np.int64), np.empty(n_observations, np.int64)
        acts, free = np.empty(n_observations), observation_offsets[:-1].copy()
        for layer, number in enumerate(self.numbers):
            features, (at, owners) = features_at(layer), _owners(number, sample_offsets)
            places = free[owners]
            layers[places], ids[places], acts[places] = layer, features.ids[at], features.activations[at]
            free[owners] += 1
        death = layers[observation_offsets[1:] - 1]
        death[_owners(np.where(living.is_real(), living.number, -1), sample_offsets)[1]] = -1
        return Tracks(
            sample_offsets=sample_offsets,
            birth=layers[observation_offsets[:-1]],
            death=death,
            observation_offsets=observation_offsets,
            layer=layers,
            feature_id=ids,
            activation=acts,
            n_layers=n_layers,
        )


def _owners(
    number: Int[np.ndarray, "N X"], sample_offsets: Int[np.ndarray, " N_and_1"]
) -> tuple[tuple[np.ndarray, np.ndarray], Int[np.ndarray, " owned"]]:
    """Return where `number` names a track, and which of all samples' tracks that is."""
    at = np.nonzero(number >= 0)
    return (at[0], at[1]), sample_offsets[at[0]] + number[at]


def _associate(
    living: _Living, features: _Features, window: Mapping[int, _Decoder], config: TrackerConfig
) -> Int[np.ndarray, "N K"]:
    """Return for each feature the living track that goes on as it, or -1."""
    assignment = np.full(features.ids.shape, -1)
    width, n_slots = living.number.shape[1], features.ids.shape[1]
    if config.association == "none" or not width:
        return assignment
    for block in _blocks(len(assignment), _step(8 * width * n_slots, PAIR_BYTES)):
        rows, cols = slice(width), slice(int(features.count[block].max()))
        ids, acts = features.ids[block, cols], features.activations[block, cols]
        if config.association == "feature_id":
            assignment[block, cols] = assign_by_id(living.ids[block], ids, ids >= 0)
            continue
        cos = _cosines(living, features, block, window, decisive_cosines(config))
        n_rows, n_cols = living.count[block], features.count[block]
        row_acts = living.activations[block, rows]
        cost = pair_costs(cos, row_acts, acts, config=config)
        threshold = config.association_threshold
        if config.association == "greedy":
            chosen = assign_greedy(cost, row_acts, n_rows, n_cols, threshold=threshold)
        else:
            chosen = assign_hungarian(cost, n_rows, n_cols, threshold=threshold, gate=config.gate)
        assignment[block, cols] = chosen
    return assignment


def _cosines(
    living: _Living,
    features: _Features,
    block: slice,
    window: Mapping[int, _Decoder],
    decisive: tuple[float, float],
) -> Float[np.ndarray, "N R K"]:
    """Return the cosine of each (living track, feature) pair of a block, 0 if a norm is 0.

    They are products in float64, but for those of which a float32 product shows with certainty that more digits decide
    nothing: up to the lower of the `decisive` cosines, and above the higher one where neither track nor feature has
    another partner above the lower one. Padded rows and columns hold some latent's values; nobody reads them.
    """
    width, n_slots = living.number.shape[1], int(features.count[block].max())
    vectors = window[features.layer].vectors
    d_model = vectors.shape[1]
    is_single = decisive[0] > -np.inf and all(decoder.is_single for decoder in window.values())
    cos = np.empty((block.stop - block.start, width, n_slots))
    step = _step((4 if is_single else 12) * (width + n_slots) * d_model, VECTOR_BYTES)
    n_most = min(step, len(cos))
    # Fresh pages would cost a third more.
    dtype = np.result_type(*(decoder.vectors.dtype for decoder in window.values()))
    # Zeros, as `_gather` leaves rows of padding whose layer is none of the window's.
    before, after = np.zeros((n_most, width, d_model), dtype), np.empty((n_most, n_slots, d_model), dtype)
    doubles: tuple[np.ndarray, np.ndarray] | None = None
    # |float32 product - exact| <= D u sum |x y| with u = 2^-24; twice that also covers the scaling.
    error = 2 * d_model * 2.0**-24
    low, high = decisive[0] - error, decisive[1] + error
    for part in _blocks(len(cos), step):
        whole, n = slice(block.start + part.start, block.start + part.stop), part.stop - part.start
        ids = features.ids[whole, :n_slots]
        _take(vectors, ids, after[:n])
        _gather(before[:n], living.ids[whole], living.layer[whole], features.layer, window)
        scale = living.inverse_norms[whole, :, None], features.inverse_norms[whole, None, :n_slots]
        if is_single:
            cos[part] = np.matmul(before[:n], after[:n].transpose(0, 2, 1))
            cos[part] *= scale[0]
            cos[part] *= scale[1]
            pairs = _undecided(cos[part], low, high)
            if len(pairs[0]) <= FEW_PAIRS * cos[part].size:
                _make_exact(cos[part], pairs, before, after, scale)
                continue
        doubles = doubles or (np.empty(before.shape), np.empty(after.shape))
        doubles[0][:n], doubles[1][:n] = before[:n], after[:n]
        np.matmul(doubles[0][:n], doubles[1][:n].transpose(0, 2, 1), out=cos[part])
        cos[part] *= scale[0]
        cos[part] *= scale[1]
    return cos


def _undecided(cos: Float[np.ndarray, "N R K"], low: float, high: float) -> tuple[np.ndarray, ...]:
    """Return the places of the pairs above `low`, but for those above `high` that are alone in row and column."""
    sample, row, col = np.nonzero(cos > low)
    n_samples, n_rows, n_cols = cos.shape
    of_row, of_col = sample * n_rows + row, sample * n_cols + col
    is_alone = np.bincount(of_row, minlength=n_samples * n_rows)[of_row] == 1
    is_alone &= np.bincount(of_col, minlength=n_samples * n_cols)[of_col] == 1
    is_open = ~(is_alone & (cos[sample, row, col] > high))
    return sample[is_open], row[is_open], col[is_open]


def _make_exact(
    cos: Float[np.ndarray, "N R K"],
    pairs: tuple[np.ndarray, ...],
    before: np.ndarray,
    after: np.ndarray,
    scale: tuple[np.ndarray, np.ndarray],
) -> None:
    """Write the float64 cosines of some pairs."""
    sample, row, col = pairs
    rows, cols = (sample * each.shape[1] + at for each, at in ((before, row), (after, col)))
    before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
    products, gathered = np.empty(len(rows)), np.empty((2, DOT_ROWS, before.shape[-1]), before.dtype)
    for part in _blocks(len(rows), DOT_ROWS):
        left, right = gathered[:, : part.stop - part.start]
        np.take(before, rows[part], axis=0, out=left, mode="clip")
        np.take(after, cols[part], axis=0, out=right, mode="clip")
        np.einsum("pd,pd->p", left, right, dtype=np.float64, out=products[part])
    cos[pairs] = products * scale[0][sample, row, 0] * scale[1][sample, 0, col]


def _gather(
    out: Float[np.ndarray, "N R D"],
    ids: Int[np.ndarray, "N R"],
    layers: Int[np.ndarray, "N R"],
    now: int,
    window: Mapping[int, _Decoder],
) -> None:
    """Write to `out` each track's last decoder vector; `window` holds the layers they can be from, and this one."""
    if len(window) == 2:
        _take(window[now - 1].vectors, ids, out)
        return
    for layer in window:
        is_here = layers == layer
        out[is_here] = window[layer].vectors[ids[is_here]]


def _take(vectors: Float[np.ndarray, "F D"], ids: Int[np.ndarray, "N X"], out: Float[np.ndarray, "N X D"]) -> None:
    """Copy rows to `out`; for the id -1 of padding, the last one."""
    if vectors.dtype == out.dtype:
        np.take(vectors, ids, axis=0, out=out, mode="wrap")
    else:
        out[...] = vectors[ids]


def _advance(
    living: _Living,
    features: _Features,
    assignment: Int[np.ndarray, "N K"],
    log: _Log,
    config: TrackerConfig,
) -> _Living:
    """Return the living tracks after one layer; births, deaths and observations go to `log`."""
    samples, cols = np.nonzero(assignment >= 0)
    rows = assignment[samples, cols]
    is_born = (assignment < 0) & (features.activations > config.birth_threshold)
    number = np.where(is_born, log.n_tracks[:, None] + np.cumsum(is_born, axis=1) - 1, -1)
    number[samples, cols] = living.number[samples, rows]
    log.observe(number)
    log.n_tracks += is_born.sum(axis=1)

    here = np.full(features.ids.shape, features.layer)
    current = (number, here, features.ids, features.activations, features.inverse_norms)
    columns = [column.copy() for column in living.columns()]
    for column, values in zip(columns, current, strict=True):
        column[samples, rows] = values[samples, cols]
    last = columns[1]
    is_dead = living.is_real() & (features.layer - last > config.max_missed_layers)
    keep = np.concatenate([living.is_real() & ~is_dead, is_born], axis=1)
    return _packed(keep, [np.concatenate(pair, axis=1) for pair in zip(columns, current, strict=True)])


def _packed(keep: Bool[np.ndarray, "N S"], columns: list[np.ndarray]) -> _Living:
    """Move what is kept to the left of each sample's row, in order, and cut the rows to the longest."""
    count = keep.sum(axis=1)
    order = np.argsort(~keep, axis=1, kind="stable")[:, : int(count.max(initial=0))]
    packed = _Living(count, *(np.take_along_axis(column, order, axis=1) for column in columns))
    packed.ids[~packed.is_real()] = -1  # what `assign_by_id` takes for an empty row
    return packed


def _step(sample_bytes: int, budget: int) -> int:
    return max(1, budget // max(1, sample_bytes))


def _blocks(n_samples: int, step: int) -> Iterator[slice]:
    for start in range(0, n_samples, step):
        yield slice(start, min(start + step, n_samples))


def _check_shapes(feature_ids: np.ndarray, activations: np.ndarray, decoders: Decoders) -> None:
    if feature_ids.ndim != 3 or feature_ids.dtype.kind not in "iu":
        raise InputError(
            f"feature_ids are {feature_ids.dtype} of shape {feature_ids.shape}, expected integers "
            "[samples, layers, slots]"
        )
    if activations.shape != feature_ids.shape or activations.dtype.kind != "f":
        raise InputError(
            f"activations are {activations.dtype} of shape {activations.shape}, expected floats of the shape of "
            f"feature_ids, {feature_ids.shape}"
        )
    n_layers = feature_ids.shape[1]
    if n_layers == 0:
        raise InputError(f"feature_ids of shape {feature_ids.shape} have no layer; extract at least one")
    if len(decoders) != n_layers:
        raise InputError(f"{len(decoders)} decoders for {n_layers} layers of features; give one decoder per layer")


def _check_layer(ids: Int[np.ndarray, "N K"], acts: Float[np.ndarray, "N K"], layer: int) -> None:
    _check_none(~np.isfinite(acts), acts, layer, "activation", "finite numbers")
    _check_none(acts < 0, acts, layer, "activation", "none below 0")
    _check_none(acts[:, 1:] > acts[:, :-1], acts[:, 1:], layer, "activation", "descending slots; sort each row")
    _check_none(ids < -1, ids, layer, "feature id", "a latent, or -1 for an empty slot")
    _check_none((ids < 0) & (acts > 0), acts, layer, "activation", "0 in slots of feature id -1")
    ordered = np.sort(ids, axis=1)
    is_repeat = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _check_none(is_repeat, ordered[:, 1:], layer, "feature id", "each latent once, it is repeated")


def _check_none(is_bad: Bool[np.ndarray, "N K"], values: np.ndarray, layer: int, noun: str, expected: str) -> None:
    if is_bad.any():
        sample, slot = np.argwhere(is_bad)[0]
        raise InputError(f"{noun} {values[sample, slot]} in sample {sample}, layer {layer}: expected {expected}")


def _read_decoder(decoders: Decoders, features: _Features, window: Mapping[int, _Decoder]) -> _Decoder:
    layer, decoder = features.layer, np.asarray(decoders[features.layer])
    if decoder.ndim != 2:
        raise InputError(f"decoder of layer {layer} has shape {decoder.shape}, expected [latents, width]")
    for other, known in window.items():
        if known.vectors.shape[1] != decoder.shape[1]:
            raise InputError(
                f"decoder of layer {layer} is {decoder.shape[1]} wide, that of layer {other} "
                f"{known.vectors.shape[1]}; "
                "give decoders of one model"
            )
    largest = features.ids.max(initial=-1)
    if largest >= len(decoder):
        sample = int(np.argmax(features.ids.max(axis=1) == largest))
        raise InputError(
            f"feature id {largest} in sample {sample}, layer {layer}: the decoder has {len(decoder)} latents, "
            "expected ids below that; use the SAEs that made the features"
        )
    if decoder.dtype not in (np.float32, np.float64):
        decoder = decoder.astype(np.float64)
    norms = _norms(decoder, features)
    positive = norms[norms > 0]
    low, high = SINGLE_NORMS
    is_single = decoder.dtype == np.float32 and low < positive.min(initial=1.0) <= positive.max(initial=1.0) < high
    return _Decoder(decoder, np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0), bool(is_single))


def _norms(decoder: Float[np.ndarray, "F D"], features: _Features) -> Float[np.ndarray, " F"]:
    """Return the norms of the vectors that the layer's features use, 0 elsewhere."""
    norms, is_used = np.zeros(len(decoder)), np.zeros(len(decoder), bool)
    is_used[features.ids[features.ids >= 0]] = True
    used = np.flatnonzero(is_used)
    for part in _blocks(len(used), DOT_ROWS):
        vectors = decoder[used[part]]
        norms[used[part]] = np.sqrt(np.einsum("fd,fd->f", vectors, vectors, dtype=np.float64))
    bad = used[~np.isfinite(norms[used])]
    if bad.size:
        raise InputError(
            f"decoder of layer {features.layer}, latent {bad[0]} is not finite; train or export the SAE again"
        )
    return norms


def _typed(name: str, array: np.ndarray) -> np.ndarray:
    kind, n_axes = ("f" if name == "activation" else "iu"), (0 if name == "n_layers" else 1)
    if array.dtype.kind not in kind or array.ndim != n_axes:
        raise InputError(
            f"tracks: {name} is {array.dtype} of shape {array.shape}, expected "
            f"{'floats' if kind == 'f' else 'integers'} with {n_axes} axes; run jaxsae track"
        )
    return array.astype(np.float64 if kind == "f" else np.int64)


def _check_lengths(fields: Mapping[str, Any], first: str, others: tuple[str, ...], noun: str) -> None:
    for name in others:
        if len(fields[name]) != len(fields[first]):
            raise InputError(
                f"tracks: {name} holds {len(fields[name])} {noun}, {first} {len(fields[first])}; run jaxsae track"
            )


def _check_offsets(name: str, offsets: np.ndarray, end: int, noun: str) -> None:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
        raise InputError(f"tracks: {name} does not rise from 0 to the {end} {noun}; run jaxsae track")


def _check_lives(tracks: Tracks) -> None:
    starts, stops = tracks.observation_offsets[:-1], tracks.observation_offsets[1:]
    owner = np.repeat(np.arange(len(starts)), stops - starts)
    _check_tracks(stops == starts, "has no observation")  # first: the next two look at the observations
    _check_tracks(tracks.layer[starts] != tracks.birth, "is not born at its first observation")
    _check_tracks((tracks.death >= 0) & (tracks.layer[stops - 1] != tracks.death), "does not end at its last one")
    rises = (np.diff(tracks.layer) > 0) | (np.diff(owner) > 0)
    for is_bad, what in (
        ((tracks.layer < 0) | (tracks.layer >= tracks.n_layers), f"has a layer outside 0 to {tracks.n_layers - 1}"),
        (np.concatenate([[False], ~rises])[: len(owner)], "is not ascending in its layers"),
        (tracks.feature_id < 0, "has a negative feature id"),
        (~((tracks.activation >= 0) & np.isfinite(tracks.activation)), "has a negative or non-finite activation"),
    ):
        _check_tracks(np.bincount(owner[is_bad], minlength=len(starts)) > 0, what)


def _check_tracks(is_bad: Bool[np.ndarray, " R"], what: str) -> None:
    if is_bad.any():
        raise InputError(f"tracks: track {int(np.argmax(is_bad))} {what}; run jaxsae track")
