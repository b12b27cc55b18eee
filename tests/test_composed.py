"""The composed model in one forward pass: padding, packing, order, freezing, sharing, copies."""

import copy
import gc
import hashlib
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel
from transformers.utils.generic import is_flash_attention_requested

from families import (
    REPRESENTATIVE,
    VOCABULARY,
    assert_cached_is_uncached,
    generated,
    left_padded,
    open_bridges,
    tiny,
    tiny_llama,
    token_ids,
    uncached_logits,
)
from graftlm import Connection, compose

TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def digest(model: nn.Module) -> str:
    """A hash over every byte of a model's weights and buffers."""
    state = hashlib.sha256()
    for name, value in sorted((*model.named_parameters(), *model.named_buffers())):
        state.update(name.encode() + value.detach().numpy().tobytes())
    return state.hexdigest()


def hooks_on(model: nn.Module) -> int:
    """Forward hooks anywhere in a model."""
    return sum(len(module._forward_hooks) for module in model.modules())


def train_a_step(model, ids: torch.Tensor, rate: float = 0.1) -> float:
    """One step of plain gradient descent on the bridges; the loss before it."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= rate * parameter.grad
    return loss.item()


@pytest.fixture
def model():
    """A Llama that reads a GPT-2, with open bridges."""
    return open_bridges(compose(tiny_llama(), tiny("gpt2"), every=1))


# ---- padding, packing and order ------------------------------------------------------------


@pytest.mark.parametrize("position", ["none", "distance", "rotary"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_real_position(side, position):
    heads = {"num_heads": 2}
    model = open_bridges(compose(tiny_llama(), tiny("gpt2"), every=1, position=position, **heads))
    ids, alone = token_ids(1, 6), {}
    alone = model(ids, use_cache=False).logits
    filler = token_ids(1, 5, seed=9)
    parts, ones, zeros = (ids, filler), torch.ones(1, 6).long(), torch.zeros(1, 5).long()
    if side == "left":
        padded, mask = torch.cat(parts[::-1], 1), torch.cat((zeros, ones), 1)
    else:
        padded, mask = torch.cat(parts, 1), torch.cat((ones, zeros), 1)
    logits = uncached_logits(model, padded, mask)
    assert_close(logits[mask.bool()], alone[0], **TOLERANCE)


@pytest.mark.parametrize("family", sorted(REPRESENTATIVE - {"mamba"}))
@torch.no_grad()
def test_a_row_of_a_padded_batch_is_the_row_alone(family):
    model = open_bridges(compose(tiny(family), tiny_llama(), every=2))
    batch = left_padded([7, 11, 4])
    together = uncached_logits(model, **batch)
    for row, length in enumerate([7, 11, 4]):
        ids = batch["input_ids"][row : row + 1, -length:]
        alone = uncached_logits(model, ids, torch.ones_like(ids))
        assert_close(together[row, -length:], alone[0], atol=5e-6, rtol=1e-5)


@torch.no_grad()
def test_the_order_and_the_size_of_a_batch_do_not_matter(model):
    batch = left_padded([7, 11, 4, 11])
    logits = uncached_logits(model, **batch)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = uncached_logits(model, **{name: value[order] for name, value in batch.items()})
    seen = batch["attention_mask"].bool()
    assert_close(shuffled[seen[order]], logits[order][seen[order]], **TOLERANCE)
    first = uncached_logits(model, **{name: value[:2] for name, value in batch.items()})
    assert_close(first[seen[:2]], logits[:2][seen[:2]], **TOLERANCE)


@pytest.mark.parametrize("position", ["none", "distance", "rotary"])
def test_a_row_of_nothing_but_padding_gives_no_nan(position):
    model = compose(tiny_llama(), tiny("gpt2"), position=position, num_heads=2)
    open_bridges(model).train()
    batch = left_padded([5, 0])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    output.loss.backward()
    assert output.logits.isfinite().all()
    gradients = [p.grad for p in model.bridges.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("position", ["none", "distance", "rotary"])
@pytest.mark.parametrize("augmenting", ["gpt2", "qwen3", "gemma3_text"])
@torch.no_grad()
def test_packed_documents_are_the_documents_alone(augmenting, position):
    """Rotary and distance see slots; only differences count, so a packed one is not moved."""
    model = open_bridges(
        compose(tiny_llama(), tiny(augmenting), every=1, position=position, num_heads=2)
    )
    documents = [token_ids(1, length, seed=length) for length in (5, 3, 7)]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    together = model(packed, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(d, use_cache=False).logits for d in documents], 1)
    assert_close(together, alone, **TOLERANCE)
    without = model(packed, use_cache=False).logits
    assert (without - alone).abs().max() > 0.01


# ---- several connections and models --------------------------------------------------------


@torch.no_grad()
def test_several_models_add_up_whatever_order_they_are_named_in():
    connections = [
        Connection(augmenting="code", augmenting_layer=1, anchor_layer=3),
        Connection(augmenting="sw", augmenting_layer=0, anchor_layer=3),
        Connection(augmenting="sw", augmenting_layer=2, anchor_layer=3),
    ]

    def composed(names, connections):
        bases = {"code": tiny("gpt2"), "sw": tiny("bloom")}
        torch.manual_seed(7)
        model = compose(tiny_llama(), {n: bases[n] for n in names}, connections=connections)
        return open_bridges(model)

    ids = token_ids(2, 9)
    model = composed(("code", "sw"), connections)
    other = composed(("sw", "code"), connections[::-1])
    logits = model(ids).logits
    assert torch.equal(other(ids).logits, logits)

    def last_states():
        return captured(model, ids)

    def captured(model, ids):
        kept = []
        handle = model.anchor.model.layers[3].register_forward_hook(
            lambda *call: kept.append(call[2])
        )
        model(ids)
        handle.remove()
        return kept[0]

    both = last_states()
    model.set_scale("sw", 0)
    code = last_states()
    model.set_scale("sw", 1)
    model.set_scale("code", 0)
    swahili = last_states()
    model.set_scale("sw", 0)
    anchor = last_states()
    assert (code - anchor).abs().max() > 0.01
    assert (swahili - anchor).abs().max() > 0.01
    assert_close(both - anchor, (code - anchor) + (swahili - anchor), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("anchor", "augmenting"),
    [({"num_hidden_layers": 2}, {"num_hidden_layers": 7}), ({}, {"hidden_size": 60})],
)
@torch.no_grad()
def test_an_augmenting_model_may_be_larger_than_the_anchor(anchor, augmenting):
    model = open_bridges(compose(tiny_llama(**anchor), tiny("gpt2", **augmenting), every=1))
    assert_cached_is_uncached(model, left_padded([9, 5]))


@torch.no_grad()
def test_one_model_may_be_anchor_and_augmenting_model_at_once():
    """Its layers carry both kinds of hooks; each must act in its own part of the pass."""
    base = tiny_llama()
    model = open_bridges(compose(base, {"self": base}, every=1))
    twin = open_bridges(compose(tiny_llama(), {"self": tiny_llama()}, every=1))
    twin.bridges.load_state_dict(model.bridges.state_dict())
    ids = token_ids(2, 9)
    alone = base(ids).logits
    assert torch.equal(model(ids).logits, twin(ids).logits)
    assert torch.equal(base(ids).logits, alone)
    assert_cached_is_uncached(model, left_padded([9, 5]))


# ---- the augmenting model ------------------------------------------------------------------


def calls_of(layers) -> list[int]:
    """How often each layer is called from now on; a list that keeps counting."""
    counts = [0] * len(layers)
    for index, layer in enumerate(layers):

        def count(module, args, output, index=index):
            counts[index] += 1

        layer.register_forward_hook(count)
    return counts


@torch.no_grad()
def test_an_augmenting_model_runs_no_layer_above_its_connections_and_no_head():
    augmenting = tiny("gpt2", num_hidden_layers=5)
    ids = token_ids(2, 9)
    before, names = augmenting(ids).logits, list(augmenting.state_dict())
    model = compose(
        tiny_llama(), augmenting, connections=[Connection(augmenting_layer=2, anchor_layer=1)]
    )
    layers, head = calls_of(augmenting.transformer.h), calls_of([augmenting.lm_head])
    model(ids)
    model.generate(**left_padded([5, 3]), max_new_tokens=4, eos_token_id=None, do_sample=False)
    assert layers == [5, 5, 5, 0, 0]
    assert head == [0]
    assert augmenting.config.num_hidden_layers == len(augmenting.transformer.h) == 5
    assert list(augmenting.state_dict()) == names
    assert torch.equal(augmenting(ids).logits, before)


@torch.no_grad()
def test_a_headless_augmenting_model_gives_the_same(model):
    headless = AutoModel.from_config(tiny("gpt2").config).eval()
    headless.load_state_dict(tiny("gpt2").transformer.state_dict())
    other = compose(tiny_llama(), headless, every=1)
    other.bridges.load_state_dict(model.bridges.state_dict())
    ids = token_ids(2, 9)
    assert torch.equal(other(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_model_that_is_switched_off_is_not_run():
    augmenting = tiny("gpt2")
    model = open_bridges(compose(tiny_llama(), {"code": augmenting}))
    ids = token_ids(2, 9)
    counts = calls_of(augmenting.transformer.h)
    alone = model.anchor(ids).logits
    model.set_scale("code", 0)
    assert torch.equal(model(ids).logits, alone)
    assert torch.equal(
        generated(model, left_padded([5, 3]), 4)[1],
        generated(model.anchor, left_padded([5, 3]), 4)[1],
    )
    assert counts == [0, 0, 0]
    model.set_scale("code", 0.5)
    half = model(ids).logits
    model.set_scale("code", 1)
    assert counts == [1, 1, 1]
    assert not torch.equal(half, alone)
    assert not torch.equal(half, model(ids).logits)


@pytest.mark.parametrize("family", sorted(REPRESENTATIVE))
@torch.no_grad()
def test_anchor_only_is_the_anchor_bit_for_bit(family):
    model = open_bridges(compose(tiny(family), tiny_llama(), every=2))
    ids, batch = token_ids(2, 9), left_padded([5, 3])
    alone, opened = model.anchor(ids).logits, model(ids).logits
    with model.anchor_only():
        assert model.is_anchor_only
        assert torch.equal(model(ids).logits, alone)
        for mine, theirs in zip(
            generated(model, batch, 5), generated(model.anchor, batch, 5), strict=True
        ):
            assert torch.equal(mine, theirs)
    assert not model.is_anchor_only
    assert torch.equal(model(ids).logits, opened)
    with pytest.raises(KeyError), model.anchor_only():
        raise KeyError
    assert not model.is_anchor_only


@torch.no_grad()
def test_scaled_is_set_scale_for_a_while(model):
    """Half, nothing and all of it, in prefill and in decoding; nested; also after an error."""
    ids, batch, name = token_ids(2, 9), left_padded([5, 3]), "augmenting"

    def run():
        return model(ids).logits, *generated(model, batch, 5)

    expected = {}
    for scale in (0, 0.5, 1):
        model.set_scale(name, scale)
        expected[scale] = run()
    assert not torch.equal(expected[0.5][0], expected[1][0])

    def check(scale):
        for found, wanted in zip(run(), expected[scale], strict=True):
            assert torch.equal(found, wanted)

    with model.scaled({name: 0.5}):
        check(0.5)
        with model.scaled({name: 0}):
            check(0)
            assert torch.equal(model(ids).logits, model.anchor(ids).logits)
        check(0.5)
        assert model.config.scales == {name: 1.0}
    with pytest.raises(KeyError), model.scaled({name: 0}):
        raise KeyError
    check(1)
    other = open_bridges(compose(tiny_llama(), tiny("gpt2"), every=1))
    with other.scaled({name: 0}):
        check(1)


@torch.no_grad()
def test_a_copy_is_switched_on_its_own(model):
    """It had the original's key, so that switching one switched both."""
    ids, twin = token_ids(2, 9), copy.deepcopy(model)
    expected = model(ids).logits
    with model.scaled({"augmenting": 0}), model.without(model.config.connections[:1]):
        assert torch.equal(twin(ids).logits, expected)
    with model.anchor_only():
        assert not twin.is_anchor_only
        assert torch.equal(twin(ids).logits, expected)
    with twin.anchor_only():
        assert torch.equal(twin(ids).logits, model.anchor(ids).logits)


@torch.no_grad()
def test_scaled_is_of_one_thread(model):
    """Two visitors of a playground with different sliders decode at the same time."""
    ids, found, both = token_ids(2, 9), {}, threading.Barrier(2)

    def run(scale):
        with model.scaled({"augmenting": scale}):
            both.wait(timeout=60)
            found[scale] = [model(ids).logits for _ in range(5)]
            both.wait(timeout=60)

    threads = [threading.Thread(target=run, args=(scale,)) for scale in (0.25, 0.75)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, logits in found.items():
        model.set_scale("augmenting", scale)
        expected = model(ids).logits
        assert len(logits) == 5
        assert all(torch.equal(mine, expected) for mine in logits)


# ---- frozen --------------------------------------------------------------------------------


def test_training_changes_the_bridges_and_not_a_byte_of_the_bases(model):
    anchor, augmenting = model.anchor, model.augmenting["augmenting"]
    before = digest(anchor), digest(augmenting)
    bridges = {name: p.clone() for name, p in model.bridges.named_parameters()}
    assert not any(p.requires_grad for p in (*anchor.parameters(), *augmenting.parameters()))
    model.train()
    losses = [train_a_step(model, token_ids(3, 11)) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.005
    assert (digest(anchor), digest(augmenting)) == before
    for name, parameter in model.bridges.named_parameters():
        assert not torch.equal(parameter, bridges[name]), name


def test_training_mode_is_for_the_bridges_only():
    """Dropout in a frozen model would only add noise to what the bridges learn from."""
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = open_bridges(compose(tiny("gpt2", **dropout), tiny("gpt2", 1, **dropout)))
    ids = token_ids(2, 9)
    logits = model(ids).logits
    model.train()
    assert model.training
    assert model.bridges.training
    for base in (model.anchor, model.augmenting["augmenting"]):
        assert not any(module.training for module in base.modules())
    assert_close(model(ids).logits, logits, **TOLERANCE)
    model.eval()
    assert not any(module.training for module in model.modules())


class StopError(Exception):
    """Raised in the middle of a pass."""


def test_after_any_call_the_anchor_is_its_old_self(model):
    anchor, ids = model.anchor, token_ids(2, 9)
    alone = tiny_llama()(ids).logits
    model(ids)
    assert torch.equal(anchor(ids).logits, alone)

    def stop(*call):
        raise StopError

    for place in (
        anchor.model.layers[3],
        anchor.model.norm,
        model.bridges[0],
        model.augmenting["augmenting"].transformer.h[0],
    ):
        handle = place.register_forward_hook(stop)
        with pytest.raises(StopError):
            model(ids)
        handle.remove()
        assert torch.equal(anchor(ids).logits, alone)
    assert (model(ids).logits - alone).abs().max() > 0.01


def test_a_forgotten_model_leaves_no_hook_behind():
    anchor, augmenting = tiny_llama(), tiny("gpt2")
    model = compose(anchor, augmenting, every=1)
    assert (hooks_on(anchor), hooks_on(augmenting)) == (3, 3)
    model(token_ids(2, 5))
    del model
    gc.collect()
    assert (hooks_on(anchor), hooks_on(augmenting)) == (0, 0)


# ---- sharing and copies --------------------------------------------------------------------


@torch.no_grad()
def test_two_compositions_share_one_anchor():
    anchor, ids = tiny_llama(), token_ids(2, 9)
    apart = [
        open_bridges(compose(tiny_llama(), tiny(family)), seed)
        for seed, family in enumerate(("gpt2", "bloom"))
    ]
    shared = [compose(anchor, tiny(family)) for family in ("gpt2", "bloom")]
    for mine, other in zip(shared, apart, strict=True):
        mine.bridges.load_state_dict(other.bridges.state_dict())
    for _ in range(2):
        for mine, other in zip(shared, apart, strict=True):
            assert torch.equal(mine(ids).logits, other(ids).logits)
    del shared[0], mine
    gc.collect()
    assert torch.equal(shared[0](ids).logits, apart[1](ids).logits)


@torch.no_grad()
def test_two_threads_share_one_anchor_without_mixing_their_bridges():
    """Both are held inside the same anchor layer at the same time, layer after layer."""
    anchor, ids = tiny_llama(), token_ids(2, 9)
    models = [
        open_bridges(compose(anchor, tiny(family), every=1), seed)
        for seed, family in enumerate(("gpt2", "bloom"))
    ]
    expected = [model(ids).logits for model in models] + [anchor(ids).logits]
    rendezvous = threading.Barrier(3, timeout=20)

    def meet(module, args):
        rendezvous.wait()

    handles = [layer.register_forward_pre_hook(meet) for layer in anchor.model.layers]
    results: list[list[torch.Tensor]] = [[], [], []]

    def run(index, call):
        with torch.no_grad():
            for _ in range(3):
                results[index].append(call(ids).logits)

    threads = [
        threading.Thread(target=run, args=(index, call))
        for index, call in enumerate((*models, anchor))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for found, wanted in zip(results, expected, strict=True):
        assert len(found) == 3
        assert all(torch.equal(logits, wanted) for logits in found)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_uses_its_own_bridges(model, how):
    ids = token_ids(2, 9)
    before = model(ids).logits
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(ids).logits, before)
    with torch.no_grad():
        twin.bridges[0].cross_o.weight.add_(1)
    changed = twin(ids).logits
    assert (changed - before).abs().max() > 0.01
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        model.bridges[0].cross_o.weight.zero_()
        model.anchor.model.layers[3].mlp.down_proj.weight.zero_()
        model.augmenting["augmenting"].transformer.h[0].mlp.c_proj.weight.zero_()
    assert torch.equal(twin(ids).logits, changed)
    batch = left_padded([5, 3])
    sequences = generated(twin, batch, 4)[0]
    del model
    gc.collect()
    assert torch.equal(generated(twin, batch, 4)[0], sequences)


# ---- what the anchor offers ----------------------------------------------------------------


@torch.no_grad()
def test_attention_can_be_computed_in_another_way():
    """Layers did so, but an augmenting model's masks were still of the old kind: it saw ahead."""
    model, ids = open_bridges(compose(tiny_llama(), tiny("gpt2"), every=2)), token_ids(2, 9)
    assert model.config._attn_implementation == "sdpa"
    logits = model(ids).logits
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert_close(model(ids).logits, logits, **TOLERANCE)


def test_generate_sees_how_the_anchor_attends():
    """For flash attention it keeps the mask of a static cache, whose free slots it would read."""
    anchor = tiny_llama()
    anchor.config._attn_implementation_internal = "flash_attention_2"
    assert is_flash_attention_requested(compose(anchor, tiny("gpt2")).config)


@torch.no_grad()
def test_options_of_the_anchor_reach_it(model):
    ids = token_ids(2, 9)
    output = model(ids, output_hidden_states=True, labels=ids)
    assert len(output.hidden_states) == 5
    assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    assert_close(model.anchor.lm_head(output.hidden_states[-1]), output.logits)
    assert_close(model.model(ids).last_hidden_state, output.hidden_states[-1])
    expected = nn.functional.cross_entropy(
        output.logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)
    )
    assert_close(output.loss, expected)
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)


@pytest.mark.parametrize("recorded_before", [False, True])
@torch.no_grad()
def test_recorded_hidden_states_are_those_after_the_bridges(recorded_before):
    """Index j + 1 is layer j; a hook that ran too late would record what came before.

    Transformers leaves its own recording hooks on a model that was once asked to record.
    """
    connections = [Connection(augmenting_layer=1, anchor_layer=1)]
    anchor, ids = tiny_llama(), token_ids(2, 9)
    if recorded_before:
        anchor(ids, output_hidden_states=True)
    model = compose(anchor, tiny("gpt2"), connections=connections)
    fresh = model(ids, output_hidden_states=True).hidden_states
    open_bridges(model)
    opened = model(ids, output_hidden_states=True).hidden_states
    same = [torch.equal(a, b) for a, b in zip(fresh, opened, strict=True)]
    assert same == [True, True, False, False, False]


@torch.no_grad()
def test_a_cache_is_returned_when_asked_for_and_not_in_training(model):
    ids = token_ids(2, 9)
    assert model(ids).past_key_values.get_seq_length() == 9
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None


def test_only_bridged_layers_join_the_graph():
    """Below the first bridge nothing needs gradients: that is what makes training cheap."""
    connections = [Connection(augmenting_layer=1, anchor_layer=1)]
    model = compose(tiny_llama(), tiny("gpt2"), connections=connections).train()
    needed = []
    for layer in model.anchor.model.layers:
        layer.register_forward_pre_hook(lambda m, args: needed.append(args[0].requires_grad))
    model(token_ids(2, 5))
    assert needed == [False, False, True, True]


@pytest.mark.parametrize("bases", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_bridges_in_full_precision_on_half_precision_models(bases):
    model = compose(tiny_llama().to(bases), tiny("gpt2").to(bases), every=1)
    ids = token_ids(2, 9)
    assert torch.equal(model(ids).logits, model.anchor(ids).logits)
    assert {p.dtype for p in model.bridges.parameters()} == {torch.float32}
    exact = open_bridges(compose(tiny_llama(), tiny("gpt2"), every=1))
    model.bridges.load_state_dict(exact.bridges.state_dict())
    logits = model(ids).logits
    assert logits.dtype == bases
    assert_close(logits.float(), exact(ids).logits, atol=0.03, rtol=0.05)
    batch = left_padded([7, 4])
    sequences, cached = generated(model, batch, 5)
    mask = nn.functional.pad(batch["attention_mask"], (0, 5), value=1)
    uncached = uncached_logits(model, sequences, mask)[:, -6:-1]
    assert_close(cached.float(), uncached.float(), atol=0.03, rtol=0.05)


def test_full_precision_bridges_train_on_half_precision_models():
    model = compose(tiny_llama().bfloat16(), tiny("gpt2").bfloat16(), every=1).train()
    losses = [train_a_step(model, token_ids(3, 11)) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.01
    gradients = [p.grad for p in model.bridges.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


# ---- every bridge there is -----------------------------------------------------------------


@pytest.mark.parametrize("position", ["none", "distance", "rotary"])
@pytest.mark.parametrize("variant", ["paper", "graftlm"])
@pytest.mark.parametrize("shape", [{}, {"num_heads": 1, "width": 6}, {"num_heads": 3, "width": 42}])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"gate": True, "bias": True},
        pytest.param({"gate": True}, marks=pytest.mark.slow),
        pytest.param({"bias": True}, marks=pytest.mark.slow),
    ],
)
def test_every_bridge_starts_as_nothing_trains_whole_and_is_cached_exactly(
    position, variant, shape, extra
):
    torch.manual_seed(11)
    model = compose(
        tiny_llama(), tiny("gpt2"), every=2, variant=variant, position=position, **shape, **extra
    )
    ids = token_ids(2, 9)
    assert torch.equal(model(ids).logits, model.anchor(ids).logits)
    open_bridges(model).train()
    model(input_ids=ids, labels=ids).loss.backward()
    without = [
        name for name, p in model.bridges.named_parameters() if p.grad is None or not p.grad.any()
    ]
    # A bias that all keys share moves every score of a query alike: softmax does not see it.
    assert [name for name in without if not name.endswith("cross_k.bias")] == []
    model.eval()
    assert_cached_is_uncached(model, left_padded([9, 5]))
