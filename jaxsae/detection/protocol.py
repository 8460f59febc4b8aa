"""Judge every detector on the same grouped folds: splits, out-of-fold scores, resampled groups, paired differences."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from sklearn.metrics import roc_auc_score

from jaxsae.detection import statistics
from jaxsae.detection.ablations import count_stacks, family_rows
from jaxsae.detection.baselines import (
    CANARY_DEFINITION,
    CANARY_DRAWS,
    LOGPROB_DETECTORS,
    STACK_DEFINITIONS,
    STACKS,
    make_baselines,
    make_canary,
    parts_of,
    text_noise,
)
from jaxsae.detection.config import ProtocolConfig
from jaxsae.detection.curves import Point, curve_rows, label_points
from jaxsae.detection.nesting import (
    STACK_CHOICES,
    Nested,
    Verdicts,
    hold_out_baseline,
    judge,
    nest_baseline,
    nest_stack,
    quiet_single_threaded_blas,
)
from jaxsae.detection.resampling import Bootstrap, Control, compare
from jaxsae.detection.specs import Baseline, Choice
from jaxsae.detection.splits import (
    check_rows,
    describe_splits,
    make_folds,
    mixed_groups,
    permute_within_groups,
    shared_texts,
)
from jaxsae.detection.steps import Progress, Steps
from jaxsae.detection.tables import Tables
from jaxsae.detection.tracks import METHOD

ECE_BINS = 15


@dataclasses.dataclass(frozen=True)
class Results:
    """What `evaluate` found.

    Intervals are percentiles over resampled groups with the out-of-fold scores held fixed. In a cross-validation each
    pair of rows serves once in each direction, so that on pure noise a fitted linear detector varies about sqrt(2)
    times more than its interval says (measured on 120 draws of 120 rows: 82 % of the intervals hold 0.5, against 94 %
    without a fit and 92 % for a forest). The canary's interval is over draws of its noise instead.

    Attributes:
        predictions: columns of equal length, a row per (detector, repeat, answer): id, group, repeat, fold, label,
            detector, score (what is ranked, in the detector's own unit; higher = more likely hallucinated) and
            probability (calibrated).
        detection: a row per detector. AUROC and PR-AUC rank each answer by the mean over repeats of its out-of-fold
            score, and so do the p-value and the risk-coverage curve; Brier and ECE use the mean probability, by Platt's
            line and, beside it, by isotonic regression; accuracy, precision, recall and F1 count one decision per
            (repeat, answer) at that fold's threshold.
        canary: the noise canary's mean AUROC over its draws, t-interval and one-sided p-value.
        controls: within-group label permutation, and texts that lie in two folds.
        by_category: a row per (category, detector): its hallucinated answers against all right answers, and against
            the right ones of the same category.
        differences: paired differences of AUROC on the same resamples.
        ablations: what each family of track features adds to the stack, and what the stack with all loses without it.
        curves: a row per (kind, detector, share): AUROC on the first split, learned from a share of the labelled
            groups ("few_labels") or with a share of the labels flipped ("label_noise").
        counts: rows, groups, labels, fits.
        splits: a row per repeat with the sha256 of the sorted lines "id<TAB>fold".
        config: the ProtocolConfig as a dict.
    """

    predictions: dict[str, np.ndarray]
    detection: list[dict[str, Any]]
    canary: dict[str, Any]
    controls: dict[str, Any]
    by_category: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    ablations: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    counts: dict[str, Any]
    splits: list[dict[str, Any]]
    config: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Return everything but the predictions, ready for JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "predictions"]
        return {name: getattr(self, name) for name in names}


def evaluate(tables: Tables, config: ProtocolConfig, *, progress: Progress | None = None) -> Results:
    """Fit, score and compare every detector of the config on the same splits and resamples.

    Args:
        progress: called with (steps done, steps in all, what was done) from the calling thread.

    Raises:
        InputError: rows without a label, fewer than two classes, or too few groups for the folds.
    """
    check_rows(tables, config)
    folds = make_folds(tables, config)
    detectors = list(config.judged)
    baselines = make_baselines(config.settings, tables.n_layers)
    points = label_points(tables, folds[0], seed=config.seed)
    n_steps = config.repeats * (len(config.parts) + 1) + len(detectors) + 2 + len(config.curves) * len(points)
    n_steps += CANARY_DRAWS + count_stacks(config)
    steps = Steps(config.n_jobs, progress, total=n_steps)
    with quiet_single_threaded_blas():
        nested, canaries, permutation, on_curves = _fit_all(tables, config, folds, baselines, points, steps)
        verdicts = {
            (name, repeat): judge(each, tables.labels, folds[repeat], objective=config.threshold)
            for (name, repeat), each in nested.items()
            if name in detectors
        }
        scores = {
            name: np.mean([nested[name, repeat].scores for repeat in range(config.repeats)], axis=0)
            for name in detectors
        }
        bootstrap = Bootstrap(tables, config, steps)
        resampled, p_values = bootstrap.overall(scores), bootstrap.p_values(scores)
        permutation_row = bootstrap.control(permutation)
        by_category = bootstrap.by_category({name: scores[name] for name in _category_detectors(config)})
        ablations = family_rows(nested, folds, tables.labels, config, bootstrap)
        whole = {name: nested[name, 0].scores for name in config.curves}
        curves = curve_rows(points, on_curves, whole, tables.labels, bootstrap)
    rows = [_detection_row(name, tables, baselines, nested, verdicts, resampled, config) for name in detectors]
    return Results(
        predictions=_predictions(tables, folds, detectors, nested, verdicts),
        detection=[row | {"p_value": p_values[row["name"]]} for row in rows],
        canary=statistics.over_draws(np.array([each.scores for each in canaries]), tables.labels)
        | {"definition": CANARY_DEFINITION},
        controls=_control_rows(tables, folds, permutation_row),
        by_category=by_category,
        differences=compare(tables, config, scores, resampled),
        ablations=ablations,
        curves=curves,
        counts=_counts(tables, baselines, nested, [permutation, *canaries, *on_curves.values()]),
        splits=describe_splits(tables, folds),
        config=dataclasses.asdict(config),
    )


def _fit_all(
    tables: Tables,
    config: ProtocolConfig,
    folds: Int[np.ndarray, "repeats N"],
    baselines: Mapping[str, Baseline],
    points: Mapping[str, Point],
    steps: Steps,
) -> tuple[dict[tuple[str, int], Nested], list[Nested], Control, dict[tuple[str, str], Nested]]:
    """Return every detector's scores in each repeat, stacks and all their parts; canaries; label permutation; curves.

    Each draw of the canary is judged on the folds of one repeat.
    """
    permuted = permute_within_groups(tables.labels, tables.group_index, seed=config.seed)

    def fit(name: str, repeat: int) -> Callable[[], Nested]:
        if name == "control permutation":
            return lambda: hold_out_baseline(baselines["tracks_logistic"], permuted, tables, folds[repeat])
        return lambda: nest_baseline(baselines[name], tables, folds[repeat], scheme=config.inner)

    def fit_canary(draw: int) -> Callable[[], Nested]:
        return lambda: hold_out_baseline(
            _canary(draw, tables, config), tables.labels, tables, folds[draw % config.repeats]
        )

    def fit_point(name: str, point: str) -> Callable[[], Nested]:
        labels = points[point].labels
        return lambda: nest_baseline(baselines[name], tables, folds[0], scheme=config.inner, labels=labels)

    repeats = range(len(folds))
    # What has most to fit is first in line, so that it does not leave the other threads waiting at the end.
    slowest = (METHOD, "tracks_forest")
    names = ["control permutation", *sorted(config.parts, key=lambda name: name not in slowest)]
    noise = {("control noise", draw): fit_canary(draw) for draw in range(CANARY_DRAWS)}
    whole = {key: fit(*key) for key in itertools.product(names, repeats)}
    on_curves = {key: fit_point(*key) for key in itertools.product(config.curves, points)}
    done = steps.run(noise | whole | on_curves)
    curved, canaries = {key: done.pop(key) for key in on_curves}, [done.pop(key) for key in noise]
    of_permuted = [done.pop(("control permutation", repeat)) for repeat in repeats]
    permutation = _average(baselines["tracks_logistic"].definition, permuted, of_permuted)
    for name in (name for name in STACKS if name in config.judged):
        parts = parts_of(name, config.families)
        for repeat, fold in enumerate(folds):
            done[name, repeat] = nest_stack([done[part, repeat] for part in parts], tables.labels, fold)
    return done, canaries, permutation, curved


def _canary(draw: int, tables: Tables, config: ProtocolConfig) -> Baseline:
    seed = config.seed * CANARY_DRAWS + draw
    return make_canary(config.settings, text_noise(tables.texts, n_columns=len(tables.track_columns), seed=seed))


def _average(definition: str, labels: Int[np.ndarray, " N"], by_repeat: Sequence[Nested]) -> Control:
    return Control(
        definition=definition,
        labels=labels,
        scores=np.mean([each.scores for each in by_repeat], axis=0),
        n_fits=sum(each.n_fits for each in by_repeat),
        n_unconverged=sum(each.n_unconverged for each in by_repeat),
    )


def _predictions(
    tables: Tables,
    folds: Int[np.ndarray, "repeats N"],
    detectors: Sequence[str],
    nested: Mapping[tuple[str, int], Nested],
    verdicts: Mapping[tuple[str, int], Verdicts],
) -> dict[str, np.ndarray]:
    keys = list(itertools.product(detectors, range(len(folds))))
    n = len(tables.ids)
    return {
        "id": np.tile(np.array(tables.ids), len(keys)),
        "group": np.tile(np.array(tables.groups), len(keys)),
        "repeat": np.repeat([repeat for _, repeat in keys], n),
        "fold": np.concatenate([folds[repeat] for _, repeat in keys]),
        "label": np.tile(tables.labels, len(keys)),
        "detector": np.repeat(np.array([name for name, _ in keys]), n),
        "score": np.concatenate([nested[key].scores for key in keys]),
        "probability": np.concatenate([verdicts[key].probabilities for key in keys]),
    }


def _detection_row(
    name: str,
    tables: Tables,
    baselines: Mapping[str, Baseline],
    nested: Mapping[tuple[str, int], Nested],
    verdicts: Mapping[tuple[str, int], Verdicts],
    resampled: Mapping[str, np.ndarray],
    config: ProtocolConfig,
) -> dict[str, Any]:
    repeats, labels = range(config.repeats), tables.labels
    probabilities = np.mean([verdicts[name, repeat].probabilities for repeat in repeats], axis=0)
    scores = np.mean([nested[name, repeat].scores for repeat in repeats], axis=0)
    isotonic = np.mean([verdicts[name, repeat].isotonic for repeat in repeats], axis=0)
    stepped = statistics.calibration_metrics(isotonic, labels, bins=ECE_BINS)
    ranking = statistics.ranking_metrics(scores, labels)
    low, high = statistics.interval(resampled[name])
    return {
        "name": name,
        "definition": STACK_DEFINITIONS[name] if name in STACKS else baselines[name].definition,
        "n": len(labels),
        "n_groups": len(set(tables.groups)),
        "auroc": ranking.pop("auroc"),
        "ci_low": low,
        "ci_high": high,
        "auroc_by_repeat": [float(roc_auc_score(labels, nested[name, repeat].scores)) for repeat in repeats],
        **ranking,
        **statistics.calibration_metrics(probabilities, labels, bins=ECE_BINS),
        **{f"{key}_isotonic": value for key, value in stepped.items()},
        **statistics.risk_coverage(scores, labels),
        **statistics.decision_metrics(np.stack([verdicts[name, repeat].decisions for repeat in repeats]), labels),
        "n_choices": len(STACK_CHOICES if name in STACKS else baselines[name].choices),
        "chosen": [
            {"repeat": repeat, "fold": fold, **choice._asdict()}
            for repeat in repeats
            for fold, choice in enumerate(nested[name, repeat].chosen)
            if choice != Choice()
        ],
    }


def _category_detectors(config: ProtocolConfig) -> list[str]:
    wanted = {*LOGPROB_DETECTORS, config.method, *STACKS}
    return [name for name in config.judged if name in wanted]


def _control_rows(
    tables: Tables, folds: Int[np.ndarray, "repeats N"], permutation: Mapping[str, Any]
) -> dict[str, Any]:
    n_texts, n_rows = np.max([shared_texts(tables, fold) for fold in folds], axis=0)
    return {
        "within_group_permutation": {
            **permutation,
            "mixed_groups": mixed_groups(tables),
            "definition": "tracks_logistic with labels shuffled within each group, fitted and judged on those: 0.5 "
            "where all groups are mixed; above it by what groups of one label give away",
        },
        "text_overlap": {
            "texts": int(n_texts),
            "rows": int(n_rows),
            "definition": "different normalised texts of (question, answer) that lie in two folds or more, and their "
            "rows; the largest over the repeats",
        },
    }


def _counts(
    tables: Tables,
    baselines: Mapping[str, Baseline],
    nested: Mapping[tuple[str, int], Nested],
    others: Sequence[Control | Nested],
) -> dict[str, Any]:
    labels, of_row = tables.labels, np.array(tables.categories, dtype=object)
    fitted = {name for name, _ in nested}
    counted: list[Nested | Control] = [*nested.values(), *others]
    return {
        "rows": len(labels),
        "groups": len(set(tables.groups)),
        "mixed_groups": mixed_groups(tables),
        "right": int((labels == 0).sum()),
        "hallucinated": int(labels.sum()),
        "empty_answers": tables.n_empty,
        "categories": {
            category: {
                "right": int((labels[of_row == category] == 0).sum()),
                "hallucinated": int(labels[of_row == category].sum()),
            }
            for category in sorted(set(tables.categories))
        },
        "choices_tried": sum(len(STACK_CHOICES if name in STACKS else baselines[name].choices) for name in fitted),
        "fits": sum(each.n_fits for each in counted),
        "unconverged_fits": sum(each.n_unconverged for each in counted),
    }
