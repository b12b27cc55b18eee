"""Arguments of `generate` for the likeliest tokens, whatever the models' files say."""

from typing import Any

# One by one, because transformers fills what a GenerationConfig leaves open from the model's own.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": None,  # transformers warns of sampling settings in greedy search
    "top_p": None,
    "top_k": None,
    # Other searches, and texts written ahead.
    "num_beams": 1,
    "num_return_sequences": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    # What changes scores.
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "token_healing": False,
    # What changes where a text ends; the models' own end tokens do stay.
    "min_length": 0,
    "min_new_tokens": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "max_time": None,
    # The tokens alone come back.
    "return_dict_in_generate": False,
}
