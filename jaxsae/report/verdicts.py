"""What the numbers say, in sentences: each verdict is computed from the inputs, and a missing part names its stage.

A claim needs a paired interval above 0; a null is reported as a null.
"""

import numpy as np

from jaxsae.report.markup import Verdict
from jaxsae.report.tables import (
    ABSENT,
    QUALITY_BANDS,
    ReportInputs,
    Row,
    count,
    duration,
    halves,
    interval,
    known,
    named,
    number,
    quality_band,
    side_of_zero,
    signed,
    values,
)

SETTLED = 0.1  # share of the FVU that the second half of the training may still take; ours, by convention
MOST_DEAD = 0.1


def missing(what: str, stage: str) -> Verdict:
    """Say that a part of the report is not there, and which stage makes it."""
    return Verdict("missing", what, f"not available: run jaxsae {stage}")


def overview(inputs: ReportInputs) -> list[str]:
    """Say in a few sentences what was run: config, model, SAEs, answers; parts that are not known are left out."""
    model, spec = inputs.model, inputs.sae_spec
    sizes = [
        f"{count(model.get(key))} {noun}"
        for key, noun in (
            ("n_layers", "layers"),
            ("n_parameters", "parameters"),
            ("n_vocab", "tokens in the vocabulary"),
        )
        if known(model.get(key))
    ]
    if known(model.get("d_model")):
        sizes.insert(1, f"residual width {count(model['d_model'])}")
    sentences = [f"Config {inputs.config_name}."]
    if model.get("name"):
        sentences.append(f"Language model {model['name']}" + (f": {', '.join(sizes)}." if sizes else "."))
    if spec.get("architecture"):
        sentences.append(_sae_sentence(spec))
    if known(inputs.counts.get("rows")):
        sentences.append(_answers_sentence(inputs.counts))
    return sentences


def _sae_sentence(spec: Row) -> str:
    sizes = [
        f"{noun} {count(spec[key])}" for key, noun in (("n_latents", "latents"), ("k", "k")) if known(spec.get(key))
    ]
    if known(spec.get("tokens")):
        sizes.append(f"trained on {count(spec['tokens'])} tokens")
    if known(spec.get("steps")):
        sizes.append(f"{count(spec['steps'])} steps")
    if known(spec.get("batch")):
        sizes.append(f"{count(spec['batch'])} tokens per step")
    return f"Sparse autoencoders, one per layer: {', '.join([str(spec['architecture']), *sizes])}."


def _answers_sentence(counts: Row) -> str:
    parts = [f"{count(counts['rows'])} answers"]
    if known(counts.get("groups")):
        parts[0] += f" in {count(counts['groups'])} groups"
    for key, noun in (("right", "right"), ("wrong", "hallucinated"), ("empty", "empty")):
        if known(counts.get(key)):
            parts.append(f"{count(counts[key])} {noun}")
    return f"The model's own answers: {', '.join(parts)}."


def executive_summary(inputs: ReportInputs) -> tuple[Verdict, ...]:
    """Judge the run: phases, SAEs, their training's budget, detection, canary, and what the tracks add."""
    return (
        phases_verdict(inputs),
        sae_verdict(inputs),
        budget_verdict(inputs),
        detection_verdict(inputs),
        canary_verdict(inputs),
        tracks_verdict(inputs),
    )


def phases_verdict(inputs: ReportInputs) -> Verdict:
    """Say how many phases have their output, and how long they took."""
    if not inputs.phases:
        return missing("Phases", "run")
    absent = [row["name"] for row in inputs.phases if row["status"] == "missing"]
    seconds = values(inputs.phases, "seconds")
    text = f"{len(inputs.phases) - len(absent)} of {len(inputs.phases)} phases have their output"
    text += f", in {duration(sum(seconds))} altogether." if seconds else "."
    if absent:
        text += f" Missing: {', '.join(absent)}."
    return Verdict("open" if absent else "good", "Phases incomplete" if absent else "Phases complete", text)


def sae_verdict(inputs: ReportInputs) -> Verdict:
    """Judge the SAEs by their worst layer's FVU band, beside PCA, dead latents and ΔCE."""
    measured = [row for row in inputs.sae if known(row.get("fvu"))]
    if not measured:
        return missing("SAE quality", "train")
    bands = [quality_band(row["fvu"]) for row in measured]
    worst = max(measured, key=lambda row: row["fvu"])
    spread = ", ".join(f"{bands.count(name)} {name}" for name, _ in QUALITY_BANDS)
    unmeasured = len(inputs.sae) - len(measured)
    mean = float(np.mean(values(measured, "fvu")))
    sentences = [
        f"FVU {number(mean, '.4f')} on average, {number(worst['fvu'], '.4f')} at worst (layer {worst['layer']});"
        f" layers by band: {spread}" + (f", {unmeasured} not measured." if unmeasured else "."),
        *_pca_sentence(inputs),
        *_dead_sentence(inputs),
        *_ce_sentence(inputs),
    ]
    band = quality_band(worst["fvu"])
    state = {"excellent": "good", "good": "good", "fair": "open", "poor": "bad"}[str(band)]
    return Verdict(state, f"SAE quality: {band} at the worst layer", " ".join(sentences))


def budget_verdict(inputs: ReportInputs) -> Verdict:
    """Judge whether the SAEs had tokens enough, by what the second half of the training still gave.

    The budget sufficed if the second half lowered the held-out FVU, averaged over the layers, by less than
    `SETTLED` of itself and no layer has more than `MOST_DEAD` dead latents. The learning rate falls in the last fifth,
    which lowers the FVU on its own, so the verdict errs towards asking for more.
    """
    curve = _mean_curve(inputs)
    if len(curve) < 3:
        return missing("Training budget", "train, with a smaller train.evaluate_every: fewer than 3 evaluations")
    end, last = curve[-1]
    middle, half = min(curve[:-1], key=lambda point: abs(point[0] - end / 2))
    fallen = (half - last) / half if half > 0 else 0.0
    dead = max(values(inputs.sae, "dead"), default=0.0)
    text = f"From {count(middle)} to {count(end)} tokens the mean held-out FVU went from {half:.4f} to {last:.4f}, "
    text += f"{abs(fallen):.0%} {'down' if fallen >= 0 else 'up'}; dead latents at most {dead:.1%}. "
    if dead > MOST_DEAD:
        return Verdict(
            "open", "Training budget: latents were left unused", text + "Train longer, or with fewer latents."
        )
    if fallen >= SETTLED:
        return Verdict("open", "Training budget: more tokens would help", text + "The SAEs were still improving.")
    return Verdict("good", "Training budget: sufficient", text + "More tokens would change little.")


def _mean_curve(inputs: ReportInputs) -> list[tuple[int, float]]:
    """Return (tokens, FVU averaged over the layers) of each evaluation that measured every layer."""
    by_tokens: dict[int, list[float]] = {}
    for row in inputs.history:
        if known(row.get("fvu")):
            by_tokens.setdefault(row["tokens"], []).append(row["fvu"])
    n_layers = max(map(len, by_tokens.values()), default=0)
    return [(tokens, float(np.mean(fvus))) for tokens, fvus in sorted(by_tokens.items()) if len(fvus) == n_layers]


def _pca_sentence(inputs: ReportInputs) -> list[str]:
    pairs = [row for row in inputs.sae if known(row.get("fvu")) and known(row.get("pca_fvu"))]
    if not pairs:
        return []
    below = sum(row["fvu"] < row["pca_fvu"] for row in pairs)
    k = inputs.sae_spec.get("k")
    components = f"PCA with {count(k)} components" if known(k) else "PCA with k components"
    low, high = min(values(pairs, "pca_fvu")), max(values(pairs, "pca_fvu"))
    return [f"{components} leaves {low:.4f} to {high:.4f}; the SAE leaves less on {below} of {len(pairs)} layers."]


def _dead_sentence(inputs: ReportInputs) -> list[str]:
    rows = [row for row in inputs.sae if known(row.get("dead"))]
    if not rows:
        return []
    worst = max(rows, key=lambda row: row["dead"])
    return [f"Dead latents: at most {number(worst['dead'], '.1%')} (layer {worst['layer']})."]


def _ce_sentence(inputs: ReportInputs) -> list[str]:
    rows = [row for row in inputs.sae if known(row.get("delta_ce"))]
    if not rows:
        return []
    worst = max(rows, key=lambda row: row["delta_ce"])
    text = f"ΔCE {np.mean(values(rows, 'delta_ce')):.4f} nats per token on average, at most {worst['delta_ce']:.4f}"
    text += f" (layer {worst['layer']})"
    if known(worst.get("delta_ce_mean")):
        text += f", where mean-ablation costs {number(worst['delta_ce_mean'])}"
    return [text + "."]


def depth_sentence(inputs: ReportInputs) -> str:
    """Compare the mean FVU of the early and the late half of the layers; empty if it cannot be done."""
    early, late = (values(half, "fvu") for half in halves(inputs.sae))
    if not early or not late:
        return ""
    first, last = float(np.mean(early)), float(np.mean(late))
    relation = "higher than" if last > first else "lower than" if last < first else "equal to"
    return f"Mean FVU of the late layers ({last:.4f}) is {relation} that of the early layers ({first:.4f})."


def detection_verdict(inputs: ReportInputs) -> Verdict:
    """Judge the method: it passes if its paired interval over the best simple baseline lies above 0."""
    if not inputs.detection:
        return missing("Detection", "detect")
    scores = " ".join(_score_sentence(inputs, name) for name in (inputs.method, inputs.best_baseline) if name)
    row = named(inputs.differences, inputs.pass_difference)
    if row is None or side_of_zero(row) == ABSENT:
        text = f"{scores} Paired difference over the best simple baseline not available: run jaxsae detect"
        return Verdict("missing", "Detection: no verdict", text.strip())
    side = side_of_zero(row)
    best = f"{inputs.best_baseline}, the best of answer length and the log-prob family"
    text = f"{scores}{_choices_sentence(inputs)} Paired difference {signed(row['difference'])}, 95% interval "
    text += f"{interval(row, signed)}: "
    if side == "above 0":
        return Verdict("good", "Detection: the method passes", f"{text}{inputs.method} is better than {best}.")
    if side == "below 0":
        return Verdict("bad", "Detection: the method does not pass", f"{text}{inputs.method} is worse than {best}.")
    claim = f"{inputs.method} cannot be told from {best}."
    return Verdict("open", "Detection: the method does not pass, a null result", text + claim)


def _choices_sentence(inputs: ReportInputs) -> str:
    """Say how many configurations the method was chosen from; nothing where there was one."""
    row = named(inputs.detection, inputs.method)
    n_choices = (row or {}).get("n_choices", 1)
    return f" In each fold the method is the best of {n_choices} in inner validation." if n_choices > 1 else ""


def _score_sentence(inputs: ReportInputs, name: str) -> str:
    row = named(inputs.detection, name)
    return f"{name}: AUROC {number(row.get('auroc'))} {interval(row)}." if row else f"{name}: not measured."


def canary_verdict(inputs: ReportInputs) -> Verdict:
    """Judge the protocol: noise in place of the features must give an AUROC of 0.5 within its interval."""
    canary = inputs.canary or {}
    if not all(known(canary.get(key)) for key in ("auroc", "ci_low", "ci_high")):
        return missing("Noise canary", "detect")
    scores = f"Noise in place of the features has AUROC {number(canary['auroc'])}, 95% interval {interval(canary)}"
    if canary["ci_low"] <= 0.5 <= canary["ci_high"]:
        return Verdict("good", "Noise canary: at 0.5 within its interval", f"{scores}, which holds 0.5.")
    text = f"{scores}, which does not hold 0.5: the splits leak, or it is the chance that every interval leaves. Until "
    text += "that is known, trust no AUROC here."
    return Verdict("bad", "Noise canary: not at 0.5", text)


def tracks_verdict(inputs: ReportInputs) -> Verdict:
    """Judge whether tracks add to the stack without them."""
    row = named(inputs.differences, inputs.tracks_difference)
    if row is None or side_of_zero(row) == ABSENT:
        return missing("What tracks add", "detect")
    side = side_of_zero(row)
    text = f"Stack with tracks minus stack without: {signed(row['difference'])} AUROC, 95% interval "
    text += f"{interval(row, signed)}, which "
    if side == "above 0":
        rest = "lies above 0. The general claim needs the same on a second model; this report is about one."
        return Verdict("good", "Tracks add to the stack on this model", text + rest)
    if side == "below 0":
        return Verdict("bad", "Tracks make the stack worse on this model", text + "lies below 0.")
    return Verdict("open", "Tracks: nothing measurable added, a null result", text + "holds 0.")
