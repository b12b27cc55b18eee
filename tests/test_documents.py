"""The documents are complete: every message of the library is explained."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from families import tiny, tiny_llama
from graftlm import compose
from lm_tasks import write_tasks
from two_tokenizers import byte_tokenizer, word_tokenizer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "graftlm"


def literal_parts(node: ast.expr) -> list[str]:
    """The fixed pieces of a message."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts, current = [], ""
        for value in node.values:
            if isinstance(value, ast.Constant):
                current += str(value.value)
            else:
                parts, current = [*parts, current], ""
        return [*parts, current]
    return []


def messages() -> list[tuple[str, str]]:
    """Each raise of the library with the longest fixed piece of its message."""
    found = []
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                longest = max(literal_parts(node.exc.args[0]), key=len, default="")
                if longest and path.name != "__init__.py":
                    found.append((f"{path.name}:{node.lineno}", longest))
    return found


@pytest.mark.parametrize(("place", "piece"), messages())
def test_every_message_is_explained(place, piece):
    """docs/errors.md quotes the start of the longest fixed piece of each message."""
    page = (ROOT / "docs" / "errors.md").read_text()
    words = piece.strip(" ,:;(")
    start = words[: min(len(words), 25)]
    assert start in page, f"{place}: docs/errors.md does not explain {piece!r}"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two models, each with its tokenizer, as the guide has them."""
    models = {
        "anchor": (tiny("llama", 1, vocab_size=320), byte_tokenizer()),
        "specialist": (tiny_llama(vocab_size=len(word_tokenizer())), word_tokenizer()),
    }
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_guide_to_different_tokenizers_runs(folders, capsys):
    page = (ROOT / "docs" / "tokenizers.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "docs/tokenizers.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "{'specialist': 'committed'}" in printed
    assert "The quick brown fox" in printed


def test_the_guide_to_reading_pictures_runs(folders, capsys):
    compose("anchor", "specialist", every=1).save_pretrained("composed")
    page = (ROOT / "docs" / "reading-pictures.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "docs/reading-pictures.md", "exec"), {})
    assert "anchor_layer=0) (4, 7, 7) 0.0" in capsys.readouterr().out  # fresh bridges do nothing
    assert (folders / "head_2.png").exists()
    assert '"1", "+", "2", "="' in (folders / "seen.html").read_text(encoding="utf-8")


@pytest.fixture
def evaluated(folders):
    """A composed folder and tasks beside the models, as the guide to evaluation has them."""
    pytest.importorskip("lm_eval")
    compose("anchor", "specialist", every=1).save_pretrained("composed")
    write_tasks(folders / "tasks")
    return (ROOT / "docs" / "evaluation.md").read_text()


def test_the_guide_to_evaluation_runs(evaluated, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    blocks = re.findall(r"```python\n(.*?)```", evaluated, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/evaluation.md", "exec"), {})
    printed = capsys.readouterr().out
    for part in ("composed", "anchor", "augmenting"):
        assert re.search(rf"^{part} [01]\.\d", printed, flags=re.MULTILINE)
    assert printed.count("'alias': 'tiny_choice'") == 2


@pytest.mark.slow
def test_the_command_in_the_guide_to_evaluation_runs(evaluated):
    (line,) = re.findall(r"```\npython (-m graftlm.lm_eval .*)\n```", evaluated)
    words = [sys.executable, *line.split(), "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "|tiny_choice|" in done.stdout


def test_the_picture_of_tokens_is_drawn(folders):
    script = ROOT / "examples" / "see_tokens.py"
    words = ["anchor", "specialist", "The fox.\nIt", "--output", "seen.png"]
    subprocess.run([sys.executable, str(script), *words], check=True)
    assert (folders / "seen.png").read_bytes().startswith(b"\x89PNG")
