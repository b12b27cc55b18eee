"""Different tokenizers in the ecosystem: nothing more is needed from the user."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from families import open_bridges, tiny, tiny_llama
from graftlm import (
    CheckpointMismatchError,
    ComposedDataCollator,
    ComposedForCausalLM,
    ComposedProcessor,
    compose,
    verify,
)
from graftlm.cli import main
from tiny import write_lines
from two_tokenizers import PROMPTS, byte_tokenizer, compose_pair, word_tokenizer

ROWS = [{"text": text} for text in ("The quick brown fox", "There was once a town", "def add(f")]


@pytest.fixture
def bases(tmp_path: Path) -> tuple[str, str]:
    """Two saved models, each with its tokenizer beside it."""
    pairs = {
        "anchor": (tiny("llama", 1, vocab_size=320), byte_tokenizer()),
        "other": (tiny_llama(vocab_size=len(word_tokenizer())), word_tokenizer()),
    }
    for name, (model, tokenizer) in pairs.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / "anchor"), str(tmp_path / "other")


@pytest.fixture
def saved(bases: tuple[str, str], tmp_path: Path) -> str:
    """A composition of them, opened and saved."""
    model = compose(bases[0], {"other": bases[1]}, every=1)
    open_bridges(model).save_pretrained(tmp_path / "composed")
    return str(tmp_path / "composed")


def test_tokenizers_are_found_beside_the_models(bases: tuple[str, str]) -> None:
    model = compose(*bases)
    assert model.config.alignments == {"augmenting": "committed"}
    assert compose(bases[0], bases[0]).config.alignments == {"augmenting": "identity"}


def test_a_checkpoint_brings_its_tokenizers(saved: str, bases: tuple[str, str]) -> None:
    files = {str(path.relative_to(saved)) for path in Path(saved).rglob("*") if path.is_file()}
    assert {"tokenizer.json", "tokenizer_other/tokenizer.json"} <= files
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for base in bases:
            Path(base, name).unlink()  # no longer beside the models, and not needed there
    model = AutoModelForCausalLM.from_pretrained(saved)
    fresh = ComposedForCausalLM.from_pretrained(saved)
    inputs = model.processor(PROMPTS, padding=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)


def test_another_tokenizer_is_noticed(saved: str) -> None:
    word_tokenizer(410).save_pretrained(Path(saved, "tokenizer_other"))
    with pytest.raises(CheckpointMismatchError, match="'other' is not the model .* its tokenizer"):
        ComposedForCausalLM.from_pretrained(saved)


def test_the_processor_loads_by_itself(saved: str) -> None:
    for processor in (
        ComposedProcessor.from_pretrained(saved),
        AutoProcessor.from_pretrained(saved),
    ):
        assert isinstance(processor, ComposedProcessor)
        batch = processor(PROMPTS, padding=True)
        assert set(batch) == {"input_ids", "attention_mask", "augmenting_inputs"}
        assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == PROMPTS
        assert processor.decode(batch["input_ids"][0], skip_special_tokens=True) == PROMPTS[0]


def test_the_collator_prepares_what_the_model_would_read(saved: str) -> None:
    model = ComposedForCausalLM.from_pretrained(saved)
    assert model.processor is not None
    rows = [model.processor.tokenizer(row["text"])["input_ids"] for row in ROWS]
    features = [{"input_ids": ids, "labels": list(ids)} for ids in rows]
    collator = pickle.loads(pickle.dumps(ComposedDataCollator(model.processor)))
    batch = collator([feature | {"read_ids": feature["input_ids"]} for feature in features])
    assert torch.equal(batch["read_ids"], batch["input_ids"] * batch["attention_mask"])
    assert "augmenting_inputs" not in batch  # the model reads what it is told to
    batch = collator(copy.deepcopy(features))
    assert batch["labels"].eq(-100).equal(batch["attention_mask"].eq(0))
    with torch.no_grad():
        prepared = model(**batch)
        batch.pop("augmenting_inputs")
        assert torch.equal(prepared.logits, model(**batch, use_cache=False).logits)


@pytest.mark.parametrize("reads", ["sequence", "prompt"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_trainer_with_and_without_our_collator(tmp_path: Path, reads: Any, workers: int) -> None:
    losses = []
    for own in (True, False):
        model = compose_pair(reads=reads)
        tokenizer = model.processor.tokenizer
        data: Any = Dataset.from_list(ROWS).map(
            lambda row, split=tokenizer: {
                "input_ids": (ids := split(row["text"])["input_ids"]),
                "labels": [-100] * 3 + ids[3:],
            }
        )
        from graftlm.collation import padding_collator

        collator = ComposedDataCollator(model.processor) if own else padding_collator(tokenizer)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / f"{own}"),
                max_steps=3,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                dataloader_num_workers=workers,
                dataloader_pin_memory=False,
            ),
            train_dataset=data,
            data_collator=collator,
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        if not own:
            trainer.save_model()
            loaded = ComposedForCausalLM.from_pretrained(
                tmp_path / "False", anchor=model.anchor, augmenting=model.augmenting["augmenting"]
            )
            assert loaded.processor is not None
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_needs_nothing_more(tmp_path: Path, packing: bool) -> None:
    from trl import SFTConfig, SFTTrainer

    model = compose_pair()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            packing=packing,
            padding_free=packing,
            max_length=40,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(ROWS * 2),
        processing_class=copy.deepcopy(byte_tokenizer()),
    )
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0]


def test_pipeline_needs_nothing_more(saved: str) -> None:
    writer = pipeline("text-generation", model=saved, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False}
    written = writer(PROMPTS[:2], return_full_text=False, **options)
    model = ComposedForCausalLM.from_pretrained(saved)
    tokenizer: Any = AutoTokenizer.from_pretrained(saved)
    for prompt, (answer,) in zip(PROMPTS, written, strict=False):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["generated_text"] == text


@pytest.mark.parametrize("alignment", ["committed", "prefix"])
def test_verify_proves_the_claims(alignment: Any) -> None:
    checks = verify(open_bridges(compose_pair("llama", "gemma2", alignment=alignment)))
    assert [check.claim for check in checks if not check.passed] == []


def test_the_command_line_needs_nothing_more(
    bases: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", *ROWS)
    folder = str(tmp_path / "trained")
    words = ["--anchor", bases[0], "--augmenting", f"other={bases[1]}", "--every", "1"]
    more = ["--alignment", "prefix", "--distance-unit", "tokens", "--max-steps", "2"]
    assert main(["train", *words, *more, "--data", data, "--output", folder]) == 0
    assert ComposedForCausalLM.from_pretrained(folder).config.alignments == {"other": "prefix"}
    assert main(["verify", folder]) == 0
    capsys.readouterr()
    assert main(["generate", folder, "The quick", "--max-new-tokens", "4", "--compare"]) == 0
    assert "== other ==" in capsys.readouterr().out
    assert main(["inspect", folder]) == 0
    assert "prefix" in capsys.readouterr().out


def test_a_trainer_may_set_the_padding_token(bases: tuple[str, str], tmp_path: Path) -> None:
    """It saves its own copy of the tokenizer over ours; that is no other tokenizer."""
    ours: Any = AutoTokenizer.from_pretrained(bases[0])
    ours.add_special_tokens({"pad_token": "<|padding|>"})
    for name, other in (("own", bases[1]), ("shared", bases[0])):
        folder = str(tmp_path / name)
        compose(bases[0], {name: other}, tokenizer=ours).save_pretrained(folder)
        assert ComposedForCausalLM.from_pretrained(folder).processor is not None
        byte_tokenizer().save_pretrained(folder)
        assert ComposedForCausalLM.from_pretrained(folder).processor is not None


def test_files_for_the_hub_lie_one_folder_deep(saved: str) -> None:
    """transformers uploads no deeper ones."""
    depths = {len(path.relative_to(saved).parts) for path in Path(saved).rglob("*")}
    assert max(depths) == 2
