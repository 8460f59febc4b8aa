import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from jaxsae.report.markup import (
    Bullets,
    Code,
    Heading,
    Paragraph,
    Preformatted,
    Strong,
    Table,
    Verdict,
    Verdicts,
    clean,
    escape_html,
    render_html,
    render_markdown,
    to_html,
    to_markdown,
)

HOSTILE = (
    "<script>alert(1)</script>",
    "![x](https://evil.example/x.png)",
    "[click](javascript:alert(1))",
    '<img src="https://evil.example/x.png" onerror="alert(1)">',
    "a | b || c \\| d \\",
    "``` `code` ```",
    "**bold** _it_ ~~no~~ $x$ &amp; &#60;",
    "<!-- comment",
    "<pre x",
    "<script src=x",
    "# heading",
    "- item",
    "1. one",
    "[x]: https://evil.example",
    "<https://evil.example>",
    "==",
    "'\"><svg/onload=alert(1)>",
    "first\nsecond\r\nthird\u2028fourth",
)


class Reader(HTMLParser):
    """Text and tags of a page."""

    def __init__(self):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def viewed(markdown: str) -> Reader:
    """What a CommonMark viewer with tables and raw HTML makes of it."""
    return read(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def blocks_with(text: str) -> list:
    return [
        Paragraph((text,)),
        Paragraph((Strong(text), " ", Code(text))),
        Bullets(((text,), (Code(text),))),
        Verdicts((Verdict("good", text, text),)),
        Table(("a", "b"), ((text, Code(text)), (Strong(text), "end")), "lr", caption=text),
        Heading(text, level=3),
        Preformatted(text),
    ]


def without_spaces(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("text", HOSTILE)
def test_both_renderings__show_hostile_text_as_it_is_and_make_nothing_of_it(text):
    for block in blocks_with(text):
        shown = without_spaces(text if isinstance(block, Preformatted) else clean(text))
        for page in (viewed(to_markdown(block)), read(to_html(block))):
            assert shown in without_spaces(page.text), block
            assert not {"script", "img", "a", "svg", "iframe", "em", "del"} & set(page.tags), block
            assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]


@pytest.mark.parametrize("text", ["# heading", "- item", "+ item", "12) twelve", "1. one", "==="])
def test_markdown__opens_no_block_from_text(text):
    tags = viewed(to_markdown(Paragraph(("before",))) + "\n\n" + to_markdown(Bullets(((text,),)))).tags
    assert tags == ["p", "ul", "li"]
    assert viewed(to_markdown(Paragraph((text,)))).tags == ["p"]


@pytest.mark.parametrize("text", ["see https://evil.example", "www.evil.example", "WWW.evil.example", "a@evil.example"])
def test_markdown__leaves_no_bare_address_for_a_viewer_to_link(text):
    assert not re.search(r"://|www\.|@", to_markdown(Paragraph((text,))), re.IGNORECASE)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_tables__have_one_cell_per_column_whatever_the_text(text):
    table = Table(
        ("one", "two", "three"), ((text, Code(text), "x"), (Strong(text), text, Code(text))), "llr", n_summary=1
    )
    lines = to_markdown(table).splitlines()
    assert len(lines) == 4
    for line in lines:
        # As cmark-gfm reads a row: a backslash takes the character after it, a bare pipe ends a cell.
        assert len(re.findall(r"\|", re.sub(r"\\.", "", line))) == 4


def test_clean__keeps_words_and_neutralises_what_cannot_be_seen():
    assert clean("\n a\tb\n c\r\n") == " a b ↵  c"
    assert clean("x\x00y\u202ez\ud800") == "x\ufffdy\ufffdz\ufffd"
    assert clean("naïve 東京 👩‍🔬 Σ") == "naïve 東京 👩‍🔬 Σ"
    clean("\ud800").encode("utf-8")


def test_escape_html__is_safe_in_attributes():
    assert escape_html("\"'<&>") == "&quot;&#x27;&lt;&amp;&gt;"


def test_headings__have_the_anchor_that_the_contents_link_to():
    blocks = (Heading("Sparse autoencoders"), Heading("part", level=3), Heading("Host and versions"))
    markdown, page = render_markdown("t", blocks), read(render_html("t", blocks))
    assert re.findall(r"\]\(#([\w-]+)\)", markdown) == ["sparse-autoencoders", "host-and-versions"]
    links = [value for name, value in page.attributes if name == "href"]
    ids = [value for name, value in page.attributes if name == "id"]
    assert links == ["data:,", "#sparse-autoencoders", "#host-and-versions"]
    assert ids == ["sparse-autoencoders", "part", "host-and-versions"]


def test_tables__mark_and_summarise_the_named_rows_only():
    table = Table(("a", "b"), (("p", "1"), ("q", "2"), ("all", "3")), "lr", marked=frozenset({1}), n_summary=1)
    assert to_markdown(table).splitlines()[2:] == ["| p | 1 |", "| **q** | **2** |", "| **all** | **3** |"]
    rows = re.findall(r"<tr[^>]*>", to_html(table))
    assert rows == ["<tr>", "<tr>", '<tr class="marked">', '<tr class="summary">']


def test_tables__of_uneven_rows_are_refused():
    with pytest.raises(ValueError, match="zip"):
        to_html(Table(("a", "b"), (("x",),), "lr"))


def test_unknown_blocks__are_refused_by_name():
    with pytest.raises(TypeError, match="got int"):
        to_markdown(3)
    with pytest.raises(TypeError, match="got int"):
        to_html(3)
