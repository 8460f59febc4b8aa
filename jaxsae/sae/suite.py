"""The trained SAEs of all layers, as one pytree: encode, decode and what is needed to use them anywhere.

Weights are in the units of the residual stream: the scale that training applied to its input is folded in.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsae.artifacts import InputError
from jaxsae.sae.architectures import architecture
from jaxsae.sae.autoencoder import AnyArray, SaeParams, decode, pre_activations

FloatArray = Float[AnyArray, "..."]


@flax.struct.dataclass
class SaeSuite:
    """One SAE for each of L layers; without the L axis, the SAE of one layer.

    Attributes:
        W_enc: [L D F].    b_enc: [L F].    W_dec: [L F D], unit rows where jaxsae trained them.    b_dec: [L D].
        threshold: [L F], in the units of activations; what it does depends on the architecture.
        architecture: name, as in the config.
        k: latents active for a row, or on average.
    """

    W_enc: Any
    b_enc: Any
    W_dec: Any
    b_dec: Any
    threshold: Any
    architecture: str = flax.struct.field(pytree_node=False)
    k: int = flax.struct.field(pytree_node=False)

    @property
    def has_layers(self) -> bool:
        """Say whether the arrays have an L axis."""
        return self.W_enc.ndim == 3

    @property
    def n_latents(self) -> int:
        """Return F."""
        return self.W_enc.shape[-1]

    @property
    def d_model(self) -> int:
        """Return D."""
        return self.W_enc.shape[-2]

    def layer(self, index: int | Int[Array, ""]) -> "SaeSuite":
        """Return the SAE of one layer, without the L axis; the index may be traced."""
        return jax.tree.map(lambda x: x[index], self)

    def encode(self, resid: FloatArray, *, latent_axis: str | None = None) -> Float[Array, "..."]:
        """Return features [L ... F] of residual streams [L ... D], each row on its own, as at inference.

        Args:
            latent_axis: inside `jax.shard_map`, the mesh axis along which this suite's latents are spread.

        Raises:
            InputError: the layers or the width do not fit.
        """
        return self._each_layer(functools.partial(_encode, latent_axis=latent_axis), resid, self.d_model)

    def decode(self, feats: FloatArray, *, latent_axis: str | None = None) -> Float[Array, "..."]:
        """Return the reconstruction [L ... D] of features [L ... F].

        Args:
            latent_axis: as for `encode`; the features are this shard's, the reconstruction is the whole one.

        Raises:
            InputError: the layers or the width do not fit.
        """
        return self._each_layer(functools.partial(_decode, latent_axis=latent_axis), feats, self.n_latents)

    def encode_topk(self, resid: FloatArray, k: int) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
        """Return (ids, activations) [L ... K] of the k largest features, descending; id -1 where fewer are active."""
        activations, ids = lax.top_k(self.encode(resid), min(k, self.n_latents))
        missing = [(0, 0)] * (activations.ndim - 1) + [(0, max(0, k - self.n_latents))]
        ids = jnp.pad(jnp.where(activations > 0, ids, -1), missing, constant_values=-1)
        return ids, jnp.pad(activations, missing)

    def _each_layer(self, function: Callable, rows: FloatArray, width: int) -> Float[Array, "..."]:
        rows = jnp.asarray(rows, jnp.float32)
        layers = self.W_enc.shape[:1] if self.has_layers else ()
        if rows.shape[-1:] != (width,) or rows.shape[: len(layers)] != layers or rows.ndim <= len(layers):
            raise InputError(f"expected an array {[*layers, '...', width]}, got {list(rows.shape)}")
        flat = rows.reshape(*layers, -1, width)
        mapped = jax.vmap(function) if self.has_layers else function
        return mapped(self, flat).reshape(*rows.shape[:-1], -1)


def params_of(suite: SaeSuite) -> SaeParams:
    """Return the weights alone."""
    return SaeParams(suite.W_enc, suite.b_enc, suite.W_dec, suite.b_dec)


def _encode(sae: SaeSuite, acts: Float[Array, "B D"], *, latent_axis: str | None) -> Float[Array, "B F"]:
    arch = architecture(sae.architecture)
    pre = pre_activations(params_of(sae), acts, centres_input=arch.centres_input)
    return arch.encode(pre, sae.k, sae.threshold, latent_axis)


def _decode(sae: SaeSuite, feats: Float[Array, "B F"], *, latent_axis: str | None) -> Float[Array, "B D"]:
    return decode(params_of(sae), feats, axis=latent_axis)


def fold_scale(weights: dict[str, Any], *, architecture: str, k: int) -> SaeSuite:
    """Return the suite that does to x what the trained weights do to scale * x, with the decoder's rows as they are.

    Args:
        weights: W_enc, b_enc, W_dec, b_dec, threshold, scale; with or without the L axis, NumPy or jax.
    """
    scale = weights["scale"][..., None]
    return SaeSuite(
        W_enc=weights["W_enc"],
        b_enc=weights["b_enc"] / scale,
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"] / scale,
        threshold=weights["threshold"] / scale,
        architecture=architecture,
        k=k,
    )
