"""`evaluate`: all parts on the same tasks, results in files, and going on where it stopped."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

from graftlm import compose

pytest.importorskip("lm_eval")

import graftlm.lm_eval
from graftlm import evaluation
from graftlm.checkpoint import read_config
from graftlm.evaluation import evaluate
from graftlm.harness import GraftLM, chat_templates
from lm_tasks import CHOICES, write_tasks
from tiny import save_model, write_lines

TASKS = ["tiny_choice", "tiny_text", "tiny_answer"]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval describes the machine for seconds; we do not keep that."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    place = tmp_path_factory.mktemp("models")
    narrow = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3}
    return (
        save_model(place / "anchor", seed=1, max_position_embeddings=600),
        save_model(place / "augmenting", seed=2, max_position_embeddings=560, **narrow),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models: tuple[str, str]) -> str:
    """A composed model whose bridges say something."""
    model = compose(models[0], {"code": models[1]}, every=1)
    for bridge in model.bridges:
        torch.nn.init.normal_(bridge.cross_o.weight, std=2.0)  # pyrefly: ignore
    place = tmp_path_factory.mktemp("composed") / "model"
    model.save_pretrained(place)
    return str(place)


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    return write_tasks(tmp_path / "tasks")


def score(lm: Any, context: str, text: str) -> float:
    tokens = lm.tok_encode(context), lm.tok_encode(text)
    return lm._loglikelihood_tokens([(None, *tokens)], disable_tqdm=True)[0][0]


def test_all_parts_side_by_side(folder, tasks):
    """Accuracy of each part is that of picking its likeliest choice."""
    report = evaluate(folder, TASKS, include_path=tasks, batch_size=3)
    assert list(report["parts"]) == ["composed", "anchor", "code"]
    for part, found in report["parts"].items():
        lm = GraftLM(folder, part=part, device="cpu")
        right = 0
        for row in CHOICES:
            values = [score(lm, row["question"], choice) for choice in row["choices"]]
            right += values.index(max(values)) == row["answer"]
        assert found["results"]["tiny_choice"]["acc,none"] == right / len(CHOICES)
        assert found["results"]["tiny_text"]["bits_per_byte,none"] > 0
        assert found["n-samples"]["tiny_answer"] == {"original": 5, "effective": 5}
    bits = [p["results"]["tiny_text"]["bits_per_byte,none"] for p in report["parts"].values()]
    assert len(set(bits)) == 3


def test_finished_parts_are_not_run_again(folder, tasks, tmp_path, monkeypatch):
    told: list[tuple[str, bool]] = []
    options: dict[str, Any] = {
        "include_path": tasks,
        "limit": 2,
        "output": tmp_path / "out",
        "seed": 3,
    }
    options |= {"on_part": lambda *words: told.append(words)}
    run = evaluation.run_part

    def fail(lm, settings):
        if lm.part == "code":
            raise KeyboardInterrupt
        return run(lm, settings)

    monkeypatch.setattr(evaluation, "run_part", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, ["tiny_choice"], **options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["parts"]) == ["composed", "anchor"]
    monkeypatch.setattr(evaluation, "run_part", run)
    report = evaluate(folder, ["tiny_choice"], **options)
    expected = [("composed", False), ("anchor", False), ("code", False)]
    assert told == [*expected, ("composed", True), ("anchor", True), ("code", False)]
    monkeypatch.setattr(evaluation, "load", None)  # nothing is loaded when all is there
    assert evaluate(folder, ["tiny_choice"], **options) == report
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == report
    lines = (tmp_path / "out" / "samples" / "code" / "tiny_choice.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc"] for line in lines] == CHOICES[:2]
    assert not list((tmp_path / "out").rglob("*.part"))
    message = r"results.json holds results for limit 2, not 3; choose another output folder"
    with pytest.raises(ValueError, match=message):
        evaluate(folder, ["tiny_choice"], **options | {"limit": 3})


@pytest.mark.parametrize(
    "change", [{"reads": "prompt"}, {"bridge": {"num_heads": 1}}, {"bridge": {"position": "none"}}]
)
def test_what_no_weight_shows_is_another_model(folder, tmp_path, change):
    """Another way to read, or other heads, took the results and the cache of the first."""
    shutil.copytree(folder, tmp_path / "other")
    place = tmp_path / "other" / "config.json"
    config = json.loads(place.read_text())
    for name, value in change.items():
        assert config[name] != value
        config[name] = config[name] | value if isinstance(value, dict) else value
    place.write_text(json.dumps(config))
    one, other = (evaluation.identity(read_config(str(f))) for f in (folder, tmp_path / "other"))
    assert one != other


def test_a_changed_chat_template_is_another_argument(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages }}")
    one, other = (
        chat_templates(place, read_config(str(place))) for place in (folder, tmp_path / "other")
    )
    assert {part for part in one if one[part] != other[part]} == {"composed", "anchor"}


def test_chat_templates_are_those_of_the_models_that_are_given(folder, models, tasks, tmp_path):
    moved = shutil.copytree(models[1], tmp_path / "moved")
    options: dict[str, Any] = {
        "include_path": tasks,
        "limit": 1,
        "parts": ["code"],
        "apply_chat_template": True,
        "output": tmp_path / "out",
        "augmenting": moved,
    }
    template = moved / "chat_template.jinja"
    template.write_text("{{ messages[-1]['content'] }}")
    evaluate(folder, ["tiny_text"], **options)
    template.write_text("{{ messages[-1]['content'] }}!")
    with pytest.raises(ValueError, match="holds results for chat_templates"):
        evaluate(folder, ["tiny_text"], **options)


def test_changed_tasks_are_other_arguments(folder, tasks, tmp_path):
    options: dict[str, Any] = {
        "include_path": tasks,
        "limit": 1,
        "parts": ["anchor"],
        "output": tmp_path / "out",
    }
    evaluate(folder, ["tiny_choice"], **options)
    write_lines(Path(tasks) / "choices.jsonl", *CHOICES[::-1])
    with pytest.raises(ValueError, match="holds results for task_files '"):
        evaluate(folder, ["tiny_choice"], **options)


def test_answers_are_cached_for_each_part(folder, tasks, tmp_path):
    """lm-eval's cache knows questions only: with one file the anchor would get our answers."""
    options: dict[str, Any] = {"include_path": tasks, "parts": ["composed", "anchor"]}
    plain = evaluate(folder, ["tiny_text"], **options)
    options |= {"use_cache": tmp_path / "cache" / "answers"}
    for _ in range(2):
        cached = evaluate(folder, ["tiny_text"], **options)
        for part in ("composed", "anchor"):
            assert cached["parts"][part]["results"] == plain["parts"][part]["results"]
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name.split("-")[1] for name in names] == ["anchor", "composed"]


def test_what_does_not_exist_is_refused(folder, tasks):
    with pytest.raises(ValueError, match="part is 'cod', but must be one of composed, anchor, c"):
        evaluate(folder, ["tiny_choice"], parts=["cod"])
    with pytest.raises(ValueError, match="include_path is 'nowhere', but there is no such folder"):
        evaluate(folder, ["tiny_choice"], include_path="nowhere")


def test_what_lm_eval_asserts_is_an_error(folder, tasks):
    """Its assertions speak to users; the command line must not show them a traceback."""
    path = Path(tasks, "tiny_answer.yaml")
    path.write_text(path.read_text().replace("max_gen_toks: 7", "max_gen_toks: 601"))
    with pytest.raises(
        ValueError, match=r"lm-eval refuses anchor: .* generate \(601\) must be less"
    ):
        evaluate(folder, ["tiny_answer"], include_path=tasks, parts=["anchor"])


@pytest.mark.slow
def test_unknown_tasks_are_refused(folder, tasks):
    with pytest.raises(ValueError, match="lm-eval has no task 'tiny_chioce'; lm_eval ls tasks"):
        evaluate(folder, ["tiny_choice", "tiny_chioce"], include_path=tasks)


def test_without_lm_eval_it_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = "evaluation needs the lm-eval package, which is missing; "
    message += "pip install 'graftlm[evaluate]'"
    with pytest.raises(ImportError, match=re.escape(message)):
        evaluate(folder, ["tiny_choice"])
    assert graftlm.lm_eval.main() == 2
    assert capsys.readouterr().err == f"graftlm: error: {message}\n"


# ---- FLORES-200 ----------------------------------------------------------------------------


def write_flores(folder: Path, missing: int = 0) -> None:
    """A few sentences in the official format."""
    for split, count in (("dev", 8), ("devtest", 3)):
        (folder / split).mkdir(parents=True)
        for code, word in (("lij_Latn", "paròlla"), ("eng_Latn", "word")):
            rows = [f"{word} {split} {number}" for number in range(count)]
            kept = rows[: count - (missing if code == "lij_Latn" else 0)]
            text = "".join(f"{row}\n" for row in kept)
            (folder / split / f"{code}.{split}").write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_flores_has_five_shots_and_chrf(folder, tmp_path, monkeypatch):
    write_flores(tmp_path / "flores")
    monkeypatch.setenv("GRAFTLM_FLORES200", str(tmp_path / "flores"))
    options: dict[str, Any] = {"parts": ["anchor"], "output": tmp_path / "out"}
    report = evaluate(folder, ["flores200_lij_en"], **options)["parts"]["anchor"]
    assert report["n-shot"] == {"flores200_lij_en": 5}
    path = tmp_path / "out" / "samples" / "anchor" / "flores200_lij_en.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sample["target"] for sample in samples] == [f"word devtest {n}" for n in range(3)]
    prompt = samples[1]["arguments"][0][0]
    assert prompt.endswith("\n\nLigurian: paròlla devtest 1\nEnglish:")
    assert prompt.count("English: word dev ") == 5
    write_lines(tmp_path / "flores" / "dev" / "eng_Latn.dev", *["other"] * 6)
    with pytest.raises(ValueError, match="holds results for flores200 '"):
        evaluate(folder, ["flores200_lij_en"], **options)


@pytest.mark.slow
def test_the_ten_languages_of_the_paper_are_a_group(folder, tmp_path, monkeypatch):
    from graftlm.tasks.flores200.flores200 import NAMES

    write_flores(tmp_path / "flores")
    for code in NAMES:
        for split in ("dev", "devtest"):
            place = tmp_path / "flores" / split
            shutil.copy(place / f"eng_Latn.{split}", place / f"{code}.{split}")
    monkeypatch.setenv("GRAFTLM_FLORES200", str(tmp_path / "flores"))
    report = evaluate(folder, ["flores200_calm"], parts=["anchor"], limit=1, batch_size=10)
    results = report["parts"]["anchor"]["results"]
    assert len(results) == 11
    each = [results[f"flores200_{code.split('_')[0]}_en"]["chrf,none"] for code in NAMES]
    assert results["flores200_calm"]["chrf,none"] == pytest.approx(sum(each) / 10)


def test_flores_of_different_lengths_is_refused(folder, tmp_path, monkeypatch):
    write_flores(tmp_path / "flores", missing=1)
    monkeypatch.setenv("GRAFTLM_FLORES200", str(tmp_path / "flores"))
    with pytest.raises(ValueError, match="has 7 sentences of lij_Latn in dev, but 8 of eng_Latn"):
        evaluate(folder, ["flores200_lij_en"], parts=["anchor"])


def test_flores_from_the_hub_is_sorted_by_its_numbers(monkeypatch):
    from graftlm.tasks.flores200 import flores200

    asked = []

    def load(name, language, split):
        asked.append((name, language, split))
        return [{"id": 2, "text": f"{language} b"}, {"id": 1, "text": f"{language} a"}]

    monkeypatch.setattr(flores200.datasets, "load_dataset", load)
    monkeypatch.delenv("GRAFTLM_FLORES200", raising=False)
    rows = flores200.load("taq_Latn", version=1.0)["devtest"].to_list()
    assert rows[0] == {"language": "Tamasheq", "source": "taq_Latn a", "english": "eng_Latn a"}
    assert ("openlanguagedata/flores_plus", "taq_Latn", "dev") in asked


# ---- GSM8K and MGSM ------------------------------------------------------------------------


def school_problems(number: int) -> list[dict[str, Any]]:
    """Rows as GSM8K has them."""
    return [
        {"question": f"{k} and {k + 1}?", "answer": f"so <<{k}+{k + 1}>> it is\n#### {2 * k + 1}"}
        for k in range(number)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "place", "shots"),
    [("gsm8k", ("openai/gsm8k", "main"), 5), ("mgsm_direct_sw", ("juletxara/mgsm", "sw"), 0)],
)
def test_gsm8k_and_mgsm_are_scored(folder, tmp_path, monkeypatch, task, place, shots):
    """lm-eval's own tasks, on rows of the published format: right answers are right."""
    rows = school_problems(9)
    if task != "gsm8k":
        numbers = [int(row["answer"].split()[-1]) for row in rows]
        rows = [
            {"question": row["question"], "answer": None, "answer_number": number}
            for row, number in zip(rows, numbers, strict=True)
        ]
    asked: list[tuple[str, str]] = []

    def local(path: str, name: str, **_: Any) -> DatasetDict:
        asked.append((path, name))
        splits: dict[Any, Dataset] = {
            "train": Dataset.from_list(rows[:6]),
            "test": Dataset.from_list(rows[6:]),
        }
        return DatasetDict(splits)

    def answers(self: Any, requests: Any, *_: Any, **__: Any) -> list[str]:
        found = [str(2 * int(r.doc["question"].split()[0]) + 1) for r in requests]
        found = [f" so\n#### {number}" if task == "gsm8k" else f" {number}" for number in found]
        return [" 0", *found[1:]]

    monkeypatch.setattr("datasets.load_dataset", local)
    monkeypatch.setattr(GraftLM, "generate_until", answers)
    said = evaluate(folder, [task], parts=["anchor"], output=tmp_path / "out")["parts"]["anchor"]
    assert asked == [place]
    assert said["n-shot"] == {task: shots}
    (samples,) = (tmp_path / "out" / "samples" / "anchor").iterdir()
    prompt = json.loads(samples.read_text().splitlines()[0])["arguments"][0][0]
    assert prompt.endswith("6 and 7?\nAnswer:")
    assert prompt.count("#### ") == shots
    scores = said["results"][task]
    exact = [score for name, score in scores.items() if name.startswith("exact_match,")]
    assert exact == pytest.approx([2 / 3] * 2)


def test_tasks_that_run_what_the_model_wrote_are_refused(folder, tmp_path):
    place = tmp_path / "tasks"
    write_tasks(place)
    task = place / "tiny_answer.yaml"
    task.write_text(task.read_text() + "unsafe_code: true\n")
    with pytest.raises(ValueError, match="tiny_answer which is marked as unsafe"):
        evaluate(folder, ["tiny_answer"], include_path=place, limit=1, parts=["anchor"])
