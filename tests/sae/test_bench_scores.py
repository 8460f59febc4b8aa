"""The function that scores every library's SAEs in `launch/bench`, against jaxsae's own encoder and plain counts."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from jaxsae.sae import SaeSuite

scores = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "scores.py"))
D, F, K, N = 7, 31, 3, 5000  # two chunks of rows


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).standard_normal((N, D), np.float32) + 0.5


def make_weights(threshold):
    rng = np.random.default_rng(1)
    shapes = ((D, F), (F,), (F, D), (D,))
    return scores["Weights"](*(rng.standard_normal(shape, np.float32) for shape in shapes), threshold)


def encode(weights, rows, architecture):
    """Return features and reconstruction of jaxsae's suite with these weights."""
    threshold = np.zeros(F, np.float32) if weights.threshold is None else weights.threshold
    arrays = weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec
    suite = SaeSuite(*arrays, threshold, architecture, K)
    feats = suite.encode(rows)
    return np.asarray(feats), np.asarray(suite.decode(feats))


def fvu_of(rows, recon):
    rows = rows.astype(np.float64)
    return np.sum((rows - recon) ** 2) / np.sum((rows - rows.mean(axis=0)) ** 2)


def test_score__of_a_topk_is_that_of_jaxsaes_encoder(rows):
    weights = make_weights(None)
    feats, recon = encode(weights, rows, "topk")
    found = scores["score"](weights, rows, K)
    np.testing.assert_allclose(found.fvu, fvu_of(rows, recon), rtol=1e-6)  # float32 sums in another order
    assert found.l0 == found.own_l0 == np.count_nonzero(feats) / N


def test_score__shifts_thresholds_alike_until_k_latents_are_active(rows):
    weights = make_weights(np.linspace(0.5, 2, F, dtype=np.float32))
    feats, _ = encode(weights, rows, "batchtopk")
    found = scores["score"](weights, rows, K)
    assert found.l0 == K
    assert found.own_l0 == np.count_nonzero(feats) / N
    above = np.sort(((rows - weights.b_dec) @ weights.W_enc + weights.b_enc - weights.threshold).ravel())
    shifted = make_weights(weights.threshold + above[-N * K - 1])
    feats, recon = encode(shifted, rows, "batchtopk")
    np.testing.assert_allclose(found.fvu, fvu_of(rows, recon), rtol=1e-5)  # a row at the threshold may fall either way
    assert scores["score"](shifted, rows, K).own_l0 == pytest.approx(K, abs=1e-3)


def test_dead_share__counts_latents_that_no_row_activates(rows):
    weights = make_weights(None)
    weights.b_enc[[2, 5, 30]] = -100
    feats, _ = encode(weights, rows, "topk")
    assert scores["dead_share"](weights, rows, K) == np.mean(~feats.any(axis=0)) == 3 / F
    assert scores["dead_share"](weights, rows[:1], K) == 1 - K / F
