"""What the report is made from, and its tables: numbers to text, one function per table.

`–` stands for a value that was not measured or is not defined (None or NaN). Fractions of variance, AUROC and the like
are on 0–1; shares print in percent; sizes in powers of 1,024 bytes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsae.progress import human_bytes, human_seconds
from jaxsae.report.markup import Code, Inline, Table, clean

Row = Mapping[str, Any]
ABSENT = "–"
SUMMARY_WIDTH = 100  # columns of `summary_table`: a terminal beside an editor
QUALITY_BANDS = (
    ("excellent", 0.05),
    ("good", 0.10),
    ("fair", 0.20),
    ("poor", math.inf),
)  # upper FVU; ours, by convention


@dataclasses.dataclass(frozen=True)
class ReportInputs:
    """Everything a report may say, as the pipeline gathered it; an empty part is reported as not available.

    Attributes:
        config_name: name of the run's config.
        command: the command line of the run.
        created: ISO time that stands on the report.
        config: settings, flat or nested.
        host: machine, cpu, cores, memory, device kind, python, versions of packages; flat or nested.
        model: name, n_layers, d_model, n_vocab, n_parameters.
        sae_spec: architecture, n_latents, k, tokens (trained on), steps, batch (tokens per step), dead_tokens (training
            tokens without firing after which a latent counts as dead).
        phases: name, status ("done", "skipped" or "missing"), seconds, output_bytes, peak_bytes (host memory), detail.
        sae: one row a layer: layer, mse, fvu, pca_fvu (k components, same tokens), explained_variance_legacy, l0_train,
            l0_inference, dead and dead_held_out (shares of the latents), delta_ce, delta_ce_zero, delta_ce_mean, kl
            (nats per token), ce_recovered, crowding_ + mean, p05, p25, median, p75, p95, max, best_step.
        held_out_tokens: tokens behind the rows of `sae`.
        density: log10_edges, and counts: for each layer, in order, how many latents have a log10 firing rate between
            them, those that never fire left out.
        crowding_random: the median crowding of as many random directions.
        history: one row per evaluation and layer: step, tokens, layer, fvu, mse, l0, dead, loss.
        detection: one row a detector: name, definition, n, n_groups, auroc, ci_low, ci_high, p_value, pr_auc,
            base_rate, brier, ece (by Platt's line), brier_isotonic, ece_isotonic, aurc, aurc_best, accuracy, precision,
            recall, f1; risk_coverage: points of coverage and risk; n_choices: configurations that inner validation
            chose between, and chosen: which (repeat, fold, and what applies of layer, c, model, families).
        curves: kind ("few_labels", "label_noise"), detector, share, n_labelled, auroc, ci_low, ci_high.
        canary: auroc, ci_low, ci_high of noise in place of the features.
        by_category: detector, category, n_right, n_wrong (of the category), auroc, ci_low, ci_high (its hallucinated
            answers against all right ones, unless `kind` says otherwise), and, optional, kind, within_auroc,
            within_ci_low, within_ci_high (against the right ones of the category).
        differences: paired AUROC differences on the same resamples: name, difference, ci_low, ci_high, definition.
        ablations: what each family of track features adds to the stack: family, kind ("added" alone, or "removed" from
            the stack with all of them), difference (above 0: the family helps), ci_low, ci_high, definition.
        counts: rows, groups, right, wrong, empty; choices_tried: configurations of all detectors together;
            by_category: category -> right, wrong.
        labels: of all answers, those left out included: counts (asked, right, wrong, empty, refusal, dropped),
            hallucinated_by_rule (rule -> answers), agreement (a, b, n, agreement, kappa).
        predictions: detector -> (labels, scores, groups), out of fold; a label of 1 is a hallucinated answer. The ROC
            ranks these scores, as AUROC does.
        probabilities: detector -> calibrated scores in the same order; where a detector has none, its scores are taken
            for probabilities if they lie between 0 and 1.
        method: name of the detector that the run puts forward.
        best_baseline: name of the best of {answer length, log-prob family}.
        pass_difference: name of the row of `differences` that decides whether the method passes.
        tracks_difference: name of the row of `differences` for (stack with tracks) over (stack without).
        examples: question, answer, label, expected, score, tracks; a track has birth, death (-1 or None: alive at the
            end), layers, features, activations.
        disk_bytes: path -> bytes.
        notes: sentences about this run.
    """

    config_name: str
    command: str
    created: str
    config: Row = dataclasses.field(default_factory=dict)
    host: Row = dataclasses.field(default_factory=dict)
    model: Row = dataclasses.field(default_factory=dict)
    sae_spec: Row = dataclasses.field(default_factory=dict)
    phases: Sequence[Row] = ()
    sae: Sequence[Row] = ()
    held_out_tokens: int | None = None
    density: Row = dataclasses.field(default_factory=dict)
    crowding_random: float | None = None
    history: Sequence[Row] = ()
    detection: Sequence[Row] = ()
    canary: Row | None = None
    by_category: Sequence[Row] = ()
    differences: Sequence[Row] = ()
    ablations: Sequence[Row] = ()
    curves: Sequence[Row] = ()
    counts: Row = dataclasses.field(default_factory=dict)
    labels: Row = dataclasses.field(default_factory=dict)
    predictions: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    probabilities: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    method: str | None = None
    best_baseline: str | None = None
    pass_difference: str | None = None
    tracks_difference: str | None = None
    examples: Sequence[Row] = ()
    disk_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


def known(value: Any) -> bool:
    """Tell whether a value was measured and is defined: neither None nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def number(value: Any, spec: str = ".3f") -> str:
    """Return a number formatted by `spec`, or `–`."""
    return format(value, spec) if known(value) else ABSENT


def count(value: Any) -> str:
    """Return an integer with thousands separators, or `–`."""
    return format(int(value), ",") if known(value) else ABSENT


def signed(value: Any) -> str:
    """Return a difference with its sign and four decimals, or `–`; a rounded zero has a plus."""
    return format(round(float(value), 4) + 0.0, "+.4f") if known(value) else ABSENT


def interval(row: Row, text: Callable[[Any], str] = number) -> str:
    """Return a row's `ci_low` and `ci_high` as [low, high], or `–`."""
    low, high = row.get("ci_low"), row.get("ci_high")
    return f"[{text(low)}, {text(high)}]" if known(low) and known(high) else ABSENT


def byte_size(value: Any) -> str:
    """Return a size such as 1.4 MiB, or `–`."""
    return human_bytes(value) if known(value) else ABSENT


def duration(seconds: Any) -> str:
    """Return a time such as 12.3 s, 3 min 05 s or 1 h 02 min, or `–`."""
    return human_seconds(seconds) if known(seconds) else ABSENT


def quality_band(fvu: Any) -> str | None:
    """Return the name of the band an FVU falls in, or None if it is not known."""
    if not known(fvu):
        return None
    return next(name for name, limit in QUALITY_BANDS if fvu <= limit)


def values(rows: Sequence[Row], key: str) -> list[float]:
    """Return the known values of one column."""
    return [float(row[key]) for row in rows if known(row.get(key))]


def named(rows: Sequence[Row], name: str | None) -> Row | None:
    """Return the row with this name, or None."""
    return next((row for row in rows if row["name"] == name), None)


def phase_table(inputs: ReportInputs) -> Table:
    """Tabulate the phases with their times, sizes and host memory, and the sum of the times and sizes."""
    rows: list[tuple[Inline, ...]] = [
        (
            Code(row["name"]),
            row["status"] if row["status"] != "missing" else f"missing: run jaxsae {row['name']}",
            duration(row.get("seconds")),
            byte_size(row.get("output_bytes")),
            byte_size(row.get("peak_bytes")),
            str(row.get("detail") or ""),
        )
        for row in inputs.phases
    ]
    seconds, sizes = values(inputs.phases, "seconds"), values(inputs.phases, "output_bytes")
    peaks = values(inputs.phases, "peak_bytes")
    total = (
        "all",
        f"{sum(row['status'] != 'missing' for row in inputs.phases)} of {len(inputs.phases)}",
        duration(sum(seconds) if seconds else None),
        byte_size(sum(sizes) if sizes else None),
        byte_size(max(peaks, default=None)),
        "sum of times and outputs, largest peak",
    )
    header = ("Phase", "Status", "Time", "Output", "Peak host memory", "Detail")
    return Table(header, (*rows, total), "llrrrl", n_summary=1)


Columns = tuple[tuple[str, str, str], ...]  # key, title, format
SAE_COLUMNS: Columns = (
    ("fvu", "FVU", ".4f"),
    ("pca_fvu", "PCA FVU", ".4f"),
    ("l0_train", "L0 train", ".1f"),
    ("l0_inference", "L0 inference", ".1f"),
    ("dead", "Dead", ".1%"),
    ("dead_held_out", "Dead held-out", ".1%"),
    ("delta_ce", "ΔCE", ".4f"),
    ("kl", "KL", ".4f"),
    ("crowding_median", "Crowding", ".3f"),
)
SAE_DETAILS: Columns = (
    ("mse", "MSE", "#.4g"),
    ("fvu", "FVU", ".4f"),
    ("explained_variance_legacy", "EV legacy", ".4f"),
    ("delta_ce", "ΔCE", ".4f"),
    ("delta_ce_zero", "ΔCE zero", ".3f"),
    ("delta_ce_mean", "ΔCE mean", ".3f"),
    ("ce_recovered", "CE recovered", ".1%"),
    ("crowding_mean", "Crowding mean", ".3f"),
    ("crowding_p05", "5%", ".3f"),
    ("crowding_p25", "25%", ".3f"),
    ("crowding_p75", "75%", ".3f"),
    ("crowding_p95", "95%", ".3f"),
    ("crowding_max", "max", ".3f"),
)
SUMMARY_KEYS = ("mse", "fvu", "pca_fvu", "l0_train", "l0_inference", "dead", "delta_ce")
STATISTICS: tuple[tuple[str, Callable[[list[float]], Any]], ...] = (
    ("mean", np.mean),
    ("median", np.median),
    ("min", np.min),
    ("max", np.max),
    ("std", np.std),
)


def sae_table(inputs: ReportInputs) -> Table:
    """Tabulate the most telling measures of the SAEs by layer, then `STATISTICS` over the layers (std: ddof 0)."""
    more = [(count(row.get("best_step")), quality_band(row.get("fvu")) or ABSENT) for row in inputs.sae]
    rows = [(*cells, *last) for cells, last in zip(_layer_rows(inputs.sae, SAE_COLUMNS), more, strict=True)]
    summary = [(*cells, "", "") for cells in _statistics_rows(inputs.sae, SAE_COLUMNS)]
    header = ("Layer", *(title for _, title, _ in SAE_COLUMNS), "Best step", "Band")
    return Table(header, (*rows, *summary), "r" * (len(header) - 1) + "l", n_summary=len(summary))


def sae_detail_table(inputs: ReportInputs) -> Table:
    """Tabulate the other measures, and those they must be read beside, with the same rows as `sae_table`."""
    summary = _statistics_rows(inputs.sae, SAE_DETAILS)
    header = ("Layer", *(title for _, title, _ in SAE_DETAILS))
    rows = (*_layer_rows(inputs.sae, SAE_DETAILS), *summary)
    return Table(header, rows, "r" * len(header), n_summary=len(summary))


def _layer_rows(rows: Sequence[Row], columns: Columns) -> list[tuple[str, ...]]:
    return [(str(row["layer"]), *(number(row.get(key), spec) for key, _, spec in columns)) for row in rows]


def _statistics_rows(rows: Sequence[Row], columns: Columns) -> list[tuple[str, ...]]:
    return [(name, *_column_statistics(rows, columns, statistic)) for name, statistic in STATISTICS]


def _column_statistics(
    rows: Sequence[Row], columns: Columns, statistic: Callable[[list[float]], Any] = np.mean
) -> list[str]:
    known_values = [(values(rows, key), spec) for key, _, spec in columns]
    return [number(statistic(column), spec) if column else ABSENT for column, spec in known_values]


def band_table(inputs: ReportInputs) -> Table:
    """Tabulate how many layers fall in each quality band."""
    bands = [quality_band(row.get("fvu")) for row in inputs.sae]
    rows: list[tuple[Inline, ...]] = []
    lower = 0.0
    for name, limit in QUALITY_BANDS:
        meaning = (
            f"FVU > {lower:g}" if math.isinf(limit) else f"{lower:g} < FVU ≤ {limit:g}" if lower else f"FVU ≤ {limit:g}"
        )
        layers = [str(row["layer"]) for row, band in zip(inputs.sae, bands, strict=True) if band == name]
        rows.append((name, meaning, str(len(layers)), ", ".join(layers)))
        lower = limit
    unknown = [str(row["layer"]) for row, band in zip(inputs.sae, bands, strict=True) if band is None]
    if unknown:
        rows.append(("not measured", ABSENT, str(len(unknown)), ", ".join(unknown)))
    return Table(("Band", "Meaning", "Number of layers", "Layers"), tuple(rows), "llrl")


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the early and the late half of the layers; the middle one of an odd number is in neither."""
    ordered = sorted(rows, key=lambda row: row["layer"])
    half = len(ordered) // 2
    return ordered[:half], ordered[len(ordered) - half :]


def depth_table(inputs: ReportInputs) -> Table:
    """Tabulate the mean of each measure of `sae_table` over the early and over the late half of the layers."""
    rows = []
    for name, half in zip(("early", "late"), halves(inputs.sae), strict=True):
        layers = f"{name} ({half[0]['layer']}–{half[-1]['layer']})"
        rows.append((layers, *_column_statistics(half, SAE_COLUMNS)))
    header = ("Layers", *(title for _, title, _ in SAE_COLUMNS))
    return Table(header, tuple(rows), "l" + "r" * len(SAE_COLUMNS))


DETECTION_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("p_value", "p", lambda value: number(value, ".2g")),
    ("pr_auc", "PR-AUC", number),
    ("aurc", "AURC", number),
    ("accuracy", "Accuracy", number),
    ("precision", "Precision", number),
    ("recall", "Recall", number),
    ("f1", "F1", number),
)
CALIBRATION_COLUMNS = (
    ("brier", "Brier"),
    ("ece", "ECE"),
    ("brier_isotonic", "Brier, isotonic"),
    ("ece_isotonic", "ECE, isotonic"),
)
SAMPLE_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("n", "Answers", count),
    ("n_groups", "Groups", count),
    ("base_rate", "Hallucinated", lambda value: number(value, ".1%")),
)


def by_auroc(rows: Sequence[Row]) -> list[Row]:
    """Return rows by falling AUROC, those without one last."""
    return sorted(rows, key=lambda row: -row["auroc"] if known(row.get("auroc")) else math.inf)


def role(inputs: ReportInputs, name: str) -> str:
    """Return what part a detector plays in the run's claim: method, best baseline, or nothing."""
    return "method" if name == inputs.method else "best baseline" if name == inputs.best_baseline else ""


def detection_table(inputs: ReportInputs) -> Table:
    """Tabulate every detector by falling AUROC with its interval; the method's row is marked.

    Sample sizes are columns where detectors differ in them, and a caption where they do not.
    """
    ordered = by_auroc(inputs.detection)
    samples = {tuple(text(row.get(key)) for key, _, text in SAMPLE_COLUMNS) for row in ordered}
    columns = DETECTION_COLUMNS if len(samples) == 1 else DETECTION_COLUMNS + SAMPLE_COLUMNS
    rows: tuple[tuple[Inline, ...], ...] = tuple(
        (
            Code(row["name"]),
            role(inputs, row["name"]),
            number(row.get("auroc")),
            interval(row),
            *(text(row.get(key)) for key, _, text in columns),
        )
        for row in ordered
    )
    header = ("Detector", "Part", "AUROC", "95% interval", *(title for _, title, _ in columns))
    marked = frozenset(index for index, row in enumerate(ordered) if row["name"] == inputs.method)
    caption = ""
    if len(samples) == 1:
        n, n_groups, base_rate = samples.pop()
        caption = f"Every row: {n} answers in {n_groups} groups, {base_rate} hallucinated."
    return Table(header, rows, "ll" + "r" * (len(header) - 2), caption=caption, marked=marked)


def calibration_table(inputs: ReportInputs) -> Table:
    """Tabulate how good every detector's probabilities are, by Platt's line and by isotonic regression."""
    rows: tuple[tuple[Inline, ...], ...] = tuple(
        (Code(row["name"]), *(number(row.get(key)) for key, _ in CALIBRATION_COLUMNS))
        for row in by_auroc(inputs.detection)
    )
    header = ("Detector", *(title for _, title in CALIBRATION_COLUMNS))
    marked = frozenset(index for index, row in enumerate(by_auroc(inputs.detection)) if row["name"] == inputs.method)
    return Table(header, rows, "l" + "r" * len(CALIBRATION_COLUMNS), marked=marked)


def definition_table(inputs: ReportInputs) -> Table:
    """Tabulate what each detector is."""
    rows = tuple((Code(row["name"]), str(row.get("definition") or ABSENT)) for row in by_auroc(inputs.detection))
    return Table(("Detector", "Definition"), rows, "ll")


def category_table(inputs: ReportInputs) -> Table:
    """Tabulate the AUROC of each detector on each kind of question; columns that no row has are left out."""
    has_kind = any(row.get("kind") for row in inputs.by_category)
    has_within = any("within_auroc" in row for row in inputs.by_category)
    rows: list[tuple[Inline, ...]] = []
    for row in inputs.by_category:
        cells: list[Inline] = [Code(row["detector"]), str(row["category"]) or "(no category)"]
        cells += [str(row.get("kind") or "")] if has_kind else []
        cells += [count(row.get("n_right")), count(row.get("n_wrong")), number(row.get("auroc")), interval(row)]
        if has_within:
            within = {"ci_low": row.get("within_ci_low"), "ci_high": row.get("within_ci_high")}
            cells += [number(row.get("within_auroc")), interval(within)]
        rows.append(tuple(cells))
    kind = ("Kind",) if has_kind else ()
    within_header = ("AUROC within", "95% interval") if has_within else ()
    header = ("Detector", "Category", *kind, "Right", "Hallucinated", "AUROC", "95% interval", *within_header)
    marked = frozenset(index for index, row in enumerate(inputs.by_category) if row["detector"] == inputs.method)
    n_left = 2 + len(kind)
    return Table(header, tuple(rows), "l" * n_left + "r" * (len(header) - n_left), marked=marked)


def difference_table(inputs: ReportInputs) -> Table:
    """Tabulate the paired AUROC differences; those that decide a claim are marked."""
    rows: tuple[tuple[Inline, ...], ...] = tuple(
        (
            str(row["name"]),
            signed(row.get("difference")),
            interval(row, signed),
            side_of_zero(row),
            str(row.get("definition") or ""),
        )
        for row in inputs.differences
    )
    deciding = {inputs.pass_difference, inputs.tracks_difference}
    marked = frozenset(index for index, row in enumerate(inputs.differences) if row["name"] in deciding)
    header = ("Difference", "AUROC", "95% interval", "Interval", "Definition")
    return Table(header, rows, "lrrrl", marked=marked)


def ablation_table(inputs: ReportInputs) -> Table:
    """Tabulate what each family of track features adds to the stack without tracks, and to all other families."""
    rows: list[tuple[Inline, ...]] = []
    for family in dict.fromkeys(row["family"] for row in inputs.ablations):
        cells: list[Inline] = [Code(family)]
        for kind in ("added", "removed"):
            of_kind = [row for row in inputs.ablations if (row["family"], row["kind"]) == (family, kind)]
            row: Row = of_kind[0] if of_kind else {}
            cells += [signed(row.get("difference")), interval(row, signed), side_of_zero(row)]
        rows.append(tuple(cells))
    to_stack, to_all = "Added to the stack", "Beside the other families"
    header = ("Family", to_stack, "95% interval", "Interval", to_all, "95% interval", "Interval")
    return Table(header, tuple(rows), "l" + "r" * 6)


def choice_table(row: Row) -> Table:
    """Tabulate what inner validation chose for a detector in each fold, the most frequent choice first."""
    found: dict[tuple[str, ...], list[str]] = {}
    for chosen in row.get("chosen") or ():
        found.setdefault(_choice_cells(chosen), []).append(f"{chosen['repeat'] + 1}.{chosen['fold'] + 1}")
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    rows: list[tuple[Inline, ...]] = [(*cells, str(len(folds)), ", ".join(folds)) for cells, folds in ordered]
    return Table(("Classifier", "Track features", "Folds", "Repeat.fold"), tuple(rows), "llrl")


def _choice_cells(chosen: Row) -> tuple[str, ...]:
    families = str(chosen.get("families") or "").replace("+", ", ")
    return str(chosen.get("model") or ABSENT), families or ABSENT


def side_of_zero(row: Row) -> str:
    """Return whether a difference's interval lies above 0, below 0 or holds 0; `–` without an interval."""
    low, high = row.get("ci_low"), row.get("ci_high")
    if not known(low) or not known(high):
        return ABSENT
    return "above 0" if float(low or 0.0) > 0 else "below 0" if float(high or 0.0) < 0 else "holds 0"


def count_table(inputs: ReportInputs) -> Table:
    """Tabulate right and hallucinated answers by category, what each category adds to the errors, and all of them."""
    categories: Mapping[str, Row] = inputs.counts.get("by_category") or {}
    wrong = inputs.counts.get("wrong")
    rows = [_count_row(name or "(no category)", row, wrong) for name, row in categories.items()]
    rows.append(_count_row("all", inputs.counts, wrong))
    header = ("Category", "Right", "Hallucinated", "Answers", "Hallucinated share", "Share of all hallucinated")
    return Table(header, tuple(rows), "lrrrrr", n_summary=1)


def _count_row(name: str, row: Row, all_wrong: int | None) -> tuple[str, ...]:
    right, wrong = row.get("right"), row.get("wrong")
    total = None if right is None or wrong is None else right + wrong
    share = wrong / total if total else None
    part = wrong / all_wrong if wrong is not None and all_wrong else None
    return name, count(right), count(wrong), count(total), number(share, ".1%"), number(part, ".1%")


def agreement_table(inputs: ReportInputs) -> Table:
    """Tabulate how far the labels of each two rules agree; pairs with the run's own rule come first, as they are."""
    wrong: Row = inputs.labels["hallucinated_by_rule"]
    rows: tuple[tuple[Inline, ...], ...] = tuple(
        (
            Code(row["a"]),
            Code(row["b"]),
            number(wrong[row["a"]] / row["n"], ".1%"),
            number(wrong[row["b"]] / row["n"], ".1%"),
            number(row["agreement"], ".1%"),
            number(row["kappa"]),
        )
        for row in inputs.labels["agreement"]
    )
    header = ("Rule", "Other rule", "Hallucinated", "By the other", "Equal labels", "Cohen's κ")
    return Table(header, rows, "llrrrr")


def disk_table(inputs: ReportInputs) -> Table:
    """Tabulate what lies in the workdir, largest first."""
    ordered = sorted(inputs.disk_bytes.items(), key=lambda item: (-item[1], item[0]))
    rows: list[tuple[Inline, ...]] = [(Code(path), byte_size(size)) for path, size in ordered]
    total = ("all", byte_size(sum(inputs.disk_bytes.values())))
    return Table(("Path", "Size"), (*rows, total), "lr", n_summary=1)


def settings_table(settings: Row, *, header: tuple[str, str]) -> Table:
    """Tabulate a nested mapping, one leaf a row, its path joined with dots."""
    rows = tuple((Code(name), Code(_setting(value))) for name, value in _leaves(settings))
    return Table(header, rows, "ll")


def _leaves(settings: Row, prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in settings.items():
        leaves += _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return leaves


def _setting(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def example_table(example: Row) -> Table:
    """Tabulate one answer: what was asked, said and expected, its label and its score."""
    expected = example.get("expected")
    expected = expected if isinstance(expected, str) else " / ".join(map(str, expected or ()))
    rows = (
        ("Question", clip(example["question"])),
        ("Answer", clip(example["answer"]) if example["answer"].strip() else "(empty)"),
        ("Expected", clip(expected) or ABSENT),
        ("Label", "hallucinated" if example["label"] else "right"),
        ("Score", number(example.get("score"))),
        ("Tracks", count(len(example["tracks"]))),
    )
    return Table(("Field", "Text"), rows, "ll")


def clip(text: str, n_characters: int = 600) -> str:
    """Return text cut after `n_characters`, saying how long it was."""
    return text if len(text) <= n_characters else f"{text[:n_characters]} … ({len(text):,} characters in all)"


def summary_table(inputs: ReportInputs) -> str:
    """Return the results as plain text, at most 100 columns: the SAEs by layer, the detectors with their intervals."""
    return "\n".join(_cut(line).rstrip() for line in [*_sae_lines(inputs), "", *_detection_lines(inputs)])


def _cut(line: str) -> str:
    return line if len(line) <= SUMMARY_WIDTH else line[: SUMMARY_WIDTH - 1] + "…"


def _sae_lines(inputs: ReportInputs) -> list[str]:
    if not inputs.sae:
        return ["Sparse autoencoders: not available: run jaxsae train"]
    by_key = {column[0]: column for column in (*SAE_COLUMNS, *SAE_DETAILS)}
    columns = tuple(by_key[key] for key in SUMMARY_KEYS)
    rows = [list(cells) for cells in _layer_rows(inputs.sae, columns)]
    rows.append(["mean", *_column_statistics(inputs.sae, columns)])
    header = ["layer", *(title for _, title, _ in columns)]
    return ["Sparse autoencoders", *_plain([header, *rows], left=0)]


def _detection_lines(inputs: ReportInputs) -> list[str]:
    if not inputs.detection:
        return ["Detection of hallucinated answers: not available: run jaxsae detect"]
    header = ["detector", "", "AUROC", "95% interval", "PR-AUC", "Brier", "F1"]
    rows = [
        [clean(row["name"])[:34], role(inputs, row["name"]), number(row.get("auroc")), interval(row)]
        + [number(row.get(key)) for key in ("pr_auc", "brier", "f1")]
        for row in by_auroc(inputs.detection)
    ]
    if inputs.canary is not None:
        rows.append(["noise canary", "", number(inputs.canary.get("auroc")), interval(inputs.canary), "", "", ""])
    lines = ["Detection of hallucinated answers", *_plain([header, *rows], left=2)]
    for name in (inputs.pass_difference, inputs.tracks_difference):
        row = named(inputs.differences, name)
        if row is not None:
            change = f"{signed(row.get('difference'))} {interval(row, signed)}"
            lines.append(f"  {clean(row['name'])}: {change}, {side_of_zero(row)}")
    return lines


def _plain(rows: list[list[str]], *, left: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(_pad(cell, width, i < left) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _pad(cell: str, width: int, is_left: bool) -> str:
    return cell.ljust(width) if is_left else cell.rjust(width)
