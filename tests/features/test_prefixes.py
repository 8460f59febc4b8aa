"""An answer cut after each of its tokens: every cut is what the cut answer alone would give."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxsae.artifacts import InputError
from jaxsae.features import encode_answers, read_prefixes

# One pass over the whole text or over a part of it: products of other shapes differ in their last bits, and `resid` is
# rounded to float16, whose spacing is 2^-10 of a number.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
HALF = {"rtol": 2**-9, "atol": 1e-3}


@pytest.fixture(scope="module")
def reading(close):
    return read_prefixes(close.lm, close.suite, close.answer, **close.how)


def test_read_prefixes__equals_encoding_each_cut_as_an_answer_of_its_own(close, reading):
    n_tokens = len(close.answer.answer_ids)
    cuts = [dataclasses.replace(close.of_length(n), id=str(n)) for n in range(1, n_tokens + 1)]
    names = ("last_prompt", "first_answer", "last_answer", "answer_max", "answer_mean")
    alone = encode_answers(close.lm, close.suite, cuts, keep=6, positions=names, batch=2)
    kept = reading.features
    assert kept.ids == alone.ids == tuple(cut.id for cut in reading.cuts)
    np.testing.assert_array_equal(kept.feature_ids[:, :, :5], alone.feature_ids)
    np.testing.assert_allclose(kept.activations[:, :, :5], alone.activations, **CLOSE)
    np.testing.assert_allclose(kept.recon_error[:, :, :5], alone.recon_error, **CLOSE)
    np.testing.assert_allclose(kept.resid, alone.resid, **HALF)
    np.testing.assert_allclose(kept.token_directions, alone.token_directions, **CLOSE)
    assert kept.token_directions.any(axis=2).all()
    assert (np.diff(kept.activations[:, :, 3, 0], axis=0) >= 0).all()  # a maximum over more tokens is no smaller
    assert (kept.feature_ids[0, :, 6] == -1).all()  # the first cut has no second token
    assert (kept.feature_ids[1, :, 6] >= 0).any()


def test_read_prefixes__gives_log_probabilities_and_entropies_of_the_answer_s_tokens(close, reading):
    ids = np.array([close.answer.prompt_ids + close.answer.answer_ids])
    logits = np.asarray(close.lm.logits(ids)[0], np.float64)[4:-1]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = log_p[np.arange(6), close.answer.answer_ids]
    for n, cut in enumerate(reading.cuts, start=1):
        np.testing.assert_allclose(cut.logprobs, expected[:n], **CLOSE)
        np.testing.assert_allclose(cut.entropies, -(np.exp(log_p) * log_p).sum(-1)[:n], **CLOSE)
    np.testing.assert_array_equal(np.diff(reading.features.offsets), range(1, 7))
    np.testing.assert_allclose(reading.features.logprobs[-6:], expected, **CLOSE)


def test_read_prefixes__spells_the_cuts_and_keeps_the_whole_answer_s_text(reading):
    assert [cut.answer for cut in reading.cuts] == ["l", "lc", "lci", "lcii", "lciiz", "given"]


def test_read_prefixes__keeps_every_active_latent_of_every_token(close, reading):
    ids = np.array([close.answer.prompt_ids + close.answer.answer_ids])
    feats = np.asarray(close.suite.encode(close.lm.residuals(ids)[:, 0]))[:, 4:]
    found = np.stack([layer.toarray() for layer in reading.token_features])
    np.testing.assert_allclose(found, feats, **CLOSE)
    assert (found > 0).any(axis=2).all()


def test_read_prefixes__reads_an_empty_answer_at_the_last_prompt_token(close):
    reading = read_prefixes(close.lm, close.suite, close.of_length(0), **close.how)
    assert [(cut.id, cut.answer_ids, cut.logprobs) for cut in reading.cuts] == [("0", (), ())]
    kept = reading.features
    for position in range(1, 6):
        np.testing.assert_array_equal(kept.feature_ids[:, :, position], kept.feature_ids[:, :, 0])
    assert [layer.shape[0] for layer in reading.token_features] == [1, 1, 1]


def test_read_prefixes__of_a_text_beyond_the_context_is_refused(close):
    long = dataclasses.replace(close.answer, answer_ids=(1,) * 36)
    with pytest.raises(InputError, match=r"one: the prompt has 5 tokens and the answer 36, together 41; the .* is 40"):
        read_prefixes(close.lm, close.suite, long, **close.how)
