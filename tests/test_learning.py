"""That bridges learn what can be learned, and nothing that would have to be seen first."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import graftlm.shared_tokens
from families import tiny, tiny_llama
from graftlm import Connection, compose
from graftlm.alignment import align

# ---- the leak test -------------------------------------------------------------------------

SYMBOLS = 13


def held_out_losses(model, steps: int = 60) -> list[float]:
    """Loss on fresh random tokens, while the bridges train on others of them."""
    optimizer = torch.optim.AdamW(model.bridges.parameters(), lr=0.03)
    generator = torch.Generator().manual_seed(17)

    def rows(count: int) -> torch.Tensor:
        return torch.randint(0, SYMBOLS, (count, 19), generator=generator)

    losses, unseen = [], rows(256)
    for step in range(steps):
        ids = rows(32)
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                losses.append(model.eval()(input_ids=unseen, labels=unseen).loss.item())
    return losses


def random_pair(**options):
    """Wide initial weights, so that the frozen head can be certain of something."""
    torch.manual_seed(19)
    size = {"vocab_size": SYMBOLS, "initializer_range": 0.2}
    connections = [
        Connection(augmenting_layer=0, anchor_layer=3),
        Connection(augmenting_layer=2, anchor_layer=1),
    ]
    options |= {"connections": connections, "num_heads": 2}
    return compose(tiny_llama(**size), tiny("gpt2", **size), **options)


@pytest.mark.parametrize(
    "position", ["distance", *(pytest.param(p, marks=pytest.mark.slow) for p in ("none", "rotary"))]
)
def test_random_tokens_cannot_be_predicted(position):
    """The entropy of uniform tokens is ln V; below it, a model has seen what it predicts."""
    losses = held_out_losses(random_pair(position=position))
    assert min(losses) > math.log(SYMBOLS) - 0.005, losses


def test_the_leak_test_finds_a_leak(monkeypatch):
    """Let each position read one token ahead, as the authors' code does and more."""

    def ahead(**arguments):
        return align(**arguments | {"past_length": arguments["past_length"] + 1})

    monkeypatch.setattr(graftlm.shared_tokens, "align", ahead)
    losses = held_out_losses(random_pair())
    assert losses[-1] < math.log(SYMBOLS) - 1, losses


# ---- a task that neither model solves ------------------------------------------------------

KEYS, VALUES, EQUALS = range(3, 43), range(43, 53), 53
HELD_OUT = 8


def fit(model, parameters, ids: torch.Tensor, steps: int, rate: float) -> None:
    """Learn the last token of each row."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -1]
        cross_entropy(logits, ids[:, -1]).backward()
        optimizer.step()


@torch.no_grad()
def solved(model, ids: torch.Tensor) -> float:
    """Share of the rows whose last token is predicted."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -1]
    return (logits.argmax(-1) == ids[:, -1]).float().mean().item()


def test_a_bridge_learns_to_look_up_and_the_anchor_goes_on_from_there():
    """m_A knows the value of each key, m_B what follows on each value; keys are held out.

    A key's value is arbitrary, so only m_A can know it, and what follows is m_B's alone.
    """
    generator = torch.Generator().manual_seed(23)
    keys, values = torch.tensor(list(KEYS)), torch.tensor(list(VALUES))
    value_of = values[torch.randint(len(values), (len(keys),), generator=generator)]
    follows = values[torch.randperm(len(values), generator=generator)]
    equals = torch.full_like(keys, EQUALS)

    know = torch.stack((keys, value_of), 1)
    follow = torch.stack((values, torch.full_like(values, EQUALS), follows), 1)
    both = torch.stack((keys, equals, follows[value_of - values[0]]), 1)
    train, test = both[HELD_OUT:], both[:HELD_OUT]

    augmenting = tiny_llama(hidden_size=40, intermediate_size=53, num_hidden_layers=2)
    anchor = tiny("llama", 1, hidden_size=48, intermediate_size=47)
    fit(augmenting, augmenting.parameters(), know, 120, 0.01)
    fit(anchor, anchor.parameters(), follow, 120, 0.01)
    assert solved(augmenting, know) == solved(anchor, follow) == 1
    assert solved(anchor, both) <= 0.25
    assert solved(augmenting, both) <= 0.25

    connections = [Connection(augmenting_layer=1, anchor_layer=0)]
    model = compose(anchor, augmenting, connections=connections)
    assert solved(model, both) <= 0.25
    fit(model, model.bridges.parameters(), train, 150, 0.01)
    assert solved(model, train) == 1
    assert solved(model, test) == 1
    assert solved(anchor, follow) == 1
    with model.anchor_only():
        assert solved(model, both) <= 0.25
