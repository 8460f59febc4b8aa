"""The audit of a benchmark as one page in plain words: `audit.md`, `audit.html`, and the table for the terminal.

In: the content of audit.json. Out: text. Nothing is measured here; every sentence follows from a figure and its
finding.
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
    Table,
    Verdict,
    Verdicts,
    clean,
    render_html,
    render_markdown,
)
from jaxsae.report.tables import SUMMARY_WIDTH, count, interval, number

Audit = Mapping[str, Any]
FINDINGS = {
    "found": "gives the label away",
    "unclear": "a little, or chance",
    "none": "nothing seen",
    "unmeasured": "not measured",
}
OVERLAPS = {"found": "texts on both sides", "unclear": "few on both sides", "none": "none on both sides"}
MEMORY = {"found": "memory, not knowledge", "unclear": FINDINGS["unclear"], "none": "at chance"}
_STATES = {"found": "bad", "unclear": "open", "none": "good", "unmeasured": "missing"}
_MOST_CATEGORIES = 12
_TITLES = {
    "class_prior_by_question": "Which question it is",
    "length": "Length of the answer",
    "question_tfidf": "Text of the question",
    "answer_tfidf": "Text of the answer",
    "question_answer_tfidf": "Text of question and answer",
    "category": "Category",
    "position": "Place of the row in the file",
}
_FINE = 0.05  # a difference between two detectors that papers claim; ours, by convention


def write(out: str | os.PathLike, audit: Audit) -> list[Path]:
    """Write `audit.html` and `audit.md` under `out` and return their paths; the same audit gives the same bytes."""
    title, blocks = f"jaxsae audit: {Path(audit['file']).name}", document(audit)
    out = Path(out)
    artifacts.write_text(out / "audit.html", render_html(title, blocks))
    artifacts.write_text(out / "audit.md", render_markdown(title, blocks))
    return [out / "audit.md", out / "audit.html"]


def document(audit: Audit) -> tuple[Block, ...]:
    """Return the page's blocks in reading order."""
    blocks: list[Block] = [
        Heading("Verdict"),
        Paragraph((headline(audit),)),
        Verdicts(tuple(verdicts(audit))),
        Heading("What was audited"),
        Bullets(tuple((sentence,) for sentence in overview(audit))),
        Heading("Scores"),
        _score_table(audit),
        Paragraph((MEASURES,)),
        Heading("Splits"),
        _split_table(audit),
        Heading("Lengths of answers"),
        _length_table(audit),
    ]
    if audit["categories"]:
        blocks += [Heading("Categories"), _category_table(audit)]
    return (*blocks, Heading("Definitions"), _definition_table(audit))


MEASURES = (
    "Positive is hallucinated: 0.5 is chance, 1 tells every hallucinated answer from every right one. None of these "
    "scores knows anything of what is true; a detector judged on this file has to beat the best of them, by an "
    "interval, on the same split. Intervals are 95%, over resampled questions."
)


def headline(audit: Audit) -> str:
    """Say in one sentence how many checks found something, and the strongest score of a split by question."""
    judged = [verdict for verdict in verdicts(audit) if verdict.state != "missing"]
    n_found = sum(verdict.state == "bad" for verdict in judged)
    clues = [row for row in audit["checks"] if row["finding"] == "found" and row["split"] == "group"]
    if not n_found:
        return "No check found anything in these rows that gives the label away without knowing what is true."
    text = f"{n_found} of {len(judged)} checks found something wrong with these rows or a way to split them. "
    if not clues:
        return text + "Split by question, nothing in the rows gives the label away."
    best = max(clues, key=lambda row: row["auroc"])
    return text + (
        f"Split by question, a detector has to beat AUROC {number(best['auroc'])} {interval(best)}, which "
        f"{_TITLES[best['name']].lower()} alone reaches, before it has shown anything."
    )


def verdicts(audit: Audit) -> list[Verdict]:
    """Judge splits, scores, duplicates, empty answers and size, in the order in which they matter."""
    judged = []
    for split in audit["splits"]:
        judged += [_overlap_verdict(split), _canary_verdict(split)]
    judged += [_check_verdict(row) for row in audit["checks"]]
    return [*judged, _duplicate_verdict(audit), _empty_verdict(audit), _size_verdict(audit)]


def split_words(name: str) -> str:
    """Return a split as words: "Split by pair", "The file's own split"."""
    return "The file's own split" if name == "file" else f"Split by {_unit(name)}"


def _unit(name: str) -> str:
    return {"group": "question", "file": "the file's own split"}.get(name, name)


def _overlap_verdict(split: Mapping[str, Any]) -> Verdict:
    right, wrong = split["right_texts_in_train"], split["hallucinated_texts_in_train"]
    asked = split["rows_with_question_in_train"]
    state = _STATES[split["overlap_finding"]]
    text = "No test text stands in training too"
    if state != "good":
        text = f"Of the right answers' test texts {_percent(right)} stand in training too, word for word, and of the "
        text += f"hallucinated ones {_percent(wrong)}"
    text += f"; {_percent(asked)} of the test rows have their question there."
    if state == "bad":
        text += " Whatever remembers texts scores well on these."
        text += " Split by question." if split["name"] != "group" else " Give both rows one group, or drop one."
    return Verdict(state, f"{split_words(split['name'])}: {OVERLAPS[split['overlap_finding']]}", text)


def _canary_verdict(split: Mapping[str, Any]) -> Verdict:
    canary = split["canary"]
    text = f"Random numbers in place of a detector's features reach AUROC {number(canary['auroc'])} {interval(canary)}"
    state = _STATES[canary["finding"]]
    title = {"bad": "noise detects", "open": "noise is a little above chance", "good": "noise stays at chance"}[state]
    text += {
        "bad": ": what is measured on this split is memory. No AUROC from it says anything.",
        "open": ", a little above 0.5, which may be chance.",
        "good": ", as they should.",
    }[state]
    return Verdict(state, f"{split_words(split['name'])}: {title}", text)


def _check_verdict(row: Mapping[str, Any]) -> Verdict:
    title = _TITLES[row["name"]]
    if row["finding"] == "unmeasured":
        return Verdict("missing", f"{title}: not measured", f"{row['reason'][0].upper()}{row['reason'][1:]}.")
    text = f"Alone it reaches AUROC {number(row['auroc'])} {interval(row)}, split by {_unit(row['split'])}."
    if row["finding"] == "found":
        text += " " + _ADVICE[row["name"]]
        if row["auroc"] < 0.5:
            text += " Below 0.5 it tells as much: the other rows of a question have the other label."
    return Verdict(_STATES[row["finding"]], f"{title}: {FINDINGS[row['finding']]}", text)


_ADVICE = {
    "class_prior_by_question": "Rows of one question share their fate; keep them on one side of every split.",
    "length": "Match the lengths of right and hallucinated answers, or show this baseline beside every detector.",
    "question_tfidf": "Some kinds of question are mostly hallucinated; compare within a kind, or beside this.",
    "answer_tfidf": "Right and hallucinated answers are worded differently; show this baseline beside every detector.",
    "question_answer_tfidf": "Reading the text replaces knowing; show this baseline beside every detector.",
    "category": "Compare detectors within a category, or beside this.",
    "position": "The order of the rows tells labels: shuffle them, and never split by order.",
}


def _duplicate_verdict(audit: Audit) -> Verdict:
    found = audit["duplicates"]
    text = f"{count(found['repeated_texts'])} texts of question and answer stand in more than one row"
    text += f" ({count(found['repeated_rows'])} rows)" if found["repeated_texts"] else ""
    text += (
        f"; {count(found['contradictory_texts'])} have both labels; {count(found['texts_in_two_groups'])} texts and "
        f"{count(found['questions_in_two_groups'])} questions lie in more than one group."
    )
    if found["contradictory_texts"]:
        return Verdict("bad", "Duplicates: the same text with both labels", f"{text} One of the two labels is wrong.")
    if found["texts_in_two_groups"]:
        return Verdict(
            "bad", "Duplicates: in more than one group", f"{text} A split by group does not hold them together."
        )
    if found["questions_in_two_groups"]:
        return Verdict("open", "Duplicates: questions in more than one group", f"{text} Is one question one group?")
    if found["repeated_texts"]:
        return Verdict("open", "Duplicates: repeated rows", f"{text} Harmless if they stay on one side of every split.")
    return Verdict("good", "Duplicates: none", text)


def _empty_verdict(audit: Audit) -> Verdict:
    n, wrong = audit["sizes"]["empty_answers"], audit["sizes"]["empty_hallucinated"]
    if not n:
        return Verdict("good", "Empty answers: none", "Every answer has a letter or digit.")
    text = f"{count(n)} answers have no letter or digit, {count(wrong)} of them labelled hallucinated."
    return Verdict("open", "Empty answers: some", f"{text} Say what they count as; a length of 0 tells them apart.")


def _size_verdict(audit: Audit) -> Verdict:
    found = audit["minimum_detectable_difference"]
    between = found["between_detectors"]
    text = (
        f"With this many questions a detector shows at AUROC {number(0.5 + found['from_chance'])} or more (against "
        f"chance), and two independent detectors differ visibly by {number(between)} or more, at "
        f"{found['power']:.0%} power and a two-sided level of {found['alpha']:.0%}."
    )
    if between <= _FINE:
        return Verdict("good", f"Size: differences of {_FINE} can be seen", text)
    return Verdict(
        "open", f"Size: too small for a difference of {_FINE}", f"{text} Smaller claims need more questions."
    )


def overview(audit: Audit) -> list[str]:
    """Say what was read and how rows were made of it."""
    sizes = audit["sizes"]
    how = {
        None: "a row per answer",
        "question": "two rows a question: its best right answer and its most tempting wrong one (--pairs=question)",
        "published": "the best right answer, repeated beside each wrong one (--pairs=published)",
        "all": "each right answer beside each wrong one (--pairs=all)",
    }[audit["pairs"]]
    read = ", ".join(f"{field} from {column!r}" for field, column in audit["columns"].items())
    sentences = [
        f"File {audit['file']}, sha256 {audit['sha256'][:12]}…, read as {how}.",
        f"Columns: {read}.",
        f"{count(sizes['rows'])} rows in {count(sizes['groups'])} groups (questions), the largest of "
        f"{count(sizes['largest_group'])} rows: {count(sizes['right'])} right, {count(sizes['hallucinated'])} "
        f"hallucinated; {count(sizes['mixed_groups'])} groups have answers of both kinds.",
        f"Seed {audit['settings']['seed']}; {count(audit['settings']['bootstrap'])} resamples of questions.",
    ]
    if audit["label_values"]:
        spelled = ", ".join(f"{value!r} {count(n)}" for value, n in audit["label_values"].items())
        sentences.insert(2, f"Labels in the file: {spelled}; 1 is hallucinated.")
    if sizes["rows"] < audit["rows_in_file"]:
        sentences.insert(
            1,
            f"The file gives {count(audit['rows_in_file'])} rows; the figures are of a sample of "
            f"{count(sizes['rows'])}, whole questions drawn by the seed.",
        )
    else:
        sentences.insert(1, "All of its rows were used.")
    return sentences


def summary(audit: Audit) -> str:
    """Return the verdicts as a plain table for the terminal, at most 100 columns, and the headline below."""
    rows = [("check", "figure", "95% interval", "verdict")]
    for split in audit["splits"]:
        words = split_words(split["name"]).lower()
        for kind in ("right", "hallucinated"):
            seen = split[f"{kind}_texts_in_train"]
            found = OVERLAPS["none"] if not seen["share"] else OVERLAPS[split["overlap_finding"]]
            rows.append((f"{words}: {kind} texts in train", f"{seen['share']:.1%}", _percents(seen), found))
        rows.append((f"{words}: noise", *_figures(split["canary"], MEMORY)))
    rows += [(_TITLES[row["name"]].lower(), *_figures(row)) for row in audit["checks"]]
    found = audit["minimum_detectable_difference"]
    rows.append(("smallest difference that shows", number(found["between_detectors"]), "", "between two detectors"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()[:SUMMARY_WIDTH]
        for row in rows
    ]
    sizes = audit["sizes"]
    first = f"{clean(Path(audit['file']).name)}: {count(sizes['rows'])} rows, {count(sizes['groups'])} questions"
    return "\n".join([first, *lines, "", *textwrap.wrap(headline(audit), SUMMARY_WIDTH)])


def _figures(row: Mapping[str, Any], words: Mapping[str, str] = FINDINGS) -> tuple[str, str, str]:
    if row["finding"] == "unmeasured":
        return "–", "", words["unmeasured"]
    return number(row["auroc"]), interval(row), words[row["finding"]]


def _percents(row: Mapping[str, Any]) -> str:
    return interval(row, "{:.1%}".format)


def _percent(row: Mapping[str, Any]) -> str:
    return f"{row['share']:.1%} {_percents(row)}" if row["share"] else "none"


def _score_table(audit: Audit) -> Table:
    scores = [(_TITLES[row["name"]], row, FINDINGS) for row in audit["checks"]]
    scores += [("Noise canary", split["canary"], MEMORY) for split in audit["splits"]]
    rows: list[tuple[Inline, ...]] = []
    marked = set()
    for place, (title, row, words) in enumerate(scores):
        measured = row["finding"] != "unmeasured"
        counted = (count(row["n"]), count(row["n_groups"])) if measured else ("", "")
        figures = (number(row["auroc"]), interval(row)) if measured else ("–", "–")
        split = _unit(row["split"]) if measured else "–"
        rows.append((title, split, *counted, *figures, words[row["finding"]]))
        marked |= {place} if row["finding"] == "found" else set()
    header = ("What is read", "Split by", "Rows", "Questions", "AUROC", "95% interval", "Finding")
    return Table(header, tuple(rows), "llrrrrl", marked=frozenset(marked))


def _split_table(audit: Audit) -> Table:
    rows: list[tuple[Inline, ...]] = [
        (
            _unit(split["name"]),
            _percent(split["right_texts_in_train"]),
            _percent(split["hallucinated_texts_in_train"]),
            _percent(split["rows_with_question_in_train"]),
        )
        for split in audit["splits"]
    ]
    caption = "Shares of the tested rows, with 95% intervals; a text is question and answer."
    header = ("Split by", "Right texts in training", "Hallucinated texts in training", "Questions in training")
    return Table(header, tuple(rows), "lrrr", caption=caption)


def _length_table(audit: Audit) -> Table:
    def spread(row: Mapping[str, Any], measure: str) -> str:
        low, middle, high = (number(row[f"{measure}_{name}"], ".0f") for name in ("p25", "median", "p75"))
        return f"{middle} ({low} to {high})"

    rows: list[tuple[Inline, ...]] = [
        ("hallucinated" if row["label"] else "right", spread(row, "words"), spread(row, "characters"))
        for row in audit["lengths"]
    ]
    return Table(("Answers", "Words", "Characters"), tuple(rows), "lrr", caption="Median and quartiles.")


def _category_table(audit: Audit) -> Table:
    shown: Sequence[Mapping[str, Any]] = audit["categories"][:_MOST_CATEGORIES]
    rows: list[tuple[Inline, ...]] = [
        (row["category"] or "(none)", count(row["n"]), f"{row['hallucinated']:.1%}") for row in shown
    ]
    n = len(audit["categories"])
    caption = f"The largest {len(shown)} of {n}; all are in audit.json." if n > len(shown) else ""
    return Table(("Category", "Rows", "Hallucinated"), tuple(rows), "lrr", caption=caption)


def _definition_table(audit: Audit) -> Table:
    rows: list[tuple[Inline, ...]] = [
        (Code(row["name"]), row["definition"]) for row in audit["checks"] if row["finding"] != "unmeasured"
    ]
    rows.append((Code("noise_canary"), audit["splits"][0]["canary"]["definition"]))
    rows += [(f"split by {_unit(split['name'])}", split["definition"]) for split in audit["splits"]]
    rows.append(("finding", audit["finding_rule"]))
    rows.append(("duplicates", audit["duplicates"]["definition"]))
    rows.append(("smallest difference", audit["minimum_detectable_difference"]["definition"]))
    return Table(("Name", "Definition"), tuple(rows), "ll")
