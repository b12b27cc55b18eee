"""Token texts as labels: each readable on its own, whatever its script."""

import itertools
import unicodedata
from collections.abc import Sequence

SIGNS = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}
NO_TEXT, CIRCLE, JOINER = "∅", "\u25cc", "\u200d"
# Arabic letters that never join the one behind them (joining types R and U of Unicode).
# As first and last code points.
ENDING_SPANS = (
    *((0x621, 0x625), (0x627, 0x627), (0x629, 0x629), (0x62F, 0x632), (0x648, 0x648)),
    *((0x671, 0x677), (0x688, 0x699), (0x6C0, 0x6C0), (0x6C3, 0x6CB), (0x6CD, 0x6CD)),
    *((0x6CF, 0x6CF), (0x6D2, 0x6D3), (0x6D5, 0x6D5), (0x6EE, 0x6EF)),
)
ENDING = {chr(code) for first, last in ENDING_SPANS for code in range(first, last + 1)}


def labels_of(texts: Sequence[str]) -> list[str]:
    """Texts of consecutive tokens as labels.

    Spaces and ends of lines are signs, a mark whose letter is in the token before stands on a
    dotted circle, and Arabic letters keep the form they have in the whole text.
    """
    made = [visible(text) for text in texts]
    for k, (before, after) in enumerate(itertools.pairwise(texts)):
        if joins(before, after):
            made[k] += JOINER
            made[k + 1] = JOINER + made[k + 1]
    return made


def visible(text: str) -> str:
    """One token's text, nothing in it invisible."""
    if not text:
        return NO_TEXT
    circle = CIRCLE if unicodedata.category(text[0])[0] == "M" else ""
    return circle + "".join(SIGNS.get(c) or picture_of_control(c) for c in text)


def picture_of_control(character: str) -> str:
    """A control character's sign in Unicode; others are what they are."""
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else character


def joins(before: str, after: str) -> bool:
    """Whether the last letter of one text and the first of the next are written joined."""
    letters = [c for c in before if unicodedata.category(c)[0] != "M"]
    if not letters or not after:
        return False
    left, right = letters[-1], after[0]
    return is_arabic(left) and is_arabic(right) and left not in ENDING and right != "\u0621"


def is_arabic(character: str) -> bool:
    """Whether this is a letter of the Arabic script, in which letters join."""
    return unicodedata.bidirectional(character) == "AL" and 0x620 <= ord(character) < 0x700


def reads_right_to_left(texts: Sequence[str]) -> bool:
    """Whether most letters are of scripts that are written so."""
    kinds = [unicodedata.bidirectional(c) for text in texts for c in text]
    return sum(kind in ("R", "AL") for kind in kinds) > kinds.count("L")
