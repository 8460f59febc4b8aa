"""GPT-2's forward pass against transformers, and its configuration."""

from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from jaxsae import models
from jaxsae.artifacts import InputError
from jaxsae.models import decoder, gpt2

NANO_SORT = Path(__file__).parents[2].parent / "shared" / "data" / "gpt_nano_sort"

PARITY_CONFIGS = [
    {},
    {"n_inner": None, "tie_word_embeddings": False, "activation_function": "quick_gelu", "eos_token_id": [2, 3]},
    {"n_inner": 7, "layer_norm_epsilon": 0.3, "n_layer": 5, "n_head": 24, "activation_function": "gelu"},
    {"scale_attn_weights": False, "reorder_and_upcast_attn": True},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "tie_word_embeddings": False},
    {"n_layer": 1, "n_head": 1, "n_positions": 17, "activation_function": "relu", "attn_pdrop": 0.5, "embd_pdrop": 0.5},
]


@pytest.mark.parametrize("fields", PARITY_CONFIGS, ids=str)
def test_forward__equals_transformers_after_every_block(make_reference, assert_equal_to_reference, fields):
    assert_equal_to_reference(make_reference("gpt2", **fields))


@pytest.mark.skipif(not NANO_SORT.is_dir(), reason="../shared/data/gpt_nano_sort is absent")
def test_forward__equals_the_published_intermediates_of_gpt_nano_sort(assert_close_per_token):
    lm = models.load(NANO_SORT / "hf")
    expected = np.load(NANO_SORT / "expected_partials.npz")
    resid, logits = lm.residuals_and_logits(expected["idx"].astype(np.int64))
    for layer in range(lm.n_layers):
        assert_close_per_token(resid[layer], expected[f"block{layer}"])
    assert_close_per_token(logits, expected["lm_head"])


def test_init__has_gpt2s_scales_and_depends_on_the_key():
    config = gpt2.GPT2Config(vocab_size=500, n_positions=60, n_embd=64, n_layer=8, n_head=2)
    init = jax.jit(decoder.init, static_argnums=0)
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


def test_read_config__knows_the_general_names():
    config = gpt2.read_config({"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2})
    assert (config.n_embd, config.n_head, config.n_layer) == (48, 3, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_special": 3}, "n_special = 3 is not supported for GPT-2, expected 0"),
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
