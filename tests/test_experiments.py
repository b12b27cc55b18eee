"""The harness of the experiments, on tiny models: systems, scores, comparisons, the whole way."""

import argparse
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from sacrebleu.metrics import CHRF as SACREBLEU
from scipy.stats import ttest_1samp

import tiny_experiment
from graftlm import ComposedForCausalLM
from graftlm.reproduce import (
    answering,
    code,
    comparison,
    domain,
    encoding,
    fitting,
    flags,
    hardware,
    jobs,
    kv_arithmetic,
    kv_two_models,
    metrics,
    report,
    run,
    runner,
    statistics,
    translate,
)
from graftlm.reproduce.example import Example
from graftlm.reproduce.experiment import Experiment, Goal, Models, Test
from graftlm.reproduce.metrics import Answer
from graftlm.reproduce.systems import SYSTEMS, System
from tiny import character_tokenizer, meddling, save_model

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """An anchor, and an augmenting model of other tokens before and after it was a specialist."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "anchor", seed=1, max_position_embeddings=512)
    tokenizer = character_tokenizer([("a", "n"), ("an", "d")])
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    smaller = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3}
    for seed, name in ((2, "augmenting"), (3, "vanilla")):
        save_model(folder / name, seed=seed, **smaller, **size)
        tokenizer.save_pretrained(folder / name)
    return Models(
        anchor=folder / "anchor",
        augmenting={"augmenting": folder / "augmenting"},
        vanilla={"augmenting": folder / "vanilla"},
    )


@pytest.fixture
def experiment(models: Models) -> Experiment:
    return tiny_experiment.experiment(models)


def make(experiment: Experiment, models: Models, name: str, seed: int = 0) -> runner.Runner:
    system = experiment.system(name)
    shots = experiment.data(seed).shots if system.trains is None else {}
    return runner.make_runner(experiment, models, system, seed, shots=shots, device="cpu")


def examples(group: str = "Up", number: int = 4) -> list[Example]:
    return tiny_experiment.made_up(group, number)


# ---- encoding ----------------------------------------------------------------------------


def test_labels_are_on_the_target_and_the_end() -> None:
    tokenizer = character_tokenizer()
    [example] = examples(number=1)
    found = encoding.feature(example, tokenizer)
    wanted = [label for label in found["labels"] if label != encoding.IGNORED]
    assert tokenizer.decode(wanted) == f"{example.target}</s>"
    assert tokenizer.decode(found["input_ids"]) == f"{example.prompt}{example.target}</s>"


def test_what_a_tokenizer_puts_first_is_kept_and_its_end_is_not() -> None:
    class Both:
        eos_token_id = 9

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 9]}

    assert encoding.start_ids(Both()) == [1]  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("place", [0, 10])
def test_the_wrong_source_fills_the_place_of_the_right_one(place: int) -> None:
    tokenizer = character_tokenizer()
    some = examples(number=12)
    donors = encoding.donors_of(some)
    found = encoding.wrong_feature(some[place], donors[place], tokenizer)
    own = encoding.feature(some[place], tokenizer)
    assert len(found["read_ids"]) == len(found["input_ids"])
    assert (found["input_ids"], found["labels"]) == (own["input_ids"], own["labels"])
    text = str(tokenizer.decode(found["read_ids"]))
    assert text.startswith(some[place].opening)
    assert text.endswith(f"{some[place].closing}{some[place].target}</s>")
    assert some[place].source not in text


def test_donors_are_of_the_group_and_about_something_else() -> None:
    some = [*examples("Up", 3), *examples("Down", 3)]
    for example, donors in zip(some, encoding.donors_of(some), strict=True):
        assert {donor.group for donor in donors} == {example.group}
        assert example.source not in {donor.source for donor in donors}
    with pytest.raises(ValueError, match="Up has no second source"):
        encoding.donors_of(examples(number=1))


def test_the_order_is_the_seeds() -> None:
    some = examples(number=16)
    order = encoding.training_order(some, 40, 4, 1, by_length=True)
    assert len(order) == 40
    assert order == encoding.training_order(some, 40, 4, 1, by_length=True)
    assert order != encoding.training_order(some, 40, 4, 2, by_length=True)
    plain = encoding.training_order(some, 16, 4, 1, by_length=False)
    assert sorted(e.source for e in plain) == sorted(e.source for e in some)


def test_operations_are_counted_by_the_tokens_of_all_batches():
    """They were those of the first batch times the steps, however short its examples were."""
    features = [{"input_ids": [1] * length} for length in (3, 5, 1)]
    assert encoding.padded_tokens(features, 2) == 2 * 5 + 1


# ---- metrics -----------------------------------------------------------------------------


def test_chrf_is_sacrebleus() -> None:
    some = examples(number=8)
    texts = ["", "sand", "rain 1", "land 3", "x", "song", "bird 6", "wand 7"]
    answers = [Answer(text=text) for text in texts]
    wanted = SACREBLEU().corpus_score(texts, [[e.target.strip() for e in some]]).score
    assert metrics.CHRF.of(some, answers) == pytest.approx(wanted, abs=1e-9)
    assert metrics.CHRF.of(some[:1], answers[:1]) == 0


def test_bits_and_perplexity() -> None:
    some = [Example(group="g", source="", target="abcd")]
    answers = [Answer(bits=8.0, tokens=2)]
    assert metrics.BITS_PER_BYTE.of(some, answers) == 2
    assert metrics.PERPLEXITY.of(some, answers) == 16


@pytest.mark.parametrize(
    ("counts", "text", "ended", "met"),
    [
        ("last", "(1+2)->3", True, True),
        ("last", "(2+2)->3", True, True),
        ("last", "(1+2)->3", False, False),
        ("first", "(1+2)->9", True, True),
        ("first", "(2+2)->3", True, False),
        ("all", "(1+2)->3", True, True),
        ("all", "3", True, False),
    ],
)
def test_what_counts_of_an_answer(counts: str, text: str, ended: bool, met: bool) -> None:
    example = Example(group="", source="", target="(1+2)->3", facts={"counts": counts})
    answers = [Answer(text=text, ended=ended)]
    assert metrics.EXACT_MATCH.of([example], answers) == 100 * met


def test_passed_programs_count() -> None:
    answers = [Answer(passed=True), Answer(passed=False), Answer(passed=None), Answer(passed=True)]
    assert metrics.PASS_AT_1.of(examples(number=4), answers) == 50


# ---- statistics --------------------------------------------------------------------------


def column(values: list[float]) -> np.ndarray:
    return np.array([(value, 1.0) for value in values])


def test_the_bootstrap_knows_a_difference_from_chance() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.normal(size=100)
    noise = rng.normal(size=100)

    def p(shift: float) -> float:
        ours = column(list(theirs + shift + 0.3 * noise))
        return statistics.bootstrap(metrics.EXACT_MATCH, [ours], [column(list(theirs))], 2000).p

    assert p(0.3) < 0.01 < 0.1 < p(-0.3 * float(noise.mean()))


def test_the_interval_holds_the_difference_and_seeds_widen_it() -> None:
    rng = np.random.default_rng(0)
    theirs = [column(list(rng.normal(size=50))) for _ in range(4)]
    shifts = (0.0, 1.0, 2.0, 3.0)
    ours = [found + np.array([shift, 0.0]) for found, shift in zip(theirs, shifts, strict=True)]
    found = statistics.bootstrap(metrics.EXACT_MATCH, ours, theirs, 4000)
    assert found.difference == pytest.approx(150)
    assert found.low < 100 < 200 < found.high  # the seeds differ, the examples do not
    assert found.seeds == 4
    assert found.p == pytest.approx(ttest_1samp([0.0, 100.0, 200.0, 300.0], 0.0).pvalue)


def test_only_common_seeds_are_compared() -> None:
    ours = [column([1.0] * 10), column([0.0] * 10)]
    found = statistics.bootstrap(metrics.EXACT_MATCH, ours, [column([0.0] * 10)], 100)
    assert (found.seeds, found.difference) == (1, 100)


def test_holm_is_holms() -> None:
    corrected = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert corrected == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_the_share_of_the_gain() -> None:
    cells = {
        name: statistics.Cell(mean=mean, deviation=0.0, seeds=[mean])
        for name, mean in {"anchor": 10.0, "composed": 20.0, "lora": 15.0}.items()
    }
    assert statistics.share_of_gain(cells, "lora", "composed", "anchor") == 0.5
    assert statistics.share_of_gain({"lora": cells["lora"]}, "lora", "composed", "anchor") is None


# ---- systems -----------------------------------------------------------------------------


def test_bits_are_the_models_own(experiment: Experiment, models: Models) -> None:
    for name in ("composed", "anchor"):
        made = make(experiment, models, name)
        some = examples(number=3)
        found = answering.costs(made, some, batch_size=3)
        for example, answer in zip(some, found, strict=True):
            [feature] = made.encode([example])
            batch = made.collate([feature])
            with torch.no_grad():
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                logits = made.model(**inputs).logits[0, :-1]
            labels = batch["labels"][0, 1:]
            wanted = [k for k, label in enumerate(labels.tolist()) if label != encoding.IGNORED]
            kept = wanted[:-1]  # not the end of the text
            bits = F.cross_entropy(logits[kept], labels[kept], reduction="sum") / math.log(2)
            assert answer.bits == pytest.approx(float(bits), rel=1e-4)
            assert answer.tokens == len(kept)


def test_answers_are_what_generate_says(experiment: Experiment, models: Models) -> None:
    made = make(experiment, models, "composed")
    some = examples(number=5)
    test = Test(metrics=(), most_tokens=6)
    together = answering.say(made, some, test, batch_size=5)
    for example, (text, ended) in zip(some, together, strict=True):
        prompt = made.tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        output = made.model.generate(input_ids=prompt, do_sample=False, max_new_tokens=6)
        assert made.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True) == text
        assert ended == (made.tokenizer.eos_token_id in output[0, prompt.shape[1] :].tolist())
    made.model.generation_config = meddling()
    assert answering.say(made, some, test, batch_size=5) == together


def test_answers_end_where_the_test_says() -> None:
    assert answering.cut("\n a b \nmore\n", "\n") == "a b"
    assert answering.cut(" a\nb", None) == " a\nb"
    tokenizer = character_tokenizer()
    assert set(answering.ends(tokenizer, "\n")) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("\n"),
    }
    assert answering.ends(tokenizer, None) == [tokenizer.eos_token_id]


def test_controls_are_what_they_are_called(experiment: Experiment, models: Models) -> None:
    made = {name: make(experiment, models, name) for name in ("composed", "random", "vanilla")}
    weights = {
        name: next(iter(found.model.model.augmenting["augmenting"].parameters()))
        for name, found in made.items()
    }
    assert not torch.equal(weights["composed"], weights["random"])
    assert not torch.equal(weights["composed"], weights["vanilla"])
    shapes = {name: runner.trainable(found.model) for name, found in made.items()}
    assert len(set(shapes.values())) == 1
    copy = make(experiment, models, "self").model
    assert torch.equal(
        copy.model.augmenting["augmenting"].get_input_embeddings().weight,
        copy.model.anchor.get_input_embeddings().weight,
    )
    # Layers 1 and 2 of 3 are two thirds and all of it: of 4 layers the third and the last.
    assert [c.augmenting_layer for c in copy.config.connections] == [2, 3]
    assert make(experiment, models, "prompt").model.config.reads == "prompt"


def test_one_of_several_models_may_be_left_out(experiment: Experiment, models: Models) -> None:
    path = models.augmenting["augmenting"]
    two = replace(models, augmenting={"first": path, "second": path})
    only = runner.augmenting_paths(two, System(title="", only=("second",)))
    assert list(only) == ["second"]


def test_lora_has_about_as_many_weights_and_starts_alike(
    experiment: Experiment, models: Models
) -> None:
    adapted = make(experiment, models, "lora", seed=3)
    bridges = runner.trainable(make(experiment, models, "composed").model)
    again = make(experiment, models, "lora", seed=3)
    sizes = sum(runner.linear_sizes(adapted.model).values())
    assert abs(runner.trainable(adapted.model) - bridges) <= sizes
    ours, theirs = (dict(found.model.named_parameters()) for found in (adapted, again))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_full_fine_tuning_trains_all_weights_in_full_precision(
    experiment: Experiment, models: Models
) -> None:
    in_bf16 = replace(experiment, in_bf16=True)
    model = make(in_bf16, models, "full").model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert all(weight.requires_grad for weight in model.parameters())


def test_prompt_reading_does_not_read_the_target(experiment: Experiment, models: Models) -> None:
    made = make(experiment, models, "prompt")
    with torch.no_grad():
        for bridge in made.model.bridges:
            torch.nn.init.normal_(bridge.cross_o.weight)
    given: list[Any] = []
    hook = made.model.bridges[0].register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["cross_mask"]), with_kwargs=True
    )
    [feature] = made.encode(examples(number=1))
    fitting.target_logits(made.model, made.collate([feature]))
    hook.remove()
    [mask] = given
    prompt = sum(label == encoding.IGNORED for label in feature["labels"])
    seen = mask if mask.dtype == torch.bool else mask == 0
    assert not seen[..., -1, prompt + 2 :].any()


def test_missing_packages_are_named(
    experiment: Experiment, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="peft is not installed, which the LoRA control needs"):
        make(experiment, models, "lora")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match="sacrebleu is not installed, which scores texts"):
        metrics.chrf()


# ---- the whole way -----------------------------------------------------------------------


def test_the_whole_experiment(tmp_path: Path, experiment: Experiment) -> None:
    asked = [(name, 1) for name in [*SYSTEMS, *experiment.ablations]]
    asked[3] = ("composed", 2)
    results = run.run(
        experiment, systems=asked, output=tmp_path, device="cpu", console=QUIET, command="it"
    )
    cells = results["table"]["near"]["Up"]["chrF"]
    assert set(cells) == {name for name, _ in asked}
    assert len(cells["composed"]["seeds"]) == 2
    assert cells["composed"]["against"] is None
    assert cells["lora"]["against"]["seeds"] == 1
    # Untrained models of 100 characters or so find all of them about equally likely.
    assert 50 < results["table"]["before"]["text"]["perplexity"]["anchor"]["mean"] < 200
    assert {goal["says"] for goal in results["goals"]} == {"near is beaten", "English survives"}
    weights = {name: cost["weights"] for name, cost in results["costs"].items()}
    assert weights["anchor"] == 0 < weights["composed"] < weights["full"]
    assert results["costs"]["composed"]["flops"] > 0
    assert json.loads((tmp_path / "results.json").read_text())["command"] == "it"
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    text = (tmp_path / "report.md").read_text()
    for words in (
        "| **composed (CALM)** |",
        "What m_B could do before",
        "near: ablations",
        "None.",
    ):
        assert words in text
    assert ComposedForCausalLM.from_pretrained(tmp_path / "composed" / "1").num_parameters() > 0


def test_a_stopped_experiment_goes_on(
    tmp_path: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two processes; then nothing is done again, and another setting is done anew."""
    asked: Any = {
        "systems": [("composed", 1), ("lora", 1), ("anchor", 2)],
        "output": tmp_path,
        "device": "cpu",
        "console": QUIET,
        "plots": False,
    }
    first = run.run(experiment, jobs=2, **asked)
    ran: list[str] = []
    run_job = jobs.run_job

    def spy(study: Any, job: Any, path: Any, console: Any) -> Any:
        ran.append(job.name)
        return run_job(study, job, path, console)

    monkeypatch.setattr(jobs, "run_job", spy)
    again = run.run(experiment, **asked)
    assert not ran
    assert [again[key] for key in ("table", "losses")] == [
        first[key] for key in ("table", "losses")
    ]
    next((tmp_path / "answers").glob("lora-0-*.json")).unlink()
    alone = run.run(experiment, **asked)
    assert ran == ["lora"]
    ours, theirs = alone["losses"]["lora"][0], first["losses"]["lora"][0]
    assert ours[0][1] == pytest.approx(theirs[0][1], 1e-6)  # the very same start
    changed = replace(experiment.composition, num_heads=2)
    run.run(replace(experiment, composition=changed), **asked)
    assert sorted(ran[1:]) == ["anchor", "composed", "lora"]  # the anchor once, not for each seed


def test_models_added_one_by_one_keep_the_first_ones_bridges(
    tmp_path: Path, models: Models
) -> None:
    path = models.augmenting["augmenting"]
    two = replace(models, augmenting={"first": path, "second": path})
    system = System(title="", one_by_one=True)
    experiment = tiny_experiment.experiment(two, systems={"composed": system})
    made = make(experiment, two, "composed")
    needing = [replace(e, facts={"needs": ["second"]}) for e in examples(number=8)]
    data = replace(experiment.data(0), composition=[*examples("Down", 8), *needing])
    seen = []
    names = [c.augmenting for c in made.model.config.connections]
    for title, drawn in jobs.stages(system, made, data, experiment.training, 0):
        trains = [next(bridge.parameters()).requires_grad for bridge in made.model.bridges]
        seen.append((title, {e.group for e in drawn}, trains))
    [first, second] = seen
    assert first == (" (first)", {"Down"}, [name == "first" for name in names])
    assert (second[0], second[2]) == (" (second)", [name == "second" for name in names])
    assert "Up" in second[1]


def test_a_killed_process_is_explained(
    tmp_path: Path, experiment: Experiment, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed:
        def __init__(self, *args: Any, **kwargs: Any):
            pass

        def __enter__(self) -> "Killed":
            return self

        def __exit__(self, *args: Any) -> None:
            pass

        def submit(self, *args: Any) -> Future:
            future: Future = Future()
            future.set_exception(BrokenProcessPool("killed"))
            return future

        def shutdown(self, **kwargs: Any) -> None:
            pass

    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Killed)
    study = jobs.Study(experiment=experiment, models=models, folder=tmp_path, device="cpu")
    with pytest.raises(OSError, match="was killed, perhaps because memory ran out"):
        list(jobs.outcomes(study, jobs.jobs_of(experiment, [("composed", 1)]), 2, QUIET))


def seen_gpu(number: int) -> str:
    """What a process of the pool may use."""
    del number
    return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.slow
def test_each_process_takes_a_free_gpu_and_gives_it_back() -> None:
    """More processes than GPUs, one after another: each takes one, and gives it back."""
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for gpu in ("3", "5"):
        free.put(gpu)
    with ProcessPoolExecutor(
        2,
        mp_context=context,
        max_tasks_per_child=1,
        initializer=jobs.prepare_process,
        initargs=(1, free),
    ) as pool:
        found = list(pool.map(seen_gpu, range(5), timeout=300))
    assert set(found) <= {"3", "5"}
    assert sorted(free.get() for _ in range(2)) == ["3", "5"]
    assert free.empty()


def test_all_gpus_that_may_be_used_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert jobs.visible_gpus() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert jobs.visible_gpus() == ["0", "1"]


def test_a_trainer_keeps_to_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hardware, "TrainingArguments", lambda **settings: SimpleNamespace(n_gpu=4, **settings)
    )
    args: Any = hardware.on_one_device(max_steps=3)
    assert (args._n_gpu, args.max_steps) == (1, 3)


def test_what_is_tested_twice_is_trained_once(experiment: Experiment) -> None:
    """Whether it is asked for or not, so that it can be added without training again."""
    alone = jobs.jobs_of(experiment, [("composed", 2)])
    assert alone == jobs.jobs_of(experiment, [("composed", 2), ("wrong-test", 1)])
    assert [job.also for job in alone] == [("wrong-test",)] * 2


def test_a_share_of_the_examples_is_drawn_from_all(experiment: Experiment, models: Models) -> None:
    made = make(experiment, models, "composed")
    data = replace(experiment.data(0), composition=[*examples("Up", 16), *examples("Down", 16)])
    settings = replace(experiment.training, examples=64, distinct=0.25)  # of 32
    drawn = {
        seed: {
            e.prompt
            for _, some in jobs.stages(System(title=""), made, data, settings, seed)
            for e in some
        }
        for seed in (0, 1)
    }
    assert [len(found) for found in drawn.values()] == [8, 8]
    assert drawn[0] != drawn[1]
    assert {prompt.split(":")[0] for prompt in drawn[0]} == {"Up", "Down"}
    few = replace(settings, examples=8)  # of 8: no more would be seen
    [(_, some)] = jobs.stages(System(title=""), made, data, few, 0)
    assert len({e.prompt for e in some}) == 2


def test_the_domain_is_read_before_the_composition(experiment: Experiment, models: Models) -> None:
    made = make(experiment, models, "lora")
    [(title, domain), (_, rest)] = jobs.stages(
        experiment.system("lora-domain"), made, experiment.data(0), experiment.training, 0
    )
    assert title == " (domain)"
    assert {e.group for e in domain} == {"text"}
    assert {e.group for e in rest} == {"Up", "Down"}


def test_plain_texts_of_all_kinds_are_mixed_in() -> None:
    task = examples(number=20)
    texts = (["one. " * 200, "two"], ["three"] * 9)
    found = domain.with_replay(task, *texts)
    assert found[:20] == task
    added = found[20:]
    assert len(added) == 20 // domain.REPLAY
    assert all(one.prompt == "" and len(one.target) <= domain.LENGTH for one in added)
    assert [one.target == "three" for one in added] == [False, True, False, True]
    assert len(domain.with_replay(examples(number=30), ["only"])) == 30 + 30 // domain.REPLAY


def test_what_is_only_tested_is_known_by_its_tests(experiment: Experiment) -> None:
    """Another D_C is trained on anew, and what does not train is not asked again."""
    both = jobs.jobs_of(experiment, [("anchor", 1), ("composed", 1)])
    before = jobs.data_hashes(experiment, both)
    other = replace(experiment, data=partial(experiment.data, size=4))
    after = jobs.data_hashes(other, both)
    assert [before[job] == after[job] for job in both] == [True, False]


def test_the_pipelines_parts_are_shown_what_they_are_asked(
    experiment: Experiment, models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """m_A the examples of its own row, m_B examples that carry what m_A said."""
    asked: list[str] = []

    def say(runner: Any, some: Any, *_: Any) -> list[tuple[str, bool]]:
        asked.extend(runner.tokenizer.decode(found["input_ids"]) for found in runner.encode(some))
        return [("a hint", True)] * len(some)

    monkeypatch.setattr(jobs, "say", say)
    hinting = replace(
        experiment, pipeline=lambda one, said: (replace(one, closing=f"{one.closing}{said}"), "")
    )
    study = jobs.Study(experiment=hinting, models=models, folder=tmp_path, device="cpu")
    data = replace(hinting.data(0), shots={"Up": examples("Up", 3)})
    shots = jobs.shots_through_text(study, data)["Up"]
    assert all(one.closing.endswith("a hint") for one in shots)
    for one, text in zip(data.shots["Up"], asked, strict=True):
        assert text.count(one.source) == 1  # it is asked about, not shown
        assert all(other.source in text for other in data.shots["Up"])
    asked.clear()
    spoken = answering.Generated()
    speaker, some, test = jobs.speaker_of(study), examples("Up", 1), hinting.tests["near"]
    [(given, _)] = jobs.through_text(study, speaker, data.shots, some, test, spoken)
    assert all(one.source in asked[0] for one in data.shots["Up"])
    assert given.closing.endswith("a hint")


def test_what_the_pipeline_writes_is_judged(
    experiment: Experiment, models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Programs are made of both parts: what m_A began and what m_B went on with."""
    given: list[str] = []

    def passes(some: Any, texts: list[str], *, allowed: bool) -> list[bool]:
        given.extend(texts)
        return [allowed] * len(texts)

    monkeypatch.setattr("graftlm.reproduce.code_tests.passes", passes)
    monkeypatch.setattr(jobs, "say", lambda runner, some, *_: [("begun ", True)] * len(some))
    tests = {"near": Test(metrics=(metrics.PASS_AT_1,), most_tokens=4)}
    study = jobs.Study(
        experiment=replace(experiment, tests=tests, training=experiment.training),
        models=models,
        folder=tmp_path,
        device="cpu",
        run_code=True,
    )
    system, made = experiment.system("pipeline"), make(experiment, models, "pipeline")
    generated = answering.Generated()
    some, data = examples(number=2), experiment.data(0)
    found = jobs.answer(study, system, made, data, some, tests["near"], generated)
    assert [one.passed for one in found] == [True, True]
    assert all(text.startswith("begun ") and len(text) > len("begun ") for text in given)
    assert generated.tokens > 0


def test_tokens_are_counted_up_to_their_ends() -> None:
    """EOS is 2, and pads; 7 ends an answer too."""
    rows = [[5, 6, 7, 2, 2], [5, 2, 2, 2, 2], [5, 6, 5, 6, 5], [7, 2, 2, 2, 2]]
    assert answering.num_tokens(torch.tensor(rows), [2, 7]) == 3 + 2 + 5 + 1
    assert answering.Generated().tokens_per_second is None
    assert answering.Generated(tokens=6, seconds=2.0).tokens_per_second == 3


def test_a_folder_is_one_experiments(experiment: Experiment, tmp_path: Path) -> None:
    other = replace(experiment, training=replace(experiment.training, examples=12))
    run.check_folder(tmp_path, other)  # which then failed: nothing is claimed
    run.check_folder(tmp_path, experiment)
    run.claim(tmp_path, experiment)
    run.check_folder(tmp_path, experiment)
    with pytest.raises(ValueError, match=r"holds results of .*'examples': 8.*--output"):
        run.check_folder(tmp_path, other)


def test_missing_libraries_are_named_before_anything_runs(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    for systems, name in (
        ([("composed", 1)], "sacrebleu"),
        ([("composed", 1), ("lora", 1)], "peft"),
        ([("composed", 2)], "sacrebleu"),
    ):
        with pytest.raises(ImportError, match=f"{name} is not installed, which this experiment"):
            run.run(experiment, systems=systems, output=tmp_path / "none", console=QUIET)
    assert not (tmp_path / "none").exists()


def test_weak_isolation_of_programs_is_said(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, quiet=False, width=200)
    programs = replace(experiment, tests={"near": Test(metrics=(metrics.PASS_AT_1,))})
    monkeypatch.setattr(run, "guards", lambda: ("limits", "seccomp", "audit"))
    found = run.isolation(programs, console)
    assert found == {"programs held in by": "limits, seccomp, audit"}
    assert "has no landlock, so programs" in console.export_text()
    assert run.isolation(experiment, console) == {}


@pytest.mark.parametrize(
    ("systems", "jobs_at_once", "message"),
    [
        ([("nonsense", 1)], 1, "system 'nonsense' is none of augmenting"),
        ([("anchor", 1)], 1, "systems lacks 'composed'"),
        ([("composed", 0)], 1, "seeds must be at least 1, got 0 for composed"),
        ([("composed", 1)], 0, "jobs must be at least 1, got 0"),
        ([("composed", 1), ("wrong-test", 2)], 1, "wrong-test is composed, tested in another way"),
    ],
)
def test_what_cannot_be_run_is_refused(
    systems: Any, jobs_at_once: int, message: str, experiment: Experiment, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run.run(experiment, systems=systems, output=tmp_path, jobs=jobs_at_once, console=QUIET)


def test_programs_are_not_run_unasked(experiment: Experiment, tmp_path: Path) -> None:
    tests = {"near": Test(metrics=(metrics.PASS_AT_1,))}
    with pytest.raises(ValueError, match="runs programs that models wrote"):
        run.run(replace(experiment, tests=tests), systems=[("composed", 1)], output=tmp_path)


# ---- goals and flags ---------------------------------------------------------------------


def cell(mean: float, difference: float | None = None, p: float = 0.001) -> statistics.Cell:
    against = None
    if difference is not None:
        against = statistics.Comparison(
            difference=difference, low=0, high=0, p=p, p_corrected=p, seeds=1
        )
    return statistics.Cell(mean=mean, deviation=0.0, seeds=[mean], against=against)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        ({"at_least": 90}, True),
        ({"at_least": 96}, False),
        ({"beats": ("lora",), "margin": 10, "level": 0.01}, True),
        ({"beats": ("lora",), "margin": 50}, False),
        ({"beats": ("lora", "random")}, None),
        ({"beats": ("lora",), "level": 0.0001}, False),
        ({"at_least_ratio": 0.98}, True),
        ({"at_most_ratio": 1.01}, False),
        ({"at_least": 90, "group": "elsewhere"}, None),
    ],
)
def test_goals_are_judged(goal: Any, met: bool | None) -> None:
    experiment = kv_arithmetic.experiment("quick")
    cells = {"composed": cell(95), "lora": cell(70, 25), "anchor": cell(50, 45)}
    table = {"KV-MATH": {"mixed": {"exact match": cells}}}
    found = comparison.judge(experiment, Goal(says="", test="KV-MATH", **goal), table)
    assert found["met"] is met


def test_marks_say_who_is_ahead() -> None:
    shown = [
        report.cell_text(
            {"mean": 1.0, "seeds": [1.0], "deviation": 0.0, "against": against}, lower, 1
        )
        for against, lower in [
            (None, False),
            ({"difference": 1.0, "p_corrected": 0.01}, False),
            ({"difference": 1.0, "p_corrected": 0.01}, True),
            ({"difference": 1.0, "p_corrected": 0.2}, True),
        ]
    ]
    assert shown == ["1.0", "1.0 *", "1.0 †", "1.0"]


def test_a_worse_number_is_no_gain() -> None:
    def groups(difference: float) -> Any:
        against = {"difference": difference, "p_corrected": 0.01}
        return {"text": {"bits": {"anchor": {"against": against}}}}

    assert report.gained(groups(-1.0), "bits", True)
    assert not report.gained(groups(1.0), "bits", True)
    assert report.gained(groups(1.0), "bits", False)
    assert not report.gained({"text": {"bits": {}}}, "bits", False)


def test_each_setting_has_its_folder() -> None:
    def folder(name: str, *words: str) -> str:
        parser = argparse.ArgumentParser()
        flags.add_arguments(parser, name)
        return flags.output_folder(parser.parse_args(words), name)

    assert folder("kv-arithmetic") == "kv-arithmetic"
    assert folder("kv-arithmetic", "--seeds", "5", "--jobs", "2") == "kv-arithmetic"
    assert (
        folder("kv-arithmetic", "--preset", "quick", "--dc", "subs") == "kv-arithmetic-subs-quick"
    )
    assert folder("low-resource", "--language", "guarani") == "low-resource-guarani"
    found = folder("code", "--no-programs", "--codexglue", "a/test.jsonl", "b/more.jsonl")
    assert found == "code-test-more-no-programs"
    assert folder("code", "--output", "x") == "x"


def test_systems_are_named_with_their_seeds() -> None:
    main, ablations = ["anchor", "composed", "lora"], ["gate"]
    named = flags.named_systems(["main", "lora:1", "gate:2"], 5, main, ablations)
    assert named == [("anchor", 5), ("composed", 5), ("lora", 1), ("gate", 2)]
    assert flags.named_systems(["all"], 1, main, ablations)[-1] == ("gate", 1)
    with pytest.raises(ValueError, match="'x' is not a number of seeds"):
        flags.named_systems(["lora:x"], 1, main, ablations)


@pytest.mark.parametrize("module", [kv_arithmetic, kv_two_models, code, translate])
@pytest.mark.parametrize("preset", flags.PRESETS)
def test_goals_are_of_what_there_is(module: Any, preset: str) -> None:
    experiment = module.experiment(preset)
    assert experiment.goals
    for goal in experiment.goals:
        assert goal.test in experiment.tests
        assert set(goal.beats) <= set(experiment.systems)


# ---- two models --------------------------------------------------------------------------


def test_each_half_of_the_keys_has_its_model() -> None:
    experiment = kv_two_models.experiment("quick")
    data = experiment.data(0)
    for test in ("KV-MATH", "KV-SUBS"):
        assert set(data.tests[test]) == {"first half", "second half", "both"}
    needs = {tuple(e.facts["needs"]) for e in data.composition}
    assert needs == {(), ("first",), ("second",), ("first", "second")}
    scored = {e.source for groups in data.tests.values() for g in groups.values() for e in g}
    assert not scored & {e.source for e in data.composition}
