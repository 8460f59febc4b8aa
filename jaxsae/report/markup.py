"""Blocks of a report and their two renderings: Markdown, and one HTML page that asks for nothing from outside.

Every string in a block is plain text, whoever wrote it, and is escaped here, once per rendering; no other module writes
markup. The one exception is `Picture.svg`, which `figures` drew and stripped of comments, ids in common and links.
"""

import dataclasses
import functools
import html
import re
import unicodedata

BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
MARKS = {"good": "✔", "bad": "✘", "open": "○", "missing": "–"}


@dataclasses.dataclass(frozen=True)
class Strong:
    """A stressed piece of text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Code:
    """A name, a value or a command, shown as written."""

    text: str


Inline = str | Strong | Code


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title, level 2 stands in the table of contents."""

    text: str
    level: int = 2

    @property
    def anchor(self) -> str:
        """The fragment that leads here, the same that a Markdown viewer derives from the text."""
        return re.sub(r"[^\w\- ]", "", self.text.lower()).replace(" ", "-")


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Pieces of text in a row."""

    parts: tuple[Inline, ...]


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list of short texts."""

    items: tuple[tuple[Inline, ...], ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the numbers say about one question; `state` is a key of `MARKS`."""

    state: str
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Verdicts, one under the other."""

    items: tuple[Verdict, ...]


@dataclasses.dataclass(frozen=True)
class Preformatted:
    """Text shown as typed, line by line."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; `align` has one letter a column (l or r), `marked` the rows to bring out, the last `n_summary` rows
    summarise those above."""

    header: tuple[str, ...]
    rows: tuple[tuple[Inline, ...], ...]
    align: str
    caption: str = ""
    marked: frozenset[int] = frozenset()
    n_summary: int = 0


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure: `figures/<name>.png` in Markdown, `svg` in HTML."""

    name: str
    svg: str
    alt: str
    caption: str


Block = Heading | Paragraph | Bullets | Verdicts | Preformatted | Table | Picture


def clean(text: str) -> str:
    """Return text on one line: line ends as ↵, control characters, bidi overrides and lone surrogates as U+FFFD."""
    line = " ↵ ".join(text.strip("\r\n").expandtabs(1).splitlines())
    return "".join(_visible(char) for char in line)


def _visible(char: str) -> str:
    return "\ufffd" if char in BIDI_CONTROLS or unicodedata.category(char) in ("Cc", "Cs") else char


def escape_markdown(text: str) -> str:
    """Return text that a Markdown viewer shows as it is: no markup, no HTML, no link made from a bare address."""
    line = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)
    line = line.replace("://", "&#58;//").replace("@", "&#64;")
    return re.sub(r"\b(www)\.", r"\1&#46;", line, flags=re.IGNORECASE)


def escape_html(text: str) -> str:
    """Return text for an HTML element or a quoted attribute."""
    return html.escape(clean(text), quote=True)


def _inline_markdown(part: Inline) -> str:
    if isinstance(part, Strong):
        return f"**{escape_markdown(part.text).strip()}**"
    return _code_markdown(part.text) if isinstance(part, Code) else escape_markdown(part)


def _code_markdown(text: str) -> str:
    line = clean(text).strip()
    if not line:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def _join_markdown(parts: tuple[Inline, ...]) -> str:
    line = "".join(_inline_markdown(part) for part in parts).strip()
    # At the start of a block these would open a heading, a list or a rule.
    return re.sub(r"^([#+=-]|\d(?=\d*[.)]))", lambda match: f"&#{ord(match[0])};", line)


def _inline_html(part: Inline) -> str:
    if isinstance(part, Strong):
        return f"<strong>{escape_html(part.text)}</strong>"
    return f"<code>{escape_html(part.text)}</code>" if isinstance(part, Code) else escape_html(part)


def _join_html(parts: tuple[Inline, ...]) -> str:
    return "".join(_inline_html(part) for part in parts)


@functools.singledispatch
def to_markdown(block) -> str:
    """Return one block as Markdown, without the blank line after it."""
    raise TypeError(f"expected a block of a report, got {type(block).__name__}")


@functools.singledispatch
def to_html(block) -> str:
    """Return one block as HTML."""
    raise TypeError(f"expected a block of a report, got {type(block).__name__}")


@to_markdown.register(Heading)
def _(block: Heading) -> str:
    return "#" * block.level + " " + escape_markdown(block.text)


@to_html.register(Heading)
def _(block: Heading) -> str:
    return f'<h{block.level} id="{escape_html(block.anchor)}">{escape_html(block.text)}</h{block.level}>'


@to_markdown.register(Paragraph)
def _(block: Paragraph) -> str:
    return _join_markdown(block.parts)


@to_html.register(Paragraph)
def _(block: Paragraph) -> str:
    return f"<p>{_join_html(block.parts)}</p>"


@to_markdown.register(Bullets)
def _(block: Bullets) -> str:
    return "\n".join(f"- {_join_markdown(item)}" for item in block.items)


@to_html.register(Bullets)
def _(block: Bullets) -> str:
    return "<ul>" + "".join(f"<li>{_join_html(item)}</li>" for item in block.items) + "</ul>"


@to_markdown.register(Verdicts)
def _(block: Verdicts) -> str:
    return "\n".join(
        f"- {MARKS[item.state]} **{escape_markdown(item.title)}.** {escape_markdown(item.text)}" for item in block.items
    )


@to_html.register(Verdicts)
def _(block: Verdicts) -> str:
    items = (
        f'<li class="{item.state}"><span class="mark" aria-hidden="true">{MARKS[item.state]}</span>'
        f"<div><strong>{escape_html(item.title)}.</strong> {escape_html(item.text)}</div></li>"
        for item in block.items
    )
    return '<ul class="verdicts">' + "\n".join(items) + "</ul>"


@to_markdown.register(Preformatted)
def _(block: Preformatted) -> str:
    lines = [clean(line) for line in block.text.splitlines()]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
    return "\n".join([fence, *lines, fence])


@to_html.register(Preformatted)
def _(block: Preformatted) -> str:
    return "<pre>" + "\n".join(escape_html(line) for line in block.text.splitlines()) + "</pre>"


@to_markdown.register(Table)
def _(block: Table) -> str:
    rules = ["---:" if letter == "r" else "---" for letter in block.align]
    lines = [_row_markdown(block.header), "| " + " | ".join(rules) + " |"]
    first_summary = len(block.rows) - block.n_summary
    for number, row in enumerate(block.rows):
        stressed = number in block.marked or number >= first_summary
        # The first cell and the numbers: a whole row in bold is hard to read.
        cells = (
            _stress(cell) if stressed and (place == 0 or block.align[place] == "r") else cell
            for place, cell in enumerate(row)
        )
        lines.append(_row_markdown(tuple(cells)))
    if block.caption:
        lines += ["", _join_markdown((block.caption,))]
    return "\n".join(lines)


def _stress(cell: Inline) -> Inline:
    return Strong(cell) if isinstance(cell, str) and clean(cell).strip() else cell


def _row_markdown(cells: tuple[Inline, ...]) -> str:
    # Viewers disagree on a backslash and a pipe inside backticks, so code with a pipe is shown as text.
    parts = (_inline_markdown(cell.text if isinstance(cell, Code) and "|" in cell.text else cell) for cell in cells)
    return "| " + " | ".join(parts) + " |"


@to_html.register(Table)
def _(block: Table) -> str:
    head = "".join(
        f'<th scope="col"{_numeric(letter)}>{escape_html(name)}</th>'
        for name, letter in zip(block.header, block.align, strict=True)
    )
    first_summary = len(block.rows) - block.n_summary
    body = []
    for number, row in enumerate(block.rows):
        names = ["marked"] * (number in block.marked) + ["summary"] * (number >= first_summary)
        css = f' class="{" ".join(names)}"' if names else ""
        cells = "".join(
            f'<td dir="auto"{_numeric(letter)}>{_inline_html(cell)}</td>'
            for cell, letter in zip(row, block.align, strict=True)
        )
        body.append(f"<tr{css}>{cells}</tr>")
    caption = f'<p class="caption">{escape_html(block.caption)}</p>' if block.caption else ""
    rows = "\n".join(body)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
        + caption
    )


def _numeric(letter: str) -> str:
    return ' class="number"' if letter == "r" else ""


@to_markdown.register(Picture)
def _(block: Picture) -> str:
    return f"![{escape_markdown(block.alt)}](figures/{block.name}.png)\n\n{_join_markdown((block.caption,))}"


@to_html.register(Picture)
def _(block: Picture) -> str:
    return (
        f'<figure id="figure-{block.name}"><div class="scroll" tabindex="0">'
        f'<div class="chart" role="img" aria-label="{escape_html(block.alt)}">{block.svg}</div></div>'
        f"<figcaption>{escape_html(block.caption)}</figcaption></figure>"
    )


def _contents(blocks: tuple[Block, ...]) -> list[Heading]:
    return [block for block in blocks if isinstance(block, Heading) and block.level == 2]


def render_markdown(title: str, blocks: tuple[Block, ...]) -> str:
    """Return the whole Markdown file: title, table of contents, blocks."""
    contents = "\n".join(f"- [{escape_markdown(item.text)}](#{item.anchor})" for item in _contents(blocks))
    parts = [to_markdown(Heading(title, level=1)), contents, *(to_markdown(block) for block in blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_html(title: str, blocks: tuple[Block, ...]) -> str:
    """Return the whole HTML page; its content policy forbids scripts and every request."""
    links = "".join(f'<li><a href="#{item.anchor}">{escape_html(item.text)}</a></li>' for item in _contents(blocks))
    body = "\n".join(to_html(block) for block in blocks)
    return PAGE.format(title=escape_html(title), style=STYLESHEET, links=links, body=body)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main>
{body}
</main>
</body>
</html>
"""

# Figures are drawn for a white page; in the dark their lightness is turned over and their hues are kept.
STYLESHEET = """:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b1f24; --quiet: #59636e; --line: #d5dae0; --panel: #f5f7f9;
  --accent: #0b5cad; --mark: #e5f0fb; --good: #0a7a53; --bad: #b3400a; --open: #7a5c00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --ink: #e4e7eb; --quiet: #9aa4af; --line: #353c44; --panel: #1c2126;
    --accent: #7db8f0; --mark: #1c3044; --good: #4cc79a; --bad: #f09062; --open: #d9b84a;
  }
  .chart svg { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 64rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.75rem 0 .5rem; }
p, ul, ol { max-width: 46rem; }
p { margin: .6rem 0; }
p, li { overflow-wrap: anywhere; }
a { color: var(--accent); }
nav { padding: .75rem 1rem; border-radius: .4rem; background: var(--panel); font-size: .92rem; }
nav ol { margin: 0; padding-left: 1.4rem; max-width: none; columns: 3 12rem; }
code, pre { font-size: .88em; font-family: ui-monospace, SFMono-Regular, Consolas, "Liberation Mono", monospace; }
code { overflow-wrap: anywhere; }
pre {
  margin: .6rem 0; padding: .7rem .9rem; border-radius: .4rem; background: var(--panel);
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.scroll { overflow-x: auto; }
table { margin: .75rem 0 .25rem; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .55rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { vertical-align: bottom; color: var(--quiet); font-weight: 600; border-bottom-width: 2px; }
td { min-width: 3rem; }
td:last-child:not(.number) { min-width: 7rem; overflow-wrap: anywhere; }
td code { overflow-wrap: normal; }
th.number, td.number { text-align: right; }
td.number { white-space: nowrap; }
tr.marked td { background: var(--mark); }
tr.marked td.number, tr.marked td:first-child { font-weight: 600; }
tr.summary td { background: var(--panel); }
.caption, figcaption { color: var(--quiet); font-size: .86rem; max-width: 46rem; }
.verdicts { list-style: none; padding: 0; }
.verdicts li {
  display: flex; gap: .7rem; margin: .55rem 0; padding: .6rem .85rem; border-radius: .4rem;
  background: var(--panel); border-left: 4px solid var(--quiet);
}
.verdicts .good { border-color: var(--good); } .verdicts .good .mark { color: var(--good); }
.verdicts .bad { border-color: var(--bad); } .verdicts .bad .mark { color: var(--bad); }
.verdicts .open { border-color: var(--open); } .verdicts .open .mark { color: var(--open); }
.mark { font-weight: 700; }
.verdicts div { overflow-wrap: anywhere; min-width: 0; }
figure { margin: 1.25rem 0; }
.chart { min-width: 22rem; max-width: 42rem; }
.chart svg { display: block; width: 100%; height: auto; }
@media print {
  :root {
    --page: #ffffff; --ink: #000000; --quiet: #444444; --line: #bbbbbb; --panel: #f5f5f5; --mark: #e8f0f8;
    --good: #0a7a53; --bad: #b3400a; --open: #7a5c00;
  }
  .chart svg { filter: none; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .35rem; }
  td, td:last-child:not(.number) { min-width: 0; }
  figure, tr, .verdicts li { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  .chart { min-width: 0; max-width: 36rem; }
}
"""
