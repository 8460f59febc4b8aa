"""Say whether an answer is hallucinated: whether none of the right answers stands in it, word for word.

Both texts are normalised alike, then a right answer must stand in the answer as a run of whole words: "art" is not in
"party", "New York" is in "It was New York City". The label sees words, not meaning: "It is not Paris" counts as right
where Paris is, and so does an answer that names a right and a wrong value.
"""

import re
import unicodedata
from collections.abc import Sequence

from jaxsae.artifacts import InputError

_ARTICLES = frozenset({"a", "an", "the"})
_APOSTROPHES = re.compile("['`´‘’ʼ]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ABBREVIATION = re.compile(r"\b(?:[^\W\d_]\.){2,}(?!\w)|\b(?:[^\W\d_]\.)+[^\W\d_]\b")
_DECIMAL = re.compile(r"(?<=\d)\.(?=\d)")
_DECIMAL_MARK = "\u02d9"  # not a point, so that it outlives the removal of punctuation; a letter-like symbol
_KEPT_CATEGORIES = "LMN"  # letters, combining marks, numbers


def is_hallucinated(answer: str, answers: Sequence[str]) -> bool:
    """Return True if no right answer stands in `answer` as a run of whole words, after `normalise`.

    An empty answer, or one of punctuation alone, is hallucinated: the model was asked and did not say it. A right
    answer made of articles alone ("A") is found only in an answer made of articles alone.

    Args:
        answer: what the model said.
        answers: the right answers, each with all its words.

    Raises:
        InputError: `answers` is empty or holds one without a letter or digit, which nothing could match.
    """
    if not answers:
        raise InputError(f"no right answers to compare {answer!r} with; expected at least one")
    words = normalise(answer)
    return not any(_holds_run(words, _normalise_alias(alias)) for alias in answers)


def normalise(text: str) -> tuple[str, ...]:
    """Return the words of a text that labels compare.

    NFKC, case folded; apostrophes, points in abbreviations (U.S.) and commas between thousands are deleted, a decimal
    point is kept, other punctuation and symbols separate words; the articles a, an, the are dropped, unless nothing
    else is there. A script without spaces between words gives one word a run.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    # folding can undo the composition (as of a capital I with a dot), so compose once more
    text = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text))
    text = _ABBREVIATION.sub(lambda match: match.group().replace(".", ""), _THOUSANDS.sub("", text))
    text = _DECIMAL.sub(_DECIMAL_MARK, text)
    kept = (c if unicodedata.category(c)[0] in _KEPT_CATEGORIES or c == _DECIMAL_MARK else " " for c in text)
    words = tuple("".join(kept).replace(_DECIMAL_MARK, ".").split())
    return tuple(word for word in words if word not in _ARTICLES) or words


def _normalise_alias(alias: str) -> tuple[str, ...]:
    words = normalise(alias)
    if not words:
        raise InputError(f"the right answer {alias!r} holds no letter or digit; no answer could match it")
    return words


def _holds_run(words: Sequence[str], run: Sequence[str]) -> bool:
    return any(tuple(words[i : i + len(run)]) == tuple(run) for i in range(len(words) - len(run) + 1))
