"""Sparse autoencoders of every layer at once.

In: rows of residual streams from a source (`activations`). Out: a suite of SAEs in Orbax checkpoints, and its quality.
Not here: where activations come from, and what the features are used for.
"""

from jaxsae.sae.checkpoint import Checkpoints, Decoders, load
from jaxsae.sae.step import Recipe, make_recipe
from jaxsae.sae.suite import SaeSuite
from jaxsae.sae.train import Trainer

__all__ = ["Checkpoints", "Decoders", "Recipe", "SaeSuite", "Trainer", "load", "make_recipe"]
