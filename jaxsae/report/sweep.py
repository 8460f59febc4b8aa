"""A sweep as one page: `report.md`, `report.html`, `figures/`, and the table for the terminal.

In: the content of a sweep's results.json. Out: text and pictures. Nothing is measured here.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsae import artifacts
from jaxsae.report.markup import (
    Block,
    Bullets,
    Code,
    Heading,
    Inline,
    Paragraph,
    Picture,
    Preformatted,
    Table,
    Verdict,
    Verdicts,
    clean,
    render_html,
    render_markdown,
)
from jaxsae.report.tables import ABSENT, SUMMARY_WIDTH, count, duration, interval, known, number, signed

Sweep = Mapping[str, Any]
Row = Mapping[str, Any]
MEASURES = {"auroc": "AUROC", "accuracy": "Accuracy", "f1": "F1"}
MOST_ROWS = 40  # settings that a table or figure shows; results.csv has all
_ANY = "any"
_SEEN = 0.005  # optimism from which on it is called too good: it is never below 0 by much; ours, by convention


def write(out: str | os.PathLike, sweep: Sweep) -> list[Path]:
    """Write page and figures under `out` and return their paths; the same sweep gives the same bytes."""
    from jaxsae.report import sweep_figures  # matplotlib takes a second to import, which no other command should pay

    out = Path(out)
    charts = sweep_figures.draw(sweep)
    paths = [out / "figures" / f"{name}.png" for name in charts]
    for path, chart in zip(paths, charts.values(), strict=True):
        with artifacts.atomic_write(path) as partial:
            partial.write_bytes(chart.png)
    pictures = {name: Picture(name, chart.svg, chart.alt, chart.caption) for name, chart in charts.items()}
    title, blocks = f"jaxsae sweep: {sweep['name']}", document(sweep, pictures)
    artifacts.write_text(out / "report.html", render_html(title, blocks))
    artifacts.write_text(out / "report.md", render_markdown(title, blocks))
    for stale in set((out / "figures").glob("*.png")) - set(paths):
        stale.unlink()
    return [out / "report.md", out / "report.html", *paths]


def document(sweep: Sweep, pictures: Mapping[str, Picture]) -> tuple[Block, ...]:
    """Return the page's blocks in reading order."""
    blocks: list[Block] = [
        Heading("Verdict"),
        Paragraph((headline(sweep),)),
        Verdicts(tuple(verdicts(sweep))),
        Heading("What was tried"),
        Preformatted(sweep["command"]),
        Bullets(tuple((sentence,) for sentence in overview(sweep))),
        Heading("What choosing is worth"),
        *([pictures["choices"]] if "choices" in pictures else []),
        _choice_table(sweep),
        Bullets(tuple((sentence,) for sentence in (*CHOICE_MEASURES, to_use(sweep)))),
        Heading("Each setting"),
    ]
    for detector in sweep["detectors"]:
        blocks += [Heading(detector, level=3)]
        blocks += [pictures[f"settings_{detector}"]] if f"settings_{detector}" in pictures else []
        blocks += [_setting_table(sweep, detector)]
    blocks += [Paragraph((SETTING_MEASURES,))]
    if any(trial["published"] for trial in sweep["trials"]):
        blocks += [Heading("Beside the published numbers"), Paragraph((caveat(sweep),)), _published_table(sweep)]
    return (*blocks, Heading("Splits"), _split_table(sweep))


CHOICE_MEASURES = (
    "Nested: for each outer fold the setting is chosen by inner validation, which has seen no row of the fold, and the "
    "fold's rows are scored by it. This is what to expect of the whole procedure, choice and all, and the number to "
    "report.",
    "Naive: the setting that is best on the rows it is judged by, which is what a table of settings invites one to "
    "report. Its interval makes the pick anew in each resample.",
    "Optimism: naive minus nested, on the same resamples. As the pick is made anew in each, the resamples' optimism "
    "has that of a second pick in it, and the interval tends to lie high.",
    "Gain: nested minus the config's own setting, on the same resamples.",
)
SETTING_MEASURES = (
    "Out of fold, as jaxsae detect measures; 95% intervals over resampled groups with the fits held fixed. Accuracy "
    "and F1 are at the threshold chosen in inner validation. Inner is the mean over outer folds of what inner "
    "validation said, chosen how many of the outer folds took the setting. These intervals do not know that the best "
    "of several settings is the best by luck, too."
)


def headline(sweep: Sweep) -> str:
    """Say in two sentences what choosing reached and what picking on the test would have said."""
    choice = main_choice(sweep)
    measure, nested = MEASURES[sweep["metric"]], choice["nested"][sweep["metric"]]
    tried = _tried(sweep)
    if choice["n_candidates"] == 1:
        return f"One setting was tried: {measure} {number(nested['value'])} {interval(nested)}. There was no choice."
    naive, optimism = choice["naive"], choice["optimism"]
    return (
        f"Chosen inside validation, {tried} reach {measure} {number(nested['value'])} {interval(nested)}. Picking the "
        f"best by the rows themselves would have said {number(naive['value'])}: {signed(optimism['value'])} "
        f"{interval(optimism, signed)} of optimism."
    )


def main_choice(sweep: Sweep) -> Row:
    """Return the choice between all detectors or, where there is one detector, between its settings."""
    return sweep["choices"][-1]


def _tried(sweep: Sweep) -> str:
    n, n_detectors = sweep["counts"]["settings"], len(sweep["detectors"])
    settings = f"{count(n)} setting{'s' if n > 1 else ''}"
    return settings if n_detectors == 1 else f"{settings} of {n_detectors} detectors"


def verdicts(sweep: Sweep) -> list[Verdict]:
    """Judge, for each choice, its value, its optimism and its gain."""
    judged = []
    for choice in sweep["choices"]:
        judged += [_value_verdict(sweep, choice)]
        if choice["n_candidates"] > 1:
            judged += [_optimism_verdict(sweep, choice)]
        if choice.get("gain") is not None and choice["n_candidates"] > 1:
            judged += [_gain_verdict(sweep, choice)]
    return judged


def _title(choice: Row) -> str:
    return "Detector and setting chosen" if choice["detector"] == _ANY else choice["detector"]


def _value_verdict(sweep: Sweep, choice: Row) -> Verdict:
    auroc = choice["nested"]["auroc"]
    text = f"Nested AUROC {number(auroc['value'])} {interval(auroc)}, {_chosen_words(choice)}."
    low, high = auroc["ci_low"], auroc["ci_high"]
    if known(low) and low > 0.5:
        return Verdict("good", f"{_title(choice)}: above chance", text)
    if known(high) and high < 0.5:
        return Verdict("bad", f"{_title(choice)}: below chance", text)
    return Verdict("open", f"{_title(choice)}: may be chance", text)


def _chosen_words(choice: Row) -> str:
    taken = [_candidate(choice, row) for row in choice["chosen"]]
    often = max(dict.fromkeys(taken), key=taken.count)
    if len(set(taken)) == 1:
        return f"{often} in all {len(taken)} outer folds"
    return f"{len(set(taken))} different choices in {len(taken)} outer folds, most often {often} ({taken.count(often)})"


def _candidate(choice: Row, row: Row) -> str:
    return f"{row['detector']} with {row['setting']}" if choice["detector"] == _ANY else row["setting"]


def _optimism_verdict(sweep: Sweep, choice: Row) -> Verdict:
    naive, optimism, measure = choice["naive"], choice["optimism"], MEASURES[sweep["metric"]]
    text = (
        f"The best of {count(choice['n_candidates'])} by the rows it is judged on, {_candidate(choice, naive)}, shows "
        f"{measure} {number(naive['value'])}: {signed(optimism['value'])} {interval(optimism, signed)} against the "
        "nested value."
    )
    if known(optimism["ci_low"]) and optimism["ci_low"] > 0 and optimism["value"] >= _SEEN:
        return Verdict("bad", f"{_title(choice)}: the best setting's own number is too good", text)
    return Verdict("open", f"{_title(choice)}: little optimism that shows", text)


def _gain_verdict(sweep: Sweep, choice: Row) -> Verdict:
    gain, measure = choice["gain"], MEASURES[sweep["metric"]]
    text = f"Choosing has {signed(gain['value'])} {interval(gain, signed)} {measure} over {gain['over']}, the config's."
    if known(gain["ci_low"]) and gain["ci_low"] > 0:
        return Verdict("good", f"{_title(choice)}: choosing pays", text)
    if known(gain["ci_high"]) and gain["ci_high"] < 0:
        return Verdict("bad", f"{_title(choice)}: choosing costs", text)
    return Verdict("open", f"{_title(choice)}: choosing does not pay, as far as these rows show", text)


def overview(sweep: Sweep) -> list[str]:
    """Say what was tried, on what, and how it was chosen."""
    counts, protocol = sweep["counts"], sweep["protocol"]
    sentences = [
        f"{count(counts['rows'])} answers in {count(counts['groups'])} groups, {count(counts['hallucinated'])} "
        f"hallucinated ({counts['hallucinated'] / counts['rows']:.1%}), of {sweep['workdir']}.",
        f"{_tried(sweep)}: {', '.join(sweep['detectors'])}. Every one counts as tried.",
        f"{protocol['folds']} grouped folds, {protocol['repeats']} times split anew, the same for all settings; seed "
        f"{protocol['seed']}; {count(protocol['bootstrap'])} resamples of groups.",
        f"Chosen by {MEASURES[sweep['metric']]} in inner validation.",
        f"{count(counts['fits'])} fits, {count(counts['unconverged_fits'])} of them stopped before they had converged; "
        f"{duration(sweep['seconds'])} in the last call.",
    ]
    axes = "; ".join(f"{axis['name']} ({axis['label']}): {_values(axis['values'])}" for axis in sweep["axes"])
    search = sweep["search"]
    if search is not None:
        sentences.insert(
            2,
            f"Searched over {axes}: {search['trials']} proposals of Optuna's TPE for each of {search['searches']} "
            "outer folds, each search by its own inner validation alone; a fold's choice is among its own search's "
            "proposals and the named settings, the naive pick among all.",
        )
    elif axes:
        sentences.insert(2, f"A grid of {axes}.")
    return sentences


def _values(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _choice_table(sweep: Sweep) -> Table:
    rows: list[tuple[Inline, ...]] = []
    for choice in sweep["choices"]:
        nested, naive, gain = choice["nested"][sweep["metric"]], choice["naive"], choice.get("gain")
        rows.append(
            (
                "any of them" if choice["detector"] == _ANY else choice["detector"],
                count(choice["n_candidates"]),
                f"{number(nested['value'])} {interval(nested)}",
                f"{number(naive['value'])} {interval(naive)}",
                f"{signed(choice['optimism']['value'])} {interval(choice['optimism'], signed)}",
                f"{signed(gain['value'])} {interval(gain, signed)}" if gain is not None else ABSENT,
            )
        )
    header = ("Detector", "Tried", "Nested", "Naive", "Optimism", "Gain")
    caption = f"{MEASURES[sweep['metric']]}, with 95% intervals over resampled groups."
    return Table(header, tuple(rows), "lrrrrr", caption=caption)


def to_use(sweep: Sweep) -> str:
    """Say which setting to use from here on, for each choice."""
    named = [f"{choice['to_use']['setting']} for {choice['detector']}" for choice in sweep["choices"]]
    if len(sweep["choices"]) > 1:
        named[-1] = f"of all, {_candidate(sweep['choices'][-1], sweep['choices'][-1]['to_use'])}"
    return (
        f"To use from here on, as the best mean over all inner validations: {'; '.join(named)}. What to expect of it "
        "is the nested value."
    )


def shown_rows(sweep: Sweep, detector: str) -> list[Row]:
    """Return a detector's rows, in the order tried, or the best `MOST_ROWS` of them by the metric, best first."""
    rows = [row for row in sweep["settings"] if row["detector"] == detector]
    if len(rows) <= MOST_ROWS:
        return rows
    return sorted(rows, key=lambda row: -row[sweep["metric"]])[:MOST_ROWS]


def _setting_table(sweep: Sweep, detector: str) -> Table:
    trials = {trial["name"]: trial for trial in sweep["trials"]}
    n_folds = sweep["protocol"]["folds"] * sweep["protocol"]["repeats"]
    has_named = any(trial["is_named"] for trial in sweep["trials"])
    shown = shown_rows(sweep, detector)
    rows: list[tuple[Inline, ...]] = []
    for row in shown:
        trial = trials[row["setting"]]
        rows.append(
            (
                trial["name"] + (" (reconstructed)" if trial["is_reconstructed"] else ""),
                *([changes(trial)] if has_named else []),
                *(f"{number(row[name])} {interval(measure(row, name))}" for name in MEASURES),
                number(row["inner"]),
                f"{row['n_chosen']} of {n_folds}",
            )
        )
    best = max(range(len(shown)), key=lambda place: shown[place]["n_chosen"])
    n = sweep["counts"]["settings"]
    caption = f"The best {len(shown)} of {count(n)}; all are in results.csv." if n > len(shown) else ""
    header = ("Setting", *(["What it changes"] if has_named else []), *MEASURES.values(), "Inner", "Chosen")
    return Table(header, tuple(rows), "l" * (1 + has_named) + "rrrrr", caption=caption, marked=frozenset({best}))


def changes(trial: Row) -> str:
    """Return what a named setting changes, without the sections' names; – for one that its name tells, or for none."""
    text = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in trial["changes"].items())
    return text if text and trial["is_named"] else ABSENT


def shorten(name: str, most: int) -> str:
    """Return a name on one line of at most so many characters; a longer one ends in an ellipsis."""
    line = clean(name)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def measure(row: Row, name: str) -> Row:
    """Return one measure of a setting's row as a row of its own."""
    return {"value": row[name], "ci_low": row[f"{name}_ci_low"], "ci_high": row[f"{name}_ci_high"]}


def caveat(sweep: Sweep) -> str:
    """Say what the published numbers can be compared with."""
    rows = sweep["published_rows"]
    errors = [
        each["standard_error"]
        for trial in sweep["trials"]
        for name, each in trial["published"].items()
        if name == "auroc" and known(each["standard_error"])
    ]
    text = "The published numbers are of another run: other answers, other SAEs, another way of splitting. "
    if rows is not None and errors:
        text += (
            f"They come from {count(rows)} test rows of one split, on which an AUROC has a standard error of about "
            f"{number(min(errors), '.2f')} to {number(max(errors), '.2f')} (classes in equal shares, where it is "
            "smallest or nearly): settings that differ by less than about twice that were not told apart. "
        )
    text += "The best of them was picked by the same rows: its optimism is in it, and is not known."
    if any(trial["is_reconstructed"] for trial in sweep["trials"]):
        text += " What a reconstructed setting changes is our guess: that was not published."
    return text


def _published_table(sweep: Sweep) -> Table:
    rows: list[tuple[Inline, ...]] = []
    for trial in sweep["trials"]:
        for name, each in trial["published"].items():
            ours = [row for row in sweep["settings"] if row["setting"] == trial["name"]]
            error = f" ± {number(each['standard_error'])}" if known(each["standard_error"]) else ""
            rows.append(
                (
                    trial["name"] + (" (reconstructed)" if trial["is_reconstructed"] else ""),
                    MEASURES[name],
                    f"{number(each['value'])}{error}",
                    *(f"{number(row[name])} {interval(measure(row, name))}" for row in ours),
                )
            )
    header = ("Setting", "Measure", "Published", *(f"Ours, {detector}" for detector in sweep["detectors"]))
    caption = "Published: ± one standard error, where there is a formula. Ours: 95% intervals."
    return Table(header, tuple(rows), "llr" + "r" * len(sweep["detectors"]), caption=caption)


def _split_table(sweep: Sweep) -> Table:
    rows: list[tuple[Inline, ...]] = [
        (str(split["repeat"]), " ".join(map(count, split["rows"])), Code(split["sha256"][:16]))
        for split in sweep["splits"]
    ]
    caption = "Every setting was fitted and scored on these; sha256 of the sorted lines id, fold."
    return Table(("Repeat", "Rows in each fold", "sha256"), tuple(rows), "lrl", caption=caption)


def summary(sweep: Sweep) -> str:
    """Return the settings as a plain table for the terminal, at most 100 columns, and the headline below."""
    name = sweep["metric"]
    lines = [("setting", "detector", MEASURES[name], "95% interval", "chosen")]
    for detector in sweep["detectors"]:
        for row in shown_rows(sweep, detector):
            taken = f"{row['n_chosen']}x" if row["n_chosen"] else ""
            found = (number(row[name]), interval(measure(row, name)), taken)
            lines.append((shorten(row["setting"], 48), detector, *found))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(["", *(f"{cell:{side}{width}}" for cell, side, width in zip(row, "<<>>>", widths, strict=True))])
        for row in lines
    ]
    return "\n".join(
        [
            f"{sweep['name']}: {_tried(sweep)}",
            *(line.rstrip()[:SUMMARY_WIDTH] for line in table),
            "",
            *textwrap.wrap(headline(sweep), SUMMARY_WIDTH),
        ]
    )
