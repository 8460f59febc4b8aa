"""Llama, Mistral, Qwen2 and Qwen3: their forward passes against transformers, and their configuration."""

import dataclasses

import jax
import numpy as np
import pytest
import transformers

from jaxsae.artifacts import InputError
from jaxsae.models import decoder, llama
from jaxsae.models.config_fields import Rotary

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3}
# The text has 17 tokens, so that windows of 3 to 5 leave most of it unseen.
PARITY_CONFIGS = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": None, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.3}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True}),
    ("llama", {"head_dim": 10, "mlp_bias": True, "tie_word_embeddings": True, "attention_dropout": 0.5}),
    ("llama", {"rope_parameters": LLAMA3, "hidden_size": 64, "num_hidden_layers": 1}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.5}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 2.5}}),
    ("mistral", {"sliding_window": 3}),
    ("mistral", {"sliding_window": 1, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": None, "head_dim": 4}),
    ("qwen2", {"use_sliding_window": False, "head_dim": 10}),
    ("qwen2", {**WINDOWS, "max_window_layers": 2, "tie_word_embeddings": True}),
    ("qwen2", {**WINDOWS, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("qwen3", {"tie_word_embeddings": True, "rope_theta": 50.0}),
    ("qwen3", {"attention_bias": True, "num_key_value_heads": 4, **WINDOWS, "max_window_layers": 0}),
]


@pytest.mark.parametrize(("model_type", "fields"), PARITY_CONFIGS, ids=str)
def test_forward__equals_transformers_after_every_block(make_reference, assert_equal_to_reference, model_type, fields):
    assert_equal_to_reference(make_reference(model_type, **fields))


def old_style(fields, **changes):
    """Return config fields as transformers 4 wrote them, without what it left out; None in `changes` is null."""
    without = ("rope_parameters", "num_key_value_heads", "layer_types", "dtype")
    return {name: value for name, value in fields.items() if name not in without} | changes


def test_forward__equals_transformers_for_an_old_llama_config(make_reference, assert_equal_to_reference):
    reference = make_reference(
        "llama", num_key_value_heads=4, rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 2.5}
    )
    assert_equal_to_reference(
        reference,
        edit=lambda fields: old_style(
            fields,
            rope_theta=50.0,
            rope_scaling={"type": "linear", "factor": 2.5},
            head_dim=None,
            torch_dtype="float32",
        ),
    )


def test_forward__equals_transformers_for_an_old_qwen_config(make_reference, assert_equal_to_reference):
    reference = make_reference("qwen2", **WINDOWS, max_window_layers=1, rope_theta=50.0)
    assert_equal_to_reference(
        reference, edit=lambda fields: old_style(fields, rope_theta=50.0, rope_scaling=None, num_key_value_heads=2)
    )


def test_forward__windows_of_different_layers_are_told_apart(tiny_configs, make_params):
    """Only the layers named see less, and what they do not see is what stands a window before a token."""
    full = dataclasses.replace(tiny_configs["qwen2"], sliding_window=None, windowed_layers=None)
    params, ids = make_params(full), np.arange(9)[None]
    residuals = jax.jit(decoder.residuals, static_argnums=0)
    expected = residuals(full, params, ids)
    for layer in (0, 2):
        resid = residuals(dataclasses.replace(full, sliding_window=4, windowed_layers=(layer,)), params, ids)
        np.testing.assert_allclose(resid[:, :, :4], expected[:, :, :4], atol=1e-6)
        np.testing.assert_allclose(resid[:layer], expected[:layer], atol=1e-6)
        assert (np.abs(resid[layer] - expected[layer]).max(-1)[0, 4:] > 1e-3).all()


def test_init__has_the_configs_scale_norms_of_one_and_no_bias():
    config = llama.LlamaConfig(
        model_type="qwen2",
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=90,
        initializer_range=0.05,
    )
    params = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(3))
    blocks = params["blocks"]
    for weight in (
        params["embed_tokens"]["weight"],
        params["lm_head"]["weight"],
        *(blocks["self_attn"][name]["weight"] for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(blocks["mlp"][name]["weight"] for name in ("gate_proj", "up_proj", "down_proj")),
    ):
        assert float(weight.std()) == pytest.approx(0.05, rel=0.05)
        assert abs(float(weight.mean())) < 0.002
    assert (np.asarray(params["norm"]["weight"]) == 1).all()
    assert (np.asarray(blocks["input_layernorm"]["weight"]) == 1).all()
    assert (np.asarray(blocks["self_attn"]["q_proj"]["bias"]) == 0).all()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_read_config__takes_every_field_transformers_writes(model_type):
    reference = transformers.AutoConfig.for_model(
        model_type, hidden_size=48, num_attention_heads=6, num_hidden_layers=2, num_key_value_heads=3, vocab_size=9
    )
    config = llama.read_config(reference.to_dict())
    assert (config.n_layers, config.d_model, config.n_key_heads, config.n_vocab) == (2, 48, 3, 9)
    assert config.d_head == (128 if model_type == "qwen3" else 8)
    assert config.sliding_window == (4096 if model_type == "mistral" else None)
    assert config.rotary == Rotary()


@pytest.mark.parametrize(
    ("fields", "window", "layers"),
    [
        ({"max_window_layers": 1}, None, None),
        ({**WINDOWS, "max_window_layers": 0}, 3, None),
        ({**WINDOWS, "max_window_layers": 2}, 3, (2, 3)),
        ({**WINDOWS, "max_window_layers": 4}, None, None),
        ({**WINDOWS, "max_window_layers": 28}, None, None),
        ({"use_sliding_window": True, "max_window_layers": 3}, 4096, (3,)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, None, None),
        ({**WINDOWS, "layer_types": ["sliding_attention", *["full_attention"] * 3]}, 3, (0,)),
        ({"layer_types": ["full_attention"] * 4, "sliding_window": 9}, None, None),
    ],
    ids=str,
)
def test_read_config__windows_the_layers_that_transformers_does(fields, window, layers):
    reference = transformers.Qwen2Config(**fields, num_hidden_layers=4)
    config = llama.read_config({"model_type": "qwen2", "num_hidden_layers": 4, **fields})
    assert (config.sliding_window, config.windowed_layers) == (window, layers)
    windowed = range(4) if layers is None and window else layers or ()
    assert reference.layer_types == ["sliding_attention" if i in windowed else "full_attention" for i in range(4)]
    assert llama.read_config(llama.write_config(config)) == config


BAD_TYPES = ["full_attention", "linear_attention"]


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("falcon", {}, "model_type = 'falcon' is not supported; it is one of llama, mistral, qwen2, qwen3"),
        (["llama"], {}, r"model_type = \['llama'\] is not supported"),
        ("llama", {"n_embd": 3}, "n_embd = 3 is no field of llama"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp = 2 is not supported for llama, expected 1"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = True is not supported for llama, expected False"),
        ("llama", {"sliding_window": 4}, "sliding_window = 4 is not supported for llama, expected None"),
        ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\} is not supported"),
        ("llama", {"hidden_act": "swiglu"}, "hidden_act = 'swiglu' is not supported; take one of gelu"),
        ("llama", {"hidden_size": 50}, "hidden_size = 50 is not a multiple of num_attention_heads = 32"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 3"),
        ("llama", {"head_dim": 7}, "head_dim = 7 is odd"),
        ("llama", {"head_dim": 0}, "head_dim = 0 is not a positive integer"),
        ("llama", {"hidden_size": True}, "hidden_size = True is not a positive integer"),
        ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06 is not a number >= 0"),
        ("llama", {"attention_bias": 1}, "attention_bias = 1 is neither true nor false"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported for llama"),
        ("mistral", {"sliding_window": "3"}, "sliding_window = '3' is not a positive integer"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0 is not a positive integer"),
        ("mistral", {"attention_bias": True}, "attention_bias = True is not supported for mistral, expected False"),
        ("mistral", {"layer_types": BAD_TYPES}, "layer_types = .* is no field of mistral"),
        ("qwen2", {"attention_bias": True}, "attention_bias = True is not supported for qwen2, expected False"),
        ("qwen2", {"use_mrope": True}, "use_mrope = True is not supported for qwen2, expected False"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window = 'yes' is neither true nor false"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 2.5},
            "sliding_window = 2.5 is not a pos",
        ),
        ("qwen2", {"max_window_layers": 1.5}, "max_window_layers = 1.5 is not a whole number"),
        ("qwen2", {"num_hidden_layers": "3"}, "num_hidden_layers = '3' is not a whole number"),
        (
            "qwen3",
            {"layer_types": "full_attention"},
            "layer_types = 'full_attention', expected 32 of",
        ),
        (
            "qwen3",
            {"num_hidden_layers": 3, "layer_types": BAD_TYPES[:1]},
            r"layer_types = \['full_attention'\], expected 3",
        ),
        (
            "qwen3",
            {"num_hidden_layers": 2, "layer_types": BAD_TYPES},
            "layer_types = .*'linear.*, expected 2 of",
        ),
        (
            "qwen3",
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": 3},
            "layer_types has sliding_attention for layer 0, but use_sliding_window = False",
        ),
    ],
    ids=str,
)
def test_read_config__names_field_and_value_it_cannot_take(model_type, fields, message):
    with pytest.raises(InputError, match=message):
        llama.read_config({"model_type": model_type, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama", "sliding_window": 3}, "sliding_window = 3 is not supported for llama, expected None"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias = True is not supported for qwen2, expected False"),
        ({"model_type": "qwen2", "windowed_layers": (1,)}, r"windowed_layers = \(1,\) .* without sliding_window"),
        (
            {"model_type": "qwen2", "sliding_window": 3, "windowed_layers": (32,)},
            r"windowed_layers = \(32,\) .* 0 to 31",
        ),
        ({"model_type": "qwen2", "sliding_window": 3, "windowed_layers": ()}, r"windowed_layers = \(\) "),
        (
            {"model_type": "mistral", "sliding_window": 3, "windowed_layers": (1,)},
            r"= \(1,\) .* mistral",
        ),
    ],
    ids=str,
)
def test_config__refuses_what_config_json_could_not_say(fields, message):
    with pytest.raises(InputError, match=message):
        llama.LlamaConfig(**fields)
