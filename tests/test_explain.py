"""What `model.explain` says is what the bridges did."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graftlm
from families import tiny, tiny_llama
from graftlm import ComposedForCausalLM, Connection, compose
from graftlm.cli import main
from graftlm.labels import labels_of, reads_right_to_left
from graftlm.passes import Observed, PassInputs
from graftlm.spelling import Spelling, spell
from tiny import character_tokenizer, meddling, save_pair
from two_tokenizers import byte_tokenizer, compose_pair, word_tokenizer

TEXT = "The quick brown fox"


def opened(model: Any) -> Any:
    """The same model with bridges that do something."""
    for name, weight in model.bridges.named_parameters():
        if name.endswith("cross_o.weight"):
            torch.nn.init.normal_(weight, std=0.5)
    return model


def shared(position: Any = "distance", **options: Any) -> Any:
    """Two augmenting models with the anchor's tokens; two connections end at one anchor layer."""
    size = len(character_tokenizer())
    connections = [
        Connection(augmenting="first", augmenting_layer=0, anchor_layer=1),
        Connection(augmenting="second", augmenting_layer=1, anchor_layer=1),
        Connection(augmenting="second", augmenting_layer=2, anchor_layer=2),
    ]
    parts = {"first": tiny("gpt2", 2, vocab_size=size), "second": tiny_llama(vocab_size=size)}
    tokenizer = character_tokenizer()
    model = compose(
        tiny("qwen3", 1, vocab_size=size),
        parts,
        connections=connections,
        position=position,
        tokenizer=tokenizer,
        augmenting_tokenizers=dict.fromkeys(parts, tokenizer),
        **options,
    )
    return opened(model)


MODELS = {
    "distance": lambda: shared(),
    "rotary": lambda: shared("rotary"),
    "none": lambda: shared("none"),
    "paper": lambda: shared(variant="paper"),
    "prompt": lambda: shared(reads="prompt"),
    "committed": lambda: opened(compose_pair()),
    "prefix": lambda: opened(compose_pair(alignment="prefix")),
    "char_end": lambda: opened(compose_pair(alignment="char_end")),
}


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Values and result of every call that a bridge makes of the fused attention."""
    real, calls = F.scaled_dot_product_attention, []

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        read = real(query, key, value, **options)
        calls.append((value, read))
        return read

    monkeypatch.setattr("graftlm.bridge.F.scaled_dot_product_attention", watched)
    return calls


@pytest.mark.parametrize("kind", MODELS)
def test_the_weights_are_those_of_the_fused_attention(kind, attended):
    """Weights times values is what the kernel returned, in every head, wherever it is used."""
    model = MODELS[kind]()
    # Augmenting and anchor layers call the same function, so ask the bridges alone.
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for index, bridge in enumerate(model.bridges):
        bridge.register_forward_pre_hook(lambda *_: attended.clear())
        bridge.register_forward_hook(lambda *_, index=index: seen.update({index: list(attended)}))
    ids = torch.as_tensor([model.processor.tokenizer(TEXT)["input_ids"]])
    observed, prompt = Observed(), torch.ones_like(ids)[:, :5]
    inputs = PassInputs(
        input_ids=ids, prompt_mask=prompt if kind == "prompt" else None, observed=observed
    )
    with torch.no_grad():
        model.model.run(model.anchor, inputs, past_key_values=None, use_cache=False, options={})
    assert sorted(observed.attention) == sorted(seen) == list(range(len(model.bridges)))
    for index, ((values, read),) in seen.items():
        weights = observed.attention[index]
        is_dropped = weights.sum(-1, keepdim=True) == 0
        assert torch.allclose((weights @ values), read.masked_fill(is_dropped, 0), atol=2e-6)
        assert not is_dropped.all()


@pytest.mark.parametrize("kind", MODELS)
def test_observing_changes_nothing(kind):
    model = MODELS[kind]()
    ids = torch.as_tensor([model.processor.tokenizer(TEXT)["input_ids"]])
    run = {"past_key_values": None, "use_cache": False, "options": {}}
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        inputs = PassInputs(input_ids=ids, observed=Observed())
        observed = model.model.run(model.anchor, inputs, **run).logits
        found = model.explain(TEXT, max_new_tokens=2)
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert torch.equal(observed, plain)
    assert found.num_prompt == ids.shape[1]


@pytest.mark.parametrize("kind", MODELS)
def test_an_explanation_fits_together(kind):
    model = MODELS[kind]()
    found = model.explain(TEXT, max_new_tokens=3, top=4)
    length, heads = len(found.tokens), model.model.num_bridge_heads
    assert length == found.num_prompt + 3
    assert "".join(found.tokens[: found.num_prompt]) == TEXT
    assert found.connections == model.config.connections
    assert found.update_share.shape == (len(found.connections), length)
    assert found.divergence.shape == (length,)
    assert (found.divergence > 0).all()
    for connection, weights in zip(found.connections, found.attention, strict=True):
        keys = found.augmenting_tokens[connection.augmenting]
        assert weights.shape == (heads, length, len(keys))
        assert len(found.branches[connection.augmenting]) == len(keys)
        assert weights.dtype == np.float32
        sums = weights.sum(-1)
        assert np.all(np.isclose(sums, 1, atol=1e-5) | (sums == 0))
    for places in found.next_tokens.values():
        assert len(places) == length
        for tokens in places:
            assert len(tokens) == 4
            assert sorted((p for _, p in tokens), reverse=True) == [p for _, p in tokens]
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert np.allclose(plain["attention"][0], found.attention[0], atol=1e-6)
    assert plain["connections"][0]["anchor_layer"] == found.connections[0].anchor_layer


def test_shares_and_divergences_against_a_calculation_by_hand():
    """One bridge; what it adds is the difference between what goes in and what comes out."""
    size = len(character_tokenizer())
    model = opened(
        compose(
            tiny("llama", 1, vocab_size=size),
            tiny_llama(vocab_size=size),
            connections=[Connection(augmenting_layer=1, anchor_layer=2)],
            tokenizer=character_tokenizer(),
            augmenting_tokenizers=character_tokenizer(),
        )
    )
    model.set_scale("augmenting", 0.5)
    states: list[Tensor] = []
    layer = model.anchor.model.layers[2]
    hook = layer.register_forward_hook(lambda m, a, out: states.append(out))
    with torch.no_grad():
        ids = torch.as_tensor([model.processor.tokenizer("7+8=")["input_ids"]])
        ours = model(ids).logits[0].double().log_softmax(-1)
        with model.anchor_only():
            theirs = model(ids).logits[0].double().log_softmax(-1)
    hook.remove()
    after, before = states[0][0], states[1][0]
    found = model.explain("7+8=", top=2)
    share = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert np.allclose(found.update_share[0], share, rtol=1e-4)
    apart = (ours.exp() * (ours - theirs)).sum(-1)
    assert np.allclose(found.divergence, apart, rtol=1e-4)
    best = ours.exp().max(-1)
    names = model.processor.tokenizer.convert_ids_to_tokens(best.indices.tolist())
    for place, name, p in zip(found.next_tokens["composed"], names, best.values, strict=True):
        assert place[0] == (name, pytest.approx(float(p)))


def test_a_continuation_is_explained_as_its_steps_were():
    """Each step of cached decoding computes the row of weights that the whole pass shows."""
    model = shared()
    found = model.explain(TEXT, max_new_tokens=4)
    kept: dict[int, list[Tensor]] = {index: [] for index in range(len(model.bridges))}
    for index, bridge in enumerate(model.bridges):
        real = bridge.forward
        bridge.forward = lambda *a, real=real, index=index, **options: real(
            *a, **options | {"record": kept[index].append}
        )
    ids = torch.as_tensor([model.processor.tokenizer(TEXT)["input_ids"]])
    model.generate(ids, max_new_tokens=4, do_sample=False)
    for index, steps in kept.items():
        assert len(steps) == 4
        for row, weights in enumerate(steps[1:], start=found.num_prompt):
            shown = found.attention[index][:, row, : row + 1]
            assert np.allclose(weights[0, :, 0], shown, atol=1e-6)


def test_only_the_prompt_is_read_if_that_is_all_the_model_reads():
    model = shared(reads="prompt")
    found = model.explain(TEXT, max_new_tokens=3)
    assert found.augmenting_tokens["first"] == found.tokens[: found.num_prompt]
    assert np.allclose(found.attention[0].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("reads", ["sequence", "prompt"])
def test_what_was_written_before_is_explained_as_what_is_written_now(reads):
    model = shared(reads=reads)
    ids = torch.as_tensor([model.processor.tokenizer(TEXT)["input_ids"]])
    written = model.generate(ids, max_new_tokens=3, do_sample=False)
    found = model.explain(input_ids=written, num_prompt=ids.shape[1])
    assert found.to_json() == model.explain(TEXT, max_new_tokens=3).to_json()


def test_scales_are_those_of_the_context():
    model = shared()
    with model.scaled({"first": 0.5}):
        here = model.explain(TEXT)
    model.set_scale("first", 0.5)
    assert here.scales == {"first": 0.5, "second": 1.0}
    assert here.to_json() == model.explain(TEXT).to_json()


def test_mixed_precision_training_before_changes_nothing():
    """accelerate leaves autocast around the model's forward; the anchor alone ran through it."""
    model = shared()
    for bridge in model.bridges:
        torch.nn.init.zeros_(bridge.cross_o.weight)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    assert not model.explain(TEXT).divergence.any()


def test_a_hidden_state_of_zero_has_no_share():
    """Zero over zero was NaN, which no JSON holds."""
    observed = Observed()
    observed.add_update(0, torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    assert observed.update_share[0].tolist() == [[0.0, 0.0]]


def test_a_model_that_is_switched_off_reads_nothing():
    model = shared()
    model.set_scale("second", 0)
    found = model.explain(TEXT)
    assert found.scales == {"first": 1.0, "second": 0.0}
    assert [bool(weights.any()) for weights in found.attention] == [True, False, False]
    assert found.update_share.any(axis=1).tolist() == [True, False, False]
    assert found.attention[2].shape == found.attention[0].shape


def test_an_anchor_token_sees_the_endings_of_its_own_text():
    """With alignment="prefix" a key of a branch is read by the tokens of that branch only."""
    model = opened(compose_pair(alignment="prefix"))
    found = model.explain("The fox", top=1)
    branches = np.array(found.branches["augmenting"])
    read = found.attention[0].max(0) > 0  # (seq, aug_seq)
    texts = np.array(found.augmenting_tokens["augmenting"])
    for column in range(len(found.tokens)):
        written = "".join(found.tokens[: column + 1])
        line = [*texts[read[column] & (branches == 0)], *texts[read[column] & (branches > 0)]]
        assert "".join(line).removeprefix("<s>").strip() == written.strip()


@pytest.mark.parametrize("alignment", ["committed", "prefix"])
def test_an_augmenting_model_predicts_behind_what_the_anchor_token_sees(alignment):
    model = opened(compose_pair(alignment=alignment))
    found = model.explain(TEXT, top=1)
    theirs, part = word_tokenizer(), model.augmenting["augmenting"]
    branches = np.array(found.branches["augmenting"])
    read = found.attention[0].max(0) > 0
    for column in range(len(found.tokens)):
        seen = np.flatnonzero(read[column])
        keys = [*seen[branches[seen] == 0], *seen[branches[seen] > 0]]
        names = [found.augmenting_tokens["augmenting"][k] for k in keys]
        ids = theirs.convert_tokens_to_ids([name.replace(" ", "▁") for name in names])
        with torch.no_grad():
            logits = part(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        assert found.next_tokens["augmenting"][column][0][1] == pytest.approx(float(logits.max()))


def test_without_tokenizers_tokens_are_numbers():
    model = opened(compose(tiny("llama", 1), tiny_llama(), every=2))
    found = model.explain(input_ids=[3, 1, 4])
    assert found.tokens == found.augmenting_tokens["augmenting"] == ["#3", "#1", "#4"]
    again = model.explain(input_ids=torch.tensor([[3, 1, 4]]))
    assert all(map(np.array_equal, found.attention, again.attention))


def test_a_model_without_a_head_predicts_nothing():
    model = compose(tiny("llama", 1), tiny_llama().model, every=2)
    assert list(model.explain(input_ids=[3, 1, 4]).next_tokens) == ["composed", "anchor"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "explain got neither of text and input_ids"),
        ({"text": "a", "input_ids": [1]}, "explain got both of text and input_ids"),
        ({"text": "a b"}, "text is 'a b', but the model has no tokenizer"),
        ({"input_ids": torch.tensor([[1, 2], [3, 4]])}, r"has shape \(2, 2\) in tokens"),
        ({"input_ids": []}, r"has shape \(0,\) in tokens"),
        ({"input_ids": [1], "max_new_tokens": -2}, "max_new_tokens is -2, but must be 0 or more"),
        ({"input_ids": [1], "top": 0}, "top is 0, but must be a positive whole number"),
        ({"input_ids": [1, 2], "num_prompt": 3}, "num_prompt is 3, .* from 1 to the 2 tokens giv"),
        (
            {"input_ids": [1, 2], "num_prompt": 1, "max_new_tokens": 4},
            r"num_prompt is 1, .* nothing more to write .max_new_tokens is 4\)",
        ),
    ],
)
def test_what_cannot_be_explained_is_refused(options, message):
    model = compose(tiny("llama", 1), tiny_llama(), every=2)
    with pytest.raises(ValueError, match=message):
        model.explain(**options)


def test_there_is_nothing_to_explain_within_anchor_only():
    model = compose(tiny("llama", 1), tiny_llama(), every=2)
    with model.anchor_only(), pytest.raises(ValueError, match="within anchor_only"):
        model.explain(input_ids=[1])


# ---- the text of tokens ------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), word_tokenizer()], ids=["byte", "word"])
@pytest.mark.parametrize("text", ["The fox\n狐狸 naïve", " two  spaces ", "คนไทย e\u0301"])
def test_texts_of_tokens_join_to_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts, spellings = spell(Spelling.start(tokenizer), ids)
    assert len(texts) == len(ids) == len(spellings) - 1
    assert "".join(texts) == tokenizer.decode(ids)


def test_special_and_unused_tokens_have_names():
    tokenizer = byte_tokenizer()
    end: Any = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert spell(Spelling.start(tokenizer), [end, len(tokenizer) + 5])[0] == [
        "<|im_end|>",
        f"#{len(tokenizer) + 5}",
    ]


def test_the_table_of_added_tokens_is_read_once_for_each_spelling(monkeypatch):
    """It was read for each candidate of each next token, and is built anew each time."""
    model, tokenizer = opened(compose_pair()), word_tokenizer()
    kind, reads = type(tokenizer), []
    table: Any = kind.added_tokens_decoder.fget

    def watched(self: Any) -> Any:
        reads.append(self)
        return table(self)

    monkeypatch.setattr(kind, "added_tokens_decoder", property(watched))
    found = model.explain(TEXT)
    assert len(found.tokens) > 5
    assert len(reads) == 2  # the anchor's and the augmenting model's


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ([" the", "\n", ""], ["␣the", "↵", "∅"]),
        (["e", "\u0301"], ["e", "◌\u0301"]),
        (["سل", "ام"], ["سل\u200d", "\u200dام"]),
        (["سا", "م"], ["سا", "م"]),  # alef never joins the letter behind it
        (["سل ", "ام"], ["سل␣", "ام"]),
        (["سَ", "م"], ["سَ\u200d", "\u200dم"]),  # a vowel sign between them changes nothing
        (["\x07"], ["␇"]),
    ],
)
def test_labels_can_be_read_alone(texts, labels):
    assert labels_of(texts) == labels


def test_the_direction_is_that_of_most_letters():
    assert reads_right_to_left(["<s>", "שלום ", "עולם"])
    assert not reads_right_to_left(["The word שלום ", "means peace"])


def test_the_class_is_public():
    model = compose(tiny("llama", 1), tiny_llama(), every=2)
    assert isinstance(model.explain(input_ids=[1]), graftlm.Explanation)


def test_what_follows_the_prompt_is_greedy_whatever_the_anchors_files_say():
    ids = torch.as_tensor(character_tokenizer()(TEXT)["input_ids"])
    model = shared()
    expected = ids[None]
    for _ in range(8):
        token = model(expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, token[:, None]], dim=1)
    model.generation_config = meddling(eos_token_id=None)
    explanation = model.explain(input_ids=ids, max_new_tokens=8)
    shown = model.explain(input_ids=expected, num_prompt=len(ids))
    assert explanation.to_json() == shown.to_json()


# ---- on the command line -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A composed folder whose bridges do something."""
    place = tmp_path_factory.mktemp("explained")
    anchor, augmenting = save_pair(place)
    model = opened(compose(anchor, {"code": augmenting}, every=1))
    model.save_pretrained(place / "composed")
    return str(place / "composed")


def test_inspect_explains_a_text(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", folder, "--attention", "a [b]", "--generate", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Where composition changes what comes next" in shown
    assert "code" in shown
    assert "␣ " in shown
    assert sorted(path.name for path in (tmp_path / "attention").iterdir()) == [
        *("attention.html", "attention.png", "explanation.json", "updates.png"),
    ]
    numbers = json.loads((tmp_path / "attention" / "explanation.json").read_text())
    assert "".join(numbers["tokens"]).startswith("a [b]")
    assert len(numbers["tokens"]) == 7
    found = ComposedForCausalLM.from_pretrained(folder).explain("a [b]", max_new_tokens=2)
    assert np.allclose(numbers["update_share"], found.update_share, atol=1e-6)
    strongest = int(found.divergence.argmax())
    assert f"{strongest + 1}" in shown.splitlines()[2].split()[0]
    # Again, over what is there.
    assert main(["inspect", folder, "--attention", "b", "--output", "attention"]) == 0
    assert json.loads((tmp_path / "attention" / "explanation.json").read_text())["tokens"] == ["b"]


def test_inspect_says_which_model_is_switched_off(folder, tmp_path, capsys):
    model = ComposedForCausalLM.from_pretrained(folder)
    model.set_scale("code", 0)
    model.save_pretrained(tmp_path / "off")
    words = ["inspect", str(tmp_path / "off"), "--attention", "a", "--output", str(tmp_path / "x")]
    assert main(words) == 0
    assert "code is switched off (scale 0), so it is not read." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--generate", "2"], "--generate needs --attention"),
        (["--attention", "a", "--limit", "2"], "--limit needs --usefulness"),
        (["--attention", "a", "--length", "9"], "--length has no effect with --attention; leave"),
        (["--attention", "a", "--batch-size", "8"], "--batch-size has no effect with --attention"),
        (["--attention", "a", "--usefulness", "d"], "--attention and --usefulness are two"),
        (["--attention", "a", "--output", "FILE"], "file', which is a file; name a folder"),
        (["--attention", ""], "what to explain has shape (0,) in tokens"),
        (["--attention", "a", "--generate", "-1"], "max_new_tokens is -1, but must be 0 or more"),
    ],
)
def test_inspect_refuses(words, message, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("something else")
    words = [str(tmp_path / "file") if word == "FILE" else word for word in words]
    assert main(["inspect", folder, *words]) == 2
    assert message in capsys.readouterr().err
