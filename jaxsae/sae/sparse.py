"""Encoder and decoder by codes: products that touch only the rows of the kept latents, forward and backward.

With k of F latents kept, a dense decoder and both dense gradients of the weights take 2 B D F operations each; these
take 2 B D k, and are bound by memory: B k rows of D numbers each. What is left of the dense step is the encoder's
forward product, which ranks all latents. `losses` holds the dense form, which these equal.

Each loop runs over slots, so that one turn reads or adds one row of weights for every row of the batch; an einsum over
`W[ids]` would first write all B k rows out.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsae.sae.autoencoder import SaeParams
from jaxsae.sae.selection import Codes

_Rows = Int[Array, "B K"] | None


def attach(params: SaeParams, centred: Float[Array, "B D"], codes: Codes) -> Float[Array, "B K"]:
    """Return the codes' values with the gradient that the encoder has through the kept latents.

    Args:
        params: the encoder that gave the values.
        centred: what it read, activations - b_dec; the gradient reaches b_dec, not the activations.
    """
    return _attach(params.W_enc, params.b_enc, params.b_dec, codes.values, centred, codes.ids, codes.rows)


def decode(
    W_dec: Float[Array, "F D"], values: Float[Array, "B K"], codes: Codes, like: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """Return the kept latents' decoder rows, weighted with `values` and summed by the row of the batch they belong to.

    Args:
        like: of the shape of the outcome.
    """
    return _decode(W_dec, values, codes.ids, codes.rows, jnp.zeros_like(like))


@jax.custom_vjp
def _attach(
    W_enc: Float[Array, "D F"],
    b_enc: Float[Array, " F"],
    b_dec: Float[Array, " D"],
    values: Float[Array, "B K"],
    centred: Float[Array, "B D"],
    ids: Int[Array, "B K"],
    rows: _Rows,
) -> Float[Array, "B K"]:
    return values


def _attach_forward(W_enc, b_enc, b_dec, values, centred, ids, rows):
    return values, (W_enc, values > 0, centred, ids, rows)


def _attach_backward(kept: tuple, gradient: Float[Array, "B K"]) -> tuple:
    W_enc, is_active, centred, ids, rows = kept
    gradient = jnp.where(is_active, gradient, 0.0)
    by_latent = jnp.zeros_like(W_enc[0]).at[ids].add(gradient, mode="promise_in_bounds")
    to_W_enc = _add_by_latent(gradient, ids, rows, centred, jnp.zeros_like(W_enc.T)).T
    return to_W_enc, by_latent, -(W_enc @ by_latent), None, None, None, None


_attach.defvjp(_attach_forward, _attach_backward)


@jax.custom_vjp
def _decode(
    W_dec: Float[Array, "F D"],
    values: Float[Array, "B K"],
    ids: Int[Array, "B K"],
    rows: _Rows,
    zeros: Float[Array, "B D"],
) -> Float[Array, "B D"]:
    def add(total: Float[Array, "B D"], slot: tuple) -> tuple[Float[Array, "B D"], None]:
        value, latent, row = slot
        part = value[:, None] * W_dec.at[latent].get(mode="promise_in_bounds")
        return (total + part if row is None else total.at[row].add(part, mode="promise_in_bounds")), None

    return lax.scan(add, zeros, _slots(values, ids, rows))[0]


def _decode_forward(W_dec, values, ids, rows, zeros):
    return _decode(W_dec, values, ids, rows, zeros), (W_dec, values, ids, rows)


def _decode_backward(kept: tuple, gradient: Float[Array, "B D"]) -> tuple:
    W_dec, values, ids, rows = kept

    def project(_: None, slot: tuple) -> tuple[None, Float[Array, " B"]]:
        latent, row = slot
        part = gradient if row is None else gradient.at[row].get(mode="promise_in_bounds")
        return None, jnp.sum(part * W_dec.at[latent].get(mode="promise_in_bounds"), axis=-1)

    to_values = lax.scan(project, None, _slots(ids, rows))[1].T
    return _add_by_latent(values, ids, rows, gradient, jnp.zeros_like(W_dec)), to_values, None, None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _add_by_latent(
    weights: Float[Array, "B K"], ids: Int[Array, "B K"], rows: _Rows, vectors: Float[Array, "B D"],
    zeros: Float[Array, "F D"],
) -> Float[Array, "F D"]:  # fmt: skip
    """Return, for each latent, the sum of its slots' vectors, weighted."""

    def add(total: Float[Array, "F D"], slot: tuple) -> tuple[Float[Array, "F D"], None]:
        weight, latent, row = slot
        vector = vectors if row is None else vectors.at[row].get(mode="promise_in_bounds")
        return total.at[latent].add(weight[:, None] * vector, mode="promise_in_bounds"), None

    return lax.scan(add, zeros, _slots(weights, ids, rows))[0]


def _slots(*arrays: Array | None) -> tuple:
    """Return the arrays with their slots first, for a scan over them."""
    return tuple(None if array is None else array.T for array in arrays)
