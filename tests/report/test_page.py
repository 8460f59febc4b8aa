import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from markdown_it import MarkdownIt

from jaxsae import report
from jaxsae.artifacts import InputError
from jaxsae.report import ReportInputs

VOID = {"meta", "link", "br", "img"}
ATTACK = "<script>alert('x')</script> `tick` | pipe\n![i](https://evil.example/i.png) [l](https://evil.example) $a_b$"


class Page(HTMLParser):
    """Tags, attributes and text of a page; raises where tags do not nest."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f"{data} "


def assert_self_contained(html: str, page: Page) -> None:
    assert page.open == []
    assert "script" not in page.tags
    assert not {"img", "iframe", "object", "embed", "form", "base", "image"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcset", "action", "poster", "background"), (tag, name)
        if name in ("href", "xlink:href"):
            assert value.startswith("#") or (tag, value) == ("link", "data:,")
        assert "url(" not in value or "url(#" in value
    styles = "".join(re.findall(r"<style[^>]*>(.*?)</style>", html, re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")}
    assert links <= set(ids)


def raw_cells(line: str) -> int:
    return len(re.findall(r"\|", re.sub(r"\\.", "", line)))


def assert_tables_well_formed(markdown: str) -> None:
    for block in markdown.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({raw_cells(line) for line in lines}) <= 1, lines


@pytest.fixture(scope="module")
def written(tmp_path_factory, complete_inputs):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, report.write(workdir, complete_inputs)


def test_write__returns_every_file_it_wrote(written):
    workdir, paths = written
    assert [path.relative_to(workdir).as_posix() for path in paths] == [
        *("report.md", "report.html"),
        *(f"figures/{name}.png" for name in ("sae_layers", "sae_density", "sae_crowding", "training")),
        *(f"figures/{name}.png" for name in ("auroc", "roc", "calibration", "risk_coverage", "curves")),
        *("figures/tracks_1_right.png", "figures/tracks_2_wrong.png"),
    ]
    assert {path for path in workdir.rglob("*") if path.is_file()} == set(paths)


def test_html__is_one_self_contained_page_with_title_language_and_text_alternatives(written):
    workdir, _ = written
    html = (workdir / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert_self_contained(html, page)
    assert len(html) < 5e6
    assert ("html", "lang", "en") in page.attributes
    assert "<title>jaxsae report: demo</title>" in html
    assert "default-src 'none'" in html
    figures = [value for tag, name, value in page.attributes if (tag, name) == ("div", "aria-label")]
    assert len(figures) == page.tags.count("svg") == 11
    assert all(len(alt) > 20 for alt in figures)


def test_markdown__names_the_figures_that_exist_and_has_even_tables(written):
    workdir, paths = written
    markdown = (workdir / "report.md").read_text(encoding="utf-8")
    assert_tables_well_formed(markdown)
    named = re.findall(r"\]\((figures/[\w.]+)\)", markdown)
    assert [workdir / name for name in named] == paths[2:]
    rendered = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    assert rendered.tags.count("table") == (workdir / "report.html").read_text(encoding="utf-8").count("<table>") == 19
    links = [value for tag, name, value in rendered.attributes if (tag, name) == ("a", "href")]
    assert len(links) == rendered.tags.count("h2") == 14


def test_both_pages__say_the_same_numbers(written):
    workdir, _ = written
    html = Page((workdir / "report.html").read_text(encoding="utf-8")).text
    markdown = (workdir / "report.md").read_text(encoding="utf-8")
    viewed = Page(MarkdownIt("commonmark").enable("table").render(markdown)).text
    numbers = r"\d+\.\d+"
    assert sorted(re.findall(numbers, html)) == sorted(re.findall(numbers, viewed))
    assert "0.912" in html


def test_write__gives_the_same_bytes_again_whatever_the_users_style(make_inputs, tmp_path):
    inputs = make_inputs(n_layers=2, n_evaluations=3, n_answers=40)
    paths = report.write(tmp_path / "first", inputs)
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "svg.hashsalt": None, "savefig.dpi": 31}):
        again = report.write(tmp_path / "second", inputs)
    for first, second in zip(paths, again, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def attacked(inputs: ReportInputs) -> ReportInputs:
    """The same run with markup in every text that a user or a model can write."""

    def texts(rows, *keys):
        return [{**row, **{key: ATTACK for key in keys if key in row}} for row in rows]

    labels, scores, groups = inputs.predictions[inputs.method]
    return dataclasses.replace(
        inputs,
        config_name=ATTACK,
        command=ATTACK,
        created=ATTACK,
        config={ATTACK: {ATTACK: ATTACK}},
        host={ATTACK: ATTACK},
        model={"name": ATTACK},
        sae_spec={"architecture": ATTACK},
        phases=texts(inputs.phases, "detail"),
        detection=[{**inputs.detection[0], "name": ATTACK, "definition": ATTACK}, *inputs.detection[2:]],
        method=ATTACK,
        best_baseline=ATTACK,
        predictions={ATTACK: (labels, scores, groups)},
        by_category=texts(inputs.by_category, "detector", "category", "kind"),
        differences=texts(inputs.differences[:1], "name", "definition"),
        pass_difference=ATTACK,
        tracks_difference=None,
        counts={"rows": 4, "right": 2, "wrong": 2, "by_category": {ATTACK: {"right": 2, "wrong": 2}}},
        disk_bytes={ATTACK: 7},
        notes=[ATTACK],
        examples=[
            {**example, "question": ATTACK, "answer": ATTACK, "expected": [ATTACK]} for example in inputs.examples
        ],
    )


def test_write__escapes_text_everywhere_in_both_pages(complete_inputs, tmp_path):
    report.write(tmp_path, attacked(complete_inputs))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert_self_contained(html, page)
    assert page.text.count("<script>alert('x')</script>") > 25
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert_tables_well_formed(markdown)
    viewed = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    assert "script" not in viewed.tags
    assert viewed.text.count("<script>alert('x')</script>") > 25
    sources = [value for tag, name, value in viewed.attributes if name == "src"]
    assert len(sources) == 11
    assert all(source.startswith("figures/") for source in sources)
    links = [value for tag, name, value in viewed.attributes if name == "href"]
    assert all(link.startswith("#") for link in links)


def test_write__of_an_empty_run_says_what_to_run(tmp_path):
    paths = report.write(tmp_path, ReportInputs(config_name="c", command="jaxsae evaluate", created="t"))
    assert [path.name for path in paths] == ["report.md", "report.html"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for stage in ("run", "train", "detect", "answer", "track"):
        assert f"not available: run `jaxsae {stage}`" in text
    assert not re.search(r"\bnan\b|None", text)


def test_write__copes_with_values_that_were_not_measured(complete_inputs, tmp_path):
    def blank(rows, *kept):
        return [
            {
                key: value if key in kept or isinstance(value, str) else (None, float("nan"))[index % 2]
                for key, value in row.items()
            }
            for index, row in enumerate(rows)
        ]

    inputs = dataclasses.replace(
        complete_inputs,
        sae=blank(complete_inputs.sae, "layer"),
        density={},
        crowding_random=None,
        history=blank(complete_inputs.history, "layer", "step"),
        detection=blank(complete_inputs.detection),
        canary=blank([complete_inputs.canary])[0],
        by_category=blank(complete_inputs.by_category),
        differences=blank(complete_inputs.differences),
        curves=blank(complete_inputs.curves, "share"),
        phases=blank(complete_inputs.phases),
        counts={"rows": None, "by_category": None},
        predictions={},
        examples=[{**complete_inputs.examples[1], "tracks": [], "score": None, "expected": None, "answer": "\n"}],
    )
    paths = report.write(tmp_path, inputs)
    text = paths[0].read_text(encoding="utf-8")
    assert [path.name for path in paths] == ["report.md", "report.html"]
    assert not re.search(r"\bnan\b|\bNone\b", text)
    assert "| Answer | (empty) |" in text
    assert "This answer has no track." in text


def test_sae_section__says_what_the_numbers_leave_out_and_hang_on(written, make_inputs, tmp_path):
    text = (written[0] / "report.md").read_text(encoding="utf-8")
    assert "Position 0 and BOS are in no number of this section" in text
    assert "had not fired in 614,400 training tokens" in text
    assert "fires on none of the 65,536 held-out tokens" in text
    assert "For as many random directions it is 0.262." in text
    options = {"density": {}, "crowding_random": None, "held_out_tokens": None, "sae_spec": {}}
    rows = [{name: x for name, x in row.items() if "crowding" not in name} for row in make_inputs().sae]
    report.write(tmp_path, make_inputs(sae=rows, history=(), detection=(), predictions={}, examples=(), **options))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    again = "measured by an older version; delete `saes/evaluation.json` and run `jaxsae train`"
    assert text.count(again) == 2
    assert "fires on none of the held-out tokens" in text


def test_write__reports_one_layer(make_inputs, tmp_path):
    report.write(tmp_path, make_inputs(n_layers=1, n_evaluations=1, detection=(), predictions={}, examples=()))
    assert "One layer only" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_write__removes_figures_of_an_earlier_report_and_nothing_else(make_inputs, tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("roc.png", "tracks_3_wrong.png", "mine.png"):
        (folder / name).write_bytes(b"old")
    report.write(tmp_path, ReportInputs(config_name="c", command="x", created="t"))
    assert [path.name for path in folder.iterdir()] == ["mine.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((np.array([0, 1]), np.array([0.5]), np.array([0, 1])), "2 labels, 1 scores and 2 groups"),
        (
            (np.array([0, 1]), np.array([0.5, np.nan]), np.array([0, 1])),
            "predictions of d hold 1 scores that are not finite",
        ),
        ((np.array([0, 2]), np.array([0.5, 0.1]), np.array([0, 1])), "label 2, expected 0 or 1"),
        ((np.array([], dtype=int), np.array([]), np.array([])), "0 labels, 0 scores"),
    ],
)
def test_write__refuses_predictions_that_do_not_fit_and_writes_nothing(tmp_path, change, message):
    inputs = ReportInputs(config_name="c", command="x", created="t", predictions={"d": change})
    with pytest.raises(InputError, match=message):
        report.write(tmp_path, inputs)
    assert list(tmp_path.iterdir()) == []


def test_write__refuses_a_claim_without_its_difference(make_inputs, tmp_path):
    with pytest.raises(
        InputError, match=r"needs the difference 'best', metrics.json has method - best_baseline, tracks"
    ):
        report.write(tmp_path, make_inputs(pass_difference="best"))


def test_large_runs__stay_under_five_megabytes(make_inputs, tmp_path):
    paths = report.write(tmp_path, make_inputs(n_layers=48, n_evaluations=250, n_answers=2000, examples=()))
    assert paths[1].stat().st_size < 5e6


def test_importing_report__loads_neither_matplotlib_nor_scikit_learn_nor_jax():
    code = "import sys, jaxsae.report; print([m for m in ('jax', 'flax', 'matplotlib', 'sklearn') if m in sys.modules])"
    root = Path(report.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pages__say_what_was_chosen_of_how_many_and_what_each_family_adds(written):
    workdir, _ = written
    for name in ("report.md", "report.html"):
        page = (workdir / name).read_text(encoding="utf-8")
        assert "what its inner validation chose of 20 configurations" in page
        assert "All detectors together tried 61 configurations." in page
        assert "In each fold the method is the best of 20 in inner validation." in page
        assert "prompt, late" in page  # the Markdown escapes the underscore
        assert "82 in 100 of them held 0.5" in page
        assert "Beside the other families" in page
