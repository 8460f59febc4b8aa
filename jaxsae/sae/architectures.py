"""The SAE architectures, each written for one layer: how it starts, its loss, and how it encodes afterwards.

A suite maps these functions over its layers. To add an architecture: a section with its functions and its entry in
`ARCHITECTURES`, and its test. Building blocks are in `autoencoder` (linear parts), `selection` (which latents are
kept), `sparse` (products by kept latents) and `losses`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsae.artifacts import InputError
from jaxsae.config import SaeConfig
from jaxsae.sae.autoencoder import AnyArray, SaeParams, decode, unit_rows
from jaxsae.sae.losses import Moment, Seen, count_fired, dense_loss, encoder, see, sparse_loss
from jaxsae.sae.selection import (
    ROW_FACTOR,
    Codes,
    batch_topk_codes,
    keep_above,
    keep_batch_topk,
    keep_topk,
    spread,
    topk_codes,
)

Loss = tuple[Float[Array, ""], Seen]


def init_tied(key: Array, mean: Float[Array, " D"], n_latents: int, config: SaeConfig) -> SaeParams:
    """Unit decoder rows in random directions, the encoder their transpose, b_dec the mean row."""
    W_dec = unit_rows(jax.random.normal(key, (n_latents, len(mean))))
    return SaeParams(W_enc=W_dec.T, b_enc=jnp.zeros(n_latents), W_dec=W_dec, b_dec=mean)


def fold_plain(params: SaeParams, estimated: Float[Array, ""], config: SaeConfig) -> dict[str, Any]:
    """Return the weights as they are, and no threshold."""
    return _weights(params, jnp.zeros_like(params.b_enc))


def _weights(params: SaeParams, threshold: Float[Array, " F"]) -> dict[str, Any]:
    return {
        "W_enc": params.W_enc,
        "b_enc": params.b_enc,
        "W_dec": params.W_dec,
        "b_dec": params.b_dec,
        "threshold": threshold,
    }


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What sets an architecture apart.

    Attributes:
        loss: (params, acts [B D], moment) -> (this shard's share of the loss, what it saw).
        encode: (pre [B F], k, threshold [F]) -> features [B F], the same for a row whatever the batch.
        init: (key, mean [D], F, config) -> params before the first step, on scaled rows.
        fold: (params, threshold estimated from the batches, config) -> W_enc, b_enc, W_dec, b_dec and threshold [F]
            with which `encode` does what training did.
        is_folded: `fold` changes the weights, so that training cannot go on from them.
        centres_input: the encoder reads acts - b_dec, and inputs are scaled so that E|x|^2 = D.
        estimates_threshold: the threshold at inference is estimated from the training batches.
        imposes_k: training keeps k latents, and dead ones are revived by an auxiliary loss.
        codes: (pre [B F], moment) -> what `loss` keeps as codes, the batch's threshold (or None), and whether the codes
            hold all of it, the same on every shard (None: always); unset where the loss is dense.
    """

    loss: Callable[[SaeParams, Float[Array, "B D"], Moment], Loss]
    encode: Callable[[Float[Array, "B F"], int, Float[AnyArray, " F"]], Float[Array, "B F"]]
    init: Callable[[Array, Float[Array, " D"], int, SaeConfig], SaeParams] = init_tied
    fold: Callable[[SaeParams, Float[Array, ""], SaeConfig], dict[str, Any]] = fold_plain
    is_folded: bool = False
    centres_input: bool = True
    estimates_threshold: bool = False
    imposes_k: bool = False
    codes: Callable[[Float[Array, "B F"], Moment], tuple[Codes, Any, Any]] | None = None


def architecture(name: str) -> Architecture:
    """Return an architecture by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"sae.architecture is {name!r}, expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def annealed(config: SaeConfig, progress: Float[Array, ""], start: float | int, end: float | int) -> Float[Array, ""]:
    """Return what goes from `start` to `end` in a straight line over the first `sae.anneal` of the run."""
    done = jnp.minimum(progress / max(config.anneal, 1e-9), 1.0)
    return start + (end - start) * done


def gradients(name: str, params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> tuple[Loss, SaeParams]:
    """Return ((share of the loss, what it saw), its gradients), by codes where asked for, possible, and exact."""
    arch = architecture(name)

    def dense() -> tuple[Loss, SaeParams]:
        return jax.value_and_grad(arch.loss, has_aux=True)(params, acts, moment)

    if arch.codes is None or not moment.is_sparse:
        return dense()
    pre = encoder(params, acts, centres_input=True, dtype=moment.dtype)
    codes, threshold, fits = arch.codes(pre, moment)

    def sparse() -> tuple[Loss, SaeParams]:
        return jax.value_and_grad(sparse_loss, has_aux=True)(params, acts, codes, moment, threshold)

    return sparse() if fits is None else lax.cond(fits, sparse, dense)


def k_slots(config: SaeConfig) -> int:
    """Return the most latents that training keeps for a row, or on average."""
    return max(config.k, config.k_start or 0)


# TopK: each row keeps its k largest latents (Gao et al. 2024, arXiv:2406.04093).


def topk_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return the unexplained fraction of variance with k latents a row, more at first where k is annealed."""
    pre = encoder(params, acts, centres_input=True, dtype=moment.dtype)
    return dense_loss(params, acts, spread(_topk_codes(pre, moment)[0], pre), moment)


def _topk_codes(pre: Float[Array, "B F"], moment: Moment) -> tuple[Codes, None, None]:
    config = moment.config
    k_now = None if config.k_start is None else jnp.round(_annealed_k(moment))
    return topk_codes(pre, k_slots(config), k_now), None, None


def _annealed_k(moment: Moment) -> Float[Array, ""]:
    return annealed(moment.config, moment.progress, moment.config.k_start or moment.config.k, moment.config.k)


def _encode_topk(pre: Float[Array, "B F"], k: int, threshold: Float[AnyArray, " F"]) -> Float[Array, "B F"]:
    return keep_topk(pre, k)


# BatchTopK: the batch keeps its B k largest latents; at inference a threshold (Bussmann et al. 2024, arXiv:2412.06410).


def batch_topk_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return the unexplained fraction of variance with k latents a row on average."""
    pre = encoder(params, acts, centres_input=True, dtype=moment.dtype)
    n_row = ROW_FACTOR * k_slots(moment.config)
    feats, threshold = keep_batch_topk(pre, _batch_k(moment), n_row=n_row, axis=moment.axis)
    return dense_loss(params, acts, feats, moment, threshold)


def _batch_topk_codes(pre: Float[Array, "B F"], moment: Moment) -> tuple[Codes, Float[Array, ""], Bool[Array, ""]]:
    return batch_topk_codes(pre, k_slots(moment.config), _batch_k(moment), moment.axis)


def _batch_k(moment: Moment) -> int | Float[Array, ""]:
    return moment.config.k if moment.config.k_start is None else _annealed_k(moment)


def _fold_estimated(params: SaeParams, estimated: Float[Array, ""], config: SaeConfig) -> dict[str, Any]:
    return _weights(params, jnp.zeros_like(params.b_enc) + estimated)


def _encode_above(pre: Float[Array, "B F"], k: int, threshold: Float[AnyArray, " F"]) -> Float[Array, "B F"]:
    return keep_above(pre, threshold)


# The published run's (GhostTrack): one fixed threshold without a gradient, an L1 penalty, inputs as they are.


def reference_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return mean (x - x_hat)^2 + sparsity_coefficient * mean |f|, means over rows and coordinates."""
    config, n_rows = moment.config, moment.n_rows(acts)
    pre = encoder(params, acts, centres_input=False, dtype=moment.dtype)
    feats = keep_above(pre, jnp.float32(config.threshold))
    error = acts - decode(params, feats, dtype=moment.dtype)
    penalty = jnp.sum(jnp.abs(feats)) / (n_rows * feats.shape[-1])
    loss = jnp.sum(error**2) / (n_rows * acts.shape[-1]) + config.sparsity_coefficient * penalty
    return see(loss, error, count_fired(feats))


def _init_reference(key: Array, mean: Float[Array, " D"], n_latents: int, config: SaeConfig) -> SaeParams:
    """The published run's: torch's nn.Linear default for both layers, then unit decoder rows."""
    keys, d_model = jax.random.split(key, 4), len(mean)
    bound_in, bound_out = d_model**-0.5, n_latents**-0.5
    return SaeParams(
        W_enc=jax.random.uniform(keys[0], (d_model, n_latents), minval=-bound_in, maxval=bound_in),
        b_enc=jax.random.uniform(keys[1], (n_latents,), minval=-bound_in, maxval=bound_in),
        W_dec=unit_rows(jax.random.uniform(keys[2], (n_latents, d_model), minval=-bound_out, maxval=bound_out)),
        b_dec=jax.random.uniform(keys[3], (d_model,), minval=-bound_out, maxval=bound_out),
    )


def _fold_fixed(params: SaeParams, estimated: Float[Array, ""], config: SaeConfig) -> dict[str, Any]:
    return _weights(params, jnp.full_like(params.b_enc, config.threshold))


ARCHITECTURES = {
    "topk": Architecture(topk_loss, _encode_topk, codes=_topk_codes, imposes_k=True),
    "batchtopk": Architecture(
        batch_topk_loss,
        _encode_above,
        fold=_fold_estimated,
        estimates_threshold=True,
        codes=_batch_topk_codes,
        imposes_k=True,
    ),
    "jumprelu_l1": Architecture(
        reference_loss, _encode_above, init=_init_reference, fold=_fold_fixed, centres_input=False
    ),
}
