"""The page of a sweep: what it says follows from the numbers, and it says so before the table of settings."""

import re

import numpy as np
import pytest

from jaxsae.report import sweep as page
from jaxsae.report import sweep_figures
from jaxsae.report.tables import SUMMARY_WIDTH

NAMES = ("baseline", "strict", "<b>wide|</b>")
DETECTORS = ("tracks_forest", "length")


def value(middle, half=0.04, **others):
    return {"value": middle, "ci_low": middle - half, "ci_high": middle + half, **others}


def make_setting(name, detector, auroc, n_chosen):
    measured = {"auroc": auroc, "accuracy": 0.7, "f1": 0.55}
    bounds = {f"{key}_ci_low": each - 0.04 for key, each in measured.items()}
    bounds |= {f"{key}_ci_high": each + 0.04 for key, each in measured.items()}
    return {"setting": name, "detector": detector, **measured, **bounds, "inner": auroc, "n_chosen": n_chosen}


def make_choice(detector, nested=0.51, naive=0.58, gain=0.01, half=0.04):
    chosen = [
        {
            "repeat": 0,
            "fold": fold,
            "setting": NAMES[fold % 2],
            "detector": "tracks_forest",
            "inner": 0.6,
            "n_candidates": 3,
        }
        for fold in range(3)
    ]
    return {
        "metric": "auroc",
        "n_candidates": 3,
        "nested": {"auroc": value(nested), "accuracy": value(0.7), "f1": value(0.5)},
        "naive": value(naive, setting="strict", detector="tracks_forest"),
        "optimism": value(naive - nested, half),
        "gain": None if gain is None else value(gain, over="baseline"),
        "to_use": {"setting": "strict", "detector": "tracks_forest"},
        "chosen": chosen,
        "detector": detector,
    }


def make_sweep(**changes):
    published = {"auroc": {"value": 0.7122, "standard_error": 0.0773}, "f1": {"value": 0.57, "standard_error": None}}
    trials = [
        {
            "name": name,
            "changes": {"tracking.top_k": 3 + place},
            "is_named": True,
            "is_reconstructed": name == "strict",
            "published": {},
        }
        for place, name in enumerate(NAMES)
    ]
    trials[1]["published"] = published
    return {
        "name": "mine",
        "workdir": "runs/x",
        "command": "jaxsae sweep --config=mine.py --workdir=runs/x",
        "metric": "auroc",
        "detectors": list(DETECTORS),
        "protocol": {"folds": 3, "repeats": 1, "inner": "neighbours", "bootstrap": 100, "seed": 0},
        "search": None,
        "axes": [],
        "counts": {"rows": 90, "groups": 30, "hallucinated": 40, "settings": 3, "fits": 60, "unconverged_fits": 0},
        "reference": "baseline",
        "published_rows": 45,
        "trials": trials,
        "settings": [
            make_setting(name, detector, 0.5 + 0.04 * place, 2 - place)
            for detector in DETECTORS
            for place, name in enumerate(NAMES)
        ],
        "choices": [make_choice(name) for name in DETECTORS] + [make_choice("any", gain=None)],
        "splits": [{"repeat": 0, "rows": [30, 30, 30], "groups": [10, 10, 10], "sha256": "ab" * 32}],
        "seconds": 12.5,
        **changes,
    }


def text_of(folder):
    return (folder / "report.md").read_text(encoding="utf-8"), (folder / "report.html").read_text(encoding="utf-8")


def test_write__gives_the_same_bytes_for_the_same_sweep_and_removes_old_figures(tmp_path):
    (tmp_path / "a" / "figures").mkdir(parents=True)
    (tmp_path / "a" / "figures" / "settings_gone.png").write_bytes(b"old")
    for folder in ("a", "b"):
        page.write(tmp_path / folder, make_sweep())
    files = [sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*")) for name in "ab"]
    assert files[0] == files[1]
    assert {path.name for path in files[0]} == {
        *("report.md", "report.html", "choices.png", "settings_tracks_forest.png", "settings_length.png")
    }
    for path in files[0]:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_headline__says_both_numbers_and_how_many_were_tried():
    said = page.headline(make_sweep())
    assert said == (
        "Chosen inside validation, 3 settings of 2 detectors reach AUROC 0.510 [0.470, 0.550]. Picking the best by the "
        "rows themselves would have said 0.580: +0.0700 [+0.0300, +0.1100] of optimism."
    )


def test_headline__of_one_setting_says_that_there_was_no_choice():
    choice = make_choice("tracks_forest") | {"n_candidates": 1}
    counts = make_sweep()["counts"] | {"settings": 1}
    said = page.headline(make_sweep(choices=[choice], detectors=["tracks_forest"], counts=counts))
    assert said == "One setting was tried: AUROC 0.510 [0.470, 0.550]. There was no choice."


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (make_choice("length"), [("open", "length: may be chance"), ("bad", "length: the best setting's own number")]),
        (make_choice("length", nested=0.6), [("good", "length: above chance"), ("open", "length: little optimism")]),
        (make_choice("length", nested=0.4), [("bad", "length: below chance")]),
        (make_choice("length", gain=0.1), [("open", ""), ("bad", ""), ("good", "length: choosing pays")]),
        (make_choice("length", gain=-0.1), [("open", ""), ("bad", ""), ("bad", "length: choosing costs")]),
        (make_choice("any", gain=None), [("open", "Detector and setting chosen: may be chance"), ("bad", "")]),
    ],
)
def test_verdicts__follow_the_intervals(choice, words):
    found = page.verdicts(make_sweep(choices=[choice]))
    assert len(found) == 2 + (choice["gain"] is not None)
    for verdict, (state, title) in zip(found, words, strict=False):
        assert (verdict.state, verdict.title[: len(title)]) == (state, title)


def test_page__has_published_numbers_with_error_caveat_and_mark(tmp_path):
    page.write(tmp_path, make_sweep())
    markdown, html = text_of(tmp_path)
    assert "| strict (reconstructed) | AUROC | 0.712 ± 0.077 | 0.540 \\[0.500, 0.580\\] | 0.540" in markdown
    assert "| strict (reconstructed) | F1 | 0.570 | 0.550" in markdown
    for text in (markdown, html):
        assert "They come from 45 test rows of one split, on which an AUROC has a standard error of about 0.08" in text
        assert "What a reconstructed setting changes is our guess" in text
    assert "Beside the published numbers" not in page_without_published(tmp_path / "without")


def page_without_published(folder):
    page.write(folder, make_sweep(trials=[trial | {"published": {}} for trial in make_sweep()["trials"]]))
    return text_of(folder)[0]


def test_page__escapes_names_and_shows_what_was_chosen_how_often(tmp_path):
    page.write(tmp_path, make_sweep())
    markdown, html = text_of(tmp_path)
    assert "<b>wide" not in markdown + html
    assert "&lt;b&gt;wide" in html
    assert re.search(r"\*\*baseline\*\* \| top\\_k 3 \| .* \| \*\*2 of 3\*\* \|", markdown)
    assert markdown.index("of optimism") < markdown.index("## Each setting")
    assert "![" in markdown
    assert "<script" not in html


AXES = [{"name": "tracking.top_k", "label": "k", "values": [3, 8]}]


def test_overview__of_a_search_says_that_each_fold_had_its_own():
    said = " ".join(page.overview(make_sweep(axes=AXES, search={"trials": 20, "searches": 3})))
    assert "Searched over tracking.top_k (k): 3, 8: 20 proposals of Optuna's TPE for each of 3 outer folds" in said


def test_overview__of_a_grid_says_what_its_labels_mean():
    assert "A grid of tracking.top_k (k): 3, 8." in page.overview(make_sweep(axes=AXES))


def test_to_use__names_a_setting_for_each_choice():
    assert page.to_use(make_sweep()).startswith(
        "To use from here on, as the best mean over all inner validations: strict for tracks_forest; strict for "
        "length; of all, tracks_forest with strict."
    )


def test_summary__fits_a_terminal_and_ends_with_the_headline():
    lines = page.summary(make_sweep()).splitlines()
    assert max(map(len, lines)) <= SUMMARY_WIDTH
    assert lines[0] == "mine: 3 settings of 2 detectors"
    assert " ".join(lines[lines.index("") + 1 :]) == page.headline(make_sweep())
    assert sum(line.strip().startswith("strict") for line in lines) == 2


def test_tables__of_many_settings_show_the_best_and_say_so():
    names = [f"s{place:03}" for place in range(page.MOST_ROWS + 5)]
    rows = [make_setting(name, "length", 0.5 + 0.001 * place, 1) for place, name in enumerate(names)]
    trials = [
        {"name": name, "changes": {}, "is_named": False, "is_reconstructed": False, "published": {}} for name in names
    ]
    counts = make_sweep()["counts"] | {"settings": len(names)}
    sweep = make_sweep(settings=rows, trials=trials, detectors=["length"], counts=counts)
    shown = page.shown_rows(sweep, "length")
    assert [row["setting"] for row in shown] == names[::-1][: page.MOST_ROWS]
    assert any("The best 40 of 45; all are in results.csv." in str(block) for block in page.document(sweep, {}))


def test_figures__are_drawn_without_intervals_too():
    rows = [row | {"auroc_ci_low": None, "auroc_ci_high": None} for row in make_sweep()["settings"]]
    charts = sweep_figures.draw(make_sweep(settings=rows))
    assert set(charts) == {"choices", "settings_tracks_forest", "settings_length"}
    for chart in charts.values():
        assert chart.png.startswith(b"\x89PNG")
        assert "nested 0.510, naive 0.580" in chart.alt
    assert not np.isnan([len(chart.svg) for chart in charts.values()]).any()
