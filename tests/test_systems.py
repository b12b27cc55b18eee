"""What the experiments train and ask: composed models, controls, LoRA, the text pipeline."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import tiny_experiment
from families import tiny
from graftlm.greedy import GREEDY
from graftlm.reproduce import (
    answering,
    domain,
    encoding,
    fitting,
    jobs,
    kept,
    metrics,
    runner,
)
from graftlm.reproduce.decoding import greedy_answers
from graftlm.reproduce.example import Example
from graftlm.reproduce.experiment import Experiment, Models, Test
from graftlm.reproduce.language_model import train_tokenizer
from graftlm.reproduce.systems import System
from tiny import character_tokenizer, meddling


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return tiny_experiment.save_models(tmp_path_factory.mktemp("models"))


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


def test_what_may_go_on_has_no_end() -> None:
    tokenizer, [example] = character_tokenizer(), examples(number=1)
    whole = encoding.feature(example, tokenizer)
    open_ended = encoding.feature(replace(example, ends=False), tokenizer)
    assert open_ended == {name: ids[:-1] for name, ids in whole.items()}


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


@pytest.mark.parametrize(
    "name",
    [
        "anchor",
        "composed",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("self", "prompt", "wrong-test")),
    ],
)
def test_rows_leave_the_batch_as_their_answers_end(
    experiment: Experiment, models: Models, name: str
) -> None:
    """What is answered is what transformers' own search answers, which runs all rows on."""
    made = make(experiment, models, "composed" if name == "wrong-test" else name)
    made = runner.misread(made) if name == "wrong-test" else made
    for bridge in getattr(made.model, "bridges", ()):
        torch.nn.init.normal_(bridge.cross_o.weight)  # else all of them say what the anchor says
    some = [replace(one, opening="x" * k + one.opening) for k, one in enumerate(examples(number=5))]
    prompts = [
        {key: ids[: feature["labels"].count(encoding.IGNORED)] for key, ids in feature.items()}
        for feature in made.encode(some)
    ]
    inputs = encoding.pad([{k: f[k] for k in f if k != "labels"} for f in prompts], left=True)
    assert int((inputs["attention_mask"] == 0).sum()) == 4 + 3 + 2 + 1
    length = inputs["input_ids"].shape[1]
    whole = made.model.generate(**inputs, **GREEDY, max_new_tokens=8)[:, length:].tolist()
    if name != "anchor":
        given = {key: ids for key, ids in inputs.items() if key != "read_ids"}
        with made.model.anchor_only():
            said = made.model.generate(**given, **GREEDY, max_new_tokens=8)
        assert whole != said[:, length:].tolist()
    for end in {token for row in whole for token in row}:
        sizes: list[int] = []
        hook = made.model.register_forward_pre_hook(
            lambda model, args, kwargs, into=sizes: into.append(len(kwargs["input_ids"])),
            with_kwargs=True,
        )
        found = greedy_answers(made.model, inputs, max_new_tokens=8, end_ids=[end])
        hook.remove()
        assert found == [row[: row.index(end) + 1] if end in row else row for row in whole]
        assert sizes == [sum(at < len(row) for row in found) for at in range(max(map(len, found)))]


@pytest.mark.parametrize("name", ["anchor", "augmenting"])
def test_examples_in_the_prompt_are_read_once(
    experiment: Experiment, models: Models, name: str
) -> None:
    """A batch says the same, and what its rows begin with is one row's work."""
    made = make(experiment, models, name)
    assert made.shares
    for weight in made.model.parameters():
        weight.data *= 8 if weight.dim() > 1 else 1  # what is said depends on what was read
    some = [replace(one, source="x" * k + one.source) for k, one in enumerate(examples(number=5))]
    test = Test(metrics=(), most_tokens=20)
    found = {}
    for shares in (True, False):
        read: list[int] = []
        hook = fitting.decoder.trunk(made.model).register_forward_pre_hook(
            lambda model, args, kwargs, into=read: into.append(kwargs["input_ids"].numel()),
            with_kwargs=True,
        )
        one = replace(made, shares=shares)
        costs = answering.costs(one, some, batch_size=5)
        said = answering.say(one, some, test, batch_size=5)
        hook.remove()
        found[shares] = costs, said, read
    assert found[True][1] == found[False][1]
    for once, anew in zip(found[True][0], found[False][0], strict=True):
        assert once.bits == pytest.approx(anew.bits, rel=1e-5)
        assert once.tokens == anew.tokens
    shots, rest, *_ = found[True][2]
    assert shots + rest // 5 == found[False][2][0] // 5
    assert shots > 20


@pytest.mark.parametrize(
    ("kind", "shares"), [("llama", True), ("mistral", False), ("gpt2", False), ("mpt", False)]
)
def test_prompts_are_shared_only_where_padding_can_be_skipped(
    experiment: Experiment, models: Models, kind: str, shares: bool
) -> None:
    """A window counts the padding between the shared tokens and the rest, as some models do."""
    made = replace(make(experiment, models, "anchor"), model=tiny(kind))
    shots = experiment.data(0).shots
    assert runner.showing(made, shots).shares == shares
    assert not runner.showing(made, {}).shares


def test_an_answer_ends_where_nothing_more_is_needed(
    experiment: Experiment, models: Models
) -> None:
    made, some = make(experiment, models, "composed"), examples(number=5)
    long = answering.say(made, some, Test(metrics=(), most_tokens=6), batch_size=2)
    cut_at = {example.source: size for size, example in enumerate(some, start=2)}
    generated = answering.Generated()
    test = Test(
        metrics=(),
        most_tokens=6,
        needs_no_more=lambda example, text: len(text) >= cut_at[example.source],
    )
    short = answering.say(made, some, test, batch_size=2, generated=generated)
    for size, (whole, _), (text, ended) in zip((2, 3, 4, 5, 6), long, short, strict=True):
        assert whole.startswith(text)
        assert len(text) >= size or text == whole
        assert ended == (len(whole) >= size)
    assert short[0][0] != long[0][0]
    assert generated.tokens < 6 * len(some)


def test_an_answer_does_not_end_within_a_character(experiment: Experiment, models: Models) -> None:
    """Its first byte alone is no space, and would end a function; U+3000 as a whole is one."""
    made = make(experiment, models, "anchor")
    made = replace(made, tokenizer=train_tokenizer(["a"], 300))
    test = Test(metrics=(), needs_no_more=lambda example, text: True)
    ids = made.tokenizer("a\u3000", add_special_tokens=False)["input_ids"]
    over = [
        answering.looked_at(made, test, examples(number=1), 0, ids[:size])
        for size in range(1, len(ids) + 1)
    ]
    assert over == [True, False, False, True]


def test_answers_end_where_the_test_says() -> None:
    assert answering.cut("\n a b \nmore\n", "\n") == "a b"
    assert answering.cut(" a\nb", None) == " a\nb"
    tokenizer = character_tokenizer()
    model = tiny("llama")
    end, line = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("\n")
    model.generation_config.eos_token_id = None
    assert set(answering.ends(tokenizer, "\n", model)) == {end, line}
    assert answering.ends(tokenizer, None, model) == [end]
    model.generation_config.eos_token_id = 99
    assert set(answering.ends(tokenizer, None, model)) == {end, 99}
    model.generation_config.eos_token_id = [98, 99]  # a chat model's
    assert set(answering.ends(tokenizer, None, model)) == {end, 98, 99}


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


@pytest.mark.parametrize("trains", ["lora", "lora-embeddings"])
def test_lora_has_about_as_many_weights_and_starts_alike(
    experiment: Experiment, models: Models, trains: Any
) -> None:
    """Without its embeddings, kv-arithmetic's anchor cannot tell the letters of the keys apart."""
    lora = replace(experiment.systems["lora"], trains=trains)
    experiment = replace(experiment, systems={**experiment.systems, "lora": lora})
    adapted = make(experiment, models, "lora", seed=3)
    bridges = runner.trainable(make(experiment, models, "composed").model)
    again = make(experiment, models, "lora", seed=3)
    trained = [name for name, w in adapted.model.named_parameters() if w.requires_grad]
    assert any("embed_tokens" in name for name in trained) == (trains == "lora-embeddings")
    assert all("lora_" in name for name in trained)
    sizes = sum(runner.linear_sizes(adapted.model).values())
    assert abs(runner.trainable(adapted.model) - bridges) <= sizes
    ours, theirs = (dict(found.model.named_parameters()) for found in (adapted, again))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_maps_of_gpt2_are_linear_too() -> None:
    """They are transformers' own kind; the LoRA control divided by zero."""
    sizes = runner.linear_sizes(tiny("gpt2"))
    assert set(sizes) == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_computed_in_where_it_is_fast(
    experiment: Experiment, models: Models, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(runner, "has_bf16", lambda device: fast)
    settings = replace(experiment.training, bf16=True)
    made = make(replace(experiment, in_bf16=True, training=settings), models, "lora")
    frozen = {p.dtype for p in made.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16 if fast else torch.float32}
    used: list[bool] = []
    loss = fitting.target_loss

    def noted(model: Any, batch: Any, *, bf16: bool) -> Any:
        used.append(bf16)
        return loss(model, batch, bf16=bf16)

    monkeypatch.setattr(fitting, "target_loss", noted)
    fitting.fit(
        made,
        made.encode(examples()),
        settings,
        learning_rate=1e-3,
        seed=0,
        title="",
        console=Console(quiet=True),
        device="cpu",
    )
    assert {made.bf16, *used} == {fast}


def test_full_fine_tuning_trains_all_weights_in_full_precision(
    experiment: Experiment, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "has_bf16", lambda device: True)
    in_bf16 = replace(experiment, in_bf16=True)
    assert make(in_bf16, models, "anchor").model.dtype == torch.bfloat16
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


def test_the_domain_can_be_mixed_with_the_composition(
    experiment: Experiment, models: Models
) -> None:
    made = make(experiment, models, "lora")
    data, settings = experiment.data(0), experiment.training
    apart = [
        examples
        for _, examples in jobs.stages(
            experiment.system("lora-domain"), made, data, settings, seed=0
        )
    ]
    mixed = replace(experiment.system("lora-domain"), learns="mixed")
    [(_, together)] = jobs.stages(mixed, made, data, settings, seed=0)
    assert together == encoding.spread(apart, settings.batch_size)


def test_parts_are_spread_evenly_batch_by_batch() -> None:
    few, many = examples(number=4), examples(number=12)
    mixed = encoding.spread([many, few], 2)
    assert mixed == [
        *(many[0:2] + few[0:2]),
        *many[2:6],
        *(many[6:8] + few[2:4]),
        *many[8:12],
    ]


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
    study = kept.Study(experiment=hinting, models=models, folder=tmp_path, device="cpu")
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
    study = kept.Study(
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
    given.clear()
    one = replace(tests["near"], answered=1)
    found = jobs.answer(study, system, made, data, some, one, generated)
    assert [one.passed for one in found] == [True, None]
    assert len(given) == 1  # what nobody wrote is no program


def test_tokens_are_counted_with_their_seconds() -> None:
    assert answering.Generated().tokens_per_second is None
    assert answering.Generated(tokens=6, seconds=2.0).tokens_per_second == 3
