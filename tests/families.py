"""Every decoder family graftlm composes, as the smallest configuration that runs.

Two to four layers, sizes that differ from each other and from the companion's, so that no model
can be taken for the other. Nothing is downloaded: models are built from these and seeded.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

VOCABULARY = 67

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 59,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The CPU kernel for experts needs widths that are multiples of 4.
EXPERTS = {
    "intermediate_size": 36,
    "moe_intermediate_size": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}
LOCAL_EXPERTS = {"intermediate_size": 36, "num_local_experts": 5, "num_experts_per_tok": 2}
THREE_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3}  # half of 8 channels turn
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
SLIDING = {"sliding_window": 5}
ALTERNATING = SLIDING | {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "head_dim": 6,
}
STATE_SPACE = {"state_size": 7, "expand": 2, "conv_kernel": 3}

# What each family needs beyond SHAPE.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gemma2": ALTERNATING | {"head_dim": 6, "query_pre_attn_scalar": 6},
    "gemma3_text": ALTERNATING | {"head_dim": 6, "query_pre_attn_scalar": 6},
    "mistral": SLIDING,
    "qwen3": {"head_dim": 6},
    "bloom": {},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_neox": {},
    "mixtral": LOCAL_EXPERTS,
    "mamba": STATE_SPACE,
    "phi3": {},
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 7},
    "biogpt": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": ALTERNATING,
    "ctrl": {"dff": 37},
    "deepseek_v3": EXPERTS
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 6,
        "num_local_experts": 6,
        "num_experts": 6,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 10,
        "kv_lora_rank": 9,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "first_k_dense_replace": 1,
    },
    "doge": {},
    "ernie4_5": {"head_dim": 6},
    "exaone4": ALTERNATING,
    "falcon_h1": {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_ssm": 48, "mamba_d_state": 7},
    "falcon_mamba": STATE_SPACE,
    "gemma": {"head_dim": 6},
    "gemma4_text": ALTERNATING
    | {"head_dim": 6, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 5},
    "glm": {"head_dim": 6},
    "glm4": {"head_dim": 6},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 5},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt_oss": ALTERNATING | LOCAL_EXPERTS | {"head_dim": 6},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoehybrid": LOCAL_EXPERTS
    | {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 6,
        "mamba_d_head": 8,
        "mamba_d_state": 7,
        "shared_intermediate_size": 13,
    },
    "hunyuan_v1_dense": {"head_dim": 6},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1} | EXPERTS,
    "lfm2": {"full_attn_idxs": [1], "conv_L_cache": 3, "block_multiple_of": 5},
    "llama4_text": {"head_dim": 6, "num_local_experts": 3, "intermediate_size_mlp": 31},
    "mamba2": STATE_SPACE | {"num_heads": 6, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "ministral": ALTERNATING | {"head_dim": 6},
    "modernbert-decoder": {"local_attention": 6, "global_attn_every_n_layers": 2},
    "mpt": {},
    "nemotron": {"head_dim": 6},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "head_dim": 6,
        "ssm_state_size": 7,
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "n_groups": 2,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "opt": {"ffn_dim": 37, "word_embed_proj_dim": 24},
    "persimmon": THREE_HEADS,
    "phi": THREE_HEADS,
    "phimoe": LOCAL_EXPERTS,
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 13},
    "qwen3_5_text": GATED_DELTA | HYBRID,
    "qwen3_moe": EXPERTS | {"head_dim": 6},
    "qwen3_next": GATED_DELTA | HYBRID | EXPERTS | {"shared_expert_intermediate_size": 13},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"], "lru_width": 28},
    "seed_oss": {"head_dim": 6},
    "smollm3": {},
    "starcoder2": {},
    "xglm": {"ffn_dim": 37},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 7,
        "n_mamba_heads": 6,
    },
    # Not in the design's list: its prototype had no valid configuration for them.
    "stablelm": {},
    "helium": {"head_dim": 6},
    "dbrx": {
        "d_model": 24,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"hidden_size": 24, "ffn_hidden_size": 36, "moe_top_k": 2},
    },
    "kimi_linear": EXPERTS
    | HYBRID
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 9,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "linear_head_dim": 6,
        "linear_num_heads": 4,
    },
}

# One of each kind: tensor or tuple layers, rotary, learned or linear positions, sliding windows,
# parallel attention, experts, recurrence. The others are the slow suite's.
REPRESENTATIVE = {
    "llama",
    "gpt2",
    "gemma2",
    "gemma3_text",
    "mistral",
    "qwen3",
    "bloom",
    "falcon",
    "gpt_neox",
    "mixtral",
    "mamba",
    "phi3",
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The smallest configuration of a family that runs."""
    return AutoConfig.for_model(family, **SHAPE | FAMILIES.get(family, {}) | changes)


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A causal language model of that configuration, the same for the same seed."""
    torch.default_generator.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()


def tiny_llama(seed: int = 5, **changes: Any) -> Any:
    """The companion of every family: a Llama of four layers that shares no size with SHAPE."""
    sizes = {
        "hidden_size": 20,
        "intermediate_size": 31,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "max_position_embeddings": 61,
    }
    return tiny("llama", seed, **sizes | changes)


def token_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random tokens, none of them special: (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def open_bridges(model: Any, seed: int = 3) -> Any:
    """Bridges that say something, as after training: random W^O, and an open gate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bridge in model.bridges:
            bridge.cross_o.weight.normal_(std=0.2, generator=generator)
            if bridge.gate is not None:
                bridge.gate.fill_(0.7)
    return model


def left_padded(lengths: list[int], seed: int = 2) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded on the left: `input_ids` and `attention_mask`."""
    longest = max(lengths)
    ids = token_ids(len(lengths), longest, seed)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions as `generate` counts them: padding does not count."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def uncached_logits(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
    """Logits of one plain forward pass over everything, without any cache."""
    with torch.no_grad():
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions_of(attention_mask),
            use_cache=False,
        ).logits


def generated(model: Any, batch: dict[str, torch.Tensor], steps: int, **options: Any) -> Any:
    """`steps` greedy tokens and the logits of each step: sequences, (batch, steps, vocabulary)."""
    output = model.generate(
        **batch,
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences, torch.stack(output.logits, dim=1)


def assert_cached_is_uncached(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> None:
    """Generate with a cache, then run what came out without one: the same logits at each step."""
    steps = 7
    sequences, cached = generated(model, batch, steps, **options)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, steps), value=1)
    uncached = uncached_logits(model, sequences, mask)[:, -steps - 1 : -1]
    torch.testing.assert_close(cached, uncached, atol=5e-6, rtol=1e-5)
    assert torch.equal(uncached.argmax(-1), sequences[:, -steps:])
