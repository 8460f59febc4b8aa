"""What the quality numbers are: against float64 sums, scikit-learn's PCA, and loops over a tiny language model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.sae import evaluate
from jaxsae.sae.suite import SaeSuite

L, D, F, K = 3, 4, 9, 2
LAYERS = slice(0, L)


def make_suite(architecture="batchtopk", seed=0):
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(L, F, D))
    W_dec /= np.linalg.norm(W_dec, axis=-1, keepdims=True)
    arrays = {
        "W_enc": W_dec.swapaxes(1, 2),
        "b_enc": 0.1 * rng.normal(size=(L, F)),
        "W_dec": W_dec,
        "b_dec": rng.normal(size=(L, D)),
        "threshold": np.full((L, F), 0.4),
    }
    return SaeSuite(**{name: x.astype(np.float32) for name, x in arrays.items()}, architecture=architecture, k=K)


def measure(suite, batches, centre, *, batch, layer=1, data=1):
    mesh = meshes.make_mesh(L, layer=layer, data=data)

    def place(x):
        return meshes.put_layers(meshes.pad_layers(np.asarray(x), mesh), mesh)

    return evaluate.measure(
        evaluate.make_row_sums(mesh), jax.tree.map(place, suite), batches, centre=place(centre), batch=batch,
        layers=LAYERS, n_layers=L, mesh=mesh,
    )  # fmt: skip


def plain_quality(suite, acts):
    """Return (mse, fvu, l0, firing rate) of one layer after the other, in float64."""
    rows = []
    for layer in range(L):
        W_enc, b_enc, W_dec, b_dec, threshold = (
            np.asarray(x[layer], np.float64)
            for x in (suite.W_enc, suite.b_enc, suite.W_dec, suite.b_dec, suite.threshold)
        )
        x = acts[layer].astype(np.float64)
        pre = (x - b_dec) @ W_enc + b_enc
        feats = np.where(pre > threshold, pre, 0)
        error = x - feats @ W_dec - b_dec
        fvu = (error**2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
        rows.append(((error**2).mean(), fvu, (feats > 0).sum(axis=-1).mean(), (feats > 0).mean(axis=0)))
    return [np.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize(("layer", "data"), [(1, 1), (4, 2)])
def test_measure__equals_float64_sums__on_ragged_batches_far_from_the_centre(mean, layer, data):
    suite = make_suite()
    acts = (np.random.default_rng(1).normal(size=(L, 21, D)) + mean).astype(np.float32)
    suite = suite.replace(b_dec=suite.b_dec + mean)
    batches = [acts[:, :8], acts[:, 8:16], acts[:, 16:]]
    found = measure(suite, batches, np.zeros((L, D), np.float32), batch=8, layer=layer, data=data)
    mse, fvu, l0, firing_rate = plain_quality(suite, acts)
    assert found.n_rows == 21
    np.testing.assert_array_equal(found.l0, l0)
    np.testing.assert_allclose(found.firing_rate, firing_rate, rtol=1e-12)
    # Rows near 30 are float32 numbers of relative size 6e-8, and the variance about 0 is a thousand times the true one.
    tolerance = 1e-6 if mean == 0 else 2e-3
    np.testing.assert_allclose(found.mse, mse, rtol=1e-6 if mean == 0 else 2e-5)
    np.testing.assert_allclose(found.fvu, fvu, rtol=tolerance)
    if mean:
        near = measure(suite, batches, np.full((L, D), mean, np.float32), batch=8)
        np.testing.assert_allclose(near.fvu, fvu, rtol=2e-5)


def test_measure__of_the_mean_as_reconstruction__is_one():
    acts = np.random.default_rng(2).normal(size=(L, 12, D)).astype(np.float32)
    suite = make_suite()
    suite = suite.replace(b_dec=acts.mean(axis=1), threshold=np.full((L, F), 1e9, np.float32))
    found = measure(suite, [acts], np.zeros((L, D), np.float32), batch=12)
    np.testing.assert_allclose(found.fvu, 1, rtol=1e-6)
    assert not found.l0.any()


def test_measure__without_rows__says_so():
    with pytest.raises(InputError, match=r"no held-out tokens to evaluate on; raise train.held_out"):
        measure(make_suite(), [], np.zeros((L, D), np.float32), batch=8)


@pytest.mark.parametrize("n_components", [1, 3])
def test_pca_fvu__equals_scikit_learn(n_components):
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(L, 6, 6))
    train, held_out = (rng.normal(size=(L, n, 6)) @ mixing + 2 for n in (50, 31))
    expected = []
    for fit, rows in zip(train, held_out, strict=True):
        pca = PCA(n_components).fit(fit)
        error = rows - pca.inverse_transform(pca.transform(rows))
        expected.append((error**2).sum() / ((rows - rows.mean(axis=0)) ** 2).sum())
    np.testing.assert_allclose(evaluate.pca_fvu(train, held_out, n_components), expected, rtol=1e-9)


def test_l0_thresholds__leave_k_active_on_average():
    rng = np.random.default_rng(4)
    pre = rng.normal(size=(L, 70, F)).astype(np.float32) * rng.uniform(0.2, 3, size=(L, 70, 1)).astype(np.float32)
    thresholds, is_exact = evaluate.l0_thresholds([pre[:, :40], pre[:, 40:]], K, kept_per_row=8)
    assert is_exact
    assert ((pre > thresholds[:, None, None]).sum(axis=(1, 2)) == 70 * K).all()


def test_l0_thresholds__where_a_row_has_more_active_than_are_looked_at__are_not_exact():
    pre = -np.ones((1, 10, F), np.float32)
    pre[0, 3] = np.arange(10, 10 + F)
    pre[0, :, 0] = np.arange(1, 11)
    thresholds, is_exact = evaluate.l0_thresholds([pre], 1, kept_per_row=4)
    assert not is_exact
    assert (pre > thresholds[0]).sum() > 11
    thresholds, _ = evaluate.l0_thresholds([pre], 1, kept_per_row=F)
    assert (pre > thresholds[0]).sum() == 10


def test_l0_thresholds__with_too_few_positive__keep_all_of_those():
    pre = np.where(np.arange(F) == 2, 1.0, -1.0) * np.ones((L, 5, 1))
    thresholds, _ = evaluate.l0_thresholds([pre.astype(np.float32)], K, kept_per_row=8)
    assert (thresholds == 0).all()


V, T, BOS = 7, 5, 6


class TinyLM:
    """Three causal layers; it remembers the residual streams that it was asked to go on from."""

    def __init__(self):
        rng = np.random.default_rng(5)
        self.embedding = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
        self.mixing = jnp.asarray(rng.normal(size=(L, D, D)), jnp.float32)
        self.unembedding = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
        self.given = []

    def _block(self, layer, resid):
        before = jnp.cumsum(resid, axis=1) / jnp.arange(1, resid.shape[1] + 1)[:, None]
        return resid + jnp.tanh(before @ self.mixing[layer])

    def residuals_and_logits(self, token_ids):
        resid, streams = self.embedding[token_ids], []
        for layer in range(L):
            resid = self._block(layer, resid)
            streams.append(resid)
        return jnp.stack(streams), resid @ self.unembedding

    def logits_from(self, layer, resid):
        self.given.append((layer, np.asarray(resid)))
        for later in range(layer + 1, L):
            resid = self._block(later, resid)
        return resid @ self.unembedding


CONTEXTS = np.random.default_rng(6).integers(0, V - 1, size=(5, T))
CONTEXTS[:, 0] = BOS
CONTEXTS[1, 3] = BOS
CENTRE = np.random.default_rng(7).normal(size=(L, D)).astype(np.float32)


def identity_suite():
    both = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    zeros = np.zeros((L, 2 * D), np.float32)
    stacked = np.repeat(both[None], L, axis=0)
    return SaeSuite(
        W_enc=stacked.swapaxes(1, 2), b_enc=zeros, W_dec=stacked, b_dec=zeros[:, :D], threshold=zeros,
        architecture="topk", k=D,
    )  # fmt: skip


def lm_loss(suite, lm, **options):
    return evaluate.language_model_loss(suite, lm, CONTEXTS, bos_id=BOS, centre=CENTRE, **{"batch": 2} | options)


def test_language_model_loss__of_an_identity__is_exactly_zero():
    losses = lm_loss(identity_suite(), TinyLM())
    np.testing.assert_array_equal(losses["delta_ce"], 0)
    np.testing.assert_array_equal(losses["kl"], 0)
    assert (losses["delta_ce_zero"] != 0).all()
    assert (losses["delta_ce_mean"] != 0).all()


def test_language_model_loss__leaves_position_0_and_bos_as_they_are__and_replaces_the_rest():
    suite, lm = make_suite(), TinyLM()
    lm_loss(suite, lm)
    resid, _ = lm.residuals_and_logits(CONTEXTS[:4])
    own = [np.asarray(resid[layer, start : start + 2]) for start in (0, 2) for layer in range(L) for _ in range(3)]
    assert [layer for layer, _ in lm.given] == [layer for _ in range(2) for layer in range(L) for _ in range(3)]
    for index, (layer, given) in enumerate(lm.given):
        start = 0 if index < 9 else 2
        kept = (np.arange(T) > 0) & (CONTEXTS[start : start + 2] != BOS)
        np.testing.assert_array_equal(given[~kept], own[index][~kept])
        replacement = (
            evaluate.reconstruct(suite.layer(layer), own[index]),
            0 * given,
            CENTRE[layer] + 0 * given,
        )
        np.testing.assert_allclose(given[kept], np.asarray(replacement[index % 3])[kept], rtol=1e-5, atol=1e-6)
    assert not (lm.given[0][1] == own[0]).all()


def test_language_model_loss__equals_a_plain_loop():
    suite, lm = make_suite(), TinyLM()
    found = lm_loss(suite, lm)
    totals, n_tokens = {name: np.zeros(L) for name in found}, 0
    for context in CONTEXTS[:4]:
        resid, logits = (np.asarray(x, np.float64) for x in lm.residuals_and_logits(context[None]))
        kept = [t for t in range(1, T) if context[t] != BOS]
        n_tokens += len([t for t in kept if t + 1 < T])
        for layer in range(L):
            one, stream = suite.layer(layer), jnp.asarray(resid[layer], jnp.float32)
            recon = evaluate.reconstruct(one, stream)
            replacements = {"delta_ce": recon, "delta_ce_zero": 0 * recon, "delta_ce_mean": CENTRE[layer] + 0 * recon}
            for name, replacement in replacements.items():
                mixed = stream.at[0, np.array(kept)].set(replacement[0, np.array(kept)])
                changed = np.asarray(lm.logits_from(layer, mixed), np.float64)
                for t in kept:
                    if t + 1 == T:
                        continue
                    log_p = changed[0, t] - np.log(np.exp(changed[0, t]).sum())
                    log_q = logits[0, t] - np.log(np.exp(logits[0, t]).sum())
                    totals[name][layer] += log_q[context[t + 1]] - log_p[context[t + 1]]
                    if name == "delta_ce":
                        totals["kl"][layer] += (np.exp(log_q) * (log_q - log_p)).sum()
    for name, total in totals.items():
        np.testing.assert_allclose(found[name], total / n_tokens, rtol=1e-4, atol=1e-5, err_msg=name)


def test_language_model_loss__reports_how_far_it_is__and_refuses_less_than_a_batch():
    done = []
    lm_loss(make_suite(), TinyLM(), on_batch=done.append)
    assert done == [2, 4]
    with pytest.raises(InputError, match=r"5 held-out contexts are fewer than a batch of 6; lower activations.batch"):
        lm_loss(make_suite(), TinyLM(), batch=6)
