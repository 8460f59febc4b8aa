"""What config.json files say: those of published models are understood, and what cannot be followed is refused."""

import dataclasses
import json
import math

import jax
import pytest
import transformers

from jaxsae.artifacts import InputError
from jaxsae.models import config_fields, decoder, families
from jaxsae.models.config_fields import Rotary

COMMON = {"initializer_range": 0.02, "use_cache": True, "transformers_version": "4.40.1", "torch_dtype": "bfloat16"}
GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "bos_token_id": 50_256,
    "eos_token_id": 50_256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "n_ctx": 1024,
    "n_positions": 1024,
    "vocab_size": 50_257,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
GPT2_MEDIUM = {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True}
DISTILGPT2 = {
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 6,
    "_num_labels": 1,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}
PHI = {
    **COMMON,
    "model_type": "phi",
    "architectures": ["PhiForCausalLM"],
    "_name_or_path": "microsoft/phi-2",
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "qk_layernorm": False,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "vocab_size": 51_200,
}
PHI_2 = {
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "resid_pdrop": 0.1,
    "bos_token_id": 50_256,
    "eos_token_id": 50_256,
}
PHI_1_5 = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_key_value_heads": None,
    "partial_rotary_factor": 0.5,
    "resid_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = {
    **COMMON,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}
LLAMA_3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128_000,
    "mlp_bias": False,
    "eos_token_id": [128_001, 128_008, 128_009],
    "max_position_embeddings": 131_072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
    "vocab_size": 128_256,
}
LLAMA3_SCALING = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_1 = {
    **LLAMA_3,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "rope_scaling": {"factor": 8.0, **LLAMA3_SCALING},
}
LLAMA_3_2 = {
    **LLAMA_3,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, **LLAMA3_SCALING},
}
SMOLLM2 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rope_interleaved": False,
    "rope_theta": 100_000,
    "tie_word_embeddings": True,
    "vocab_size": 49_152,
    "transformers.js_config": {"dtype": "q4"},
}
TINYLLAMA = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
MISTRAL = {
    **COMMON,
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "max_position_embeddings": 32_768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
MISTRAL_0_1 = {"rope_theta": 10_000.0, "sliding_window": 4096, "vocab_size": 32_000}
MISTRAL_0_3 = {"rope_theta": 1_000_000.0, "sliding_window": None, "vocab_size": 32_768, "attention_dropout": 0.0}
QWEN = {
    **COMMON,
    "attention_dropout": 0.0,
    "bos_token_id": 151_643,
    "eos_token_id": 151_643,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151_936,
}
QWEN2 = {
    **QWEN,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_theta": 1_000_000.0,
    "sliding_window": 32_768,
}
QWEN3 = {
    **QWEN,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "eos_token_id": 151_645,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40_960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
}
# The fields of the config.json files on the Hub, and the number of weights that the Hub shows for each model.
PUBLISHED = {
    "gpt2": (GPT2 | {"n_embd": 768, "n_head": 12, "n_layer": 12}, 124_439_808),
    "gpt2-medium": (GPT2 | GPT2_MEDIUM, 354_823_168),
    "gpt2-large": (GPT2 | {"n_embd": 1280, "n_head": 20, "n_layer": 36}, 774_030_080),
    "gpt2-xl": (GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True}, 1_557_611_200),
    "distilgpt2": (GPT2 | DISTILGPT2, 81_912_576),
    "phi-2": (PHI | PHI_2, 2_779_683_840),
    "phi-1_5": (PHI | PHI_1_5, 1_418_270_720),
    "Llama-2-7b": (LLAMA | LLAMA_2, 6_738_415_616),
    "Llama-3.1-8B": (LLAMA | LLAMA_3_1, 8_030_261_248),
    "Llama-3.2-1B": (LLAMA | LLAMA_3_2, 1_235_814_400),
    "SmolLM2-135M": (LLAMA | SMOLLM2, 134_515_008),
    "TinyLlama-1.1B": (LLAMA | TINYLLAMA, 1_100_048_384),
    "Mistral-7B-v0.1": (MISTRAL | MISTRAL_0_1, 7_241_732_096),
    "Mistral-7B-v0.3": (MISTRAL | MISTRAL_0_3, 7_248_023_552),
    "Qwen2-0.5B": (QWEN2 | {"max_position_embeddings": 131_072}, 494_032_768),
    "Qwen2.5-0.5B": (QWEN2 | {"max_position_embeddings": 32_768, "use_mrope": False}, 494_032_768),
    "Qwen3-0.6B": (QWEN3, 596_049_920),
}
MODEL_TYPES = sorted(families.FAMILIES)


def read(fields):
    return families.of(fields["model_type"]).read_config(fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_read_config__of_a_published_model_has_its_number_of_weights(name):
    fields, n_weights = PUBLISHED[name]
    shapes = jax.tree.leaves(decoder.abstract_params(read(fields)))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == n_weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_read_config__of_a_published_model_agrees_with_transformers(name):
    fields = PUBLISHED[name][0]
    config, reference = read(fields), transformers.AutoConfig.for_model(**fields)
    assert config.n_layers == reference.num_hidden_layers
    assert config.d_model == reference.hidden_size
    assert config.n_positions == reference.max_position_embeddings
    assert config.d_head == getattr(reference, "head_dim", reference.hidden_size // reference.num_attention_heads)
    assert config.n_key_heads == getattr(reference, "num_key_value_heads", reference.num_attention_heads)
    assert getattr(config, "sliding_window", None) == getattr(reference, "sliding_window", None)
    if hasattr(config, "rotary"):
        rotary = {"partial_rotary_factor": config.rotary.fraction, **config.rotary.write()}
        assert rotary == {"partial_rotary_factor": 1.0, **reference.rope_parameters}
    # what is written says the same: read by us, and by transformers
    written = json.loads(json.dumps(families.of(config.model_type).write_config(config)))
    assert read(written) == config
    assert read(transformers.AutoConfig.for_model(**written).to_dict()) == config


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_read_config__missing_fields_have_transformers_defaults(model_type):
    config, reference = read({"model_type": model_type}), transformers.AutoConfig.for_model(model_type)
    for field in dataclasses.fields(config):
        default = getattr(reference, field.name, getattr(config, field.name))
        expected = config.d_head if field.name == "head_dim" and default is None else default
        assert getattr(config, field.name) == expected, field.name
    assert read(reference.to_dict()) == config


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention = True is not supported for .*, expected False"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\} is not supported"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map = .* is not supported .* expected None"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
        ({"mystery": 3}, "mystery = 3 is no field of"),
        ({"vocab_size": "37"}, "vocab_size = '37' is not a positive integer"),
        ({"vocab_size": True}, "vocab_size = True is not a positive integer"),
        ({"num_hidden_layers": 2.0}, "(num_hidden_layers|n_layer) = 2.0 is not a (positive integer|whole number)"),
        (
            {"num_attention_heads": 7},
            "= (768|2048|4096) is not a multiple of|num_attention_heads = 7 is not a multiple of",
        ),
        ({"tie_word_embeddings": None}, "tie_word_embeddings = None is neither true nor false"),
        ({"initializer_range": math.nan}, "initializer_range = nan is not a number >= 0"),
        ({"eos_token_id": ["</s>"]}, r"eos_token_id = \('</s>',\) is not a token id"),
    ],
    ids=str,
)
def test_read_config__of_every_family_names_field_and_value_it_cannot_take(model_type, fields, message):
    with pytest.raises(InputError, match=message):
        read({"model_type": model_type, **fields})


@pytest.mark.parametrize("model_type", ["falcon", None, 3, ["llama"]])
def test_families__names_the_model_type_it_does_not_have(model_type):
    with pytest.raises(
        InputError, match=r"model_type = .* is not supported; it is one of gpt2, llama, mistral, phi, qwen2"
    ):
        families.of(model_type)


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
def test_read_config__a_number_that_is_whole_may_be_a_float_field(field):
    config = read({"model_type": "llama", "rms_norm_eps": 1, "rope_theta": 500_000, field: None})
    assert (type(config.rms_norm_eps), type(config.rotary.theta)) == (float, float)
    assert getattr(config, field) is None


LLAMA3 = {**LLAMA3_SCALING, "factor": 8.0}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Rotary()),
        ({"rope_theta": 500.0, "rope_scaling": None}, Rotary(theta=500.0)),
        ({"rope_parameters": None}, Rotary()),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_scaling": None}, Rotary(theta=7.0)),
        ({"partial_rotary_factor": 0.25}, Rotary(fraction=0.25)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, Rotary(kind="linear", factor=4.0)),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}, Rotary(kind="linear", factor=4.0)),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, Rotary(kind="dynamic", factor=2.0)),
        ({"rope_scaling": LLAMA3, "rope_theta": 5e5}, Rotary(theta=5e5, kind="llama3", factor=8.0)),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
            Rotary(kind="llama3", factor=8.0, original_max_position_embeddings=64),
        ),
        (
            {
                "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 64,
            },
            Rotary(kind="llama3", factor=8.0, original_max_position_embeddings=64),
        ),
        ({"original_max_position_embeddings": 64}, Rotary()),
    ],
    ids=str,
)
def test_read_rotary__takes_what_transformers_4_and_5_write(fields, expected):
    rotary, rest = config_fields.read_rotary(fields | {"hidden_size": 3})
    assert rotary == expected
    assert rest == {"hidden_size": 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling has rope_type 'yarn', which is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_parameters has rope_type 'longrope', .*; take default, dyn",
        ),
        ({"rope_parameters": {"rope_type": ["linear"]}}, r"rope_parameters has rope_type \['linear'\]"),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "'dynamic', .* type 'linear'"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is no object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of rope_type 'linear' lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "of rope_type 'llama3' lacks low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}},
            r"mrope_section = \[1\], which is not known",
        ),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta = 5.0, which contradicts .* = 6.0"),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
            "8192, which contradicts .* = 4096 beside",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}},
            "rope_scaling = .* con",
        ),
        ({"rope_theta": -1.0}, "rope_theta = -1.0 is not a number > 0"),
        ({"rope_theta": "1e4"}, "rope_theta = '1e4' is not a number > 0"),
        ({"rope_theta": None}, "rope_theta = None is not a number > 0"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor = 0.0 is not a number > 0"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor = True is not a number > 0"),
        ({"rope_scaling": {**LLAMA3, "factor": math.inf}}, "factor = inf is not a number > 0"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor = 4.0 is not below high_freq_factor = 4.0",
        ),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192.0}},
            "original_max_position_embeddings = 8192.0 is not a positive integer",
        ),
    ],
    ids=str,
)
def test_read_rotary__names_what_it_cannot_follow(fields, message):
    with pytest.raises(InputError, match=message):
        config_fields.read_rotary(fields)
