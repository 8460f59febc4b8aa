"""Say whether an answer is hallucinated: whether none of the right answers stands in it, word for word.

An answer is of one class: right, wrong, empty (no letter or digit; hallucinated all the same, as the model was asked
and did not say it) or refusal (it says that it does not know, and no right answer stands in it; not hallucinated).

Both texts are normalised alike, then a right answer must stand in the answer as a run of whole words: "art" is not in
"party", "New York" is in "It was New York City". The label sees words, not meaning: "It is not Paris" counts as right
where Paris is, and so does an answer that names a right and a wrong value.
"""

import itertools
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

RIGHT, WRONG, EMPTY, REFUSAL = CLASSES = ("right", "wrong", "empty", "refusal")

# As `normalise` leaves them: no apostrophes, no articles.
_POLITE_OPENINGS = (
    *("sorry", "im sorry", "i am sorry", "my apologies", "apologies", "i apologize", "i apologise", "unfortunately"),
    *("but", "however", "well", "honestly", "im afraid", "i am afraid"),
)
_REFUSAL_OPENINGS = (
    *("i dont know", "i do not know", "i dont have", "i do not have", "i have no idea", "i have no comment"),
    *("i have no information", "i have no knowledge", "im not sure", "i am not sure", "im unsure", "i am unsure"),
    *("im not certain", "i am not certain", "im not aware", "i am not aware", "im not familiar", "i am not familiar"),
    *("i cannot", "i can not", "i cant", "i could not", "i couldnt", "im unable", "i am unable", "im not able"),
    *("i am not able", "we dont know", "we do not know", "as ai", "as language model", "as large language model"),
    *("there is not enough information", "not enough information", "it is impossible to say", "it is not known"),
)
_REFUSALS = frozenset(
    {"unknown", "unsure", "not sure", "not known", "no idea", "no comment", "dont know", "sorry", "idk"}
)


def is_hallucinated(answer: str, answers: Sequence[str]) -> bool:
    """Return True if no right answer stands in `answer` as a run of whole words, after `normalise`.

    An empty answer, or one of punctuation alone, is hallucinated: the model was asked and did not say it. A right
    answer made of articles alone ("A") is found only in an answer made of articles alone; one that ends in an article
    ("vitamin A") is compared with its articles.

    Args:
        answer: what the model said.
        answers: the right answers, each with all its words.

    Raises:
        InputError: `answers` is empty or holds one without a letter or digit, which nothing could match.
    """
    if not answers:
        raise InputError(f"no right answers to compare {answer!r} with; expected at least one")
    return not any(_says(answer, alias) for alias in answers)


def is_refusal(answer: str) -> bool:
    """Return True if an answer begins by saying that it cannot be given, or says nothing but "unknown" and its like.

    Words of politeness may come first ("Sorry, but I don't know"). What follows does not matter: "I am not sure,
    perhaps London" is a refusal. English only.
    """
    words = " ".join(normalise(answer))
    if words in _REFUSALS:
        return True
    while polite := next((opening for opening in _POLITE_OPENINGS if words.startswith(f"{opening} ")), None):
        words = words.removeprefix(f"{polite} ")
    return words in _REFUSALS or any(f"{words} ".startswith(f"{opening} ") for opening in _REFUSAL_OPENINGS)


def classify(answer: str, answers: Sequence[str]) -> str:
    """Return the class of an answer: "right", "wrong", "empty" or "refusal".

    The key comes first: "I have no comment" is right where the question set says so.

    Raises:
        InputError: as `is_hallucinated`.
    """
    if not is_hallucinated(answer, answers):
        return RIGHT
    if not normalise(answer):
        return EMPTY
    return REFUSAL if is_refusal(answer) else WRONG


def normalise(text: str) -> tuple[str, ...]:
    """Return the words of a text that labels compare.

    NFKC, case folded; apostrophes, points in abbreviations (U.S.) and commas between thousands are deleted, a decimal
    point is kept, other punctuation and symbols separate words; the articles a, an, the are dropped, unless nothing
    else is there. A script without spaces between words gives one word a run.
    """
    words = _split(text)
    return tuple(word for word in words if word not in _ARTICLES) or words


def _split(text: str) -> tuple[str, ...]:
    """Return the words of `normalise`, articles among them."""
    text = unicodedata.normalize("NFKC", text).casefold()
    # folding can undo the composition (as of a capital I with a dot), so compose once more
    text = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text))
    text = _ABBREVIATION.sub(lambda match: match.group().replace(".", ""), _THOUSANDS.sub("", text))
    text = _DECIMAL.sub(_DECIMAL_MARK, text)
    kept = (c if unicodedata.category(c)[0] in _KEPT_CATEGORIES or c == _DECIMAL_MARK else " " for c in text)
    return tuple("".join(kept).replace(_DECIMAL_MARK, ".").split())


def _says(answer: str, alias: str) -> bool:
    run, last_word = _normalise_alias(alias), _split(alias)[-1]
    if last_word in _ARTICLES and last_word not in run:
        every_word = tuple(itertools.dropwhile(_ARTICLES.__contains__, _split(alias)))
        return _holds_run(_split(answer), every_word)
    return _holds_run(normalise(answer), run)


def _normalise_alias(alias: str) -> tuple[str, ...]:
    words = normalise(alias)
    if not words:
        raise InputError(f"the right answer {alias!r} holds no letter or digit; no answer could match it")
    return words


def _holds_run(words: Sequence[str], run: Sequence[str]) -> bool:
    return any(tuple(words[i : i + len(run)]) == tuple(run) for i in range(len(words) - len(run) + 1))
