"""Explain one answer's score by its tracks, and check each explanation in the language model itself.

Attribution asks the detector: what is the probability without this track at its input? The deletion test asks the
model: what becomes of probability and answer when the track's latents are taken out while it reads, and is that more
than when as much of other latents is taken out? A track that fails the test moved the number, not the model.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxsae import tracking
from jaxsae.artifacts import RESID_POSITIONS, Answer, Features
from jaxsae.detection import Tables
from jaxsae.detection.explain import (
    Effect,
    compare,
    draw_matched,
    latent_sizes,
    repeat_row,
    similarity,
    split_layer,
    total_size,
)
from jaxsae.features import Reading
from jaxsae.pipeline.judge import Judge

_BLOCK = 64  # tracks left out in one table, to bound memory


@dataclasses.dataclass(frozen=True)
class Deletion:
    """What taking a track's latents out of the language model does, beside random deletions of like size.

    Attributes:
        probability: effect on the calibrated probability. The track was chosen because the detector reads it, the
            random latents were not: this p-value is smaller than that of a track chosen beforehand.
        logprob: effect on the answer's summed log-probability, nats; 0 for an empty answer.
        draws: different random deletions: as many latents of the same layers, active at the tracked position, of like
            size.
        size: of the track at the tracked position, the sum over its latents of activation times decoder length,
            residual units; by it the random latents were chosen. All are taken out at every token of the answer.
        random_size: the mean size of the random deletions.
    """

    probability: Effect
    logprob: Effect
    draws: int
    size: float
    random_size: float


@dataclasses.dataclass(frozen=True)
class TrackEvidence:
    """A track that moved the score.

    Attributes:
        birth, last: its first and last layer.
        layers, latents, activations: of its observations.
        change: the probability without this track at the detector's input, minus that with all of them; below 0, it
            makes the answer look hallucinated.
        splits_at: the first layer whose latent the similar right answer has not; None if it has all of them, or there
            is no such answer.
        deletion: the check; None where some layer has no other active latent to compare with.
    """

    birth: int
    last: int
    layers: tuple[int, ...]
    latents: tuple[int, ...]
    activations: tuple[float, ...]
    change: float
    splits_at: int | None
    deletion: Deletion | None


@dataclasses.dataclass(frozen=True)
class Similar:
    """The kept right answer whose latents at the tracked position are most like the answer's.

    Attributes:
        similarity: the mean over layers of the cosine of the kept latents, 0 to 1.
        feature_ids: its kept latents.
    """

    id: str
    prompt: str
    answer: str
    similarity: float
    feature_ids: Int[np.ndarray, "L K"] = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Labelled answers to compare with: their latents at the tracked position."""

    answers: Sequence[Answer]
    feature_ids: Int[np.ndarray, "N L K"]
    activations: Float[np.ndarray, "N L K"]

    @classmethod
    def of(cls, answers: Sequence[Answer], kept: Features, position: str) -> "Reference":
        """Align answers to the rows of their features, at a position or, if it is no single one, the first kept."""
        by_id = {answer.id: answer for answer in answers}
        ids, activations = kept.at(position if position in kept.positions else kept.positions[0])
        return cls([by_id[name] for name in kept.ids], ids, activations)

    def nearest_right(
        self, answer: Answer, ids: Int[np.ndarray, "L K"], acts: Float[np.ndarray, "L K"]
    ) -> Similar | None:
        """Return the most similar right answer that is not this very one; None if there is none."""
        text = answer.prompt_ids, answer.answer_ids
        rows = [
            row
            for row, other in enumerate(self.answers)
            if other.label == 0 and (other.prompt_ids, other.answer_ids) != text
        ]
        if not rows:
            return None
        found = similarity(ids, acts, self.feature_ids[rows], self.activations[rows])
        best = rows[int(np.argmax(found))]
        other = self.answers[best]
        return Similar(other.id, other.prompt, other.answer, float(found.max()), self.feature_ids[best])


def explain(
    judge: Judge, reading: Reading, tables: Tables, reference: Reference, *, tracks: int, draws: int, seed: int
) -> tuple[tuple[TrackEvidence, ...], Similar | None]:
    """Return the tracks that move the probability most, checked, and the similar right answer.

    Args:
        tables: a row for each cut of `reading`, the whole answer last.
        tracks: how many to explain.
        draws: different random deletions beside each, as far as there are that many.
        seed: of the draws, with the answer's ids: they do not depend on other answers.

    Raises:
        InputError: an ablated model gives numbers that are not finite.
    """
    answer, kept = reading.cuts[-1], reading.features
    ids, acts = kept.at(judge.tracker.position)
    similar = reference.nearest_right(answer, ids[-1], acts[-1])
    followed = _last_sample(judge.follow(kept))
    changes = _without_each(judge, reading, tables, followed) - judge.probabilities(tables)[-1]
    chosen = np.argsort(-np.abs(changes), kind="stable")[:tracks].tolist()
    latents = [_latents(followed, track) for track in chosen]
    deletions = _delete(judge, reading, latents, draws=draws, seed=seed)
    evidence = []
    for track, pairs, deletion in zip(chosen, latents, deletions, strict=True):
        at = slice(*followed.observation_offsets[track : track + 2])
        evidence.append(
            TrackEvidence(
                birth=int(followed.birth[track]),
                last=int(followed.layer[at][-1]),
                layers=tuple(followed.layer[at].tolist()),
                latents=tuple(followed.feature_id[at].tolist()),
                activations=tuple(followed.activation[at].tolist()),
                change=float(changes[track]),
                splits_at=None if similar is None else split_layer(pairs, similar.feature_ids),
                deletion=deletion,
            )
        )
    return tuple(evidence), similar


def _last_sample(tracks: tracking.Tracks) -> tracking.Tracks:
    """Return the tracks of the last sample alone."""
    first = tracks.sample_offsets[-2]
    start = tracks.observation_offsets[first]
    return dataclasses.replace(
        tracks,
        sample_offsets=tracks.sample_offsets[-2:] - first,
        birth=tracks.birth[first:],
        death=tracks.death[first:],
        observation_offsets=tracks.observation_offsets[first:] - start,
        layer=tracks.layer[start:],
        feature_id=tracks.feature_id[start:],
        activation=tracks.activation[start:],
    )


def _latents(tracks: tracking.Tracks, track: int) -> list[tuple[int, int]]:
    at = slice(*tracks.observation_offsets[track : track + 2])
    return list(zip(tracks.layer[at].tolist(), tracks.feature_id[at].tolist(), strict=True))


def _without_each(judge: Judge, reading: Reading, tables: Tables, tracks: tracking.Tracks) -> Float[np.ndarray, " R"]:
    """Return the probability of the whole answer without each of its tracks at the detector's input.

    A track takes with it its observations, its latents at the tracked position, and what these add to the residual
    stream there, which the probes read.
    """
    if not len(tracks.birth):
        return np.empty(0)
    remaining, kept = tracking.leave_one_out(tracks), _repeat_last(reading.features, len(tracks.birth))
    place = kept.positions.index(judge.tracker.position)
    weights = _resid_weights(judge.tracker.position, len(reading.cuts[-1].answer_ids))
    for track in range(len(tracks.birth)):
        for layer, latent in _latents(tracks, track):
            slots = kept.feature_ids[track, layer, place]
            kept.activations[track, layer, place][slots == latent] = 0.0
            slots[slots == latent] = -1
    metrics, families = tracking.divergence_metrics(remaining), judge.families(kept, remaining)
    found = []
    for start in range(0, len(metrics), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(metrics)))
        resid = np.repeat(tables.resid[-1:].astype(np.float32), rows.stop - start, axis=0)
        for row, track in enumerate(range(start, rows.stop)):
            for layer, latent in _latents(tracks, track):
                share = weights @ reading.token_features[layer][:, [latent]].toarray()  # [3, 1]
                resid[row, layer] -= (share * judge.decoders[layer][latent]).astype(np.float32)
        changed = {
            "resid": resid,
            "feature_ids": kept.feature_ids[rows],
            "activations": kept.activations[rows],
            "track_metrics": metrics[rows],
            "track_families": {name: family[rows] for name, family in families.items()},
        }
        found.append(judge.probabilities(repeat_row(tables, len(tables.ids) - 1, len(resid), **changed)))
    return np.concatenate(found)


def _repeat_last(kept: Features, n: int) -> Features:
    """Return `n` copies of the last row."""
    logprobs = kept.logprobs[kept.offsets[-2] :]
    return Features(
        ids=kept.ids[-1:] * n,
        positions=kept.positions,
        feature_ids=np.repeat(kept.feature_ids[-1:], n, axis=0),
        activations=np.repeat(kept.activations[-1:], n, axis=0),
        resid=np.repeat(kept.resid[-1:], n, axis=0),
        recon_error=np.repeat(kept.recon_error[-1:], n, axis=0),
        token_directions=np.repeat(kept.token_directions[-1:], n, axis=0),
        logprobs=np.tile(logprobs, n),
        offsets=len(logprobs) * np.arange(n + 1),
    )


def _resid_weights(position: str, n_answer: int) -> Float[np.ndarray, "3 tokens"]:
    """Return how far each token's part of the tracked position counts at each of `RESID_POSITIONS`.

    Column 0 is the last prompt token, the answer's tokens follow; of an empty answer all positions are column 0.
    """
    weights = np.zeros((len(RESID_POSITIONS), 1 + n_answer))
    for row, name in enumerate(RESID_POSITIONS):
        columns = _columns(name, n_answer)
        weights[row, columns] = 1 / len(columns)
    return weights * np.isin(np.arange(1 + n_answer), _columns(position, n_answer))


def _columns(position: str, n_answer: int) -> list[int]:
    """Return the tokens that a position covers, numbered as in `_resid_weights`."""
    single = {"last_prompt": 0, "first_answer": min(1, n_answer), "last_answer": n_answer}
    return [single[position]] if position in single else list(range(min(1, n_answer), 1 + n_answer))


def _delete(
    judge: Judge, reading: Reading, latents: Sequence[list[tuple[int, int]]], *, draws: int, seed: int
) -> list[Deletion | None]:
    """Take each track's latents, and its random matches', out of the model; compare with the model as it is."""
    if not latents:
        return []
    answer = reading.cuts[-1]
    at = _columns(judge.tracker.position, len(answer.answer_ids))
    sizes = latent_sizes([feats[at] for feats in reading.token_features], judge.decoders)
    rng = np.random.default_rng(_draw_seed(answer, seed))
    matched = [draw_matched(pairs, sizes, draws=draws, rng=rng) for pairs in latents]
    asked: list[list[tuple[int, int]]] = [[]]
    for pairs, others in zip(latents, matched, strict=True):
        asked += [pairs, *others]
    again, kept = judge.read_ablated(answer, asked)
    probabilities = judge.probabilities(judge.tabulate(again, kept))
    logprobs = np.array([sum(one.logprobs) for one in again], dtype=np.float64)
    deletions: list[Deletion | None] = []
    start = 1
    for pairs, others in zip(latents, matched, strict=True):
        rows = slice(start + 1, start + 1 + len(others))
        deletions.append(
            Deletion(
                probability=compare(probabilities[start] - probabilities[0], probabilities[rows] - probabilities[0]),
                logprob=compare(logprobs[start] - logprobs[0], logprobs[rows] - logprobs[0]),
                draws=len(others),
                size=total_size(pairs, sizes),
                random_size=float(np.mean([total_size(other, sizes) for other in others])),
            )
            if others
            else None
        )
        start = rows.stop
    return deletions


def _draw_seed(answer: Answer, seed: int) -> list[int]:
    digest = hashlib.sha256(repr((answer.prompt_ids, answer.answer_ids)).encode()).digest()
    return [seed, int.from_bytes(digest[:8], "little")]
