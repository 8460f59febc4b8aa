"""What each family of track features adds to a stack: put in alone, and taken out of the stack that has them all."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import roc_auc_score

from jaxsae.detection import statistics
from jaxsae.detection.baselines import STACKS, stack_parts
from jaxsae.detection.config import ProtocolConfig
from jaxsae.detection.nesting import Nested, nest_stack
from jaxsae.detection.resampling import Bootstrap

ADDED, REMOVED = "added", "removed"
DEFINITIONS = {
    ADDED: "AUROC of the stack with this family alone besides, minus that of the stack",
    REMOVED: "AUROC of the stack with every family, minus that of the same without this one",
}


def family_rows(
    nested: Mapping[tuple[str, int], Nested],
    folds: Int[np.ndarray, "repeats N"],
    labels: Int[np.ndarray, " N"],
    config: ProtocolConfig,
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    """Return two rows per family of the config: what it adds alone, and what is lost without it; above 0, it helps.

    There are none where a stack is not among the detectors, and none of the second kind where there is one family.

    Args:
        nested: every part of both stacks, by (detector, repeat).
    """
    pairs = _pairs(config)
    scores = {
        families: _stack_scores(families, nested, folds, labels)
        for families in dict.fromkeys(each for pair in pairs.values() for each in pair)
    }
    auroc = {families: float(roc_auc_score(labels, found)) for families, found in scores.items()}
    resampled = bootstrap.overall({" ".join(families): found for families, found in scores.items()})
    rows = []
    for (kind, family), (with_it, without) in pairs.items():
        drawn = resampled[" ".join(with_it)] - resampled[" ".join(without)]
        difference = statistics.with_interval(auroc[with_it] - auroc[without], drawn, name="difference")
        about = {"family": family, "kind": kind, "auroc": auroc[with_it], "auroc_without": auroc[without]}
        rows.append({**about, **difference, "definition": DEFINITIONS[kind]})
    return rows


def count_stacks(config: ProtocolConfig) -> int:
    """Count the stacks that `family_rows` sets against each other, each a step to report."""
    return len({each for pair in _pairs(config).values() for each in pair})


def _pairs(config: ProtocolConfig) -> dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the families of the stacks with and without one, by (kind, family)."""
    if not set(STACKS) <= set(config.judged):
        return {}
    families = config.settings.families
    pairs: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
        (ADDED, family): ((family,), ()) for family in families
    }
    if len(families) > 1:
        for family in families:
            pairs[REMOVED, family] = families, tuple(other for other in families if other != family)
    return pairs


def _stack_scores(
    families: tuple[str, ...],
    nested: Mapping[tuple[str, int], Nested],
    folds: Int[np.ndarray, "repeats N"],
    labels: Int[np.ndarray, " N"],
) -> Float[np.ndarray, " N"]:
    """Return the mean over repeats of the out-of-fold scores of a stack that knows these families."""
    parts = stack_parts(families)
    each = [
        nest_stack([nested[part, repeat] for part in parts], labels, fold).scores for repeat, fold in enumerate(folds)
    ]
    return np.mean(each, axis=0)
