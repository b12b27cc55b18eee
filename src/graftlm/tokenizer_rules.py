"""What a tokenizer does to a text before its model sees words, read off its JSON."""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from graftlm.characters import joins_backward, joins_forward

# Continuations that end a word, or carry it on, in all ways tokenizers know. Those that change
# most come first, since nothing is settled as soon as two of them disagree from the beginning.
LITERAL_PROBES = ("a", " ", "s", " a", "  ", "▁", "▁a", ".", "1", "\n", "的")
PROBES = (
    *("a", " ", "s", "1", ".", "\n", " a", "'", "A", "e", "的", "\u0301", "\t", "t", "  "),
    *("m", "d", "l", "ll", "re", "ve", "'s", "'t", "'ll", "'re", "'ve", "'S", "T", "LL", "Aa"),
    *("12", "123", "1234", "1a", " 1", ".a", "..", ". ", ".\n", ",", "-", "_", "/", "#", "<", "("),
    *("\n\n", "\r", "\r\n", "\n ", "\n a", " \n", "  \n", " \n a", "   a", "\t\t", "\ta", " ."),
    *("\u00a0", "\u3000", "\u2028", "。", "あ", "ア", "ー", "한", "ᅡ", "ᆨ", "я", "Я", "λ", "é"),
    *("ب", "َ", "א", "क", "ि", "ा", "्", "ก", "ั", "า", "๑", "٣", "२", "²", "½", "Ⅷ", "€", "`", "``"),
    *("''", "😀", "\u200d", "\ufe0f", "🏽", "🇩", "\u20e3", "ǅ", "ʰ", "\x00", "\u200b", "\ufffd"),
)
# Normalizers that join characters with those before them; and such as look at each on its own.
COMPOSING = frozenset({"NFC", "NFD", "NFKC", "NFKD", "StripAccents", "BertNormalizer"})
BY_CHARACTER = frozenset({"Prepend", "Replace", "Lowercase", "Strip", "Nmt", "ByteLevel"})


class Rules:
    """What a tokenizer's normalizer and pre-tokenizer may do, read off its JSON.

    Args:
        spec: The tokenizer's JSON.

    Attributes:
        may_cut_words: Whether a word may be begun at any of its tokens.
        is_one_word: Whether all text between two added tokens is one word of a BPE model, which
            may be begun at any token.
        num_words: How many settled words the next one depends on, at most.
        probes: Continuations to try.
    """

    def __init__(self, spec: dict[str, Any]):
        normalizers = steps(spec["normalizer"], "normalizers")
        splitters = [
            step
            for step in steps(spec["pre_tokenizer"], "pretokenizers")
            if not never_splits(step, normalizers)
        ]
        flags = ("lstrip", "rstrip", "single_word")
        flagged = any(token[flag] for token in spec["added_tokens"] for flag in flags)
        self.is_one_word = not splitters and spec["model"]["type"] == "BPE" and not flagged
        self.num_words = int(flagged or len(splitters) > 1 or any(map(looks_back, splitters)))
        literal = all(step["type"] in ("Metaspace", "Split") for step in splitters) and all(
            "Regex" not in step.get("pattern", {}) for step in splitters
        )
        self.probes = LITERAL_PROBES if literal else PROBES
        kinds = {step["type"] for step in normalizers}
        # Tokens of BPE go on alike from any token. Unigram adds up rounded scores, which may
        # settle a tie otherwise when begun elsewhere.
        self.may_cut_words = spec["model"]["type"] == "BPE"
        self.splits_by_kind = (
            kinds <= {"NFC"}
            and self.num_words == 0
            and len(splitters) == 1
            and splits_by_kind(splitters[0])
        )
        self.joins_any = not kinds <= {*COMPOSING, *BY_CHARACTER}
        self.joins = self.joins_any or bool(kinds & COMPOSING)

    def kinds(self, window: str) -> str | None:
        """One character for each of the window, equal where the pre-tokenizer sees no difference.

        None where that is not known.
        """
        if not self.splits_by_kind:
            return None
        if self.joins and not unicodedata.is_normalized("NFC", window):
            return None
        if self.joins and any(map(joins_backward, window)):  # several tokens may end in one place
            return None
        if "'" in window:  # letters of contractions are told apart
            return "".join(c if c.casefold().isascii() else kind(c) for c in window)
        return "".join(map(kind, window))

    def known(self, window: str) -> int:
        """How many characters of a window the normalizer will not join with later ones."""
        if not self.joins:
            return len(window)
        end = len(window)
        while end and joins_backward(window[end - 1]):
            end -= 1
        if not end or window[end - 1].isspace():
            return end
        if end < len(window) or self.joins_any or joins_forward(window[end - 1]):
            return end - 1
        return end


class AddedTokens:
    """Tokens that are cut out of a text before all others.

    Args:
        spec: The tokenizer's JSON.
        tokenizer: Made of it.

    Attributes:
        ids: Those that occur in text; special ones do not.
    """

    def __init__(self, spec: dict[str, Any], tokenizer: Tokenizer):
        tokens = spec["added_tokens"]
        self.ids = frozenset(token["id"] for token in tokens if not token["special"])
        self.normalizer = tokenizer.normalizer
        self.raw = beginnings(token["content"] for token in tokens)
        self.normalized: frozenset[str] = frozenset()
        if self.normalizer is not None:
            contents = [token["content"] for token in tokens if token["normalized"]]
            self.normalized = beginnings(map(self.normalizer.normalize_str, contents))
        # A token that must stand alone is not settled at its own end.
        self.raw |= {token["content"] for token in tokens if token["single_word"]}
        self.strips = any(token["lstrip"] for token in tokens)
        self.longest = max(map(len, self.raw | self.normalized), default=0)

    def places(self, window: str) -> list[int]:
        """Where an added token may begin that the window does not end yet."""
        size = len(window)
        starts = range(max(0, size - self.longest), size)
        found = {n for n in starts if window[n:] in self.raw}
        if self.normalizer is not None and self.normalized:
            text = self.normalizer.normalize_str(window)
            lengths = [n for n in range(1, self.longest + 1) if text[-n:] in self.normalized]
            if lengths:  # which raw characters these are is not known exactly
                found |= set(range(max(0, size - 2 * max(lengths) - 2), size))
        if self.strips:  # the spaces before it, if it comes next
            found |= {len(window[:n].rstrip()) for n in {*found, size}} - {size}
        return sorted(found)


def steps(component: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer in order."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [step for part in component[name] for step in steps(part, name)]


def never_splits(step: dict[str, Any], normalizers: list[dict[str, Any]]) -> bool:
    """Whether a pre-tokenizer leaves text in one piece."""
    if step["type"] == "ByteLevel":
        return not step["use_regex"]
    if step["type"] == "Metaspace":
        return not step["split"]
    pattern = step.get("pattern", {}).get("String")
    # Gemma: splits at spaces, after these were replaced.
    return pattern is not None and any(
        normalizer["type"] == "Replace"
        and normalizer["pattern"] == step["pattern"]
        and pattern not in normalizer["content"]
        for normalizer in normalizers[-1:]
    )


def splits_by_kind(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer tells only Unicode categories, ASCII characters and spaces apart.

    Of the ASCII letters, only those of contractions, behind an apostrophe.
    """
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    pattern = step.get("pattern", {}).get("Regex")
    if step["type"] != "Split" or pattern is None or step["invert"] or not pattern.isascii():
        return False
    plain = re.sub(r"\\[pP]\{[A-Z][a-z]?\}|\\[sSrnt]|\(\?i:|\{\d(,\d)?\}", "", pattern)
    return "\\" not in plain and set(re.findall(r"[A-Za-z0-9]", plain)) <= set("sdmtlvreSDMTLVRE")


@functools.cache
def kind(character: str) -> str:
    """A character that stands for all of its Unicode category."""
    category = unicodedata.category(character)
    if category == "Cn" or character.isspace() or (character.isascii() and category[0] not in "LN"):
        return character
    return chr(0xE000 + 128 * ord(category[0]) + ord(category[1]))


def looks_back(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer may look at text before the word it cuts off."""
    known = ("Metaspace", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit")
    if step["type"] in (*known, "BertPreTokenizer", "CharDelimiterSplit"):
        return False
    if step["type"] != "Split":
        return True
    pattern = step["pattern"].get("Regex", "")
    return re.search(r"\(\?<|(?<!\[)\^|\\[bBAGK]", pattern) is not None


def without_prefix(spec: dict[str, Any]) -> dict[str, Any] | None:
    """The tokenizer as it is in the middle of a text, if it treats the beginning otherwise."""
    normalizers = [
        {**step, "strip_left": False} if step["type"] == "Strip" else step
        for step in steps(spec["normalizer"], "normalizers")
        if step["type"] != "Prepend"
    ]
    splitters = steps(spec["pre_tokenizer"], "pretokenizers")
    if splitters and splitters[0]["type"] == "Metaspace":
        splitters[0] = {**splitters[0], "prepend_scheme": "never"}
    if splitters and splitters[0]["type"] == "ByteLevel":
        splitters[0] = {**splitters[0], "add_prefix_space": False}
    if normalizers == steps(spec["normalizer"], "normalizers") and splitters == steps(
        spec["pre_tokenizer"], "pretokenizers"
    ):
        return None
    return {
        **spec,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters} if splitters else None,
    }


def begins_once(spec: dict[str, Any]) -> bool:
    """Whether a space is put before a whole text only, and not behind its special tokens."""
    splitters = steps(spec["pre_tokenizer"], "pretokenizers")
    return bool(splitters) and splitters[0].get("prepend_scheme") == "first"


def beginnings(contents: Iterable[str]) -> frozenset[str]:
    """What these begin with, themselves left out."""
    return frozenset(content[:n] for content in contents for n in range(1, len(content)))
