"""The latents that fire on a corpus, against encoding each context by itself."""

import numpy as np
import pytest

from jaxsae import features
from jaxsae.artifacts import InputError

N_CONTEXTS, CONTEXT, KEEP = 5, 12, 3


@pytest.fixture
def contexts():
    return np.random.default_rng(0).integers(0, 26, (N_CONTEXTS, CONTEXT)).astype(np.int32)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_keep_corpus__keeps_the_strongest_latents_of_the_tokens_that_are_not_dropped(close, contexts, batch):
    drop = np.random.default_rng(1).random(contexts.shape) < 0.3
    done = []
    ids, acts = features.keep_corpus(
        close.lm, close.suite, contexts, drop, keep=KEEP, batch=batch, on_batch=done.append
    )
    assert ids.shape == acts.shape == (3, (~drop).sum(), KEEP)
    assert done[-1] == N_CONTEXTS
    found = [close.suite.encode(close.lm.residuals(context[None])[:, 0]) for context in contexts]
    dense = np.concatenate([np.asarray(feats)[:, ~dropped] for feats, dropped in zip(found, drop, strict=True)], axis=1)
    order = np.argsort(-dense, axis=-1, kind="stable")[..., :KEEP]
    np.testing.assert_allclose(acts, np.maximum(np.take_along_axis(dense, order, axis=-1), 0), atol=1e-4)
    np.testing.assert_array_equal(ids, np.where(acts > 0, order, -1))


def test_keep_corpus__keeps_no_more_slots_than_there_are_latents(close, contexts):
    drop = np.zeros(contexts.shape, bool)
    ids, acts = features.keep_corpus(close.lm, close.suite, contexts, drop, keep=99, batch=4)
    assert ids.shape[2] == 13
    assert ((ids >= 0) == (acts > 0)).all()
    assert (ids >= 0).sum(axis=2).max() == 4  # k of the suite


def test_keep_corpus__says_when_nothing_is_left(close, contexts):
    with pytest.raises(InputError, match="all tokens of the 5 contexts"):
        features.keep_corpus(close.lm, close.suite, contexts, np.ones(contexts.shape, bool), keep=2, batch=4)


def test_keep_corpus__names_the_contexts_whose_activations_are_not_finite(close, contexts):
    suite = close.suite.replace(W_enc=close.suite.W_enc.at[1, 0, 0].set(np.inf))
    with pytest.raises(InputError, match="activations of tiny are not finite in contexts 0 to 3"):
        features.keep_corpus(close.lm, suite, contexts, np.zeros(contexts.shape, bool), keep=2, batch=4)
