"""Latents taken out of the language model: what is subtracted, where, and what the rest of the model makes of it."""

import jax
import numpy as np
import pytest

from jaxsae.artifacts import InputError
from jaxsae.features import read_ablated, read_prefixes

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
HALF = {"rtol": 2**-9, "atol": 2e-3}


@pytest.fixture(scope="module")
def streams(close):
    ids = np.array([close.answer.prompt_ids + close.answer.answer_ids])
    return np.asarray(close.lm.residuals(ids))


def strongest(close, streams, layer):
    """Return the latent with the largest sum over the tokens that are read, and its share of the stream there."""
    feats = np.asarray(close.suite.layer(layer).encode(streams[layer, 0]))
    latent = int(feats[4:].sum(axis=0).argmax())
    share = np.zeros_like(streams[layer])
    share[0, 4:] = feats[4:, latent, None] * np.asarray(close.suite.W_dec[layer, latent])
    return latent, share


def logprobs(close, logits):
    return np.asarray(jax.nn.log_softmax(logits[0, 4:-1]))[np.arange(6), close.answer.answer_ids]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_read_ablated__of_one_layer_equals_running_on_from_the_edited_stream(close, streams, layer):
    latent, share = strongest(close, streams, layer)
    (answer,), kept = read_ablated(close.lm, close.suite, close.answer, [[(layer, latent)]], **close.how)
    edited = streams[layer] - share
    expected = logprobs(close, close.lm.logits_from(layer, edited))
    np.testing.assert_allclose(answer.logprobs, expected, **CLOSE)
    np.testing.assert_allclose(kept.resid[0, layer, 0], edited[0, 4], **HALF)
    np.testing.assert_allclose(kept.resid[0, layer, 1], edited[0, -1], **HALF)
    np.testing.assert_allclose(kept.resid[0, :layer, 1], streams[:layer, 0, -1], **HALF)
    assert np.abs(np.array(answer.logprobs) - logprobs(close, close.lm.logits_from(layer, streams[layer]))).max() > 0.01


def test_read_ablated__leaves_the_prompt_before_its_last_token_alone(close, streams):
    """What earlier tokens hold cannot be told from the answer's positions, but the share taken out there would."""
    latent, _ = strongest(close, streams, 0)
    (answer,), _ = read_ablated(close.lm, close.suite, close.answer, [[(0, latent)]], **close.how)
    feats = np.asarray(close.suite.layer(0).encode(streams[0, 0]))[:, latent]
    assert (feats[:4] > 0).any()
    everywhere = streams[0] - feats[:, None] * np.asarray(close.suite.W_dec[0, latent])
    assert np.abs(np.array(answer.logprobs) - logprobs(close, close.lm.logits_from(0, everywhere))).max() > 1e-3


def test_read_ablated__of_two_layers_subtracts_what_is_left_at_the_second(close, streams):
    first, _ = strongest(close, streams, 0)
    # The stream of layer 2 after the first ablation, from the model without layers 0 and 1.
    after = read_ablated(close.lm, close.suite, close.answer, [[(0, first)]], **close.how)[1].resid[0, 2, 1]
    feats = np.asarray(close.suite.layer(2).encode(after.astype(np.float32)[None]))[0]
    second = int(feats.argmax())
    both = read_ablated(close.lm, close.suite, close.answer, [[(0, first), (2, second)]], **close.how)[1]
    expected = after - feats[second] * np.asarray(close.suite.W_dec[2, second])
    np.testing.assert_allclose(both.resid[0, 2, 1], expected, rtol=2**-8, atol=5e-3)
    before = np.asarray(close.suite.layer(2).encode(streams[2, 0]))[-1, second]
    assert abs(before - feats[second]) > 0.05  # the second is not what it was in the whole model


def test_read_ablated__of_nothing_is_the_model_as_it_is(close):
    reading = read_prefixes(close.lm, close.suite, close.answer, **close.how)
    (answer,), kept = read_ablated(close.lm, close.suite, close.answer, [[]], **close.how)
    np.testing.assert_allclose(answer.logprobs, reading.cuts[-1].logprobs, **CLOSE)
    np.testing.assert_array_equal(kept.feature_ids[0], reading.features.feature_ids[-1])
    np.testing.assert_allclose(kept.activations[0], reading.features.activations[-1], **CLOSE)


def test_read_ablated__row_by_row_equals_all_together(close):
    """Eleven are two batches; five latents of a layer are more than a group of slots."""
    ablations = [[(0, latent), (1, 12 - latent)] for latent in range(10)] + [[(1, latent) for latent in range(5)]]
    answers, kept = read_ablated(close.lm, close.suite, close.answer, ablations, **close.how)
    for row, pairs in enumerate(ablations):
        (alone,), one = read_ablated(close.lm, close.suite, close.answer, [pairs], **close.how)
        np.testing.assert_allclose(answers[row].logprobs, alone.logprobs, **CLOSE)
        np.testing.assert_array_equal(kept.feature_ids[row], one.feature_ids[0])
    assert len({answer.logprobs for answer in answers}) > 5  # some of these latents are silent, and change nothing
    assert kept.ids == tuple(str(row) for row in range(11))


@pytest.mark.parametrize("pair", [(3, 0), (0, 13), (0, -1)])
def test_read_ablated__refuses_what_the_suite_has_not(close, pair):
    with pytest.raises(InputError, match=rf"latents \[{pair[1]}\] of layer {pair[0]} .* the suite has 13 of 3 layers"):
        read_ablated(close.lm, close.suite, close.answer, [[pair]], **close.how)
