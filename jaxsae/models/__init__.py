"""Language models that give out their residual streams.

In: a model folder in Hugging Face's layout, a .gguf file (either may lie in a package) or a Hub name, and token ids.
Out: the residual stream after every block, logits, logits from a replaced residual stream, and answers, greedy or
drawn, with their log-probabilities. Not done here: batching a corpus, storing activations, labelling answers.
"""

from jaxsae.models import decoder, families, generate, gpt2, llama, phi, weights
from jaxsae.models.generate import Generation
from jaxsae.models.language_model import LanguageModel, load

__all__ = [
    "Generation",
    "LanguageModel",
    "decoder",
    "families",
    "generate",
    "gpt2",
    "llama",
    "load",
    "phi",
    "weights",
]
