"""From one answer to its probability: read it, follow its tracks, put it in a table, ask the fitted detector."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxsae import features, models, sae, tracking
from jaxsae.artifacts import Answer, Features
from jaxsae.config import TrackingConfig
from jaxsae.detection import Family, FittedDetector, Tables, build_tables
from jaxsae.detection.explain import earliest_layer, repeat_row, scores_by_layer
from jaxsae.features import Reading
from jaxsae.pipeline.track import follow_all, follow_families, measure, metric_names


@dataclasses.dataclass(frozen=True)
class Judge:
    """A fitted detector and what it needs to see an answer as it saw those it was fitted on.

    Attributes:
        suite: of all layers, as jax arrays.
        decoders: its decoder rows, for each layer [F, D], as NumPy.
        concepts: the concept of each latent.
        keep: latents kept for each layer and position.
        tracker: the tracker's settings and the position it looks at.
        links: the suite's link graph, where the tracker looks it up.
    """

    fitted: FittedDetector
    lm: models.LanguageModel
    suite: sae.SaeSuite
    decoders: list[np.ndarray]
    concepts: Int[np.ndarray, "L F"]
    keep: int
    tracker: TrackingConfig
    links: tracking.LinkGraph | None = None

    @property
    def positions(self) -> tuple[str, ...]:
        """Return the kept positions' names, in the detector's order."""
        return tuple(self.fitted.layout["positions"])

    def read(self, answer: Answer) -> Reading:
        """Read one answer, cut after each of its tokens; raises as `features.read_prefixes` does."""
        return features.read_prefixes(self.lm, self.suite, answer, keep=self.keep, names=self.positions)

    def read_ablated(
        self, answer: Answer, latents: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[tuple[Answer, ...], Features]:
        """Read one answer with latents taken out of the model; raises as `features.read_ablated` does."""
        return features.read_ablated(self.lm, self.suite, answer, latents, keep=self.keep, names=self.positions)

    def follow(self, kept: Features) -> tracking.Tracks:
        """Return the tracks of each row; of each token of each row, where the tracker looks at all of them."""
        return follow_all(kept, self.decoders, self.tracker, links=self.links)[0]

    def tabulate(self, answers: Sequence[Answer], kept: Features) -> Tables:
        """Return what the detector looks at, a row an answer."""
        tracks, offsets = follow_all(kept, self.decoders, self.tracker, links=self.links)
        metrics, families = measure(tracks, offsets, self.tracker), self.families(kept, tracks)
        return build_tables(kept, answers, metrics, metric_names(self.tracker), track_families=families)

    def families(self, kept: Features, tracks: tracking.Tracks) -> dict[str, Family]:
        """Return the families of features of the rows' tracks."""
        return follow_families(kept, tracks, self.decoders, self.concepts, self.tracker, links=self.links)

    def _metrics(self, kept: Features) -> Float[np.ndarray, "N Q"]:
        """Return the metrics of the tracks through the layers of `kept`, all or the first."""
        decoders = self.decoders[: kept.feature_ids.shape[1]]
        return measure(*follow_all(kept, decoders, self.tracker, links=self.links), self.tracker)

    def probabilities(self, tables: Tables) -> Float[np.ndarray, " N"]:
        """Return the calibrated probabilities of hallucination."""
        return self.fitted.predict_proba(tables)[:, 1]

    def earliest_layer(self, tables: Tables, kept: Features) -> int | None:
        """Return the first layer from which on the verdict on the last row is the final one.

        The verdict after layer l is the detector's when it knows the tracks and probes up to layer l alone (see
        `jaxsae.detection.explain.scores_by_layer`); None where no layer turned what it says before it knows anything.
        """
        n_layers = kept.feature_ids.shape[1]
        metrics = np.concatenate([self._metrics(kept.last(layer + 1)) for layer in range(n_layers)])
        by_layer = repeat_row(tables, len(tables.ids) - 1, n_layers, track_metrics=metrics)
        scores = scores_by_layer(self.fitted, by_layer)
        is_hallucinated = self.fitted.calibrated(scores) >= self.fitted.threshold
        return earliest_layer((is_hallucinated == is_hallucinated[-1]) & ~np.isnan(scores))
