"""lm-eval on composed models gives what the model itself says; parts give what they say alone."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm import ComposedForCausalLM, compose

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from graftlm.harness import GraftLM
from tiny import save_pair
from two_tokenizers import PROMPTS, byte_tokenizer, compose_pair

PAIRS = [
    ("The quick", " brown fox jumps"),
    ("The quick", " dog"),
    ("There was once", " a"),
    ("There was once", " b"),
    ("def add(fi", "rst, second):"),
    ("", "nobody counted"),
    ("the lazy dog", " sleeps on"),
]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=number)  # pyrefly: ignore
        for number, pair in enumerate(arguments)
    ]


def score(lm: Any, pairs: list[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def opened(model: ComposedForCausalLM) -> ComposedForCausalLM:
    """With bridges that say something."""
    torch.manual_seed(5)
    for bridge in model.bridges:
        torch.nn.init.normal_(bridge.cross_o.weight, std=2.0)  # pyrefly: ignore
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Composed models: of one tokenizer, of two, one that reads prompts, and the parts."""
    place = tmp_path_factory.mktemp("harness")
    anchor, augmenting = save_pair(place)
    made = {
        "shared": compose(anchor, augmenting, every=1),
        "prompt": compose(anchor, augmenting, every=1, reads="prompt"),
    }
    for name, model in made.items():
        opened(model).save_pretrained(place / name)
    compose(anchor, augmenting, every=1).save_pretrained(place / "fresh")
    names = ("shared", "prompt", "fresh")
    return {"anchor": anchor, "augmenting": augmenting} | {n: str(place / n) for n in names}


@pytest.fixture(scope="module")
def two() -> ComposedForCausalLM:
    """Two tokenizers, one kept in memory."""
    return opened(compose_pair())


def by_hand(model: ComposedForCausalLM, tokenizer: Any, context: str, text: str) -> Any:
    """Our own sum of log-probabilities, in one row and without a mask."""
    start = tokenizer.bos_token_id or tokenizer.eos_token_id
    before = tokenizer.encode(context) if context else [start]
    after = tokenizer.encode(context + text)[len(before) if context else 0 :]
    ids = torch.tensor([before + after])
    labels = torch.tensor([[-100] * len(before) + after])
    with torch.no_grad():
        logits = model(input_ids=ids, labels=labels).logits[0].double()
    steps = logits.log_softmax(-1)[len(before) - 1 : -1]
    greedy = steps.argmax(-1).tolist() == after
    return sum(step[token].item() for step, token in zip(steps, after, strict=True)), greedy


@pytest.mark.parametrize("name", ["shared", "prompt"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_are_those_computed_by_hand(folders, name, batch_size):
    lm = GraftLM(folders[name], device="cpu", batch_size=batch_size)
    for (context, text), (found, greedy) in zip(PAIRS, score(lm), strict=True):
        expected, is_greedy = by_hand(lm.model, lm.tokenizer, context, text)
        assert found == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_with_two_tokenizers(two, batch_size):
    """Padding in a batch is not read as text."""
    lm = GraftLM(two, batch_size=batch_size)
    for (context, text), (found, greedy) in zip(PAIRS, score(lm), strict=True):
        expected, is_greedy = by_hand(two, lm.tokenizer, context, text)
        assert found == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy


def test_each_split_of_the_same_tokens_has_its_own_prompt(folders):
    """lm-eval runs equal rows once; with a prompt that the model reads they are not equal."""
    lm = GraftLM(folders["prompt"], device="cpu", batch_size=4)
    pairs = [("abc", "def"), ("abcd", "ef"), ("ab", "cdef")]
    requests = [(None, lm.tok_encode(one), lm.tok_encode(two)) for one, two in pairs]
    assert [numbers for numbers, _ in lm.passes(requests)] == [[0], [1], [2]]
    found = [value for value, _ in score(lm, pairs)]
    expected = [by_hand(lm.model, lm.tokenizer, *pair)[0] for pair in pairs]
    assert found == pytest.approx(expected, abs=1e-4)
    shared = GraftLM(folders["shared"], device="cpu")
    assert [numbers for numbers, _ in shared.passes(requests)] == [[0, 1, 2]]


def test_a_row_that_ends_in_the_padding_token_keeps_it(two):
    """Token 0 pads; here it is a token of one row as well, and the other row is padded with it."""
    lm = GraftLM(two, batch_size=2)
    rows = [(None, [7, 9, 11], [0, 12]), (None, [7, 9], [11, 12]), (None, [7], [9, 11, 0, 0, 13])]
    together = lm._loglikelihood_tokens(rows, disable_tqdm=True)
    alone = [lm._loglikelihood_tokens([row], disable_tqdm=True)[0] for row in rows]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert lm.spans == {}


@pytest.mark.parametrize("part", ["anchor", "augmenting"])
def test_a_part_is_what_lm_eval_makes_of_its_own_folder(folders, part):
    ours = GraftLM(folders["shared"], part=part, device="cpu", batch_size=3)
    theirs = HFLM(folders[part], device="cpu", batch_size=3)
    assert score(ours) == score(theirs)
    assert ours.max_length == theirs.max_length
    texts = instances("loglikelihood_rolling", [("The quick brown fox",), ("ab",)])
    assert ours.loglikelihood_rolling(texts, True) == theirs.loglikelihood_rolling(texts, True)
    options = {"until": ["\n"], "max_gen_toks": 9}
    asked = instances("generate_until", [(text, options) for text in ("The quick", "def add(fi")])
    assert ours.generate_until(asked, True) == theirs.generate_until(asked, True)


def test_bos_is_put_before_if_asked_for(two):
    """lm-eval tells a tokenizer so when it loads it; ours are loaded already."""
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.bos_token = "<pad>"
    plain = GraftLM(two, tokenizer=copy.deepcopy(tokenizer)).tok_encode("fox")
    asked = GraftLM(two, tokenizer=tokenizer, add_bos_token=True).tok_encode("fox")
    assert asked == [tokenizer.bos_token_id, *plain]
    assert tokenizer("fox", add_special_tokens=True)["input_ids"] == plain  # it is the caller's


def test_parts_of_a_loaded_model_use_their_own_tokens(two):
    theirs = GraftLM(two, part="augmenting")
    assert theirs.tokenizer.get_vocab() == two.processor.all_tokenizers["augmenting"].get_vocab()
    assert theirs.model is two.augmenting["augmenting"]
    pairs = [("The quick brown", " fox jumps"), ("the lazy dog, and", " the dog sleeps")]
    for context, text in pairs:
        (found, _) = score(theirs, [(context, text)])[0]
        own, tokens = two.augmenting["augmenting"], theirs.tokenizer
        assert found == pytest.approx(by_hand(own, tokens, context, text)[0], abs=1e-4)
    anchor = GraftLM(two, part="anchor")
    with two.anchor_only():
        assert score(anchor) == score(GraftLM(two))


def test_a_fresh_composition_scores_as_its_anchor(folders):
    fresh = GraftLM(folders["fresh"], device="cpu", batch_size=4)
    anchor = HFLM(folders["anchor"], device="cpu", batch_size=4)
    for ours, theirs in zip(score(fresh), score(anchor), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    alone = HFLM(folders["anchor"], device="cpu", batch_size=1)
    assert score(GraftLM(folders["fresh"], device="cpu")) == score(alone)


def test_lm_evals_own_model_class_loads_a_composed_folder(folders):
    """It passes `gguf_file=None` and others, which loading refused."""
    theirs = HFLM(folders["shared"], device="cpu")
    assert score(theirs) == score(GraftLM(folders["shared"], device="cpu"))
    with pytest.raises(TypeError, match="from_pretrained got unknown arguments: max_memory"):
        ComposedForCausalLM.from_pretrained(folders["shared"], max_memory={"cpu": "1GB"})


def test_a_scale_of_zero_is_the_anchor(folders):
    off = GraftLM(folders["shared"], scale=0, device="cpu")
    assert score(off) == score(HFLM(folders["anchor"], device="cpu"))
    on = GraftLM(folders["shared"], scale={"augmenting": 1}, device="cpu")
    assert score(on) == score(GraftLM(folders["shared"], device="cpu")) != score(off)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_is_the_models_own(two, batch_size):
    lm = GraftLM(two, batch_size=batch_size)
    options = {"until": ["never"], "max_gen_toks": 8}
    asked = instances("generate_until", [(text, options) for text in PROMPTS])
    for prompt, found in zip(PROMPTS, lm.generate_until(asked, True), strict=True):
        ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = two.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert found == lm.tokenizer.decode(made, skip_special_tokens=True)


def test_generation_reads_the_prompt_of_each_row(folders):
    """Rows of different lengths, padded on the left, with a model that reads prompts only."""
    lm = GraftLM(folders["prompt"], device="cpu", batch_size=3)
    options = {"until": ["never"], "max_gen_toks": 8}
    prompts = ["The quick brown fox", "ab", "def add"]
    found = lm.generate_until(instances("generate_until", [(p, options) for p in prompts]), True)
    for prompt, text in zip(prompts, found, strict=True):
        ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = lm.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert text == lm.tokenizer.decode(made, skip_special_tokens=True)


def test_rolling_likelihood_is_the_sum_over_all_tokens(two):
    lm = GraftLM(two, batch_size=2)
    texts = ["The quick brown fox", "nobody counted further than 12; 345 was the sea."]
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))
    expected = [by_hand(two, lm.tokenizer, "", text)[0] for text in texts]
    assert found == pytest.approx(expected, abs=1e-4)


def test_batches_are_found_automatically(folders):
    lm = GraftLM(folders["shared"], device="cpu", batch_size="auto", max_batch_size=4)
    expected = score(GraftLM(folders["shared"], device="cpu"))
    for one, other in zip(score(lm), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_batches_are_found_with_two_tokenizers(two):
    """lm-eval tries them with rows of one token, as long as the context."""
    lm = GraftLM(two, batch_size="auto", max_batch_size=2)
    options = {"until": ["never"], "max_gen_toks": 8}
    for kind, arguments in (
        ("generate_until", [(text, options) for text in PROMPTS]),
        ("loglikelihood_rolling", [(text,) for text in PROMPTS]),
    ):
        found = getattr(lm, kind)(instances(kind, arguments))
        expected = getattr(GraftLM(two), kind)(instances(kind, arguments))
        assert found == (expected if kind == "generate_until" else pytest.approx(expected))


def test_chats_are_written_in_the_parts_own_template(folders):
    chat = [{"role": "user", "content": "hi"}]
    lm = GraftLM(folders["shared"], device="cpu")
    assert lm.apply_chat_template(chat) == "<|user|>hi<|end|><|assistant|>"


def test_the_hub_is_not_asked_about_a_folder(folders, monkeypatch):
    """lm-eval asks it about every name; that of a folder may be the name of something there."""
    lm = GraftLM(folders["shared"], device="cpu")

    def ask(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("lm_eval.models.huggingface.HfApi", ask)
    assert lm.get_model_info()["model_num_parameters"] == lm.model.num_parameters()


def test_settings_that_do_not_apply_are_refused(folders):
    with pytest.raises(ValueError, match="part is 'ancor', but must be one of composed, anchor, a"):
        GraftLM(folders["shared"], part="ancor", device="cpu")
    with pytest.raises(ValueError, match="peft is 'lora', but a composed model takes none of peft"):
        GraftLM(folders["shared"], peft="lora", device="cpu")
    with pytest.raises(ValueError, match="holds a model of type 'llama', not a composed model"):
        GraftLM(folders["anchor"], device="cpu")


# ---- in processes of their own ---------------------------------------------------------------


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports", ["import graftlm, lm_eval.models", "import lm_eval.models, graftlm"]
)
def test_lm_eval_knows_us_whichever_is_imported_first(imports):
    code = f"""
{imports}
from lm_eval.api.registry import get_model
print(get_model("graftlm").__name__)
"""
    done = run("-c", code)
    assert done.stdout.strip() == "GraftLM", done.stderr


@pytest.mark.parametrize(
    ("words", "is_imported"),
    [
        (["lm_eval", "--model", "graftlm"], True),
        (["-m", "lm_eval"], True),
        (["-u", "-m", "lm_eval", "run"], True),
        (["other"], False),
        (["other", "--tasks", "of", "lm_eval"], False),
    ],
)
def test_only_lm_evals_command_imports_us_at_the_start(tmp_path: Path, words, is_imported):
    """The line of start-up code, read from a folder as Python reads site-packages."""
    line = Path(__file__).parents[1] / "src" / "lm_eval_plugin.pth"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "plugin.pth").write_text(line.read_text())
    code = "import site, sys; site.addsitedir('site'); print('graftlm' in sys.modules)\n"
    code += "assert 'torch' not in sys.modules\n"
    for name in ("lm_eval", "lm_eval.py", "other"):
        (tmp_path / name).write_text(code)
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{is_imported}\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["graftlm", "hf"])
def test_lm_evals_own_command(folders, tmp_path: Path, kind):
    """`python -m graftlm.lm_eval` is lm-eval's command with us imported; `hf` then works too."""
    from lm_tasks import write_tasks

    tasks = write_tasks(tmp_path / "tasks")
    done = run(
        *("-m", "graftlm.lm_eval", "--model", kind, "--tasks", "tiny_choice,tiny_answer"),
        *("--model_args", f"pretrained={folders['shared']}", "--include_path", tasks),
        *("--device", "cpu", "--batch_size", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert "|tiny_choice|" in done.stdout.replace(" ", "")
