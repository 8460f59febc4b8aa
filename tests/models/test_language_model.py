"""What a loaded model checks at its door."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsae import models
from jaxsae.artifacts import InputError

TOKEN_IDS = np.random.default_rng(0).integers(0, 37, (2, 11))


@pytest.fixture
def lm(write_model):
    return models.load(write_model()[0])


def test_sizes__come_from_the_config(lm):
    assert (lm.n_layers, lm.d_model, lm.n_vocab, lm.n_positions) == (3, 24, 37, 19)
    assert lm.config.model_type == "gpt2"


@pytest.mark.parametrize(
    ("written", "expected"),
    [(50256, None), (36, 36), (37, None), (-1, None), (None, None), (0, 0), ((50256, 7, 9), 7)],
)
def test_special_ids__outside_the_vocabulary_count_as_absent(write_model, written, expected):
    bos = written if not isinstance(written, tuple) else written[1]
    lm = models.load(write_model(eos_token_id=written, bos_token_id=bos)[0])
    assert (lm.eos_id, lm.bos_id) == (expected, expected)


def test_methods__agree_with_each_other(lm):
    resid, logits = lm.residuals_and_logits(TOKEN_IDS)
    np.testing.assert_allclose(lm.residuals(TOKEN_IDS), resid, atol=1e-5)
    np.testing.assert_allclose(lm.logits(TOKEN_IDS), logits, atol=1e-5)
    for layer in (0, np.int64(1), jnp.int32(2)):
        np.testing.assert_allclose(lm.logits_from(layer, resid[int(layer)]), logits, atol=2e-5)
    np.testing.assert_allclose(lm.logits_from(1, np.asarray(resid[1])), logits, atol=2e-5)


def test_methods__take_any_integers_of_numpy_or_jax_and_work_inside_jit(lm):
    expected = lm.logits(TOKEN_IDS)
    for dtype in (np.int32, np.uint8, np.int64):
        np.testing.assert_array_equal(lm.logits(TOKEN_IDS.astype(dtype)), expected)
    np.testing.assert_array_equal(lm.logits(jnp.asarray(TOKEN_IDS)), expected)
    np.testing.assert_allclose(jax.jit(lm.logits)(TOKEN_IDS), expected, atol=1e-6)
    resid = lm.residuals(TOKEN_IDS)
    np.testing.assert_allclose(jax.jit(lm.logits_from)(1, resid[1]), expected, atol=2e-5)


def test_methods__one_text_equals_the_same_text_in_a_batch(lm):
    together = lm.residuals(TOKEN_IDS)
    np.testing.assert_allclose(lm.residuals(TOKEN_IDS[1:]), together[:, 1:], atol=2e-5)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (np.array([[1, 37]]), "token id 37 is outside the vocabulary of .*, 0 to 36"),
        (np.array([[1, -2]]), "token id -2 is outside the vocabulary"),
        (np.array([[2**40, 1]]), "token id 1099511627776 is outside the vocabulary"),
        (jnp.array([[1, 37]]), "token id 37 is outside"),
        (np.zeros((2, 20), int), "a text of 20 tokens is longer than the context of .*, 19"),
        (np.zeros((0, 5), int), r"token ids have shape \[0, 5\]"),
        (np.zeros((2, 0), int), r"token ids have shape \[2, 0\]"),
        (np.zeros(3, int), r"token ids have shape \[3\], expected \[B, T\]"),
        (np.zeros((1, 2, 3), int), r"token ids have shape \[1, 2, 3\]"),
        (np.array([[1.0, 2.0]]), "token ids have dtype float64, expected integers"),
        (np.array([[True]]), "token ids have dtype bool, expected integers"),
        (np.array([["a"]]), "token ids have dtype <U1, expected integers"),
    ],
    ids=str,
)
def test_methods__name_the_token_ids_they_cannot_take(lm, token_ids, message):
    for method in (lm.residuals, lm.logits, lm.residuals_and_logits):
        with pytest.raises(InputError, match=message):
            method(token_ids)


@pytest.mark.parametrize("layer", [-1, 3])
def test_logits_from__refuses_a_layer_the_model_does_not_have(lm, layer):
    with pytest.raises(InputError, match=f"layer is {layer}, but .* has layers 0 to 2"):
        lm.logits_from(layer, jnp.zeros((2, 5, 24)))


def test_logits_from__refuses_a_residual_of_another_width(lm):
    with pytest.raises(InputError, match=r"resid has shape \[2, 5, 23\], .* asks for \[B, T, 24\]"):
        lm.logits_from(0, jnp.zeros((2, 5, 23)))


def test_fingerprint__follows_the_tokenizer(write_model, train_tokenizer):
    folder, _ = write_model(vocab_size=300)
    without = models.load(folder).fingerprint
    train_tokenizer(folder, 270)
    assert models.load(folder).fingerprint != without
