"""What the bridges do in one text, as plain arrays: `model.explain`.

    prompt -> greedy continuation, if asked for -> one pass over all of it, observed

Caching is exact, so what this pass shows is what every step of the continuation did.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm import decoder
from graftlm.augmenting_tokens import HOLE
from graftlm.config import Connection
from graftlm.greedy import GREEDY
from graftlm.own_tokens import has_reader, read_tokens
from graftlm.passes import Observed, PassInputs
from graftlm.spelling import Spelling, spell

if TYPE_CHECKING:
    from graftlm.causal_lm import ComposedForCausalLM

TopTokens = list[tuple[str, float]]  # the likeliest tokens and their probabilities


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Explanation:
    """What the bridges do in one text; `seq` anchor tokens, prompt and continuation.

    Args:
        tokens: The anchor's tokens, each as the text it adds; "" for one that ends within a
            character.
        num_prompt: How many of them are the prompt; the composed model wrote the others.
        connections: Whose bridges they are, in their order.
        scales: What each augmenting model's updates are multiplied by; one of scale 0 is not
            read, so all its numbers here are 0.
        augmenting_tokens: What each augmenting model reads, in its own tokens.
        branches: For each of these 0, or, with `alignment="prefix"`, the number of the ending
            it belongs to: how the text up to one anchor token would end.
        attention: For each connection (heads, seq, aug_seq), float32: how much each anchor token
            reads of each augmenting token. Rows sum to 1, or 0 where there is nothing to read.
        update_share: (connections, seq), float32: norm of the bridge's update over the norm of
            the hidden states it is added to.
        next_tokens: For "composed", "anchor" and each augmenting model: behind each anchor token
            its likeliest next tokens. An augmenting model with tokens of its own predicts behind
            those that the anchor token sees, which may end earlier in the text; there are none
            before it sees any. Models without a head have no entry.
        divergence: (seq,), float32: KL(composed || anchor) of the next token, in nats.
    """

    tokens: list[str]
    num_prompt: int
    connections: list[Connection]
    scales: dict[str, float]
    augmenting_tokens: dict[str, list[str]]
    branches: dict[str, list[int]]
    attention: list[np.ndarray]
    update_share: np.ndarray
    next_tokens: dict[str, list[TopTokens]]
    divergence: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """All of it in lists; numbers are rounded to 6 digits behind the point."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {
            "connections": [asdict(connection) for connection in self.connections],
            "attention": [rounded(weights) for weights in self.attention],
            "update_share": rounded(self.update_share),
            "divergence": rounded(self.divergence),
            "next_tokens": {
                name: [[[text, round(p, 6)] for text, p in tokens] for tokens in places]
                for name, places in self.next_tokens.items()
            },
        }


def rounded(array: np.ndarray) -> list[Any]:
    """An array as nested lists of short numbers."""
    return array.astype(np.float64).round(6).tolist()


@torch.no_grad()
def explain(
    model: "ComposedForCausalLM",
    text: str | None,
    input_ids: Tensor | Sequence[int] | None,
    max_new_tokens: int,
    top: int,
    num_prompt: int | None = None,
    turn: AbstractContextManager[Any] | None = None,
) -> Explanation:
    """See `ComposedForCausalLM.explain`.

    Args:
        model, text, input_ids, max_new_tokens, top, num_prompt: As there.
        turn: Entered anew for each pass of a model, so that others who run the models have
            their turns between; what is only computed from logits needs none.
    """
    turn = nullcontext() if turn is None else turn
    check_numbers(max_new_tokens, top)
    if model.is_anchor_only:
        raise ValueError(
            "explain was called within anchor_only, where no bridge does anything; call it outside"
        )
    ids = ids_of(model, text, input_ids)
    if num_prompt is None:
        num_prompt = ids.shape[1]
    elif max_new_tokens or not 1 <= num_prompt <= ids.shape[1]:
        raise ValueError(
            f"num_prompt is {num_prompt}, but must be from 1 to the {ids.shape[1]} tokens given, "
            f"with nothing more to write (max_new_tokens is {max_new_tokens})"
        )
    if max_new_tokens:
        with turn:
            ids = continue_greedily(model, ids, max_new_tokens)
    observed = Observed()
    is_prompt = (torch.arange(ids.shape[1], device=ids.device) < num_prompt).long()[None]
    inputs = PassInputs(
        input_ids=ids,
        prompt_mask=is_prompt if model.config.reads == "prompt" else None,
        observed=observed,
    )
    # Not the model itself, whose forward has no use for an observer.
    with turn:
        composed = model.model.run(
            model.anchor, inputs, past_key_values=None, use_cache=False, options={}
        ).logits[0]
    # Nor this: after training in mixed precision, its forward alone would be autocast.
    with turn:
        anchor = model.anchor(input_ids=ids, use_cache=False).logits[0]
    tokens = ids[0].tolist()
    texts, spellings = spell(Spelling.start(tokenizer_of(model, "anchor")), tokens)
    with turn:  # the readers remember what they have seen, and are shared
        read = {name: what_is_read(model, name, inputs) for name in model.augmenting}
    next_tokens = {
        "composed": [likeliest(x, s, top) for x, s in zip(composed, spellings[1:], strict=True)],
        "anchor": [likeliest(x, s, top) for x, s in zip(anchor, spellings[1:], strict=True)],
    }
    for name, part in model.augmenting.items():
        if part.get_output_embeddings() is not None:
            next_tokens[name] = predictions(part, read[name], top, turn)
    return Explanation(
        tokens=texts,
        num_prompt=num_prompt,
        connections=list(model.config.connections),
        scales={name: model.model.scale_of(name) for name in model.augmenting},
        augmenting_tokens={name: list(r.texts) for name, r in read.items()},
        branches={name: list(r.branches) for name, r in read.items()},
        attention=attention_of(model, observed, read, len(tokens)),
        update_share=update_share_of(model, observed, len(tokens)),
        next_tokens=next_tokens,
        divergence=np.array(
            [divergence(ours, theirs) for ours, theirs in zip(composed, anchor, strict=True)],
            dtype=np.float32,
        ),
    )


# ---- the text ----------------------------------------------------------------------------


def check_numbers(max_new_tokens: int, top: int) -> None:
    """Refuse numbers of tokens that cannot be.

    Raises:
        ValueError: If one is too small.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be 0 or more")
    if top < 1:
        raise ValueError(f"top is {top}, but must be a positive whole number")


def ids_of(
    model: "ComposedForCausalLM", text: str | None, input_ids: Tensor | Sequence[int] | None
) -> Int[Tensor, "1 seq"]:
    """The tokens of one text, where the model takes them.

    Raises:
        ValueError: If there is not exactly one text, or the tokenizer is not at hand.
    """
    if (text is None) == (input_ids is None):
        given = "neither" if text is None else "both"
        raise ValueError(f"explain got {given} of text and input_ids, but needs one of the two")
    if text is not None:
        if model.processor is None:
            raise ValueError(
                f"text is {text!r}, but the model has no tokenizer to split it with; pass "
                "input_ids=, or call set_tokenizers first"
            )
        input_ids = model.processor.tokenizer(text)["input_ids"]
    ids = torch.as_tensor(input_ids, dtype=torch.long, device=model.device)
    if ids.dim() not in (1, 2) or not ids.numel() or ids.numel() != ids.shape[-1]:
        raise ValueError(
            f"what to explain has shape {tuple(ids.shape)} in tokens, but must be one text of at "
            "least one: (seq,) or (1, seq)"
        )
    return ids.reshape(1, -1)


def continue_greedily(
    model: "ComposedForCausalLM", ids: Int[Tensor, "1 seq"], max_new_tokens: int
) -> Int[Tensor, "1 longer_seq"]:
    """The prompt with what the composed model writes behind it."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=0,  # a single row is never padded
        **GREEDY,
    )


def tokenizer_of(model: "ComposedForCausalLM", name: str) -> PreTrainedTokenizerBase | None:
    """A part's tokenizer, which is the anchor's unless it has its own."""
    if model.processor is None:
        return None
    return model.processor.all_tokenizers.get(name, model.processor.tokenizer)


# ---- what the augmenting models read -----------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """What one augmenting model reads of the text: `aug_seq` tokens, the keys of its bridges.

    Args:
        ids, texts: The tokens, and the text each adds; settled ones first.
        branches: As in `AugmentingTokens`.
        kept: Which keys of the pass they are; the others are holes.
        visible: For each anchor token, how many tokens of branch 0 it sees.
        branch: For each anchor token, the branch it sees besides, or 0.
        spellings: Before the first settled token and after each.
    """

    ids: list[int]
    texts: list[str]
    branches: list[int]
    kept: list[int]
    visible: list[int]
    branch: list[int]
    spellings: list[Spelling] = field(repr=False)

    def line(self, column: int) -> list[int]:
        """The tokens one anchor token sees, as one text."""
        branch = self.branch[column]
        ending = [i for i, b in zip(self.ids, self.branches, strict=True) if b == branch]
        return self.ids[: self.visible[column]] + (ending if branch else [])


def what_is_read(model: "ComposedForCausalLM", name: str, inputs: PassInputs) -> Read:
    """The tokens one augmenting model reads, whether it is switched on or not."""
    columns: dict[str, list[int]]
    if has_reader(model.model, name):
        tokens: Any = read_tokens(model.model, name, inputs)
        columns = {key: tensor[0].tolist() for key, tensor in tokens.items()}
    else:
        assert inputs.input_ids is not None
        ids = inputs.input_ids[0].tolist()
        length = len(ids) if inputs.prompt_mask is None else int(inputs.prompt_mask.sum())
        columns = {
            "input_ids": ids[:length],
            "ranks": list(range(length)),
            "branches": [0] * length,
            "bases": list(range(1, length + 1)),
            "visible": [min(k + 1, length) for k in range(len(ids))],
            "branch": [0] * len(ids),
        }
    kept = [k for k, rank in enumerate(columns["ranks"]) if rank != HOLE]
    ids, branches, bases = (
        [columns[key][k] for k in kept] for key in ("input_ids", "branches", "bases")
    )
    settled = branches.count(0)
    texts, spellings = spell(Spelling.start(tokenizer_of(model, name)), ids[:settled])
    spelling = spellings[-1]
    for k in range(settled, len(ids)):
        is_first = branches[k] != branches[k - 1]
        text, spelling = (spellings[bases[k]] if is_first else spelling).add(ids[k])
        texts.append(text)
    return Read(
        ids=ids,
        texts=texts,
        branches=branches,
        kept=kept,
        visible=columns["visible"],
        branch=columns["branch"],
        spellings=spellings,
    )


def attention_of(
    model: "ComposedForCausalLM", observed: Observed, read: dict[str, Read], length: int
) -> list[np.ndarray]:
    """The attention weights by connection; zeros where nothing was read."""
    found = []
    for index, connection in enumerate(model.config.connections):
        kept = read[connection.augmenting].kept
        weights = observed.attention.get(index)
        if weights is None:
            shape = (model.model.num_bridge_heads, length, len(kept))
            found.append(np.zeros(shape, dtype=np.float32))
        else:
            found.append(weights[0][..., kept].float().cpu().numpy())
    return found


def update_share_of(model: "ComposedForCausalLM", observed: Observed, length: int) -> np.ndarray:
    """How large the updates are, (connections, seq); zeros where nothing was read."""
    shares = np.zeros((len(model.config.connections), length), dtype=np.float32)
    for index, share in observed.update_share.items():
        shares[index] = share[0].float().cpu().numpy()
    return shares


# ---- next tokens -------------------------------------------------------------------------


def likeliest(logits: Float[Tensor, " vocab"], spelling: Spelling, top: int) -> TopTokens:
    """The likeliest tokens behind a text, with their probabilities."""
    probabilities = logits.double().softmax(-1)
    best = probabilities.topk(min(top, len(probabilities)))
    return [
        (spelling.add(token)[0] or "\ufffd", probability)
        for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def divergence(ours: Float[Tensor, " vocab"], theirs: Float[Tensor, " vocab"]) -> float:
    """KL(ours || theirs) of two distributions given by their logits, in nats."""
    log_ours, log_theirs = (x.double().log_softmax(-1).to("cpu") for x in (ours, theirs))
    # What we hold impossible adds nothing, whatever the other says of it.
    terms = torch.where(log_ours.isneginf(), 0.0, log_ours.exp() * (log_ours - log_theirs))
    return max(float(terms.sum()), 0.0)


def predictions(
    part: PreTrainedModel, read: Read, top: int, turn: AbstractContextManager[Any]
) -> list[TopTokens]:
    """What an augmenting model alone expects next, behind what each anchor token sees of it."""
    settled = read.ids[: read.branches.count(0)]
    known = logits_of(part, settled, turn) if settled else None
    predicted: list[TopTokens] = []
    lines: dict[tuple[int, ...], TopTokens] = {}
    for column in range(len(read.visible)):
        line = tuple(read.line(column))
        if line and line not in lines:
            ending = line[read.visible[column] :]
            if ending:  # not a beginning of the settled text, so it is run on its own
                logits = logits_of(part, line, turn)[-1]
            else:
                assert known is not None
                logits = known[len(line) - 1]
            _, spellings = spell(read.spellings[read.visible[column]], ending)
            lines[line] = likeliest(logits, spellings[-1], top)
        predicted.append(lines[line] if line else [])
    return predicted


def logits_of(
    part: PreTrainedModel, tokens: Iterable[int], turn: AbstractContextManager[Any]
) -> Float[Tensor, "aug_seq vocab"]:
    """The logits of a model that is run alone."""
    ids = torch.tensor([list(tokens)], device=decoder.device_of(part.get_input_embeddings()))
    arguments = decoder.call_arguments(
        part, attention_mask=None, query_length=ids.shape[1], cache=None
    )
    with turn:
        return part(input_ids=ids, **arguments).logits[0]
