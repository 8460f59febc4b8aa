"""The same resamples of groups behind every interval and difference, the same permutations behind every p-value."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import roc_auc_score

from jaxsae.detection import statistics
from jaxsae.detection.baselines import LOGPROB_DETECTORS, STACKS
from jaxsae.detection.config import ProtocolConfig
from jaxsae.detection.steps import Steps
from jaxsae.detection.tables import Tables
from jaxsae.detection.tracks import CONTROLS, METHOD

WITHIN_CATEGORY_ROWS = 10  # of each label, below which an AUROC within one category says nothing


@dataclasses.dataclass(frozen=True)
class Control:
    """Out-of-fold scores, averaged over repeats, of a detector that should know nothing, and the labels it learned."""

    definition: str
    labels: Int[np.ndarray, " N"]
    scores: Float[np.ndarray, " N"]
    n_fits: int
    n_unconverged: int


class Bootstrap:
    """The same resamples of groups, and permutations of labels, for every number."""

    def __init__(self, tables: Tables, config: ProtocolConfig, steps: Steps) -> None:
        self.tables = tables
        self.config = config
        self.steps = steps
        n_groups = int(tables.group_index.max()) + 1
        self.weights = statistics.draw_group_weights(n_groups, resamples=config.bootstrap, seed=config.seed)

    def overall(self, scores: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, " resamples"]]:
        """Return each detector's resampled AUROC."""

        def resample(name: str) -> Callable[[], np.ndarray]:
            return lambda: self._auroc(scores[name])[:, 0]

        drawn = self.steps.run({("interval of", name): resample(name) for name in scores})
        return {name: values for (_, name), values in drawn.items()}

    def p_values(self, scores: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return each detector's p-value, all on the same permutations of labels."""
        p_values = self._permutation_p(np.stack(list(scores.values()), axis=1), self.tables.labels)
        self.steps.report("p-values")
        return dict(zip(scores, p_values.tolist(), strict=True))

    def control(self, control: Control) -> dict[str, Any]:
        """Return AUROC, interval and p-value of a control against its own labels."""
        resampled = statistics.resample_auroc(
            control.scores, control.labels, group=self.tables.group_index, weights=self.weights
        )[:, 0]
        (p_value,) = self._permutation_p(control.scores[:, None], control.labels).tolist()
        self.steps.report("interval of a control")
        point = float(roc_auc_score(control.labels, control.scores))
        return {
            **statistics.with_interval(point, resampled, name="auroc"),
            "p_value": p_value,
            "definition": control.definition,
        }

    def curve_point(self, scores: np.ndarray) -> dict[str, Any]:
        """Return AUROC and interval of scores that were fitted on other labels, against the true ones."""
        point = float(roc_auc_score(self.tables.labels, scores))
        return dict(statistics.with_interval(point, self._auroc(scores)[:, 0], name="auroc"))

    def by_category(self, scores: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Return a row per (category, detector), none where the answers have no category."""
        categories = sorted(set(self.tables.categories))
        if categories == [""]:
            return []
        of_row = np.array(self.tables.categories, dtype=object)
        members = np.stack([of_row == category for category in categories], axis=1)
        rows = []
        for name, values in scores.items():
            resampled = self._auroc(values, positives=members.astype(np.float64))
            for index, category in enumerate(categories):
                rows.append(self._category_row(category, name, values, members[:, index], resampled[:, index]))
        return sorted(rows, key=lambda row: row["category"])

    def _category_row(
        self, category: str, name: str, scores: np.ndarray, member: np.ndarray, resampled: np.ndarray
    ) -> dict[str, Any]:
        labels = self.tables.labels
        against_all = member | (labels == 0)
        n_wrong, n_right = int(labels[member].sum()), int((labels[member] == 0).sum())
        row = {"category": category, "detector": name, "n_right": n_right, "n_wrong": n_wrong}
        point = float(roc_auc_score(labels[against_all], scores[against_all])) if n_wrong else None
        row |= statistics.with_interval(point, resampled, name="auroc")
        within, drawn = None, np.array([np.nan])
        if min(n_wrong, n_right) >= WITHIN_CATEGORY_ROWS:
            within = float(roc_auc_score(labels[member], scores[member]))
            drawn = self._auroc(scores, rows=member)[:, 0]
        low, high = statistics.interval(drawn)
        return row | {"within_auroc": within, "within_ci_low": low, "within_ci_high": high}

    def _permutation_p(self, scores: np.ndarray, labels: np.ndarray) -> Float[np.ndarray, " sets"]:
        return statistics.permutation_p(
            scores,
            labels,
            group=self.tables.group_index,
            permutations=self.config.bootstrap,
            seed=self.config.seed,
        )

    def _auroc(
        self, scores: np.ndarray, *, rows: np.ndarray | slice = slice(None), positives: np.ndarray | None = None
    ) -> Float[np.ndarray, "resamples sets"]:
        return statistics.resample_auroc(
            scores[rows],
            self.tables.labels[rows],
            group=self.tables.group_index[rows],
            weights=self.weights,
            positives=positives,
        )


def compare(
    tables: Tables, config: ProtocolConfig, scores: Mapping[str, np.ndarray], resampled: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Return a - b of AUROC, paired on the same resamples, for each claim whose detectors were run."""
    point = {name: float(roc_auc_score(tables.labels, values)) for name, values in scores.items()}
    plain = [name for name in ("length", *LOGPROB_DETECTORS) if name in point]
    claims = []
    if plain:
        best = max(plain, key=lambda name: point[name])
        words = "the best of length and the log-prob family by AUROC on these rows"
        claims += [
            (f"{name}_over_best_baseline", name, best, f"AUROC of {name} minus that of {words}")
            for name in dict.fromkeys([config.method, *STACKS])
            if name in point and name != best
        ]
    if set(STACKS) <= set(point):
        words = "AUROC of the stack with tracks minus that of the stack: what tracks add"
        claims.append(("stack_tracks_over_stack", "stack_tracks", "stack", words))
    if {METHOD, "tracks_forest"} <= set(point):
        words = "AUROC of the method minus that of the published classifier on the published metrics"
        claims.append((f"{METHOD}_over_tracks_forest", METHOD, "tracks_forest", words))
    words = "AUROC of tracks_logistic minus that of its control: what following latents through the layers adds"
    claims += [
        (f"tracks_logistic_over_{name.removeprefix('tracks_')}", "tracks_logistic", name, words)
        for name in CONTROLS
        if {name, "tracks_logistic"} <= set(point)
    ]
    return [
        {
            "name": name,
            "a": a,
            "b": b,
            "definition": words,
            **statistics.with_interval(point[a] - point[b], resampled[a] - resampled[b], name="difference"),
        }
        for name, a, b, words in claims
    ]
