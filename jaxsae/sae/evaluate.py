"""How good a suite is, on activations it was not trained on: one definition for each number.

Position 0 and BOS tokens are in none of them: their activations are not part of the source, and where the language
model's loss is measured their residual stream is left as it is. GPT-2's position 0 is so long that it alone would bring
the FVU near 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.sae.autoencoder import AnyArray
from jaxsae.sae.suite import SaeSuite

DENSITY_BIN = 0.25  # of log10: four bins for a factor of ten
CROWDING_QUANTILES = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_DIGITS = ((11, 20), (10, 10), (10, 0))  # width and place of the pieces that a non-negative float32's 31 bits are in
_N_BINS = 2**11  # one for each value of the widest piece


@dataclasses.dataclass(frozen=True)
class Quality:
    """Numbers of each layer on held-out rows, all [L] and float64, with inference's encoding.

    Attributes:
        mse: mean squared error of a coordinate, in squared residual units.
        fvu: sum |x - x_hat|^2 / sum |x - mean|^2, with the mean of these same rows.
        explained_variance_legacy: mean over rows of 1 - |x - x_hat|^2 / |x - centre|^2, as older tools report it. It is
            not 1 - fvu: every row weighs the same, however large its error, so that it flatters an SAE that fails at
            the rows far from the mean, and understates one that fails at those near it. Never compare the two.
        l0: mean number of active latents.
        firing_rate: [L F], share of rows on which a latent is active.
        n_rows: rows behind the numbers.
    """

    mse: Float[np.ndarray, " L"]
    fvu: Float[np.ndarray, " L"]
    explained_variance_legacy: Float[np.ndarray, " L"]
    l0: Float[np.ndarray, " L"]
    firing_rate: Float[np.ndarray, "L F"]
    n_rows: int

    def by_layer(self) -> dict[str, Float[np.ndarray, " L"]]:
        """Return one number a layer for each name; `dead_held_out` is the share of latents active on none of the rows.

        Rows are few beside the training tokens: a latent that fires more seldom than once in all of them is not dead.
        """
        return {
            "mse": self.mse,
            "fvu": self.fvu,
            "explained_variance_legacy": self.explained_variance_legacy,
            "l0_inference": self.l0,
            "dead_held_out": (self.firing_rate == 0).mean(axis=-1),
        }

    def density(self) -> tuple[Float[np.ndarray, " edges"], Int[np.ndarray, "L bins"]]:
        """Return the histogram of log10 firing rates: edges, and how many of each layer's latents lie between them.

        Bins are `DENSITY_BIN` wide and reach from below one row in all of them up to every row; latents that are active
        on none are in no bin.
        """
        n_bins = int(np.log10(self.n_rows) / DENSITY_BIN) + 1
        edges = DENSITY_BIN * np.arange(-n_bins, 1)
        log_rates = [np.log10(rates[rates > 0]) for rates in self.firing_rate]
        return edges, np.stack([np.histogram(rates, edges)[0] for rates in log_rates])


def make_row_sums(mesh: Mesh) -> Callable:
    """Return the compiled (suite, acts [L B D], weights [B], centre [L D]) -> sums over the weighted rows, sharded."""
    latent_axis = meshes.latent_axis(mesh)

    def one_layer(sae: SaeSuite, acts: Float[Array, "B D"], weights: Float[Array, " B"], centre: Float[Array, " D"]):
        feats = sae.encode(acts, latent_axis=latent_axis)
        error = acts - sae.decode(feats, latent_axis=latent_axis)
        centred = acts - centre
        is_active = (feats > 0) * weights[:, None]
        squared_error, squared = jnp.sum(error**2, axis=-1), jnp.sum(centred**2, axis=-1)
        # Sums, not products with the weights: a GPU may round a product's operands to 10 bits.
        return {
            "squared_error": jnp.sum(weights * squared_error),
            "squared": jnp.sum(weights * squared),
            "ratio": jnp.sum(weights * squared_error / squared),
            "sum": jnp.sum(weights[:, None] * centred, axis=0),
            "fired": is_active.sum(axis=0),
        }

    def local_sums(suite: SaeSuite, acts: Float[Array, "L B D"], weights: Float[Array, " B"], centre: Any):
        local = jax.vmap(one_layer, in_axes=(0, 0, None, 0))(suite, acts.astype(jnp.float32), weights, centre)
        return lax.psum(local, meshes.DATA)

    def sums(suite: SaeSuite, acts: Float[Array, "L B D"], weights: Float[Array, " B"], centre: Float[Array, "L D"]):
        specs = (meshes.layer_specs(suite, mesh), meshes.BY_LAYER_AND_DATA, meshes.BY_DATA, meshes.BY_LAYER)
        whole = dict.fromkeys(("squared_error", "squared", "ratio", "sum"), meshes.BY_LAYER)
        out_specs = whole | {"fired": meshes.latent_spec(mesh)}
        sharded = jax.shard_map(local_sums, mesh=mesh, in_specs=specs, out_specs=out_specs)
        return sharded(suite, acts, weights, centre)

    return jax.jit(sums)


def measure(
    row_sums: Callable,
    suite: SaeSuite,
    batches: Iterable[Float[AnyArray, "l _ D"]],
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
        centre: the training rows' mean: near that of these rows, which keeps the variance's sums small.

    Raises:
        InputError: there is no row.
    """
    totals: dict[str, np.ndarray] = {}
    n_rows = 0
    for acts, weights, n_real in _placed(batches, batch, layers, n_layers, mesh):
        sums = meshes.fetch(row_sums(suite, acts, weights, centre))
        totals = {name: totals.get(name, 0) + np.asarray(x, np.float64) for name, x in sums.items()}
        n_rows += n_real
    if n_rows == 0:
        raise InputError("no held-out tokens to evaluate on; raise train.held_out or use a longer corpus")
    variance = totals["squared"] - (totals["sum"] ** 2).sum(axis=-1) / n_rows
    return Quality(
        mse=(totals["squared_error"] / (n_rows * suite.d_model))[:n_layers],
        fvu=(totals["squared_error"] / variance)[:n_layers],
        explained_variance_legacy=(1 - totals["ratio"] / n_rows)[:n_layers],
        l0=(totals["fired"].sum(axis=-1) / n_rows)[:n_layers],
        firing_rate=(totals["fired"] / n_rows)[:n_layers],
        n_rows=n_rows,
    )


def _placed(
    batches: Iterable[Float[AnyArray, "l _ D"]], batch: int, layers: slice, n_layers: int, mesh: Mesh
) -> Iterator[tuple[Float[Array, "L B D"], Float[Array, " B"], int]]:
    """Yield each batch on the mesh, filled up to `batch` rows, the rows' weights (0 for filling), and the real rows."""
    for acts in batches:
        n_real = acts.shape[1]
        weights = (np.arange(batch) < n_real).astype(np.float32)
        yield (
            meshes.put_batch(meshes.fill_rows(acts, batch), layers, n_layers, mesh),
            meshes.put_rows(weights, mesh),
            n_real,
        )


def place(suite: SaeSuite, mesh: Mesh) -> SaeSuite:
    """Return a suite of NumPy arrays spread over the mesh's layers and latents, as `measure` wants it."""
    return meshes.put_layers(jax.tree.map(lambda x: meshes.pad_layers(x, mesh), suite), mesh)


def pca_fvu(
    train: Float[np.ndarray, "L N D"], held_out: Iterable[Float[np.ndarray, "L _ D"]], n_components: int
) -> Float[np.ndarray, " L"]:
    """Return the FVU on held-out rows of each layer's best linear code of `n_components` numbers.

    Mean and principal components are those of `train`; the held-out variance is around the held-out mean, as for FVU.

    Args:
        held_out: rows in batches, of which one is in memory at a time.
    """
    n_layers, _, d_model = train.shape
    codes = [_principal_components(rows.astype(np.float64), n_components) for rows in train]
    squared, kept, sums, n_rows = np.zeros(n_layers), np.zeros(n_layers), np.zeros((n_layers, d_model)), 0
    for batch in held_out:
        n_rows += batch.shape[1]
        for layer, (mean, components) in enumerate(codes):
            centred = batch[layer].astype(np.float64) - mean
            squared[layer] += np.sum(centred**2)
            kept[layer] += np.sum((centred @ components) ** 2)
            sums[layer] += centred.sum(axis=0)
    return (squared - kept) / (squared - (sums**2).sum(axis=-1) / n_rows)


def _principal_components(
    rows: Float[np.ndarray, "N D"], n: int
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D n"]]:
    """Return the mean of the rows and the n directions in which they vary most."""
    mean = rows.mean(axis=0)
    return mean, np.linalg.eigh((rows - mean).T @ (rows - mean))[1][:, -n:]


@functools.partial(jax.jit, static_argnames="block")
def crowding(W_dec: Float[Array, "F D"], *, block: int = 512) -> Float[Array, " F"]:
    """Return each latent's largest |cosine| with the decoder row of another latent of its layer; 0 without another.

    A latent near 1 shares its direction with another: two latents do the work of one.

    Args:
        block: rows that are compared with all others at a time; memory is block x F numbers, 64 MiB at F 32,768.
    """
    norms = jnp.linalg.norm(W_dec, axis=-1, keepdims=True)
    directions = W_dec / jnp.where(norms > 0, norms, 1)

    def largest(latent: Int[Array, ""]) -> Float[Array, ""]:
        cosines = jnp.matmul(directions, directions[latent], precision=lax.Precision.HIGHEST)
        return jnp.abs(cosines).at[latent].set(0).max()

    return lax.map(largest, jnp.arange(len(W_dec)), batch_size=block)


def crowding_by_layer(suite: SaeSuite, layers: slice) -> dict[str, Float[np.ndarray, " l"]]:
    """Return mean and `CROWDING_QUANTILES` of `crowding` over the latents, for each of these layers."""
    cosines = np.stack([np.asarray(crowding(W_dec), np.float64) for W_dec in suite.W_dec[layers]])
    quantiles = np.quantile(cosines, list(CROWDING_QUANTILES.values()), axis=1)
    named = {f"crowding_{name}": row for name, row in zip(CROWDING_QUANTILES, quantiles, strict=True)}
    return {"crowding_mean": cosines.mean(axis=1)} | named


def random_crowding(n_latents: int, d_model: int) -> float:
    """Return the median `crowding` of so many random directions, against which a decoder's is to be seen; 0 of one.

    The squared cosine of two such directions has the Beta(1/2, (D - 1)/2) distribution, and the largest of F - 1 stays
    below its quantile 2^(-1/(F - 1)) half of the time.
    """
    if n_latents == 1:
        return 0.0
    return float(np.sqrt(scipy.special.betaincinv(0.5, (d_model - 1) / 2, 0.5 ** (1 / (n_latents - 1)))))


def make_bit_counts(mesh: Mesh) -> Callable:
    """Return the compiled (suite, acts [L B D], weights [B], start [L], shift) -> positive activations by their bits.

    The suite's thresholds are taken for 0. Bin b of the outcome, [L `_N_BINS`] and sharded, counts the activations
    whose float32 bit pattern, shifted right by `shift`, is `start + b`; rows of weight 0 do not count.
    """
    latent_axis = meshes.latent_axis(mesh)
    axes = (meshes.DATA,) if latent_axis is None else (meshes.DATA, latent_axis)

    def local_counts(
        suite: SaeSuite,
        acts: Float[Array, "L B D"],
        weights: Float[Array, " B"],
        start: Int[Array, " L"],
        shift: Int[Array, ""],
    ) -> Int[Array, "L bins"]:
        def one_layer(args: tuple[SaeSuite, Float[Array, "B D"], Int[Array, ""]]) -> Int[Array, " bins"]:
            sae, acts, start = args
            lowest = dataclasses.replace(sae, threshold=jnp.zeros_like(sae.threshold))
            feats = lowest.encode(acts, latent_axis=latent_axis)
            bins = (lax.bitcast_convert_type(feats, jnp.int32) >> shift) - start
            is_counted = (feats > 0) & (weights > 0)[:, None] & (bins >= 0)
            return jnp.zeros(_N_BINS, jnp.int32).at[jnp.where(is_counted, bins, _N_BINS)].add(1, mode="drop")

        # One layer after the other: the activations of all of them, [L B F], need not fit.
        return lax.psum(lax.map(one_layer, (suite, acts, start)), axes)

    def counts(suite: SaeSuite, *rows: Array) -> Int[Array, "L bins"]:
        specs = (meshes.BY_LAYER_AND_DATA, meshes.BY_DATA, meshes.BY_LAYER, meshes.REPLICATED)
        in_specs = (meshes.layer_specs(suite, mesh), *specs)
        return jax.shard_map(local_counts, mesh=mesh, in_specs=in_specs, out_specs=meshes.BY_LAYER)(suite, *rows)

    return jax.jit(counts)


def thresholds_for_k(
    bit_counts: Callable,
    suite: SaeSuite,
    batches: Callable[[], Iterable[Float[AnyArray, "l _ D"]]],
    k: int,
    *,
    batch: int,
    layers: slice,
    n_layers: int,
    mesh: Mesh,
) -> Float[np.ndarray, " L"]:
    """Return each layer's threshold above which the rows have k active latents on average, in residual units.

    It is the largest activation that is one too many, or 0 if there are not so many positive ones; equal activations
    are kept or dropped together. Bit patterns of non-negative floats are ordered like the floats, so that three passes
    over the rows, each counting by the next bits, find it exactly; what is held meanwhile is one batch and the counts.

    Args:
        bit_counts: from `make_bit_counts`.
        suite: sharded over the mesh's layers; its own thresholds do not matter.
        batches: gives the rows anew for each pass, at most `batch` in each piece, of this process's `layers`.
    """
    bits, above = np.zeros(n_layers, np.int32), np.zeros(n_layers, np.int64)
    for width, shift in _DIGITS:
        start = meshes.put_layers(meshes.pad_layers(bits >> shift, mesh), mesh)
        counts, n_rows = np.zeros((n_layers, 2**width), np.int64), 0
        for acts, weights, n_real in _placed(batches(), batch, layers, n_layers, mesh):
            counts += meshes.fetch(bit_counts(suite, acts, weights, start, np.int32(shift)))[:n_layers, : 2**width]
            n_rows += n_real
        reached = above[:, None] + counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # activations in a bin or above it
        digit = np.maximum((reached > n_rows * k).sum(axis=1) - 1, 0)
        above = (reached - counts)[np.arange(n_layers), digit]
        bits += (digit << shift).astype(np.int32)
    return bits.view(np.float32)


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
    Several processes share the batches; each must call this, and each gets the numbers of all.

    Args:
        lm: offers `residuals_and_logits(token_ids)` and `logits_from(layer, resid)`.
        centre: the mean row of each layer, for mean-ablation.
        on_batch: called with the number of contexts done.

    Returns:
        `delta_ce` by the SAE's reconstruction, `delta_ce_zero` by zeros, `delta_ce_mean` by the mean row; `kl`, the
        divergence from the model's own predictions to those with the reconstruction; and `ce_recovered`, the share
        1 - delta_ce / delta_ce_zero, NaN where zeros cost nothing. That one flatters: zeros leave so little of the
        model that a poor reconstruction recovers most of it. Show it only beside delta_ce.
    """
    n_layers = suite.W_enc.shape[0]
    suite = jax.tree.map(jnp.asarray, suite)
    names = ("delta_ce", "delta_ce_zero", "delta_ce_mean", "kl")
    totals, n_tokens = np.zeros((len(names), n_layers)), 0
    starts = range(0, len(contexts) - len(contexts) % batch, batch)
    for start in starts[jax.process_index() :: jax.process_count()]:
        token_ids = contexts[start : start + batch]
        is_kept = (np.arange(token_ids.shape[1]) > 0) & (token_ids != bos_id)
        resid, logits = lm.residuals_and_logits(token_ids)
        own = _log_probabilities(logits), _cross_entropy(logits, token_ids, is_kept)
        n_tokens += int(is_kept[:, :-1].sum())
        for layer in range(n_layers):
            sums = _replaced_losses(suite.layer(layer), lm, layer, resid[layer], own, token_ids, is_kept, centre[layer])
            totals[:, layer] += [float(sums[name]) for name in names]
        on_batch(start + batch)
    totals, n_tokens = meshes.sum_over_processes(totals), int(meshes.sum_over_processes(np.array(n_tokens)))
    if n_tokens == 0:
        raise InputError(
            f"{len(contexts)} held-out contexts are fewer than a batch of {batch}; lower activations.batch"
        )
    losses = dict(zip(names, totals / n_tokens, strict=True))
    zero = losses["delta_ce_zero"]
    recovered = 1 - losses["delta_ce"] / np.where(zero > 0, zero, np.nan)
    return losses | {"ce_recovered": recovered}


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
