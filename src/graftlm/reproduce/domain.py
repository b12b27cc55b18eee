"""Long texts as training examples."""

import random
from collections.abc import Iterable

from graftlm.reproduce.example import Example, plain

LENGTH = 600  # characters


def shuffled_pieces(texts: Iterable[Example]) -> list[Example]:
    """Pieces of texts, cut at line ends where there are some, in an order drawn once."""
    found = [plain(piece) for text in texts for piece in pieces(text.target)]
    random.Random(0).shuffle(found)
    return found


def pieces(text: str) -> list[str]:
    """A text in pieces of at most `LENGTH` characters."""
    found = []
    while len(text) > LENGTH:
        end = text.rfind("\n", 1, LENGTH)
        end = text.rfind(" ", 1, LENGTH) if end < 0 else end
        end = LENGTH if end < 0 else end
        found.append(text[:end])
        text = text[end:].lstrip()
    return [*found, text] if text else found
