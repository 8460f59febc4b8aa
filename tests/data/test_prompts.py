import sys

import pytest
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers

from jaxsae.artifacts import InputError, Question
from jaxsae.data import format_prompt, make_prompter
from jaxsae.data.prompts import FORMATS, encode_answer, encode_prompt, render_chat

QUESTION = Question("q1", "Who {knowledge} it?", ("I",), "g", knowledge="It was {question}.")
TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer that joins nothing but ". " to one token, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, ".Ġ"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [(".", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
    )


def test_format_prompt__replaces_the_placeholder_alone():
    assert format_prompt("{x} Q: {question} {}A:", "Is {it} {question}?") == "{x} Q: Is {it} {question}? {}A:"
    assert format_prompt("{question}", Question("1", "Who?", ("I",), "g")) == "Who?"


def test_format_prompt__puts_knowledge_in_without_looking_into_texts():
    assert format_prompt("{knowledge} | {question}", QUESTION) == "It was {question}. | Who {knowledge} it?"


def test_format_prompt__refuses_a_template_without_the_placeholder():
    with pytest.raises(InputError, match=r"questions\.prompt must hold \{question\}, got 'Q: \{\}'"):
        format_prompt("Q: {}", "Who?")
    with pytest.raises(InputError, match=r"questions\.prompt must hold \{question\}, got 'Hello'"):
        make_prompter("jsonl", prompt="Hello")


def test_format_prompt__names_a_question_without_knowledge():
    with pytest.raises(InputError, match=r"questions\.prompt holds \{knowledge\}, but question 7 comes with none"):
        format_prompt("{knowledge} {question}", Question("7", "Who?", ("I",), "g"))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("shots", [None, 0, 1, 5])
def test_make_prompter__shows_the_examples_it_is_asked_for(name, shots):
    own = FORMATS[name]
    if shots is not None and shots > len(own.examples):
        with pytest.raises(InputError, match=rf"questions\.shots is {shots}, but known_1000 has 0 examples"):
            make_prompter(name, shots=shots)
        return
    prompter = make_prompter(name, shots=shots)
    shown = own.shots if shots is None else shots
    text = prompter.prompt(Question("1", "Who?", ("I",), "g"), None)
    assert text.count("\n") == (0 if name == "known_1000" else 2 * shown + 1)
    assert [answer in text for _, answer in own.examples] == [i < shown for i in range(len(own.examples))]
    assert text.endswith("Who?" if name == "known_1000" else "Q: Who?\nA:")
    assert prompter.stop == (("\n", ".") if name == "known_1000" else ("\n",))


def test_few_shot_prompt__is_spelt_like_this():
    text = make_prompter("nq_open", shots=1).prompt(Question("1", "who is it", ("I",), "g"), None)
    assert text == "Q: In which sea does the island of Gotland lie?\nA: the Baltic Sea\nQ: who is it\nA:"


def test_make_prompter__takes_prompt_and_stop_as_given():
    prompter = make_prompter("nq_open", prompt="{question}!", stop=(";",))
    assert (prompter.template, prompter.stop, prompter.turns) == ("{question}!", (";",), ())
    assert make_prompter("nq_open", stop=()).stop == ()
    with pytest.raises(InputError, match=r"questions\.shots is 2, but questions\.prompt is not auto"):
        make_prompter("nq_open", prompt="{question}!", shots=2)


def test_chat__goes_through_the_tokenizers_template(tokenizer):
    prompter = make_prompter("jsonl", prompt="Say: {question}", chat=True)
    text = prompter.prompt(Question("1", "Who?", ("I",), "g"), tokenizer)
    assert text == "<|begin|>user\nSay: Who?<|end|>\n<|begin|>assistant\n"
    text = make_prompter("popqa", shots=1, chat=True).prompt(Question("1", "Who?", ("I",), "g"), tokenizer)
    ask = "Answer the question with a few words only.\n\n"
    assert text == (
        f"<|begin|>user\n{ask}In which sea does the island of Gotland lie?<|end|>\n"
        f"<|begin|>assistant\nthe Baltic Sea<|end|>\n<|begin|>user\n{ask}Who?<|end|>\n<|begin|>assistant\n"
    )
    assert make_prompter("popqa", chat=True).turns == ()


def test_encode_prompt__begins_with_one_bos(tokenizer):
    bos = tokenizer.bos_token_id
    plain, chat = encode_prompt("Who?", tokenizer), encode_prompt("<|begin|>user\nWho?", tokenizer)
    assert plain[0] == chat[0] == bos
    assert plain.count(bos) == chat.count(bos) == 1
    assert plain[1:] == tuple(tokenizer.encode("Who?", add_special_tokens=False))
    assert encode_prompt("", tokenizer) == (bos,)


def test_render_chat__refuses_a_tokenizer_without_a_template(tokenizer):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    words = r"questions\.chat is set, but the model's tokenizer has no chat template; unset questions\.chat"
    with pytest.raises(InputError, match=words):
        render_chat([{"role": "user", "content": "Who?"}], bare)


def test_render_chat__says_why_a_template_fails(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        InputError, match=r"the tokenizer's chat template cannot be used \(roles must alternate\); unset"
    ):
        render_chat([{"role": "user", "content": "Who?"}], tokenizer)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"questions\.chat needs the package jinja2; pip install jinja2"):
        render_chat([{"role": "user", "content": "Who?"}], tokenizer)


@pytest.mark.parametrize(("prompt", "joined"), [("A:", " Ann"), ("A: ", "Ann"), ("assistant\n", "Ann")])
def test_encode_answer__is_the_rest_of_one_tokenisation(tokenizer, prompt, joined):
    ids = encode_answer(prompt, " Ann ", tokenizer)
    assert tokenizer.decode(ids) == joined
    assert encode_prompt(prompt, tokenizer) + ids == encode_prompt(prompt + joined, tokenizer)


def test_encode_answer__refuses_a_token_across_the_boundary(tokenizer):
    words = r"does not begin a token where the answer 'Ann' begins, after 'He is\.'; let questions\.prompt end behind"
    with pytest.raises(InputError, match=words):
        encode_answer("He is.", "Ann", tokenizer)
