"""GGUF files: converted once, known again by hash, and taken wherever a model is."""

import builtins
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig

from families import open_bridges
from graftlm import ComposedForCausalLM, compose, gguf
from graftlm.cli import main
from graftlm.recipe import Recipe
from graftlm.tokenization import find_tokenizer
from graftlm.training import prepare
from tiny import write_lines

package = pytest.importorskip("gguf", reason="the gguf package is not installed")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rms_norm_eps": 2**-20,  # a GGUF holds it in float32
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def byte_tokens() -> list[str]:
    """The 256 characters byte-level BPE writes bytes as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + index) for index in range(len(rest)))]


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp wants them for its rotary embedding."""
    size = weight.shape[0] // heads
    return weight.view(heads, 2, size // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    tied: bool = True,
    tokenizer: bool = True,
    merges: tuple[str, ...] = ("t h", "th e"),
    leave_out: str | None = None,
    parts: int = 1,
    quantized: bool = False,
) -> Any:
    """A random llama as a GGUF file; returns the model it holds."""
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens(), *(m.replace(" ", "") for m in merges)]
    config = LlamaConfig(vocab_size=len(tokens), tie_word_embeddings=tied, **SIZES)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    writer = package.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    if parts > 1:
        writer.add_uint16("split.count", parts)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges(list(merges))
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if leave_out and leave_out in name:
            continue
        for heads, which in ((4, "q_proj"), (2, "k_proj")):
            if which in name:
                tensor = interleaved(tensor, heads)
        name = name.replace("model.embed_tokens", "token_embd").replace("lm_head", "output")
        name = name.replace("model.norm", "output_norm").replace("model.layers", "blk")
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        values = tensor.float().numpy()
        if quantized and values.ndim == 2:
            kind = package.GGMLQuantizationType.Q8_0
            blocks = package.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of each test's own, and a process that has seen no file yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAFTLM_CACHE", str(folder))
    monkeypatch.setattr(gguf, "_folders", {})
    return folder


@pytest.fixture
def path(tmp_path):
    """A tiny model's file."""
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def conversions(monkeypatch):
    """The names of the files converted from here on."""
    names, write = [], gguf.write_model

    def counted(path, folder):
        names.append(path.name)
        write(path, folder)

    monkeypatch.setattr(gguf, "write_model", counted)
    return names


# ---- converting --------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_of_the_file_in_bfloat16(tmp_path, tied, cache):
    """Down to the bit, against the model the file was made from."""
    original = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    expected = AutoModelForCausalLM.from_config(original.config, dtype=torch.bfloat16)
    expected.load_state_dict(original.state_dict())
    folder = gguf.convert(tmp_path / "tiny.gguf")
    assert folder.parent == cache
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    here, there = model.state_dict(), expected.state_dict()
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        assert torch.equal(here[name], tensor), name
    assert not hasattr(model.config, "quantization_config")
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model(ids).logits, expected.eval()(ids).logits)


def test_a_quantized_file_gives_what_transformers_reads(tmp_path):
    """The same logits as the model loaded directly, its weights rounded to bfloat16."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, quantized=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.convert(path), dtype=torch.float32)
    dense = GgufConfig(dequantize=True)
    direct = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=dense
    )
    ids = torch.arange(24).view(2, 12)
    assert not torch.equal(model(ids).logits, direct(ids).logits)  # not in bfloat16 before
    for parameter in direct.parameters():
        parameter.data = parameter.bfloat16().float()
    assert torch.equal(model(ids).logits, direct(ids).logits)


def test_the_tokenizer_is_that_of_the_file(path, tmp_path):
    converted: Any = AutoTokenizer.from_pretrained(gguf.convert(path))
    direct: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in ("the theatre", "naïve  café\n\t12", "<s>a</s>", ""):
        assert converted(text)["input_ids"] == direct(text)["input_ids"]
        assert converted.decode(converted.encode(text, add_special_tokens=False)) == text
    assert converted("the")["input_ids"] == [1, 260]
    assert converted.eos_token == direct.eos_token == "</s>"


def test_files_beside_the_gguf_are_not_taken_for_a_part_of_it(path):
    """A folder often holds several models, or a configuration of the original."""
    (path.parent / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (path.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": 77}))
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<unk>"}))
    folder = gguf.convert(path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.model_type, model.generation_config.eos_token_id) == ("llama", 2)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "</s>"


def test_a_file_without_a_tokenizer(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tokenizer=False)
    assert find_tokenizer(str(path)) is None
    assert compose(str(path), path).anchor.config.name_or_path == str(path)


def test_no_path_of_this_machine_is_left_in_the_folder(path):
    for file in gguf.convert(path).iterdir():
        assert str(path.parent).encode() not in file.read_bytes(), file.name


# ---- the cache ---------------------------------------------------------------------------


def test_the_second_time_nothing_is_converted(path, tmp_path, conversions, capfd):
    first = gguf.convert(path)
    assert "converting tiny.gguf (0 MB), once" in capfd.readouterr().err
    moved = shutil.move(path, tmp_path / "moved.GGUF")
    assert gguf.convert(moved) == first
    assert gguf.resolve(str(moved)) == str(first)
    assert conversions == ["tiny.gguf"]
    assert capfd.readouterr() == ("", "")


def test_a_copy_beside_the_file_is_used(path, conversions):
    made = gguf.convert(path, path.parent)
    assert made.parent == path.parent
    assert gguf.convert(path) == made
    assert conversions == ["tiny.gguf"]


def test_another_file_of_the_same_name_is_another_model(path, conversions):
    first = gguf.resolve(str(path))
    write_gguf(path, seed=1)
    assert gguf.resolve(str(path)) != first
    assert len(conversions) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", gguf.RECORD])
@pytest.mark.parametrize("damage", ["cut off", "changed", "gone"])
def test_a_damaged_copy_is_made_again(path, conversions, name, damage):
    folder = gguf.convert(path)
    sound = (folder / name).read_bytes()
    if damage == "gone":
        (folder / name).unlink()
    else:
        broken = sound[:-9] if damage == "cut off" else sound[:-9] + b"12345678}"
        (folder / name).write_bytes(broken)
    again = gguf.convert(path)
    if (name, damage) == (gguf.RECORD, "changed"):
        return  # JSON may survive it; what counts is that the weights are as recorded
    assert (again, len(conversions)) == (folder, 2)
    assert (folder / name).read_bytes() == sound


def test_nothing_is_left_of_a_conversion_that_failed(path, cache, monkeypatch):
    def interrupted(path, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "write_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gguf.convert(path)
    assert list(cache.iterdir()) == []
    assert gguf.is_whole(gguf.convert(path))


def test_another_process_was_faster(path, conversions, monkeypatch):
    """Both copies are the same; the first stays."""
    write = gguf.write_model

    def overtaken(path, folder):
        monkeypatch.setattr(gguf, "write_model", write)
        times.append(os.stat(gguf.convert(path) / gguf.RECORD).st_mtime_ns)
        write(path, folder)

    times: list[int] = []
    monkeypatch.setattr(gguf, "write_model", overtaken)
    folder = gguf.convert(path)
    assert gguf.is_whole(folder)
    assert [os.stat(folder / gguf.RECORD).st_mtime_ns] == times
    assert list(folder.parent.iterdir()) == [folder]


def test_where_the_cache_is(path, tmp_path, monkeypatch):
    assert gguf.convert(path, tmp_path / "named").parent == tmp_path / "named"
    assert gguf.default_cache() == tmp_path / "cache"
    monkeypatch.setenv("GRAFTLM_CACHE", "~/there")
    monkeypatch.setenv("HOME", "/home/someone")
    assert gguf.default_cache() == Path("/home/someone/there")
    monkeypatch.setenv("GRAFTLM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert gguf.default_cache() == Path("/elsewhere/graftlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf.default_cache() == Path("/home/someone/.cache/graftlm")


# ---- what is refused ---------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path):
    words = "the model is 'missing.gguf', but there is no such file"
    with pytest.raises(ValueError, match=words):
        gguf.convert("missing.gguf")
    with pytest.raises(ValueError, match=words):
        compose("missing.gguf", "missing.gguf")
    assert find_tokenizer(str(tmp_path / "missing.gguf")) is None


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<!doctype html>")
    with pytest.raises(
        ValueError, match=r"page\.gguf is no GGUF file: it begins with b'<!do', not"
    ):
        compose(str(path), path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"page\.gguf is no GGUF file: it begins with b'', not"):
        gguf.convert(path)


@pytest.mark.parametrize("kept", [4, 20, 100, 3000, 0.5, 0.99])
def test_a_file_that_is_cut_off(path, kept, cache):
    sound = path.read_bytes()
    path.write_bytes(sound[: kept if isinstance(kept, int) else int(kept * len(sound))])
    size = f"{path.stat().st_size:,}"
    with pytest.raises(ValueError, match=rf"tiny\.gguf is cut off or damaged \({size} bytes, "):
        gguf.convert(path)
    assert list(cache.iterdir()) == []


def test_one_part_of_several(path):
    write_gguf(path, parts=3)
    with pytest.raises(ValueError, match=r"tiny\.gguf is one of 3 parts of a model; join them wi"):
        gguf.convert(path)


def test_a_file_that_lacks_a_weight(path):
    """transformers would draw random numbers in its place."""
    write_gguf(path, leave_out="layers.1.mlp.up_proj")
    words = r"tiny\.gguf lacks weights of its model, such as 'model\.layers\.1\.mlp\.up_proj\.weig"
    with pytest.raises(ValueError, match=words):
        gguf.convert(path)


def test_the_package_is_missing(path, monkeypatch):
    """It is needed to convert, not to use what was converted."""
    folder = gguf.convert(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert gguf.convert(path) == folder
    shutil.rmtree(folder)
    words = r"tiny\.gguf must be converted, but the gguf package is missing; pip install 'graftlm\["
    with pytest.raises(ValueError, match=words):
        gguf.convert(path)


def test_names_that_are_no_files_stay_as_they_are(tmp_path):
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    for name in ("owner/name", "/a/folder", "model.ggufs", "owner/model-GGUF", str(folder)):
        assert gguf.resolve(name) == name


# ---- composing ---------------------------------------------------------------------------


@torch.no_grad()
def test_compose_save_and_load_again(path, tmp_path, conversions):
    other = tmp_path / "other.gguf"
    write_gguf(other, seed=1)
    model = open_bridges(compose(path, {"code": str(other)}, every=1))
    assert model.anchor.config.name_or_path == str(path)
    model.save_pretrained(tmp_path / "composed")
    bases = model.config.bases
    places = {name: base["name_or_path"] for name, base in bases.items()}
    assert places == {"anchor": str(path), "code": str(other)}
    assert all(base["fingerprint"]["tokenizer"] for base in bases.values())
    again = ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    assert conversions == ["tiny.gguf", "other.gguf"]
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)
    beside: Any = find_tokenizer(str(path))
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "composed")
    assert beside.get_vocab() == saved.get_vocab()


@torch.no_grad()
def test_a_relative_path_is_remembered_as_absolute(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = compose("tiny.gguf", "tiny.gguf")
    model.save_pretrained("composed")
    monkeypatch.chdir("/")
    ComposedForCausalLM.from_pretrained(tmp_path / "composed")


@torch.no_grad()
def test_the_cache_may_be_deleted(path, tmp_path, cache, conversions):
    model = open_bridges(compose(str(path), str(path)))
    model.save_pretrained(tmp_path / "composed")
    shutil.rmtree(cache)
    again = ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    assert len(conversions) == 2
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_cache_named_by_the_user(path, tmp_path, cache, conversions):
    """Whoever asks for the tokenizer afterwards finds it there, too."""
    compose(str(path), str(path)).save_pretrained(tmp_path / "composed")
    shutil.rmtree(cache)
    named = tmp_path / "named"
    model = ComposedForCausalLM.from_pretrained(tmp_path / "composed", cache_dir=str(named))
    assert find_tokenizer(model.anchor.config.name_or_path) is not None
    assert [folder.name for folder in named.iterdir()] == [
        gguf.folder_name(gguf.sha256(path)),
    ]
    assert (len(conversions), cache.exists()) == (2, False)


def test_the_file_has_changed_since(path, tmp_path):
    compose(str(path), str(path)).save_pretrained(tmp_path / "composed")
    write_gguf(path, seed=1)
    with pytest.raises(ValueError, match="the anchor is not the model .* its weights differ"):
        ComposedForCausalLM.from_pretrained(tmp_path / "composed")


def test_the_file_has_moved(path, tmp_path):
    compose(str(path), str(path)).save_pretrained(tmp_path / "composed")
    moved = shutil.move(path, tmp_path / "moved.gguf")
    with pytest.raises(ValueError, match=r"tiny\.gguf', but there is no such file"):
        ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    model = ComposedForCausalLM.from_pretrained(
        tmp_path / "composed", anchor=moved, augmenting=str(moved)
    )
    assert model.config.bases["anchor"]["name_or_path"] == str(moved)


def test_training_takes_a_file(path, tmp_path, conversions):
    data = write_lines(tmp_path / "data.jsonl", *({"text": f"the {n}"} for n in range(9)))
    values = {
        "anchor": str(path),
        "augmenting": str(path),
        "data": data,
        "output_dir": str(tmp_path / "run"),
        "training": {"max_steps": 1},
    }
    training = prepare(Recipe.from_mapping(values, "the test"))
    assert training.max_length == 64
    assert conversions == ["tiny.gguf"]


def test_commands_take_a_file(path, tmp_path, capsys, monkeypatch):
    composed = str(tmp_path / "composed")
    arguments = ["--anchor", str(path), "--augmenting", f"code={path}", "--output", composed]
    assert main(["compose", *arguments]) == 0
    assert main(["inspect", composed]) == 0
    shown = capsys.readouterr().out
    assert "tiny.gguf" in shown.replace("\n", "")
    assert [line.split()[-1] for line in shown.splitlines() if "llama" in line] == ["yes", "yes"]
    assert main(["generate", composed, "the", "--max-new-tokens", "3"]) == 0
    path.write_bytes(b"GGUF")
    assert main(["compose", *arguments]) == 2
    assert "tiny.gguf is cut off or damaged (4 bytes" in capsys.readouterr().err


def test_the_package_is_not_imported_without_need(path, monkeypatch):
    """Nor does a model of another kind need it."""
    folder = gguf.convert(path)
    real = builtins.__import__

    def refuse(name, *rest):
        assert name != "gguf"
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    gguf.resolve(str(path))
    gguf.resolve(str(folder))
