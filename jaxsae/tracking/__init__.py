"""Follow SAE features through the layers as tracks, and measure how a sample's tracks behave.

In: for each sample and layer the largest latents with their activations, and each layer's decoder, as NumPy arrays.
Out: `Tracks` (births, deaths, observations, as flat arrays), the table of 26 divergence metrics per sample, and further
families of features: profiles by layer, bags of concepts, late births that point at the emitted token.
Not done here: finding the latents (`features`) and learning from the table (`detection`). NumPy and SciPy only.
"""

from jaxsae.tracking.associate import TrackerConfig
from jaxsae.tracking.bags import CONCEPT_EVENTS, concept_bags
from jaxsae.tracking.births import LATE_BIRTH_COLUMNS, late_births
from jaxsae.tracking.controls import (
    RandomDecoders,
    SignedCoordinates,
    largest_coordinates,
    relabel_links,
    shuffle_links,
)
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
from jaxsae.tracking.profiles import layer_profiles, link_costs, profile_columns
from jaxsae.tracking.tracks import Tracks, track

__all__ = [
    "CONCEPT_EVENTS",
    "DIVERGENCE_COLUMNS",
    "LATE_BIRTH_COLUMNS",
    "POOLED_COLUMNS",
    "CorpusLatents",
    "LinkGraph",
    "RandomDecoders",
    "SignedCoordinates",
    "TrackerConfig",
    "Tracks",
    "concept_bags",
    "concept_spans",
    "concepts",
    "divergence_metrics",
    "largest_coordinates",
    "late_births",
    "layer_profiles",
    "leave_one_out",
    "link_by_coactivation",
    "link_by_weights",
    "link_costs",
    "pooled_metrics",
    "profile_columns",
    "relabel_links",
    "shuffle_links",
    "track",
]
