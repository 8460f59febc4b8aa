"""Log-probability and entropy of tokens, against float64."""

import jax.numpy as jnp
import numpy as np
import scipy.special

from jaxsae.models.scores import token_scores


def test_token_scores__equal_the_plain_formulas():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(0, 5, (3, 4, 11)), rng.integers(0, 11, (3, 4))
    log_p = scipy.special.log_softmax(logits, axis=-1)
    logprobs, entropies = token_scores(jnp.asarray(logits, jnp.float32), jnp.asarray(ids))
    np.testing.assert_allclose(logprobs, np.take_along_axis(log_p, ids[..., None], -1)[..., 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropies, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-5, atol=1e-5)
