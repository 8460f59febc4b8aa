"""Phase 3, first half: questions to answers with labels (`answers.jsonl`) and their counts (`answers_summary.json`).

The headline is the language model's own greedy answer. Given answers (questions.answers=given) are the right and the
wrong text that a question set comes with, read by the model token by token: what tells them apart is often their style
and length, so results on them are diagnostics.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxsae import artifacts, data, models
from jaxsae.artifacts import Answer, InputError, Question
from jaxsae.config import QuestionsConfig, RunConfig
from jaxsae.data import agreement, labels
from jaxsae.data.fetch import download
from jaxsae.data.prompts import Prompter, encode_answer, encode_prompt
from jaxsae.models.scores import token_scores
from jaxsae.pipeline.extract import load_model
from jaxsae.pipeline.stages import Context
from jaxsae.progress import Progress

_CHUNK_BATCHES = 8  # batches between two writes of what is done
_FEW_CATEGORIES = 8  # that a line still names
_LENGTH_STEP = 32  # given answers are padded to a multiple of this, so that few shapes are compiled
_LOGIT_BYTES = 2**28  # of one forward pass over given answers, float32


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A question as the model gets it; for a given answer, with that answer, its ids and its label."""

    question: Question
    prompt: str
    prompt_ids: tuple[int, ...]
    id: str
    given: str = ""
    given_ids: tuple[int, ...] = ()
    label: int = 0


def run(config: RunConfig, context: Context) -> None:
    """Answer every question and label the answers; what an interrupted run answered is kept.

    Raises:
        InputError: model or questions cannot be used, a prompt does not fit the model's context, or all answers are
            right or all hallucinated; then they stay in `answers.partial.jsonl`.
    """
    settings = config.questions
    lm = load_model(config.model)
    questions, format = load_questions(settings)
    prompter = data.make_prompter(
        format, prompt=settings.prompt, shots=settings.shots, stop=settings.stop, chat=settings.chat
    )
    asked, answer = _prepare(lm, questions, prompter, settings)
    partial, chunk_size = context.workdir / "answers.partial.jsonl", settings.batch * _CHUNK_BATCHES
    identity = artifacts.fingerprint(
        [artifacts.FORMAT_VERSION, lm.fingerprint, _generation_settings(config), [item.id for item in asked]]
    )
    answers = _read_partial(partial, identity, chunk_size)
    with (
        context.stop.polled() as should_stop,
        Progress("answer", len(asked), "questions", done=len(answers)) as bar,
    ):
        for chunk in _chunks(asked[len(answers) :], chunk_size):
            if should_stop():
                break
            done = answer(chunk)
            _append(partial, identity, done)
            answers += done
            bar.update(len(answers))
    kept, summary = summarise(answers, settings)
    _check_classes(kept, summary, partial)
    about = {"answers": settings.answers, "format": format, "prompt": prompter.template, "stop": list(prompter.stop)}
    artifacts.write_json(context.workdir / "answers_summary.json", about | summary)
    artifacts.write_answers(context.workdir / "answers.jsonl", kept)
    partial.unlink(missing_ok=True)
    context.details = _describe(kept, summary)
    logging.info("answers: %s", context.details)


def _generation_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that the answers themselves depend on; what becomes of refusals is decided afterwards."""
    return {name: setting for name, setting in config.select("questions").items() if name != "questions.refusals"}


def load_questions(config: QuestionsConfig) -> tuple[list[Question], str]:
    """Return the questions to ask, from a file or a published set, and the name of their format.

    Raises:
        InputError: the file cannot be had or used, or holds fewer than `n_questions`.
    """
    format = config.name if config.format == "auto" and config.name is not None else config.format
    if config.path is None and config.name is not None and format != config.name:
        raise InputError(f"questions.name is {config.name} but questions.format is {format}; leave the format on auto")
    if config.path is not None:
        path = artifacts.resolve_path(config.path)
    elif config.name is not None:
        path = download(config.name)
    else:
        raise InputError("questions.path and questions.name are both unset; give a file or a published set")
    format = data.find_format(path) if format == "auto" else format
    questions = data.read_questions(path, format=format, columns=config.columns)
    n_asked = len(questions) if config.n_questions is None else config.n_questions
    if n_asked > len(questions):
        raise InputError(f"questions.n_questions is {n_asked}, but {path} holds {len(questions)}; ask for fewer")
    return [questions[i * len(questions) // n_asked] for i in range(n_asked)], format


def _chunks(items: Sequence[Prompted], size: int) -> Iterator[list[Prompted]]:
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def _prepare(
    lm: models.LanguageModel, questions: Sequence[Question], prompter: Prompter, config: QuestionsConfig
) -> tuple[list[Prompted], Callable[[Sequence[Prompted]], list[Answer]]]:
    """Return what is to be answered, one item an answer, and the function that answers a chunk of it."""
    asked = [put(question, prompter, lm.tokenizer) for question in questions]
    if config.answers == "given":
        asked = [pair for prompted in asked for pair in pair_up(prompted, lm.tokenizer)]
        _check_lengths(lm, asked, 0)
        return asked, lambda chunk: read_given(lm, chunk, batch=config.batch)
    _check_lengths(lm, asked, config.max_new_tokens)
    stop_ids = models.generate.stop_token_ids(lm.tokenizer, prompter.stop) | lm.eos_ids
    how = {"max_new_tokens": config.max_new_tokens, "stop_ids": stop_ids, "stop_strings": prompter.stop}
    return asked, lambda chunk: ask(lm, chunk, **how, n_rows=config.batch)


def put(question: Question, prompter: Prompter, tokenizer: Any) -> Prompted:
    """Return a question with its prompt and the prompt's token ids, which begin with BOS."""
    prompt = prompter.prompt(question, tokenizer)
    return Prompted(question, prompt, encode_prompt(prompt, tokenizer), question.id)


def pair_up(prompted: Prompted, tokenizer: Any) -> tuple[Prompted, Prompted]:
    """Return the question with its best right answer (label 0) and with its most tempting wrong one (label 1).

    Raises:
        InputError: it has no wrong answer, or a token straddles the end of the prompt.
    """
    question = prompted.question
    if not question.wrong_answers:
        raise InputError(
            f"question {question.id} has no wrong answer; questions.answers=given needs one for every question, as "
            "truthfulqa and halueval have"
        )
    right, wrong = (
        dataclasses.replace(
            prompted,
            id=f"{question.id}/{name}",
            given=text.strip(),
            given_ids=encode_answer(prompted.prompt, text, tokenizer),
            label=label,
        )
        for name, text, label in (("right", question.answers[0], 0), ("wrong", question.wrong_answers[0], 1))
    )
    return right, wrong


def _check_lengths(lm: models.LanguageModel, asked: Sequence[Prompted], n_new: int) -> None:
    for item in asked:
        n_tokens = len(item.prompt_ids) + len(item.given_ids)
        if n_tokens + n_new <= lm.n_positions:
            continue
        tail = f"; with questions.max_new_tokens {n_new} that" if n_new else " with the given answer; that"
        raise InputError(
            f"question {item.id} has {n_tokens} tokens in its prompt{tail} is more than the {lm.n_positions} that "
            f"{lm.name} reads"
        )


def ask(lm: models.LanguageModel, items: Sequence[Prompted], **how: Any) -> list[Answer]:
    """Return the model's answers with labels; `how` goes to `LanguageModel.generate`.

    The generated ids are kept as they are; text is only read from them.
    """
    outcomes = lm.generate([item.prompt_ids for item in items], **how)
    answers = []
    for item, outcome in zip(items, outcomes, strict=True):
        text = lm.tokenizer.decode(outcome.answer_ids, skip_special_tokens=True).strip()
        is_wrong = data.is_hallucinated(text, item.question.answers)
        answers.append(_answer(item, text, outcome.answer_ids, int(is_wrong), outcome.logprobs, outcome.entropies))
    return answers


def read_given(lm: models.LanguageModel, items: Sequence[Prompted], *, batch: int) -> list[Answer]:
    """Return the given answers with the log-probability and entropy of each of their tokens after all before it.

    Raises:
        InputError: a log-probability is not finite.
    """
    longest = max(len(item.prompt_ids) + len(item.given_ids) for item in items)
    length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, lm.n_positions)
    n_rows = min(batch, max(1, _LOGIT_BYTES // (4 * length * lm.n_vocab)))
    answers = []
    for start in range(0, len(items), n_rows):
        chosen = items[start : start + n_rows]
        token_ids = np.zeros((n_rows, length), np.int32)
        for row, item in enumerate(chosen):
            token_ids[row, : len(item.prompt_ids) + len(item.given_ids)] = (*item.prompt_ids, *item.given_ids)
        logits = lm.logits(token_ids)[:, :-1]  # of each token but the first
        logprobs, entropies = map(np.asarray, token_scores(logits, jnp.asarray(token_ids[:, 1:])))
        for row, item in enumerate(chosen):
            first = len(item.prompt_ids) - 1
            at = slice(first, first + len(item.given_ids))
            if not np.isfinite(logprobs[row, at]).all():
                raise InputError(f"question {item.id}: a log-probability of {lm.name} is not finite; use float32")
            scores = (tuple(logprobs[row, at].tolist()), tuple(entropies[row, at].tolist()))
            answers.append(_answer(item, item.given, item.given_ids, item.label, *scores))
    return answers


def _answer(
    item: Prompted,
    text: str,
    answer_ids: tuple[int, ...],
    label: int,
    logprobs: tuple[float, ...],
    entropies: tuple[float, ...],
) -> Answer:
    question = item.question
    return Answer(
        id=item.id,
        question=question.question,
        answers=question.answers,
        group=question.group,
        category=question.category,
        prompt=item.prompt,
        prompt_ids=item.prompt_ids,
        answer=text,
        answer_ids=answer_ids,
        label=label,
        logprobs=logprobs,
        entropies=entropies,
    )


def summarise(answers: Sequence[Answer], config: QuestionsConfig) -> tuple[list[Answer], dict[str, Any]]:
    """Return the answers to keep, and the counts of all of them by class and category with the rules' agreement.

    Given answers are of the class they were given as; of the model's own, refusals are left out if the config says so.
    """
    is_given = config.answers == "given"
    classes = [
        (labels.WRONG if answer.label else labels.RIGHT) if is_given else labels.classify(answer.answer, answer.answers)
        for answer in answers
    ]
    is_dropped = [name == labels.REFUSAL and config.refusals == "drop" for name in classes]
    kept = [answer for answer, dropped in zip(answers, is_dropped, strict=True) if not dropped]
    categories: dict[str, list[int]] = {}
    for row, answer in enumerate(answers):
        categories.setdefault(answer.category, []).append(row)

    def count(rows: Sequence[int]) -> dict[str, int]:
        of_class = {name: sum(classes[row] == name for row in rows) for name in labels.CLASSES}
        return {"asked": len(rows), **of_class, "dropped": sum(is_dropped[row] for row in rows)}

    by_rule = agreement.label_by_every_rule([a.answer for a in kept], [a.answers for a in kept])
    by_rule = {"given": [a.label for a in kept], **by_rule} if is_given else by_rule
    return kept, {
        "counts": count(range(len(answers))),
        "by_category": {name: count(rows) for name, rows in sorted(categories.items())},
        "hallucinated_by_rule": {name: sum(row) for name, row in by_rule.items()},
        "agreement": agreement.compare_labels(by_rule) if kept else [],
        "dropped": [
            {"id": answer.id, "answer": answer.answer}
            for answer, dropped in zip(answers, is_dropped, strict=True)
            if dropped
        ],
    }


def _check_classes(kept: Sequence[Answer], summary: dict[str, Any], partial: Path) -> None:
    wrong = sum(answer.label for answer in kept)
    if 0 < wrong < len(kept):
        return
    dropped = summary["counts"]["dropped"]
    found = f"{len(kept) - wrong} right and {wrong} hallucinated" + (f", {dropped} refusals dropped" if dropped else "")
    raise InputError(
        f"the answers are of one kind: {found}; detectors need both: ask questions of which the model gets some right "
        f"and some wrong (questions.path), or look at {partial} and change questions.prompt"
    )


def _append(path: Path, identity: str, answers: Sequence[Answer]) -> None:
    """Add a chunk of answers, durably, behind a first line that says what they belong to."""
    with open(path, "a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(json.dumps({"identity": identity}) + "\n")
        file.writelines(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        file.flush()
        os.fsync(file.fileno())


def _read_partial(path: Path, identity: str, chunk_size: int) -> list[Answer]:
    """Return the whole chunks of answers of an interrupted run; those of another run are dropped, with a line.

    Given answers are padded to the longest of their chunk, so the rest of a torn chunk would have other last digits:
    all of it is done again.

    Raises:
        InputError: a line in front of the torn end is damaged.
    """
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    with artifacts.atomic_write(path) as partial:
        partial.write_bytes(b"".join(lines[: 1 + (len(lines) - 1) // chunk_size * chunk_size]))
    try:
        first, *rows = [row for _, row in artifacts.read_jsonl(path)] or [{}]
        if first.get("identity") == identity:
            return [_read_row(row) for row in rows]
    except (InputError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run jaxsae answer") from None
    logging.warning("%s is of other questions, settings or model; starting anew", path)
    path.unlink()
    return []


def _read_row(row: dict[str, Any]) -> Answer:
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in row.items()}
    return Answer(**fields)


def _describe(kept: Sequence[Answer], summary: dict[str, Any]) -> str:
    """Say how many answers are hallucinated, also by category if these are few, and how many empty or refusals."""
    by_category: dict[str, list[int]] = {}
    for answer in kept:
        by_category.setdefault(answer.category, []).append(answer.label)
    wrong = sum(answer.label for answer in kept)
    parts = [f"{category or 'all'} {sum(labels)}/{len(labels)}" for category, labels in sorted(by_category.items())]
    described = f" ({', '.join(parts)})" if len(parts) <= _FEW_CATEGORIES else ""
    counts = summary["counts"]
    refusals = f"{counts['refusal']} refusals, {counts['dropped']} of them dropped" if counts["refusal"] else ""
    also = [f"{counts['empty']} empty" if counts["empty"] else "", refusals]
    return "; ".join([f"{wrong} of {len(kept)} hallucinated{described}", *filter(None, also)])
