"""Follow SAE features through the layers as tracks, and measure how a sample's tracks behave.

In: for each sample and layer the largest latents with their activations, and each layer's decoder, as NumPy arrays.
Out: `Tracks` (births, deaths, observations, as flat arrays) and the table of 26 divergence metrics per sample.
Not done here: finding the latents (`features`) and learning from the table (`detection`). NumPy and SciPy only.
"""

from jaxsae.tracking.associate import TrackerConfig
from jaxsae.tracking.controls import RandomDecoders, relabel_links, shuffle_links
from jaxsae.tracking.cut import leave_one_out
from jaxsae.tracking.links import (
    CorpusLatents,
    LinkGraph,
    concept_spans,
    concepts,
    link_by_coactivation,
    link_by_weights,
)
from jaxsae.tracking.metrics import DIVERGENCE_COLUMNS, divergence_metrics
from jaxsae.tracking.pooling import POOLED_COLUMNS, pooled_metrics
from jaxsae.tracking.tracks import Tracks, track

__all__ = [
    "DIVERGENCE_COLUMNS",
    "POOLED_COLUMNS",
    "CorpusLatents",
    "LinkGraph",
    "RandomDecoders",
    "TrackerConfig",
    "Tracks",
    "concept_spans",
    "concepts",
    "divergence_metrics",
    "leave_one_out",
    "link_by_coactivation",
    "link_by_weights",
    "pooled_metrics",
    "relabel_links",
    "shuffle_links",
    "track",
]
