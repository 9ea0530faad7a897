"""How L-Eval scores three of its tasks: multiple choice and sums by exact match, papers' sections by ROUGE.

Written from what its evaluation does (github.com/OpenLMLab/LEval, `Evaluation/auto_eval.py`); scores from 0 to 100.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean


def choice(text: str) -> str:
    """The first of A to D in an answer to a multiple-choice question; A when there is none."""
    found = re.search("[ABCD]", text)
    return found.group() if found else "A"


def right_choice(text: str) -> str:
    """Of a reference answer, which begins with its letter: `(B) Because ...`."""
    found = re.search("[ABCD]", text.split()[0]) if text.split() else None
    return found.group() if found else "A"


def number(text: str) -> str:
    """The whole part of the number behind "The answer is", else of the first paragraph's last word with a digit."""
    found = re.search(r"The answer is (\S+)", text)
    words = [found.group(1)] if found else text.split("\n\n")[0].split(" ")
    word = next((word for word in reversed(words) if any(letter.isdigit() for letter in word)), "")
    return "".join(letter for letter in word.split(".")[0] if letter.isdigit())


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _f_measure(common: int, num_found: int, num_wanted: int) -> float:
    return 2 * common / (num_found + num_wanted) if common else 0.0


def _overlap(found: Sequence[str], wanted: Sequence[str], size: int) -> float:
    grams = [Counter(zip(*(words[at:] for at in range(size)), strict=False)) for words in (found, wanted)]
    return _f_measure((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def _longest_common(found: Sequence[str], wanted: Sequence[str]) -> float:
    lengths = [0] * (len(wanted) + 1)
    for word in found:
        left = 0  # of the row above, one to the left
        for idx, other in enumerate(wanted, 1):
            above = lengths[idx]
            lengths[idx] = left + 1 if word == other else max(above, lengths[idx - 1])
            left = above
    return _f_measure(lengths[-1], len(found), len(wanted))


def rouge(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Geometric mean of ROUGE-1, ROUGE-2 and ROUGE-L (F measures without stemming, each a mean over answers)."""
    pairs = [(_words(mine), _words(its)) for mine, its in zip(answers, wanted, strict=True)]
    one = fmean(_overlap(mine, its, 1) for mine, its in pairs)
    two = fmean(_overlap(mine, its, 2) for mine, its in pairs)
    longest = fmean(_longest_common(mine, its) for mine, its in pairs)
    return 100 * (one * two * longest) ** (1 / 3)


def _equal(mine: Callable[[str], str], its: Callable[[str], str]) -> Callable[[Sequence[str], Sequence[str]], float]:
    def score(answers: Sequence[str], wanted: Sequence[str]) -> float:
        return 100 * fmean(mine(one) == its(other) for one, other in zip(answers, wanted, strict=True))

    return score


SCORES: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "quality": _equal(choice, right_choice),
    "gsm100": _equal(number, number),
    "paper_assistant": rouge,
}
"""By L-Eval's name of the task: (answers, reference answers) to a score."""
