"""The report, section by section in reading order, written as Markdown, as one HTML file and as PNG figures.

Figures are written first and the pages last, so that a page never names a figure that is not there.
"""

import os
from pathlib import Path

import numpy as np

from jaxsae import artifacts
from jaxsae.artifacts import InputError
from jaxsae.report import tables, verdicts
from jaxsae.report.markup import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Preformatted,
    Verdicts,
    render_html,
    render_markdown,
)
from jaxsae.report.tables import ReportInputs

FIGURE_PATTERNS = (
    *("sae_layers.png", "sae_density.png", "sae_crowding.png", "training.png"),
    *("auroc.png", "roc.png", "calibration.png", "risk_coverage.png", "curves.png", "tracks_*.png"),
)


def write(workdir: str | os.PathLike, inputs: ReportInputs) -> list[Path]:
    """Write `report.md`, `report.html` and `figures/*.png` under `workdir`; return their paths.

    The same inputs give the same bytes. Figures of an earlier report that this one does not have are removed.

    Raises:
        InputError: predictions do not fit each other, or a claim names a difference that is not there.
    """
    # matplotlib and scikit-learn take a second to import, which no other command should pay.
    from jaxsae.report import figures

    check(inputs)
    workdir = Path(workdir)
    charts = figures.draw(inputs)
    paths = [workdir / "figures" / f"{name}.png" for name in charts]
    for path, chart in zip(paths, charts.values(), strict=True):
        with artifacts.atomic_write(path) as partial:
            partial.write_bytes(chart.png)
    pictures = {name: Picture(name, chart.svg, chart.alt, chart.caption) for name, chart in charts.items()}
    title, blocks = f"jaxsae report: {inputs.config_name}", document(inputs, pictures)
    artifacts.write_text(workdir / "report.html", render_html(title, blocks))
    artifacts.write_text(workdir / "report.md", render_markdown(title, blocks))
    for pattern in FIGURE_PATTERNS:
        for stale in set((workdir / "figures").glob(pattern)) - set(paths):
            stale.unlink()
    return [workdir / "report.md", workdir / "report.html", *paths]


def check(inputs: ReportInputs) -> None:
    """Check what figures and verdicts rely on.

    Raises:
        InputError: predictions differ in length, are empty, or hold a score that is not finite or a label other than 0
            and 1; a claim names a difference that is not in the list.
    """
    for name, (labels, scores, groups) in inputs.predictions.items():
        if not 0 < len(labels) == len(scores) == len(groups):
            raise InputError(
                f"predictions of {name} hold {len(labels)} labels, {len(scores)} scores and {len(groups)} groups, "
                "expected one of each per answer; run jaxsae detect"
            )
        n_bad = int(np.sum(~np.isfinite(scores)))
        if n_bad:
            raise InputError(f"predictions of {name} hold {n_bad} scores that are not finite; run jaxsae detect")
        strange = sorted(set(np.unique(labels).tolist()) - {0, 1})
        if strange:
            raise InputError(f"predictions of {name} hold label {strange[0]}, expected 0 or 1; run jaxsae detect")
    for claim in (inputs.pass_difference, inputs.tracks_difference):
        if claim is not None and tables.named(inputs.differences, claim) is None:
            there = ", ".join(row["name"] for row in inputs.differences) or "none"
            raise InputError(f"the report needs the difference {claim!r}, metrics.json has {there}; run jaxsae detect")


def document(inputs: ReportInputs, pictures: dict[str, Picture]) -> tuple[Block, ...]:
    """Return the report's blocks in reading order."""
    sections = (
        _summary(inputs),
        _phases(inputs),
        _sae(inputs, pictures),
        _training(pictures),
        _detection(inputs, pictures),
        _choices(inputs),
        _differences(inputs),
        _ablations(inputs),
        _categories(inputs),
        _counts(inputs),
        _examples(inputs, pictures),
        _resources(inputs),
        _host(inputs),
        _config(inputs),
    )
    return tuple(block for section in sections for block in section)


def _absent(stage: str) -> Paragraph:
    return Paragraph(("not available: run ", Code(f"jaxsae {stage}")))


def _summary(inputs: ReportInputs) -> list[Block]:
    blocks: list[Block] = [
        Heading("Executive summary"),
        Verdicts(verdicts.executive_summary(inputs)),
        Heading("What was run", level=3),
        Preformatted(inputs.command),
        Bullets(tuple((sentence,) for sentence in [*verdicts.overview(inputs), f"Report written {inputs.created}."])),
    ]
    if inputs.notes:
        blocks += [Heading("Notes", level=3), Bullets(tuple((note,) for note in inputs.notes))]
    return blocks


def _phases(inputs: ReportInputs) -> list[Block]:
    body: Block = tables.phase_table(inputs) if inputs.phases else _absent("run")
    return [Heading("Phases"), body]


WITHOUT_BOS = (
    "Position 0 and BOS are in no number of this section, and are not replaced where a residual stream is: a model may "
    "give them a residual stream so long and so constant that it flatters every measure."
)
SAE_MEASURES = (
    (
        "FVU is Σ‖x − x̂‖² / Σ‖x − x̄‖² with x̄ the mean of the data: 0 is perfect, 1 is no better than the mean. PCA "
        "FVU is what k principal components leave of the same tokens, k being the SAE's; a good SAE leaves less."
    ),
    (
        "L0 is the number of active latents per token. In training and at inference it should be the same: what was "
        "trained is then what is used."
    ),
    (
        "ΔCE is what the language model loses, in nats per token, when this layer's residual stream is replaced by the "
        "SAE's reconstruction, and KL how far its predictions move; both are 0 at best."
    ),
    (
        "– was not measured. The last rows are over the layers that have a value; std has ddof 0. Best step is the "
        "step whose weights were kept."
    ),
)
SAE_DETAIL_MEASURES = (
    "MSE is the mean squared error of a coordinate of the reconstruction: it grows with the residual stream, so that "
    "layers and models cannot be compared by it.",
    "EV legacy is the explained variance that older tools report: 1 − ‖x − x̂‖² / ‖x − x̄‖², taken for each token and "
    "then averaged. It is not 1 − FVU: every token counts the same, however large its error, so that it flatters an "
    "SAE that fails at the tokens far from the mean (and understates one that fails at those near it). For comparison "
    "with published numbers only.",
    "ΔCE zero and ΔCE mean are what zeros and the mean row in place of the residual stream cost: the scale that ΔCE is "
    "to be seen on. CE recovered is 1 − ΔCE / ΔCE zero, and flatters: zeros leave so little of the model that a poor "
    "reconstruction recovers most of it.",
    "Crowding has its mean, quantiles and maximum over the latents of a layer.",
)
MEASURE_AGAIN = (
    "not available: the SAEs were measured by an older version; delete ",
    Code("saes/evaluation.json"),
    " and run ",
    Code("jaxsae train"),
    ", which keeps the SAEs and measures them again",
)


def _sae(inputs: ReportInputs, pictures: dict[str, Picture]) -> list[Block]:
    heading = Heading("Sparse autoencoders")
    if not inputs.sae:
        return [heading, _absent("train")]
    blocks: list[Block] = [heading, tables.sae_table(inputs), _sae_measures(inputs)]
    blocks += [pictures["sae_layers"]] if "sae_layers" in pictures else []
    for name, title in (("sae_density", "How often latents fire"), ("sae_crowding", "Crowding of the decoder")):
        blocks += [Heading(title, level=3), pictures.get(name, Paragraph(MEASURE_AGAIN))]
    blocks += [Heading("All measures", level=3), tables.sae_detail_table(inputs)]
    blocks += [Bullets(tuple((sentence,) for sentence in SAE_DETAIL_MEASURES))]
    blocks += [Heading("Quality bands", level=3), tables.band_table(inputs)]
    blocks += [Heading("Early and late layers", level=3)]
    if len(inputs.sae) < 2:
        return [*blocks, Paragraph(("One layer only: there is nothing to compare.",))]
    sentence = verdicts.depth_sentence(inputs)
    return [*blocks, tables.depth_table(inputs), *([Paragraph((sentence,))] if sentence else [])]


def _sae_measures(inputs: ReportInputs) -> Bullets:
    """Explain the columns of `sae_table`, with the numbers of this run that they hang on."""
    window = inputs.sae_spec.get("dead_tokens")
    waited = f"in {tables.count(window)} training tokens" if tables.known(window) else "for long in training"
    tokens = f"{tables.count(inputs.held_out_tokens)} " if tables.known(inputs.held_out_tokens) else ""
    dead = (
        f"Dead is the share of latents that had not fired {waited} when the weights were kept; 1% is good. Dead "
        f"held-out is the share that fires on none of the {tokens}held-out tokens: the dead and the rare ones."
    )
    random = ""
    if tables.known(inputs.crowding_random):
        random = f" For as many random directions it is {tables.number(inputs.crowding_random)}."
    crowding = (
        "Crowding is each latent's largest |cosine| with another decoder row of its layer, here the median latent's."
        f"{random} Near 1, latents are copies of one another."
    )
    fvu, l0, ce, rest = SAE_MEASURES
    return Bullets(tuple((sentence,) for sentence in (WITHOUT_BOS, fvu, l0, dead, ce, crowding, rest)))


def _training(pictures: dict[str, Picture]) -> list[Block]:
    return [Heading("Training curves"), pictures.get("training", _absent("train"))]


def _detection(inputs: ReportInputs, pictures: dict[str, Picture]) -> list[Block]:
    heading = Heading("Detection of hallucinated answers")
    if not inputs.detection:
        return [heading, _absent("detect")]
    blocks: list[Block] = [heading, tables.detection_table(inputs), Paragraph((DETECTION_MEASURES,))]
    blocks += [pictures[name] for name in ("auroc",) if name in pictures]
    blocks += [Heading("Definitions", level=3), tables.definition_table(inputs)]
    for name, title in (("roc", "ROC"), ("calibration", "Calibration")):
        blocks += [Heading(title, level=3), pictures.get(name, Paragraph((NO_CURVE,)))]
    blocks += [tables.calibration_table(inputs), Heading("Risk and coverage", level=3)]
    blocks += [pictures.get("risk_coverage", Paragraph((NO_CURVE,))), Heading("Fewer and wrong labels", level=3)]
    return [*blocks, pictures.get("curves", Paragraph(("not measured: set detection.curves and run jaxsae detect",)))]


DETECTION_MEASURES = (
    "Positive is hallucinated. Intervals are 95%, from a bootstrap over groups, so that answers to one question "
    "stay together. They hold the fitted scores as they are, so that those of fitted linear detectors are too "
    "narrow: fitted to noise, 82 in 100 of them held 0.5, of forests 92. p is the share of permutations of the "
    "labels that rank as well, the scores held fixed, which for fitted scores is too small (0.05 may stand for "
    "0.12), and is not corrected for the number of detectors. PR-AUC is to be read against the share "
    "hallucinated; AURC is the mean share hallucinated among the answers kept while those of the highest scores "
    "are withheld one by one, less is better; accuracy, precision, recall and F1 are at a threshold that the "
    "training part of each split chose. tracks_none, tracks_shuffled, tracks_random_decoders and tracks_neurons "
    "are controls of tracks_logistic."
)
NO_CURVE = (
    "not available: there are no out-of-fold predictions with both classes, or no scores between 0 and 1, for the "
    "method or the best simple baseline; run jaxsae detect"
)


def _choices(inputs: ReportInputs) -> list[Block]:
    """Return what inner validation chose for the method, where it chose between classifiers; else nothing."""
    row = tables.named(inputs.detection, inputs.method)
    if row is None or not any(chosen.get("model") for chosen in row.get("chosen") or ()):
        return []
    tried = inputs.counts.get("choices_tried")
    sentence = f"{row['name']} is, in each fold, what its inner validation chose of {row['n_choices']} configurations, "
    sentence += "each a classifier on families of track features; the fold itself had no part in it."
    if tables.known(tried):
        sentence += f" All detectors together tried {tables.count(tried)} configurations."
    return [Heading("The method that was chosen"), Paragraph((sentence,)), tables.choice_table(row)]


def _ablations(inputs: ReportInputs) -> list[Block]:
    if not inputs.ablations:
        return []
    return [Heading("Families of track features"), tables.ablation_table(inputs), Paragraph((FAMILY_MEASURES,))]


FAMILY_MEASURES = (
    "Differences of AUROC, above 0 where the family helps, paired on the same resamples. Added to the stack: the "
    "stack of log-probabilities and probes with this family besides, minus without. Beside the other families: "
    "the stack with every family, minus that with all but this one. metrics: the 26 published ones at the tracked "
    "position; prompt: the same at the last token of the prompt; profiles: match costs, births, deaths, "
    "activation that no track explains and SAE errors, by layer; concepts: which chains of linked latents the "
    "tracks carry, are born in and end in; late_births: how far tracks born in the last layers point at the "
    "emitted token and at its best rival. The intervals are not corrected for their number."
)


def _differences(inputs: ReportInputs) -> list[Block]:
    heading = Heading("Paired differences")
    if not inputs.differences:
        return [heading, _absent("detect")]
    note = (
        "Differences of AUROC on the same resamples; a claim needs an interval above 0. Marked: what the verdicts "
        "of the summary rest on."
    )
    return [heading, tables.difference_table(inputs), Paragraph((note,))]


def _categories(inputs: ReportInputs) -> list[Block]:
    heading = Heading("Detection by category")
    if not inputs.by_category:
        return [heading, _absent("detect")]
    return [heading, tables.category_table(inputs), Paragraph((CATEGORY_MEASURES,))]


CATEGORY_MEASURES = (
    "Right and hallucinated count the category's answers. Where no kind is given, AUROC is that of the category's "
    "hallucinated answers against all right answers, and AUROC within, where it is shown, against the right answers of "
    "the same category."
)


def _counts(inputs: ReportInputs) -> list[Block]:
    heading = Heading("Sample counts")
    if not inputs.counts:
        return [heading, _absent("answer")]
    counts = inputs.counts
    sentence = (
        f"{tables.count(counts.get('rows'))} answers in {tables.count(counts.get('groups'))} groups, "
        f"{tables.count(counts.get('empty'))} of them empty."
    )
    return [heading, Paragraph((sentence,)), tables.count_table(inputs), *_labels(inputs)]


def _labels(inputs: ReportInputs) -> list[Block]:
    if not inputs.labels:
        return []
    counts = {name: tables.count(found) for name, found in inputs.labels["counts"].items()}
    sentence = (
        f"Of {counts['asked']} answers {counts['right']} are right, {counts['wrong']} wrong, {counts['empty']} empty "
        f"(they count as hallucinated) and {counts['refusal']} refusals, such as “I don't know”; {counts['dropped']} "
        "refusals were left out of everything else in this report."
    )
    return [
        Heading("Labels", level=3),
        Paragraph((sentence,)),
        tables.agreement_table(inputs),
        Paragraph((LABEL_RULES,)),
    ]


LABEL_RULES = (
    "Results here use the first rule of the table. alias: no right answer stands in the answer as a run of whole "
    "words; substring: as a run of characters; exact: the answer is none of the right ones; token_f1: the words shared "
    "with each right answer have an F1 below 0.5; given: as the question set says. κ is the agreement beyond chance, – "
    "where both rules say the same one thing of every answer."
)


def _examples(inputs: ReportInputs, pictures: dict[str, Picture]) -> list[Block]:
    blocks: list[Block] = [Heading("Tracks of single answers")]
    if not inputs.examples:
        return [*blocks, _absent("track")]
    for number, example in enumerate(inputs.examples, start=1):
        label = "wrong" if example["label"] else "right"
        blocks += [
            Heading(f"Answer {number}: {'hallucinated' if example['label'] else 'right'}", level=3),
            tables.example_table(example),
        ]
        blocks += [pictures.get(f"tracks_{number}_{label}", Paragraph(("This answer has no track.",)))]
    return blocks


def _resources(inputs: ReportInputs) -> list[Block]:
    blocks: list[Block] = [Heading("Disk and memory")]
    blocks += (
        [tables.disk_table(inputs)] if inputs.disk_bytes else [Paragraph(("not available: sizes were not taken",))]
    )
    peaks = [row for row in inputs.phases if tables.known(row.get("peak_bytes"))]
    if peaks:
        largest = max(peaks, key=lambda row: row["peak_bytes"])
        text = f"Largest host memory: {tables.byte_size(largest['peak_bytes'])}, in phase {largest['name']}."
        blocks += [Paragraph((text,))]
    return blocks


def _host(inputs: ReportInputs) -> list[Block]:
    body: Block = (
        tables.settings_table(inputs.host, header=("Name", "Value"))
        if inputs.host
        else Paragraph(("not available: the host was not recorded",))
    )
    return [Heading("Host and versions"), body]


def _config(inputs: ReportInputs) -> list[Block]:
    settings = {"model": inputs.model, "sae": inputs.sae_spec}
    blocks: list[Block] = [Heading("Configuration")]
    blocks += (
        [tables.settings_table(inputs.config, header=("Setting", "Value"))]
        if inputs.config
        else [Paragraph(("No setting differs from the defaults.",))]
    )
    if inputs.model or inputs.sae_spec:
        blocks += [Heading("Model and SAEs", level=3), tables.settings_table(settings, header=("Property", "Value"))]
    return blocks
