"""What is hard about the numbers of real models, and about their files.

Tiny models with the same traits stand in for them in the fast tests; the slow ones take the
models of `make models`, and skip where those are not on this machine.
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from families import open_bridges, tiny, token_ids
from graftlm import BridgeConfig, ComposedForCausalLM, compose, gguf
from graftlm.bridge import Bridge
from graftlm.reproduce import real_models
from graftlm.reproduce.real_models import MODELS, fetch_model, find_model, require_model

FP16_LARGEST = torch.finfo(torch.float16).max
SMOLLM, GEMMA, QWEN = MODELS
TEXT = "The children went to the market in the morning, and they bought 12 mangoes.\n" * 4


def fetched(*names: str) -> Any:
    """Marks of a test that needs these models."""
    missing = [name for name in names if find_model(name) is None]
    reason = f"{', '.join(missing)} not on this machine; make models fetches them"
    return [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=reason)]


# ---- tiny models with the traits of real ones --------------------------------------------


def opened(anchor_size: int, augmenting_size: int, **settings: Any) -> Bridge:
    """A bridge that adds something, always the same."""
    bridge = Bridge(anchor_size, augmenting_size, BridgeConfig(num_heads=4, **settings), 0)
    torch.nn.init.normal_(bridge.cross_o.weight, std=0.2)
    return bridge


def lopsided(rows: int, size: int) -> Tensor:
    """States like Gemma's: a few channels, and the first token, are far larger than the rest."""
    states = torch.randn(1, rows, size)
    states[..., 3] *= 50
    states[:, 0] *= 20
    return states


def climbing_gemma(**changes: Any) -> Any:
    """A tiny Gemma 3 whose residual stream leaves fp16's range in its second layer."""
    model = tiny("gemma3_text", **changes)
    with torch.no_grad():
        model.model.layers[1].post_feedforward_layernorm.weight.fill_(2e5)
    return model


def largest_state(model: PreTrainedModel, ids: Tensor) -> float:
    """The largest number in the residual stream."""
    states = model(ids, output_hidden_states=True).hidden_states[:-1]  # the last is normalised
    return max(state.abs().max().item() for state in states)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_a_narrow_bridge_reads_states_beyond_float16(dtype, error):
    """They are normalised in float32 before they are cast; the update is scaled after."""
    states, hidden = lopsided(9, 24) * 5e4, lopsided(9, 20) * 5e4
    assert min(states.abs().max(), hidden.abs().max()) > 10 * FP16_LARGEST
    bridge = opened(20, 24)
    expected = bridge.double()(hidden.double(), states.double())
    update = bridge.to(dtype)(hidden, states)
    assert update.dtype == torch.float32
    assert update.isfinite().all()
    assert (update - expected).norm() < error * expected.norm()
    assert bridge(hidden.bfloat16(), states.bfloat16()).isfinite().all()


@torch.no_grad()
def test_the_scale_of_the_augmenting_model_does_not_matter():
    """Gemma's states are 1000 times larger than Qwen's: the bridge sees no difference."""
    states, hidden = lopsided(9, 24), lopsided(9, 20)
    bridge = opened(20, 24)
    expected = bridge(hidden, states)
    torch.testing.assert_close(bridge(hidden, 1000 * states), expected, rtol=1e-4, atol=1e-4)
    paper = opened(20, 24, norm=False)
    assert not torch.allclose(paper(hidden, 1000 * states), paper(hidden, states), rtol=0.5)


@torch.no_grad()
def test_the_update_is_in_the_unit_of_the_anchor():
    states, hidden = lopsided(9, 24), lopsided(9, 20)
    bridge = opened(20, 24)
    expected = 1000 * bridge(hidden, states)
    torch.testing.assert_close(bridge(1000 * hidden, states), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bridge_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("climbs", ["anchor", "augmenting", "both"])
@torch.no_grad()
def test_compositions_with_states_beyond_float16(climbs, dtype, bridge_dtype):
    ids = token_ids(2, 13)
    anchor = tiny("llama") if climbs == "augmenting" else climbing_gemma(seed=4)
    augmenting = tiny("llama", seed=1) if climbs == "anchor" else climbing_gemma()
    large = anchor if climbs == "anchor" else augmenting
    assert largest_state(large, ids) > FP16_LARGEST
    model = compose(anchor.to(dtype), augmenting.to(dtype), every=1, bridge_dtype=bridge_dtype)
    with model.anchor_only():
        alone = model(ids).logits
    assert torch.equal(model(ids).logits, alone)
    open_bridges(model)
    logits = model(ids).logits
    assert logits.isfinite().all()
    assert not torch.equal(logits, alone)
    output = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert output.shape == (2, 16)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_training_in_mixed_precision_with_states_beyond_float16(autocast):
    """What the residual stream holds stays in float32; Gemma's own layers must stay in range."""
    ids = token_ids(2, 13)
    gemma = tiny("gemma3_text", tie_word_embeddings=False)
    with torch.no_grad():
        gemma.get_input_embeddings().weight *= 2e6
    assert largest_state(gemma, ids) > FP16_LARGEST
    model = open_bridges(compose(tiny("llama"), gemma, every=1)).train()
    with torch.autocast("cpu", dtype=autocast):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.bridges.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_tied_embeddings_stay_tied_and_unsaved(tmp_path):
    """Composing, training and saving neither separate the two nor write either."""
    for name, seed in (("anchor", 0), ("code", 1)):
        tiny("gemma3_text", seed, tie_word_embeddings=True).save_pretrained(tmp_path / name)
    made = compose(str(tmp_path / "anchor"), {"code": str(tmp_path / "code")}, every=1)
    open_bridges(made)(token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    made.save_pretrained(tmp_path / "composed")
    again = ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    for model in (made, again):
        parts: list[Any] = [model.anchor, model.augmenting["code"]]
        for part in parts:
            embedding = part.get_input_embeddings().weight
            assert part.get_output_embeddings().weight is embedding
            assert (embedding.requires_grad, embedding.grad) == (False, None)
        alone = sum(parameter.numel() for parameter in model.anchor.parameters())
        assert model.num_parameters_by_part()["anchor"] == alone
    ids = token_ids(2, 9)
    assert torch.equal(again(ids).logits, made(ids).logits)
    for file in (tmp_path / "composed").glob("*.safetensors"):
        assert b"embed" not in file.read_bytes()[:10_000]


@torch.no_grad()
def test_reading_on_far_beyond_a_sliding_window():
    """Bridges read every token; only the models' own attention slides (over 5 tokens here)."""
    ids = token_ids(2, 40)
    anchor, augmenting = tiny("gemma3_text", seed=4), tiny("gemma3_text")
    assert "sliding_attention" in augmenting.config.layer_types
    model = open_bridges(compose(anchor.double(), augmenting.double(), every=1)).double()
    expected = model(ids).logits
    output = model(ids[:, :21], use_cache=True)
    parts = [output.logits]
    for index in range(21, 40):
        output = model(ids[:, index : index + 1], past_key_values=output.past_key_values)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-9)


# ---- fetching ----------------------------------------------------------------------------


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A package as pip finds it; importing it, or installing it, would be noticed."""
    module = name.replace("-", "_")
    facts = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nothing\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{module}/__init__.py", "raise SystemExit('imported')")
        for path, content in files.items():
            archive.writestr(f"{module}/{path}", content)
        for path, text in facts.items():
            archive.writestr(f"{module}-1.0.dist-info/{path}", text)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Two small models in packages; pip sees no others."""
    from test_gguf import write_gguf

    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    content = path.read_bytes()
    shelf = tmp_path / "shelf"
    write_wheel(shelf, "model-part1", {"data/one": content[:7000]})
    write_wheel(shelf, "model-part2", {"data/two": content[7000:]})
    write_wheel(shelf, "model-terms", {"TERMS.html": b"be good"})
    tiny_model = real_models.Model(
        name="tiny",
        sha256=gguf.sha256(path),
        parts=(
            ("model-part1==1.0", "model_part1/data/one"),
            ("model-part2==1.0", "model_part2/data/two"),
        ),
        licence="a licence that restricts use",
        terms=("model-terms==1.0", "model_terms/TERMS.html"),
    )
    asked = real_models.Model(
        name="asked", sha256="0" * 64, parts=tiny_model.parts, licence="none", on_request=True
    )
    monkeypatch.setattr(real_models, "MODELS", {"tiny": tiny_model, "asked": asked})
    monkeypatch.setenv("GRAFTLM_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return shelf


def test_a_model_is_fetched_once(shelf, tmp_path, capfd, monkeypatch):
    assert find_model("tiny") is None
    assert real_models.main([]) == 0
    folder = find_model("tiny")
    captured = capfd.readouterr()
    assert captured.out == f"tiny: {folder}\n"
    assert "tiny: licence: a licence that restricts use\n" in captured.err
    assert (tmp_path / "models" / "tiny.terms.html").read_text() == "be good"
    assert f"the terms are in {tmp_path / 'models' / 'tiny.terms.html'}" in captured.err
    assert folder is not None
    assert folder.parent == tmp_path / "models"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert require_model("tiny") == folder
    assert "model_part1" not in sys.modules

    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("fetched again"))
    assert fetch_model("tiny") == folder
    assert "licence" in capfd.readouterr().err
    (folder / "model.safetensors").write_bytes(b"")
    assert find_model("tiny") is None
    assert fetch_model("tiny") == folder  # from the file beside it


def test_a_model_that_was_not_fetched(shelf, tmp_path):
    words = rf"tiny is not in {tmp_path}/models; fetch it with make models, or say with GRAFTLM_MO"
    with pytest.raises(ValueError, match=words):
        require_model("tiny")
    with pytest.raises(
        ValueError, match="asked is not in .*; fetch it with make models CODER=1, o"
    ):
        require_model("asked")


def test_a_package_that_is_gone(shelf, capfd):
    """Only wheels count: a source package would run its own code."""
    (shelf / "model_part2-1.0-py3-none-any.whl").unlink()
    source = shelf / "model-part2-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(shelf / 'ran')!r}, 'w')")
    subprocess.run(["tar", "czf", f"{source}.tar.gz", source.name], cwd=shelf, check=True)
    assert real_models.main([]) == 1
    error = capfd.readouterr().err
    assert (
        "error: the package model-part2==1.0 could not be downloaded: ERROR: No matching" in error
    )
    assert "Traceback" not in error
    assert not (shelf / "ran").exists()


def test_a_package_that_holds_something_else(shelf, tmp_path):
    write_wheel(shelf, "model-part2", {"data/two": b"something else"})
    with pytest.raises(ValueError, match="tiny: the packages hold another file than the one meant"):
        fetch_model("tiny")
    write_wheel(shelf, "model-part2", {"data/three": b""})
    words = "the package model-part2==1.0 does not hold model_part2/data/two"
    with pytest.raises(ValueError, match=words):
        fetch_model("tiny")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_model_on_request(shelf, capfd):
    assert real_models.main(["--coder", "--folder", str(shelf.parent / "other")]) == 1
    captured = capfd.readouterr()
    assert captured.out.startswith(f"tiny: {shelf.parent / 'other'}")
    assert "error: asked: the packages hold another file" in captured.err


# ---- the models themselves ---------------------------------------------------------------


def real(name: str, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer."""
    folder = require_model(name)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval(), tokenizer


def loss_of(model: Any, ids: Tensor) -> float:
    """Mean negative log-likelihood of a token."""
    return model(ids, labels=ids).loss.item()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=fetched(name)) for name in (SMOLLM, GEMMA, QWEN)]
)
@torch.no_grad()
def test_a_converted_model_knows_english(name):
    """In bfloat16, as it lies in the folder; a wrong permutation or scale would show here."""
    model, tokenizer = real(name)
    assert model.dtype == torch.bfloat16
    text = (
        "All human beings are born free and equal in dignity and rights. They are endowed with "
        "reason and conscience and should act towards one another in a spirit of brotherhood."
    )
    assert loss_of(model, tokenizer(text, return_tensors="pt").input_ids) < 3.5
    tied = name != QWEN  # its file holds an output matrix of its own
    assert model.config.tie_word_embeddings is tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize(
    ("name", "begin", "template"),
    [
        pytest.param(SMOLLM, [], True, marks=fetched(SMOLLM)),
        pytest.param(GEMMA, [2], False, marks=fetched(GEMMA)),
        pytest.param(QWEN, [], True, marks=fetched(QWEN)),
    ],
)
def test_rules_of_the_first_token(name, begin, template):
    """Gemma wants <bos>, the others want none; each tokenizer says so itself."""
    tokenizer: Any = AutoTokenizer.from_pretrained(require_model(name))
    text = "def f(x):\n    return x + 12  # naïve 平方 👩‍🚀"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text)["input_ids"] == begin + bare
    assert tokenizer.decode(bare) == text
    assert bool(tokenizer.chat_template) is template
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][len(begin) :]
    assert (offsets[0][0], offsets[-1][1]) == (0, len(text))
    if begin:
        assert tokenizer.bos_token_id == begin[0]


@pytest.mark.parametrize("name", [pytest.param(GEMMA, marks=fetched(GEMMA))])
@torch.no_grad()
def test_gemma_leaves_the_range_of_float16(name):
    """Composed with itself: finite in bfloat16 and through a float16 bridge."""
    gemma, tokenizer = real(name)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert largest_state(gemma, ids) > FP16_LARGEST
    alone = gemma(ids).logits
    model = compose(gemma, gemma)
    assert torch.equal(model(ids).logits, alone)
    open_bridges(model)
    for bridge_dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.bridges.to(bridge_dtype)
        logits = model(ids).logits
        assert logits.isfinite().all()
        assert not torch.equal(logits, alone)


@pytest.mark.parametrize("name", [pytest.param(GEMMA, marks=fetched(GEMMA))])
@torch.no_grad()
def test_gemma_reads_on_beyond_its_window(name):
    """512 tokens; with a cache as without, composed with itself."""
    gemma, tokenizer = real(name, dtype=torch.float32)
    assert gemma.config.sliding_window == 512
    ids = tokenizer(TEXT * 12, return_tensors="pt").input_ids[:, :600]
    assert ids.shape[1] == 600
    model = open_bridges(compose(gemma, gemma, every=6))
    expected = model(ids).logits[:, -4:]
    output = model(ids[:, :597], use_cache=True)
    parts = [output.logits[:, -1:]]
    for index in range(597, 600):
        output = model(ids[:, index : index + 1], past_key_values=output.past_key_values)
        parts.append(output.logits)
    found = torch.cat(parts, dim=1)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("names", [pytest.param((SMOLLM, GEMMA), marks=fetched(SMOLLM, GEMMA))])
@torch.no_grad()
def test_a_bridge_between_scales_that_are_far_apart(names):
    """Gemma's states into SmolLM2's: the update is of the anchor's size, in any precision."""
    small, small_tokenizer = real(names[0])
    large, large_tokenizer = real(names[1])

    def states_of(model: Any, tokenizer: Any, index: int) -> Tensor:
        ids = tokenizer(TEXT, return_tensors="pt").input_ids
        return model(ids, output_hidden_states=True).hidden_states[index].float()

    hidden = states_of(small, small_tokenizer, 8)
    states = states_of(large, large_tokenizer, 16)
    sizes = [x.square().mean().sqrt().item() for x in (hidden[:, 1:], states[:, 1:])]
    assert sizes[1] > 100 * sizes[0]
    every = torch.ones(1, 1, hidden.shape[1], states.shape[1], dtype=torch.bool)
    bridge = opened(hidden.shape[-1], states.shape[-1])
    expected = bridge(hidden, states, every)
    unit = hidden.square().mean(-1).sqrt()
    ratio = expected.square().mean(-1).sqrt() / unit
    assert ratio.min() > 0.05
    assert ratio.max() < 20
    for dtype, error in ((torch.float16, 5e-3), (torch.bfloat16, 3e-2)):
        update = bridge.to(dtype)(hidden, states, every)
        assert (update - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("name", [pytest.param(SMOLLM, marks=fetched(SMOLLM))])
@torch.no_grad()
def test_smollm_composed_saved_and_loaded_again(name, tmp_path):
    """By the path of its GGUF; the folder of the models serves as the cache."""
    path = require_model(name).parent / f"{name}.gguf"
    if not path.exists():
        pytest.skip("only the converted copy is on this machine")
    gguf.resolve(str(path), path.parent)
    model = open_bridges(compose(path, path, every=10))
    model.save_pretrained(tmp_path / "composed")
    again = ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    anchor: Any = again.anchor
    assert anchor.get_output_embeddings().weight is anchor.get_input_embeddings().weight
    assert again.config.bases["anchor"]["name_or_path"] == str(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "composed")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, model(ids).logits)
    [file] = (tmp_path / "composed").glob("*.safetensors")
    bridges = again.num_parameters_by_part()["bridges"]
    assert bridges * 4 <= file.stat().st_size < bridges * 4 + 10_000
