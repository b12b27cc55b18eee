"""Frozen models in packed weights, on the CPU: exactness, gradients, checkpoints and messages."""

import importlib.util
import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from families import (
    generated,
    left_padded,
    open_bridges,
    tiny,
    token_ids,
    uncached_logits,
)
from graftlm import ComposedForCausalLM, compose, verify
from graftlm.cli.verify import show_precision
from graftlm.quantized import quantization_for
from graftlm.recipe import Recipe
from graftlm.sizes import part_sizes
from graftlm.training import prepare
from tiny import save_pair, sums, write_lines

pytestmark = [
    # torch warns of frozen layers below the first bridge that are checkpointed with re-entry.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]
# bitsandbytes says at every product of a model that is not in float16 that it casts.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

SCHEMES = ["8bit", pytest.param("4bit", marks=pytest.mark.slow), "int8wo"]
NAMES = {
    "8bit": "bitsandbytes 8-bit",
    "4bit": "bitsandbytes nf4",
    "int8wo": "torchao Int8WeightOnlyConfig",
}
# Blocks of 64 weights, as 4 bits need them; the two differ in depth and width.
ANCHOR = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
CODE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    tiny("llama", 1, **ANCHOR).save_pretrained(folder / "anchor")
    tiny("qwen3", 2, **CODE).save_pretrained(folder / "code")
    return folder


def composed(folders: Path, scheme: Any, **options: Any) -> ComposedForCausalLM:
    """A fresh composition of quantized models; the same each time."""
    torch.manual_seed(13)
    defaults: dict[str, Any] = {"every": 1, "num_heads": 2, "quantization_config": scheme}
    return compose(folders / "anchor", {"code": folders / "code"}, **defaults | options)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that has one."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_bytes(model: Any) -> dict[str, torch.Tensor]:
    """All that the frozen models hold, as plain tensors."""
    found = {}
    for name, tensor in model.state_dict().items():
        if "bridges" in name or not isinstance(tensor, torch.Tensor):
            continue
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else [""]
        for part in inner:
            found[f"{name} {part}"] = (getattr(tensor, part) if part else tensor).clone()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_composition_of_quantized_models(scheme, dtype, folders):
    """Step 0 is the quantized anchor, only bridges train, and no frozen byte changes."""
    model, ids = composed(folders, scheme, dtype=dtype), token_ids(2, 9)
    assert type(model.anchor.model.layers[0].mlp.up_proj) is not torch.nn.Linear or hasattr(
        model.anchor.model.layers[0].mlp.up_proj.weight, "__tensor_flatten__"
    )
    plain = AutoModelForCausalLM.from_pretrained(folders / "anchor", dtype=dtype)
    with torch.no_grad():
        expected = model.anchor(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(plain(ids).logits, expected)
    before = packed_bytes(open_bridges(model))
    found = gradients(model.train(), ids)
    assert {name.split(".")[1] for name in found} == {"bridges"}
    assert len(found) == len(list(model.bridges.parameters()))
    model.eval()
    batch = left_padded([9, 5])
    sequences, cached = generated(model, batch, 6)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    uncached = uncached_logits(model, sequences, mask)[:, -7:-1]
    # 8 and 4 bits compute in 16 bits, so that sums in another order show.
    near = 2e-6 if scheme == "int8wo" and dtype == torch.float32 else 2e-2
    assert_close(cached.float(), uncached.float(), atol=near, rtol=0)
    after = packed_bytes(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_compositions_keep_every_claim(scheme, dtype, folders, capsys):
    """Causality too: 8 bits with bitsandbytes' own threshold let a token change earlier logits."""
    anchor = tiny("llama", 1, **ANCHOR)
    with torch.no_grad():  # channels that some tokens drive beyond the threshold of 6
        anchor.model.layers[1].input_layernorm.weight.fill_(2.2)
    anchor.save_pretrained(folders / "loud")
    torch.manual_seed(13)
    options: dict[str, Any] = {"dtype": dtype, "every": 1, "num_heads": 2}
    model = compose(
        folders / "loud", {"code": folders / "code"}, quantization_config=scheme, **options
    )
    checks = verify(open_bridges(model))
    assert [check for check in checks if not check.passed] == []
    causal = {check.claim: check.measured for check in checks}["no look into the future"]
    assert causal == 0.0
    show_precision(Console(), model)  # --dtype would not look more closely
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bridge_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_after_an_evaluation_are_those_before(scheme, bridge_dtype, folders):
    """bitsandbytes packs 4-bit weights anew in evaluation on some CPUs; gradients lost a part."""
    model = open_bridges(composed(folders, scheme, bridge_dtype=bridge_dtype)).train()
    ids = token_ids(2, 9)
    assert {p.dtype for p in model.bridges.parameters()} == {bridge_dtype}
    expected = gradients(model, ids)
    with torch.no_grad():
        model.eval()(ids)
        model.anchor.eval()(ids)  # on its own, as users do
    model.state_dict()  # of packed weights it was not what had been loaded
    found = gradients(model.train(), ids)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_gradients_are_near_the_plain_ones(scheme, folders):
    """A gradient that stops at a packed layer is far off: its direction was another one."""
    model, ids = open_bridges(composed(folders, scheme)).train(), token_ids(2, 9)
    plain = open_bridges(composed(folders, None)).train()
    found, expected = gradients(model, ids), gradients(plain, ids)
    for name, gradient in expected.items():
        flat, other = gradient.flatten(), found[name].flatten()
        if gradient.norm() > 1e-6:
            assert torch.cosine_similarity(flat, other, dim=0) > 0.9, name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_checkpointing_on_quantized_models(scheme, reentrant, folders):
    model, ids = open_bridges(composed(folders, scheme)).train(), token_ids(2, 9)
    expected = gradients(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, ids)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_4_bit_weights_packed_before_composing_are_refused(folders):
    scheme = quantization_for("4bit", ["anchor"])["anchor"]
    base = AutoModelForCausalLM.from_pretrained(folders / "anchor", quantization_config=scheme)
    layer = base.model.layers[0].mlp.up_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no layout of its own")
    with torch.no_grad():
        base(token_ids(1, 5))
    with pytest.raises(ValueError, match="the anchor ran on the CPU before it was composed"):
        compose(base, folders / "code")
    with pytest.raises(ValueError, match="augmenting model 'code' ran on the CPU before"):
        compose(folders / "anchor", {"code": base})


@pytest.mark.parametrize(
    "scheme", ["4bit", *(pytest.param(s, marks=pytest.mark.slow) for s in ("8bit", "int8wo"))]
)
def test_trainer_saves_and_reloads_to_the_same_logits(scheme, folders, tmp_path):
    """An evaluation within the run, as above, must change nothing of what is learned after it."""
    rows: Any = Dataset.from_dict({"input_ids": token_ids(4, 11).repeat(6, 1).tolist()})
    rows = rows.add_column("labels", rows["input_ids"]).with_format("torch")
    weights = {}
    for evaluation in ("no", "steps"):
        model = composed(folders, scheme)
        arguments = TrainingArguments(
            output_dir=tmp_path / evaluation,
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            eval_strategy=evaluation,
            eval_steps=2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        weights[evaluation] = {name: w.clone() for name, w in model.bridges.state_dict().items()}
    for name, weight in weights["no"].items():
        assert torch.equal(weight, weights["steps"][name]), name
    model.eval().save_pretrained(tmp_path / "composed")
    loaded = ComposedForCausalLM.from_pretrained(tmp_path / "composed", quantization_config=scheme)
    ids = token_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# ---- checkpoints -------------------------------------------------------------------------


def warnings_of(record: Any) -> list[str]:
    """What was said about the models."""
    return [str(warning.message) for warning in record if "trained on" in str(warning.message)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trained_on_quantized_models_and_loaded_on_plain_ones(scheme, folders, tmp_path):
    model = open_bridges(composed(folders, scheme, dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "composed")
    saved = json.loads((tmp_path / "composed" / "config.json").read_text())
    for name in ("anchor", "code"):
        print_of = saved["bases"][name]["fingerprint"]
        assert (print_of["quantization"], print_of["weights"]) == (NAMES[scheme], None)
    with pytest.warns(UserWarning, match="trained on") as record:
        loaded = ComposedForCausalLM.from_pretrained(tmp_path / "composed", dtype=torch.bfloat16)
    assert warnings_of(record) == [
        f"{role} is in bfloat16 here, but the bridges were trained on {NAMES[scheme]} weights; the "
        "two were not compared, and results may differ a little"
        for role in ("the anchor", "augmenting model 'code'")
    ]
    assert type(loaded.anchor.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = token_ids(2, 9)
    assert_close(loaded(ids).logits, model(ids).logits, atol=0.3, rtol=0)
    assert not torch.equal(loaded(ids).logits, model(ids).logits)
    for name, weight in model.bridges.state_dict().items():
        assert torch.equal(loaded.bridges.state_dict()[name], weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trained_on_plain_models_and_loaded_on_quantized_ones(scheme, folders, tmp_path):
    composed(folders, None).save_pretrained(tmp_path / "composed")
    with pytest.warns(UserWarning, match="trained on") as record:
        loaded = ComposedForCausalLM.from_pretrained(
            tmp_path / "composed", quantization_config={"anchor": scheme}
        )
    assert warnings_of(record) == [
        f"the anchor is in {NAMES[scheme]} here, but the bridges were trained on float32 weights; "
        "the two were not compared, and results may differ a little"
    ]
    assert all(check.passed for check in verify(loaded) if "configuration" in check.claim)


def test_from_one_packing_to_another(folders, tmp_path):
    composed(folders, "8bit").save_pretrained(tmp_path / "composed")
    with pytest.warns(UserWarning, match="trained on") as record:
        ComposedForCausalLM.from_pretrained(tmp_path / "composed", quantization_config="4bit")
    expected = "is in bitsandbytes nf4 here, but the bridges were trained on bitsandbytes 8-bit"
    assert [expected in said for said in warnings_of(record)] == [True, True]


def test_another_configuration_is_refused_on_quantized_models(folders, tmp_path):
    """Weights cannot be compared, but all else is."""
    composed(folders, "4bit").save_pretrained(tmp_path / "composed")
    other = tiny("llama", 1, **ANCHOR, rope_theta=7.0)
    with pytest.raises(ValueError, match="the anchor is not the model this checkpoint"):
        ComposedForCausalLM.from_pretrained(tmp_path / "composed", anchor=other)


def test_packed_parameters_are_counted_as_what_they_stand_for(folders, tmp_path):
    plain, packed = part_sizes(composed(folders, None)), part_sizes(composed(folders, "4bit"))
    for name in ("anchor", "code"):
        assert packed[name].num_parameters == plain[name].num_parameters
        assert packed[name].num_bytes < plain[name].num_bytes / 2
    assert part_sizes(composed(folders, "int8wo"))["code"].num_bytes < plain["code"].num_bytes / 2


# ---- what the user says ------------------------------------------------------------------


def test_one_scheme_for_all_or_each_by_name(folders):
    model = composed(folders, {"code": "8bit"})
    assert model.anchor.config.to_dict().get("quantization_config") is None
    assert model.augmenting["code"].config.quantization_config.load_in_8bit
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    found: dict[str, Any] = defaultdict(str)
    found |= quantization_for({"anchor": fields, "code": "int8wo"}, ["anchor", "code"])
    assert found["anchor"].bnb_4bit_quant_type == "fp4"
    assert isinstance(found["code"].quant_type, Int8WeightOnlyConfig)
    own = [BitsAndBytesConfig(load_in_8bit=True), TorchAoConfig(Int8WeightOnlyConfig())]
    for config in own:
        assert quantization_for(config, ["anchor", "b"]) == {"anchor": config, "b": config}
    (found_fields,) = {c.to_json_string() for c in quantization_for(fields, ["a", "b"]).values()}
    assert found_fields == BitsAndBytesConfig(**fields).to_json_string()
    saved = {"quant_method": "gptq", "bits": 4}  # as transformers saves them
    assert quantization_for(saved, ["anchor"]) == {"anchor": saved}
    assert quantization_for(None, ["anchor"]) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("3bit", "quantization is '3bit', but must be one of '8bit', '4bit', 'int8wo', fields of"),
        (4, "quantization is 4, but must be one of"),
        ({"anchor": "3bit"}, "quantization is '3bit', but must be one of"),
        ({"anchr": "4bit"}, "quantization of 'anchr', which is neither a field .* anchor, code"),
        ({"bnb_4bit_quant_type": "nf4"}, "quantization is .*'nf4'.*, but must be one of"),
        ({"load_in_4bit": True, "bnb_4bits": 1}, "quantization has 'bnb_4bits', no field of"),
    ],
)
def test_what_is_no_quantization(given, message):
    with pytest.raises(ValueError, match=message):
        quantization_for(given, ["anchor", "code"])
    with pytest.raises(ValueError, match=message if given != 4 else "quantize is 4, but must be"):
        Recipe(anchor="a", augmenting={"code": "b"}, data="c", output_dir="d", quantize=given)


@pytest.mark.parametrize(("scheme", "package"), [("8bit", "bitsandbytes"), ("int8wo", "torchao")])
def test_a_missing_package_is_named(scheme, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"needs the {package} package, which is missing; pip"):
        quantization_for(scheme, ["anchor"])


def test_loaded_models_cannot_be_quantized(folders):
    anchor = AutoModelForCausalLM.from_pretrained(folders / "anchor")
    with pytest.raises(ValueError, match="the anchor is loaded already, so quantization_config"):
        compose(anchor, folders / "code", quantization_config="4bit")
    model = compose(anchor, {"code": folders / "code"}, quantization_config={"code": "int8wo"})
    assert model.anchor is anchor


def test_a_recipe_quantizes(tmp_path):
    anchor, code = save_pair(tmp_path)
    recipe = Recipe(
        anchor=anchor,
        augmenting={"code": code},
        data=write_lines(tmp_path / "data.jsonl", *sums(12)),
        output_dir=str(tmp_path / "out"),
        every=2,
        quantize={"anchor": "int8wo"},
        training={"max_steps": 2, "use_cpu": True, "save_strategy": "no"},
    )
    assert Recipe.from_mapping(recipe.to_json()) == recipe
    training = prepare(recipe)
    assert isinstance(training.model.anchor.config.quantization_config, TorchAoConfig)
    assert training.run().step == 2
    with pytest.warns(UserWarning, match="trained on torchao Int8WeightOnlyConfig weights"):
        ComposedForCausalLM.from_pretrained(tmp_path / "out")
