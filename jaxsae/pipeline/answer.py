"""Phase 3, first half: questions to the language model's own answers with labels, in `answers.jsonl`."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from jaxsae import artifacts, data, models
from jaxsae.artifacts import Answer, InputError, Question
from jaxsae.config import QuestionsConfig, RunConfig
from jaxsae.data.tokens import find_bos_id
from jaxsae.pipeline.extract import load_model
from jaxsae.pipeline.stages import Context
from jaxsae.progress import Progress

_CHUNK_BATCHES = 8  # batches between two writes of what is done


def run(config: RunConfig, context: Context) -> None:
    """Answer every question greedily and label the answers; what an interrupted run answered is kept.

    Raises:
        InputError: model or questions cannot be used, or a prompt does not fit the model's context.
    """
    lm = load_model(config.model)
    questions = data.read_questions(str(config.questions.path))
    partial, chunk_size = context.workdir / "answers.partial.jsonl", config.questions.batch * _CHUNK_BATCHES
    identity = artifacts.fingerprint(
        [artifacts.FORMAT_VERSION, lm.fingerprint, config.select("questions"), [q.id for q in questions]]
    )
    answers = _read_partial(partial, identity, chunk_size)
    with (
        context.stop.polled() as should_stop,
        Progress("answer", len(questions), "questions", done=len(answers)) as bar,
    ):
        for chunk in _chunks(questions[len(answers) :], chunk_size):
            if should_stop():
                break
            done = ask(lm, chunk, config.questions)
            _append(partial, identity, done)
            answers += done
            bar.update(len(answers))
    artifacts.write_answers(context.workdir / "answers.jsonl", answers)
    partial.unlink(missing_ok=True)
    context.details = _summary(answers)
    logging.info("answers: %s", context.details)


def _chunks(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    rest = iter(questions)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def ask(lm: models.LanguageModel, questions: Sequence[Question], config: QuestionsConfig) -> list[Answer]:
    """Return the model's greedy answers with labels.

    A prompt starts with BOS, as every context of the corpus does. The generated ids are kept as they are; text is only
    read from them.

    Raises:
        InputError: a prompt with the answer does not fit the model's context.
    """
    prompts = [data.format_prompt(config.prompt, question) for question in questions]
    bos_id = find_bos_id(lm.tokenizer)
    prompt_ids = [(bos_id, *lm.tokenizer.encode(prompt, add_special_tokens=False)) for prompt in prompts]
    for question, ids in zip(questions, prompt_ids, strict=True):
        if len(ids) + config.max_new_tokens > lm.n_positions:
            raise InputError(
                f"question {question.id} has {len(ids)} tokens in its prompt; with questions.max_new_tokens "
                f"{config.max_new_tokens} that is more than the {lm.n_positions} that {lm.name} reads"
            )
    stop_ids = models.generate.stop_token_ids(lm.tokenizer, config.stop)
    outcomes = lm.generate(prompt_ids, max_new_tokens=config.max_new_tokens, stop_ids=stop_ids)
    answers = []
    for question, prompt, ids, outcome in zip(questions, prompts, prompt_ids, outcomes, strict=True):
        text = lm.tokenizer.decode(outcome.answer_ids, skip_special_tokens=True).strip()
        answers.append(
            Answer(
                **dataclasses.asdict(question),
                prompt=prompt,
                prompt_ids=ids,
                answer=text,
                answer_ids=outcome.answer_ids,
                label=int(data.is_hallucinated(text, question.answers)),
                logprobs=outcome.logprobs,
            )
        )
    return answers


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

    The rest of a torn chunk would be answered in other batches, with other last digits, so all of it is done again.

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


def _summary(answers: Sequence[Answer]) -> str:
    """Say how many answers are right and wrong, in all and by category."""
    by_category: dict[str, list[int]] = {}
    for answer in answers:
        by_category.setdefault(answer.category, []).append(answer.label)
    wrong = sum(answer.label for answer in answers)
    parts = [f"{category or 'all'} {sum(labels)}/{len(labels)}" for category, labels in sorted(by_category.items())]
    return f"{wrong} of {len(answers)} hallucinated ({', '.join(parts)})"
