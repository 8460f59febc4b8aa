"""Encoder and decoder by codes: products that touch only the rows of the kept latents, forward and backward.

With k of F latents kept, a dense decoder and both dense gradients of the weights take 2 B D F operations each; these
take 2 B D k, and are bound by memory: B k rows of D numbers each. What is left of the dense step is the encoder's
forward product, which ranks all latents. `losses` holds the dense form, which these equal.

Each loop runs over slots, so that one turn reads or adds B rows of weights; an einsum over `W[ids]` would first write
all B k rows out. Gradients are added in the order of the latents: their rows, of which there are more than caches hold,
are then met one after the other.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsae.sae.autoencoder import SaeParams
from jaxsae.sae.selection import Codes


@flax.struct.dataclass
class Order:
    """The slots of codes by latent, and by row of the batch among those of one latent; S = B K.

    Attributes:
        places: [S] int32, of each slot among the codes' flattened ones.
        latents, rows: [S] int32, of each slot.
    """

    places: Any
    latents: Any
    rows: Any


def by_latent(codes: Codes, n_latents: int) -> Order:
    """Return the order of the codes' slots by latent."""
    latents = codes.ids.reshape(-1)
    n_slots = latents.size
    if n_latents * n_slots < 2**32:  # latent and place fit in one number: a CPU sorts those four times as fast as pairs
        both = latents.astype(jnp.uint32) * n_slots + jnp.arange(n_slots, dtype=jnp.uint32)
        places = (lax.sort(both) % n_slots).astype(jnp.int32)
    else:
        places = jnp.argsort(latents).astype(jnp.int32)
    rows = places // codes.ids.shape[1] if codes.rows is None else _at(codes.rows.reshape(-1), places)
    return Order(places, _at(latents, places), rows)


def attach(params: SaeParams, centred: Float[Array, "B D"], codes: Codes, order: Order) -> Float[Array, "B K"]:
    """Return the codes' values with the gradient that the encoder has through the kept latents.

    Args:
        params: the encoder that gave the values.
        centred: what it read, activations - b_dec; the gradient reaches b_dec, not the activations.
        order: that of the codes.
    """
    return _attach(params.W_enc, params.b_enc, params.b_dec, codes.values, centred, order)


def decode(
    W_dec: Float[Array, "F D"], values: Float[Array, "B K"], codes: Codes, order: Order, like: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """Return the kept latents' decoder rows, weighted with `values` and summed by the row of the batch they belong to.

    Args:
        order: that of the codes.
        like: of the shape of the outcome.
    """
    return _decode(W_dec, values, codes.ids, codes.rows, order, jnp.zeros_like(like))


@jax.custom_vjp
def _attach(
    W_enc: Float[Array, "D F"],
    b_enc: Float[Array, " F"],
    b_dec: Float[Array, " D"],
    values: Float[Array, "B K"],
    centred: Float[Array, "B D"],
    order: Order,
) -> Float[Array, "B K"]:
    return values


def _attach_forward(W_enc, b_enc, b_dec, values, centred, order):
    return values, (W_enc, values > 0, centred, order)


def _attach_backward(kept: tuple, gradient: Float[Array, "B K"]) -> tuple:
    W_enc, is_active, centred, order = kept
    gradient = jnp.where(is_active, gradient, 0.0)
    by_latent = _add(jnp.zeros_like(W_enc[0]), order.latents, _at(gradient.reshape(-1), order.places))
    to_W_enc = _add_by_latent(gradient, order, centred, jnp.zeros_like(W_enc.T)).T
    return to_W_enc, by_latent, -(W_enc @ by_latent), None, None, None


_attach.defvjp(_attach_forward, _attach_backward)


@jax.custom_vjp
def _decode(
    W_dec: Float[Array, "F D"],
    values: Float[Array, "B K"],
    ids: Int[Array, "B K"],
    rows: Int[Array, "B K"] | None,
    order: Order,
    zeros: Float[Array, "B D"],
) -> Float[Array, "B D"]:
    def add(total: Float[Array, "B D"], slot: tuple) -> tuple[Float[Array, "B D"], None]:
        value, latent, row = slot
        part = value[:, None] * _at(W_dec, latent)
        return (total + part if row is None else total.at[row].add(part, mode="promise_in_bounds")), None

    return lax.scan(add, zeros, _slots(values, ids, rows))[0]


def _decode_forward(W_dec, values, ids, rows, order, zeros):
    return _decode(W_dec, values, ids, rows, order, zeros), (W_dec, values, ids, rows, order)


def _decode_backward(kept: tuple, gradient: Float[Array, "B D"]) -> tuple:
    W_dec, values, ids, rows, order = kept

    def project(_: None, slot: tuple) -> tuple[None, Float[Array, " B"]]:
        latent, row = slot
        part = gradient if row is None else _at(gradient, row)
        return None, jnp.sum(part * _at(W_dec, latent), axis=-1)

    to_values = lax.scan(project, None, _slots(ids, rows))[1].T
    return _add_by_latent(values, order, gradient, jnp.zeros_like(W_dec)), to_values, None, None, None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _slots(*arrays: Array | None) -> tuple:
    """Return the arrays with their slots first, for a scan over them."""
    return tuple(None if array is None else array.T for array in arrays)


def _add_by_latent(
    weights: Float[Array, "B K"], order: Order, vectors: Float[Array, "B D"], zeros: Float[Array, "F D"]
) -> Float[Array, "F D"]:
    """Return, for each latent, the sum of its slots' vectors, weighted."""

    def add(total: Float[Array, "F D"], slots: tuple) -> tuple[Float[Array, "F D"], None]:
        weight, latent, row = slots
        return _add(total, latent, weight[:, None] * _at(vectors, row)), None

    slots = _at(weights.reshape(-1), order.places), order.latents, order.rows
    return lax.scan(add, zeros, tuple(array.reshape(-1, len(vectors)) for array in slots))[0]


def _at(array: Array, places: Int[Array, " N"]) -> Array:
    return array.at[places].get(mode="promise_in_bounds")


def _add(total: Array, latents: Int[Array, " N"], parts: Array) -> Array:
    """Add each part to the item of its latent; the latents ascend."""
    return total.at[latents].add(parts, indices_are_sorted=True, mode="promise_in_bounds")
