"""A sweep's figures: every setting beside the nested choice, and what picking on the test would have added.

Colours as in `figures`: blue is the number to report (nested), vermilion the naive pick, grey the settings, black what
others published and chance.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxsae.report.figures import CHANCE, OURS, REFERENCE, REST, STYLE, WIDTH, Chart, to_png, to_svg
from jaxsae.report.sweep import MEASURES, measure, shorten, shown_rows
from jaxsae.report.tables import interval, known, number, signed

NORMAL_95 = 1.96  # half width of a 95 % interval in standard errors


def draw(sweep: Mapping[str, Any]) -> dict[str, Chart]:
    """Draw a figure of each detector's settings and one of all choices, by name."""
    painters = {f"settings_{choice['detector']}": choice for choice in sweep["choices"] if choice["detector"] != "any"}
    charts = {}
    with matplotlib.style.context(["default", STYLE]):
        painted = {name: _settings(sweep, choice) for name, choice in painters.items()}
        painted["choices"] = _choices(sweep)
        for name, (figure, alt, caption) in painted.items():
            png = to_png(figure)
            figure.set_layout_engine("none")  # the places that the PNG was drawn with
            charts[name] = Chart(png, to_svg(figure, name), alt, caption)
    return charts


def _canvas(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _settings(sweep: Mapping[str, Any], choice: Mapping[str, Any]) -> tuple[Figure, str, str]:
    """Draw a detector's settings with their intervals, the nested choice and the naive pick as lines."""
    name, rows = sweep["metric"], shown_rows(sweep, choice["detector"])
    published = {trial["name"]: trial["published"].get(name) for trial in sweep["trials"]}
    figure, axes = _canvas(1.4 + 0.3 * len(rows))
    nested, naive = choice["nested"][name], choice["naive"]
    if known(nested["ci_low"]):
        axes.axvspan(nested["ci_low"], nested["ci_high"], color=OURS, alpha=0.13, linewidth=0)
    axes.axvline(nested["value"], color=OURS, label=f"nested {number(nested['value'])}")
    axes.axvline(naive["value"], color=REFERENCE, linestyle="--", label=f"naive {number(naive['value'])}")
    for place, row in enumerate(rows):
        found = measure(row, name)
        if known(found["ci_low"]):
            axes.plot([found["ci_low"], found["ci_high"]], [place, place], color=REST, linewidth=2)
        axes.plot([found["value"]], [place], "o", color=REST, markersize=6.5)
        _published(axes, place, published[row["setting"]])
        text = f"{number(found['value'])} {interval(found)}"
        axes.text(1.02, place, text, fontsize=8.5, va="center", color=REST, transform=axes.get_yaxis_transform())
    if name == "auroc":
        axes.axvline(0.5, color=CHANCE, linestyle=":", linewidth=1)
    axes.set(xlabel=MEASURES[name], ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [shorten(row["setting"], 34) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=2)
    alt = f"{MEASURES[name]} of {len(rows)} settings of {choice['detector']} with intervals; nested "
    alt += f"{number(nested['value'])}, naive {number(naive['value'])}."
    caption = f"{choice['detector']}: each setting out of fold (grey) with 95% intervals over resampled groups; blue, "
    caption += "with its interval: the setting chosen inside validation; dashed: the best one by these rows."
    if any(published[row["setting"]] for row in rows):
        caption += " Crosses: published, with two standard errors where there is a formula."
    return figure, alt, caption


def _published(axes: Any, place: int, published: Mapping[str, Any] | None) -> None:
    """Draw what others reported, a little below the row."""
    if published is None:
        return
    value, error = published["value"], published["standard_error"]
    if known(error):
        reach = NORMAL_95 * error
        axes.plot([value - reach, value + reach], [place + 0.28, place + 0.28], color=CHANCE, linewidth=0.8, alpha=0.6)
    axes.plot([value], [place + 0.28], "x", color=CHANCE, markersize=5.5)


def _choices(sweep: Mapping[str, Any]) -> tuple[Figure, str, str]:
    """Draw nested and naive of each choice, one above the other, and the optimism between them."""
    name, choices = sweep["metric"], sweep["choices"]
    figure, axes = _canvas(1.3 + 0.5 * len(choices))
    for place, choice in enumerate(choices):
        nested, naive, optimism = choice["nested"][name], choice["naive"], choice["optimism"]
        looks = ((nested, place - 0.14, OURS, "D", "nested"), (naive, place + 0.14, REFERENCE, "s", "naive"))
        for row, height, color, marker, label in looks:
            if known(row["ci_low"]):
                axes.plot([row["ci_low"], row["ci_high"]], [height, height], color=color, linewidth=2)
            shown = label if not place else None
            axes.plot([row["value"]], [height], marker, color=color, markersize=6.5, label=shown, linestyle="none")
        text = f"optimism {signed(optimism['value'])}\n{interval(optimism, signed)}"
        axes.text(1.02, place, text, fontsize=8.5, va="center", color=REST, transform=axes.get_yaxis_transform())
    if name == "auroc":
        axes.axvline(0.5, color=CHANCE, linestyle=":", linewidth=1)
    axes.set(xlabel=MEASURES[name], ylim=(len(choices) - 0.4, -0.6))
    names = ["any of them" if choice["detector"] == "any" else choice["detector"] for choice in choices]
    axes.set_yticks(
        range(len(choices)),
        [f"{shorten(each, 30)}\n{choice['n_candidates']} tried" for each, choice in zip(names, choices, strict=True)],
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=2)
    alt = "; ".join(
        f"{each}: nested {number(choice['nested'][name]['value'])}, naive {number(choice['naive']['value'])}"
        for each, choice in zip(names, choices, strict=True)
    )
    caption = "Diamond: chosen inside validation, scored outside; square: the best by the rows it is judged on. 95% "
    return figure, f"{alt}.", caption + "intervals on the same resamples, in each of which the naive pick is made anew."
