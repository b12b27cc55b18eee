"""Who may read what: small masks, written out."""

from typing import Any

import torch

from graftlm.alignment import align, packed_segments, readable_keys

LOWEST = torch.finfo(torch.float32).min


def aligned(**changes: Any) -> Any:
    """The alignment of a first pass over four tokens, changed."""
    arguments: dict[str, Any] = {
        "past_length": 0,
        "query_length": 4,
        "kept_length": 0,
        "new_length": 4,
        "key_length": 4,
        "readable": None,
        "segments": None,
        "position": "none",
        "num_heads": 2,
        "device": torch.device("cpu"),
    }
    return align(**arguments | changes)


def rows(mask: Any) -> list[str]:
    """A mask as text: x may be read, . may not."""
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def test_a_plain_first_pass_needs_no_mask():
    """None is plain causal attention; the fast kernels need it."""
    alignment = aligned()
    assert alignment.cross_mask is None
    assert alignment.any_visible is None
    assert alignment.query_positions.tolist() == [[0, 1, 2, 3]]
    assert alignment.new_key_positions.tolist() == [[0, 1, 2, 3]]


def test_one_decoding_step_reads_everything():
    step = {"past_length": 6, "query_length": 1, "kept_length": 6, "new_length": 1}
    alignment = aligned(**step, key_length=7)
    assert alignment.cross_mask is None
    assert alignment.query_positions.tolist() == [[6]]
    assert alignment.new_key_positions.tolist() == [[6]]


def test_a_later_chunk_reads_what_was_kept_and_itself():
    chunk = {"past_length": 3, "query_length": 2, "kept_length": 3, "new_length": 2}
    alignment = aligned(**chunk, key_length=5)
    assert rows(alignment.cross_mask[0, 0]) == ["xxxx.", "xxxxx"]


def test_empty_slots_of_a_static_cache_are_not_read():
    past = torch.tensor(2)
    step = {"past_length": past, "query_length": 1, "kept_length": past, "new_length": 1}
    alignment = aligned(**step, key_length=5)
    assert rows(alignment.cross_mask[0, 0]) == ["xxx.."]


def test_padding_is_not_read_and_a_row_of_padding_reads_all_but_counts_for_nothing():
    readable = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    alignment = aligned(readable=readable)
    assert rows(alignment.cross_mask[0, 0]) == ["x...", "xx..", "xxx.", "xxxx"]
    assert rows(alignment.cross_mask[1, 0]) == ["xxxx", "xxxx", "..x.", "..xx"]
    assert rows(alignment.cross_mask[2, 0]) == ["xxxx"] * 4
    assert rows(alignment.any_visible[..., 0]) == ["xxxx", "..xx", "...."]


def test_distance_adds_its_bias_and_hides_the_rest():
    """Two heads: slopes 8 and 1/2."""
    mask = aligned(position="distance", query_length=2, new_length=2, key_length=2).cross_mask
    assert mask[0, 0].tolist() == [[0, LOWEST], [-8, 0]]
    assert mask[0, 1].tolist() == [[0, LOWEST], [-1 / 2, 0]]


def test_distance_counts_from_the_cache_on():
    step = {"past_length": 6, "query_length": 1, "kept_length": 6, "new_length": 1}
    mask = aligned(**step, key_length=7, position="distance").cross_mask
    assert mask[0, 0, 0].tolist() == [-48, -40, -32, -24, -16, -8, 0]


def test_packed_documents_do_not_read_each_other():
    segments: Any = packed_segments(torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]))
    assert segments.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    mask = aligned(segments=segments).cross_mask
    assert rows(mask[0, 0]) == ["x...", "xx..", "..x.", "..xx"]
    assert rows(mask[1, 0]) == ["x...", "xx..", "xxx.", "xxxx"]


def test_positions_that_go_on_are_one_document():
    assert packed_segments(torch.tensor([[0, 1, 2], [0, 1, 2]])) is None
    assert packed_segments(torch.tensor([[5, 6, 7]])) is None


def test_a_prompt_that_is_shorter_than_the_anchor_is_read_to_its_end():
    """Generated tokens have no keys: the last position reads the three of the prompt."""
    step = {"past_length": 5, "query_length": 1, "kept_length": 3, "new_length": 0}
    alignment = aligned(**step, key_length=3, readable=torch.tensor([[0, 1, 1]]).bool())
    assert rows(alignment.cross_mask[0, 0]) == [".xx"]


def test_readable_keys_are_tokens_and_of_the_prompt():
    attention = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    prompt = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert readable_keys(None, None, 4) is None
    assert readable_keys(torch.ones(2, 4), None, 4) is None
    assert rows(readable_keys(attention, None, 4)) == [".xxx", "xxxx"]
    assert rows(readable_keys(attention, None, 2)) == [".x", "xx"]
    assert rows(readable_keys(None, prompt, 4)) == ["xx..", "x..."]
    assert rows(readable_keys(attention, prompt, 4)) == [".x..", "x..."]
    assert rows(readable_keys(attention, prompt, 2)) == [".x", "x."]
