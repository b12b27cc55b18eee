"""Long texts as training examples."""

import random
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, islice

from graftlm.reproduce.example import Example, plain

LENGTH = 600  # characters
REPLAY = 5  # examples of D_C for each plain text among them


def shuffled_pieces(texts: Iterable[Example]) -> list[Example]:
    """Pieces of texts, cut at line ends where there are some, in an order drawn once."""
    found = [plain(piece) for text in texts for piece in pieces(text.target)]
    random.Random(0).shuffle(found)
    return found


def with_replay(composition: Sequence[Example], *corpora: Iterable[str]) -> list[Example]:
    """D_C with plain texts such as the anchor could predict before, so that it still can.

    Without them, whatever is trained learns that all text is of the task: after 1,500 verses,
    perplexity of English news rose from 32 to 44 (docs/log.md). Not in the paper.

    Args:
        composition: Examples of the task.
        corpora: Plain texts, of each equally many.
    """
    drawn = zip(*(shuffled_pieces(map(plain, texts)) for texts in corpora), strict=False)
    return [*composition, *islice(cycle(chain(*drawn)), len(composition) // REPLAY)]


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
