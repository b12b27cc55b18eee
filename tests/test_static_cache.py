"""A static cache shows the attention its empty slots, which nobody may read."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from families import open_bridges
from graftlm import compose

PAD = 0


@pytest.fixture(params=["distance", "rotary", "none"])
def model(request):
    torch.manual_seed(7)
    shape = {"vocab_size": 41, "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    anchor = LlamaConfig(
        hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4, **shape
    )
    augmenting = LlamaConfig(
        hidden_size=16, intermediate_size=29, num_hidden_layers=2, num_attention_heads=2, **shape
    )
    model = compose(
        *(AutoModelForCausalLM.from_config(config) for config in (anchor, augmenting)),
        every=1,
        position=request.param,
    )
    return open_bridges(model)


@pytest.mark.parametrize("reads", ["sequence", "prompt"])
def test_a_static_cache_handed_to_forward(model, reads):
    """Without padding no mask is needed, and the empty slots were read once for that reason."""
    model.config.reads = reads
    tokens = torch.randint(1, 41, (2, 11))
    prompt_mask = torch.ones(2, 7, dtype=torch.long)
    whole = model(tokens, prompt_mask=prompt_mask, use_cache=False).logits
    cache = StaticCache(config=model.anchor.config, max_cache_len=17)
    output = model(tokens[:, :7], past_key_values=cache, prompt_mask=prompt_mask)
    pieces = [output.logits]
    for t in range(7, 11):
        cache = output.past_key_values
        output = model(tokens[:, t : t + 1], past_key_values=cache, prompt_mask=prompt_mask)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reads", ["sequence", "prompt"])
@pytest.mark.parametrize("padding", [0, 4])
def test_generate_is_the_same_with_every_cache(model, reads, padding):
    model.config.reads = reads
    tokens = torch.randint(1, 41, (2, 11))
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    ways = [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": StaticCache(config=model.anchor.config, max_cache_len=19)},
        {"prefill_chunk_size": 3},
    ]
    texts = [
        model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, **way)
        for way in ways
    ]
    for text in texts[1:]:
        assert torch.equal(text, texts[0])
