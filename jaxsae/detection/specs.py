"""What a detector is: the inputs it reads, the estimator that reads them, and what inner validation chooses between."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from sklearn.base import BaseEstimator

from jaxsae.detection.estimators import Matrix
from jaxsae.detection.tables import Tables


class Choice(NamedTuple):
    """One setting that inner validation chooses between.

    Attributes:
        layer: whose residual stream or latents are read.
        c: inverse penalty.
        model: the kind of classifier, as `jaxsae.detection.tracks` names them.
        families: the families of track features that are read, joined by "+".
    """

    layer: int | None = None
    c: float | None = None
    model: str | None = None
    families: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the detectors' estimators are made with.

    Attributes:
        trees: trees of the forest.
        probe_c: inverse penalties of the residual probes, chosen between by inner validation.
        sae_penalty: L1 penalty of the SAE detector and of the concepts' as a fraction of the universal threshold.
        sae_position: the kept position whose latents are read, or "max".
        families: of track features that the method may choose and the stack reads.
        seed: of the forest, of boosting and of liblinear's coordinate order.
    """

    trees: int
    probe_c: tuple[float, ...]
    sae_penalty: float
    sae_position: str
    families: tuple[str, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A detector that is fitted on one matrix.

    Attributes:
        choices: what inner validation chooses between; the first wins a tie.
        inputs: (tables, choice) -> one row per answer; it sees no label.
        estimator: (choice, rows, columns) -> an unfitted scikit-learn classifier.
        selector: the estimator that takes its place while the choice is made, where its own would be too slow.
    """

    name: str
    definition: str
    inputs: Callable[[Tables, Choice], Matrix]
    estimator: Callable[[Choice, int, int], BaseEstimator]
    choices: tuple[Choice, ...] = (Choice(),)
    selector: Callable[[Choice, int, int], BaseEstimator] | None = None
