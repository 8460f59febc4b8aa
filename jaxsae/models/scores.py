"""How likely a token was, and how open the choice: log-probability and entropy from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_scores(
    logits: Float[Array, "*axes V"], token_ids: Int[Array, "*axes"]
) -> tuple[Float[Array, "*axes"], Float[Array, "*axes"]]:
    """Return each token's log-probability and the entropy of the distribution it is of, nats, in float32."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token_ids[..., None], axis=-1)[..., 0]
    return chosen - total, total - jnp.sum(jnp.exp(logits - total[..., None]) * logits, axis=-1)
