"""Measures one implementation in a process of its own; run by peers.py, also with other Pythons.

    PYTHON peer_driver.py '{"kind": "calm", "path": "...", "task": "step", ...}'

Prints one line of JSON. Each `build_` imports its implementation, and nothing of the others; what
is timed is the same for all. It runs with whatever old versions a peer needs.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
import time


def shape_of(config):
    """Arguments that Llama's and Gemma's configurations share."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings")
    return {name: config[name] for name in names}


def gemma_folder(shape, folder):
    """A random Gemma, saved, because the peer takes folders only."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(**shape_of(shape), tie_word_embeddings=True, torch_dtype="float32")
    GemmaForCausalLM(config).save_pretrained(folder)
    return folder


def build_calm(task):
    """google-deepmind/calm: Gemma only; decoding without a cache, because its cache is wrong."""
    import torch

    sys.path.insert(0, task["path"])
    from model import calm

    with tempfile.TemporaryDirectory() as folder:
        config = calm.CALMConfig(
            anchor_model=gemma_folder(task["anchor"], os.path.join(folder, "anchor")),
            aug_model=gemma_folder(task["augmenting"], os.path.join(folder, "augmenting")),
            connections=[(high, low) for low, high in task["connections"]],
            num_heads=task["anchor"]["num_attention_heads"],
        )
        model = calm.CALM(config)

    def loss(ids):
        mask = torch.ones_like(ids)
        return model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss

    def generate(prompt, number):
        ids = prompt
        for _ in range(number):
            mask = torch.ones_like(ids)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        return ids

    return model, [p for p in model.parameters() if p.requires_grad], loss, generate


def build_calm_pytorch(task):
    """lucidrains/CALM-pytorch: composes x-transformers; its augmenting model reads the prompt."""
    sys.path.insert(0, task["path"])
    from CALM_pytorch.CALM import CALM, AugmentParams
    from x_transformers import Decoder, TransformerWrapper

    def transformer(shape):
        return TransformerWrapper(
            num_tokens=shape["vocab_size"],
            max_seq_len=shape["max_position_embeddings"],
            use_abs_pos_emb=False,
            tie_embedding=True,
            attn_layers=Decoder(
                dim=shape["hidden_size"],
                depth=shape["num_hidden_layers"],
                heads=shape["num_attention_heads"],
                attn_dim_head=shape["head_dim"],
                attn_kv_heads=shape["num_key_value_heads"],
                attn_flash=True,
                ff_mult=shape["intermediate_size"] / shape["hidden_size"],
                ff_glu=True,
                ff_swish=True,
                ff_no_bias=True,
                use_rmsnorm=True,
                rotary_pos_emb=True,
            ),
        )

    anchor = task["anchor"]
    model = CALM(
        transformer(anchor),
        AugmentParams(
            model=transformer(task["augmenting"]),
            connections=tuple((low + 1, high + 1) for low, high in task["connections"]),
        ),
        attn_kwargs={
            "linear_project_context": True,
            "pre_rmsnorm": True,
            "flash": True,
            "heads": anchor["num_attention_heads"],
            "dim_head": anchor["head_dim"],
        },
    )

    def generate(prompt, number):
        return model.generate(prompt, seq_len=prompt.shape[1] + number)

    return model, list(model.parameters()), lambda ids: model(ids, prompt=ids), generate


def build_graftlm(task):
    """Ours, of the models that the peer composes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from graftlm import Connection, compose

    def base(shape):
        config = AutoConfig.for_model(task["family"], **shape_of(shape), tie_word_embeddings=True)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    model = compose(
        base(task["anchor"]),
        base(task["augmenting"]),
        connections=[
            Connection(augmenting_layer=low, anchor_layer=high) for low, high in task["connections"]
        ],
    )

    def generate(prompt, number):
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=number,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
        )

    def loss(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return model, [p for p in model.parameters() if p.requires_grad], loss, generate


def resident(field):
    """A number of bytes in /proc/self/status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure_step(model, trained, loss, task):
    """Seconds of training steps, and the peak of memory above what was loaded."""
    import torch

    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(task["anchor"]["vocab_size"], (1, task["length"]))
    model.train()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    loaded, seconds = resident("VmRSS"), []
    for _ in range(1 + task["steps"]):
        start = time.perf_counter()
        loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds[1:],
        "peak": resident("VmHWM") - loaded,
        "loaded": loaded,
        "trained": sum(p.numel() for p in trained),
    }


def measure_decoding(model, trained, loss, generate, task):
    """Tokens a second behind a prompt, the prompt's own time included."""
    import torch

    prompt = torch.randint(task["anchor"]["vocab_size"], (1, task["prompt"]))
    model.eval()
    with torch.no_grad():
        generate(prompt, 2)
        start = time.perf_counter()
        generate(prompt, task["tokens"])
    return {"tokens_per_second": task["tokens"] / (time.perf_counter() - start)}


BUILDERS = {"calm": build_calm, "calm-pytorch": build_calm_pytorch, "graftlm": build_graftlm}


def main():
    """Measure what the command line describes."""
    task = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, trained, loss, generate = BUILDERS[task["kind"]](task)
    if task["task"] == "step":
        found = measure_step(model, trained, loss, task)
    else:
        found = measure_decoding(model, trained, loss, generate, task)
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    versions = {name: sys.modules[name].__version__ for name in loaded}
    print(json.dumps(dict(found, versions=versions)))


if __name__ == "__main__":
    main()
