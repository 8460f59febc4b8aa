"""The seam between the device half and the host half: what the detectors may look at, as NumPy arrays.

In: answers with their token ids, a language model, a suite of SAEs. Out: `artifacts.Features`; of a corpus, the latents
that fire on its tokens. Not here: tracks,
tables and detectors, which read the file and never see jax.
"""

from jaxsae.features.ablation import read_ablated
from jaxsae.features.coactivation import keep_corpus
from jaxsae.features.encode import encode_answers, expand_positions
from jaxsae.features.prefixes import Reading, read_prefixes

__all__ = ["Reading", "encode_answers", "expand_positions", "keep_corpus", "read_ablated", "read_prefixes"]
