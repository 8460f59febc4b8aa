"""Rows for the detectors: one per (question, answer), with everything that any of them may look at, aligned by id."""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import CountVectorizer

from jaxsae.artifacts import Answer, Features, InputError

UNKNOWN_LABEL = -1  # a row that is scored, never learned from
LOGPROB_COLUMNS = ("mean", "min", "sum", "first")
ENTROPY_COLUMNS = ("mean", "max")
TRACK_CONTROLS = ("none", "shuffled", "random_decoders", "neurons")
TRACK_FAMILIES = ("prompt", "profiles", "concepts", "late_births")  # beside the metrics
LENGTH_COLUMNS = ("tokens", "characters")
MAX_POSITION = "max"  # the largest activation over all kept positions


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of track features: a row an answer; where there are thousands of columns, sparse and without names."""

    matrix: Float[np.ndarray, "N X"] | sp.csr_matrix
    columns: tuple[str, ...] = ()

    def __getitem__(self, rows: Any) -> "Family":
        """Return some of the rows."""
        return dataclasses.replace(self, matrix=self.matrix[rows])


@dataclasses.dataclass(frozen=True)
class Tables:
    """What N answers offer to a detector, row by row.

    Attributes:
        groups: the fact behind each row; no split may divide one.
        labels: 1 hallucinated, 0 right, -1 unknown.
        lengths: generated tokens and characters of the answer.
        logprobs: mean, smallest, sum and first of the answer tokens' log-probabilities, nats; all 0 where nothing was
            generated (the sum over no token).
        entropies: mean and largest entropy of the distributions the answer's tokens were chosen from, nats; 0 where
            nothing was generated.
        resid: the residual stream at `jaxsae.artifacts.RESID_POSITIONS`.
        feature_ids: latents kept at each of `positions`, -1 for an empty slot.
        n_latents: columns of the sparse latent matrices; ids from there on are left out.
        n_empty: rows whose answer has no token.
        track_controls: the track metrics of tracks that should know less, by name, as far as they were made: "none"
            (nothing goes on from layer to layer), "shuffled" (links drawn anew among those of one answer and layer),
            "random_decoders" (followed by the cosines of random directions), "neurons" (coordinates of the residual
            stream in place of latents).
        track_families: further features of tracks, by name among `TRACK_FAMILIES`, as far as they were made: "prompt"
            (the metrics of tracks at the last token of the prompt), "profiles" (match costs, births, deaths and what is
            left unexplained, by layer; SAE errors), "concepts" (bags of the chains of latents that tracks carry, are
            born in and end in), "late_births" (what is born late and points at the emitted token or its best rival).
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    labels: Int[np.ndarray, " N"]
    categories: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    lengths: Float[np.ndarray, "N 2"]
    logprobs: Float[np.ndarray, "N 4"]
    entropies: Float[np.ndarray, "N 2"]
    resid: Float[np.ndarray, "N L 3 D"]
    positions: tuple[str, ...]
    feature_ids: Int[np.ndarray, "N L P K"]
    activations: Float[np.ndarray, "N L P K"]
    track_metrics: Float[np.ndarray, "N Q"]
    track_columns: tuple[str, ...]
    n_latents: int
    n_empty: int
    track_controls: Mapping[str, Float[np.ndarray, "N Q"]] = dataclasses.field(default_factory=dict)
    track_families: Mapping[str, Family] = dataclasses.field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Count the layers L."""
        return self.resid.shape[1]

    @functools.cached_property
    def group_index(self) -> Int[np.ndarray, " N"]:
        """Number the groups from 0 in sorted order and return each row's."""
        return np.unique(np.array(self.groups, dtype=object), return_inverse=True)[1]

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """Join each row's normalised question and answer: equal texts are equal to any text-only detector."""
        return tuple(
            f"{normalise_text(question)}\n{normalise_text(answer)}"
            for question, answer in zip(self.questions, self.answers, strict=True)
        )

    @functools.cached_property
    def question_counts(self) -> sp.csr_matrix:
        """Count words and pairs of words in each question."""
        return count_words([normalise_text(text) for text in self.questions])

    @functools.cached_property
    def answer_counts(self) -> sp.csr_matrix:
        """Count words and pairs of words in each answer."""
        return count_words([normalise_text(text) for text in self.answers])

    def latents(self, layer: int, position: str) -> sp.csr_matrix:
        """Return the kept activations of one layer as [N, n_latents], at one position or at the largest of all ("max").

        Raises:
            InputError: the position was not kept.
        """
        if position != MAX_POSITION and position not in self.positions:
            raise InputError(
                f"features.npz keeps positions {', '.join(self.positions)}, detection.sae_position asks for {position}"
                f"; use one of them or {MAX_POSITION}, or add it to features.positions and run jaxsae track"
            )
        picked = range(len(self.positions)) if position == MAX_POSITION else [self.positions.index(position)]
        matrices = [self._latents_at(layer, index) for index in picked]
        return functools.reduce(lambda one, other: one.maximum(other), matrices)

    def _latents_at(self, layer: int, index: int) -> sp.csr_matrix:
        ids = self.feature_ids[:, layer, index]
        kept = (ids >= 0) & (ids < self.n_latents)
        values = self.activations[:, layer, index][kept].astype(np.float64)
        return sp.csr_matrix((values, (np.nonzero(kept)[0], ids[kept])), shape=(len(ids), self.n_latents))


def build_tables(
    features: Features,
    answers: Sequence[Answer],
    track_metrics: Float[np.ndarray, "N Q"],
    track_columns: Sequence[str],
    *,
    track_controls: Mapping[str, np.ndarray] | None = None,
    track_families: Mapping[str, Family] | None = None,
) -> Tables:
    """Align answers to the features' rows by id and compute lengths and log-probability summaries.

    Args:
        features: the content of features.npz.
        answers: the content of answers.jsonl, in any order; a label of -1 is allowed for rows to be scored only.
        track_metrics: one row per id of `features`, in that order.
        track_columns: the names of its columns.
        track_controls: the same table of other tracks, by name among `TRACK_CONTROLS`.
        track_families: further features of tracks, by name among `TRACK_FAMILIES`.

    Raises:
        InputError: an id is missing, unexpected or repeated, a label is none of -1, 0, 1, the metric table does not
            fit, or a value is not finite; the first such row is named.
    """
    by_id = _match_ids(features.ids, answers)
    rows = [by_id[name] for name in features.ids]
    controls = dict(track_controls or {})
    for metrics in (track_metrics, *controls.values()):
        _check_metrics(metrics, track_columns, len(rows))
    for name, family in (track_families or {}).items():
        _check_family(name, family, len(rows))
    for row in rows:
        if row.label not in (UNKNOWN_LABEL, 0, 1):
            raise InputError(f"answer {row.id!r} has label {row.label}, expected 1 (hallucinated) or 0 (right)")
    n_tokens = np.diff(features.offsets)
    for row, count in zip(rows, n_tokens.tolist(), strict=True):
        if len(row.entropies) != count:
            raise InputError(
                f"answer {row.id!r} has {len(row.entropies)} entropies, features.npz {count} tokens of it; "
                "run jaxsae track"
            )
    tables = Tables(
        ids=tuple(features.ids),
        groups=tuple(row.group for row in rows),
        labels=np.array([row.label for row in rows], dtype=np.int64),
        categories=tuple(row.category for row in rows),
        questions=tuple(row.question for row in rows),
        answers=tuple(row.answer for row in rows),
        lengths=np.stack([n_tokens, [len(row.answer) for row in rows]], axis=1).astype(np.float64),
        logprobs=_summarise_logprobs(features.logprobs, features.offsets),
        entropies=np.array([_summarise_entropies(row.entropies) for row in rows]),
        resid=features.resid,
        positions=tuple(features.positions),
        feature_ids=features.feature_ids,
        activations=features.activations,
        track_metrics=np.asarray(track_metrics, dtype=np.float64),
        track_columns=tuple(track_columns),
        n_latents=int(features.feature_ids.max(initial=0)) + 1,
        n_empty=int(np.sum(n_tokens == 0)),
        track_controls={name: np.asarray(metrics, dtype=np.float64) for name, metrics in controls.items()},
        track_families=dict(track_families or {}),
    )
    _check_finite(tables)
    return tables


def normalise_text(text: str) -> str:
    """Return the words of a text in NFKC and lower case, one space between them, punctuation gone."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _match_ids(ids: Sequence[str], answers: Sequence[Answer]) -> dict[str, Answer]:
    if not ids:
        raise InputError("features.npz holds no row, expected one per answer; run jaxsae track")
    by_id: dict[str, Answer] = {}
    for answer in answers:
        if answer.id in by_id:
            raise InputError(f"answers.jsonl repeats id {answer.id!r}, expected each once; run jaxsae answer")
        by_id[answer.id] = answer
    if len(set(ids)) != len(ids):
        twice = next(name for index, name in enumerate(ids) if name in ids[:index])
        raise InputError(f"features.npz repeats id {twice!r}, expected each once; run jaxsae track")
    for name in ids:
        if name not in by_id:
            raise InputError(f"features.npz has id {name!r}, answers.jsonl has not; run jaxsae track")
    known = set(ids)
    for name in by_id:
        if name not in known:
            raise InputError(f"answers.jsonl has id {name!r}, features.npz has not; run jaxsae track")
    return by_id


def _check_metrics(metrics: np.ndarray, columns: Sequence[str], n_rows: int) -> None:
    if metrics.shape != (n_rows, len(columns)):
        raise InputError(
            f"the track metrics are {metrics.shape[0]} rows of {metrics.shape[1]} columns, expected {n_rows} rows of "
            f"{len(columns)}; run jaxsae track"
        )


def _check_family(name: str, family: Family, n_rows: int) -> None:
    n_found, n_columns = family.matrix.shape
    if n_found != n_rows or (family.columns and len(family.columns) != n_columns):
        raise InputError(
            f"the track family {name} is {n_found} rows of {n_columns} columns with {len(family.columns)} names, "
            f"expected {n_rows} rows and a name a column; run jaxsae track"
        )


def _check_finite(tables: Tables) -> None:
    """Raise for the first value that is not finite; the residual stream is read one layer at a time."""
    dense = {
        "logprobs": tables.logprobs,
        "entropies": tables.entropies,
        "track metrics": tables.track_metrics,
        **{f"track metrics of control {name}": metrics for name, metrics in tables.track_controls.items()},
        **{f"track family {name}": _dense(family) for name, family in tables.track_families.items()},
        "activations": tables.activations,
    }
    for name, values in dense.items():
        _check_rows(name, values, tables.ids)
    for layer in range(tables.n_layers):
        _check_rows(f"resid of layer {layer}", tables.resid[:, layer], tables.ids)


def _dense(family: Family) -> np.ndarray:
    """Return a family's numbers as rows; of a sparse one their sums, which are as finite."""
    is_dense = isinstance(family.matrix, np.ndarray)
    return family.matrix if is_dense else np.asarray(abs(family.matrix).sum(axis=1))


def _check_rows(name: str, values: np.ndarray, ids: Sequence[str]) -> None:
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if bad.any():
        raise InputError(
            f"{name} of {int(bad.sum())} rows, first {ids[int(np.argmax(bad))]!r}, are not finite; run jaxsae track"
        )


def _summarise_logprobs(
    logprobs: Float[np.ndarray, " tokens"], offsets: Int[np.ndarray, " bounds"]
) -> Float[np.ndarray, "N 4"]:
    """Return mean, smallest, sum and first log-probability per row, 0 for a row without tokens."""
    starts, counts = offsets[:-1], np.diff(offsets)
    summary = np.zeros((len(counts), len(LOGPROB_COLUMNS)))
    full = counts > 0
    if full.any():
        # Rows without tokens take no room in `logprobs`, so the starts of the others delimit them exactly.
        values = logprobs.astype(np.float64)
        sums = np.add.reduceat(values, starts[full])
        summary[full, 0] = sums / counts[full]
        summary[full, 1] = np.minimum.reduceat(values, starts[full])
        summary[full, 2] = sums
        summary[full, 3] = values[starts[full]]
    return summary


def _summarise_entropies(entropies: Sequence[float]) -> tuple[float, float]:
    return (float(np.mean(entropies)), max(entropies)) if entropies else (0.0, 0.0)


def count_words(normalised: Sequence[str]) -> sp.csr_matrix:
    """Count words and pairs of words in texts as `normalise_text` leaves them; a column of zeros if none has a word."""
    if not any(normalised):
        return sp.csr_matrix((len(normalised), 1))
    counts = CountVectorizer(lowercase=False, token_pattern=r"\w+", ngram_range=(1, 2)).fit_transform(normalised)
    return sp.csr_matrix(counts, dtype=np.float64)
