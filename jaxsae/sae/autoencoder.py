"""The linear parts of one layer's SAE, which all architectures share."""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

AnyArray = Array | np.ndarray


@flax.struct.dataclass
class SaeParams:
    """The weights of one layer's SAE (or, with a leading axis, of all layers').

    The decoder is stored as rows, one direction in the residual stream for each latent. Fields of a pytree are `Any`:
    jax and optax also fill it with shapes, shardings and norms.

    Attributes:
        W_enc: [D F].    b_enc: [F].    W_dec: [F D].    b_dec: [D].
        gate: what an architecture learns beside them, [F] each, by name.
    """

    W_enc: Any
    b_enc: Any
    W_dec: Any
    b_dec: Any
    gate: dict[str, Any] = flax.struct.field(default_factory=dict)


def dot(left: Float[Array, "... A"], right: Float[AnyArray, "A Z"], dtype: DTypeLike) -> Float[Array, "... Z"]:
    """Multiply with operands in `dtype` and a float32 outcome; float32 operands are not rounded on any device."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.matmul(left.astype(dtype), right.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def pre_activations(
    params: SaeParams, acts: Float[Array, "B D"], *, centres_input: bool, dtype: DTypeLike = jnp.float32
) -> Float[Array, "B F"]:
    """Return the encoder's linear part, before anything sets it to zero."""
    if centres_input:
        acts = acts - params.b_dec
    return dot(acts, params.W_enc, dtype) + params.b_enc


def decode(
    params: SaeParams, feats: Float[Array, "B F"], *, dtype: DTypeLike = jnp.float32, axis: str | None = None
) -> Float[Array, "B D"]:
    """Return the reconstruction: the features' decoder rows, weighted, plus b_dec.

    Args:
        axis: the mesh axis along which the latents are spread; their shards' reconstructions are summed along it.
    """
    recon = dot(feats, params.W_dec, dtype)
    return (recon if axis is None else lax.psum(recon, axis)) + params.b_dec


def unit_rows(rows: Float[Array, "*L F D"]) -> Float[Array, "*L F D"]:
    """Return the rows divided by their norms."""
    return rows / row_lengths(rows)[..., None]


def row_lengths(rows: Float[Array, "*L F D"]) -> Float[Array, "*L F"]:
    """Return the rows' norms."""
    return jnp.linalg.norm(rows, axis=-1)


def with_unit_rows(params: SaeParams) -> SaeParams:
    """Return the SAE whose decoder rows are unit and whose pre-activations are longer by what the rows lost.

    A latent that is active adds the same to the reconstruction, and latents are ranked by what they add.
    """
    lengths = row_lengths(params.W_dec)
    # The maximum changes nothing. Without it XLA may round product and sum together where the bias is added, in one
    # program, or one place of it, and not in another: latents at the threshold are then kept here and not there.
    b_enc = jnp.maximum(params.b_enc * lengths, jnp.finfo(jnp.float32).min)
    return dataclasses.replace(
        params,
        W_enc=params.W_enc * lengths[..., None, :],
        b_enc=b_enc,
        W_dec=params.W_dec / lengths[..., None],
    )
