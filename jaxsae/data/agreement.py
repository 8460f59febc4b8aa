"""How far the labels depend on the rule that makes them: four rules on the same answers, and how often they agree.

The run's own rule is `alias`. The others are in wide use, and each is wrong in its own way: `substring` finds "art" in
"party", `exact` calls every whole sentence wrong, `token_f1` calls "the river Rhine" right where "the river Rhone" is
asked for.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsae.artifacts import InputError
from jaxsae.data.labels import is_hallucinated, normalise

F1_THRESHOLD = 0.5


def is_wrong_by_substring(answer: str, answers: Sequence[str]) -> bool:
    """Return True if no right answer stands in `answer` as a run of characters, case folded, nothing else done."""
    return not any(alias.casefold() in answer.casefold() for alias in answers)


def is_wrong_by_exact_match(answer: str, answers: Sequence[str]) -> bool:
    """Return True if `answer` is none of the right answers, all normalised."""
    return normalise(answer) not in [normalise(alias) for alias in answers]


def is_wrong_by_token_f1(answer: str, answers: Sequence[str]) -> bool:
    """Return True if the F1 of the words that `answer` shares with each right answer, normalised, stays below 0.5."""
    return max(_token_f1(normalise(answer), normalise(alias)) for alias in answers) < F1_THRESHOLD


RULES: dict[str, Callable[[str, Sequence[str]], bool]] = {
    "alias": is_hallucinated,
    "substring": is_wrong_by_substring,
    "exact": is_wrong_by_exact_match,
    "token_f1": is_wrong_by_token_f1,
}


def label_by_every_rule(answers: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Return rule -> labels (1 = hallucinated) of answers with their right answers, in order."""
    return {name: [int(rule(*row)) for row in zip(answers, right, strict=True)] for name, rule in RULES.items()}


def compare_labels(labels: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Return a row per pair of rules: `a`, `b`, `n`, `agreement` (share of equal labels) and Cohen's `kappa`.

    kappa = (p - e) / (1 - e), with p the agreement and e what two rules of these shares would reach by chance; None
    where e is 1: both rules say the same one thing of every answer.

    Raises:
        InputError: there is no answer, or the rules labelled different numbers of them.
    """
    lengths = {name: len(row) for name, row in labels.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise InputError(f"agreement needs labels of the same answers, at least one, got {lengths}")
    return [
        {"a": a, "b": b, "n": lengths[a], **_agreement(labels[a], labels[b])}
        for a, b in itertools.combinations(labels, 2)
    ]


def _agreement(a: Sequence[int], b: Sequence[int]) -> dict[str, float | None]:
    n = len(a)
    agreement = sum(x == y for x, y in zip(a, b, strict=True)) / n
    by_chance = (sum(a) * sum(b) + (n - sum(a)) * (n - sum(b))) / n**2
    return {"agreement": agreement, "kappa": None if by_chance == 1 else (agreement - by_chance) / (1 - by_chance)}


def _token_f1(words: Sequence[str], other: Sequence[str]) -> float:
    shared = sum((Counter(words) & Counter(other)).values())
    return 2 * shared / (len(words) + len(other)) if shared else 0.0
