"""An explanation as one HTML page that needs nothing else: no network, no other file."""

import base64
import json
import zlib
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np

from graftlm.explain import Explanation
from graftlm.labels import labels_of, reads_right_to_left

TEMPLATE, PLACE = "attention_page.html", "{{ data }}"


def attention_page(explanation: Explanation) -> str:
    """The page: one text of HTML that works offline, to be written as UTF-8.

    It shows weights to 1/510 of their square root; exact are those of the explanation itself.

    Args:
        explanation: What `ComposedForCausalLM.explain` gave.
    """
    template = files("graftlm").joinpath(TEMPLATE).read_text(encoding="utf-8")
    # Within a script element, "<" could end it.
    data = json.dumps(page_data(explanation), allow_nan=False).replace("<", "\\u003c")
    return template.replace(PLACE, data)


def page_data(explanation: Explanation) -> dict[str, Any]:
    """What the page's script is given."""
    plain = replace(explanation, attention=[]).to_json()
    plain["attention"] = [packed(weights) for weights in explanation.attention]
    parts = {"anchor": explanation.tokens, **explanation.augmenting_tokens}
    plain["labels"] = {name: labels_of(texts) for name, texts in parts.items()}
    plain["right_to_left"] = {name: reads_right_to_left(texts) for name, texts in parts.items()}
    return plain


def packed(weights: np.ndarray) -> dict[str, Any]:
    """Weights as bytes: roots, because small weights need finer steps, then deflated."""
    steps = np.rint(255 * np.sqrt(weights.clip(0, 1))).astype(np.uint8)
    return {
        "shape": list(weights.shape),
        "bytes": base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode("ascii"),
    }
