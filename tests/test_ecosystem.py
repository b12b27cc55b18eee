"""The tools people bring: Trainer, TRL, pipelines, compilers, checkpointing, PEFT, device maps."""

import gc
import threading
from typing import Any

import peft
import pytest
import torch
import torch._dynamo
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from families import (
    generated,
    left_padded,
    open_bridges,
    tiny,
    tiny_llama,
    token_ids,
    uncached_logits,
)
from graftlm import ComposedForCausalLM, compose

# PEFT and TRL ask with transformers' old names, and torch warns of frozen layers that are
# checkpointed with re-entry: nothing below the first bridge has a gradient, as it should be.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]

TOLERANCE = {"atol": 5e-6, "rtol": 1e-5}


def letters() -> PreTrainedTokenizerFast:
    """One token per character: three special ones and 64 others, as many as the models have."""
    specials = ["<pad>", "<s>", "</s>"]
    known = [chr(code) for code in range(ord(" "), ord(" ") + 64)]
    vocabulary = {token: index for index, token in enumerate(specials + known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def composed(anchor: str = "llama", **options: Any) -> ComposedForCausalLM:
    """A fresh small composition; the same each time."""
    torch.manual_seed(13)
    own = tiny_llama() if anchor == "llama" else tiny(anchor)
    defaults: dict[str, Any] = {"every": 1, "num_heads": 2}
    return compose(own, tiny("gpt2", 1), **defaults | options)


@pytest.fixture(autouse=True)
def forget_compiled():
    """Graphs of one test are of no use to the next."""
    yield
    torch._dynamo.reset()
    gc.collect()


# ---- Trainer and TRL -----------------------------------------------------------------------


def trained(folder, model, steps: int = 6, resume: bool = False, **options) -> dict:
    """The bridges after training on the same 24 rows, saving every third step."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **options,
    )
    rows: Any = Dataset.from_dict({"input_ids": token_ids(24, 11).tolist()})
    rows = rows.add_column("labels", rows["input_ids"]).with_format("torch")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    return {name: value.clone() for name, value in model.bridges.state_dict().items()}


def test_trainer_resumes_to_the_same_weights(tmp_path):
    whole = trained(tmp_path / "whole", composed(), save_strategy="no")
    trained(tmp_path / "parts", composed(), steps=6)
    saved = sorted(path.name for path in (tmp_path / "parts" / "checkpoint-3").iterdir())
    assert "model.safetensors" in saved
    (last := tmp_path / "parts" / "checkpoint-6").rename(tmp_path / "gone")
    assert not last.exists()
    resumed = trained(tmp_path / "parts", composed(), resume=True)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_trainer_checkpoints_hold_no_base_weight(tmp_path):
    trained(tmp_path, composed(), steps=3)
    bridges = sum(p.numel() for p in composed().bridges.parameters()) * 4
    size = (tmp_path / "checkpoint-3" / "model.safetensors").stat().st_size
    assert bridges < size < bridges + 4096


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(tmp_path, packing):
    model, tokenizer = composed(), letters()
    rows = [{"prompt": f"{i} PLUS {i} IS", "completion": f" {2 * i}"} for i in range(24)]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        packing=packing,
        max_length=32,
    )
    before = {name: p.clone() for name, p in model.bridges.named_parameters()}
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, parameter in model.bridges.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert not any(p.requires_grad for p in model.anchor.parameters())


# ---- pipelines -----------------------------------------------------------------------------


def test_pipeline_generates_what_generate_does():
    model, tokenizer = open_bridges(composed()), letters()
    texts = ["WHAT IS 3", "AND"]
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = writer(texts, return_full_text=False, **options)
    for text, (answer,) in zip(texts, written, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        following = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["generated_text"] == following


# ---- torch.compile -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("position", ["none", "distance", "rotary"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_forward_is_the_eager_one(position, padded):
    model = open_bridges(composed(position=position))
    batch = left_padded([9, 5]) if padded else {"input_ids": token_ids(2, 9)}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        assert_close(compiled(**batch, use_cache=False).logits, expected, **TOLERANCE)
        with model.scaled({"augmenting": 0.5}):  # known to what was traced before
            half = model(**batch, use_cache=False).logits
            assert_close(compiled(**batch, use_cache=False).logits, half, **TOLERANCE)
            assert not torch.equal(half, expected)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_code_sees_the_scale_of_its_own_thread(whole):
    """What was traced saw what any thread had switched last; a playground showed the anchor's text.

    A whole forward pass is told at each step of `generate`, compiled layers at each pass.
    """
    torch.compiler.reset()
    model, ids = open_bridges(composed()), token_ids(2, 9)
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = {}
    for scale in (0.2, 0.9):
        with model.scaled({"augmenting": scale}):
            expected[scale] = torch.stack(model.generate(ids, **options).logits)
    if whole:
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        for layer in model.anchor.model.layers:
            layer.compile(backend="eager")
    inside, leave = threading.Event(), threading.Event()

    def other():
        with model.scaled({"augmenting": 0.2}):
            inside.set()
            leave.wait(timeout=60)

    thread = threading.Thread(target=other)
    with model.scaled({"augmenting": 0.9}):
        thread.start()
        inside.wait(timeout=60)
        found = torch.stack(model.generate(ids, **options).logits)
    leave.set()
    thread.join()
    assert_close(found, expected[0.9], **TOLERANCE)
    assert not torch.allclose(found, expected[0.2], **TOLERANCE)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("anchor", ["llama", "gemma3_text", "bloom"])
def test_compiled_training_has_the_eager_gradients(anchor):
    model = open_bridges(composed(anchor)).train()
    ids = token_ids(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.bridges.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(input_ids=ids, labels=ids).loss.backward()
    for parameter, gradient in zip(model.bridges.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["none", "distance", "rotary"])
@pytest.mark.parametrize("reads", ["sequence", "prompt"])
def test_compiled_decoding_with_a_static_cache(position, reads, monkeypatch):
    """One graph for all steps: shapes do not change and no Python value is baked in."""
    model, batch = open_bridges(composed(position=position, reads=reads)), left_padded([9, 5])
    expected, logits = generated(model, batch, 8)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.forward = torch.compile(model.forward, backend=count, fullgraph=True)
    model.generation_config.disable_compile = True
    sequences, found = generated(model, batch, 8, cache_implementation="static")
    assert torch.equal(sequences, expected)
    assert_close(found, logits, **TOLERANCE)
    assert len(graphs) <= 3


@pytest.mark.slow
def test_layers_that_are_compiled_one_by_one_still_have_their_bridges():
    """A layer compiled on its own reads no thread-local value; its bridge was skipped silently."""
    model, ids = open_bridges(composed()), token_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        for layer in model.anchor.model.layers:
            layer.compile(backend="eager")
        assert_close(model(ids).logits, expected, **TOLERANCE)
        layers = model.anchor.model.layers
        for index in range(4):
            layers[index] = torch.compile(layers[index], backend="eager")
        assert_close(model(ids).logits, expected, **TOLERANCE)


# ---- gradient checkpointing ----------------------------------------------------------------


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that has one."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("anchor", ["llama", "gemma3_text", "bloom", "mixtral", "gpt2"])
def test_checkpointed_gradients_are_the_same(anchor, reentrant):
    model, ids = open_bridges(composed(anchor)).train(), token_ids(2, 9)
    expected = gradients(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = []
    last = model.bridges[-1].cross_q
    last.register_forward_hook(lambda *call: recomputed.append(1))
    found = gradients(model, ids)
    assert len(recomputed) == 2, "nothing was checkpointed"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    model.activation_checkpointing_disable()
    gradients(model, ids)
    assert len(recomputed) == 3
    assert not any(module.training for module in model.anchor.modules())


def test_checkpointed_layers_of_the_anchor_are_run_again():
    model, ids = open_bridges(composed()).train(), token_ids(2, 9)
    calls = []
    for layer in model.anchor.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *call: calls.append(1))
    gradients(model, ids)
    assert len(calls) == 4
    model.activation_checkpointing_enable()
    gradients(model, ids)
    # Four forward; then the three above the first bridge again, which sits on layer 0.
    assert len(calls) == 4 + 4 + 3


def test_trainer_with_gradient_checkpointing(tmp_path):
    plain = trained(tmp_path / "plain", composed(), save_strategy="no")
    options = {"save_strategy": "no", "activation_checkpointing": True}
    checkpointed = trained(tmp_path / "checkpointed", composed(), **options)
    for name, value in plain.items():
        assert_close(checkpointed[name], value, atol=1e-5, rtol=1e-4, msg=name)


# ---- device maps ---------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"])
def test_models_loaded_with_a_device_map(tmp_path, device_map):
    tiny_llama().save_pretrained(tmp_path / "anchor")
    tiny("gpt2", 1).save_pretrained(tmp_path / "code")
    torch.manual_seed(13)
    model = compose(
        tmp_path / "anchor", {"code": tmp_path / "code"}, every=2, device_map=device_map
    )
    other = compose(tiny_llama(), {"code": tiny("gpt2", 1)}, every=2)
    other.bridges.load_state_dict(open_bridges(model).bridges.state_dict())
    batch = left_padded([9, 5])
    logits = uncached_logits(other, **batch)
    assert_close(uncached_logits(model, **batch), logits, **TOLERANCE)
    assert torch.equal(generated(model, batch, 6)[0], generated(other, batch, 6)[0])


# ---- PEFT ----------------------------------------------------------------------------------


def with_lora(model):
    """LoRA on the anchor's queries, beside bridges that go on training."""
    settings = peft.LoraConfig(
        r=3, target_modules=r".*anchor.*q_proj", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, settings)
    model.bridges.requires_grad_(True)
    return wrapped


def test_lora_on_the_anchor_trains_with_the_bridges():
    model, ids = open_bridges(composed()), token_ids(2, 9)
    expected = model(ids).logits
    wrapped = with_lora(model)
    assert_close(wrapped(input_ids=ids).logits, expected, **TOLERANCE)
    wrapped.train()
    found = gradients(wrapped, ids)
    kinds = {
        "bridge" if "bridges" in name else "lora" if "lora_" in name else name for name in found
    }
    assert kinds == {"bridge", "lora"}
    assert len([name for name in found if "lora_" in name]) == 2 * 4
    assert not [name for name in found if "augmenting" in name]


@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_on_the_anchor_with_gradient_checkpointing(reentrant):
    """LoRA below the first bridge needs the graph to begin at the embeddings."""
    model, ids = open_bridges(composed()), token_ids(2, 9)
    wrapped = with_lora(model)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.train()
    expected = gradients(wrapped, ids)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(wrapped, ids)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_lora_generates_with_a_cache():
    model, batch = open_bridges(composed()), left_padded([9, 5])
    wrapped = with_lora(model)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.eval()
    sequences, cached = generated(wrapped, batch, 6)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    uncached = uncached_logits(wrapped, sequences, mask)[:, -7:-1]
    assert_close(cached, uncached, **TOLERANCE)


def test_saved_adapters_load_into_a_fresh_composition(tmp_path):
    model, ids = open_bridges(composed()), token_ids(2, 9)
    bridges = model.bridges.state_dict()
    wrapped = with_lora(model)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = wrapped.eval()(input_ids=ids).logits
    wrapped.save_pretrained(tmp_path)
    other = composed()
    other.bridges.load_state_dict(bridges)
    assert not torch.equal(other(ids).logits, expected)
    again = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert_close(again(input_ids=ids).logits, expected, **TOLERANCE)
