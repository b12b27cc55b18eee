"""Reading training data: which rows are refused, which tokens have a loss, what is cut."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from graftlm.collation import padding_collator
from graftlm.data import Examples, load_examples
from tiny import CHAT_TEMPLATE, MARKED_TEMPLATE, character_tokenizer, sums, write_lines


def load(
    source: Path | str, tokenizer: Any = None, max_length: int = 64, **options: Any
) -> Examples:
    return load_examples(
        str(source), tokenizer or character_tokenizer(), max_length=max_length, **options
    )


def shown(examples: Examples, tokenizer: Any = None) -> list[list[tuple[Any, bool]]]:
    """Each token of each example, and whether it has a loss."""
    tokenizer = tokenizer or character_tokenizer()
    shown = []
    for row in rows_of(examples):
        pairs = list(zip(row["input_ids"], row["labels"], strict=True))
        assert all(label in (-100, token) for token, label in pairs)
        shown.append([(tokenizer.convert_ids_to_tokens(t), label != -100) for t, label in pairs])
    return shown


def rows_of(examples: Examples) -> list[dict[str, list[int]]]:
    rows: Any = examples.dataset
    return list(rows)


def silent(*tokens: str) -> list[tuple[str, bool]]:
    return [(token, False) for token in tokens]


def trained(*tokens: str) -> list[tuple[str, bool]]:
    return [(token, True) for token in tokens]


# ---- which tokens have a loss ------------------------------------------------------------


def test_completions_have_the_loss_and_end_the_text(tmp_path: Path) -> None:
    rows = {"prompt": "2+2=", "completion": "4"}, {"prompt": "a\n", "completion": "bc", "id": 7}
    examples = load(write_lines(tmp_path / "d.jsonl", *rows))
    assert shown(examples) == [
        silent("2", "+", "2", "=") + trained("4", "</s>"),
        silent("a", "\n") + trained("b", "c", "</s>"),
    ]
    assert (examples.num_tokens, examples.num_labels) == (11, 5)
    assert (examples.num_truncated, examples.num_dropped) == (0, 0)


def test_a_token_across_the_border_belongs_to_the_completion(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(merges=[("=", "4")])
    path = write_lines(tmp_path / "d.jsonl", {"prompt": "2=", "completion": "42"})
    expected = silent("2") + trained("=4", "2", "</s>")
    assert shown(load(path, tokenizer), tokenizer) == [expected]


def test_all_tokens_have_a_loss_if_asked_for_and_in_texts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"})
    assert shown(load(path, completions_only=False)) == [trained("a", "b", "</s>")]
    path = write_lines(tmp_path / "t.jsonl", {"text": "ab"}, "", {"text": "c</s>"})
    assert shown(load(path)) == [trained("a", "b", "</s>"), trained("c", "</s>")]


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]
CHAT_SHOWN = (
    silent("<|user|>", "h", "i", "<|end|>", "<|assistant|>")
    + trained("y", "o", "<|end|>")
    + silent("<|user|>", "a", "<|end|>", "<|assistant|>")
    + trained("b", "<|end|>")
)


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["by prefixes", "by marks"]
)
def test_assistant_turns_have_the_loss(tmp_path: Path, template: str) -> None:
    tokenizer = character_tokenizer(chat_template=template)
    path = write_lines(tmp_path / "d.jsonl", {"messages": CHAT})
    assert shown(load(path, tokenizer), tokenizer) == [CHAT_SHOWN]
    everything = [(token, True) for token, _ in CHAT_SHOWN]
    assert shown(load(path, tokenizer, completions_only=False), tokenizer) == [everything]


def test_prompt_and_completion_may_be_messages(tmp_path: Path) -> None:
    """As in TRL: only the completion has a loss, not the answers within the prompt."""
    path = write_lines(tmp_path / "d.jsonl", {"prompt": CHAT[:3], "completion": CHAT[3:]})
    expected = [(token, False) for token, _ in CHAT_SHOWN[:-2]] + trained("b", "<|end|>")
    assert shown(load(path)) == [expected]


def test_a_template_that_rewrites_the_past_is_refused(tmp_path: Path) -> None:
    """As templates do that drop the reasoning of earlier turns."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if loop.last else '' }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    path = write_lines(tmp_path / "d.jsonl", {"messages": CHAT})
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: the chat template writes message 2 "):
        load(path, character_tokenizer(chat_template=template))


def test_an_assistant_may_begin(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"messages": CHAT[1:]})
    expected = trained("<|assistant|>", "y", "o", "<|end|>") + CHAT_SHOWN[8:]
    assert shown(load(path)) == [expected]


def test_what_a_template_refuses_is_told_with_its_place(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system messages, please') }}"
    path = write_lines(tmp_path / "d.jsonl", {"messages": CHAT})
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: no system messages, please"):
        load(path, character_tokenizer(chat_template=template))


def test_a_plain_text_file_is_cut_into_blocks_without_loss(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("abcdefgh\n", encoding="utf-8")
    examples = load(tmp_path / "d.txt", max_length=4)
    assert shown(examples) == [
        trained("a", "b", "c", "d"),
        trained("e", "f", "g", "h"),
        trained("\n", "</s>"),
    ]
    assert examples.num_truncated == 0


def test_what_is_cut_is_counted(tmp_path: Path) -> None:
    rows = (
        {"prompt": "12", "completion": "34"},
        {"prompt": "1", "completion": "2"},
        {"prompt": "1234", "completion": "5"},
    )
    path = write_lines(tmp_path / "d.jsonl", *rows)
    with pytest.warns(UserWarning, match="of 3 examples") as caught:
        examples = load(path, max_length=3)
    messages = [str(warning.message) for warning in caught]
    assert messages[0].startswith("2 of 3 examples of ")
    assert "longer than max_length 3 and were cut" in messages[0]
    assert messages[1].startswith("1 of 3 examples of ")
    assert "no token with a loss within max_length 3 and were left out" in messages[1]
    assert shown(examples) == [
        silent("1", "2") + trained("3"),
        silent("1") + trained("2", "</s>"),
    ]
    assert (examples.num_truncated, examples.num_dropped) == (2, 1)


def test_no_end_of_text_token_warns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"text": "ab"})
    tokenizer = character_tokenizer(eos_token=None)
    with pytest.warns(UserWarning, match="no end-of-text token"):
        examples = load(path, tokenizer)
    assert shown(examples) == [trained("a", "b")]


# ---- where rows come from ----------------------------------------------------------------


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    Dataset.from_list(sums(3)).save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one").dataset) == 3
    parts: Any = {"train": Dataset.from_list(sums(3)), "test": Dataset.from_list(sums(2))}
    DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert len(load(tmp_path / "two").dataset) == 3
    assert len(load(f"{tmp_path / 'two'}::test").dataset) == 2


def test_a_dataset_by_name_with_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "named"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *sums(4))
    write_lines(folder / "test.jsonl", *sums(2))
    assert len(load(folder).dataset) == 4
    assert len(load(f"{folder}:default:test").dataset) == 2
    assert len(load(f"{folder}::train[:50%]").dataset) == 2
    with pytest.raises(ValueError, match="'.*::dev' is no file and could not be loaded"):
        load(f"{folder}::dev")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4.0
def test_files_that_do_not_fit_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.csv").write_text("text\none\n")
    (tmp_path / "tables" / "b.csv").write_text("prompt,completion\none,two\n")
    with pytest.raises(
        ValueError, match="tables' is no file and could not be loaded as a data set"
    ):
        load(tmp_path / "tables")


def test_rows_of_datasets_are_named_by_number(tmp_path: Path) -> None:
    Dataset.from_list([{"prompt": "a", "completion": 1}]).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"d, row 1: 'completion' is of type int"):
        load(tmp_path / "d")


# ---- what is refused ---------------------------------------------------------------------

GOOD = {"prompt": "a", "completion": "b"}
MESSAGE = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{'a': 1}",
            "not valid JSON: Expecting property name enclosed in double quotes at column 2",
        ),
        ("[1, 2]", r"must be a JSON object, but is '\[1, 2\]'"),
        ({"question": 1, "answer": 2}, "has 'question', 'answer', but needs 'prompt' and"),
        ({}, "has no key, but needs"),
        ({"prompt": "a"}, "has 'prompt', but no 'completion'"),
        ({"completion": "a"}, "has 'completion', but no 'prompt'"),
        ({"text": "a"}, "holds 'text', but the rows before hold 'prompt' and 'completion'"),
        ({"prompt": "a", "completion": 3}, "'completion' is of type int, but must be a text or a"),
        ({"text": ["a"]}, "'text' is of type list, but must be a text"),
        ({"messages": "a"}, "'messages' is of type str, but must be a list of messages"),
        ({"messages": []}, "'messages' holds no message"),
        ({"messages": [{"role": "user"}]}, "message 1 of 'messages' has no 'content'"),
        ({"messages": [*MESSAGE, "b"]}, "message 2 of 'messages' has no 'role'"),
        ({"prompt": MESSAGE, "completion": "b"}, "one of 'prompt' and 'completion' is a text and"),
        (
            {"prompt": MESSAGE, "completion": MESSAGE},
            "holds 'prompt' and 'completion' as messages, but the rows before hold 'prompt' and "
            "'completion'$",
        ),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write_lines(tmp_path / "d.jsonl", GOOD, "", line)
    with pytest.raises(ValueError, match=rf"d\.jsonl, line 3: {message}"):
        load(path)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"messages": CHAT})
    with pytest.raises(ValueError, match="line 1: holds messages, but the tokenizer has no chat"):
        load(path, character_tokenizer(chat_template=None))


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}' leaves nothing to train on: it is empty"):
        load(tmp_path / name)


def test_data_without_any_loss_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"messages": MESSAGE}, {"messages": MESSAGE})
    with pytest.raises(ValueError, match="nothing to train on: all 2 examples lack a token with"):
        load(path)


@pytest.mark.parametrize("name", ["none.jsonl", "none.txt", "none"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"data '.*{name}' does not exist"):
        load(tmp_path / name)


def test_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match=r"d\.csv' is a \.csv file, but must be JSONL or plain"):
        load(tmp_path / "d.csv")


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_a_file_of_another_encoding_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("né".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}.*: not UTF-8 text: .* at byte 1"):
        load(tmp_path / name)


# ---- parts and batches -------------------------------------------------------------------


def test_a_part_is_held_out_by_seed(tmp_path: Path) -> None:
    examples = load(write_lines(tmp_path / "d.jsonl", *sums(10)))
    train, test = examples.split(0.3, seed=5)
    assert (len(train.dataset), len(test.dataset)) == (7, 3)
    for part in (train, test):
        rows = rows_of(part)
        assert part.num_tokens == sum(len(row["input_ids"]) for row in rows)
        assert part.num_labels == sum(x != -100 for row in rows for x in row["labels"][1:])
    together = sorted(row["input_ids"] for part in (train, test) for row in rows_of(part))
    assert together == sorted(row["input_ids"] for row in rows_of(examples))
    assert test.dataset["input_ids"] == examples.split(0.3, seed=5)[1].dataset["input_ids"]
    assert test.dataset["input_ids"] != examples.split(0.3, seed=6)[1].dataset["input_ids"]
    with pytest.raises(ValueError, match=r"eval_fraction 0\.01 of 10 examples holds out 0, but"):
        examples.split(0.01, seed=5)


@pytest.mark.parametrize(
    "special", [{}, {"pad_token": None}, {"pad_token": None, "eos_token": None}]
)
def test_batches_are_padded_on_the_right(special: dict[str, Any]) -> None:
    tokenizer = character_tokenizer(**special)
    tokenizer.padding_side = "left"
    rows = [
        {"input_ids": [9, 8, 7], "labels": [-100, 8, 7]},
        {"input_ids": [6], "labels": [6]},
    ]
    batch = padding_collator(tokenizer)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 7], [6, -100, -100]]
    assert batch["input_ids"][0].tolist() == [9, 8, 7]
    assert batch["input_ids"][1][0] == 6
    assert tokenizer.padding_side == "left"
