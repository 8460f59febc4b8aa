"""Score answers with a finished run: how likely is this one hallucinated, which tokens and tracks say so, since when?

Each answer is read alone, in programs whose shapes its own length gives: its score is the same to the last bit whatever
is scored beside it. Log-probabilities are those of the language model reading the answer, also of one it generated.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsae import artifacts, detection, models, sae
from jaxsae.artifacts import Answer, Features, InputError
from jaxsae.config import ModelConfig, read_section
from jaxsae.data.prompts import encode_answer, encode_prompt
from jaxsae.detection import FittedDetector, ProtocolConfig
from jaxsae.detection.detector import JSON_NAME
from jaxsae.detection.tables import UNKNOWN_LABEL
from jaxsae.features.encode import make_features
from jaxsae.pipeline.explanation import Reference, Similar, TrackEvidence, explain
from jaxsae.pipeline.extract import load_model
from jaxsae.pipeline.judge import Judge
from jaxsae.pipeline.links import needs_links, read_links
from jaxsae.pipeline.stages import STAGES, read_record, record_path
from jaxsae.pipeline.track import TOKENS, read_concepts

TRACKS = 3  # explained unless asked otherwise
DRAWS = 20  # random deletions beside each

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """What the detector says of one answer of T tokens.

    Attributes:
        id: the row's, else its number from 1.
        answer: its text; the model's own greedy one where none was given.
        probability: calibrated on the run's answers, higher = more likely hallucinated.
        is_hallucinated: whether the probability reaches `threshold`, which was chosen on the run's answers.
        tokens: the text of each token of the answer.
        token_scores: the probability with the answer cut after each token; the last is `probability`. Calibrated on
            whole answers alone.
        earliest_layer: the first layer from which on the verdict is the final one, as far as the detector can know it
            there (see `jaxsae.detection.explain.scores_by_layer`); None where the final verdict is the one before
            anything is known, and no layer turned it.
        tracks: those whose absence from the detector's input changes the probability most, the largest change first;
            none where the run tracked every token of an answer on its own.
        similar: the run's right answer whose latents are most like this one's; None where no track was to be explained
            or there is no other right answer.
        warnings: what to know before believing it, a sentence each.
    """

    id: str
    prompt: str
    answer: str
    probability: float
    is_hallucinated: bool
    threshold: float
    tokens: tuple[str, ...]
    token_scores: Float[np.ndarray, " T"]
    earliest_layer: int | None
    tracks: tuple[TrackEvidence, ...]
    similar: Similar | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        fields = dataclasses.asdict(self) | {"token_scores": self.token_scores.tolist()}
        if self.similar is not None:
            del fields["similar"]["feature_ids"]
        return fields


@dataclasses.dataclass(frozen=True)
class Asking:
    """How answers come about, and what those were like that the detector learned from.

    Attributes:
        template: the run's prompt, "{question}" in it.
        stop: strings that end an answer.
        max_new_tokens: of a generated answer.
        longest: tokens of the longest answer learned from.
        has_empty: whether an empty answer was among them.
    """

    template: str
    stop: tuple[str, ...]
    max_new_tokens: int
    longest: int
    has_empty: bool


class Detector:
    """A run's detector with its language model and its SAEs.

    A row is a mapping with `prompt` (the whole text the model is given, of the form the run's prompts have) and, where
    wanted, `answer` (None: the model answers) and `id`. Nothing is written.
    """

    def __init__(self, judge: Judge, asking: Asking, protocol: ProtocolConfig, reference: Reference) -> None:
        """Put the parts together; `Detector.load` takes them from a run."""
        self.judge, self.asking, self.protocol, self.reference = judge, asking, protocol, reference
        self._stop_ids: frozenset[int] | None = None

    @classmethod
    def load(cls, workdir: str | Path, *, model: str | None = None) -> "Detector":
        """Load what `jaxsae detect` left in a run's folder.

        Args:
            model: where the language model lies now (a folder, a .gguf file, a Hugging Face name), if not where the run
                read it.

        Raises:
            InputError: a file is missing or damaged, or files, SAEs or model are not those the detector was made with.
        """
        workdir = Path(workdir)
        fitted = FittedDetector.load(workdir / "detector")
        records = _matching_records(workdir)
        answering, tracked, detected = (records[name]["settings"] for name in ("answer", "track", "detect"))
        lm = _load_model(read_section(tracked, "model"), model, workdir)
        suite = sae.load(workdir / "saes", arrays="jax")
        tracking = read_section(tracked, "tracking")
        keep, decoders = read_section(tracked, "features").keep, [np.asarray(rows) for rows in suite.W_dec]
        answers = artifacts.read_answers(workdir / "answers.jsonl")
        summary = artifacts.read_json(workdir / "answers_summary.json", rebuild="run jaxsae answer --redo")
        return cls(
            Judge(
                fitted,
                lm,
                suite,
                decoders,
                concepts=read_concepts(workdir),
                keep=keep,
                tracker=tracking,
                links=read_links(workdir) if needs_links(tracking) else None,
            ),
            Asking(
                template=summary["prompt"],
                stop=tuple(summary["stop"]),
                max_new_tokens=read_section(answering, "questions").max_new_tokens,
                **_lengths(answers),
            ),
            ProtocolConfig(
                folds=read_section(detected, "detection").folds,
                families=fitted.settings.families,
                seed=detected["seed"],
            ),
            Reference.of(answers, artifacts.read_features(workdir / "features.npz"), tracking.position),
        )

    def score(self, prompt: str, answer: str | None = None, *, tracks: int = TRACKS, draws: int = DRAWS) -> Score:
        """Score one answer, or the model's own greedy one.

        Args:
            tracks: tracks to explain; 0 leaves explanations and their deletion tests out.
            draws: random deletions beside each explained track.

        Raises:
            InputError: prompt and answer do not fit the model's context, the prompt is empty, or the tokenizer makes no
                token of the answer, or one that straddles the end of the prompt.
        """
        return self.score_batch([{"prompt": prompt, "answer": answer}], tracks=tracks, draws=draws)[0]

    def score_batch(self, rows: Sequence[Row], *, tracks: int = TRACKS, draws: int = DRAWS) -> list[Score]:
        """Score rows, each exactly as `score` does; all of them are checked before the first is scored."""
        return list(self.scores(rows, tracks=tracks, draws=draws))

    def scores(self, rows: Sequence[Row], *, tracks: int = TRACKS, draws: int = DRAWS) -> Iterator[Score]:
        """Check all rows, then yield their scores one after the other; raises as `score` does, naming the row."""
        if tracks < 0 or draws < 1:
            raise InputError(f"tracks is {tracks} and draws {draws}; expected 0 or more tracks, 1 or more draws")
        prepared = [self._prepare(row, number) for number, row in enumerate(rows, start=1)]
        return (self._score(answer, tracks=tracks, draws=draws) for answer in prepared)

    def predict_proba(self, rows: Sequence[Row]) -> Float[np.ndarray, "N 2"]:
        """Return the calibrated probabilities of right (column 0) and hallucinated (column 1), those of `score`."""
        prepared = [self._prepare(row, number) for number, row in enumerate(rows, start=1)]
        readings = (self.judge.read(self._answered(one)[0]) for one in prepared)
        tables = (self.judge.tabulate(reading.cuts, reading.features) for reading in readings)
        return np.concatenate([np.empty((0, 2)), *(self.judge.fitted.predict_proba(table)[-1:] for table in tables)])

    def fit(
        self, rows: Sequence[Row], labels: Sequence[int] | np.ndarray, *, groups: Sequence[str] | None = None
    ) -> "Detector":
        """Fit the detector anew, with this model and these SAEs, on rows with labels; return it.

        Layers, penalties, calibration and threshold come from folds that no group is divided by, as in `jaxsae detect`.

        Args:
            labels: 1 hallucinated, 0 right.
            groups: the fact or question behind each row; unset, rows with the same prompt are one.

        Raises:
            InputError: the numbers of rows, labels and groups differ, there are too few rows of a class, or one cannot
                be used.
        """
        groups = [str(row.get("prompt")) for row in rows] if groups is None else list(groups)
        if not len(rows) == len(labels) == len(groups):
            raise InputError(f"got {len(rows)} rows, {len(labels)} labels and {len(groups)} groups; expected one each")
        if not len(rows):
            raise InputError("got no row to learn from; expected answers of both kinds")
        for number, label in enumerate(labels, start=1):
            if label not in (0, 1):
                raise InputError(f"row {number}: label {label!r}, expected 1 (hallucinated) or 0 (right)")
        prepared = [self._prepare(row, number) for number, row in enumerate(rows, start=1)]
        readings = []
        for one, label, group in zip(prepared, labels, groups, strict=True):
            answered, _ = self._answered(one)
            readings.append(self.judge.read(dataclasses.replace(answered, label=int(label), group=group)))
        answers, kept = _whole(readings)
        fitted = detection.fit_detector(self.judge.tabulate(answers, kept), self.protocol)
        self.judge = dataclasses.replace(self.judge, fitted=fitted)
        self.asking = dataclasses.replace(self.asking, **_lengths(answers))
        self.reference = Reference.of(answers, kept, self.judge.tracker.position)
        return self

    def _prepare(self, row: Row, number: int) -> tuple[Answer, bool]:
        """Return a row as an answer without scores, and whether the model has yet to give it.

        Raises:
            InputError: see `score`; the row is named.
        """
        name = str(row.get("id") or number)
        prompt, answer = row.get("prompt"), row.get("answer")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"row {name}: expected a prompt, a text that is not empty, got {prompt!r}")
        if answer is not None and not isinstance(answer, str):
            raise InputError(f"row {name}: expected an answer that is a text or none, got {answer!r}")
        lm = self.judge.lm
        prompt_ids = encode_prompt(prompt, lm.tokenizer)
        try:
            ids = encode_answer(prompt, answer, lm.tokenizer) if answer and answer.strip() else ()
        except InputError as error:
            raise InputError(f"row {name}: {error}") from None
        n_new = self.asking.max_new_tokens if answer is None else len(ids)
        if len(prompt_ids) + n_new > lm.n_positions:
            of = "to be generated" if answer is None else "of the answer"
            raise InputError(
                f"row {name}: {len(prompt_ids)} tokens of the prompt and {n_new} {of} are more than the "
                f"{lm.n_positions} that {lm.name} reads; shorten them"
            )
        return _unscored(name, prompt, prompt_ids, (answer or "").strip(), ids), answer is None

    def _answered(self, prepared: tuple[Answer, bool]) -> tuple[Answer, bool]:
        """Return the answer, generated where it has yet to be given, and whether it came to its end."""
        answer, is_open = prepared
        if not is_open:
            return answer, True
        lm = self.judge.lm
        if self._stop_ids is None:
            self._stop_ids = models.generate.stop_token_ids(lm.tokenizer, self.asking.stop) | lm.eos_ids
        made = lm.generate(
            [answer.prompt_ids],
            max_new_tokens=self.asking.max_new_tokens,
            stop_ids=self._stop_ids,
            stop_strings=self.asking.stop,
            n_rows=1,
        )[0]
        text = lm.tokenizer.decode(made.answer_ids, skip_special_tokens=True).strip()
        return dataclasses.replace(answer, answer=text, answer_ids=made.answer_ids), made.stopped

    def _score(self, prepared: tuple[Answer, bool], *, tracks: int, draws: int) -> Score:
        judge, fitted = self.judge, self.judge.fitted
        answer, is_whole = self._answered(prepared)
        reading = judge.read(answer)
        tables = judge.tabulate(reading.cuts, reading.features)
        probabilities = judge.probabilities(tables)
        how = {"tracks": tracks, "draws": draws, "seed": self.protocol.seed}
        is_explained = tracks > 0 and judge.tracker.position != TOKENS
        evidence, similar = explain(judge, reading, tables, self.reference, **how) if is_explained else ((), None)
        return Score(
            id=answer.id,
            prompt=answer.prompt,
            answer=answer.answer,
            probability=float(probabilities[-1]),
            is_hallucinated=bool(probabilities[-1] >= fitted.threshold),
            threshold=fitted.threshold,
            tokens=tuple(judge.lm.tokenizer.decode([token]) for token in answer.answer_ids),
            token_scores=probabilities if answer.answer_ids else np.empty(0),
            earliest_layer=judge.earliest_layer(tables, reading.features),
            tracks=evidence,
            similar=similar,
            warnings=tuple(self._warnings(answer, is_whole, tracks=tracks)),
        )

    def _warnings(self, answer: Answer, is_whole: bool, *, tracks: int) -> Iterator[str]:
        asking, n_tokens = self.asking, len(answer.answer_ids)
        if tracks > 0 and self.judge.tracker.position == TOKENS:
            yield (
                f"this run's tracks are those of every token (tracking.position={TOKENS}): none is explained; run "
                "track and detect with a single position for that"
            )
        if not n_tokens:
            learned = "" if asking.has_empty else "; none of the answers learned from was empty"
            yield f"the answer is empty: scored by the last token of the prompt{learned}"
        if n_tokens > asking.longest:
            yield (
                f"the answer has {n_tokens} tokens, the longest learned from {asking.longest}: the probability is "
                "extrapolated"
            )
        if not is_whole:
            yield f"the model did not end its answer within {asking.max_new_tokens} tokens; it is scored as it stands"
        if not _is_of_form(answer.prompt, asking.template):
            yield f"the run's prompts are of the form {asking.template!r}, this one is not"
        if any(answer.prompt_ids == other.prompt_ids for other in self.reference.answers):
            yield "the detector learned from an answer to this prompt: it is surer of it than of a new one"


def _unscored(name: str, prompt: str, prompt_ids: tuple[int, ...], answer: str, answer_ids: tuple[int, ...]) -> Answer:
    return Answer(
        id=name,
        question=prompt,
        answers=(),
        group=name,
        category="",
        prompt=prompt,
        prompt_ids=prompt_ids,
        answer=answer,
        answer_ids=answer_ids,
        label=UNKNOWN_LABEL,
        logprobs=(),
        entropies=(),
    )


def _whole(readings: Sequence[Any]) -> tuple[list[Answer], Features]:
    """Return the whole answers of readings and their features, as rows with ids from 1."""
    answers = [dataclasses.replace(one.cuts[-1], id=str(row)) for row, one in enumerate(readings, start=1)]
    arrays = {
        name: np.concatenate([getattr(one.features, name)[-1:] for one in readings])
        for name in ("feature_ids", "activations", "resid", "recon_error", "token_directions")
    }
    return answers, make_features(answers, arrays, readings[0].features.positions)


def _lengths(answers: Sequence[Answer]) -> dict[str, Any]:
    lengths = [len(answer.answer_ids) for answer in answers]
    return {"longest": max(lengths), "has_empty": 0 in lengths}


def _is_of_form(prompt: str, template: str) -> bool:
    """Say whether the parts of the template around its placeholders stand in the prompt, in order, to both ends."""
    head, tail = template.split("{", 1)[0], template.rsplit("}", 1)[-1]
    return prompt.startswith(head) and prompt.endswith(tail)


def _matching_records(workdir: Path) -> dict[str, dict[str, Any]]:
    """Return the records of answer, track and detect, whose files must be those that the detector was fitted on.

    Raises:
        InputError: a record is missing, or a file is another one.
    """
    records = {}
    for name in ("answer", "track", "detect"):
        record = read_record(workdir, STAGES[name])
        if record is None:
            raise InputError(f"{record_path(workdir, STAGES[name])} is missing; run jaxsae {name}")
        records[name] = record
    seen = records["detect"]["inputs"] | {
        f"detector/{JSON_NAME}": records["detect"]["outputs"][f"detector/{JSON_NAME}"]
    }
    seen |= {name: digest for name, digest in records["track"]["outputs"].items() if name == "links.npz"}
    for name, digest in seen.items():
        path = workdir / name
        if not path.is_file() or artifacts.sha256_file(path) != digest:
            what = "is missing" if not path.is_file() else "has changed"
            raise InputError(f"{path} {what} since the detector was fitted; run jaxsae track, then jaxsae detect")
    return records


def _load_model(config: ModelConfig, moved_to: str | None, workdir: Path) -> models.LanguageModel:
    """Load the run's model, and make sure that it is.

    Raises:
        InputError: it cannot be loaded, or is another one than the SAEs were trained on.
    """
    if moved_to is not None:
        config = dataclasses.replace(config, path=moved_to)
    lm = load_model(config)
    about = artifacts.read_json(workdir / "saes" / "suite.json", rebuild="run jaxsae train")
    if about["model_fingerprint"] != lm.fingerprint:
        raise InputError(
            f"the model at {config.path or config.name} (fingerprint {lm.fingerprint[:12]}) is not the "
            f"{about['model']} ({about['model_fingerprint'][:12]}) that {workdir} was made with; say where that one "
            "lies with --model"
        )
    return lm
