"""Tasks for lm-eval that need no network: texts and rows in a folder."""

import json
from pathlib import Path
from typing import Any

import yaml

from tiny import write_lines

CHOICES: list[dict[str, Any]] = [
    {"question": "the fox jumps", "choices": [" over", " under it", " up"], "answer": 0},
    {"question": "add 1 and 2", "choices": ["3", "4", "12"], "answer": 0},
    {"question": "dogs", "choices": [" sleep", " count"], "answer": 1},
    {
        "question": "nobody counted past",
        "choices": [" 12", " 345", " sea"],
        "answer": 0,
    },
    {"question": "the", "choices": [" town", " lazy dog"], "answer": 1},
]
TEXTS = [{"text": "The quick brown fox jumps over the lazy dog"}, {"text": "one day 12 345"}]


def write_tasks(folder: Path) -> str:
    """A task of each kind: `tiny_choice`, `tiny_text` and `tiny_answer`; returns the folder."""
    folder.mkdir()
    choices = write_lines(folder / "choices.jsonl", *CHOICES)
    texts = write_lines(folder / "texts.jsonl", *TEXTS)
    tasks = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "target_delimiter": "",
            "metric_list": [metric("acc"), metric("acc_norm")],
        },
        "tiny_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "tiny_answer": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}:",
            "doc_to_target": "{{choices[answer]}}",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 7},
            "metric_list": [metric("exact_match")],
        },
    }
    for name, settings in tasks.items():
        write_task(folder, name, texts if name == "tiny_text" else choices, **settings)
    return str(folder)


def metric(name: str) -> dict[str, Any]:
    """A mean, the higher the better."""
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def write_task(folder: Path, name: str, data: str, **settings: Any) -> None:
    """A YAML file over rows of JSON."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
    }
    text = yaml.safe_dump(json.loads(json.dumps(task | settings)))
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
