"""The suite of all layers: encode and decode against one layer at a time, and the input scale folded in."""

import jax
import numpy as np
import pytest

from jaxsae.artifacts import InputError
from jaxsae.sae.architectures import architecture
from jaxsae.sae.autoencoder import SaeParams, decode, pre_activations
from jaxsae.sae.suite import SaeSuite, fold_scale

L, B, T, D, F, K = 3, 4, 5, 6, 11, 2


def weights(seed=0, threshold=0.3, n_layers=L):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    made = {name: rng.normal(size=(n_layers, *shape)).astype(np.float32) for name, shape in shapes.items()}
    scale = rng.uniform(0.05, 8.0, size=n_layers).astype(np.float32)
    return made | {"threshold": np.full((n_layers, F), threshold, np.float32), "scale": scale}


encode, decode_feats = jax.jit(SaeSuite.encode), jax.jit(SaeSuite.decode)


def make_suite(name="topk", **options):
    return fold_scale(weights(**options), architecture=name, k=K)


def resid(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu_l1"])
def test_encode_and_decode__of_all_layers__equal_each_layer_alone(name):
    suite, acts = make_suite(name), resid(L, B, T, D)
    feats = encode(suite, acts)
    recon = decode_feats(suite, feats)
    assert feats.shape == (L, B, T, F)
    assert recon.shape == (L, B, T, D)
    for layer in range(L):
        alone = suite.layer(layer)
        np.testing.assert_allclose(encode(alone, acts[layer]), feats[layer], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(decode_feats(alone, feats[layer]), recon[layer], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(encode(alone, acts[layer, 1, 2]), feats[layer, 1, 2], rtol=1e-6, atol=1e-6)


def test_encode__follows_the_formula_of_topk():
    suite, acts = make_suite(), resid(L, B, D)
    for layer in range(L):
        one = suite.layer(layer)
        pre = (acts[layer] - one.b_dec) @ one.W_enc + one.b_enc
        kept = (pre >= np.sort(pre, axis=-1)[:, -K:][:, :1]) & (pre > 0)
        np.testing.assert_allclose(encode(suite, acts)[layer], np.where(kept, pre, 0), rtol=2e-5, atol=1e-5)
        recon = np.where(kept, pre, 0) @ one.W_dec + one.b_dec
        np.testing.assert_allclose(decode_feats(suite, encode(suite, acts))[layer], recon, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu_l1"])
def test_encode__of_a_row__does_not_depend_on_the_batch(name):
    suite, acts = make_suite(name), resid(L, 32, D)
    whole = np.asarray(encode(suite, acts))
    others = resid(L, 32, D, seed=2) * 10
    others[:, 3] = acts[:, 3]
    np.testing.assert_array_equal(np.asarray(encode(suite, others))[:, 3], whole[:, 3])


def test_encode__is_the_same_under_jit():
    suite, acts = make_suite(), resid(L, B, D)
    np.testing.assert_allclose(encode(suite, acts), suite.encode(acts), rtol=1e-6, atol=1e-6)


def test_encode_topk__is_descending_and_finds_the_largest():
    suite, acts = make_suite("jumprelu_l1"), resid(L, B, D)
    ids, activations = suite.encode_topk(acts, 4)
    feats = np.asarray(suite.encode(acts))
    np.testing.assert_array_equal(activations, -np.sort(-feats, axis=-1)[..., :4])
    active = np.asarray(ids) >= 0
    np.testing.assert_array_equal(active, np.asarray(activations) > 0)
    found = np.take_along_axis(feats, np.maximum(ids, 0), axis=-1)
    np.testing.assert_array_equal(np.where(active, found, 0), activations)
    assert active.any()
    assert not active.all()


def test_encode_topk__beyond_the_latents__pads_with_minus_one_and_zero():
    suite, acts = make_suite("jumprelu_l1"), resid(L, B, D)
    ids, activations = suite.encode_topk(acts, F + 2)
    assert ids.shape == activations.shape == (L, B, F + 2)
    assert (np.asarray(ids)[..., F:] == -1).all()
    assert (np.asarray(activations)[..., F:] == 0).all()
    alone = suite.layer(1).encode_topk(acts[1], F + 2)
    np.testing.assert_array_equal(alone[0], ids[1])


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu_l1"])
def test_fold_scale__does_to_x_what_training_did_to_the_scaled_x(name):
    trained, acts = weights(seed=3), resid(L, 40, D)
    suite = fold_scale(trained, architecture=name, k=K)
    arch = architecture(name)
    for layer in range(L):
        params = SaeParams(**{key: trained[key][layer] for key in ("W_enc", "b_enc", "W_dec", "b_dec")})
        scale = trained["scale"][layer]
        pre = pre_activations(params, jax.numpy.asarray(acts[layer] * scale), centres_input=arch.centres_input)
        feats = arch.encode(pre, K, jax.numpy.asarray(trained["threshold"][layer]))
        recon = decode(params, feats)
        own = suite.layer(layer)
        for expected, found in (
            (feats / scale, encode(own, acts[layer])),
            (recon / scale, decode_feats(own, encode(own, acts[layer]))),
        ):
            size = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(found, expected, atol=2e-6 * size)
        assert 0 < np.mean(np.asarray(feats) > 0) < 1


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (2, B, D), r"expected an array \[3, '...', 6\], got \[2, 4, 6\]"),
        ("encode", (L, B, 7), r"expected an array \[3, '...', 6\], got \[3, 4, 7\]"),
        ("encode", (D,), r"expected an array \[3, '...', 6\], got \[6\]"),
        ("decode", (L, B, D), r"expected an array \[3, '...', 11\], got \[3, 4, 6\]"),
    ],
)
def test_suite__refuses_arrays_that_do_not_fit(method, shape, message):
    with pytest.raises(InputError, match=message):
        getattr(make_suite(), method)(resid(*shape))


def test_layer__refuses_a_wrong_width():
    with pytest.raises(InputError, match=r"expected an array \['...', 6\], got \[4, 5\]"):
        make_suite().layer(0).encode(resid(4, 5))


def test_suite__tells_its_sizes():
    suite = make_suite()
    assert (suite.d_model, suite.n_latents, suite.has_layers, suite.layer(2).has_layers) == (D, F, True, False)
