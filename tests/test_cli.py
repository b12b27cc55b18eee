"""The command line: every verb, every option, every message and exit status."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import graftlm
from graftlm import ComposedForCausalLM
from graftlm.cli import VERBS, build_parser, main
from graftlm.cli.generate import compare
from graftlm.cli.help import children, page
from graftlm.cli.playground import free_port, is_loopback
from graftlm.recipe import Recipe
from lm_tasks import write_tasks
from tiny import character_tokenizer, save_model, save_pair, sums, write_lines
from two_tokenizers import compose_pair

REPOSITORY = Path(__file__).parents[1]
# A run of two steps.
QUICK = ("--max_steps", "2", "--per-device-train-batch-size", "4", "--save_strategy", "no")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, models: tuple[str, str]) -> str:
    """A composed folder whose bridges are no longer the zero map."""
    torch.manual_seed(5)
    model = graftlm.compose(models[0], {"code": models[1]}, every=2, bridge_dtype=torch.float32)
    for name, weight in model.bridges.named_parameters():
        if name.endswith("cross_o.weight"):
            torch.nn.init.normal_(weight, std=2.0)
    folder = tmp_path_factory.mktemp("opened") / "model"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_lines(tmp_path / "data.jsonl", *sums(12))


class Output:
    """What a command printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def of(self, *words: str, status: int = 0) -> str:
        found = main(words)
        captured = self.capsys.readouterr()
        assert found == status, captured.err
        return captured.out if status in (0, 1) else captured.err


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    return Output(capsys)


# ---- the command itself ------------------------------------------------------------------


def test_help_and_version_load_no_torch() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from graftlm.cli import main\n"
        "for words in (['--help'], ['--version'], ['train', '--help'], ['compose', '--help']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(words)\n"
        "heavy = {'torch', 'transformers', 'rich', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"graftlm {graftlm.__version__}\n"
    run = subprocess.run(
        [sys.executable, "-m", "graftlm", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"graftlm {graftlm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["compse"], "invalid choice: 'compse'"),
        (["compose", "--anchor", "a"], "required: --augmenting, --output"),
        (["compose", "--every", "x"], "argument --every: invalid int value: 'x'"),
        (["generate"], "the following arguments are required: FOLDER"),
        (["evaluate", "folder"], "the following arguments are required: --tasks"),
        (["reproduce"], "the following arguments are required: EXPERIMENT"),
    ],
)
def test_wrong_usage_ends_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_is_one_line_unless_debugged(output: Output, tmp_path: Path) -> None:
    err = output.of("inspect", str(tmp_path), status=2)
    assert err == f"graftlm: error: {tmp_path} has no config.json; is it a graftlm folder?\n"
    with pytest.raises(graftlm.CheckpointMismatchError, match="no config.json"):
        main(["inspect", str(tmp_path), "--debug"])
    err = output.of("inspect", str(tmp_path), "--quick", status=2)
    assert err == "graftlm: error: unknown option '--quick'; see graftlm inspect --help\n"


def test_unexpected_errors_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, output: Output
) -> None:
    def fail_with(error: BaseException) -> None:
        def run(args: Any) -> int:
            raise error

        monkeypatch.setattr("graftlm.cli.inspect.run", run)

    fail_with(RuntimeError("our own bug"))
    with pytest.raises(RuntimeError, match="our own bug"):
        main(["inspect", "folder"])
    fail_with(torch.OutOfMemoryError("no memory\nleft"))
    assert output.of("inspect", "folder", status=2) == "graftlm: error: no memory left\n"
    fail_with(KeyboardInterrupt())
    assert output.of("inspect", "folder", status=130) == "graftlm: error: interrupted\n"


def test_a_closed_pipe_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("graftlm.cli.inspect.run", run)
    with (tmp_path / "out").open("w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["inspect", "folder"]) == 141
    assert capsys.readouterr().err == ""


def test_nothing_is_told_of_kernels_that_a_machine_lacks(opened: str) -> None:
    """Nor of what torch has renamed; torchao says both as soon as transformers finds it."""
    words = [sys.executable, "-m", "graftlm", "generate", opened, "abc", "--max-new-tokens", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_verbose_leaves_the_logs_alone(opened: str, output: Output) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    output.of("inspect", opened, "--verbose")
    assert logging.get_verbosity() == logging.INFO
    output.of("inspect", opened)
    assert logging.get_verbosity() == logging.ERROR


@pytest.mark.filterwarnings("default:the anchor is in float32 here:UserWarning")
def test_quantized_models(
    models: tuple[str, str], tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The composition says how it was made; loaded otherwise, a warning says how."""
    out, run = str(tmp_path / "out"), str(tmp_path / "run")
    pair = ["--anchor", models[0], "--augmenting", f"code={models[1]}"]
    assert main(["compose", *pair, "--quantize", "anchor=int8wo", "--output", out]) == 0
    entry = json.loads(Path(out, "config.json").read_text())["bases"]
    assert entry["anchor"]["fingerprint"]["quantization"] == "torchao Int8WeightOnlyConfig"
    assert entry["code"]["fingerprint"]["quantization"] is None
    assert main(["inspect", out]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["generate", out, "1+", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().err
    assert "warning: the anchor is in float32 here, but the bridges were trained on torchao" in said
    again = ["--quantize", "anchor=int8wo"]
    assert main(["generate", out, "1+", "--max-new-tokens", "2", *again]) == 0
    assert "warning" not in capsys.readouterr().err
    assert (
        main(["train", *pair, "--data", data, "--output", run, "--quantize", "8bit", *QUICK]) == 0
    )
    entry = json.loads(Path(run, "config.json").read_text())["bases"]
    assert {one["fingerprint"]["quantization"] for one in entry.values()} == {"bitsandbytes 8-bit"}
    capsys.readouterr()
    wrong = [*pair, "--output", run, "--quantize", "a=4bit", "--quantize"]
    assert main(["compose", *wrong, "8bit"]) == 2
    assert "--quantize '8bit' has no name; several need NAME=SCHEME" in capsys.readouterr().err
    assert main(["compose", *wrong, "code=4bit"]) == 2
    assert "quantization of 'a', which is neither a field" in capsys.readouterr().err


def test_the_help_page_is_up_to_date() -> None:
    expected = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page() == expected, "run: python -m graftlm.cli.help > docs/cli.md"


def test_every_option_is_used_in_a_test() -> None:
    tests = Path(__file__).parent.glob("test_*.py")
    source = "".join(path.read_text(encoding="utf-8") for path in tests)
    ours = [(name, parser) for name, parser in children("graftlm", build_parser())]
    assert {name.split()[1] for name, _ in ours} == set(VERBS)
    for name, parser in ours:
        if name in ("graftlm reproduce low-resource", "graftlm reproduce code"):
            continue  # their own are used where these experiments are tested
        for action in parser._actions:
            options = set(action.option_strings) - {"-h", "--help"}
            assert not options or any(f'"{option}"' in source for option in options), options


# ---- plan --------------------------------------------------------------------------------


@pytest.mark.slow
def test_plan_needs_configurations_only(
    models: tuple[str, str], tmp_path: Path, output: Output
) -> None:
    for name, folder in zip(("anchor", "augmenting"), models, strict=True):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(Path(folder) / "config.json", tmp_path / name)
    line = ["plan", "--anchor", str(tmp_path / "anchor")]
    line += ["--augmenting", str(tmp_path / "augmenting"), "--batch-size", "2", "--length", "16"]
    line += ["--context", "16", "--requests", "3", "--checkpointing", "--tflops", "1e-3"]
    line += ["--link", "0.01", "--devices"]
    shown = output.of(*line, "2x1GB")
    for words in ("training, sharded over 2", "fits into 1 GB", "caches of 3 contexts"):
        assert words in shown
    assert "sustains 0.001 TFLOP/s and receives 0.01 GB/s" in shown
    assert "NO" not in shown
    shown = output.of(*line, "2x0.00001GB", status=1)
    assert shown.count("NO") == 3
    assert "warning: training, whole copies does not fit, by " in shown
    assert "devices is 'many'" in output.of(*line, "many", status=2)


# ---- evaluate ----------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    return write_tasks(tmp_path / "tasks")


def test_evaluate_shows_the_parts_side_by_side(
    opened: str, models: tuple[str, str], tasks: str, tmp_path: Path, output: Output
) -> None:
    words = ["evaluate", opened, "--tasks", "tiny_choice,tiny_text", "--include-path", tasks]
    words += ["--batch-size", "2", "--limit", "3", "--num-fewshot", "1", "--seed", "5"]
    words += ["--use-cache", str(tmp_path / "answers"), "--output", str(tmp_path / "out")]
    words += ["--device", "cpu", "--dtype", "float32", "--apply-chat-template"]
    shown = output.of(*words)
    names = ("composed", "anchor", "code")
    heading = next(line for line in shown.splitlines() if line.startswith("task"))
    assert heading.split() == ["task", "metric", "filter", "n-shot", *names]
    results = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    values = [results[name]["results"]["tiny_choice"]["acc,none"] for name in names]
    line = next(line for line in shown.splitlines() if line.startswith("tiny_choice  acc "))
    assert [word.strip("*") for word in line.split()[3::3]] == [f"{v:.4f}" for v in values]
    bits = [results[name]["results"]["tiny_text"]["bits_per_byte,none"] for name in names]
    assert f"{min(bits):.4f}*" in shown  # the lower the better
    assert shown.endswith(f"Results and samples: {tmp_path / 'out'}\n")
    assert main(words) == 0
    again = output.capsys.readouterr()
    assert again.out == shown
    assert again.err == "".join(f"{name}: finished before\n" for name in names)
    message = "holds results for seed 5, not None; choose another output folder"
    assert message in output.of(*(w for w in words if w not in ("--seed", "5")), status=2)


def test_evaluate_one_part(opened: str, tasks: str, output: Output) -> None:
    words = ["evaluate", opened, "--tasks", "tiny_answer", "--include-path", tasks]
    shown = output.of(*words, "--parts", "code,anchor", "--batch-size", "auto", "--verbose")
    heading = next(line for line in shown.splitlines() if line.startswith("task"))
    assert heading.split()[-2:] == ["code", "anchor"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "--batch-size is '0', but must be a positive whole number or auto"),
        (["--parts", "ancor"], "part is 'ancor', but must be one of composed, anchor, code"),
        (["--include-path", "nowhere"], "include_path is 'nowhere', but there is no such folder"),
    ],
)
def test_evaluate_refuses(words: list[str], message: str, opened: str, output: Output) -> None:
    pytest.importorskip("lm_eval")
    assert message in output.of("evaluate", opened, "--tasks", "tiny_choice", *words, status=2)


# ---- compose and inspect -----------------------------------------------------------------


def test_compose_writes_a_folder_that_loads(
    models: tuple[str, str], tmp_path: Path, output: Output
) -> None:
    anchor, augmenting = models
    folder = str(tmp_path / "composed")
    shown = output.of(
        *("compose", "--anchor", anchor, "--augmenting", augmenting, "--output", folder),
        *("--every", "2", "--seed", "3", "--num-heads", "2", "--width", "12", "--gate", "--bias"),
        *("--variant", "paper", "--position", "rotary", "--reads", "prompt"),
        *("--alignment", "identity", "--distance-unit", "tokens"),
        *("--bridge-dtype", "bfloat16", "--dtype", "bfloat16", "--trust-remote-code"),
    )
    assert "augmenting                 1             3  identity       1" in shown
    assert "position rotary, norm no, gate yes, bias yes; reads prompt." in shown
    assert shown.endswith(f"saved in {folder}\n")
    model = ComposedForCausalLM.from_pretrained(folder)
    assert (
        sum(p.numel() for p in model.bridges.parameters())
        == 16 * 24 + 24 + 3 * (24 * 12 + 12) + (12 * 24 + 24) + 1
    )
    assert {p.dtype for p in model.bridges.parameters()} == {torch.bfloat16}
    assert (Path(folder) / "tokenizer.json").is_file()


def test_compose_with_given_connections(
    models: tuple[str, str], tmp_path: Path, output: Output
) -> None:
    words = ["compose", "--anchor", models[0], "--output", str(tmp_path / "c")]
    words += ["--augmenting", f"code={models[1]}", "--augmenting", f"sw={models[1]}"]
    words += ["--connect", "code:0-1", "--connect", "sw:2-3", "--device-map", "cpu"]
    assert "code                       0             1  identity       1" in output.of(*words)
    message = "every is 3 and connections lists 2, but only one"
    assert message in output.of(*words, "--every", "3", status=2)


@pytest.mark.parametrize(
    ("augmenting", "message"),
    [
        (["a", "b"], "--augmenting 'a' has no name; several need NAME=MODEL each"),
        (["a=x", "a=y"], "--augmenting names two models 'a'"),
        (["a="], "--augmenting 'a=' has no name; several need NAME=MODEL each"),
        (
            ["/no/where"],
            "augmenting model 'augmenting' is '/no/where', but there is no such folder",
        ),
    ],
)
def test_compose_refuses(
    augmenting: list[str], message: str, models: tuple[str, str], tmp_path: Path, output: Output
) -> None:
    words = [word for model in augmenting for word in ("--augmenting", model)]
    words = ["compose", "--anchor", models[0], *words, "--output", str(tmp_path / "c")]
    assert message in output.of(*words, status=2)


def test_compose_replaces_no_trained_bridges(
    opened: str, models: tuple[str, str], tmp_path: Path, output: Output
) -> None:
    words = ["compose", "--anchor", models[0], "--augmenting", models[1], "--output"]
    message = f"{opened} holds trained bridges, which fresh ones would replace; choose another"
    assert message in output.of(*words, opened, status=2)
    output.of(*words, str(tmp_path / "fresh"))
    output.of(*words, str(tmp_path / "fresh"))  # nothing is lost


@pytest.mark.parametrize("command", ["compose", "train"])
def test_no_base_model_is_replaced(
    command: str, models: tuple[str, str], tmp_path: Path, output: Output
) -> None:
    base = shutil.copytree(models[0], tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    words = [command, "--anchor", models[0], "--augmenting", models[1]]
    write_lines(tmp_path / "data.jsonl", [{"text": "some text"}])
    if command == "train":
        words += ["--data", str(tmp_path / "data.jsonl")]
    message = f"{base} holds a model of type 'llama', which bridges would replace; choose another"
    assert message in output.of(*words, "--output", str(base), status=2)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_generate_compares_chats_in_each_model_s_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = compose_pair()
    ours, theirs = model.processor.tokenizer, model.processor.augmenting_tokenizers["augmenting"]
    for tokenizer, mark in ((ours, "The"), (theirs, "There")):
        template = f"{mark} {{{{ messages[0]['content'] }}}}"
        monkeypatch.setattr(tokenizer, "chat_template", template)
    prompts = []

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        prompts.append(input_ids)
        return input_ids

    for part in (model, model.augmenting["augmenting"]):
        monkeypatch.setattr(part, "generate", generate)
    compare(model, ours, "was", {}, chat=True, seed=0)
    said = [ours.decode(prompts[0][0]), theirs.decode(prompts[1][0]), ours.decode(prompts[2][0])]
    assert [text.strip() for text in said] == ["The was", "There was", "The was"]


def test_inspect_needs_no_base_model(
    opened: str, models: tuple[str, str], tmp_path: Path, output: Output
) -> None:
    shown = output.of("inspect", opened)
    bridge = 16 * 24 + 4 * 24 * 24 + 24 + 16
    line = next(line for line in shown.splitlines() if line.startswith("bridges"))
    assert line.split() == ["bridges", f"{bridge:,}", f"{bridge:,}", "10.9", "kB"]
    assert "W^O, all bridges            576        576" in shown
    assert "All of this is from config.json: no weight was read." in shown
    assert models[1] in shown
    bigger = output.of("inspect", opened, "--batch-size", "16", "--length", "1024")
    rough = [line for line in shown.splitlines() if line.startswith("activations")]
    assert rough != [line for line in bigger.splitlines() if line.startswith("activations")]

    elsewhere = tmp_path / "moved"
    shutil.copytree(opened, elsewhere)
    config = json.loads((elsewhere / "config.json").read_text())
    config["bases"]["anchor"]["name_or_path"] = "/no/where"
    config["bases"]["code"]["name_or_path"] = None
    (elsewhere / "config.json").write_text(json.dumps(config))
    (elsewhere / "model.safetensors").unlink()
    lines = output.of("inspect", str(elsewhere)).splitlines()
    assert next(line for line in lines if line.startswith("anchor")).split()[-2:] == [
        "/no/where",
        "no",
    ]
    assert any(line.rstrip().endswith("a loaded model  must be given") for line in lines)
    config["bases"]["code"]["name_or_path"] = "some/model"
    (elsewhere / "config.json").write_text(json.dumps(config))
    assert "not downloaded" in output.of("inspect", str(elsewhere))


# ---- generate ----------------------------------------------------------------------------


def expected_text(folder: str, prompt: str, anchor_only: bool = False) -> str:
    model = ComposedForCausalLM.from_pretrained(folder)
    tokenizer = character_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    length = ids.shape[1]
    for _ in range(6):
        with torch.no_grad():
            logits = (model.anchor if anchor_only else model)(ids).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[0, length:], skip_special_tokens=True))


def test_generate_streams_the_greedy_continuation(opened: str, output: Output) -> None:
    shown = output.of("generate", opened, "1+2=", "--max-new-tokens", "6")
    assert shown == expected_text(opened, "1+2=") + "\n"
    assert shown != expected_text(opened, "1+2=", anchor_only=True) + "\n"
    off = output.of("generate", opened, "1+2=", "--max-new-tokens", "6", "--scale", "code=0")
    assert off == expected_text(opened, "1+2=", anchor_only=True) + "\n"


def test_generate_reads_stdin(opened: str, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2=\n"))
    shown = output.of("generate", opened, "--max-new-tokens", "6")
    assert shown == expected_text(opened, "1+2=") + "\n"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    message = "there is no prompt; write it behind the folder, or pipe it in"
    assert message in output.of("generate", opened, status=2)


def test_generate_compares(opened: str, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("generate", opened, "1+2=", "--compare", "--max-new-tokens", "6")
    shown = output.of(*words)
    sections = {
        part.split(" ==\n")[0]: part.split(" ==\n")[1].removesuffix("\n\n")
        for part in shown.removeprefix("== ").split("== ")
        if " ==\n" in part
    }
    assert list(sections) == ["anchor", "code", "composed"]
    assert sections["anchor"] == expected_text(opened, "1+2=", anchor_only=True)
    assert sections["composed"] == expected_text(opened, "1+2=")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = output.of(*words)
    assert "─ anchor ─" in shown
    assert "─ composed ─" in shown


def test_generate_samples_by_seed(opened: str, output: Output) -> None:
    words = ("generate", opened, "1+2=", "--max-new-tokens", "12")
    hot = (*words, "--temperature", "5", "--top-p", "0.99", "--top-k", "50")
    greedy, one = output.of(*words), output.of(*hot, "--seed", "1")
    assert one == output.of(*hot, "--seed", "1")
    assert one != output.of(*hot, "--seed", "2")
    assert one != greedy


def test_generate_writes_a_users_turn(opened: str, output: Output, tmp_path: Path) -> None:
    shown = output.of("generate", opened, "hi", "--chat", "--max-new-tokens", "6")
    assert shown == expected_text(opened, "<|user|>hi<|end|><|assistant|>") + "\n"
    folder = tmp_path / "plain"
    shutil.copytree(opened, folder)
    character_tokenizer(chat_template=None).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    message = "--chat needs a chat template, but the tokenizer has none"
    assert message in output.of("generate", str(folder), "hi", "--chat", status=2)


def test_generate_with_models_from_elsewhere(
    opened: str, models: tuple[str, str], output: Output, tmp_path: Path
) -> None:
    copies = [str(shutil.copytree(model, tmp_path / Path(model).name)) for model in models]
    words = ["generate", opened, "1+2=", "--max-new-tokens", "6"]
    words += ["--anchor", copies[0], "--augmenting", f"code={copies[1]}", "--dtype", "float32"]
    assert output.of(*words) == expected_text(opened, "1+2=") + "\n"
    words[-3] = f"code={save_model(tmp_path / 'other', seed=9)}"
    assert "augmenting model 'code' is not the model this checkpoint" in output.of(*words, status=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--scale", "code"], "--scale is 'code', but must be NAME=NUMBER, such as code=0.5"),
        (["x", "--scale", "sw=1"], "there is no augmenting model 'sw', only 'code'"),
        ([""], "the prompt is empty, so there is nothing to continue"),
    ],
)
def test_generate_refuses(opened: str, words: list[str], message: str, output: Output) -> None:
    assert message in output.of("generate", opened, *words, status=2)


def test_generate_needs_a_tokenizer(opened: str, output: Output, tmp_path: Path) -> None:
    folder, anchor = tmp_path / "folder", tmp_path / "anchor"
    shutil.copytree(opened, folder)
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(config["bases"]["anchor"]["name_or_path"], anchor)
    for place in (folder, anchor):
        for path in place.glob("*token*"):
            path.unlink()
    message = f"there is no tokenizer in {folder} nor beside the anchor"
    words = ("generate", str(folder), "x", "--anchor", str(anchor))
    assert message in output.of(*words, status=2)


# ---- playground --------------------------------------------------------------------------


@pytest.mark.slow
def test_playground_serves_until_it_is_interrupted(opened: str) -> None:
    """In a process of its own, because Gradio leaves sockets behind."""
    import signal
    import urllib.request

    port = free_port("127.0.0.1", range(8060, 8160))
    words = ["--host", "127.0.0.1", "--port", str(port), "--open"]
    words += ["--max-characters", "70", "--max-new-tokens", "9"]
    running = subprocess.Popen(
        [sys.executable, "-m", "graftlm", "playground", opened, *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"BROWSER": "echo opened %s"},
    )
    assert running.stdout is not None
    address = f"http://127.0.0.1:{port}"
    try:
        assert running.stdout.readline() == f"{opened} is at {address} (Ctrl-C ends it)\n"
        assert running.stdout.readline() == f"opened {address}\n"
        with urllib.request.urlopen(address) as answer:
            assert "up to 70 characters" in answer.read().decode()
        running.send_signal(signal.SIGINT)
        shown, _ = running.communicate(timeout=60)
    finally:
        running.kill()
        running.communicate()
    assert shown == "\nthe playground has ended\n"
    assert running.returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-characters", "0"], "max_characters is 0, but must be a positive whole number"),
        (["--max-new-tokens", "-1"], "max_new_tokens is -1, but must be a positive whole number"),
        (["--port", "70000"], "--port is 70000, but must be from 1 to 65535"),
        (["--port", "0"], "--port is 0, but must be from 1 to 65535"),
        (["--host", "::1"], "--host is '::1', but must be a name or an IPv4 address, such as 127"),
        (["--host", "203.0.113.9"], "--host 203.0.113.9 has no free --port from 7860 to 7959: "),
    ],
)
def test_playground_refuses(words: list[str], message: str, opened: str, output: Output) -> None:
    assert message in output.of("playground", opened, *words, status=2)


def test_a_playground_needs_a_free_port_and_gradio(
    opened: str, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        shown = output.of("playground", opened, "--port", str(port), status=2)
        assert (
            f"--host 127.0.0.1 has no free --port from {port} to {port}: Address already" in shown
        )
        assert free_port("127.0.0.1", range(port, port + 40)) > port
    monkeypatch.setitem(sys.modules, "gradio", None)
    shown = output.of("playground", opened, status=2)
    words = "the playground needs the gradio package, which is missing; pip install 'graftlm[playg"
    assert words in shown


def test_who_can_reach_a_playground() -> None:
    hosts = ("127.0.0.1", "localhost", "0.0.0.0", "192.0.2.7", "example.org")
    assert list(map(is_loopback, hosts)) == [True, True, False, False, False]


# ---- verify ------------------------------------------------------------------------------


def test_verify_tells_by_its_status(
    opened: str, models: tuple[str, str], output: Output, tmp_path: Path
) -> None:
    shown = output.of("verify", opened, "--seed", "4")
    assert "no look into the future" in shown
    assert " hold\n" in shown
    assert "--dtype" not in shown
    shown = output.of("verify", opened, "--dtype", "bfloat16")
    assert "In bfloat16 much is allowed for rounding; --dtype float32 looks 65,536 times" in shown
    other = save_model(tmp_path / "other", seed=9)
    shown = output.of("verify", opened, "--anchor", other, status=1)
    line = next(line for line in shown.splitlines() if line.startswith("anchor: same weights"))
    assert line.split()[3] == "NO"
    assert shown.rstrip().endswith("failed")


# ---- train -------------------------------------------------------------------------------


def test_train_by_flags(models: tuple[str, str], data: str, tmp_path: Path, output: Output) -> None:
    folder = str(tmp_path / "out")
    shown = output.of(
        *("train", "--anchor", models[0], "--augmenting", models[1], "--data", data),
        *("--output", folder, "--eval-fraction", "0.25", "--max-length", "40", "--seed", "3"),
        *("--no-completions-only", "--tokenizer", models[0], "--learning_rate=0.01", *QUICK),
        *("--probe", "1+1=", "--probe", "2+3=", "--probe-tokens", "4", "--report_to", "none"),
    )
    assert "W^O, all bridges" in shown
    assert "Memory for training, estimated" in shown
    tokens = sum(len(row["prompt"] + row["completion"]) + 1 for row in sums(12))
    line = r"Data: 9 examples, (\d+) tokens, (\d+) of them with a loss; at most 40"
    found = re.search(line, shown)
    assert found is not None
    assert int(found[1]) < tokens  # three more are held out
    assert int(found[2]) == int(found[1]) - 9
    assert "; 3 to evaluate" in shown
    assert "step 2/2  loss" in shown
    assert shown.count("step 2/2  probe '1+1='\n  | ") == 1
    assert "2 steps done: " in shown
    assert shown.endswith(f"saved in {folder}\n")
    recipe = Recipe.from_mapping(json.loads(Path(folder, "training.json").read_text())["recipe"])
    assert (recipe.completions_only, recipe.tokenizer, recipe.seed) == (False, models[0], 3)
    assert (recipe.probe, recipe.probe_tokens) == (("1+1=", "2+3="), 4)
    assert recipe.training == {
        "learning_rate": 0.01,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
    }


def test_options_go_over_the_recipe(
    models: tuple[str, str], data: str, tmp_path: Path, output: Output
) -> None:
    values = {
        "anchor": "nowhere",
        "augmenting": {"code": models[1]},
        "data": data,
        "eval_fraction": 0.5,
        "output_dir": str(tmp_path / "out"),
        "connections": ["code:0-0"],
        "training": {"max_steps": 7, "learning_rate": 0.5},
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values))
    shown = output.of(
        *("train", str(path), "--anchor", models[0], "--every", "3", "--eval-data", data),
        *("--completions-only", *QUICK),
    )
    assert "code                       2             3  identity       1" in shown
    assert "; 12 to evaluate" in shown
    record = json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]
    assert record["training"]["learning_rate"] == 0.5
    assert record["training"]["max_steps"] == 2
    assert "eval_fraction" not in record


def test_cache_computes_once_what_train_reads(
    models: tuple[str, str], data: str, tmp_path: Path, output: Output
) -> None:
    pair = ["--anchor", models[0], "--augmenting", models[1], "--data", data]
    words = [*pair, "--output", str(tmp_path / "out"), "--every", "2", *QUICK]
    states = [*words, "--states-cache", str(tmp_path / "states"), "--states-dtype", "bfloat16"]
    assert "states_cache is not set; name a folder" in output.of("cache", *words, status=2)
    assert "Hidden states: " in output.of("cache", *states, "--dry-run")
    assert not (tmp_path / "states").exists()
    assert "graftlm train reads them with the same recipe" in output.of("cache", *states)
    (part,) = (tmp_path / "states" / "training").glob("*.safetensors")
    before = part.stat().st_mtime_ns
    assert "2 steps done: " in output.of("train", *states)
    assert part.stat().st_mtime_ns == before
    other = [*states, "--states-dtype", "float32", "--output", str(tmp_path / "other")]
    assert "something else: the precision changed" in output.of("train", *other, status=2)


def test_train_resumes(models: tuple[str, str], data: str, tmp_path: Path, output: Output) -> None:
    words = ["train", "--anchor", models[0], "--augmenting", models[1], "--data", data]
    words += ["--output", str(tmp_path / "out"), "--max_steps", "2", "--save_steps", "1"]
    output.of(*words)
    assert "already holds checkpoint-2; pass --resume" in output.of(*words, status=2)
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-2'}\n" in output.of(*words, "--resume")


def test_an_interrupted_training_says_how_to_go_on(
    models: tuple[str, str],
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import signal

    from transformers import TrainerCallback, trainer

    class Stop(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Stop()])
    words = ["train", "--anchor", models[0], "--augmenting", models[1], "--data", data]
    words += ["--output", str(tmp_path / "out"), "--max_steps", "5"]
    assert main(words) == 130
    shown = capsys.readouterr().out
    assert f"stopped at step 1; checkpoint in {tmp_path / 'out' / 'checkpoint-1'}\n" in shown
    assert shown.endswith(f"continue with: graftlm {' '.join(words)} --resume\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_stps", "3"], "unknown option '--max_stps', did you mean '--max_steps'?"),
        (["--max_steps", "many"], "option --max_steps/--max-steps: invalid int value: 'many'"),
        (["one.yaml", "two.yaml"], "there is one RECIPE at most, not 'one.yaml' and 'two.yaml'"),
        (["--anchor", "a"], "the command has no 'augmenting', 'data', 'output_dir'; every recipe"),
        (["none.yaml"], "No such file or directory: 'none.yaml'"),
        (["--reads", "prompt", "--seed", "1", "--bf16"], "the command has no 'anchor'"),
    ],
)
def test_train_refuses_before_it_loads(words: list[str], message: str, output: Output) -> None:
    assert message in output.of("train", *words, status=2)


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(
    models: tuple[str, str], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--anchor", models[0], "--augmenting", models[1], "--data", data]
    words += ["--output", str(tmp_path / "out"), "--max-length", "6", *QUICK]
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert f"graftlm: warning: 7 of 12 examples of {data} are longer than max_length 6" in lines[0]


def test_the_example_recipe_runs(
    models: tuple[str, str], tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    shown = output.of(
        *("train", "examples/train.yaml", "--anchor", models[0], "--max-length", "96"),
        *("--augmenting", f"specialist={models[1]}", "--output", str(tmp_path / "out"), *QUICK),
    )
    assert "Data: 6 examples" in shown
    assert "2 to evaluate" in shown


# ---- reproduce ---------------------------------------------------------------------------


def test_reproduce_hands_its_options_over(monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    seen: dict[str, Any] = {}

    def run(experiment: Any, **options: Any) -> None:
        seen.update(options, experiment=experiment)

    monkeypatch.setattr("graftlm.reproduce.run.run", run)
    line = ["reproduce", "kv-arithmetic", "--preset", "quick", "--dc", "subs", "--examples", "64"]
    line += ["--systems", "main", "lora:3", "--seeds", "2", "--jobs", "2", "--output", "there"]
    output.of(*line, "--device", "cpu", "--no-plots")
    assert seen["experiment"].training.examples == 64
    assert seen["experiment"].changes == {"preset": "quick", "dc": "subs"}
    systems = dict(seen["systems"])
    assert (systems["composed"], systems["lora"]) == (2, 3)
    assert "gate" not in systems
    assert (seen["jobs"], seen["output"], seen["device"]) == (2, "there", "cpu")
    assert not seen["plots"]
    assert not seen["run_code"]
    assert seen["command"] == (
        "graftlm reproduce kv-arithmetic --preset quick --systems main lora:3 --seeds 2 "
        "--examples 64 --jobs 2 --output there --device cpu --no-plots --dc subs"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--examples", "0"], "examples must be at least 1, got 0"),
        (["--systems", "lora:x"], "--systems lora:x: 'x' is not a number of seeds"),
        (["--systems", "nonsense"], "system 'nonsense' is none of"),
    ],
)
def test_reproduce_refuses_in_one_line(words: list[str], message: str, output: Output) -> None:
    line = ["reproduce", "kv-arithmetic", "--preset", "quick"]
    assert message in output.of(*line, *words, status=2)
