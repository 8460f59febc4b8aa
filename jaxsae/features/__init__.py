"""The seam between the device half and the host half: what the detectors may look at, as NumPy arrays.

In: answers with their token ids, a language model, a suite of SAEs. Out: `artifacts.Features`. Not here: tracks,
tables and detectors, which read the file and never see jax.
"""

from jaxsae.features.encode import encode_answers, expand_positions

__all__ = ["encode_answers", "expand_positions"]
