"""Other libraries' SAEs: that a suite does what theirs do, that theirs do what a suite does, and what is refused.

The first half needs no other library: the layouts are written here, and their formulas stand here in plain NumPy. The
tests against the libraries themselves are skipped where these are not installed (the extra `bench`).
"""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxsae import sae
from jaxsae.artifacts import InputError
from jaxsae.sae import exchange
from jaxsae.sae.architectures import ARCHITECTURES
from jaxsae.sae.checkpoint import write_suite
from jaxsae.sae.suite import fold_scale

D, F, K, N = 6, 11, 3, 40
TOLERANCE = 1e-5  # of what the real packages may differ by, for features of size 1 to 10


def draw(seed=0, d=D, f=F):
    """Return tensors of an SAE under SAELens' names, b_dec far from 0 and decoder rows of different lengths."""
    rng = np.random.default_rng(seed)
    W_enc, W_dec = rng.normal(size=(d, f)) / d**0.5, rng.normal(size=(f, d)) / d**0.5
    vectors = {"b_enc": rng.normal(size=f) / 4, "b_dec": 3 + rng.normal(size=d), "threshold": rng.uniform(0.1, 0.6, f)}
    gates = {name: rng.normal(size=f) / 4 for name in ("r_mag", "b_gate", "b_mag")}
    return {name: x.astype(np.float32) for name, x in ({"W_enc": W_enc, "W_dec": W_dec} | vectors | gates).items()}


def rows(seed=1, d=D, n=N):
    return (3 + 2 * np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def top_k(pre, k=K):
    kept = np.maximum(pre, 0)
    kept[pre < np.sort(pre, axis=1)[:, -k][:, None]] = 0
    return kept


def relu(x):
    return np.maximum(x, 0)


def formula(keep, *, centred=True, unit=False):
    """Return (tensors, x) -> (features, reconstruction), in float64; `keep` maps pre-activations to features."""

    def run(t, x):
        t = {name: array.astype(np.float64) for name, array in t.items()}
        length = np.linalg.norm(t["W_dec"], axis=1) if unit else 1.0
        pre = (x - t["b_dec"] * centred) @ t["W_enc"]
        feats = keep(pre, t, length)
        return feats, feats / length @ t["W_dec"] + t["b_dec"]

    return run


RELU = formula(lambda pre, t, length: relu(pre + t["b_enc"]) * length)
UNIT_RELU = formula(lambda pre, t, length: relu(pre + t["b_enc"]) * length, unit=True)
PLAIN_RELU = formula(lambda pre, t, length: relu(pre + t["b_enc"]), centred=False)
TOPK = formula(lambda pre, t, length: top_k((pre + t["b_enc"]) * length))
UNIT_TOPK = formula(lambda pre, t, length: top_k((pre + t["b_enc"]) * length), unit=True)
PLAIN_TOPK = formula(lambda pre, t, length: top_k(pre + t["b_enc"]), centred=False)


def above(pre, t, length):
    return relu(pre + t["b_enc"]) * (pre + t["b_enc"] > t["threshold"])


JUMP, PLAIN_JUMP = formula(above), formula(above, centred=False)
ONE_JUMP = formula(lambda pre, t, length: above(pre, t | {"threshold": np.float64(0.3)}, length))
GATED = formula(lambda pre, t, length: (pre + t["b_gate"] > 0) * relu(pre * np.exp(t["r_mag"]) + t["b_mag"]))


def save(path, arrays, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.array(x, order="C") for name, x in arrays.items()}
    if path.suffix == ".npz":
        np.savez(path, **arrays, **metadata)
    else:
        safetensors.numpy.save_file(arrays, path, metadata=metadata or None)
    return path


def only(tensors, *names):
    return {name: tensors[name] for name in names}


BASE = ("W_enc", "b_enc", "W_dec", "b_dec")


def saelens(folder, tensors, names=BASE, *, metadata=None, **settings):
    """Write a SAELens folder of version 6."""
    config = {
        "architecture": "standard", "d_in": tensors["W_enc"].shape[0], "d_sae": tensors["W_enc"].shape[1],
        "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "model_name": "gpt2-small", "hook_name": "blocks.2.hook_resid_post"}
        | (metadata or {}),
    } | settings  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    return save(folder / "sae_weights.safetensors", only(tensors, *names))


def old_saelens(folder, tensors, **settings):
    """Write a SAELens folder from before version 6: hook and model beside the rest, `hook_point`, no architecture."""
    config = {
        "d_in": D, "d_sae": F, "dtype": "torch.float32", "hook_point": "blocks.3.hook_resid_pre",
        "hook_point_layer": 3, "hook_point_head_index": None, "model_name": "gpt2-small", "normalize_activations": None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    return save(folder / "sae_weights.safetensors", only(tensors, *BASE) | {"scaling_factor": np.ones(F, np.float32)})


def sparsify(folder, tensors, **settings):
    config = {"activation": "topk", "num_latents": F, "k": K, "transcode": False, "skip_connection": False, "d_in": D}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    arrays = {"encoder.weight": tensors["W_enc"].T, "encoder.bias": tensors["b_enc"], **only(tensors, "W_dec", "b_dec")}
    return save(folder / "sae.safetensors", arrays)


def dictionary(folder, dict_class, arrays, **settings):
    trainer = {"dict_class": dict_class, "layer": 2, "lm_name": "openai-community/gpt2", "k": K}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"trainer": trainer | settings, "buffer": {"ctx_len": 128}}))
    return save(folder / "ae.safetensors", arrays)


def linear(t, b_dec, b_enc=None):
    arrays = {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T, b_dec: t["b_dec"]}
    return arrays if b_enc is None else arrays | {b_enc: t["b_enc"]}


BUFFERS = {"k": np.int32(K), "threshold": np.float32(0.3)}
GATES = {"r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag"}

# (layout, (folder, tensors) -> weights file, what the library computes)
CASES = {
    "saelens standard": ("saelens", saelens, RELU),
    "saelens standard, input as it is": ("saelens", lambda p, t: saelens(p, t, apply_b_dec_to_input=False), PLAIN_RELU),
    "saelens topk": ("saelens", lambda p, t: saelens(p, t, architecture="topk", k=K), TOPK),
    "saelens topk, input as it is": (
        "saelens", lambda p, t: saelens(p, t, architecture="topk", k=K, apply_b_dec_to_input=False), PLAIN_TOPK,
    ),
    "saelens topk, rescaled": (
        "saelens",
        lambda p, t: saelens(p, t, architecture="topk", k=K, rescale_acts_by_decoder_norm=True),
        UNIT_TOPK,
    ),
    "saelens jumprelu": ("saelens", lambda p, t: saelens(p, t, (*BASE, "threshold"), architecture="jumprelu"), JUMP),
    "saelens gated": (
        "saelens",
        lambda p, t: saelens(p, t, ("W_enc", "W_dec", "b_dec", "r_mag", "b_gate", "b_mag"), architecture="gated"),
        GATED,
    ),
    "saelens before 6": ("saelens", old_saelens, RELU),
    "saelens before 6, topk": (
        "saelens", lambda p, t: old_saelens(p, t, activation_fn_str="topk", activation_fn_kwargs={"k": K}), TOPK,
    ),
    "sparsify": ("sparsify", sparsify, TOPK),
    "dictionary_learning AutoEncoder": (
        "dictionary_learning", lambda p, t: dictionary(p, "AutoEncoder", linear(t, "bias", "encoder.bias")), UNIT_RELU,
    ),
    "dictionary_learning AutoEncoderNew": (
        "dictionary_learning",
        lambda p, t: dictionary(p, "AutoEncoderNew", linear(t, "decoder.bias", "encoder.bias")),
        PLAIN_RELU,
    ),
    "dictionary_learning GatedAutoEncoder": (
        "dictionary_learning",
        lambda p, t: dictionary(
            p, "GatedAutoEncoder", linear(t, "decoder_bias") | {name: t[ours] for name, ours in GATES.items()}
        ),
        GATED,
    ),
    "dictionary_learning JumpReluAutoEncoder": (
        "dictionary_learning",
        lambda p, t: dictionary(p, "JumpReluAutoEncoder", only(t, *BASE, "threshold")),
        PLAIN_JUMP,
    ),
    "dictionary_learning AutoEncoderTopK": (
        "dictionary_learning",
        lambda p, t: dictionary(p, "AutoEncoderTopK", linear(t, "b_dec", "encoder.bias") | BUFFERS),
        TOPK,
    ),
    "dictionary_learning BatchTopKSAE": (
        "dictionary_learning",
        lambda p, t: dictionary(p, "BatchTopKSAE", linear(t, "b_dec", "encoder.bias") | BUFFERS),
        ONE_JUMP,
    ),
    "dictionary_learning MatryoshkaBatchTopKSAE": (
        "dictionary_learning",
        lambda p, t: dictionary(
            p, "MatryoshkaBatchTopKSAE", only(t, *BASE) | BUFFERS | {"group_sizes": np.array([4, F - 4])}
        ),
        ONE_JUMP,
    ),
    "openai": (
        "openai",
        lambda p, t: save(p / "2.safetensors", linear(t, "pre_bias", "latent_bias")
                          | {"stats_last_nonzero": np.zeros(F, np.int64)}, activation="ReLU"),
        RELU,
    ),
    "openai npz": (
        "openai", lambda p, t: save(p / "2.npz", linear(t, "pre_bias", "latent_bias"), activation="ReLU"), RELU,
    ),
    "gemma_scope": ("gemma_scope", lambda p, t: save(p / "params.npz", only(t, *BASE, "threshold")), PLAIN_JUMP),
    "gemma_scope 2": (
        "gemma_scope",
        lambda p, t: save(p / "params.safetensors", {name.lower(): t[name] for name in (*BASE, "threshold")}),
        PLAIN_JUMP,
    ),
}  # fmt: skip


def assert_close(found, expected, tolerance=TOLERANCE):
    """Compare features and reconstruction; a difference is relative to what is larger than 1."""
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def run(suite, x):
    feats = suite.encode(x)
    return feats, suite.decode(feats)


@pytest.mark.parametrize("case", list(CASES))
def test_read__gives_an_sae_that_does_what_the_library_s_formula_says(tmp_path, case):
    layout, write, compute = CASES[case]
    tensors, x = draw(), rows()
    path = write(tmp_path / "layer_2", tensors)
    found_layout, [origin] = exchange.find(tmp_path / "layer_2")
    assert (found_layout, origin.path, origin.layer) == (layout, path, 2)
    one = exchange.read(layout, path)
    assert (one.d_model, one.n_latents, one.has_layers) == (D, F, False)
    assert {array.dtype for array in jax.tree.leaves(one)} == {np.dtype("float32")}
    expected = compute(tensors, x)
    assert 0.05 < np.mean(expected[0] > 0) < 0.95
    assert_close(run(one, x), expected)


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_read__takes_floats_of_other_sizes_as_they_are(tmp_path, dtype):
    stored = {name: x.astype(dtype) for name, x in draw().items()}
    one = exchange.read("saelens", saelens(tmp_path, stored, architecture="topk", k=K))
    np.testing.assert_array_equal(one.W_enc, stored["W_enc"].astype(np.float32))


def test_read__says_k_where_the_layout_does(tmp_path):
    expected = {"sparsify": K, "saelens topk": K, "dictionary_learning BatchTopKSAE": K, "saelens jumprelu": 0}
    for case, k in expected.items():
        layout, write, _ = CASES[case]
        assert exchange.read(layout, write(tmp_path / case, draw())).k == k


# Where an SAE belongs.

HOOKS = {
    "blocks.0.hook_resid_post": 0,
    "blocks.11.hook_resid_post": 11,
    "blocks.11.hook_resid_pre": 10,
    "blocks.0.hook_resid_pre": exchange.EMBEDDING,
    "hook_embed": exchange.EMBEDDING,
}


@pytest.mark.parametrize("hook", list(HOOKS))
def test_find__counts_a_hook_before_a_block_to_the_block_before(tmp_path, hook):
    saelens(tmp_path / "layer_5", draw(), metadata={"hook_name": hook, "model_name": "gpt2"})
    _, [origin] = exchange.find(tmp_path)
    assert (origin.layer, origin.site, origin.model) == (HOOKS[hook], hook, "gpt2")


NAMES = {
    "layer_20/width_16k/average_l0_71": 20,
    "layer_3_width_16k_l0_small": 3,
    "layers.5": 5,
    "model.layers.17": 17,
    "transformer.h.0": 0,
    "h.11/seed1": 11,
    "blocks.4.hook_resid_pre": 3,
    "resid_post_layer_8/trainer_0": 8,
    "embed_tokens": exchange.EMBEDDING,
    "embedding/width_4k": exchange.EMBEDDING,
    "7": 7,
    "gpt2-small": None,
    "width_16k": None,
}


@pytest.mark.parametrize("names", list(NAMES))
def test_find__reads_the_layer_from_folders(tmp_path, names):
    save(tmp_path / "saes" / names / "params.npz", only(draw(), *BASE, "threshold"))
    _, [origin] = exchange.find(tmp_path / "saes")
    assert origin.layer == NAMES[names]


@pytest.mark.parametrize(
    "names", ["layers.3.mlp", "h.3.attn", "gemma-scope-2b-pt-att/layer_3", "transcoder/layer_3", "resid_delta_mlp"]
)
def test_find__refuses_sites_that_are_no_residual_stream(tmp_path, names):
    save(tmp_path / "saes" / names / "params.npz", only(draw(), *BASE, "threshold"))
    with pytest.raises(InputError, match=rf"params.npz has a folder '{names.split('/')[0]}': \w+ is no residual"):
        exchange.find(tmp_path / "saes")


def test_find__takes_openai_s_layer_from_the_file_s_name(tmp_path):
    for layer in (0, 10):
        save(tmp_path / "resid_post_mlp" / "autoencoders" / f"{layer}.npz", linear(draw(), "pre_bias", "latent_bias"))
    _, found = exchange.find(tmp_path / "resid_post_mlp")
    assert [origin.layer for origin in found] == [0, 10]


def test_find__of_a_file__is_that_file(tmp_path):
    path = save(tmp_path / "layer_1" / "mine.npz", only(draw(), *BASE, "threshold"))
    layout, [origin] = exchange.find(path, "gemma_scope")
    assert (layout, origin.path, origin.layer) == ("gemma_scope", path, 1)
    with pytest.raises(InputError, match=r"mine.npz holds no an SAE|mine.npz holds no SAE"):
        exchange.find(path)


def test_find__never_opens_pickled_weights(tmp_path):
    (tmp_path / "ae.pt").write_bytes(b"not even a pickle")
    for layout in (None, "dictionary_learning"):
        for source in (tmp_path, tmp_path / "ae.pt"):
            with pytest.raises(InputError, match=r"holds pickled weights \(ae.pt\), which may run code.*safetensors"):
                exchange.find(source, layout)


def test_find__asks_where_names_leave_it_open(tmp_path):
    with pytest.raises(InputError, match="nope does not exist; give a folder with SAEs"):
        exchange.find(tmp_path / "nope")
    with pytest.raises(InputError, match="holds no weights"):
        exchange.find(tmp_path)
    sparsify(tmp_path / "a" / "layers.0", draw())
    saelens(tmp_path / "b", draw())
    with pytest.raises(InputError, match=r"several layouts: sae_weights.safetensors \(saelens\), sae.saf.*--format"):
        exchange.find(tmp_path)
    assert len(exchange.find(tmp_path, "sparsify")[1]) == 1
    with pytest.raises(InputError, match=r"holds no files named params.* \(gemma_scope\)"):
        exchange.find(tmp_path, "gemma_scope")


# What cannot be kept in a suite, and what is damaged.

REFUSED = {
    "per-row scale": ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm': a suite has no"),
    "unfolded scale": ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
    "heads": ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z': a suite reads the residual stream"),
    "transcoder": ({"architecture": "transcoder"}, "architecture 'transcoder': a suite can hold standard, topk"),
    "training SAE": ({"architecture": "batchtopk"}, "architecture 'batchtopk': .*save_inference_model"),
    "no k": ({"architecture": "topk"}, "k None: expected a whole number of latents"),
    "bad k": ({"architecture": "topk", "k": 0}, "k 0: expected a whole number of latents"),
    "width": ({"d_in": D + 1}, f"d_in {D + 1}: W_enc has D {D}"),
    "latents": ({"d_sae": F + 1}, f"d_sae {F + 1}: W_enc has F {F}"),
    "threshold missing": ({"architecture": "jumprelu"}, "lacks tensor threshold; it holds W_dec, W_enc, b_dec, b_enc"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_read__refuses_saelens_settings_by_name(tmp_path, case):
    settings, words = REFUSED[case]
    path = saelens(tmp_path, draw(), **settings)
    with pytest.raises(InputError, match=words) as caught:
        exchange.read("saelens", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"hook_name": "blocks.2.hook_mlp_out"}, "hook_name 'blocks.2.hook_mlp_out': a suite reads blocks.N.hook_res"),
        ({"hook_name": "blocks.2.attn.hook_z"}, "hook_name 'blocks.2.attn.hook_z': a suite reads blocks.N.hook_res"),
        ({"hook_head_index": 3}, "hook_head_index 3: a suite reads all heads' stream"),
    ],
)
def test_find__refuses_saelens_hooks_by_name(tmp_path, metadata, words):
    saelens(tmp_path, draw(), metadata=metadata)
    with pytest.raises(InputError, match=words):
        exchange.find(tmp_path)


OTHERS = {
    "old activation": (lambda p: ("saelens", old_saelens(p, draw(), activation_fn_str="tanh-relu")), "tanh-relu"),
    "old scale": (lambda p: ("saelens", old_saelens(p, draw(), normalize_activations=True)), "activations True"),
    "sparsify groups": (lambda p: ("sparsify", sparsify(p, draw(), activation="groupmax")), "activation 'groupmax'"),
    "sparsify transcoder": (lambda p: ("sparsify", sparsify(p, draw(), transcode=True)), "transcode True"),
    "sparsify skip": (lambda p: ("sparsify", sparsify(p, draw(), skip_connection=True)), "skip_connection True"),
    "sparsify sign": (lambda p: ("sparsify", sparsify(p, draw(), signed=True)), "signed True"),
    "dictionary class": (
        lambda p: ("dictionary_learning", dictionary(p, "CrossCoder", {})),
        "dict_class 'CrossCoder': a suite can hold AutoEncoder, ",
    ),
    "openai topk": (
        lambda p: ("openai", save(p / "0.npz", linear(draw(), "pre_bias", "latent_bias"), activation="TopK")),
        "activation 'TopK': OpenAI's code then normalises each row",
    ),
    "openai silent": (
        lambda p: ("openai", save(p / "0.npz", linear(draw(), "pre_bias", "latent_bias"))),
        "activation None: expected ReLU",
    ),
    "extra tensor": (
        lambda p: ("gemma_scope", save(p / "params.npz", only(draw(), *BASE, "threshold") | {"W_skip": np.eye(D)})),
        "holds tensor W_skip, which is no part of Gemma Scope's SAEs",
    ),
    "wrong shape": (
        lambda p: ("gemma_scope", save(p / "params.npz", only(draw(), *BASE) | {"threshold": np.ones(F - 1)})),
        rf"tensor threshold has shape \[{F - 1}\], expected \[F {F}\]",
    ),
    "transposed": (
        lambda p: ("gemma_scope", save(p / "params.npz", draw() | {"W_dec": draw()["W_dec"].T})),
        rf"tensor W_dec has shape \[{D}, {F}\], expected \[F {F}, D {D}\]",
    ),
    "integers": (
        lambda p: ("gemma_scope", save(p / "params.npz", draw() | {"b_enc": np.zeros(F, np.int32)})),
        "tensor b_enc has dtype int32, expected floats",
    ),
    "not finite": (
        lambda p: ("gemma_scope", save(p / "params.npz", draw() | {"b_dec": np.full(D, np.inf)})),
        "tensor b_dec holds values that are not finite",
    ),
}


@pytest.mark.parametrize("case", list(OTHERS))
def test_read__refuses_what_a_suite_cannot_hold(tmp_path, case):
    write, words = OTHERS[case]
    layout, path = write(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        exchange.read(layout, path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read__refuses_a_factor_behind_the_activation(tmp_path):
    path = saelens(tmp_path, draw() | {"scaling_factor": np.full(F, 2, np.float32)}, (*BASE, "scaling_factor"))
    with pytest.raises(InputError, match="tensor scaling_factor is not 1"):
        exchange.read("saelens", path)


def test_read__names_a_damaged_file(tmp_path):
    path = saelens(tmp_path / "a", draw())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"sae_weights.safetensors cannot be read \(.*\); download or save it again"):
        exchange.read("saelens", path)
    path = save(tmp_path / "b" / "params.npz", only(draw(), *BASE, "threshold"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"params.npz cannot be read \(.*CRC.*\)"):
        exchange.read("gemma_scope", path)
    np.savez(path, W_enc=np.array([{}]))
    with pytest.raises(InputError, match=r"params.npz cannot be read \(Object arrays cannot be loaded"):
        exchange.read("gemma_scope", path)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "is missing"), ("{", "is not readable JSON"), ("[1]", "holds a JSON list")]
)
def test_find__names_a_damaged_config(tmp_path, content, words):
    path = saelens(tmp_path, draw()).with_name("cfg.json")
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=rf"cfg.json {words}"):
        exchange.find(tmp_path)


# What is written.


def trained(kind, seed=0, n_layers=3, d=D, f=F):
    """Return the suite of a training run with other scales than 1."""
    weights = {name: np.stack([draw(seed + layer, d, f)[name] for layer in range(n_layers)]) for name in
               (*BASE, "threshold")}  # fmt: skip
    weights["W_dec"] /= np.linalg.norm(weights["W_dec"], axis=-1, keepdims=True)
    weights["scale"] = np.float32([0.37, 1.9, 5.3][:n_layers])
    return fold_scale(weights, architecture=kind, k=K)


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_written__is_read_back_exactly(tmp_path, kind):
    suite = trained(kind)
    for layer in range(3):
        one = suite.layer(layer)
        folder = tmp_path / f"blocks.{layer}.hook_resid_post"
        exchange.write_saelens(folder, one, layer=layer, model="gpt2", context={"context_size": 64})
        found = exchange.read("saelens", folder / "sae_weights.safetensors")
        assert (found.architecture, found.k) == (kind, K)
        expected = one if kind != "topk" else one.replace(threshold=np.zeros_like(one.threshold))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    _, found = exchange.find(tmp_path)
    assert [(origin.layer, origin.model) for origin in found] == [(0, "gpt2"), (1, "gpt2"), (2, "gpt2")]
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["context_size"] == 64


def test_written__without_the_name_of_its_architecture__is_another_that_does_the_same(tmp_path):
    one, x = trained("jumprelu_l1").layer(1), rows()
    exchange.write_saelens(tmp_path, one, layer=0, model="gpt2")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["apply_b_dec_to_input"] is False
    del config["metadata"]["jaxsae_architecture"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    found = exchange.read("saelens", tmp_path / "sae_weights.safetensors")
    assert found.architecture == exchange.THRESHOLDED
    assert_close(run(found, x), run(one, x))


def test_write_suite__is_loaded_whole_or_by_layer(tmp_path):
    suite = trained("batchtopk")
    write_suite(tmp_path / "saes", suite, about={"model": "gpt2"})
    for which in ("best", "last"):
        found = sae.load(tmp_path / "saes", which=which)
        assert (found.architecture, found.k) == ("batchtopk", K)
        jax.tree.map(np.testing.assert_array_equal, found, suite)
    jax.tree.map(np.testing.assert_array_equal, sae.load(tmp_path / "saes", layer=1), suite.layer(1))
    decoders = sae.Decoders(tmp_path / "saes")
    assert len(decoders) == 3
    np.testing.assert_array_equal(decoders[2], suite.W_dec[2])
    assert sae.Checkpoints(tmp_path / "saes").latest_step() == 0
    chunk = next((tmp_path / "saes" / "checkpoints" / "0" / "best" / "W_enc").glob("1*"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=re.escape(f"{chunk.name} is damaged")):
        sae.load(tmp_path / "saes")


# Against the libraries themselves.

WIDE = {"d": 64, "f": 512}


def as_torch(tensors):
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()}


def run_torch(module, x):
    import torch

    with torch.no_grad():
        feats = module.encode(torch.from_numpy(x))
        return feats.numpy(), module.decode(feats).numpy()


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
@pytest.mark.filterwarnings("ignore")
def test_sae_lens__loads_what_is_written_and_does_the_same(tmp_path, kind):
    sae_lens = pytest.importorskip("sae_lens")
    suite, x = trained(kind, **WIDE), rows(d=64, n=100)
    for layer in range(3):
        one = suite.layer(layer)
        exchange.write_saelens(tmp_path, one, layer=layer, model="gpt2", context={"prepend_bos": True})
        theirs = sae_lens.SAE.load_from_disk(tmp_path)
        assert theirs.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"
        assert theirs.cfg.metadata.prepend_bos is True
        expected = run_torch(theirs, x)
        assert 0.001 < np.mean(expected[0] > 0) < 0.95
        assert_close(run(one, x), expected)


SAE_LENS = {
    "standard": (BASE, {}),
    "topk": (BASE, {"k": 16}),
    "topk rescaled": (BASE, {"k": 16, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ((*BASE, "threshold"), {}),
    "jumprelu plain": ((*BASE, "threshold"), {"apply_b_dec_to_input": False}),
    "gated": (("W_enc", "W_dec", "b_dec", "r_mag", "b_gate", "b_mag"), {}),
}


@pytest.mark.parametrize("case", list(SAE_LENS))
def test_sae_lens__is_read_and_does_the_same(tmp_path, case):
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    names, settings = SAE_LENS[case]
    kind, config = get_sae_class(case.split()[0])
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.5.hook_resid_post", model_name="gpt2")
    theirs = kind(config(d_in=64, d_sae=512, metadata=metadata, **settings))
    theirs.load_state_dict(as_torch(only(draw(**WIDE), *names)))
    theirs.save_model(tmp_path)
    _, [origin] = exchange.find(tmp_path)
    assert origin.layer == 5
    x = rows(d=64, n=100)
    assert_close(run(exchange.read("saelens", origin.path), x), run_torch(theirs, x))


@pytest.mark.parametrize("case", ["batchtopk", "matryoshka_batchtopk", "topk", "jumprelu", "gated", "standard"])
@pytest.mark.filterwarnings("ignore")
def test_sae_lens__training_saes_are_read_as_they_are_saved_for_inference(tmp_path, case):
    sae_lens = pytest.importorskip("sae_lens")
    import torch
    from sae_lens.registry import get_sae_training_class

    kind, config = get_sae_training_class(case)
    settings = {"k": 16} if "topk" in case else {}
    settings |= {"matryoshka_widths": [64, 512]} if "matryoshka" in case else {}
    theirs = kind(config(d_in=64, d_sae=512, **settings))
    drawn = as_torch(draw(**WIDE))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in drawn:
                parameter.copy_(drawn[name])
        if hasattr(theirs, "topk_threshold"):
            theirs.topk_threshold.fill_(0.7)
    theirs.save_inference_model(tmp_path)
    x = rows(d=64, n=100)
    expected = run_torch(sae_lens.SAE.load_from_disk(tmp_path), x)
    assert_close(run(exchange.read("saelens", tmp_path / "sae_weights.safetensors"), x), expected)


def test_sparsify__is_read_and_does_the_same(tmp_path):
    sparsify_package = pytest.importorskip("sparsify")
    import torch

    tensors, x = draw(**WIDE), rows(d=64, n=100)
    config = sparsify_package.SparseCoderConfig(num_latents=512, k=16, normalize_decoder=False)
    theirs = sparsify_package.SparseCoder(64, config)
    with torch.no_grad():
        theirs.encoder.weight.copy_(torch.from_numpy(tensors["W_enc"].T))
        theirs.encoder.bias.copy_(torch.from_numpy(tensors["b_enc"]))
        theirs.W_dec.copy_(torch.from_numpy(tensors["W_dec"]))
        theirs.b_dec.copy_(torch.from_numpy(tensors["b_dec"]))
        theirs.save_to_disk(tmp_path / "h.4")
        values, ids, _ = theirs.encode(torch.from_numpy(x))
        feats = torch.zeros(100, 512).scatter_(1, ids, values)
        expected = feats.numpy(), theirs.decode(values, ids).numpy()
    _, [origin] = exchange.find(tmp_path)
    assert origin.layer == 4
    assert_close(run(exchange.read("sparsify", origin.path), x), expected)


@pytest.mark.parametrize("name", [case.split()[1] for case in CASES if case.startswith("dictionary_learning")])
def test_dictionary_learning__is_read_and_does_the_same(tmp_path, name):
    loaders = pytest.importorskip("dictionary_learning.utils")
    import torch

    layout, write, _ = CASES[f"dictionary_learning {name}"]
    path = write(tmp_path / "trainer_0", draw())
    state = safetensors.numpy.load_file(path)
    torch.save({key: torch.from_numpy(np.array(x)) for key, x in state.items()}, path.with_name("ae.pt"))
    theirs, _ = loaders.load_dictionary(str(path.parent), device="cpu")
    assert_close(run(exchange.read(layout, path), rows()), run_torch(theirs, rows()))
