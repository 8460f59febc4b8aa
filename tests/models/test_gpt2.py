"""GPT-2's forward pass against transformers, and its configuration."""

import dataclasses
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from jaxsae import models
from jaxsae.artifacts import InputError
from jaxsae.models import gpt2, layers

NANO_SORT = Path(__file__).parents[2].parent / "shared" / "data" / "gpt_nano_sort"
TINY = {"vocab_size": 37, "n_positions": 19, "n_embd": 24, "n_layer": 3, "n_head": 4}
SMALL_CONFIG = gpt2.GPT2Config(**TINY)
forward = jax.jit(gpt2.forward, static_argnames=("config", "dtype"))

PARITY_CONFIGS = [
    {},
    {"n_inner": 40},
    {"n_inner": 7, "layer_norm_epsilon": 0.3},
    {"tie_word_embeddings": False},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "reorder_and_upcast_attn": True},
    {"reorder_and_upcast_attn": True},
    {"n_layer": 1, "n_head": 1, "n_positions": 17},
    {"n_layer": 5, "n_head": 24, "activation_function": "gelu"},
    {"activation_function": "relu", "attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
    {"activation_function": "quick_gelu", "bos_token_id": 1, "eos_token_id": [2, 3]},
    {"activation_function": "swish", "tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
]


def token_rows(n_rows, n_tokens, n_vocab, seed=0):
    return np.random.default_rng(seed).integers(0, n_vocab, (n_rows, n_tokens))


def huggingface_model(seed=0, **fields):
    """Return a GPT2LMHeadModel in which no weight is 0 or 1, with eager attention (which has the upcast path)."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**{**TINY, **fields}, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def huggingface_outputs(model, token_ids):
    """Return the output of every block, through a hook on it, and the logits."""
    outputs = []

    def keep(module, inputs, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).numpy())

    hooks = [block.register_forward_hook(keep) for block in model.transformer.h]
    with torch.no_grad():
        logits = model(torch.tensor(token_ids)).logits.numpy()
    for hook in hooks:
        hook.remove()
    return np.stack(outputs), logits


def assert_close_per_token(found, expected):
    """Hold |found - expected| <= 2e-5 * max(1, max|expected|) for each token, the bound the project promises."""
    bound = 2e-5 * np.maximum(1.0, np.abs(expected).max(-1))
    assert (np.abs(np.asarray(found) - expected).max(-1) <= bound).all()


@pytest.mark.parametrize("fields", PARITY_CONFIGS, ids=str)
def test_forward__equals_transformers_after_every_block(tmp_path, fields):
    reference = huggingface_model(**fields)
    reference.save_pretrained(tmp_path)
    lm = models.load(tmp_path)
    token_ids = token_rows(2, 17, lm.n_vocab)
    resid, logits = lm.residuals_and_logits(token_ids)
    expected_resid, expected_logits = huggingface_outputs(reference, token_ids)
    assert resid.shape == (lm.n_layers, 2, 17, 24)
    assert_close_per_token(resid, expected_resid)
    assert_close_per_token(logits, expected_logits)


@pytest.mark.parametrize("name", sorted(layers.ACTIVATIONS))
def test_activations__equal_transformers(name):
    x = np.linspace(-9, 9, 2001, dtype=np.float32)
    expected = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.asarray(x)), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.skipif(not NANO_SORT.is_dir(), reason="../shared/data/gpt_nano_sort is absent")
def test_forward__equals_the_published_intermediates_of_gpt_nano_sort():
    lm = models.load(NANO_SORT / "hf")
    expected = np.load(NANO_SORT / "expected_partials.npz")
    resid, logits = lm.residuals_and_logits(expected["idx"].astype(np.int64))
    for layer in range(lm.n_layers):
        assert_close_per_token(resid[layer], expected[f"block{layer}"])
    assert_close_per_token(logits, expected["lm_head"])


@pytest.mark.parametrize("n_tokens", [1, 5, 19])
def test_forward__right_padding_changes_no_earlier_position(make_params, n_tokens):
    params = make_params(SMALL_CONFIG)
    token_ids = token_rows(2, 19, 37)
    padded = np.where(np.arange(19) < n_tokens, token_ids, 0)
    resid, logits = forward(SMALL_CONFIG, params, token_ids)
    padded_resid, padded_logits = forward(SMALL_CONFIG, params, padded)
    np.testing.assert_array_equal(resid[:, :, :n_tokens], padded_resid[:, :, :n_tokens])
    np.testing.assert_array_equal(logits[:, :n_tokens], padded_logits[:, :n_tokens])


def test_forward__under_jit_equals_eager(make_params):
    params = make_params(SMALL_CONFIG)
    token_ids = token_rows(2, 11, 37)
    eager = gpt2.forward(SMALL_CONFIG, params, token_ids)
    for one, other in zip(eager, forward(SMALL_CONFIG, params, token_ids), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_forward__has_the_gradient_of_transformers_and_in_bfloat16_nearly(tmp_path):
    reference = huggingface_model()
    reference.save_pretrained(tmp_path)
    lm = models.load(tmp_path)
    token_ids = token_rows(2, 11, 37)
    targets = torch.tensor(token_ids)
    reference(targets, labels=targets).loss.backward()

    def loss(params, dtype):
        logprobs = jax.nn.log_softmax(gpt2.forward(lm.config, params, token_ids, dtype=dtype)[1][:, :-1])
        return -jnp.take_along_axis(logprobs, jnp.asarray(token_ids)[:, 1:, None], axis=-1).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    exact, rounded = gradient(lm.params, "float32"), gradient(lm.params, "bfloat16")
    expected = np.stack([block.attn.c_attn.weight.grad.numpy() for block in reference.transformer.h])
    weight = exact["blocks"]["attn"]["c_attn"]["weight"]
    np.testing.assert_allclose(weight, expected, atol=1e-5)
    np.testing.assert_allclose(exact["wte"]["weight"], reference.transformer.wte.weight.grad.numpy(), atol=1e-5)
    near = rounded["blocks"]["attn"]["c_attn"]["weight"]
    assert near.dtype == jnp.float32
    assert 1e-5 < np.linalg.norm(near - weight) / np.linalg.norm(weight) < 3e-2


def test_forward__in_bfloat16_stays_near_float32_and_keeps_a_float32_stream(make_params):
    params = make_params(SMALL_CONFIG)
    token_ids = token_rows(2, 11, 37)
    exact, exact_logits = forward(SMALL_CONFIG, params, token_ids)
    rounded, logits = forward(SMALL_CONFIG, params, token_ids, dtype="bfloat16")
    assert rounded.dtype == logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: an operand is off by at most 2^-9 of itself, and a few roundings add up per block.
    assert 1e-5 < np.abs(rounded - exact).max() / np.abs(exact).max() < 2e-2
    assert np.abs(logits - exact_logits).max() / np.abs(exact_logits).max() < 2e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_from__the_own_residual_gives_the_own_logits_for_every_layer(make_params, dtype):
    params = make_params(SMALL_CONFIG)
    resid, logits = forward(SMALL_CONFIG, params, token_rows(2, 11, 37), dtype=dtype)
    run = jax.jit(lambda layer, x: gpt2.logits_from(SMALL_CONFIG, params, layer, x, dtype=dtype))
    for layer in range(3):
        np.testing.assert_allclose(run(layer, resid[layer]), logits, atol=2e-5, rtol=2e-5)
    others = [np.abs(run(0, resid[1]) - logits).max(), np.abs(run(2, resid[1]) - logits).max()]
    assert min(others) > 0.1


def test_logits_from__can_be_mapped_over_traced_layers(make_params):
    params = make_params(SMALL_CONFIG)
    resid, logits = forward(SMALL_CONFIG, params, token_rows(2, 11, 37))
    mapped = jax.vmap(lambda layer, x: gpt2.logits_from(SMALL_CONFIG, params, layer, x))(jnp.arange(3), resid)
    np.testing.assert_allclose(mapped, np.broadcast_to(logits, mapped.shape), atol=2e-5)


def test_init__has_gpt2s_scales_and_depends_on_the_key():
    config = gpt2.GPT2Config(vocab_size=500, n_positions=60, n_embd=64, n_layer=8, n_head=2)
    init = jax.jit(gpt2.init, static_argnums=0)
    params = init(config, jax.random.key(3))
    blocks = params["blocks"]
    assert float(params["wte"]["weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(blocks["mlp"]["c_fc"]["weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(blocks["mlp"]["c_proj"]["weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(blocks["attn"]["c_proj"]["weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert (np.asarray(blocks["ln_1"]["weight"]) == 1).all()
    assert (np.asarray(blocks["attn"]["c_attn"]["bias"]) == 0).all()
    first, second = blocks["attn"]["c_attn"]["weight"][:2]
    assert np.abs(first - second).max() > 0.01
    other = init(config, jax.random.key(4))
    assert np.abs(other["wte"]["weight"] - params["wte"]["weight"]).max() > 0.01


def test_read_config__takes_every_field_transformers_writes():
    written = transformers.GPT2Config(n_embd=48, n_head=3, n_layer=2, n_inner=5, vocab_size=9).to_dict()
    config = gpt2.read_config(written)
    assert (config.n_embd, config.n_head, config.n_layer, config.d_inner, config.vocab_size) == (48, 3, 2, 5, 9)


def test_read_config__missing_fields_have_transformers_defaults():
    reference = transformers.GPT2Config()
    for field in dataclasses.fields(gpt2.GPT2Config):
        assert getattr(gpt2.read_config({}), field.name) == getattr(reference, field.name), field.name


def test_read_config__knows_the_general_names():
    config = gpt2.read_config({"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2})
    assert (config.n_embd, config.n_head, config.n_layer) == (48, 3, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\} is not supported"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads = \{'0': \[1\]\} is not supported"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map = .* is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True"),
        ({"activation_function": "gelu_10"}, "activation_function = 'gelu_10' is not supported"),
        ({"activation_function": None}, "activation_function = None is not supported"),
        ({"rope_theta": 10000.0}, "rope_theta = 10000.0 is no field of GPT-2"),
        ({"n_embd": 50, "n_head": 4}, "n_embd = 50 is not a multiple of n_head = 4"),
        ({"n_embd": 48, "hidden_size": 64, "n_head": 4}, "hidden_size = 64 contradicts n_embd = 48"),
        ({"n_layer": 0}, "n_layer = 0 is not a positive integer"),
        ({"n_head": 12.0}, "n_head = 12.0 is not a positive integer"),
        ({"n_inner": -1}, "n_inner = -1 is not a positive integer"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon = '1e-5' is not a number"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon = -1.0 is not a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' is neither true nor false"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id = \(1, 'x'\) is not a token id"),
    ],
    ids=str,
)
def test_read_config__names_field_and_value_it_cannot_take(fields, message):
    with pytest.raises(InputError, match=message):
        gpt2.read_config(fields)


def test_forward__refuses_a_text_beyond_the_context_and_an_unknown_dtype(make_params):
    params = make_params(SMALL_CONFIG)
    with pytest.raises(InputError, match=r"20 tokens is longer than the model's context, 19"):
        gpt2.forward(SMALL_CONFIG, params, token_rows(1, 20, 37))
    with pytest.raises(InputError, match="dtype is 'float16'"):
        gpt2.forward(SMALL_CONFIG, params, token_rows(1, 4, 37), dtype="float16")
