"""Hidden states computed once: the same training, less work, and nothing stale."""

import copy
import dataclasses
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from families import FAMILIES, REPRESENTATIVE, open_bridges, tiny, tiny_llama, token_ids
from graftlm import (
    ComposedDataCollator,
    ComposedForCausalLM,
    Connection,
    StatesCache,
    cache_states,
    caching,
    compose,
)
from graftlm.recipe import Recipe
from graftlm.resuming import Interruption
from graftlm.training import prepare
from tiny import quick_recipe, save_pair
from two_tokenizers import TEXT, byte_tokenizer, compose_pair, word_tokenizer

every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in REPRESENTATIVE else pytest.mark.slow)
        for family in FAMILIES
    ],
)


def examples(lengths: tuple[int, ...] = (5, 11, 3, 8), seed: int = 1) -> list[dict[str, Any]]:
    """Rows of random tokens; the first two have no label."""
    rows = [token_ids(1, length, seed + length)[0].tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows]


def batch_of(rows: list[dict[str, Any]], states: StatesCache, order: list[int]) -> dict[str, Any]:
    """A batch as `Trainer` would make it, of models that share their tokens."""
    data = states.with_states(rows)
    return ComposedDataCollator(processor_for({}))([data[index] for index in order])


def processor_for(readers: dict[str, Any]) -> Any:
    """What the collator asks of a processor whose models share their tokens."""
    return SimpleNamespace(
        tokenizer=byte_tokenizer(), readers=readers, with_augmenting_inputs=lambda batch: batch
    )


def loss_and_gradients(model: Any, **batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.bridges.parameters()]


def assert_same_training(model: Any, batch: dict[str, Any], tolerance: float = 1e-6) -> None:
    """The loss and its gradients are those of a pass that is given no states."""
    model.train()
    plain = {name: value for name, value in batch.items() if name != "frozen_states"}
    loss, gradients = loss_and_gradients(model, **plain)
    cached_loss, cached_gradients = loss_and_gradients(model, **batch)
    assert abs(loss - cached_loss) <= tolerance
    for one, other in zip(gradients, cached_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=10 * tolerance, rtol=1e-4)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)


# ---- the same results --------------------------------------------------------------------


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
@every_family
def test_every_family_trains_on_states_as_without(family: str, role: str, tmp_path: Path) -> None:
    if role == "anchor":
        model = compose(tiny(family), tiny_llama(), every=2)
    else:
        model = compose(tiny_llama(), tiny(family), every=1)
    rows = examples()
    states = cache_states(open_bridges(model), rows, tmp_path, batch_size=3)
    assert_same_training(model, batch_of(rows, states, [3, 0, 1]))


@pytest.mark.parametrize("alignment", ["committed", "prefix", "char_end"])
@pytest.mark.parametrize("reads", ["sequence", "prompt"])
def test_models_with_tokens_of_their_own(alignment: str, reads: Any, tmp_path: Path) -> None:
    model = open_bridges(compose_pair(alignment=alignment, reads=reads))
    rows = [
        {"input_ids": ids, "labels": [-100] * 4 + ids[4:]}
        for line in TEXT.splitlines()[:4]
        for ids in [byte_tokenizer()(line)["input_ids"][:40]]
    ]
    states = cache_states(model, rows, tmp_path)
    data = states.with_states(rows)
    batch = ComposedDataCollator(model.processor)([data[2], data[0], data[3]])
    assert_same_training(model, batch)


def test_a_smaller_vocabulary_and_several_models(tmp_path: Path) -> None:
    """One model skips tokens it does not have, and two models are read at several layers."""
    pair = {"small": tiny_llama(vocab_size=50), "whole": tiny_llama(seed=9)}
    model = open_bridges(compose(tiny("llama"), pair, every=2))
    rows = examples()
    states = cache_states(model, rows, tmp_path)
    assert set(states[0]) == {"anchor.0", "small.1", "small.3", "whole.1", "whole.3"}
    assert len(states[1]["small.1"]) < len(states[1]["whole.1"]) == 11
    processor = processor_for(model.model.readers)
    data = states.with_states(rows)
    assert_same_training(model, ComposedDataCollator(processor)([data[1], data[2]]))


def test_states_of_another_text_are_read_where_examples_say_so(tmp_path: Path) -> None:
    model = open_bridges(compose(tiny("llama"), tiny_llama(), every=2))
    rows = examples()
    others = [row | {"read_ids": [5] * len(row["input_ids"])} for row in rows]
    states = cache_states(model, rows, tmp_path / "own")
    other_states = cache_states(model, others, tmp_path / "other")
    assert torch.equal(states[1]["anchor.0"], other_states[1]["anchor.0"])
    assert not torch.equal(states[1]["augmenting.1"], other_states[1]["augmenting.1"])
    assert_same_training(model, batch_of(others, other_states, [0, 1]))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    model = open_bridges(compose(tiny("llama"), tiny_llama(), every=1))
    rows = examples()
    states = cache_states(model, rows, tmp_path)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_training(model, batch_of(rows, states, [2, 1]))


def test_mixed_precision(tmp_path: Path) -> None:
    model = open_bridges(compose(tiny("llama"), tiny_llama(), every=1))
    rows = examples()
    with torch.autocast("cpu", torch.bfloat16):
        states = cache_states(model, rows, tmp_path, batch_size=1)
        assert_same_training(model, batch_of(rows, states, [1]))
    with pytest.raises(ValueError, match="something else: the precision changed since"):
        cache_states(model, rows, tmp_path)


def test_states_in_less_precision(tmp_path: Path) -> None:
    model = open_bridges(compose(tiny("llama"), tiny_llama(), every=1))
    rows = examples()
    states = cache_states(model, rows, tmp_path, dtype="bfloat16")
    assert {tensor.dtype for tensor in states[0].values()} == {torch.bfloat16}
    assert_same_training(model, batch_of(rows, states, [0, 1]), tolerance=0.02)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph(tmp_path: Path) -> None:
    model = open_bridges(compose(tiny("llama"), tiny_llama(), every=1)).train()
    rows = examples()
    batch = batch_of(rows, cache_states(model, rows, tmp_path), [0, 1])
    loss = model(**batch).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).loss, loss)


# ---- less work, and nothing changed ------------------------------------------------------


def test_layers_whose_states_are_known_are_not_run(tmp_path: Path) -> None:
    anchor, augmenting = tiny("llama"), tiny_llama()
    connections = [Connection(augmenting="augmenting", augmenting_layer=1, anchor_layer=1)]
    model = open_bridges(compose(anchor, augmenting, connections=connections))
    rows = examples()
    run: list[str] = []
    for name, base in {"anchor": anchor, "augmenting": augmenting}.items():
        for index, layer in enumerate(base.model.layers):
            layer.register_forward_hook(lambda *_, at=f"{name}.{index}": run.append(at))
    anchor.lm_head.register_forward_hook(lambda *_: run.append("head"))
    states = cache_states(model, rows, tmp_path)
    assert run == ["augmenting.0", "augmenting.1", "anchor.0", "anchor.1"]
    before = {**vars(anchor.model)}, dict(anchor.model._modules)
    model(**batch_of(rows, states, [0, 1]))  # finds out what a layer returns, by one token
    run.clear()
    model(**batch_of(rows, states, [0, 1]))
    assert run == ["anchor.2", "head"]
    assert ({**vars(anchor.model)}, dict(anchor.model._modules)) == before
    assert torch.equal(
        model.model(**batch_of(rows, states, [0])).last_hidden_state[0, 0],
        (model.model(**batch_of(rows, states, [0, 1])).last_hidden_state[0, 0]),
    )


def test_another_head_and_other_layers_are_noticed(tmp_path: Path) -> None:
    model = open_bridges(compose(tiny("llama"), tiny_llama(), every=2))
    rows = examples()
    batch = batch_of(rows, cache_states(model, rows, tmp_path), [0, 1])
    model(**batch)
    other = copy.deepcopy(model.anchor.lm_head)
    torch.nn.init.normal_(other.weight)
    model.set_output_embeddings(other)
    assert_same_training(model, batch)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(model.bridges[0].cross_o.weight)
    assert_same_training(twin, batch)


def test_data_loading_processes_read_the_files_themselves(tmp_path: Path) -> None:
    model = compose(tiny("llama"), tiny_llama(), every=2)
    rows = examples()
    states = cache_states(model, rows, tmp_path)
    here = states[1]
    loader = DataLoader(states.with_states(rows), batch_size=None, num_workers=2)
    there = [row["frozen_states"] for row in loader][1]
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert len(states) == len(states.with_states(rows)) == 4
    with pytest.raises(IndexError, match="there is no example 4 among 4"):
        states[4]


# ---- refused -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """A composed model, data and where its states are."""
    model = compose(tiny("llama"), tiny_llama(), every=2)
    return SimpleNamespace(model=model, rows=examples(), folder=tmp_path / "states")


def test_stale_states_are_refused(small: Any) -> None:
    cache_states(small.model, small.rows, small.folder)

    def message(model: Any, rows: Any, **options: Any) -> str:
        with pytest.raises(ValueError, match="computed for something else") as caught:
            cache_states(model, rows, small.folder, **options)
        return str(caught.value)

    assert "else: the data changed since" in message(small.model, small.rows[::-1])
    shifted = [row | {"labels": row["input_ids"]} for row in small.rows]
    assert "else: the data changed since" in message(small.model, shifted)
    assert "the precision" in message(small.model, small.rows, dtype="bfloat16")
    assert "else: the anchor changed" in message(
        compose(tiny("llama", seed=3), tiny_llama(), every=2), small.rows
    )
    assert "else: augmenting model 'augmenting' changed" in message(
        compose(tiny("llama"), tiny_llama(seed=3), every=2), small.rows
    )
    assert "else: the connected layers changed" in message(
        compose(tiny("llama"), tiny_llama(), every=1), small.rows
    )
    assert "else: what is read changed" in message(
        compose(tiny("llama"), tiny_llama(), every=2, reads="prompt"), small.rows
    )
    longer = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    assert "augmenting model 'augmenting'" in message(
        compose(tiny("llama"), longer, every=2), small.rows
    )
    # What the bridges are like does not matter.
    cache_states(compose(tiny("llama"), tiny_llama(), every=2, gate=True), small.rows, small.folder)


def test_models_are_known_as_they_are_now(small: Any, tmp_path: Path) -> None:
    """What a checkpoint says of its models may be true no more."""
    small.model.save_pretrained(tmp_path / "saved")
    bases = {"anchor": small.model.anchor, "augmenting": small.model.augmenting["augmenting"]}

    def loaded(**changed: Any) -> Any:
        made = copy.deepcopy(bases) | changed
        return ComposedForCausalLM.from_pretrained(tmp_path / "saved", **made, check_bases=False)

    cache_states(small.model, small.rows, small.folder)
    cache_states(loaded(), small.rows, small.folder)
    with pytest.raises(ValueError, match="something else: augmenting model 'augmenting' changed"):
        cache_states(loaded(augmenting=tiny_llama().bfloat16()), small.rows, small.folder)
    with pytest.raises(ValueError, match="something else: the anchor changed"):
        cache_states(loaded(anchor=tiny("llama", seed=8)), small.rows, small.folder)
    with torch.no_grad():
        small.model.anchor.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="something else: the anchor changed"):
        cache_states(small.model, small.rows, small.folder)


def test_parts_say_what_they_are_of(small: Any) -> None:
    """Without `states.json`, or beside another run's, parts of something else are not taken."""
    cache_states(small.model, small.rows, small.folder)
    (small.folder / "states.json").unlink()
    other = compose(tiny("llama", seed=8), tiny_llama(), every=2)
    states = cache_states(other, small.rows, small.folder)
    alone = cache_states(other, small.rows, small.folder.with_name("alone"))
    assert torch.equal(states[0]["anchor.0"], alone[0]["anchor.0"])
    (small.folder / "states-00000.safetensors").write_bytes(b"cut off")
    again = cache_states(other, small.rows, small.folder)
    assert torch.equal(again[0]["anchor.0"], alone[0]["anchor.0"])


def test_tokenizers_and_alignments_count_where_tokens_differ(tmp_path: Path) -> None:
    rows = [{"input_ids": byte_tokenizer()("the dog")["input_ids"], "labels": None}]
    cache_states(compose_pair(), rows, tmp_path)
    with pytest.raises(ValueError, match="else: the alignment changed"):
        cache_states(compose_pair(alignment="prefix"), rows, tmp_path)
    other = word_tokenizer(400)
    sizes = {"max_position_embeddings": 120}
    model = compose(
        tiny("llama", seed=1, vocab_size=len(byte_tokenizer()), **sizes),
        tiny_llama(vocab_size=len(word_tokenizer()), **sizes),
        every=1,
        tokenizer=byte_tokenizer(),
        augmenting_tokenizers=other,
    )
    with pytest.raises(ValueError, match="else: the tokenizers changed"):
        cache_states(model, rows, tmp_path)


def test_float16_is_refused_where_states_overflow(small: Any) -> None:
    with torch.no_grad():
        small.model.augmenting["augmenting"].model.embed_tokens.weight.mul_(1e7)
    with pytest.raises(
        ValueError, match=r"of augmenting model 'augmenting' at layer 1 reach .*e\+\d+, beyond the "
    ):
        cache_states(small.model, small.rows, small.folder, dtype="float16")
    cache_states(small.model, small.rows, small.folder.with_name("wide"), dtype="bfloat16")


def test_anchors_that_train_are_refused(small: Any) -> None:
    small.model.anchor.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has parameters to train, such as lm_h"):
        cache_states(small.model, small.rows, small.folder)


def test_models_without_states_are_refused(small: Any, tmp_path: Path) -> None:
    small.model.set_scale("augmenting", 0)
    with pytest.raises(ValueError, match=r"'augmenting' is switched off \(its scale is 0\), so"):
        cache_states(small.model, small.rows, small.folder)
    kinds = ["sliding_attention", "full_attention"] * 2
    sharing = {"num_hidden_layers": 4, "layer_types": kinds, "num_kv_shared_layers": 2}
    model = compose(tiny("gemma4_text", **sharing), tiny_llama(), every=4)
    with pytest.raises(ValueError, match="has layers that read the keys and values of lower ones"):
        cache_states(model, small.rows, small.folder)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"attention_mask": [0, 1, 1]},
            "example 4 has attention_mask with zeros, but hidden ",
        ),
        (
            {"position_ids": [0, 0, 1]},
            "example 4 has position_ids, but hidden states are kept ",
        ),
    ],
)
def test_examples_that_are_padded_or_packed(small: Any, columns: Any, message: str) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], **columns}
    with pytest.raises(ValueError, match=message):
        cache_states(small.model, [*small.rows, row], small.folder)


def test_rows_of_tensors(small: Any) -> None:
    data = Dataset.from_list([row | {"read_ids": row["input_ids"]} for row in small.rows])
    states = cache_states(small.model, data.with_format("torch"), small.folder)
    assert len(states.with_states(data)[1]["frozen_states"]["anchor.0"]) == 11


def test_no_examples(small: Any) -> None:
    with pytest.raises(ValueError, match="there are no examples to compute hidden states of"):
        cache_states(small.model, [], small.folder)


def test_models_that_are_spread_over_processes(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="models are spread over processes, so that none can run"):
        cache_states(small.model, small.rows, small.folder)


def test_states_that_do_not_fit_the_batch(small: Any) -> None:
    states = cache_states(small.model, small.rows, small.folder)
    batch = batch_of(small.rows, states, [0, 1])
    for others in (small.rows[:3], small.rows[::-1]):
        with pytest.raises(ValueError, match="examples are not the 4 whose hidden states .* holds"):
            states.with_states(others)
    given = batch.pop("frozen_states")
    fewer = {name: given[name] for name in given if name != "augmenting.3"}
    with pytest.raises(ValueError, match=r"frozen_states has no 'augmenting\.3', only anchor\."):
        small.model(**batch, frozen_states=fewer)
    with pytest.raises(
        ValueError, match=r"\['anchor\.0'\] has shape \(2, 10, 24\), but this batch"
    ):
        small.model(**batch, frozen_states=given | {"anchor.0": given["anchor.0"][:, 1:]})
    with pytest.raises(ValueError, match="use_cache is on, but with frozen_states the lower layer"):
        small.model(**batch, frozen_states=given, use_cache=True)
    with pytest.raises(ValueError, match="output_hidden_states is on, but with frozen_states the"):
        small.model(**batch, frozen_states=given, output_hidden_states=True)


def test_an_anchor_whose_forward_was_replaced(small: Any) -> None:
    states = cache_states(small.model, small.rows, small.folder)
    small.model.anchor.forward = functools.partial(small.model.anchor.forward)
    with pytest.raises(ValueError, match="with this LlamaForCausalLM, whose forward has been repl"):
        small.model(**batch_of(small.rows, states, [0, 1]))


def test_models_that_accelerate_offloads(small: Any) -> None:
    from accelerate import cpu_offload

    states = cache_states(open_bridges(small.model), small.rows, small.folder)
    batch = batch_of(small.rows, states, [0, 1])
    loss = small.model(**batch).loss
    for base in (small.model.anchor, *small.model.augmenting.values()):
        cpu_offload(base)
    torch.testing.assert_close(small.model(**batch).loss, loss)
    again = cache_states(small.model, small.rows, small.folder.with_name("again"))
    assert torch.equal(again[1]["anchor.0"], states[1]["anchor.0"])


# ---- stopped, full, damaged --------------------------------------------------------------


def test_work_that_was_stopped_goes_on(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "PART_BYTES", 1)  # an example a part
    run = caching.run_rows
    done: list[int] = []

    def stop_in_the_third(model: Any, rows: Any, dtype: str) -> Any:
        done.append(len(rows))
        if len(done) == 3:
            raise KeyboardInterrupt
        return run(model, rows, dtype)

    monkeypatch.setattr(caching, "run_rows", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache_states(small.model, small.rows, small.folder)
    with pytest.raises(ValueError, match="lacks 2 of 4 parts of the hidden states; run graftlm ca"):
        StatesCache(small.folder)
    states = cache_states(small.model, small.rows, small.folder)
    assert len(done) == 3 + 2
    monkeypatch.setattr(caching, "PART_BYTES", 1e9)
    whole = cache_states(small.model, small.rows, small.folder.with_name("whole"), batch_size=1)
    for index in range(4):
        for name, tensor in whole[index].items():
            assert torch.equal(states[index][name], tensor)


def test_more_parts_than_are_held_open(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "PART_BYTES", 1)
    states = cache_states(small.model, small.rows, small.folder)
    monkeypatch.setattr("graftlm.states_cache.OPEN_PARTS", 2)
    lengths = [len(states[index]["anchor.0"]) for index in (0, 1, 2, 3, 0, 3)]
    assert lengths == [5, 11, 3, 8, 5, 8]
    assert len(states._open) == 2


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"hidden states need 6\.91 kB more in .*, but 1 kB are"):
        cache_states(small.model, small.rows, small.folder)
    assert os.listdir(small.folder) == ["states.json"]


def test_a_disk_that_fills_up_leaves_what_is_complete(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to write files of more than so many bytes, as a full disk would."""
    monkeypatch.setattr(caching, "PART_BYTES", 1)
    sizes = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, sizes[1]))
    try:
        with pytest.raises(OSError, match="part 1 of the hidden states could not be written to "):
            cache_states(small.model, small.rows, small.folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
    assert sorted(os.listdir(small.folder)) == ["states-00000.safetensors", "states.json"]
    before = (small.folder / "states-00000.safetensors").stat().st_mtime_ns
    assert len(cache_states(small.model, small.rows, small.folder)) == 4
    assert (small.folder / "states-00000.safetensors").stat().st_mtime_ns == before


def test_folders_that_hold_no_states(small: Any) -> None:
    with pytest.raises(ValueError, match="holds no hidden states; make them with graftlm cache"):
        StatesCache(small.folder)
    cache_states(small.model, small.rows, small.folder)
    path = small.folder / "states.json"
    layout = json.loads(path.read_text())
    path.write_text(json.dumps(layout | {"format_version": 9}))
    with pytest.raises(
        ValueError, match="has format 9 of hidden states, but this version of graft"
    ):
        StatesCache(small.folder)
    path.write_text('{"format_version": 1')
    with pytest.raises(
        ValueError, match=r"states\.json is damaged; delete .* and compute it again"
    ):
        StatesCache(small.folder)


# ---- training ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def values(models: tuple[str, str], tmp_path: Path, no_curves: None) -> dict[str, Any]:
    recipe = quick_recipe(models, tmp_path, logging_steps=1)
    return recipe | {"every": None, "connections": ["1-1", "2-3"], "eval_fraction": 0.2}


def losses(folder: str) -> list[float]:
    """Losses of training and evaluation, step by step."""
    log = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    kinds = ("loss", "eval_loss")
    return [entry[kind] for entry in log for kind in kinds if kind in entry]


def train(values: dict[str, Any], resume: bool = False, **changes: Any) -> list[float]:
    recipe = Recipe.from_mapping(values | changes)
    prepare(recipe, resume=resume).run()
    return losses(recipe.output_dir)


def test_training_on_states_is_training(values: dict[str, Any], tmp_path: Path) -> None:
    plain = train(values)
    folder = str(tmp_path / "states")
    cached = train(values, output_dir=str(tmp_path / "cached"), states_cache=folder)
    assert len(plain) == len(cached) > 12
    assert max(abs(a - b) for a, b in zip(plain, cached, strict=True)) <= 1e-6
    one, other = (load_file(tmp_path / at / "model.safetensors") for at in ("out", "cached"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-4, rtol=1e-3)
    assert sorted(os.listdir(folder)) == ["evaluation", "training"]


@pytest.mark.slow
def test_a_run_on_states_resumes_exactly(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["states_cache"] = str(tmp_path / "states")
    whole = train(values)
    stopped = values | {"output_dir": str(tmp_path / "stopped")}
    on_step_end = Interruption.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            self.receive(2, None)
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "on_step_end", interrupt)
        outcome = prepare(Recipe.from_mapping(stopped)).run()
    assert outcome.step == 5
    assert train(stopped, resume=True) == whole
    one, other = (load_file(tmp_path / at / "model.safetensors") for at in ("out", "stopped"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_processes_share_the_work(models: tuple[str, str], tmp_path: Path) -> None:
    """Two processes write half of the parts each, and the states are those of one."""
    script = tmp_path / "share.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "from graftlm import caching, compose\n"
        "from test_states_cache import examples\n"
        "torch.distributed.init_process_group('gloo')\n"
        "write = caching.write_part\n"
        "def noted(folder, layout, number, *rest):\n"
        "    write(folder, layout, number, *rest)\n"
        # A file a process: lines of two processes on one output run into each other.
        "    rank = torch.distributed.get_rank()\n"
        f"    with open({str(tmp_path)!r} + f'/rank-{{rank}}', 'a') as file:\n"
        "        print(number, file=file)\n"
        "caching.write_part, caching.PART_BYTES = noted, 1\n"
        f"model = compose({models[0]!r}, {models[1]!r}, every=2)\n"
        f"print(len(caching.cache_states(model, examples(), {str(tmp_path / 'shared')!r})))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    ran = subprocess.run(
        [
            *torchrun,
            "--master-port=0",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
            script,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    wrote = [sorted((tmp_path / f"rank-{rank}").read_text().split()) for rank in (0, 1)]
    assert wrote == [["0", "2"], ["1", "3"]]
    model = compose(*models, every=2)
    alone = cache_states(model, examples(), tmp_path / "alone", batch_size=1)
    shared = StatesCache(tmp_path / "shared")
    for index in range(4):
        for name, tensor in alone[index].items():
            assert torch.equal(shared[index][name], tensor)
    assert dataclasses.replace(alone.layout, part_size=1) == shared.layout
