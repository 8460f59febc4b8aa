"""The SAE architectures, each written for one layer: how it starts, its loss, and how it encodes afterwards.

A suite maps these functions over its layers. To add an architecture: a section with its functions and its entry in
`ARCHITECTURES`, and its test. Building blocks are in `autoencoder` (linear parts), `selection` (which latents are
kept), `sparse` (products by kept latents) and `losses`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsae.artifacts import InputError
from jaxsae.config import SaeConfig
from jaxsae.sae.autoencoder import AnyArray, SaeParams, dot, row_lengths, unit_rows, with_unit_rows
from jaxsae.sae.losses import (
    Moment,
    Seen,
    count_fired,
    dense_loss,
    encoder,
    fraction_of_variance,
    see,
    smallest_kept,
    sparse_loss,
)
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
ROW_LENGTH = 0.5  # of decoder rows at the start: short ones turn faster, and lengthen as they learn
PULL = 50.0  # an L1 penalty's largest weight where it aims at k, |x|^2 being D; published ones are 1 to 20
SQUARE = 4.0  # weight of (L0 / k - 1)^2; with 1 more latents die on the demo's activations
_TANH_SCALE, _PRE_ACT_WEIGHT = 4.0, 3e-6  # both published


def init_tied(
    key: Array, centre: Float[Array, " D"], n_latents: int, config: SaeConfig, *, length: float = ROW_LENGTH
) -> SaeParams:
    """Decoder rows of one length in random directions, the encoder their transpose, b_dec the centre."""
    W_dec = length * unit_rows(jax.random.normal(key, (n_latents, len(centre))))
    return SaeParams(W_enc=W_dec.T, b_enc=jnp.zeros(n_latents), W_dec=W_dec, b_dec=centre)


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
        encode: (pre [B F], k, threshold [F], latent_axis) -> features [B F], the same for a row whatever the batch;
            with an axis, of this shard's latents.
        init: (key, centre [D], F, config) -> params before the first step, on scaled rows.
        fold: (params, threshold estimated from the batches, config) -> W_enc, b_enc, W_dec, b_dec and threshold [F]
            with which `encode` does what training did.
        has_free_rows: the optimizer moves decoder rows of any length, while `loss` and `fold` see the SAE with unit
            rows that is the same (`autoencoder.with_unit_rows`); else rows are projected to unit length.
        centres_input: the encoder reads acts - b_dec, and inputs are scaled so that E|x|^2 = D.
        estimates_threshold: the threshold at inference is estimated from the training batches.
        imposes_k: training keeps k latents, on average or in each row.
        revives_dead: an auxiliary loss trains dead latents on what the living ones leave over.
        defaults: what settings of `sae` are where they are unset.
        sparse_from: F / k from which products by codes take less time on a CPU than dense ones, measured at D 768 (2
            cores, `tests/bench/crossover.py`).
        codes: (pre [B F], moment) -> what `loss` keeps as codes, the batch's threshold (or None), and whether the codes
            hold all of it, the same on every shard (None: always); unset where the loss is dense. An architecture that
            has it has free rows.
    """

    loss: Callable[[SaeParams, Float[Array, "B D"], Moment], Loss]
    encode: Callable[..., Float[Array, "B F"]]
    init: Callable[..., SaeParams] = init_tied
    fold: Callable[[SaeParams, Float[Array, ""], SaeConfig], dict[str, Any]] = fold_plain
    has_free_rows: bool = True
    centres_input: bool = True
    estimates_threshold: bool = False
    imposes_k: bool = False
    revives_dead: bool = True
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sparse_from: float = math.inf
    codes: Callable[[Float[Array, "B F"], Moment], tuple[Codes, Any, Any]] | None = None


def architecture(name: str) -> Architecture:
    """Return an architecture by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"sae.architecture is {name!r}, expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def setting(config: SaeConfig, name: str) -> float:
    """Return a setting of `sae`, or where it is unset the architecture's own."""
    found = getattr(config, name)
    return architecture(config.architecture).defaults[name] if found is None else found


def annealed(moment: Moment, start: float | int, end: float | int) -> Float[Array, ""]:
    """Return what goes from `start` to `end` in a straight line over the first `sae.anneal` of the run."""
    done = jnp.minimum(moment.progress / max(setting(moment.config, "anneal"), 1e-9), 1.0)
    return start + (end - start) * done


def sparsity_weight(feats: Float[Array, "B F"], moment: Moment) -> Float[Array, ""]:
    """Return the weight of a penalty: `sae.sparsity_coefficient`, annealed from 0; unset, what brings mean L0 to k.

    It then is `PULL` times the share by which the batch's mean L0 exceeds what is aimed at, at most `PULL`, and 0
    below that: a controller without a memory, under which L0 comes to rest where the penalty is as strong as it has to
    be, a few per cent too high. What is aimed at falls over the annealing, by the same factor in each step, from F to
    k: latents that are all shrunk at once die together.
    """
    config, n_latents = moment.config, moment.n_latents(feats)
    if config.sparsity_coefficient is not None:
        return annealed(moment, 0.0, config.sparsity_coefficient)
    n_active = moment.total(moment.all_latents(count_fired(lax.stop_gradient(feats)).sum()))
    aim = jnp.exp(annealed(moment, math.log(n_latents), math.log(config.k)))
    return PULL * jnp.clip(n_active / (moment.n_rows(feats) * aim) - 1, 0.0, 1.0)


def gradients(name: str, params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> tuple[Loss, SaeParams]:
    """Return ((share of the loss, what it saw), its gradients), by codes where asked for, possible, and exact.

    Args:
        params: as the optimizer has them, decoder rows of any length where the architecture has free rows.
    """
    arch = architecture(name)

    def dense() -> tuple[Loss, SaeParams]:
        def loss(params: SaeParams) -> Loss:
            return arch.loss(with_unit_rows(params) if arch.has_free_rows else params, acts, moment)

        return jax.value_and_grad(loss, has_aux=True)(params)

    if arch.codes is None or not moment.is_sparse:
        return dense()
    lengths = lax.stop_gradient(row_lengths(params.W_dec))
    pre = encoder(params, acts, centres_input=True, dtype=moment.dtype)
    codes, threshold, fits = arch.codes(pre * lengths, moment)

    def sparse() -> tuple[Loss, SaeParams]:
        return jax.value_and_grad(sparse_loss, has_aux=True)(params, acts, codes, lengths, moment, threshold)

    return sparse() if fits is None else lax.cond(fits, sparse, dense)


def k_slots(config: SaeConfig) -> int:
    """Return the most latents that training keeps for a row, or on average."""
    return max(config.k, config.k_start or 0)


# TopK: each row keeps its k largest latents (Gao et al. 2024, arXiv:2406.04093).


def topk_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return the unexplained fraction of variance with k latents a row, more at first where k is annealed."""
    pre = encoder(params, acts, centres_input=True, dtype=moment.dtype)
    codes, *_ = _topk_codes(pre, moment)
    return dense_loss(params, acts, spread(codes, pre), moment, bar=smallest_kept(codes.values))


def _topk_codes(pre: Float[Array, "B F"], moment: Moment) -> tuple[Codes, None, None]:
    config = moment.config
    k_now = None if config.k_start is None else jnp.round(_annealed_k(moment))
    return topk_codes(pre, k_slots(config), k_now, moment.latent_axis), None, None


def _annealed_k(moment: Moment) -> Float[Array, ""]:
    return annealed(moment, moment.config.k_start or moment.config.k, moment.config.k)


def _encode_topk(
    pre: Float[Array, "B F"], k: int, threshold: Float[AnyArray, " F"], latent_axis: str | None = None
) -> Float[Array, "B F"]:
    return keep_topk(pre, k, latent_axis)


# BatchTopK: the batch keeps its B k largest latents; at inference a threshold (Bussmann et al. 2024, arXiv:2412.06410).


def batch_topk_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return the unexplained fraction of variance with k latents a row on average."""
    pre = encoder(params, acts, centres_input=True, dtype=moment.dtype)
    feats, threshold = _keep_batch(pre, moment)
    return dense_loss(params, acts, feats, moment, threshold)


def _keep_batch(pre: Float[Array, "B F"], moment: Moment) -> tuple[Float[Array, "B F"], Float[Array, ""]]:
    """Return the batch's k largest latents a row, and the smallest of them; at first each row's k largest.

    Rows that are far out would take most of the batch's latents while all are alike, and the others' would learn
    nothing: on the demo's last layer FVU is a third lower for the rows' turn.
    """
    return keep_batch_topk(
        pre,
        _batch_k(moment),
        n_row=ROW_FACTOR * k_slots(moment.config),
        by_row=_is_by_row(moment),
        axis=moment.axis,
        latent_axis=moment.latent_axis,
    )


def _is_by_row(moment: Moment) -> Bool[Array, ""] | None:
    return moment.progress < moment.config.by_row if moment.config.by_row > 0 else None


def _batch_topk_codes(pre: Float[Array, "B F"], moment: Moment) -> tuple[Codes, Float[Array, ""], Bool[Array, ""]]:
    return batch_topk_codes(
        pre, k_slots(moment.config), _batch_k(moment), moment.axis, moment.latent_axis, by_row=_is_by_row(moment)
    )


def _batch_k(moment: Moment) -> int | Float[Array, ""]:
    return moment.config.k if moment.config.k_start is None else _annealed_k(moment)


def _fold_estimated(params: SaeParams, estimated: Float[Array, ""], config: SaeConfig) -> dict[str, Any]:
    return _weights(params, jnp.zeros_like(params.b_enc) + estimated)


def _encode_above(
    pre: Float[Array, "B F"], k: int, threshold: Float[AnyArray, " F"], latent_axis: str | None = None
) -> Float[Array, "B F"]:
    return keep_above(pre, threshold)


# Matryoshka: BatchTopK of nested dictionaries (Bussmann et al. 2025, arXiv:2503.17547).


def matryoshka_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return the mean, over the nested dictionaries, of the unexplained fraction of variance.

    The batch's largest latents are chosen once, among all. Each dictionary is a prefix of the next, so that all are
    decoded by one product, in parts that add up. What was seen is the widest one's.
    """
    pre = encoder(params, acts, centres_input=True, dtype=moment.dtype)
    feats, threshold = _keep_batch(pre, moment)
    sizes = group_sizes(moment.config, moment.n_latents(pre))
    loss, error = jnp.zeros(()), acts - params.b_dec
    for start, end in itertools.pairwise((0, *sizes)):
        error = error - _decode_group(params, feats, start, end, moment)
        loss += fraction_of_variance(error, moment) / len(sizes)
    return see(loss, error, count_fired(feats), threshold)


def _decode_group(
    params: SaeParams, feats: Float[Array, "B F"], start: int, end: int, moment: Moment
) -> Float[Array, "B D"]:
    """Return what the latents from `start` to before `end` add to the reconstruction."""
    if moment.latent_axis is None:
        return dot(feats[:, start:end], params.W_dec[start:end], moment.dtype)
    # A shard does not know, when it is compiled, which of its latents are in a group.
    ids = lax.axis_index(moment.latent_axis) * feats.shape[-1] + jnp.arange(feats.shape[-1])
    own = jnp.where((ids >= start) & (ids < end), feats, 0.0)
    return moment.all_latents(dot(own, params.W_dec, moment.dtype))


def group_sizes(config: SaeConfig, n_latents: int) -> tuple[int, ...]:
    """Return the sizes of the nested dictionaries, the last being F: `sae.groups`, or F/16, F/8, F/4, F/2 and F.

    Raises:
        InputError: `sae.groups` does not rise to F.
    """
    sizes = config.groups or tuple(sorted({max(1, n_latents >> halvings) for halvings in range(5)}))
    if sizes[-1] != n_latents or any(small >= large for small, large in itertools.pairwise((0, *sizes))):
        raise InputError(f"sae.groups is {sizes}, expected rising sizes of which the last is {n_latents}, the latents")
    return sizes


# ReLU with an L1 penalty (Bricken et al. 2023; Conerly et al. 2024, transformer-circuits.pub/2024/april-update).


def relu_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return sum (|x - x_hat|^2 + weight |f|_1) / (B variance).

    Decoder rows are unit, so that their norms are left out. A published coefficient holds as it is where inputs had
    E|x|^2 = D.
    """
    feats = jax.nn.relu(encoder(params, acts, centres_input=True, dtype=moment.dtype))
    error, fired = acts - moment.decode(params, feats), count_fired(feats)
    penalty = sparsity_weight(feats, moment) * moment.all_latents(moment.share(feats))
    return see(fraction_of_variance(error, moment) + penalty, error, fired, bar=jnp.zeros(()))


# Gated: one path decides which latents are active, the other how much (Rajamanoharan et al. 2024, arXiv:2404.16014).


def gated_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return sum (|x - x_hat|^2 + weight |relu(gate)|_1 + |x - x_hat_gate|^2) / (B variance).

    b_enc is the gate's bias. The magnitudes' weights are the gate's, scaled by exp(r_mag) for each latent. x_hat_gate
    is what a frozen decoder makes of the rectified gate, so that the penalty shrinks the gate alone.
    """
    gate = encoder(params, acts, centres_input=True, dtype=moment.dtype)
    magnitude = jnp.exp(params.gate["r_mag"]) * (gate - params.b_enc) + params.gate["b_mag"]
    feats, opening = jnp.where(gate > 0, jax.nn.relu(magnitude), 0.0), jax.nn.relu(gate)
    frozen = dataclasses.replace(params, W_dec=lax.stop_gradient(params.W_dec), b_dec=lax.stop_gradient(params.b_dec))
    error, fired = acts - moment.decode(params, feats), count_fired(feats)
    through_gate = fraction_of_variance(acts - moment.decode(frozen, opening), moment)
    penalty = sparsity_weight(feats, moment) * moment.all_latents(moment.share(opening))
    return see(fraction_of_variance(error, moment) + penalty + through_gate, error, fired, bar=jnp.zeros(()))


def _init_gated(key: Array, centre: Float[Array, " D"], n_latents: int, config: SaeConfig) -> SaeParams:
    zeros = jnp.zeros(n_latents)
    return dataclasses.replace(init_tied(key, centre, n_latents, config), gate={"r_mag": zeros, "b_mag": zeros})


def _fold_gated(params: SaeParams, estimated: Float[Array, ""], config: SaeConfig) -> dict[str, Any]:
    """Return the magnitudes' weights, and the threshold in them at which the gate opens: gated is a JumpReLU."""
    ratio, b_mag = jnp.exp(params.gate["r_mag"]), params.gate["b_mag"]
    magnitudes = dataclasses.replace(params, W_enc=params.W_enc * ratio, b_enc=b_mag)
    return _weights(magnitudes, b_mag - ratio * params.b_enc)


# JumpReLU: a learned threshold for each latent, by straight-through estimators (Rajamanoharan et al. 2024,
# arXiv:2407.14435).


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(
    pre: Float[Array, "B F"], threshold: Float[Array, "B F"], bandwidth: float
) -> tuple[Float[Array, "B F"], Float[Array, "B F"]]:
    """Return (pre where it is above the threshold, and else 0; 1 where it is, and else 0).

    Neither has a useful gradient in the threshold. Theirs here are -threshold K(u) / bandwidth and -K(u) / bandwidth,
    u = (pre - threshold) / bandwidth and K(u) = 1 for |u| < 1/2: unbiased estimates, over rows, of the gradients of
    what the two are on average, when a uniform number of that width is added to pre. The gradient in `pre` is the
    plain one. Source: arXiv:2407.14435, eq. (11) and (12).
    """
    is_above = pre > threshold
    return jnp.where(is_above, pre, 0.0), is_above.astype(pre.dtype)


def _jump_forward(pre: Float[Array, "B F"], threshold: Float[Array, "B F"], bandwidth: float) -> tuple:
    return jump(pre, threshold, bandwidth), (pre, threshold)


def _jump_backward(bandwidth: float, kept: tuple, gradients: tuple) -> tuple[Float[Array, "B F"], Float[Array, "B F"]]:
    (pre, threshold), (to_feats, to_steps) = kept, gradients
    is_near = jnp.abs(pre - threshold) < bandwidth / 2
    to_threshold = -jnp.where(is_near, (threshold * to_feats + to_steps) / bandwidth, 0.0)
    return jnp.where(pre > threshold, to_feats, 0.0), to_threshold


jump.defvjp(_jump_forward, _jump_backward)


def jumprelu_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return the unexplained fraction of variance plus weight * mean L0, or plus weight * (mean L0 / k - 1)^2.

    The square brings mean L0 to k; it has the weight `SQUARE` where `sae.sparsity_coefficient` is unset. A
    published coefficient holds where inputs had E|x|^2 = 1, a published threshold or bandwidth is multiplied by
    sqrt(D). Source: arXiv:2407.14435, eq. (9), and the appendix that fixes the sparsity for the square.
    """
    pre, threshold = encoder(params, acts, centres_input=True, dtype=moment.dtype), _thresholds(params)
    feats, is_active = jump(pre, jnp.broadcast_to(threshold, pre.shape), setting(moment.config, "bandwidth"))
    error = acts - moment.decode(params, feats)
    penalty = _l0_penalty(is_active, moment) + _pre_act_loss(pre, threshold, moment)
    return see(fraction_of_variance(error, moment) + penalty, error, count_fired(feats))


def _l0_penalty(is_active: Float[Array, "B F"], moment: Moment) -> Float[Array, ""]:
    config, mean_l0 = moment.config, moment.all_latents(is_active.sum()) / moment.n_rows(is_active)
    if config.sparsity_coefficient is not None:
        return annealed(moment, 0.0, config.sparsity_coefficient) * mean_l0
    n_shards = moment.n_rows(is_active) // len(is_active)
    return annealed(moment, 0.0, SQUARE) * (moment.total(mean_l0) / config.k - 1) ** 2 / n_shards


def _pre_act_loss(pre: Float[Array, "B F"], threshold: Float[Array, " F"], moment: Moment) -> Float[Array, ""]:
    """Return 3e-6 sum relu(threshold - pre) / (B variance) over dead latents.

    However small, it is all that moves a dead latent's threshold, and Adam does not mind the size: the threshold falls
    until the latent fires. Source: transformer-circuits.pub/2025/january-update.
    """
    short = jnp.where(moment.is_dead, jax.nn.relu(threshold - pre), 0.0)
    return _PRE_ACT_WEIGHT * moment.all_latents(moment.share(short))


def _thresholds(params: SaeParams) -> Float[Array, " F"]:
    return jnp.exp(params.gate["log_threshold"])


def _init_jumprelu(key: Array, centre: Float[Array, " D"], n_latents: int, config: SaeConfig) -> SaeParams:
    """Unit decoder rows, for which thresholds are published.

    Thresholds lie at `sae.threshold`, or unset, where k latents would exceed them if pre-activations were normal. A
    random direction's pre-activation has the variance of a coordinate, (E|x|^2 - |centre|^2) / D with E|x|^2 = D,
    about a centre that is the mean. The published 0.001 sqrt(D) and 0.1 leave half of the latents active at first, and
    take long runs to rise.
    """
    deviation = jnp.sqrt(jnp.maximum(1 - jnp.sum(centre**2) / len(centre), 1e-6))
    exceeded_by_k = deviation * jnp.maximum(jax.scipy.special.ndtri(1 - config.k / n_latents), 0.1)
    threshold = exceeded_by_k if config.threshold is None else config.threshold
    gate = {"log_threshold": jnp.full(n_latents, jnp.log(threshold))}
    return dataclasses.replace(init_tied(key, centre, n_latents, config, length=1.0), gate=gate)


def _fold_thresholds(params: SaeParams, estimated: Float[Array, ""], config: SaeConfig) -> dict[str, Any]:
    return _weights(params, _thresholds(params))


# JumpReLU with a tanh penalty (Anthropic 2025, transformer-circuits.pub/2025/january-update).


def tanh_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return sum (|x - x_hat|^2 + weight sum tanh(4 f) + 3e-6 sum_dead relu(threshold - pre)) / (B variance).

    The straight-through gradients reach the pre-activations too, not the thresholds alone. Decoder rows are unit, so
    that their norms are left out. Published coefficients hold as they are: inputs had E|x|^2 = D.
    """
    pre = encoder(params, acts, centres_input=True, dtype=moment.dtype)
    threshold = _thresholds(params)
    # Equal to the threshold; what reaches it goes to the pre-activation with the opposite sign.
    moving = threshold - (pre - lax.stop_gradient(pre))
    feats, _ = jump(pre, moving, setting(moment.config, "bandwidth"))
    error, fired = acts - moment.decode(params, feats), count_fired(feats)
    penalty = sparsity_weight(feats, moment) * moment.all_latents(moment.share(jnp.tanh(_TANH_SCALE * feats)))
    loss = fraction_of_variance(error, moment) + penalty + _pre_act_loss(pre, threshold, moment)
    return see(loss, error, fired)


# The published run's (GhostTrack): one fixed threshold without a gradient, an L1 penalty, inputs as they are.


def reference_loss(params: SaeParams, acts: Float[Array, "B D"], moment: Moment) -> Loss:
    """Return mean (x - x_hat)^2 + sparsity_coefficient * mean |f|, means over rows and coordinates."""
    config, n_rows = moment.config, moment.n_rows(acts)
    pre = encoder(params, acts, centres_input=False, dtype=moment.dtype)
    feats = keep_above(pre, jnp.float32(setting(config, "threshold")))
    error = acts - moment.decode(params, feats)
    penalty = moment.all_latents(jnp.sum(jnp.abs(feats))) / (n_rows * moment.n_latents(feats))
    weight = setting(config, "sparsity_coefficient")
    loss = jnp.sum(error**2) / (n_rows * acts.shape[-1]) + weight * penalty
    return see(loss, error, count_fired(feats))


def _init_reference(key: Array, centre: Float[Array, " D"], n_latents: int, config: SaeConfig) -> SaeParams:
    """The published run's: torch's nn.Linear default for both layers, then unit decoder rows."""
    keys, d_model = jax.random.split(key, 4), len(centre)
    bound_in, bound_out = d_model**-0.5, n_latents**-0.5
    return SaeParams(
        W_enc=jax.random.uniform(keys[0], (d_model, n_latents), minval=-bound_in, maxval=bound_in),
        b_enc=jax.random.uniform(keys[1], (n_latents,), minval=-bound_in, maxval=bound_in),
        W_dec=unit_rows(jax.random.uniform(keys[2], (n_latents, d_model), minval=-bound_out, maxval=bound_out)),
        b_dec=jax.random.uniform(keys[3], (d_model,), minval=-bound_out, maxval=bound_out),
    )


def _fold_fixed(params: SaeParams, estimated: Float[Array, ""], config: SaeConfig) -> dict[str, Any]:
    return _weights(params, jnp.full_like(params.b_enc, setting(config, "threshold")))


ARCHITECTURES = {
    "topk": Architecture(
        topk_loss, _encode_topk, codes=_topk_codes, sparse_from=24.0, imposes_k=True, defaults={"anneal": 0.1}
    ),
    "batchtopk": Architecture(
        batch_topk_loss,
        _encode_above,
        fold=_fold_estimated,
        estimates_threshold=True,
        codes=_batch_topk_codes,
        sparse_from=32.0,
        imposes_k=True,
        defaults={"anneal": 0.1},
    ),
    "matryoshka": Architecture(
        matryoshka_loss,
        _encode_above,
        fold=_fold_estimated,
        estimates_threshold=True,
        imposes_k=True,
        defaults={"anneal": 0.1},
    ),
    "relu": Architecture(relu_loss, _encode_above, defaults={"anneal": 0.1}),
    "gated": Architecture(gated_loss, _encode_above, init=_init_gated, fold=_fold_gated, defaults={"anneal": 0.1}),
    "jumprelu": Architecture(
        jumprelu_loss,
        _encode_above,
        init=_init_jumprelu,
        fold=_fold_thresholds,
        defaults={"anneal": 0.1, "bandwidth": 2.0},
    ),
    "jumprelu_tanh": Architecture(
        tanh_loss,
        _encode_above,
        init=_init_jumprelu,
        fold=_fold_thresholds,
        revives_dead=False,
        defaults={"anneal": 1.0, "bandwidth": 2.0},
    ),
    "jumprelu_l1": Architecture(
        reference_loss,
        _encode_above,
        init=_init_reference,
        fold=_fold_fixed,
        has_free_rows=False,
        centres_input=False,
        revives_dead=False,
        defaults={"anneal": 0.0, "threshold": 1.0, "sparsity_coefficient": 0.05},
    ),
}
