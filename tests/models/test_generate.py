"""Answers, greedy and drawn, against plain loops and transformers; their residual streams; what ends an answer."""

import dataclasses
import os
from typing import ClassVar

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
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


def test_entropies__are_of_the_whole_distribution_that_each_answer_id_was_chosen_from(lm):
    prompts = random_prompts(seed=2)
    for prompt, generation in zip(prompts, lm.generate(prompts, max_new_tokens=3), strict=True):
        text = np.array([[*prompt, *generation.answer_ids]])
        scores = np.asarray(lm.logits(text))[0, len(prompt) - 1 : -1].astype(np.float64)
        logprobs = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
        np.testing.assert_allclose(generation.entropies, -(np.exp(logprobs) * logprobs).sum(-1), atol=2e-5)


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
    assert stopped == generate.Generation((), (), (), True)


def test_generate__no_prompts_give_no_answers(lm):
    assert lm.generate([], max_new_tokens=3) == []


def test_generate__in_bfloat16_follows_its_own_logits(folder):
    lm = models.load(folder, dtype="bfloat16")
    [found] = lm.generate([[1, 2, 3]], max_new_tokens=2)
    expected, logprobs, _ = one_by_one(lm, [1, 2, 3], 2)
    assert found.answer_ids == tuple(expected)
    # Rounding to bfloat16 depends on the last float32 bit, which depends on the padded length.
    np.testing.assert_allclose(found.logprobs, logprobs, atol=2e-2)


def test_generate__compiles_two_programs_for_lengths_padded_alike(lm):
    programs = (generate._start, generate._advance)
    before = [program._cache_size() for program in programs]
    lm.generate([[1] * n for n in (1, 5, 8, 3)], max_new_tokens=3)
    lm.generate([[1] * n for n in (2, 6, 7, 4)], max_new_tokens=3, stop_ids=frozenset({1}))
    assert [program._cache_size() for program in programs] == [n + 1 for n in before]


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
        ([[1]], {"stop_strings": ["."]}, r"stop strings \['\.'\] need a tokenizer"),
        ([[1]], {"stop_strings": "\n\n"}, r"stop_strings is the string '\\n\\n', expected a list"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5, expected 0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0, expected a number above 0"),
        ([[1]], {"top_p": 0.5}, "top_p is 0.5, which has no effect at temperature 0"),
        ([[1]], {"n_rows": 0}, "n_rows is 0, expected at least 1"),
    ],
    ids=str,
)
def test_generate__names_the_prompt_it_cannot_continue(lm, prompts, options, message):
    with pytest.raises(InputError, match=message):
        lm.generate(prompts, **{"max_new_tokens": 3, **options})


def test_generate__of_a_text_says_how_it_becomes_token_ids(lm):
    with pytest.raises(InputError, match=r"prompt 1 is a text; give its token ids, jaxsae\.data\.encode_prompt"):
        generate._check_prompts(lm.config, [[1], "What is it?"], 3)


def test_generate__stops_at_logits_that_are_not_finite(lm):
    lm.params["ln_f"]["weight"] = lm.params["ln_f"]["weight"] * np.float32(np.inf)
    with pytest.raises(InputError, match="the logits for prompt 0 are not finite"):
        lm.generate([[1, 2]], max_new_tokens=2)


def assert_same_answers(found, expected, *, exactly=False):
    assert [(g.answer_ids, g.stopped) for g in found] == [(g.answer_ids, g.stopped) for g in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=0 if exactly else 2e-5)


def test_generate__over_stacked_weights_equals_unstacked_ones(lm, monkeypatch):
    options = {"max_new_tokens": 3, "keep_residuals": True}
    unstacked = lm.generate(random_prompts(), **options)
    monkeypatch.setattr(generate, "_unstack", lambda params: params)
    stacked = lm.generate(random_prompts(), **options)
    assert_same_answers(stacked, unstacked)
    for one, other in zip(stacked, unstacked, strict=True):
        np.testing.assert_allclose(one.residuals, other.residuals, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate__on_a_cpu_unstacks_blocks_without_a_copy(write_model, dtype):
    params = models.load(write_model(n_embd=32, n_inner=48)[0], dtype=dtype).params
    unstacked = generate._unstack(params)
    assert len(unstacked["blocks"]) == 3
    for layer, block in enumerate(unstacked["blocks"]):
        for stacked, leaf in zip(jax.tree.leaves(params["blocks"]), jax.tree.leaves(block), strict=True):
            assert (leaf.shape, leaf.dtype) == (stacked.shape[1:], stacked.dtype)
            assert leaf.unsafe_buffer_pointer() == stacked.unsafe_buffer_pointer() + layer * leaf.nbytes


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}], ids=str)
def test_generate__a_prompt_in_a_batch_and_alone_gives_the_same_tokens(lm, options):
    prompts = random_prompts()[:5]
    together = lm.generate(prompts, max_new_tokens=3, seed=4, **options)
    alone = [lm.generate([prompt], max_new_tokens=3, seed=4, **options)[0] for prompt in prompts]
    assert_same_answers(alone, together)


def test_generate__in_batches_of_a_stated_size_does_not_depend_on_the_other_prompts(lm):
    prompts = random_prompts()
    together = lm.generate(prompts, max_new_tokens=3, n_rows=4)
    alone = [lm.generate([prompt], max_new_tokens=3, n_rows=4)[0] for prompt in prompts]
    assert_same_answers(alone, together, exactly=True)


@pytest.mark.parametrize("dispatch", [1, 2, 8])
def test_generate__keeps_the_residual_streams_of_the_answers(lm, monkeypatch, assert_close_per_token, dispatch):
    monkeypatch.setattr(generate, "STEPS_PER_DISPATCH", dispatch)
    jax.clear_caches()
    prompts = random_prompts()[:5]
    plain = lm.generate(prompts, max_new_tokens=3)
    stop_ids = {plain[0].answer_ids[1], plain[1].answer_ids[2]}
    found = lm.generate(prompts, max_new_tokens=3, stop_ids=stop_ids, keep_residuals=True)
    assert len({len(generation.answer_ids) for generation in found}) > 1
    for prompt, generation in zip(prompts, found, strict=True):
        n_new = len(generation.answer_ids)
        assert generation.residuals.shape == (lm.n_layers, n_new, lm.d_model)
        expected = np.asarray(lm.residuals(np.array([[*prompt, *generation.answer_ids]])))[:, 0, len(prompt) :]
        if n_new:
            assert_close_per_token(generation.residuals, expected)
    assert all(generation.residuals is None for generation in plain)


def test_generate__fills_the_context_to_its_last_position(lm):
    [found] = lm.generate([[1, 2, 3, 4]], max_new_tokens=8, keep_residuals=True)
    assert 4 + len(found.answer_ids) == lm.n_positions
    assert found.answer_ids == tuple(one_by_one(lm, [1, 2, 3, 4], 8)[0])


def test_generate__at_a_temperature_near_0_is_greedy(lm):
    greedy = lm.generate(random_prompts(), max_new_tokens=3)
    assert_same_answers(lm.generate(random_prompts(), max_new_tokens=3, temperature=1e-4), greedy)


def test_generate__draws_are_a_function_of_the_seed_and_differ_for_equal_prompts(lm):
    def draw(seed):
        return [g.answer_ids for g in lm.generate([[1, 2]] * 40, max_new_tokens=3, temperature=2.0, seed=seed)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert len(set(draw(0))) > 10


def top_p_by_sorting(probs, top_p):
    """Return the distribution over the fewest most probable tokens that hold `top_p` of the probability."""
    order = np.argsort(-probs)
    n_kept = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
    kept = np.zeros_like(probs)
    kept[order[:n_kept]] = probs[order[:n_kept]]
    return kept / kept.sum()


def assert_drawn_from(counts, expected):
    """Fail when a chi-square test, which a sound sampler fails once in 10^4 seeds, tells the two apart."""
    assert counts[expected == 0].sum() == 0
    wanted = expected * counts.sum()
    rare = wanted < 5  # pooled, as the test asks for
    observed, wanted = (np.append(values[~rare], values[rare].sum()) for values in (counts, wanted))
    assert scipy.stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.7), (2.0, 0.9)])
def test_generate__draws_from_the_distribution_it_should(lm, temperature, top_p):
    scores = np.asarray(lm.logits(np.array([[5, 6]])))[0, -1].astype(np.float64) / temperature
    expected = top_p_by_sorting(np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum(), top_p)
    drawn = lm.generate([[5, 6]] * 4000, max_new_tokens=1, temperature=temperature, top_p=top_p)
    assert_drawn_from(np.bincount([g.answer_ids[0] for g in drawn], minlength=lm.n_vocab), expected)


def test_generate__draws_the_second_token_whatever_noise_drew_the_first(lm):
    drawn = [g.answer_ids for g in lm.generate([[5, 6]] * 4000, max_new_tokens=2, temperature=1.5)]
    firsts = np.array(drawn)[:, 0]
    likeliest = int(np.bincount(firsts).argmax())
    scores = np.asarray(lm.logits(np.array([[5, 6, likeliest]])))[0, -1].astype(np.float64) / 1.5
    expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    counts = np.bincount(np.array(drawn)[firsts == likeliest, 1], minlength=lm.n_vocab)
    assert_drawn_from(counts, expected)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.77, 0.999])
def test_is_in_top_p__equals_sorting(top_p):
    probs = np.random.default_rng(0).dirichlet(np.full(50, 0.3), 7).astype(np.float32)
    found = np.asarray(generate._is_in_top_p(jnp.asarray(probs), jnp.float32(top_p)))
    expected = [top_p_by_sorting(row.astype(np.float64), top_p) > 0 for row in probs]
    np.testing.assert_array_equal(found, expected)


def test_generate__log_probabilities_are_of_the_model_at_temperature_1(lm):
    [drawn] = lm.generate([[1, 2]], max_new_tokens=3, temperature=3.0, top_p=0.9)
    text = np.array([[1, 2, *drawn.answer_ids]])
    logprobs = np.asarray(jax.nn.log_softmax(lm.logits(text)))[0, 1:4]
    np.testing.assert_allclose(drawn.logprobs, logprobs[range(3), drawn.answer_ids], atol=2e-5)


class Letters:
    """A tokenizer whose token i is one of these texts; ids 4 and 5 are the two bytes of one character."""

    TEXTS: ClassVar = ("a", "b", ".", "\n", None, None, "Q:", " c\nQ")

    def decode(self, ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        parts = {4: b"\xc3", 5: b"\xa9"}
        return b"".join(parts.get(i) or self.TEXTS[i].encode() for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("ids", "strings", "expected"),
    [
        ([0, 1, 0], ["ab"], 0),
        ([0, 0, 1, 0], ["ab", "aba"], 1),  # "ab" is complete first
        ([0, 1, 2, 3], ["ab.\n", "b."], 1),  # and so is "b."
        ([0, 2, 3, 6, 1], ["\nQ:"], 2),
        ([0, 7, 6], ["\nQ"], 1),  # begins within a token
        ([0, 1], ["ba", "\n"], None),
        ([], ["a"], None),
        ([4, 5, 0, 1], ["\u00e9a"], 0),
        ([0, 4, 5, 1], ["b"], 3),  # the first byte of the character alone is no end
        ([1, 4, 5, 1], ["\u00e9"], 1),
    ],
    ids=str,
)
def test_n_before_stop_string__counts_the_tokens_that_end_before_it(ids, strings, expected):
    assert generate._n_before_stop_string(Letters(), strings, ids) == expected


@pytest.mark.parametrize("dispatch", [1, 2, 8])
def test_generate__stops_before_a_string_that_several_tokens_spell(lm, monkeypatch, dispatch):
    class Spelled:
        def decode(self, ids, **_):
            return "".join(f"<{i}>" for i in ids)

    monkeypatch.setattr(generate, "STEPS_PER_DISPATCH", dispatch)
    jax.clear_caches()
    spelled = dataclasses.replace(lm, tokenizer=Spelled())
    prompts = [[1, 2, 3], [4, 5]]
    free = lm.generate(prompts, max_new_tokens=8, keep_residuals=True)
    first, second = free[0].answer_ids[4:6]
    found = spelled.generate(prompts, max_new_tokens=8, stop_strings=["no", f"{first}><{second}"], keep_residuals=True)
    texts = [Spelled().decode(g.answer_ids) for g in free]
    for one, whole, text in zip(found, free, texts, strict=True):
        at = text.find(f"{first}><{second}")
        n_kept = 8 if at < 0 else text[:at].count(">")
        assert one.stopped == (at >= 0)
        assert one.answer_ids == whole.answer_ids[:n_kept]
        np.testing.assert_array_equal(one.logprobs, whole.logprobs[:n_kept])
        np.testing.assert_array_equal(one.residuals, whole.residuals[:, :n_kept])
    assert found[0].stopped


def test_generate__reports_progress_after_each_batch(lm):
    seen = []
    lm.generate(random_prompts(), max_new_tokens=3, n_rows=8, on_progress=seen.append)
    assert seen == [8, 9, 13]


def test_generate__over_several_devices_equals_one(lm, folder):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = models.load(folder, mesh=mesh, sharding="split")
    options = {"max_new_tokens": 3, "keep_residuals": True}
    assert_same_answers(split.generate(random_prompts(), **options), lm.generate(random_prompts(), **options))


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
