"""One score as a page of text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH = 100  # of what is shown of a text
_ENDS = 12  # tokens shown at either end of a long answer
_RARE = 0.05  # share of random deletions from which on a change is called no more than theirs


def describe_score(score: Mapping[str, Any], *, n_layers: int) -> str:
    """Return the page: verdict, warnings, tokens, the similar right answer, and each track with its deletion test.

    Args:
        score: the fields of `jaxsae.pipeline.score.Score.to_dict`, as in a line of `jaxsae score --file`.
        n_layers: of the language model.
    """
    verdict = "hallucinated" if score["is_hallucinated"] else "right"
    layer, last = score["earliest_layer"], n_layers - 1
    since = (
        "no layer turned what is said before anything is known"
        if layer is None
        else f"it stands from layer {layer} of 0 to {last} on"
    )
    lines = [
        f"prompt       {_short(score['prompt'])}",
        f"answer       {_short(score['answer']) or '(empty)'}",
        f"probability  {score['probability']:.3f} that it is hallucinated",
        f"verdict      {verdict} (hallucinated is said from {score['threshold']:.3f} on); {since}",
        *(f"warning      {warning}" for warning in score["warnings"]),
    ]
    if score["tokens"]:
        lines += ["", "probability with the answer cut after each token"]
        cuts = list(zip(score["tokens"], score["token_scores"], strict=True))
        shown = [f"  {probability:.3f}  {token!r}" for token, probability in cuts]
        hidden = len(shown) - 2 * _ENDS
        lines += shown if hidden <= 1 else [*shown[:_ENDS], f"  ... {hidden} more tokens", *shown[-_ENDS:]]
    if score["similar"] is not None:
        similar = score["similar"]
        lines += [
            "",
            f"most like it among the run's right answers (mean cosine of latents {similar['similarity']:.2f})",
            f"  {_short(similar['prompt'])} -> {_short(similar['answer'])}",
        ]
    if score["tracks"]:
        lines += ["", "tracks whose absence from the detector's input would change the probability most"]
        for track in score["tracks"]:
            lines += _track(track, has_similar=score["similar"] is not None)
    return "\n".join(lines)


def _track(track: Mapping[str, Any], *, has_similar: bool) -> list[str]:
    path = " > ".join(str(latent) for latent in track["latents"])
    layers = _span(track["layers"])
    lines = [f"  {layers}, latents {path}: {track['change']:+.4f} without it"]
    if has_similar:
        split = track["splits_at"]
        where = "the right answer has all of it" if split is None else f"parts from the right answer at layer {split}"
        lines.append(f"    {where}")
    deletion = track["deletion"]
    if deletion is None:
        return [*lines, "    no deletion test: a layer has no other active latent to compare with"]
    return [
        *lines,
        f"    taken out of the model, beside {deletion['draws']} random deletions of like size "
        f"({deletion['size']:.3g}, theirs {deletion['random_size']:.3g})",
        f"      probability      {_effect(deletion['probability'], deletion['draws'])}",
        f"      log-probability  {_effect(deletion['logprob'], deletion['draws'])}",
    ]


def _effect(effect: Mapping[str, float], draws: int) -> str:
    if effect["change"] == effect["random_low"] == effect["random_high"] == 0:
        return "unchanged by all: these latents act behind the answer's last token"
    return (
        f"{effect['change']:+.3f}, random {effect['random_mean']:+.3f} "
        f"[{effect['random_low']:+.3f}, {effect['random_high']:+.3f}], p {effect['p_value']:.2f}: "
        f"{_judged(effect['p_value'], draws)}"
    )


def _judged(p_value: float, draws: int) -> str:
    if p_value <= _RARE:
        return "more than theirs"
    is_largest = p_value == 1 / (1 + draws)
    return "more than theirs, but they are too few to tell" if is_largest else "no more than theirs"


def _span(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def _short(text: str) -> str:
    """Return a text in one line, its end where it is long: questions stand there."""
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"...{line[-_WIDTH:]}"
