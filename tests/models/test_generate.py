"""Greedy answers against a plain loop and transformers, and stop tokens."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxsae import models
from jaxsae.artifacts import InputError
from jaxsae.models import generate


@pytest.fixture
def folder(write_model):
    return write_model(n_positions=12)[0]


@pytest.fixture
def lm(folder):
    return models.load(folder)


def random_prompts(seed=0):
    """Return 13 prompts of a few lengths (so that few shapes are compiled), the longest 3 below the context."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 37, length).tolist() for length in (1, 9, 2, 8, 9, 1, 2, 9, 8, 2, 8, 1, 9)]


def one_by_one(lm, prompt, n_new, stop_ids=frozenset()):
    """Continue one prompt by a plain loop over `lm.logits`, one token at a time, without padding."""
    text, answer, logprobs = list(prompt), [], []
    for _ in range(n_new):
        scores = np.asarray(lm.logits(np.array([text])))[0, -1].astype(np.float64)
        token = int(scores.argmax())
        if token in stop_ids:
            return answer, logprobs, True
        answer.append(token)
        logprobs.append(scores[token] - np.log(np.exp(scores - scores.max()).sum()) - scores.max())
        text.append(token)
    return answer, logprobs, False


def test_generate__a_batch_of_any_lengths_equals_one_prompt_and_one_token_at_a_time(lm):
    prompts = random_prompts()
    free = lm.generate(prompts, max_new_tokens=3)
    stop_ids = frozenset({free[0].answer_ids[0], free[1].answer_ids[1], free[2].answer_ids[2]})
    found = lm.generate(prompts, max_new_tokens=3, stop_ids=stop_ids)
    expected = [one_by_one(lm, prompt, 3, stop_ids) for prompt in prompts]
    assert [(g.answer_ids, g.stopped) for g in found] == [(tuple(ids), stopped) for ids, _, stopped in expected]
    for generation, (_, logprobs, _) in zip(found, expected, strict=True):
        np.testing.assert_allclose(generation.logprobs, logprobs, atol=2e-5)
    assert {g.stopped for g in found} == {True, False}
    assert len({len(g.answer_ids) for g in found}) > 2


def test_generate__equals_transformers(folder, lm):
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    prompts = random_prompts(seed=1)
    found = lm.generate(prompts, max_new_tokens=3)
    for prompt, generation in zip(prompts, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            whole = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=None
            )
        assert generation.answer_ids == tuple(whole[0, len(prompt) :].tolist())
        assert not generation.stopped


def test_generate__small_batches_equal_large_ones(lm, monkeypatch):
    prompts = random_prompts()
    large = lm.generate(prompts, max_new_tokens=3)
    monkeypatch.setattr(generate, "TOKENS_PER_BATCH", 40)
    small = lm.generate(prompts, max_new_tokens=3)
    assert [g.answer_ids for g in small] == [g.answer_ids for g in large]
    for one, other in zip(small, large, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_generate__a_stop_token_at_once_gives_an_empty_answer(lm):
    first = lm.generate([[1, 2]], max_new_tokens=1)[0].answer_ids[0]
    [stopped] = lm.generate([np.array([1, 2])], max_new_tokens=3, stop_ids=frozenset({first}))
    assert stopped == generate.Generation((), (), True)


def test_generate__no_prompts_give_no_answers(lm):
    assert lm.generate([], max_new_tokens=3) == []


def test_generate__in_bfloat16_follows_its_own_logits(folder):
    lm = models.load(folder, dtype="bfloat16")
    [found] = lm.generate([[1, 2, 3]], max_new_tokens=2)
    expected, logprobs, _ = one_by_one(lm, [1, 2, 3], 2)
    assert found.answer_ids == tuple(expected)
    # Rounding to bfloat16 depends on the last float32 bit, which depends on the padded length.
    np.testing.assert_allclose(found.logprobs, logprobs, atol=2e-2)


def test_generate__compiles_one_program_for_lengths_padded_alike(lm):
    before = generate._decode._cache_size()
    lm.generate([[1] * n for n in (1, 5, 8, 3)], max_new_tokens=3)
    lm.generate([[1] * n for n in (2, 6, 7, 4)], max_new_tokens=3, stop_ids=frozenset({1}))
    assert generate._decode._cache_size() == before + 1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 has shape \\[0\\]"),
        ([[1], [2, 37]], {}, "prompt 1 holds token id 37, outside the vocabulary, 0 to 36"),
        ([[-1]], {}, "prompt 0 holds token id -1"),
        ([np.array([0.5])], {}, "prompt 0 has dtype float64"),
        ([[1] * 10], {}, "prompt 0 has 10 tokens, which with max_new_tokens = 3 does not fit into the context of 12"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ([[1]], {"stop_ids": frozenset({37})}, "stop id 37 is outside the vocabulary, 0 to 36"),
    ],
    ids=str,
)
def test_generate__names_the_prompt_it_cannot_continue(lm, prompts, options, message):
    with pytest.raises(InputError, match=message):
        lm.generate(prompts, **{"max_new_tokens": 3, **options})


def test_generate__stops_at_logits_that_are_not_finite(lm):
    lm.params["ln_f"]["weight"] = lm.params["ln_f"]["weight"] * np.float32(np.inf)
    with pytest.raises(InputError, match="the logits for prompt 0 are not finite"):
        lm.generate([[1, 2]], max_new_tokens=2)


def test_stop_token_ids__are_all_tokens_containing_a_stop_string_and_the_end_of_text(tmp_path, train_tokenizer):
    exact = train_tokenizer(tmp_path, 270)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    # A token written by the byte-level alphabet: "Ċ" is a newline.
    expected = {i for token, i in exact.get_vocab().items() if "." in token or "Ċ" in token}
    assert len(expected) >= 2
    assert generate.stop_token_ids(tokenizer, [".", "\n"]) == expected | {0}
    assert generate.stop_token_ids(tokenizer, ["\n"]) < generate.stop_token_ids(tokenizer, [".", "\n"])
    assert generate.stop_token_ids(tokenizer, []) == {0}


def test_stop_token_ids__need_a_tokenizer_and_no_empty_string(tmp_path, train_tokenizer):
    with pytest.raises(InputError, match=r"stop strings \['\.'\] need a tokenizer"):
        generate.stop_token_ids(None, ["."])
    train_tokenizer(tmp_path, 270)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"stop strings \['\.', ''\] hold an empty string"):
        generate.stop_token_ids(tokenizer, [".", ""])


def test_padded_length__is_at_least_the_length_and_wastes_at_most_half():
    padded = [generate._padded_length(n) for n in range(1, 1025)]
    assert all(n <= size <= max(8, 1.5 * n) for n, size in enumerate(padded, start=1))
    assert len(set(padded)) < 20
    assert jax.tree.leaves(padded[:17]) == [8] * 8 + [12] * 4 + [16] * 4 + [24]
