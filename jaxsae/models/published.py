"""The shapes of well-known models: the fields of their published config.json that decide sizes and families.

Facts, so that a run can be planned where neither the weights nor the Hugging Face Hub are at hand. Each entry is what
the Hub's `config.json` of that name says, without fields that leave sizes as they are, and the number of its parameters
as transformers counts them, tied matrices once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Published:
    """A model's published shape.

    Attributes:
        fields: of its config.json, with Hugging Face's names.
        n_parameters: its published number of parameters.
    """

    fields: Mapping[str, Any]
    n_parameters: int


def find(name: str) -> Published | None:
    """Return the published shape of a Hub name, None if it is not among those known.

    Upper and lower case are the same, and the owner may be left out ("phi-2"). An instruction-tuned model has the shape
    of its base.
    """
    wanted = name.lower()
    known = {full.lower(): published for full, published in PUBLISHED.items()}
    known = {full.rpartition("/")[2]: published for full, published in known.items()} | known
    return known.get(wanted, known.get(wanted.removesuffix("-instruct")))


def _gpt2(n_parameters: int, *, n_layer: int, n_embd: int, n_head: int) -> Published:
    fields = {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 1024}
    return Published(fields | {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}, n_parameters)


def _llama(n_parameters: int, **fields: Any) -> Published:
    """Return a Llama-like model; `fields` hold what differs from a Llama with a vocabulary of 49,152, tied matrices."""
    common = {"model_type": "llama", "vocab_size": 49_152, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    return Published(common | fields, n_parameters)


def _phi(n_parameters: int, *, n_layers: int, d_model: int, fraction: float) -> Published:
    fields = {
        "model_type": "phi",
        "vocab_size": 51_200,
        "hidden_size": d_model,
        "intermediate_size": 4 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": fraction,
        "tie_word_embeddings": False,
    }
    return Published(fields, n_parameters)


PUBLISHED: dict[str, Published] = {
    "openai-community/gpt2": _gpt2(124_439_808, n_layer=12, n_embd=768, n_head=12),
    "openai-community/gpt2-medium": _gpt2(354_823_168, n_layer=24, n_embd=1024, n_head=16),
    "openai-community/gpt2-large": _gpt2(774_030_080, n_layer=36, n_embd=1280, n_head=20),
    "openai-community/gpt2-xl": _gpt2(1_557_611_200, n_layer=48, n_embd=1600, n_head=25),
    "distilbert/distilgpt2": _gpt2(81_912_576, n_layer=6, n_embd=768, n_head=12),
    "microsoft/phi-1_5": _phi(1_418_270_720, n_layers=24, d_model=2048, fraction=0.5),
    "microsoft/phi-2": _phi(2_779_683_840, n_layers=32, d_model=2560, fraction=0.4),
    "meta-llama/Llama-3.2-1B": _llama(
        1_235_814_400,
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "HuggingFaceTB/SmolLM2-135M": _llama(
        134_515_008,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
    ),
    "HuggingFaceTB/SmolLM2-360M": _llama(
        361_821_120,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
    ),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(
        1_711_376_384,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        rope_theta=130_000.0,
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(
        1_100_048_384,
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
    "mistralai/Mistral-7B-v0.1": _llama(
        7_241_732_096,
        model_type="mistral",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32_768,
        sliding_window=4096,
        tie_word_embeddings=False,
    ),
    "Qwen/Qwen2.5-0.5B": _llama(
        494_032_768,
        model_type="qwen2",
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-6,
    ),
}
