"""Which latents fire on the tokens of a corpus, in all layers at once: what tells latents that fire together."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsae.artifacts import InputError
from jaxsae.models import LanguageModel
from jaxsae.sae import SaeSuite


def keep_corpus(
    lm: LanguageModel,
    suite: SaeSuite,
    contexts: Int[np.ndarray, "n T"],
    drop: Bool[np.ndarray, "n T"],
    *,
    keep: int,
    batch: int,
    on_batch: Callable[[int], None] = lambda n_done: None,
) -> tuple[Int[np.ndarray, "L tokens K"], Float[np.ndarray, "L tokens K"]]:
    """Return the strongest latents of each token that is not dropped, and their activations, in the corpus's order.

    Host memory is 8 L K bytes a token; the device holds a batch's residual streams and one layer's features of it.

    Args:
        suite: of all layers, as jax arrays.
        contexts: packed token ids.
        drop: tokens to leave out, as training leaves out position 0 and BOS.
        keep: latents of each token and layer (K), fewer where there are fewer; -1 marks a slot beyond those that fire.
        batch: contexts in a forward pass.
        on_batch: called with the number of contexts done.

    Raises:
        InputError: every token is dropped, or activations are not finite.
    """
    n_kept, n_layers = min(keep, suite.n_latents), suite.W_enc.shape[0]
    n_tokens = int((~drop).sum())
    if not n_tokens:
        raise InputError(f"all tokens of the {len(contexts)} contexts of the corpus are dropped; use more text")
    ids = np.empty((n_layers, n_tokens, n_kept), np.int32)
    activations = np.empty((n_layers, n_tokens, n_kept), np.float32)
    done = 0
    for start in range(0, len(contexts), batch):
        rows = np.minimum(np.arange(start, start + batch), len(contexts) - 1)  # one shape for every pass
        n_real = min(batch, len(contexts) - start)
        found = _strongest(suite, lm.residuals(contexts[rows]), n_kept=n_kept)
        is_kept = ~drop[start : start + n_real]
        place = slice(done, done + int(is_kept.sum()))
        for into, values in zip((ids, activations), found, strict=True):
            into[:, place] = np.asarray(values)[:, :n_real][:, is_kept]
        if not np.isfinite(activations[:, place]).all():
            raise InputError(f"activations of {lm.name} are not finite in contexts {start} to {start + n_real - 1}")
        done = place.stop
        on_batch(start + n_real)
    return ids, activations


@functools.partial(jax.jit, static_argnames="n_kept")
def _strongest(
    suite: SaeSuite, resid: Float[Array, "L B T D"], *, n_kept: int
) -> tuple[Int[Array, "L B T K"], Float[Array, "L B T K"]]:
    """Return the strongest latents, one layer after the other to save memory."""
    return lax.map(lambda layer: layer[0].encode_topk(layer[1].astype(jnp.float32), n_kept), (suite, resid))
