"""Tracks: SAE features followed through the layers.

Samples are independent of each other, layers follow one another: `TOGETHER` samples at a time go through the layers,
and each step is done for smaller blocks of them. A step holds `max_missed_layers` + 2 decoders, gathered decoder rows
of a few samples and the cosines of a block. Beyond input and output, memory does not grow with the samples.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsae.artifacts import InputError
from jaxsae.tracking.associate import TrackerConfig, assign_by_id
from jaxsae.tracking.cosines import Cosines, blocks
from jaxsae.tracking.links import NULLS, Decoders, LinkGraph, check_null, random_null
from jaxsae.tracking.pairs import Side, match_by_cosine, match_by_links

TOGETHER = 2048  # samples that share a reading of the decoders; they take some 100 MB with 24 layers of 50 latents
PAIR_BYTES = 2 * 2**20  # arrays of all pairs of a block of samples; larger ones were not faster
MOST_NULL = 0.99  # above it, (c - q) / (1 - q) would be rounding alone


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

    def part(self, samples: slice) -> "Tracks":
        """Return samples that follow one another; all but the offsets are views."""
        sample_offsets = self.sample_offsets[samples.start : samples.stop + 1]
        tracks = slice(int(sample_offsets[0]), int(sample_offsets[-1]))
        observation_offsets = self.observation_offsets[tracks.start : tracks.stop + 1]
        observations = slice(int(observation_offsets[0]), int(observation_offsets[-1]))
        return Tracks(
            sample_offsets=sample_offsets - tracks.start,
            birth=self.birth[tracks],
            death=self.death[tracks],
            observation_offsets=observation_offsets - observations.start,
            layer=self.layer[observations],
            feature_id=self.feature_id[observations],
            activation=self.activation[observations],
            n_layers=self.n_layers,
        )

    @classmethod
    def concatenate(cls, parts: Iterable["Tracks"]) -> "Tracks":
        """Return the samples of several, at least one, one after the other.

        They are taken one by one, and no array is there twice: beyond the outcome one of them is in memory.
        """
        whole = {
            field.name: np.zeros(
                1 if field.name.endswith("offsets") else 0, np.float64 if field.name == "activation" else np.int64
            )
            for field in dataclasses.fields(cls)
            if field.name != "n_layers"
        }
        n_layers = 0
        for part in parts:
            n_layers = part.n_layers
            for name, array in whole.items():
                more = getattr(part, name)
                _append(array, more[1:] + array[-1] if name.endswith("offsets") else more)
        return cls(n_layers=n_layers, **whole)

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
    *,
    links: LinkGraph | None = None,
) -> Tracks:
    """Follow each sample's features through L layers; the tracks are those of arithmetic in float64.

    At layer 0 each feature above `birth_threshold` starts a track. At each later layer the living tracks are matched
    with the features as `config.association` says; a matched track takes the feature as its observation, whatever its
    activation; an unmatched one that has missed more than `max_missed_layers` layers ends at its last observation;
    then each unmatched feature above the threshold starts a track, in the order of the features.

    Args:
        feature_ids: latent of each slot; -1 marks an empty one.
        activations: descending, 0 in empty slots; a slot of activation 0 counts as empty whatever its id.
        decoders: row f of item l is the decoder vector of latent f of layer l. Each item is read once for `TOGETHER`
            samples, in order, none with association "links". All widths D agree, because vectors of neighbouring
            layers are compared.
        config: the tracker's settings.
        links: the graph that association "links" looks up, and where the nulls are read. Without it the null of random
            pairs is measured here, on the same pairs. Its layers are those of the features, or more.

    Raises:
        InputError: shapes, ids, activations, decoders or links do not fit each other, or hold what cannot be; it names
            sample, layer and value.
    """
    feature_ids, activations = np.asarray(feature_ids), np.asarray(activations)
    _check_shapes(feature_ids, activations, decoders)
    together = blocks(max(1, len(feature_ids)), TOGETHER)
    return Tracks.concatenate(
        _track_together(feature_ids[rows], activations[rows], rows.start, decoders, config, links) for rows in together
    )


def _track_together(
    feature_ids: Int[np.ndarray, "N L K"] | np.ndarray,
    activations: Float[np.ndarray, "N L K"] | np.ndarray,
    first: int,
    decoders: Decoders,
    config: TrackerConfig,
    links: LinkGraph | None,
) -> Tracks:
    """Return the tracks of samples that go through the layers together; `first` is the first one's number."""
    n_samples, n_layers, _ = feature_ids.shape
    for layer in range(n_layers):
        _check_layer(feature_ids[:, layer].astype(np.int64), activations[:, layer], layer, first)

    look: _ByCosine | _ByLinks
    if config.association == "links":
        look = _ByLinks(links, config, n_layers, first)
    else:
        look = _ByCosine(decoders, links, config, n_layers, first)
    living = _Living.none(n_samples)
    log = _Log(n_samples)
    for layer in range(n_layers):
        features = _Features.at(layer, feature_ids, activations, config)
        look.enter(features)
        assignment = _associate(living, features, look, config)
        living = _advance(living, features, assignment, log, config)
        look.leave(living, layer)
    return log.tracks(living, lambda layer: _Features.at(layer, feature_ids, activations, config))


class _ByCosine:
    """Associates by the decoders, of which it reads one more in each layer."""

    def __init__(
        self, decoders: Decoders, links: LinkGraph | None, config: TrackerConfig, n_layers: int, first: int
    ) -> None:
        self._decoders, self._links, self._config, self._first = decoders, links, config, first
        self._spans = config.max_missed_layers + 1
        if config.null != "none" and (links is not None or config.null != "random_pairs"):
            check_null(links, config.null, n_layers=n_layers, spans=self._spans)
        self._cosines = Cosines()
        self._layer = 0
        self._null: Float[np.ndarray, " spans"] | None = None

    def enter(self, features: "_Features") -> None:
        self._layer = layer = features.layer
        self._cosines.forget(layer - self._spans - 1)
        self._cosines.add(layer, np.asarray(self._decoders[layer]), features.ids, self._first)
        if self._config.null != "none" and layer > 0:
            spans = range(1, min(self._spans, layer) + 1)
            self._null = np.array([self._measured(layer - span, span) for span in spans])
            _check_calibration(self._null, layer)

    def leave(self, living: "_Living", layer: int) -> None:
        """Do nothing: a track is compared by what was last observed of it."""

    def sample_bytes(self, n_rows: int, n_slots: int) -> int:
        return 8 * n_rows * n_slots

    def match(self, tracks: Side, features: Side) -> Int[np.ndarray, "N K"]:
        return match_by_cosine(tracks, features, self._layer, self._cosines, self._config, self._null)

    def _measured(self, start: int, span: int) -> float:
        """Return the null cosine between layer `start` and the one `span` further on."""
        if self._links is not None:
            return float(self._links.null_cosines[NULLS.index(self._config.null), span - 1, start])
        before, after = self._cosines.vectors(start), self._cosines.vectors(start + span)
        return random_null(before, after, layer=start, span=span)


class _ByLinks:
    """Associates by looking up a link graph."""

    def __init__(self, links: LinkGraph | None, config: TrackerConfig, n_layers: int, first: int) -> None:
        if links is None:
            raise InputError("tracking.association=links needs a link graph, none was given; pass links=")
        if links.n_layers < n_layers:
            raise InputError(
                f"links are of {links.n_layers} layers, the features of {n_layers}; make them of the same SAEs"
            )
        if config.null != "none":
            check_null(links, config.null, n_layers=n_layers, spans=1)
        self._links, self._config, self._first = links, config, first
        self._layer = 0

    def enter(self, features: "_Features") -> None:
        self._layer = layer = features.layer
        largest = features.ids.max(initial=-1)
        if largest >= self._links.n_latents:
            sample = self._first + int(np.argmax(features.ids.max(axis=1) == largest))
            raise InputError(
                f"feature id {largest} in sample {sample}, layer {layer}: the links are of {self._links.n_latents} "
                "latents, expected ids below that; make them of the SAEs that made the features"
            )
        if layer == 0:
            return
        self._strengths = self._links.strengths(layer - 1)
        if self._config.null != "none":
            null = self._links.null_strengths[NULLS.index(self._config.null), layer - 1]
            _check_calibration(np.array([null]), layer)
            self._strengths = (self._strengths - null) / (1 - null)

    def leave(self, living: "_Living", layer: int) -> None:
        """Move the tracks that missed the layer to the strongest neighbour of where they were; -1 if there is none."""
        missed = living.is_real() & (living.layer < layer) & (living.ids >= 0)
        living.ids[missed] = self._links.ids[layer - 1, living.ids[missed], 0]

    def sample_bytes(self, n_rows: int, n_slots: int) -> int:
        return 12 * n_rows * self._links.ids.shape[2] + 2 * self._links.n_latents

    def match(self, tracks: Side, features: Side) -> Int[np.ndarray, "N K"]:
        return match_by_links(tracks, features, self._links.ids[self._layer - 1], self._strengths, self._config)


def _check_calibration(null: Float[np.ndarray, " spans"], layer: int) -> None:
    if not (null < MOST_NULL).all():
        raise InputError(
            f"unrelated latents of layer {layer} and those before have cosines or strengths up to {null.max():.3f}, "
            f"expected less than {MOST_NULL}: nothing can be told from that; set tracking.null=none"
        )


@dataclasses.dataclass
class _Features:
    """The features of one layer: N rows of K slots, the first `count` of them real."""

    layer: int
    count: Int[np.ndarray, " N"]
    ids: Int[np.ndarray, "N K"]
    activations: Float[np.ndarray, "N K"]

    @classmethod
    def at(cls, layer: int, feature_ids: np.ndarray, activations: np.ndarray, config: TrackerConfig) -> "_Features":
        acts = activations[:, layer].astype(np.float64)
        is_real = acts > 0
        if config.normalise_activations:
            count = is_real.sum(axis=1, keepdims=True)
            acts /= np.where(count > 0, acts.sum(axis=1, keepdims=True) / np.maximum(count, 1), 1.0)
        ids = np.where(is_real, feature_ids[:, layer].astype(np.int64), -1)
        return cls(layer, is_real.sum(axis=1), ids, acts)


@dataclasses.dataclass
class _Living:
    """The living tracks of each sample in creation order: N rows, padded on the right, the first `count` real.

    `number` counts a sample's tracks from 0. The other fields are the last observation's, but `ids` in layers that a
    track missed if it moves along links.
    """

    count: Int[np.ndarray, " N"]
    number: Int[np.ndarray, "N S"]
    layer: Int[np.ndarray, "N S"]
    ids: Int[np.ndarray, "N S"]
    activations: Float[np.ndarray, "N S"]

    @classmethod
    def none(cls, n_samples: int) -> "_Living":
        empty, nothing = np.zeros((n_samples, 0), np.int64), np.zeros((n_samples, 0))
        return cls(np.zeros(n_samples, np.int64), empty, empty, empty, nothing)

    def columns(self) -> tuple[np.ndarray, ...]:
        return self.number, self.layer, self.ids, self.activations

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
    living: _Living, features: _Features, look: "_ByCosine | _ByLinks", config: TrackerConfig
) -> Int[np.ndarray, "N K"]:
    """Return for each feature the living track that goes on as it, or -1."""
    assignment = np.full(features.ids.shape, -1)
    width, n_slots = living.number.shape[1], features.ids.shape[1]
    if config.association == "none" or not width:
        return assignment
    sample_bytes = look.sample_bytes(width, n_slots)
    for block in blocks(len(assignment), max(1, PAIR_BYTES // max(1, sample_bytes))):
        cols = slice(int(features.count[block].max()))
        ids = features.ids[block, cols]
        if config.association == "feature_id":
            assignment[block, cols] = assign_by_id(living.ids[block], ids, ids >= 0)
            continue
        tracks = Side(living.count[block], living.ids[block], living.layer[block], living.activations[block])
        here = np.full(ids.shape, features.layer)
        chosen = look.match(tracks, Side(features.count[block], ids, here, features.activations[block, cols]))
        assignment[block, cols] = chosen
    return assignment


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
    current = (number, here, features.ids, features.activations)
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


def _check_layer(ids: Int[np.ndarray, "N K"], acts: Float[np.ndarray, "N K"], layer: int, first: int) -> None:
    def check(is_bad: Bool[np.ndarray, "N _"], values: np.ndarray, noun: str, expected: str) -> None:
        if is_bad.any():
            sample, slot = np.argwhere(is_bad)[0]
            value = values[sample, slot]
            raise InputError(f"{noun} {value} in sample {first + sample}, layer {layer}: expected {expected}")

    check(~np.isfinite(acts), acts, "activation", "finite numbers")
    check(acts < 0, acts, "activation", "none below 0")
    check(acts[:, 1:] > acts[:, :-1], acts[:, 1:], "activation", "descending slots; sort each row")
    check(ids < -1, ids, "feature id", "a latent, or -1 for an empty slot")
    check((ids < 0) & (acts > 0), acts, "activation", "0 in slots of feature id -1")
    ordered = np.sort(ids, axis=1)
    is_repeat = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    check(is_repeat, ordered[:, 1:], "feature id", "each latent once, it is repeated")


def _append(array: np.ndarray, more: np.ndarray) -> None:
    """Lengthen an array that nothing else looks at, where it is if there is room, by another's items."""
    n = len(array)
    array.resize(n + len(more), refcheck=False)
    array[n:] = more


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
