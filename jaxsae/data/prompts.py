"""How a question is put to a language model: few-shot text, or the turns of a chat; and where the answer ends.

Every question set has a format of its own. Its worked examples were written for this project and are in none of the
sets. A cloze ("Vinson Massif is located in the continent of") is its own prompt.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jaxsae.artifacts import InputError, Question
from jaxsae.data.tokens import find_bos_id

AUTO = "auto"
_PLACEHOLDERS = re.compile(r"\{question\}|\{knowledge\}")

_SHORT_EXAMPLES = (
    ("In which sea does the island of Gotland lie?", "the Baltic Sea"),
    ("How many strings does a cello usually have?", "four"),
    ("Which river flows through the town of Würzburg?", "the Main"),
    ("Brass is made of copper and which other metal?", "zinc"),
    ("Who wrote the fairy tale of the steadfast tin soldier?", "Hans Christian Andersen"),
)
_SENTENCE_EXAMPLES = (
    ("Does the moon shine with a light of its own?", "No, the moon reflects the light of the sun."),
    ("How do most bats find their way at night?", "Most bats find their way by echoes of their own calls."),
    ("What does a barometer tell a sailor?", "It tells the pressure of the air, which falls before a storm."),
    ("Why does bread dough rise?", "Dough rises because yeast makes carbon dioxide in it."),
    ("Can a ship made of steel float?", "Yes, a steel hull floats because it displaces enough water."),
)


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """A set's way of asking.

    Attributes:
        question: the prompt, or the end of it behind the worked examples.
        answer: what joins a worked example's answer to its question's prompt and closes it.
        examples: (question, answer), as many as can be shown.
        shots: how many are shown unless asked otherwise.
        stop: the answer ends before the first token that holds one of these.
        chat: the message to a chat model.
    """

    question: str = "Q: {question}\nA:"
    answer: str = " {answer}\n"
    examples: tuple[tuple[str, str], ...] = _SHORT_EXAMPLES
    shots: int = 3
    stop: tuple[str, ...] = ("\n",)
    chat: str = "Answer the question with a few words only.\n\n{question}"


FORMATS = {
    "jsonl": PromptFormat(shots=0),
    "csv": PromptFormat(shots=0),
    "truthfulqa": PromptFormat(
        examples=_SENTENCE_EXAMPLES, chat="Answer the question in one short sentence.\n\n{question}"
    ),
    "halueval": PromptFormat(),
    "triviaqa": PromptFormat(),
    "nq_open": PromptFormat(),
    "popqa": PromptFormat(),
    "known_1000": PromptFormat(
        question="{question}",
        examples=(),
        shots=0,
        stop=("\n", "."),
        chat="Complete the sentence. Give only the missing words.\n\n{question}",
    ),
}


@dataclasses.dataclass(frozen=True)
class Prompter:
    """What one run asks with.

    Attributes:
        template: the whole prompt or, in a chat, the user's last message; holds "{question}".
        turns: earlier messages of a chat, (user, assistant).
        stop: strings that end an answer.
        is_chat: whether the tokenizer's chat template is used.
    """

    template: str
    turns: tuple[tuple[str, str], ...]
    stop: tuple[str, ...]
    is_chat: bool

    def prompt(self, question: Question, tokenizer: Any) -> str:
        """Return the text given to the model, without the BOS that `encode_prompt` adds.

        Raises:
            InputError: the question lacks the knowledge that the template asks for, or the tokenizer has no chat
                template or one that cannot be used.
        """
        text = format_prompt(self.template, question)
        if not self.is_chat:
            return text
        roles = [(role, said) for turn in self.turns for role, said in zip(("user", "assistant"), turn, strict=True)]
        messages = [{"role": role, "content": said} for role, said in [*roles, ("user", text)]]
        return render_chat(messages, tokenizer)


def make_prompter(
    format: str, *, prompt: str = AUTO, shots: int | None = None, stop: Sequence[str] = (AUTO,), chat: bool = False
) -> Prompter:
    """Return what asks the questions of a set.

    Args:
        format: one of `FORMATS`.
        prompt: "auto" for the set's own, else a template with "{question}" and, if it likes, "{knowledge}".
        shots: worked examples in the set's own prompt; None for the set's own number, in a chat for none.
        stop: ("auto",) for the set's own.
        chat: ask through the tokenizer's chat template.

    Raises:
        InputError: there are not so many examples, `shots` is given with a prompt that is not the set's own, or the
            template has no "{question}".
    """
    own = FORMATS[format]
    stop = own.stop if tuple(stop) == (AUTO,) else tuple(stop)
    if prompt != AUTO:
        if shots is not None:
            raise InputError(
                f"questions.shots is {shots}, but questions.prompt is not auto; write them into the prompt"
            )
        _check_template(prompt)
        return Prompter(prompt, (), stop, chat)
    shots = (0 if chat else own.shots) if shots is None else shots
    if shots > len(own.examples):
        raise InputError(f"questions.shots is {shots}, but {format} has {len(own.examples)} examples; ask for fewer")
    examples = own.examples[:shots]
    if chat:
        turns = tuple((_fill(own.chat, {"{question}": question}), answer) for question, answer in examples)
        return Prompter(own.chat, turns, stop, chat)
    shown = (
        _fill(own.question, {"{question}": question}) + own.answer.replace("{answer}", answer)
        for question, answer in examples
    )
    return Prompter("".join(shown) + own.question, (), stop, chat)


def format_prompt(template: str, question: Question | str) -> str:
    """Return `template` with question and knowledge in place of "{question}" and "{knowledge}"; other braces stay.

    Raises:
        InputError: the template has no "{question}", or has "{knowledge}" and the question none.
    """
    _check_template(template)
    asked = question.question if isinstance(question, Question) else question
    knowledge = question.knowledge if isinstance(question, Question) else ""
    if "{knowledge}" in template and not knowledge:
        name = question.id if isinstance(question, Question) else repr(question)
        raise InputError(f"questions.prompt holds {{knowledge}}, but question {name} comes with none")
    return _fill(template, {"{question}": asked, "{knowledge}": knowledge})


def _check_template(template: str) -> None:
    if "{question}" not in template:
        raise InputError(f"questions.prompt must hold {{question}}, got {template!r}")


def _fill(template: str, texts: dict[str, str]) -> str:
    """Replace the placeholders in one pass, so that braces inside a text stay."""
    return _PLACEHOLDERS.sub(lambda match: texts.get(match.group(), match.group()), template)


def render_chat(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """Return the messages in the tokenizer's chat template, up to where the model's turn begins.

    Raises:
        InputError: there is no chat template, it cannot be used, or the package jinja2 that runs it is missing.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("questions.chat is set, but the model's tokenizer has no chat template; unset questions.chat")
    try:
        import jinja2
    except ImportError:
        raise InputError("questions.chat needs the package jinja2; pip install jinja2") from None
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the tokenizer's chat template cannot be used ({reason}); unset questions.chat") from None


def encode_prompt(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Return a prompt's token ids behind one BOS, as every context of the corpus begins; never a second BOS.

    Raises:
        InputError: the tokenizer has neither BOS nor EOS.
    """
    bos_id = find_bos_id(tokenizer)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return ids if ids[:1] == (bos_id,) else (bos_id, *ids)


def encode_answer(prompt: str, answer: str, tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids that follow the prompt's when prompt and answer are tokenised as one text.

    A space comes between them unless the prompt ends in white space.

    Raises:
        InputError: the answer gives no token, or a token straddles the boundary, so that no model would go on so.
    """
    text = prompt + answer.strip() if prompt[-1:].isspace() else f"{prompt} {answer.strip()}"
    before, whole = encode_prompt(prompt, tokenizer), encode_prompt(text, tokenizer)
    if whole[: len(before)] != before or len(whole) == len(before):
        raise InputError(
            f"the tokenizer does not begin a token where the answer {answer[:80]!r} begins, after {prompt[-20:]!r}; "
            "let questions.prompt end behind a word or mark"
        )
    return whole[len(before) :]
