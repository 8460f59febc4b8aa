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


def identity_suite():
    both = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    zeros = np.zeros((L, 2 * D), np.float32)
    stacked = np.repeat(both[None], L, axis=0)
    return SaeSuite(
        W_enc=stacked.swapaxes(1, 2), b_enc=zeros, W_dec=stacked, b_dec=zeros[:, :D], threshold=zeros,
        architecture="topk", k=D,
    )  # fmt: skip


def measure(suite, batches, centre, *, batch, layer=1, data=1):
    mesh = meshes.make_mesh(L, layer=layer, data=data)
    return evaluate.measure(
        evaluate.make_row_sums(mesh), evaluate.place(suite, mesh), batches,
        centre=meshes.put_layers(meshes.pad_layers(centre, mesh), mesh), batch=batch,
        layers=LAYERS, n_layers=L, mesh=mesh,
    )  # fmt: skip


def plain_quality(suite, acts, centre):
    """Return (mse, fvu, legacy explained variance, l0, firing rate) of one layer after the other, in float64."""
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
        ratios = [(e**2).sum() / ((row - centre[layer]) ** 2).sum() for e, row in zip(error, x, strict=True)]
        is_active = feats > 0
        rows.append(
            ((error**2).mean(), fvu, np.mean(1 - np.array(ratios)), is_active.sum(-1).mean(), is_active.mean(0))
        )
    return [np.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize(("layer", "data"), [(1, 1), (4, 2)])
def test_measure__equals_float64_sums__on_ragged_batches_far_from_the_centre(mean, layer, data):
    suite = make_suite()
    acts = (np.random.default_rng(1).normal(size=(L, 21, D)) + mean).astype(np.float32)
    suite = suite.replace(b_dec=suite.b_dec + mean)
    batches = [acts[:, :8], acts[:, 8:16], acts[:, 16:]]
    found = measure(suite, batches, np.zeros((L, D), np.float32), batch=8, layer=layer, data=data)
    mse, fvu, legacy, l0, firing_rate = plain_quality(suite, acts, np.zeros((L, D)))
    assert found.n_rows == 21
    np.testing.assert_array_equal(found.l0, l0)
    np.testing.assert_allclose(found.firing_rate, firing_rate, rtol=1e-12)
    # Rows near 30 are float32 numbers of relative size 6e-8, and the variance about 0 is a thousand times the true one.
    tolerance = 1e-6 if mean == 0 else 2e-3
    np.testing.assert_allclose(found.mse, mse, rtol=1e-6 if mean == 0 else 2e-5)
    np.testing.assert_allclose(found.fvu, fvu, rtol=tolerance)
    np.testing.assert_allclose(found.explained_variance_legacy, legacy, rtol=1e-5)
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


def test_legacy_explained_variance__hides_an_error_in_a_few_rows_far_from_the_mean__which_the_fvu_does_not():
    rng = np.random.default_rng(2)
    acts = (rng.normal(size=(L, 100, 1)) * np.eye(D)[rng.integers(0, D, size=(L, 100))]).astype(np.float32)
    acts[:, :5] = 30 * rng.choice([-1, 1], size=(L, 5, D))
    found = measure(identity_suite().replace(k=1), [acts], np.zeros((L, D), np.float32), batch=100)
    np.testing.assert_allclose(found.explained_variance_legacy, 1 - 0.05 * 3 / 4, rtol=1e-6)
    assert (found.fvu > 0.7).all()


def test_by_layer__counts_the_latents_that_fire_on_no_held_out_row():
    rates = np.array([[0, 0.5, 0, 1], [0.1, 0.2, 0.3, 0.4]])
    ones = np.ones(2)
    found = evaluate.Quality(ones, 2 * ones, 3 * ones, 4 * ones, rates, 10).by_layer()
    np.testing.assert_array_equal(found["dead_held_out"], [0.5, 0])
    assert {name: row[0] for name, row in found.items() if name != "dead_held_out"} == {
        "mse": 1, "fvu": 2, "explained_variance_legacy": 3, "l0_inference": 4,
    }  # fmt: skip


@pytest.mark.parametrize("n_rows", [1, 9, 10, 1000, 65_536])
def test_density__has_every_latent_that_fires_in_the_bin_of_its_rate(n_rows):
    rng = np.random.default_rng(3)
    fired = rng.integers(0, n_rows + 1, size=(2, 50)) // rng.integers(1, n_rows + 1, size=(2, 50))
    fired[0, :3] = 0, 1, n_rows
    ones = np.ones(2)
    edges, counts = evaluate.Quality(ones, ones, ones, ones, fired / n_rows, n_rows).density()
    np.testing.assert_allclose(np.diff(edges), evaluate.DENSITY_BIN)
    assert edges[-1] == 0
    for layer in range(2):
        plain = [0] * (len(edges) - 1)
        for times in fired[layer]:
            if times > 0:
                exponent = np.log10(times / n_rows)
                plain[max(b for b in range(len(plain)) if edges[b] <= exponent)] += 1
        assert counts[layer].tolist() == plain
        assert counts[layer].sum() == (fired[layer] > 0).sum()


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
    batches = (held_out[:, start : start + 8] for start in range(0, 31, 8))
    np.testing.assert_allclose(evaluate.pca_fvu(train, batches, n_components), expected, rtol=1e-9)


def plain_crowding(W_dec):
    """Return each row's largest |cosine| with another row, pair by pair in float64."""
    rows = W_dec.astype(np.float64)
    return [
        max(
            (abs(a @ b) / np.sqrt((a @ a) * (b @ b)) for j, b in enumerate(rows) if j != i and (b @ b) * (a @ a) > 0),
            default=0.0,
        )
        for i, a in enumerate(rows)
    ]


@pytest.mark.parametrize("n_latents", [1, 4, 5, 11])
def test_crowding__is_the_largest_cosine_with_another_row__in_blocks_that_need_not_fit(n_latents):
    W_dec = np.random.default_rng(4).normal(size=(n_latents, 6)).astype(np.float32)
    W_dec *= np.arange(1, n_latents + 1, dtype=np.float32)[:, None]
    if n_latents == 11:
        W_dec[7] = -2 * W_dec[1]
        W_dec[3] = 0
    np.testing.assert_allclose(evaluate.crowding(W_dec, block=4), plain_crowding(W_dec), rtol=1e-5, atol=1e-6)


def test_crowding__of_two_equal_directions_is_one__and_of_orthogonal_ones_zero():
    assert evaluate.crowding(np.float32([[1, 0, 0], [0, 2, 0], [0, -3, 0]])).tolist() == [0, 1, 1]


def test_crowding__never_holds_a_cosine_for_every_pair():
    n = 4096
    compiled = evaluate.crowding.lower(jax.ShapeDtypeStruct((n, 8), jnp.float32), block=256).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * n**2 / 4


def test_crowding_by_layer__has_mean_and_quantiles_of_these_layers():
    suite = make_suite()
    found = evaluate.crowding_by_layer(suite, slice(1, L))
    plain = np.array([plain_crowding(W_dec) for W_dec in suite.W_dec[1:]])
    expected = {"mean": plain.mean(axis=1), "median": np.median(plain, axis=1), "max": plain.max(axis=1)}
    expected |= {f"p{q:02d}": np.percentile(plain, q, axis=1) for q in (5, 25, 75, 95)}
    assert found.keys() == {f"crowding_{name}" for name in expected}
    for name, row in expected.items():
        np.testing.assert_allclose(found[f"crowding_{name}"], row, rtol=1e-5)


@pytest.mark.parametrize(("n_latents", "d_model"), [(2, 3), (40, 16), (400, 128)])
def test_random_crowding__is_the_median_of_random_directions(n_latents, d_model):
    rng = np.random.default_rng(5)
    medians = [
        np.median(evaluate.crowding(rng.normal(size=(n_latents, d_model)).astype(np.float32)))
        for _ in range(4000 // n_latents)
    ]
    assert np.mean(medians) == pytest.approx(evaluate.random_crowding(n_latents, d_model), rel=0.03)
    assert evaluate.random_crowding(1, d_model) == 0


def thresholds_for_k(suite, batches, k, *, batch=16, layer=1, data=1):
    mesh = meshes.make_mesh(L, layer=layer, data=data)
    return evaluate.thresholds_for_k(
        evaluate.make_bit_counts(mesh), evaluate.place(suite, mesh), batches, k, batch=batch, layers=LAYERS,
        n_layers=L, mesh=mesh,
    )  # fmt: skip


def positive_activations(suite, acts):
    return np.asarray(suite.replace(threshold=0 * suite.threshold).encode(acts))


@pytest.mark.parametrize(("layer", "data"), [(1, 1), (4, 2)])
def test_thresholds_for_k__are_exactly_the_activation_that_is_one_too_many(layer, data):
    suite, rng = make_suite(), np.random.default_rng(6)
    # Rows of very different lengths: some have nearly all latents above the threshold, others none.
    acts = rng.normal(size=(L, 70, D)) * 10 ** rng.uniform(-3, 3, size=(L, 70, 1)) + suite.b_dec[:, None]
    acts = acts.astype(np.float32)
    found = thresholds_for_k(suite, lambda: (acts[:, i : i + 16] for i in range(0, 70, 16)), K, layer=layer, data=data)
    feats = positive_activations(suite, acts).reshape(L, -1)
    # The same matrix product in batches of another size may differ in its last bits.
    np.testing.assert_allclose(found, np.sort(feats, axis=1)[:, -70 * K - 1], rtol=1e-5)
    kept = [(positive_activations(suite, acts[:, i : i + 16]) > found[:, None, None]).sum() for i in range(0, 70, 16)]
    assert sum(kept) == L * 70 * K


def test_thresholds_for_k__with_too_few_positive_activations__are_zero():
    suite = make_suite().replace(b_enc=np.full((L, F), -50, np.float32))
    suite.b_enc[:, 2] = 50
    acts = np.random.default_rng(7).normal(size=(L, 5, D)).astype(np.float32)
    np.testing.assert_array_equal(thresholds_for_k(suite, lambda: iter([acts]), K), 0)


def test_thresholds_for_k__treat_equal_activations_alike():
    suite = identity_suite()
    acts = np.full((L, 12, D), 3.0, np.float32)
    acts[:, :5] = 7.5
    np.testing.assert_array_equal(thresholds_for_k(suite, lambda: iter([acts]), 1), 7.5)
    np.testing.assert_array_equal(thresholds_for_k(suite, lambda: iter([acts]), 2), 3)


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
        np.testing.assert_allclose(given[~kept], own[index][~kept], rtol=2e-6)  # two programs round for themselves
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
    for name in ("delta_ce", "delta_ce_zero", "delta_ce_mean", "kl"):
        np.testing.assert_allclose(found[name], totals[name] / n_tokens, rtol=1e-4, atol=1e-5, err_msg=name)


def predictable(lm):
    """Return contexts that go on as the model expects, so that it has something to lose."""
    contexts = CONTEXTS.copy()
    for t in range(1, T):
        _, logits = lm.residuals_and_logits(contexts)
        contexts[:, t] = np.argmax(logits[:, t - 1, :BOS], axis=-1)
    return contexts


def test_ce_recovered__is_the_share_of_what_zeros_cost__and_undefined_where_they_cost_nothing():
    lm = TinyLM()
    options = {"bos_id": BOS, "centre": CENTRE, "batch": 5}
    found = evaluate.language_model_loss(make_suite(), lm, predictable(lm), **options)
    assert (found["delta_ce_zero"] > 0).all()
    expected = (found["delta_ce_zero"] - found["delta_ce"]) / found["delta_ce_zero"]
    np.testing.assert_allclose(found["ce_recovered"], expected, rtol=1e-9)
    found = evaluate.language_model_loss(identity_suite(), lm, predictable(lm), **options)
    np.testing.assert_array_equal(found["ce_recovered"], 1)
    found = lm_loss(make_suite(), lm)
    np.testing.assert_array_equal(np.isnan(found["ce_recovered"]), found["delta_ce_zero"] <= 0)
    assert (found["delta_ce_zero"] <= 0).any()


def test_language_model_loss__is_shared_by_processes_batch_by_batch(monkeypatch):
    sums = []
    monkeypatch.setattr(evaluate.meshes, "sum_over_processes", lambda numbers: sums.append(numbers) or numbers)
    lm_loss(make_suite(), TinyLM(), batch=1)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        lm = TinyLM()
        lm_loss(make_suite(), lm, batch=1)
        assert len(lm.given) == 3 * L * (2 if index < 2 else 1)
    whole, *shares = zip(sums[::2], sums[1::2], strict=True)
    for one, parts in zip(whole, zip(*shares, strict=True), strict=True):
        np.testing.assert_allclose(np.sum(parts, axis=0), one, rtol=1e-6)


def test_language_model_loss__reports_how_far_it_is__and_refuses_less_than_a_batch():
    done = []
    lm_loss(make_suite(), TinyLM(), on_batch=done.append)
    assert done == [2, 4]
    with pytest.raises(InputError, match=r"5 held-out contexts are fewer than a batch of 6; lower activations.batch"):
        lm_loss(make_suite(), TinyLM(), batch=6)
