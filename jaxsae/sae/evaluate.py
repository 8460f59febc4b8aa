"""How good a suite is, on activations it was not trained on: one definition for each number.

Position 0 and BOS tokens are in none of them: their activations are not part of the source, and where the language
model's loss is measured their residual stream is left as it is.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.sae.suite import SaeSuite


@dataclasses.dataclass(frozen=True)
class Quality:
    """Numbers of each layer on held-out rows, all [L] and float64, with inference's encoding.

    Attributes:
        mse: mean squared error of a coordinate, in squared residual units.
        fvu: sum |x - x_hat|^2 / sum |x - mean|^2, with the mean of these same rows.
        l0: mean number of active latents.
        firing_rate: [L F], share of rows on which a latent is active.
        n_rows: rows behind the numbers.
    """

    mse: Float[np.ndarray, " L"]
    fvu: Float[np.ndarray, " L"]
    l0: Float[np.ndarray, " L"]
    firing_rate: Float[np.ndarray, "L F"]
    n_rows: int


def make_row_sums(mesh: Mesh) -> Callable:
    """Return the compiled (suite, acts [L B D], weights [B], centre [L D]) -> sums over the weighted rows, sharded."""

    def one_layer(sae: SaeSuite, acts: Float[Array, "B D"], weights: Float[Array, " B"], centre: Float[Array, " D"]):
        feats = sae.encode(acts)
        error = acts - sae.decode(feats)
        centred = acts - centre
        is_active = (feats > 0) * weights[:, None]
        return {
            "squared_error": jnp.sum(weights * jnp.sum(error**2, axis=-1)),
            "squared": jnp.sum(weights * jnp.sum(centred**2, axis=-1)),
            "sum": weights @ centred,
            "fired": is_active.sum(axis=0),
        }

    def sums(suite: SaeSuite, acts: Float[Array, "L B D"], weights: Float[Array, " B"], centre: Float[Array, "L D"]):
        local = jax.vmap(one_layer, in_axes=(0, 0, None, 0))(suite, acts.astype(jnp.float32), weights, centre)
        return lax.psum(local, meshes.DATA)

    return jax.jit(
        jax.shard_map(
            sums,
            mesh=mesh,
            in_specs=(meshes.BY_LAYER, meshes.BY_LAYER_AND_DATA, meshes.BY_DATA, meshes.BY_LAYER),
            out_specs=meshes.BY_LAYER,
        )
    )


def measure(
    row_sums: Callable,
    suite: SaeSuite,
    batches: Iterable[Float[np.ndarray, "l _ D"]],
    *,
    centre: Float[Array, "L D"],
    batch: int,
    layers: slice,
    n_layers: int,
    mesh: Mesh,
) -> Quality:
    """Measure a suite on batches of rows; sums are kept in float64.

    Args:
        row_sums: from `make_row_sums`.
        suite: sharded over the mesh's layers.
        batches: at most `batch` rows each, of this process's `layers`.
        centre: a row near the mean, which keeps the variance's sums small.

    Raises:
        InputError: there is no row.
    """
    totals: dict[str, np.ndarray] = {}
    n_rows = 0
    for acts in batches:
        n_real = acts.shape[1]
        padded = np.concatenate([acts, np.repeat(acts[:, -1:], batch - n_real, axis=1)], axis=1)
        weights = (np.arange(batch) < n_real).astype(np.float32)
        placed = meshes.put_batch(padded, layers, n_layers, mesh)
        sums = meshes.fetch(row_sums(suite, placed, meshes.put_rows(weights, mesh), centre))
        totals = {name: totals.get(name, 0) + np.asarray(x, np.float64) for name, x in sums.items()}
        n_rows += n_real
    if n_rows == 0:
        raise InputError("no held-out tokens to evaluate on; raise train.held_out or use a longer corpus")
    variance = totals["squared"] - (totals["sum"] ** 2).sum(axis=-1) / n_rows
    return Quality(
        mse=(totals["squared_error"] / (n_rows * suite.d_model))[:n_layers],
        fvu=(totals["squared_error"] / variance)[:n_layers],
        l0=(totals["fired"].sum(axis=-1) / n_rows)[:n_layers],
        firing_rate=(totals["fired"] / n_rows)[:n_layers],
        n_rows=n_rows,
    )


def pca_fvu(
    train: Float[np.ndarray, "L N D"], held_out: Float[np.ndarray, "L M D"], n_components: int
) -> Float[np.ndarray, " L"]:
    """Return the FVU on held-out rows of each layer's best linear code of `n_components` numbers.

    Mean and principal components are those of `train`; the held-out variance is around the held-out mean, as for FVU.
    """
    fvu = np.empty(len(train))
    for layer, (fit, rows) in enumerate(zip(train, held_out, strict=True)):
        fit, rows = fit.astype(np.float64), rows.astype(np.float64)
        mean = fit.mean(axis=0)
        components = np.linalg.eigh((fit - mean).T @ (fit - mean))[1][:, -n_components:]
        centred = rows - mean
        error = np.sum(centred**2) - np.sum((centred @ components) ** 2)
        fvu[layer] = error / np.sum((rows - rows.mean(axis=0)) ** 2)
    return fvu


def l0_thresholds(
    pre: Iterable[Float[np.ndarray, "L _ F"]], k: int, *, kept_per_row: int
) -> tuple[Float[np.ndarray, " L"], bool]:
    """Return each layer's threshold above which the rows have k active latents on average, and whether it is exact.

    It is not exact where a row may have more than `kept_per_row` entries above its layer's threshold.

    Args:
        pre: pre-activations in batches.
        kept_per_row: largest entries of a row that are looked at; memory is that many numbers for each row and layer.
    """
    kept, n_rows = [], 0
    for rows in pre:
        n_kept = min(kept_per_row, rows.shape[-1])
        kept.append(np.partition(rows, rows.shape[-1] - n_kept, axis=-1)[..., -n_kept:])
        n_rows += rows.shape[1]
    flat = np.concatenate([rows.reshape(len(rows), -1) for rows in kept], axis=1)
    n_active = min(n_rows * k, flat.shape[1] - 1)
    largest = -np.partition(-flat, (n_active - 1, n_active), axis=1)[:, n_active - 1 : n_active + 1]
    thresholds = np.maximum(largest.mean(axis=1), 0.0)
    is_exact = all((rows.min(axis=-1) <= thresholds[:, None]).all() for rows in kept)
    return thresholds, is_exact


def language_model_loss(
    suite: SaeSuite,
    lm: Any,
    contexts: Int[np.ndarray, "N T"],
    *,
    bos_id: int,
    centre: Float[np.ndarray, "L D"],
    batch: int,
    on_batch: Callable[[int], None] = lambda n_done: None,
) -> dict[str, Float[np.ndarray, " L"]]:
    """Return what replacing one layer's residual stream does to the language model, nats per token, for each layer.

    Every token but position 0 and BOS is replaced, and the loss is that of predicting the tokens that follow those.

    Args:
        lm: offers `residuals_and_logits(token_ids)` and `logits_from(layer, resid)`.
        centre: the mean row of each layer, for mean-ablation.
        on_batch: called with the number of contexts done.

    Returns:
        `delta_ce` by the SAE's reconstruction, `delta_ce_zero` by zeros, `delta_ce_mean` by the mean row, and `kl`, the
        divergence from the model's own predictions to those with the reconstruction.
    """
    n_layers = suite.W_enc.shape[0]
    names = ("delta_ce", "delta_ce_zero", "delta_ce_mean", "kl")
    totals = {name: np.zeros(n_layers) for name in names}
    n_tokens = 0
    for start in range(0, len(contexts) - len(contexts) % batch, batch):
        token_ids = contexts[start : start + batch]
        is_kept = (np.arange(token_ids.shape[1]) > 0) & (token_ids != bos_id)
        resid, logits = lm.residuals_and_logits(token_ids)
        own = _log_probabilities(logits), _cross_entropy(logits, token_ids, is_kept)
        n_tokens += int(is_kept[:, :-1].sum())
        for layer in range(n_layers):
            sums = _replaced_losses(suite.layer(layer), lm, layer, resid[layer], own, token_ids, is_kept, centre[layer])
            for name in names:
                totals[name][layer] += float(sums[name])
        on_batch(start + batch)
    if n_tokens == 0:
        raise InputError(
            f"{len(contexts)} held-out contexts are fewer than a batch of {batch}; lower activations.batch"
        )
    return {name: total / n_tokens for name, total in totals.items()}


def _replaced_losses(
    sae: SaeSuite,
    lm: Any,
    layer: int,
    resid: Float[Array, "B T D"],
    own: tuple[Float[Array, "B T V"], Float[Array, ""]],
    token_ids: Int[np.ndarray, "B T"],
    is_kept: Bool[np.ndarray, "B T"],
    centre: Float[np.ndarray, " D"],
) -> dict[str, Float[Array, ""]]:
    """Return what one layer's replacements add to the summed loss; `own` is the model's own log p and summed loss."""
    resid = jnp.asarray(resid, jnp.float32)
    log_p, own_ce = own
    replacements = {
        "delta_ce": reconstruct(sae, resid),
        "delta_ce_zero": jnp.zeros_like(resid),
        "delta_ce_mean": jnp.broadcast_to(jnp.asarray(centre, jnp.float32), resid.shape),
    }
    sums = {}
    for name, replacement in replacements.items():
        changed = lm.logits_from(layer, jnp.where(is_kept[..., None], replacement, resid))
        sums[name] = _cross_entropy(changed, token_ids, is_kept) - own_ce
        if name == "delta_ce":
            sums["kl"] = _divergence(log_p, changed, is_kept)
    return sums


@jax.jit
def reconstruct(sae: SaeSuite, resid: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Return the reconstruction of one layer's residual stream."""
    return sae.decode(sae.encode(resid))


@jax.jit
def _log_probabilities(logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
    return jax.nn.log_softmax(logits.astype(jnp.float32))


@jax.jit
def _cross_entropy(
    logits: Float[Array, "B T V"], token_ids: Int[Array, "B T"], is_kept: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Return the cross-entropy of the next tokens summed over the kept ones, nats."""
    logits = logits[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, token_ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * is_kept[:, :-1])


@jax.jit
def _divergence(
    log_p: Float[Array, "B T V"], logits: Float[Array, "B T V"], is_kept: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Return KL(p || softmax(logits)) summed over the kept tokens that have a next one, nats."""
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    log_p = log_p[:, :-1]
    return jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * is_kept[:, :-1])
