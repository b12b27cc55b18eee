"""Which characters Unicode normalisation may join with their neighbours."""

import functools
import unicodedata


def with_marks(text: str, begin: int, end: int) -> tuple[int, int]:
    """A token's place, characters and the marks on them counting as one."""
    while 0 < begin < len(text) and joins_backward(text[begin]):
        begin -= 1
    while 0 < end < len(text) and joins_backward(text[end]):
        end += 1
    return begin, end


@functools.cache
def joins_backward(character: str) -> bool:
    """Whether a normalizer may join a character with the one before it."""
    first = unicodedata.normalize("NFKD", character)[0]
    return unicodedata.category(first) in ("Mn", "Mc", "Me", "Cf") or is_jamo(first)


@functools.cache
def joins_forward(character: str) -> bool:
    """Whether a normalizer may join a character with one that joins backward."""
    parts = unicodedata.normalize("NFKD", character)
    return unicodedata.category(parts[-1])[0] == "M" or any(
        part in starters() for part in (character, parts[-1], unicodedata.normalize("NFC", parts))
    )


def is_jamo(character: str) -> bool:
    """Whether a character is a vowel or final consonant of a Hangul syllable."""
    return "\u1160" <= character <= "\u11ff" or "\ud7b0" <= character <= "\ud7ff"


@functools.cache
def starters() -> frozenset[str]:
    """Characters that Unicode composes with a following one."""
    hangul = {chr(code) for code in (*range(0x1100, 0x1200), *range(0xAC00, 0xD7A4))}
    decompositions = (unicodedata.decomposition(chr(code)) for code in range(0x30000))
    pairs = (text.split() for text in decompositions if text and text[0] != "<")
    return frozenset(hangul | {chr(int(pair[0], 16)) for pair in pairs if len(pair) == 2})
