"""The report's figures, drawn with matplotlib: the same drawing as PNG for Markdown and as inline SVG for HTML.

Colours are Okabe and Ito's, which the colour-blind can tell apart, and mean the same everywhere: blue is ours (the
SAEs, the method), vermilion the reference beside it (PCA, the best simple baseline), black the noise canary and chance,
grey the rest; line style and marker repeat what the colour says. The same inputs give the same bytes.
Source of the palette: Okabe and Ito 2008, "Color Universal Design".
"""

import dataclasses
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.style
import numpy as np
import sklearn
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, PercentFormatter
from sklearn.metrics import roc_curve

from jaxsae.report.tables import QUALITY_BANDS, ReportInputs, Row, by_auroc, clip, interval, known, number

OURS, REFERENCE, CHANCE, REST = "#0072B2", "#D55E00", "#000000", "#6B7280"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#D9DDE2",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,  # of the PNG
    "savefig.dpi": "figure",
    "svg.fonttype": "path",
    "svg.hashsalt": "jaxsae",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}
WIDTH = 5.8  # inches: letters of 9 px on a phone, 14 px on a desk
N_RESAMPLES = 300  # for drawing a band; the tables' intervals come from the detect stage
CURVE_POINTS = 200  # points kept of a training curve, more than its pixels can show
MAX_TRACKS = 30  # lanes that can be told apart on a page
CALIBRATION_BINS = 10
RIDGE_OVERLAP = 1.6  # how far the highest histogram reaches into the ones above it, in layers


@dataclasses.dataclass(frozen=True)
class Chart:
    """One figure in both forms, its text alternative and its caption."""

    png: bytes
    svg: str
    alt: str
    caption: str


def draw(inputs: ReportInputs) -> dict[str, Chart]:
    """Draw every figure the inputs allow, by name; one whose numbers are not there is left out."""
    painters: dict[str, Callable[[], tuple[Figure, str, str] | None]] = {
        "sae_layers": lambda: sae_layers(inputs),
        "sae_density": lambda: density_ridges(inputs),
        "sae_crowding": lambda: crowding(inputs),
        "training": lambda: training_curves(inputs),
        "auroc": lambda: auroc_forest(inputs),
        "roc": lambda: roc(inputs),
        "calibration": lambda: calibration(inputs),
        "risk_coverage": lambda: risk_coverage(inputs),
        "curves": lambda: label_curves(inputs),
    }
    for name, example in example_names(inputs).items():
        painters[name] = functools.partial(tracks, example, last_layer=_last_layer(inputs))
    charts = {}
    with matplotlib.style.context(["default", STYLE]):
        for name, paint in painters.items():
            painted = paint()
            if painted is not None:
                figure, alt, caption = painted
                png = to_png(figure)
                figure.set_layout_engine("none")  # the places that the PNG was drawn with: found once, the slow part
                charts[name] = Chart(png, to_svg(figure, name), alt, caption)
    return charts


def example_names(inputs: ReportInputs) -> dict[str, Row]:
    """Name each example's figure: tracks_1_right, tracks_2_wrong."""
    return {
        f"tracks_{number}_{'wrong' if example['label'] else 'right'}": example
        for number, example in enumerate(inputs.examples, start=1)
    }


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG on white, without the library's version in it."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG for use inside a page: transparent, its ids under `name`, no metadata, comment or link."""
    stream = io.StringIO()
    empty = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", transparent=True, metadata=empty)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg).strip()


def _canvas(height: float, rows: int = 1, columns: int = 1, *, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, sharex=sharex, squeeze=False).flat)


def _column(rows: Sequence[Row], key: str) -> Float[np.ndarray, " rows"]:
    return np.array([row[key] if known(row.get(key)) else np.nan for row in rows], dtype=np.float64)


def sae_layers(inputs: ReportInputs) -> tuple[Figure, str, str] | None:
    """Draw FVU and L0 over the layers, PCA and the quality bands beside."""
    rows = sorted(inputs.sae, key=lambda row: row["layer"])
    fvu = _column(rows, "fvu")
    if not np.isfinite(fvu).any():
        return None
    layers = _column(rows, "layer")
    figure, (above, below) = _canvas(5.0, rows=2, sharex=True)
    above.plot(layers, fvu, "o-", color=OURS, label="SAE")
    above.plot(layers, _column(rows, "pca_fvu"), "s--", color=REFERENCE, label="PCA, k components")
    above.set(ylabel="FVU (fraction of variance)")
    below.plot(layers, _column(rows, "l0_inference"), "o-", color=OURS, label="at inference")
    below.plot(layers, _column(rows, "l0_train"), "s--", color=REFERENCE, label="in training")
    below.set(ylabel="L0 (active latents per token)", xlabel="layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.16), ncols=2, borderaxespad=0)
    _band_lines(above)
    alt = f"Two curves over {len(rows)} layers. FVU from {np.nanmin(fvu):.4f} to {np.nanmax(fvu):.4f}; L0 below it."
    caption = "Fraction of variance unexplained by each layer's SAE, and active latents per token. "
    return figure, alt, caption + "Dotted: the upper limits of the quality bands, where they fall in the picture."


def _band_lines(axes: Axes) -> None:
    top = axes.get_ylim()[1]
    for name, limit in QUALITY_BANDS:
        if limit < top:
            axes.axhline(limit, color=REST, linestyle=":", linewidth=1)
            edge = axes.get_yaxis_transform()
            axes.text(1.01, limit, name, color=REST, fontsize=8, va="center", transform=edge, clip_on=False)


def density_ridges(inputs: ReportInputs) -> tuple[Figure, str, str] | None:
    """Draw each layer's histogram of log10 firing rates, one under the other, all to one scale."""
    counts = np.asarray(inputs.density.get("counts", ()), dtype=np.float64)
    if not inputs.sae or not counts.any():
        return None
    edges, n_layers = np.asarray(inputs.density["log10_edges"], dtype=np.float64), len(counts)
    figure, (axes,) = _canvas(1.3 + 0.26 * n_layers)
    heights = RIDGE_OVERLAP * counts / counts.max()
    for layer, color in enumerate(_layer_colors(n_layers)):
        ridge = axes.stairs(layer - heights[layer], edges, baseline=layer, fill=True, facecolor=color)
        ridge.set(edgecolor="#FFFFFF", linewidth=1, zorder=2 + layer / n_layers)  # lower ones in front
    _never_firing(axes, inputs)
    mean_rate = _mean_rate(inputs)
    if mean_rate is not None:
        axes.axvline(np.log10(mean_rate), color=CHANCE, linestyle=":", linewidth=1.2, zorder=4)
    axes.set(xlabel="share of held-out tokens on which a latent fires", ylabel="layer", xlim=(edges[0], 0))
    axes.set_ylim(n_layers - 0.5, -RIDGE_OVERLAP - 0.1)
    axes.set_yticks(range(0, n_layers, -(-n_layers // 12)))
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.xaxis.set_major_formatter(lambda exponent, _: f"1/{10**-exponent:,.0f}" if exponent else "all")
    axes.grid(axis="y", visible=False)
    alt = f"Histograms of the firing rates of the latents of {n_layers} layers, on a logarithmic axis."
    caption = "How often latents fire: for each layer, the latents by their firing rate; at the right, the share that "
    caption += "fires on no held-out token. "
    if mean_rate is not None:
        caption += f"Dotted: the mean rate, 1 token in {1 / mean_rate:,.0f}. "
    caption += "Good is one hill without a second one at the left end, where latents are about to die, and with few "
    return figure, alt, caption + "latents beyond 1/10, which fire on so many tokens that they say little about any."


def _mean_rate(inputs: ReportInputs) -> float | None:
    """Return the share of tokens on which the average latent fires: L0 over F."""
    l0 = _column(inputs.sae, "l0_inference")
    if not np.nansum(l0) > 0 or not known(inputs.sae_spec.get("n_latents")):
        return None
    return float(np.nanmean(l0) / inputs.sae_spec["n_latents"])


def _never_firing(axes: Axes, inputs: ReportInputs) -> None:
    """Write the share of latents that fire on no held-out token to the right of each layer."""
    style: dict[str, Any] = {"fontsize": 8, "va": "bottom", "color": REST, "transform": axes.get_yaxis_transform()}
    axes.text(1.01, -1, "never", **style)
    for place, row in enumerate(sorted(inputs.sae, key=lambda row: row["layer"])):
        axes.text(1.01, place, number(row.get("dead_held_out"), ".1%"), **style)


def crowding(inputs: ReportInputs) -> tuple[Figure, str, str] | None:
    """Draw the quantiles over the latents of the largest |cosine| with another decoder row, layer by layer."""
    rows = sorted(inputs.sae, key=lambda row: row["layer"])
    low, first, median, third, high, largest = (
        _column(rows, f"crowding_{name}") for name in ("p05", "p25", "median", "p75", "p95", "max")
    )
    if not np.isfinite(median).any():
        return None
    layers = _column(rows, "layer")
    figure, (axes,) = _canvas(3.4)
    axes.vlines(layers, low, high, color=OURS, linewidth=1.2, label="5% to 95% of the latents")
    axes.vlines(layers, first, third, color=OURS, linewidth=4.5, alpha=0.5, label="25% to 75%")
    axes.plot(layers, median, "o", color=OURS, label="median")
    axes.plot(layers, largest, "_", color=REST, label="largest")
    if inputs.crowding_random is not None:
        axes.axhline(inputs.crowding_random, color=REFERENCE, linestyle="--", label="median of random directions")
    axes.set(xlabel="layer", ylabel="largest |cosine|", ylim=(0, 1.03), xlim=(layers[0] - 0.6, layers[-1] + 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=3)
    alt = f"Crowding of the decoders of {len(rows)} layers; medians {np.nanmin(median):.3f} to {np.nanmax(median):.3f}."
    caption = (
        "Each latent's largest |cosine| with another decoder row of its layer. Good is a bulk not far above random "
    )
    caption += "directions and few latents near 1, where two latents point the same way and share the work of one; "
    return figure, alt, caption + "somewhat above random is what related features look like."


PANELS = (
    ("fvu", "FVU (fraction of variance)"),
    ("loss", "loss"),
    ("l0", "L0 (latents per token)"),
    ("dead", "dead latents"),
)


def training_curves(inputs: ReportInputs) -> tuple[Figure, str, str] | None:
    """Draw FVU, loss, L0 and the dead share over training, one line per layer."""
    panels = [(key, label) for key, label in PANELS if np.isfinite(_column(inputs.history, key)).any()]
    if not panels:
        return None
    axis = "tokens" if all(known(row.get("tokens")) for row in inputs.history) else "step"
    layers = sorted({row["layer"] for row in inputs.history})
    height = 2.5 * ((len(panels) + 1) // 2) + 0.4
    figure, panels_axes = _canvas(height, rows=(len(panels) + 1) // 2, columns=min(2, len(panels)))
    for axes, (key, label) in zip(panels_axes, panels, strict=False):
        for layer, color in zip(layers, _layer_colors(len(layers)), strict=True):
            rows = _thin(sorted((row for row in inputs.history if row["layer"] == layer), key=lambda row: row[axis]))
            axes.plot(_column(rows, axis), _column(rows, key), color=color, marker="o" if len(rows) == 1 else None)
        axes.set(xlabel="training tokens" if axis == "tokens" else "step", title=label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        _scale(axes, key, _column(inputs.history, key))
    for axes in panels_axes[len(panels) :]:
        axes.set_axis_off()
    _layer_legend(figure, layers)
    alt = f"Training curves of {len(layers)} layers over {axis}: {', '.join(key for key, _ in panels)}."
    logarithmic = any(axes.get_yscale() == "log" for axes in panels_axes)
    caption = "Measures at each evaluation during training, one line per layer."
    return figure, alt, caption + (" FVU has a logarithmic axis." if logarithmic else "")


def _scale(axes: Axes, key: str, column: Float[np.ndarray, " rows"]) -> None:
    if key == "fvu" and np.nanmin(column) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif key in ("dead", "l0"):
        axes.set_ylim(0, max(1.05 * np.nanmax(column), 0.01))
    if key == "dead":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _thin(rows: list[Row]) -> list[Row]:
    if len(rows) <= CURVE_POINTS:
        return rows
    return [rows[index] for index in np.linspace(0, len(rows) - 1, CURVE_POINTS).round().astype(int)]


def _layer_colors(n_layers: int) -> list[tuple[float, ...]]:
    # The light end of viridis cannot be seen on white.
    return [tuple(color) for color in matplotlib.colormaps["viridis"](np.linspace(0, 0.85, n_layers))]


def _layer_legend(figure: Figure, layers: Sequence[int]) -> None:
    colors = _layer_colors(len(layers))
    shown = sorted({round(index) for index in np.linspace(0, len(layers) - 1, min(6, len(layers)))})
    handles = [Line2D([], [], color=colors[index], label=f"layer {layers[index]}") for index in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2, handlelength=1.4)


def auroc_forest(inputs: ReportInputs) -> tuple[Figure, str, str] | None:
    """Draw the AUROC of every detector and of the canary with their intervals, best first."""
    rows: list[Row] = [row for row in by_auroc(inputs.detection) if known(row.get("auroc"))]
    if not rows:
        return None
    if inputs.canary is not None and known(inputs.canary.get("auroc")):
        rows.append({"name": "noise canary", "is_canary": True, **inputs.canary})
    figure, (axes,) = _canvas(0.9 + 0.27 * len(rows))
    for place, row in enumerate(rows):
        _forest_row(axes, place, row, inputs)
    axes.axvline(0.5, color=CHANCE, linestyle=":", linewidth=1)
    axes.set(xlabel="AUROC (0.5: chance)", ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [clip(row["name"], 40) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    alt = f"AUROC of {len(rows)} rows with intervals; the best is {rows[0]['name']} with {number(rows[0]['auroc'])}."
    names = {row["name"] for row in rows}
    marks = (
        ("diamond: the method", inputs.method in names),
        ("square: the best simple baseline", inputs.best_baseline in names),
        ("cross: the noise canary, which must hold 0.5", bool(rows[-1].get("is_canary"))),
    )
    shown = [text for text, is_drawn in marks if is_drawn]
    return figure, alt, "; ".join(["AUROC with 95% intervals (bootstrap over groups)", *shown]) + "."


def _forest_row(axes: Axes, place: int, row: Row, inputs: ReportInputs) -> None:
    color, marker = REST, "o"
    if row.get("is_canary"):
        color, marker = CHANCE, "X"
    elif row["name"] == inputs.method:
        color, marker = OURS, "D"
    elif row["name"] == inputs.best_baseline:
        color, marker = REFERENCE, "s"
    if interval(row) != "–":
        axes.plot([row["ci_low"], row["ci_high"]], [place, place], color=color, linewidth=2)
    axes.plot([row["auroc"]], [place], marker=marker, color=color, markersize=6.5)
    text = f"{number(row['auroc'])} {interval(row)}"
    axes.text(1.02, place, text, fontsize=8.5, va="center", color=color, transform=axes.get_yaxis_transform())


def _compared(inputs: ReportInputs) -> list[tuple[str, str, str]]:
    """Return (detector, colour, line style) of method and best simple baseline, as far as both classes are there."""
    pairs = ((inputs.method, OURS, "-"), (inputs.best_baseline, REFERENCE, "--"))
    return [
        (name, color, line)
        for name, color, line in pairs
        if name is not None and name in inputs.predictions and len(np.unique(inputs.predictions[name][0])) == 2
    ]


def resamples(groups: np.ndarray) -> Iterator[Int[np.ndarray, " N"]]:
    """Yield, for each bootstrap resample of whole groups, how often each row is drawn; the seed is fixed."""
    _, index = np.unique(groups, return_inverse=True)
    n_groups = int(index.max()) + 1
    rng = np.random.default_rng(0)
    for _ in range(N_RESAMPLES):
        yield np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)[index]


def roc_band(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, grid: Float[np.ndarray, " points"]
) -> Float[np.ndarray, "2 points"]:
    """Return the pointwise 95% band of the true positive rate at each false positive rate of `grid`.

    A resample of the groups that holds one class only has no curve and is left out.
    """
    curves = []
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):  # half of the time
        for weights in resamples(groups):
            if len(np.unique(labels[weights > 0])) == 2:
                false_rate, true_rate, _ = roc_curve(labels, scores, sample_weight=weights)
                curves.append(np.interp(grid, false_rate, true_rate))
    return np.percentile(np.array(curves), [2.5, 97.5], axis=0)


def roc(inputs: ReportInputs) -> tuple[Figure, str, str] | None:
    """Draw the ROC curves of the method and the best simple baseline with their bands."""
    compared = _compared(inputs)
    if not compared:
        return None
    figure, (axes,) = _canvas(5.2)
    grid = np.linspace(0, 1, 101)
    for name, color, line in compared:
        labels, scores, groups = (np.asarray(part) for part in inputs.predictions[name])
        low, high = roc_band(labels, scores, groups, grid)
        axes.fill_between(grid, low, high, color=color, alpha=0.18, linewidth=0)
        false_rate, true_rate, _ = roc_curve(labels, scores)
        axes.plot(false_rate, true_rate, line, color=color, label=clip(name, 40))
    axes.plot([0, 1], [0, 1], ":", color=CHANCE, linewidth=1, label="chance")
    axes.set(xlabel="false positive rate (right answers called hallucinated)", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set(ylabel="true positive rate (hallucinated answers found)", aspect="equal")
    axes.legend(loc="lower right")
    alt = f"ROC curves of {' and '.join(name for name, *_ in compared)} with bands, beside the diagonal of chance."
    caption = f"Out-of-fold ROC curves with pointwise 95% bands ({N_RESAMPLES} bootstrap resamples of groups)."
    return figure, alt, caption


def calibration_points(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Float[np.ndarray, "2 bins"]]:
    """Return mean score, share hallucinated and its 95% group-bootstrap interval in bins of equal mass.

    There are at most `CALIBRATION_BINS` bins, and 10 answers or more in each as long as there are 10.
    """
    n_bins = max(1, min(CALIBRATION_BINS, len(scores) // 10))
    bins = np.array_split(np.argsort(scores, kind="stable"), n_bins)
    shares = []
    for weights in resamples(groups):
        drawn = [weights[rows].sum() for rows in bins]
        hits = [(weights[rows] * labels[rows]).sum() for rows in bins]
        shares.append([hit / n if n else np.nan for hit, n in zip(hits, drawn, strict=True)])
    band = np.nanpercentile(np.array(shares), [2.5, 97.5], axis=0)
    means = np.array([[scores[rows].mean(), labels[rows].mean()] for rows in bins], dtype=np.float64)
    return means[:, 0], means[:, 1], band


def calibration(inputs: ReportInputs) -> tuple[Figure, str, str] | None:
    """Draw how often answers of a given probability are hallucinated; what lies outside 0–1 is none: not drawn."""
    chances = {
        name: np.asarray(inputs.probabilities.get(name, scores)) for name, (_, scores, _) in inputs.predictions.items()
    }
    compared = [row for row in _compared(inputs) if 0 <= chances[row[0]].min() <= chances[row[0]].max() <= 1]
    if not compared:
        return None
    figure, (axes,) = _canvas(5.2)
    axes.plot([0, 1], [0, 1], ":", color=CHANCE, linewidth=1, label="calibrated")
    for name, color, line in compared:
        labels, _, groups = (np.asarray(part) for part in inputs.predictions[name])
        score, share, (low, high) = calibration_points(labels, chances[name], groups)
        axes.vlines(score, low, high, color=color, linewidth=1.2)
        axes.plot(score, share, "o" + line, color=color, label=clip(name, 40))
    axes.set(xlabel="mean probability of hallucinated in the bin", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set(ylabel="share hallucinated in the bin", aspect="equal")
    axes.legend(loc="upper left")
    alt = f"Reliability curves of {' and '.join(name for name, *_ in compared)} around the diagonal."
    caption = (
        "Reliability in bins of equal mass, out of fold; bars are 95% group-bootstrap intervals. On the dotted line a "
    )
    return figure, alt, caption + "score is the probability it claims to be."


def risk_coverage(inputs: ReportInputs) -> tuple[Figure, str, str] | None:
    """Draw the share hallucinated among the answers kept, for the method and the best simple baseline."""
    rows = {row["name"]: row for row in inputs.detection if row.get("risk_coverage")}
    pairs = ((inputs.method, OURS, "-"), (inputs.best_baseline, REFERENCE, "--"))
    compared = [(rows[name], color, line) for name, color, line in pairs if name in rows]
    if not compared:
        return None
    figure, (axes,) = _canvas(3.6)
    for row, color, line in compared:
        coverage, risk = _column(row["risk_coverage"], "coverage"), _column(row["risk_coverage"], "risk")
        text = f"{clip(row['name'], 40)}, AURC {number(row.get('aurc'))}"
        axes.plot(coverage, risk, line, color=color, label=text)
    base_rate = compared[0][0]["base_rate"]
    axes.axhline(base_rate, color=CHANCE, linestyle=":", linewidth=1, label="chance")
    share = np.linspace(0.01, 1, 100)
    best = np.maximum(share - (1 - base_rate), 0) / share
    axes.plot(share, best, color=REST, linewidth=1, label=f"no error, AURC {number(compared[0][0].get('aurc_best'))}")
    axes.set(xlabel="coverage (share of the answers kept, lowest scores first)", xlim=(0, 1.01), ylim=(0, None))
    axes.set(ylabel="risk (share hallucinated)")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside upper center", ncols=2)
    alt = f"Risk over coverage of {' and '.join(row['name'] for row, *_ in compared)}, between chance and no error."
    caption = (
        "What withholding the most suspect answers buys: share hallucinated among those kept, out of fold. AURC is "
    )
    return figure, alt, caption + "the mean of the curve."


def label_curves(inputs: ReportInputs) -> tuple[Figure, str, str] | None:
    """Draw AUROC over the number of labelled answers and over the share of flipped labels, a line a detector."""
    measured = [row for row in inputs.curves if known(row.get("auroc"))]
    if not inputs.detection or not measured:
        return None
    figure, panels = _canvas(3.5, columns=2)
    names = sorted({row["detector"] for row in measured})
    looks = list(zip((OURS, REFERENCE, REST, "#009E73", "#CC79A7"), "osD^v", strict=True))
    for axes, (kind, key) in zip(panels, (("few_labels", "n_labelled"), ("label_noise", "share")), strict=True):
        for place, name in enumerate(names):
            rows = [row for row in measured if (row["kind"], row["detector"]) == (kind, name)]
            x, (color, marker) = _column(rows, key), looks[place % len(looks)]
            axes.fill_between(
                x, _column(rows, "ci_low"), _column(rows, "ci_high"), color=color, alpha=0.15, linewidth=0
            )
            label = clip(name, 40) if axes is panels[0] else None
            axes.plot(x, _column(rows, "auroc"), "-", marker=marker, color=color, label=label)
        axes.axhline(0.5, color=CHANCE, linestyle=":", linewidth=1)
    panels[0].set(xscale="log", xlabel="answers with a label", ylabel="AUROC")
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panels[0].xaxis.set_major_formatter("{x:,.0f}")
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    panels[1].set(xlabel="share of labels flipped")
    panels[1].xaxis.set_major_formatter(PercentFormatter(1.0))
    low, high = min(axes.get_ylim()[0] for axes in panels), max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, high)
    figure.legend(loc="outside upper center", ncols=3)
    alt = f"AUROC of {', '.join(names)} with fewer labels, and with flipped ones."
    caption = (
        "Left: only so many answers have a label, whole groups at a time. Right: so many of the labels are wrong. "
    )
    caption += "First split, out of fold, with 95% intervals; fitted and chosen with those labels, judged by the true "
    return figure, alt, caption + "ones."


def _last_layer(inputs: ReportInputs) -> int:
    observed = [track["layers"][-1] for example in inputs.examples for track in example["tracks"]]
    return int(max([*observed, *(row["layer"] for row in inputs.sae)], default=0))


def tracks(example: Row, *, last_layer: int) -> tuple[Figure, str, str] | None:
    """Draw the strongest tracks of one answer through the layers 0 to `last_layer`, one lane a track."""
    if not example["tracks"]:
        return None
    n_all = len(example["tracks"])
    strongest = sorted(example["tracks"], key=lambda track: -float(np.sum(track["activations"])))[:MAX_TRACKS]
    lanes = sorted(strongest, key=lambda track: (track["layers"][0], -len(track["layers"]), track["features"][0]))
    largest = max(float(np.max(track["activations"])) for track in lanes) or 1.0
    figure, (axes,) = _canvas(1.2 + 0.2 * len(lanes))
    for lane, track in enumerate(lanes):
        _lane(axes, lane, track, largest)
    axes.set(
        xlabel="layer",
        ylabel="tracks, in order of birth",
        ylim=(len(lanes) - 0.4, -0.6),
        xlim=(-0.6 - 0.08 * last_layer, last_layer + 0.5),
        yticks=[],
    )
    ticks = MaxNLocator(9, integer=True).tick_values(0, max(last_layer, 1))
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= last_layer])
    axes.grid(axis="y", visible=False)
    _activation_legend(figure, largest)
    label = "hallucinated" if example["label"] else "right"
    alt = f"{len(lanes)} tracks of a {label} answer as lanes over layers 0 to {last_layer}."
    caption = (
        f"{label.capitalize()} answer: {len(lanes)} of its {n_all} tracks, those with the largest summed activation. "
    )
    caption += "A lane runs from birth to the last observation, with its feature id at birth; wider is more "
    return (
        figure,
        alt,
        caption + "active; a cross is a death; dotted where the track was carried over a layer without a match.",
    )


def _tone(share: float | Float[np.ndarray, " segments"]) -> np.ndarray:
    return np.asarray(matplotlib.colormaps["viridis_r"](0.2 + 0.8 * np.sqrt(share)))


def _thickness(share: float | Float[np.ndarray, " segments"]) -> np.ndarray:
    return np.asarray(1.0 + 5.0 * np.sqrt(share))  # points; square root: activations span two orders of magnitude


def _lane(axes: Axes, lane: int, track: Row, largest: float) -> None:
    layers = np.asarray(track["layers"], dtype=np.float64)
    shares = np.clip(np.asarray(track["activations"], dtype=np.float64) / largest, 0, 1)
    axes.annotate(
        str(track["features"][0]),
        (layers[0], lane),
        xytext=(-7, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=7.5,
    )
    axes.scatter(
        layers, np.full(len(layers), lane), s=_thickness(shares) ** 2 * 1.3, color=_tone(shares), zorder=3, linewidths=0
    )
    if len(layers) > 1:
        ends = np.stack([layers[:-1], layers[1:]], axis=1)
        mean = (shares[:-1] + shares[1:]) / 2
        carried = ends[:, 1] - ends[:, 0] > 1
        segments = LineCollection(
            [[(first, lane), (last, lane)] for first, last in ends],
            colors=_tone(mean),
            linewidths=np.where(carried, 1.2, _thickness(mean)),
            linestyles=["dotted" if missed else "solid" for missed in carried],
        )
        axes.add_collection(segments)
    if known(track.get("death")) and track["death"] >= 0:
        end = (max(layers[-1], track["death"]), lane)
        axes.annotate("×", end, xytext=(8, 0), textcoords="offset points", ha="center", va="center", color=REST)


def _activation_legend(figure: Figure, largest: float) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=matplotlib.colors.to_hex(tuple(_tone(share).tolist())),
            linewidth=float(_thickness(share)),
            label=f"{share * largest:.3g}",
        )
        for share in (0.05, 0.25, 1.0)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, title="activation", title_fontsize=9)
