"""The published shapes: the families read them, and their parameters add up to the published totals."""

import math

import jax
import pytest

from jaxsae.models import decoder, families, published
from jaxsae.models.published import PUBLISHED

TOTALS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "microsoft/phi-1_5": 1_418_270_720,
    "microsoft/phi-2": 2_779_683_840,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}


@pytest.mark.parametrize("name", list(TOTALS))
def test_published_shape__has_the_published_number_of_parameters(name):
    shape = published.find(name)
    config = families.of(shape.fields["model_type"]).read_config(shape.fields)
    leaves = jax.tree.leaves(decoder.abstract_params(config))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == shape.n_parameters == TOTALS[name]


def test_totals__are_of_every_published_shape():
    assert {id(published.find(name)) for name in TOTALS} == {id(shape) for shape in PUBLISHED.values()}


@pytest.mark.parametrize("name", ["gpt2", "GPT2", "openai-community/gpt2"])
def test_find__takes_a_name_with_and_without_its_owner(name):
    assert published.find(name) is PUBLISHED["openai-community/gpt2"]


@pytest.mark.parametrize("name", ["", "gpt3", "someone/phi-2", "gpt2/", "-instruct"])
def test_find__of_another_name_is_none(name):
    assert published.find(name) is None
