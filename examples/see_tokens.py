"""Draw how two tokenizers split a text, and what each anchor token sees of the other's tokens.

python examples/see_tokens.py ANCHOR AUGMENTING "Some text." --output tokens.png

ANCHOR and AUGMENTING are paths (.gguf files too) or hub ids of models or of their tokenizers.
"""

import argparse
import sys

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftlm.gguf import resolve
from graftlm.reading import RowPass, TextReader, read_row

INK, PAPER, SETTLED, BRANCH = "#1b1f24", "#ffffff", "#3b6fb6", "#d9822b"
TITLES = {
    "committed": "committed: tokens that no continuation can change",
    "prefix": "prefix: also how the text so far would end (orange),\n"
    "run anew for each anchor token",
}


def label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text, with visible spaces and ends of lines."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    return str(text).replace(" ", "␣").replace("\n", "↵") or "∅"


def draw(
    axes: Axes,
    rule: str,
    anchor: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    text: str,
) -> None:
    """One rule: a row for each anchor token, a column for each augmenting token."""
    ids = anchor(text)["input_ids"]
    row: RowPass = read_row(TextReader(anchor, other, rule), None, ids, [True] * len(ids))
    settled = [k for k, branch in enumerate(row.branches) if branch == 0]
    longest = max((row.branches.count(branch) for branch in set(row.branch) if branch), default=0)
    width = max(len(settled), *(n for n in row.num_seen)) if longest else len(settled)
    for line, column in enumerate(range(len(ids))):
        ending = {
            row.ranks[k]: row.ids[k]
            for k, branch in enumerate(row.branches)
            if branch and branch == row.branch[column]
        }
        for rank, token in ending.items():
            cell(axes, rank, line, label(other, token), BRANCH)
        for k in settled:
            if row.ranks[k] not in ending:
                seen = row.ranks[k] < row.visible[column]
                cell(axes, row.ranks[k], line, label(other, row.ids[k]), SETTLED if seen else None)
    axes.set_yticks(range(len(ids)), [label(anchor, token) for token in ids], fontsize=9)
    axes.set_xticks([])
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(len(ids) - 0.5, -0.5)
    axes.set_title(TITLES[rule], fontsize=10, loc="left", color=INK)
    axes.set_ylabel("anchor tokens, as they are written", fontsize=9)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def cell(axes: Axes, column: int, line: int, text: str, color: str | None) -> None:
    """One augmenting token: filled if it is seen, faint if not."""
    face, ink = (color, PAPER) if color else ("#f0f2f4", "#b6bcc4")
    axes.add_patch(
        plt.Rectangle((column - 0.47, line - 0.42), 0.94, 0.84, facecolor=face, edgecolor=PAPER)
    )
    axes.text(column, line, text, ha="center", va="center", fontsize=9, color=ink)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("anchor", metavar="ANCHOR")
    parser.add_argument("augmenting", metavar="AUGMENTING")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--output", metavar="FILE", default="tokens.png")
    args = parser.parse_args()
    anchor = AutoTokenizer.from_pretrained(resolve(args.anchor))
    other = AutoTokenizer.from_pretrained(resolve(args.augmenting))
    num_rows, num_columns = (len(t(args.text)["input_ids"]) for t in (anchor, other))
    # Columns that hold a short word: in wider ones, a page would show the words smaller.
    size = max(5.0, 1.0 + 0.7 * num_columns), 0.5 + 0.56 * num_rows
    figure, panels = plt.subplots(len(TITLES), 1, figsize=size, layout="constrained")
    for axes, rule in zip(panels, TITLES, strict=True):
        draw(axes, rule, anchor, other, args.text)
    figure.savefig(args.output, dpi=150, facecolor=PAPER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
