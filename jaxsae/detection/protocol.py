"""Judge every detector on the same grouped folds: splits, out-of-fold scores, resampled groups, paired differences."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import joblib
import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from jaxsae.artifacts import InputError
from jaxsae.detection import statistics
from jaxsae.detection.baselines import (
    DETECTORS,
    LOGPROB_DETECTORS,
    STACK_DEFINITIONS,
    STACKS,
    TEXT_DETECTORS,
    Baseline,
    Choice,
    Settings,
    make_baselines,
    make_canary,
    text_noise,
)
from jaxsae.detection.nesting import (
    INNER,
    Nested,
    Verdicts,
    folds_of,
    hold_out_baseline,
    judge,
    nest_baseline,
    nest_stack,
    quiet_single_threaded_blas,
)
from jaxsae.detection.tables import Tables

WITHIN_CATEGORY_ROWS = 10  # of each label, below which an AUROC within one category says nothing
ECE_BINS = 15

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    """How detectors are fitted and judged.

    Attributes:
        folds: outer folds.
        inner: the inner folds of an outer one: its two "neighbours", or "all" others (twice the fits, worth it for a
            few hundred rows).
        repeats: times the rows are split anew.
        bootstrap: resamples of groups behind every interval.
        seed: of splits, forests, noise and resamples; the same seed gives the same numbers to the last bit.
        method: the detector that is compared with the best of length and the log-prob family.
        deploy: the detector that `fit_detector` fits; it may not read text alone.
        detectors: what is reported.
        sae_position: the kept position whose latents the SAE detectors read, or "max" over all of them.
        sae_penalty: their L1 penalty, as a fraction of the universal threshold.
        probe_c: inverse L2 penalties of the residual probes on standardised inputs, chosen between by inner validation.
        trees: of the reference forest; 100 in the published one.
        threshold: what the decision threshold makes largest in inner validation: "youden", "f1" or "accuracy".
        n_jobs: threads, -1 for one per core; no number depends on it.

    Raises:
        InputError: a value is out of its range.
    """

    folds: int = 5
    inner: str = "neighbours"
    repeats: int = 3
    bootstrap: int = 2000
    seed: int = 0
    method: str = "tracks_forest"
    deploy: str = "stack_tracks"
    detectors: tuple[str, ...] = DETECTORS
    sae_position: str = "max"
    sae_penalty: float = 0.5
    probe_c: tuple[float, ...] = (0.001, 0.03)
    trees: int = 100
    threshold: str = "youden"
    n_jobs: int = -1

    def __post_init__(self) -> None:
        smallest = {"folds": 3, "repeats": 1, "bootstrap": 1, "seed": 0, "trees": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise InputError(f"detection.{name} is {getattr(self, name)}, expected at least {least}")
        if self.n_jobs < 1 and self.n_jobs != -1:
            raise InputError(f"detection.n_jobs is {self.n_jobs}, expected at least 1, or -1 for one per core")
        if not self.probe_c or min(self.probe_c) <= 0:
            raise InputError(f"detection.probe_c is {self.probe_c}, expected one or more numbers above 0")
        if self.sae_penalty <= 0:
            raise InputError(f"detection.sae_penalty is {self.sae_penalty}, expected a number above 0")
        _check_name("inner", self.inner, INNER)
        _check_name("threshold", self.threshold, statistics.THRESHOLDS)
        for name in self.detectors:
            _check_name("detectors", name, DETECTORS)
        _check_name("method", self.method, self.detectors)
        _check_name("deploy", self.deploy, [name for name in DETECTORS if name not in TEXT_DETECTORS])

    @property
    def settings(self) -> Settings:
        """Return what the estimators are made with."""
        return Settings(self.trees, tuple(self.probe_c), self.sae_penalty, self.sae_position, self.seed)

    @property
    def parts(self) -> tuple[str, ...]:
        """Name the detectors that are no stack and have to be fitted, for their own sake or for a stack's."""
        wanted = {part for name in self.detectors for part in STACKS.get(name, (name,))}
        return tuple(name for name in DETECTORS if name in wanted)


@dataclasses.dataclass(frozen=True)
class Results:
    """What `evaluate` found.

    Intervals are percentiles over resampled groups with the out-of-fold scores held fixed. In a cross-validation each
    pair of rows serves once in each direction, so that on pure noise a fitted linear detector varies about sqrt(2)
    times more than its interval says (measured on 120 draws of 120 rows: 82 % of the intervals hold 0.5, against 94 %
    without a fit and 92 % for the canary's forest).

    Attributes:
        predictions: columns of equal length, a row per (detector, repeat, answer): id, group, repeat, fold, label,
            detector, score (what is ranked, in the detector's own unit; higher = more likely hallucinated) and
            probability (calibrated).
        detection: a row per detector. AUROC and PR-AUC rank each answer by the mean over repeats of its out-of-fold
            score; Brier and ECE use the mean probability; accuracy, precision, recall and F1 count one decision per
            (repeat, answer) at that fold's threshold.
        canary: the noise canary's AUROC and interval.
        controls: within-group label permutation, and texts that lie in two folds.
        by_category: a row per (category, detector): its hallucinated answers against all right answers, and against
            the right ones of the same category.
        differences: paired differences of AUROC on the same resamples.
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
    detectors = [name for name in DETECTORS if name in config.detectors]
    baselines = make_baselines(config.settings, tables.n_layers)
    steps = _Steps(config, progress, total=config.repeats * (len(config.parts) + 2) + len(detectors) + 2)
    with quiet_single_threaded_blas():
        nested, canary, permutation = _fit_all(tables, config, folds, baselines, steps)
        verdicts = {
            (name, repeat): judge(each, tables.labels, folds[repeat], objective=config.threshold)
            for (name, repeat), each in nested.items()
            if name in detectors
        }
        scores = {
            name: np.mean([nested[name, repeat].scores for repeat in range(config.repeats)], axis=0)
            for name in detectors
        }
        bootstrap = _Bootstrap(tables, config, steps)
        resampled = bootstrap.overall(scores)
        canary_row, permutation_row = bootstrap.control(canary), bootstrap.control(permutation)
        by_category = bootstrap.by_category({name: scores[name] for name in _category_detectors(config)})
    return Results(
        predictions=_predictions(tables, folds, detectors, nested, verdicts),
        detection=[_detection_row(name, tables, baselines, nested, verdicts, resampled, config) for name in detectors],
        canary=canary_row,
        controls=_control_rows(tables, folds, permutation_row),
        by_category=by_category,
        differences=_differences(tables, config, scores, resampled),
        counts=_counts(tables, baselines, nested, [canary, permutation]),
        splits=_splits(tables, folds),
        config=dataclasses.asdict(config),
    )


def check_rows(tables: Tables, config: ProtocolConfig) -> None:
    """Raise InputError unless every row has a label and each class lies in at least `folds` groups."""
    labels = tables.labels
    unknown = np.flatnonzero((labels != 0) & (labels != 1))
    if unknown.size:
        raise InputError(
            f"{unknown.size} of {len(labels)} answers, first {tables.ids[unknown[0]]!r}, have no label, expected 1 "
            "(hallucinated) or 0 (right) for all; run jaxsae answer"
        )
    n_wrong, n_right = int(labels.sum()), int((labels == 0).sum())
    if not n_wrong or not n_right:
        raise InputError(
            f"detection needs answers of both kinds, got {n_wrong} hallucinated and {n_right} right in {len(labels)}; "
            "add questions of which the model gets some right and some wrong (questions.path)"
        )
    n_groups = len(set(tables.groups))
    if n_groups < config.folds:
        raise InputError(
            f"{len(labels)} answers lie in {n_groups} groups, expected at least detection.folds={config.folds}; add "
            "questions or lower detection.folds (at least 3)"
        )
    for label, kind in ((1, "hallucinated"), (0, "right")):
        count = len(np.unique(tables.group_index[labels == label]))
        if count < config.folds:
            raise InputError(
                f"the {int((labels == label).sum())} {kind} answers lie in {count} of {n_groups} groups, expected at "
                f"least detection.folds={config.folds}; add questions or lower detection.folds (at least 3)"
            )


def make_folds(tables: Tables, config: ProtocolConfig) -> Int[np.ndarray, "repeats N"]:
    """Split the rows `repeats` times into folds, no group in two, the classes in about equal shares.

    Raises:
        InputError: a fold lacks one class.
    """
    folds = np.empty((config.repeats, len(tables.ids)), dtype=np.int64)
    blank = np.zeros((len(tables.ids), 1))
    for repeat in range(config.repeats):
        splitter = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed + repeat)
        for number, (_, held_out) in enumerate(splitter.split(blank, tables.labels, tables.group_index)):
            folds[repeat, held_out] = number
        _check_folds(tables, folds[repeat])
    return folds


def _check_folds(tables: Tables, fold: Int[np.ndarray, " N"]) -> None:
    """Raise unless both classes lie in every fold: each may be all that a choice, a calibration or a stack sees."""
    for number in folds_of(fold):
        rows = tables.labels[fold == number]
        if len(np.unique(rows)) < 2:
            raise InputError(
                f"fold {number} got {int(rows.sum())} hallucinated and {int((rows == 0).sum())} right answers of "
                f"{len(tables.ids)}, expected some of both; add questions or lower detection.folds (at least 3)"
            )


class _Steps:
    """Run independent steps on threads and report each as it ends."""

    def __init__(self, config: ProtocolConfig, progress: Progress | None, *, total: int) -> None:
        self.n_jobs = joblib.cpu_count() if config.n_jobs == -1 else config.n_jobs
        self.progress = progress
        self.total = total
        self.done = 0

    def run(self, steps: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
        """Return what each step returns, by its key; the first error stops those that have not begun."""
        executor = concurrent.futures.ThreadPoolExecutor(self.n_jobs)
        try:
            keys = {executor.submit(step): key for key, step in steps.items()}
            finished = {}
            for future in concurrent.futures.as_completed(keys):
                finished[keys[future]] = future.result()
                self.report(" ".join(map(str, keys[future])))
            return finished
        finally:
            executor.shutdown(cancel_futures=True)

    def report(self, what: str) -> None:
        """Count one step as done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)


class _Bootstrap:
    """The same resamples of groups for every number."""

    def __init__(self, tables: Tables, config: ProtocolConfig, steps: _Steps) -> None:
        self.tables = tables
        self.steps = steps
        n_groups = int(tables.group_index.max()) + 1
        self.weights = statistics.draw_group_weights(n_groups, resamples=config.bootstrap, seed=config.seed)

    def overall(self, scores: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, " resamples"]]:
        """Return each detector's resampled AUROC."""

        def resample(name: str) -> Callable[[], np.ndarray]:
            return lambda: self._auroc(scores[name])[:, 0]

        drawn = self.steps.run({("interval of", name): resample(name) for name in scores})
        return {name: values for (_, name), values in drawn.items()}

    def control(self, control: "_Control") -> dict[str, Any]:
        """Return AUROC and interval of a control against its own labels."""
        resampled = statistics.resample_auroc(
            control.scores, control.labels, group=self.tables.group_index, weights=self.weights
        )[:, 0]
        self.steps.report("interval of a control")
        point = float(roc_auc_score(control.labels, control.scores))
        return {**statistics.with_interval(point, resampled, name="auroc"), "definition": control.definition}

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


@dataclasses.dataclass(frozen=True)
class _Control:
    """Out-of-fold scores, averaged over repeats, of a detector that should know nothing, and the labels it learned."""

    definition: str
    labels: Int[np.ndarray, " N"]
    scores: Float[np.ndarray, " N"]
    n_fits: int
    n_unconverged: int


def _fit_all(
    tables: Tables,
    config: ProtocolConfig,
    folds: Int[np.ndarray, "repeats N"],
    baselines: Mapping[str, Baseline],
    steps: _Steps,
) -> tuple[dict[tuple[str, int], Nested], _Control, _Control]:
    """Return every detector's scores in each repeat, stacks and all their parts; the canary; the label permutation."""
    noise = text_noise(tables.texts, n_columns=len(tables.track_columns), seed=config.seed)
    permuted = permute_within_groups(tables.labels, tables.group_index, seed=config.seed)
    controls = {
        "control noise": (make_canary(config.settings, noise), tables.labels),
        "control permutation": (baselines["tracks_logistic"], permuted),
    }

    def fit(name: str, repeat: int) -> Callable[[], Nested]:
        if name in controls:
            baseline, labels = controls[name]
            return lambda: hold_out_baseline(baseline, labels, tables, folds[repeat])
        return lambda: nest_baseline(baselines[name], tables, folds[repeat], scheme=config.inner)

    repeats = range(len(folds))
    # Forests take longest; first in line they do not leave the other threads waiting at the end.
    names = [*controls, *sorted(config.parts, key=lambda name: name != "tracks_forest")]
    done = steps.run({key: fit(*key) for key in itertools.product(names, repeats)})
    canary, permutation = (
        _average_control(baseline.definition, labels, [done.pop((name, repeat)) for repeat in repeats])
        for name, (baseline, labels) in controls.items()
    )
    for name in (name for name in STACKS if name in config.detectors):
        for repeat, fold in enumerate(folds):
            done[name, repeat] = nest_stack([done[part, repeat] for part in STACKS[name]], tables.labels, fold)
    return done, canary, permutation


def _average_control(definition: str, labels: Int[np.ndarray, " N"], by_repeat: Sequence[Nested]) -> _Control:
    return _Control(
        definition=definition,
        labels=labels,
        scores=np.mean([each.scores for each in by_repeat], axis=0),
        n_fits=sum(each.n_fits for each in by_repeat),
        n_unconverged=sum(each.n_unconverged for each in by_repeat),
    )


def permute_within_groups(
    labels: Int[np.ndarray, " N"], group: Int[np.ndarray, " N"], *, seed: int
) -> Int[np.ndarray, " N"]:
    """Shuffle the labels among the rows of each group; a group of one label stays as it is."""
    order = np.argsort(group, kind="stable")
    shuffled = np.lexsort((np.random.default_rng([seed, 1]).random(len(labels)), group))
    permuted = np.empty_like(labels)
    permuted[order] = labels[shuffled]
    return permuted


def _check_name(field: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"detection.{field} is {name!r}, expected one of {', '.join(known)}")


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
    ranking = statistics.ranking_metrics(np.mean([nested[name, repeat].scores for repeat in repeats], axis=0), labels)
    probabilities = np.mean([verdicts[name, repeat].probabilities for repeat in repeats], axis=0)
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
        **statistics.decision_metrics(np.stack([verdicts[name, repeat].decisions for repeat in repeats]), labels),
        "n_choices": 1 if name in STACKS else len(baselines[name].choices),
        "chosen": [
            {"repeat": repeat, "fold": fold, **choice._asdict()}
            for repeat in repeats
            for fold, choice in enumerate(nested[name, repeat].chosen)
            if choice != Choice()
        ],
    }


def _category_detectors(config: ProtocolConfig) -> list[str]:
    wanted = {*LOGPROB_DETECTORS, config.method, *STACKS}
    return [name for name in DETECTORS if name in wanted and name in config.detectors]


def _differences(
    tables: Tables, config: ProtocolConfig, scores: Mapping[str, np.ndarray], resampled: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Return a - b of AUROC for each claim whose detectors were run."""
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


def _control_rows(
    tables: Tables, folds: Int[np.ndarray, "repeats N"], permutation: Mapping[str, Any]
) -> dict[str, Any]:
    n_texts, n_rows = np.max([_shared_texts(tables, fold) for fold in folds], axis=0)
    return {
        "within_group_permutation": {
            **permutation,
            "mixed_groups": _mixed_groups(tables),
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


def _shared_texts(tables: Tables, fold: Int[np.ndarray, " N"]) -> tuple[int, int]:
    """Count the texts that lie in more than one fold, and their rows."""
    folds_of: dict[str, set[int]] = {}
    for text, number in zip(tables.texts, fold.tolist(), strict=True):
        folds_of.setdefault(text, set()).add(number)
    shared = {text for text, numbers in folds_of.items() if len(numbers) > 1}
    return len(shared), sum(text in shared for text in tables.texts)


def _mixed_groups(tables: Tables) -> int:
    n_rows = np.bincount(tables.group_index)
    n_wrong = np.bincount(tables.group_index, weights=tables.labels)
    return int(np.sum((n_wrong > 0) & (n_wrong < n_rows)))


def _counts(
    tables: Tables,
    baselines: Mapping[str, Baseline],
    nested: Mapping[tuple[str, int], Nested],
    controls: Sequence[_Control],
) -> dict[str, Any]:
    labels, of_row = tables.labels, np.array(tables.categories, dtype=object)
    fitted = {name for name, _ in nested}
    counted: list[Nested | _Control] = [*nested.values(), *controls]
    return {
        "rows": len(labels),
        "groups": len(set(tables.groups)),
        "mixed_groups": _mixed_groups(tables),
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
        "choices_tried": sum(len(baselines[name].choices) for name in fitted - set(STACKS)),
        "fits": sum(each.n_fits for each in counted),
        "unconverged_fits": sum(each.n_unconverged for each in counted),
    }


def _splits(tables: Tables, folds: Int[np.ndarray, "repeats N"]) -> list[dict[str, Any]]:
    rows = []
    for repeat, fold in enumerate(folds):
        lines = sorted(f"{name}\t{number}\n" for name, number in zip(tables.ids, fold.tolist(), strict=True))
        rows.append(
            {
                "repeat": repeat,
                "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
                "rows": np.bincount(fold).tolist(),
                "groups": [len(np.unique(tables.group_index[fold == number])) for number in folds_of(fold)],
            }
        )
    return rows
