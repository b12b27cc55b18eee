"""Sentences to translate into English: what is trained on, what is held out, and the prompts.

Chapters are held out whole, and of their verses those that say again what a training verse says
are dropped: the text repeats itself. A second test is the Declaration of Human Rights.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from graftlm.reproduce.near_duplicates import unlike
from graftlm.reproduce.packages import fetch
from graftlm.reproduce.translate_sources import (
    DECLARATION,
    ENGLISH,
    LANGUAGES,
    QURAN,
    Language,
    Verse,
    declaration_pairs,
    read_verses,
)

TEST_CHAPTERS = frozenset(range(6, 115, 6))
DEVELOPMENT_CHAPTERS = frozenset(range(9, 115, 12))  # what settings were chosen by
SHORTEST, LONGEST = 20, 120  # characters of a verse; the longest ones would eat the budget
LONGEST_PARAGRAPH = 250  # characters of the Declaration
LARGEST_RATIO = 2.0  # of lengths; beyond it a translation joins several verses
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence, and what a model is to say about it."""

    language: str
    source: str
    target: str
    source_name: str = ""
    target_name: str = "English"

    @property
    def opening(self) -> str:
        """What stands before the source."""
        return f"{self.source_name or self.language}:"

    @property
    def closing(self) -> str:
        """What stands between the source and the target."""
        return f"\n{self.target_name}:"

    @property
    def prompt(self) -> str:
        """What a model is given."""
        return f"{self.opening} {self.source}{self.closing}"

    @property
    def completion(self) -> str:
        """What it is to say."""
        return f" {self.target}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The pairs of one experiment.

    Args:
        training: In the order of the text.
        development: What settings were chosen by.
        tests: By the name of the test and of the language.
        shots: Examples for a prompt, from the training pairs, by language.
        dropped: Test pairs left out because training says the same, by language.
    """

    training: list[Pair]
    development: list[Pair]
    tests: dict[str, dict[str, list[Pair]]]
    shots: dict[str, list[Pair]]
    dropped: dict[str, int]


def load_corpus(folder: Path | None = None, *, num_tests: int = 150, num_shots: int = 4) -> Corpus:
    """The verses and the Declaration in all languages.

    Args:
        folder: Where the archives are, or are put.
        num_tests: Test verses of each language, drawn once and for all.
        num_shots: Examples in a few-shot prompt.
    """
    quran, declaration = fetch(QURAN, folder), fetch(DECLARATION, folder)
    english = read_verses(quran, ENGLISH)
    corpus = Corpus(
        training=[], development=[], tests={"verses": {}, "declaration": {}}, shots={}, dropped={}
    )
    for language in LANGUAGES:
        verses = list(zip(read_verses(quran, language), english, strict=True))
        add_language(corpus, language, verses, num_shots)
        corpus.tests["declaration"][language.name] = [
            Pair(language.name, source, target)
            for source, target in declaration_pairs(declaration, language)
            if SHORTEST <= len(target) <= LONGEST_PARAGRAPH
        ]
    keep_new_tests(corpus, num_tests)
    return corpus


def add_language(
    corpus: Corpus,
    language: Language,
    verses: Sequence[tuple[Verse, Verse]],
    num_shots: int,
) -> None:
    """Split one language's verses by chapter."""
    training: list[Pair] = []
    development: list[Pair] = []
    test: list[Pair] = []
    for theirs, ours in verses:
        if not is_usable(theirs.text, ours.text):
            continue
        held_out = test if theirs.chapter in TEST_CHAPTERS else development
        is_training = theirs.chapter not in TEST_CHAPTERS | DEVELOPMENT_CHAPTERS
        (training if is_training else held_out).append(Pair(language.name, theirs.text, ours.text))
    corpus.training.extend(training)
    corpus.development.extend(random.Random(0).sample(development, min(len(development), 60)))
    corpus.tests["verses"][language.name] = test
    corpus.shots[language.name] = few_shots(training, num_shots)


def keep_new_tests(corpus: Corpus, num_tests: int) -> None:
    """Drop test verses that training says again, in whatever language; draw from the others."""
    for name, test in corpus.tests["verses"].items():
        new = unlike(test, corpus.training)
        corpus.dropped[name] = len(test) - len(new)
        drawn = random.Random(0).sample(new, min(num_tests, len(new)))
        corpus.tests["verses"][name] = drawn


def is_usable(source: str, target: str) -> bool:
    """Whether both sides are of fair length, and of about the same."""
    lengths = len(source), len(target)
    in_range = min(lengths) >= SHORTEST and max(lengths) <= LONGEST
    return in_range and max(lengths) <= LARGEST_RATIO * min(lengths)


def few_shots(training: Sequence[Pair], number: int) -> list[Pair]:
    """Examples of middling length, spread over the training pairs."""
    middling = [pair for pair in training if 40 <= len(pair.source) <= 80]
    return [middling[len(middling) * (2 * k + 1) // (2 * number)] for k in range(number)]


# ---- tokens ------------------------------------------------------------------------------


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, nothing put before or behind."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def feature(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokens and labels of a pair: the loss is on the target and on the end of the text."""
    prompt = plain_ids(tokenizer, pair.prompt)
    target = [*plain_ids(tokenizer, pair.completion), tokenizer.eos_token_id]
    return {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}


def wrong_reading(
    pair: Pair, donors: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, *, with_target: bool
) -> list[int]:
    """What an augmenting model reads in the control: another sentence, of the same length.

    The sources of `donors` fill the place of the pair's own, token for token.
    """
    size = len(plain_ids(tokenizer, pair.prompt))
    opening = plain_ids(tokenizer, pair.opening)
    closing = plain_ids(tokenizer, pair.closing)
    room = size - len(opening) - len(closing)
    filling: list[int] = []
    while len(filling) < room:
        for donor in donors:
            filling += plain_ids(tokenizer, f" {donor.source}")
    ids = opening + filling[: max(room, 0)] + closing
    ids = ids[-size:]
    if with_target:
        ids += [*plain_ids(tokenizer, pair.completion), tokenizer.eos_token_id]
    return ids


def donors_of(pairs: Sequence[Pair], number: int = 3) -> list[list[Pair]]:
    """For each pair the next ones of its language that say something else, in a ring.

    Raises:
        ValueError: If a language has no other sentence.
    """
    by_language: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_language[pair.language].append(pair)
    seen: dict[str, int] = defaultdict(int)
    donors = []
    for pair in pairs:
        ring = by_language[pair.language]
        place = seen[pair.language]
        seen[pair.language] += 1
        later = [ring[(place + k) % len(ring)] for k in range(1, len(ring))]
        found = [other for other in later if other.source != pair.source]
        if not found:
            raise ValueError(
                f"{pair.language} has no second sentence, which an augmenting model could read in "
                "the place of the first; ask for more tests or texts"
            )
        donors.append(found[:number])
    return donors


def training_order(pairs: Sequence[Pair], size: int, batch_size: int, seed: int) -> list[Pair]:
    """Draw the training pairs of a run and put them in batches of about equal length.

    Every system of a seed sees these pairs in this order.
    """
    rng = random.Random(seed)
    drawn: list[Pair] = []
    while len(drawn) < size:
        drawn += rng.sample(list(pairs), len(pairs))
    drawn = drawn[: max(size - size % batch_size, batch_size)]
    ordered: list[Pair] = []
    window = 16 * batch_size
    for start in range(0, len(drawn), window):
        part = sorted(drawn[start : start + window], key=lambda pair: len(pair.source))
        batches = [part[k : k + batch_size] for k in range(0, len(part), batch_size)]
        rng.shuffle(batches)
        ordered += [pair for batch in batches for pair in batch]
    return ordered
