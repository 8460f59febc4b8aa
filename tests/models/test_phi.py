"""Phi's forward pass against transformers, and its configuration."""

import pytest
import transformers

from jaxsae.artifacts import InputError
from jaxsae.models import phi
from jaxsae.models.config_fields import Rotary

PARITY_CONFIGS = [
    {"num_key_value_heads": None, "layer_norm_eps": 0.3},
    {"qk_layernorm": True, "num_key_value_heads": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    {"hidden_size": 40, "num_key_value_heads": 1, "partial_rotary_factor": 0.4, "hidden_act": "gelu"},
    {"partial_rotary_factor": 1.0, "num_hidden_layers": 1, "intermediate_size": 7, "hidden_act": "relu"},
    {"partial_rotary_factor": 0.25, "rope_theta": 77.0, "resid_pdrop": 0.1, "embd_pdrop": 0.2},
    {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "head_dim": 12},
]


@pytest.mark.parametrize("fields", PARITY_CONFIGS, ids=str)
def test_forward__equals_transformers_after_every_block(make_reference, assert_equal_to_reference, fields):
    assert_equal_to_reference(make_reference("phi", **fields))


def test_forward__equals_transformers_for_an_old_style_config(make_reference, assert_equal_to_reference):
    reference = make_reference("phi", hidden_size=40, partial_rotary_factor=0.4, rope_theta=77.0)

    def edit(fields):
        del fields["rope_parameters"]
        del fields["num_key_value_heads"]
        return fields | {"rope_theta": 77.0, "partial_rotary_factor": 0.4, "rope_scaling": None}

    assert_equal_to_reference(reference, edit=edit)


def test_read_config__takes_every_field_transformers_writes():
    written = transformers.PhiConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=2).to_dict()
    config = phi.read_config(written)
    assert (config.d_model, config.d_head, config.n_key_heads, config.n_layers) == (48, 16, 3, 2)
    assert config.rotary == Rotary(fraction=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported for Phi"),
        ({"sliding_window": 3}, "sliding_window = 3 is no field of Phi"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06 is no field of Phi"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor = 2.0 turns 128 of the 64 coordinates"),
        ({"partial_rotary_factor": 0.05}, "partial_rotary_factor = 0.05 turns 3.2 of the 64 coordinates"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor = 0.01 turns 0.64 of the 64 coordinates"),
        ({"hidden_size": 50}, "hidden_size = 50 is not a multiple of num_attention_heads = 32"),
        ({"num_key_value_heads": 5}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 5"),
        ({"qk_layernorm": 1}, "qk_layernorm = 1 is neither true nor false"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps = -1e-05 is not a number >= 0"),
        ({"hidden_act": "swiglu"}, "hidden_act = 'swiglu' is not supported"),
        ({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map = .* is not supported for Phi, expected None"),
    ],
    ids=str,
)
def test_read_config__names_field_and_value_it_cannot_take(fields, message):
    with pytest.raises(InputError, match=message):
        phi.read_config(fields)
