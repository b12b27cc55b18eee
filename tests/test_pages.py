"""Every block of the documents is run, or read by what would run it; links lead somewhere."""

import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import graftlm
from pages import (
    COMMANDS,
    DATA,
    OUTPUT,
    PAGES,
    ROOT,
    anchors,
    blocks,
    check_data,
    commands,
    is_run,
    links,
    prepare,
    quiet_environment,
    run_page,
    understand,
)

slow = pytest.mark.slow
# Pages whose Python runs in a second or two, without the commands.
QUICK = ["README.md", "docs/concepts.md", "docs/index.md", "docs/tokenizers.md"]
# What a reader sees on some pages, as regular expressions.
SEEN = {
    "README.md": [r"tensor\(\[\["],
    "docs/tokenizers.md": [r"\{'specialist': 'committed'\}", "The quick brown fox"],
    "docs/evaluation.md": [r"(?m)^anchor [01]\.\d", r"'alias': 'tiny_choice'"],
    "docs/quickstart.md": [
        r"== composed ==\n\(20\+5\)->25\n",
        r"(?m)^\['\(20\+5\)->25'\]$",
        r"(?m)^(3[6-9]|4)\d+ of 500 sums",
        "all .* hold",
    ],
    "docs/own-pair.md": [r"its own text: +\d", r"another's states: \d", "all .* hold"],
    "docs/training.md": [r"'train_loss': '?\d"],
    "docs/several-models.md": [r"\{'code': 0.5, 'law': 0.0\}", r"\[False, True, True\]"],
}
# Warnings that a page speaks of.
WARNED = {"docs/quantized.md": "trained on bitsandbytes nf4 weights"}
ALL = [block for page in PAGES for block in blocks(page)]
ALL_COMMANDS = [
    pytest.param(words, id=f"{block.place}:{' '.join(words)[:50]}")
    for block in ALL
    if block.language in COMMANDS
    for words in commands(block)
]


def runs_something(page: str) -> bool:
    """Whether a page has Python, or a command that is run."""
    return any(
        block.language == "python"
        or (block.language in COMMANDS and any(map(is_run, commands(block))))
        for block in blocks(page)
    )


# ---- blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.place)
def test_every_block_is_of_a_kind_that_is_tested(block):
    assert block.language in ("python", OUTPUT, *COMMANDS, *DATA)


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_every_command_is_understood(words):
    understand(words)


@pytest.mark.parametrize(
    "block", [b for b in ALL if b.language in DATA], ids=lambda block: block.place
)
def test_data_and_recipes_are_understood(block, tmp_path):
    check_data(block, tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("graftlm compose --anchor A --augmenting B --outptu C", "exit"),
        ("graftlm train recipe.yaml --learning_rat 1e-4", "unknown option '--learning_rat'"),
        ("make modles", "modles"),
        ("make models CODR=1", "CODR=1"),
        ("pip install 'graftlm[evaluation]'", "evaluation"),
        ("python -m graftlm.reproduce.models", "graftlm.reproduce.models"),
        ("rm -rf models", "no test knows how to check rm -rf models"),
    ],
)
def test_a_wrong_command_is_found(command, message, capsys):
    with pytest.raises((AssertionError, SystemExit, ValueError)) as error:
        understand(shlex.split(command))
    assert message in str(error.value) or error.type is SystemExit


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    prepare(folder)
    return folder


@pytest.fixture
def workplace(
    request: pytest.FixtureRequest,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A copy of what is prepared, as the current folder; of the quickstart, an empty one."""
    if request.node.callspec.params["page"] != "docs/quickstart.md":
        subprocess.run(["cp", "-r", f"{prepared}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_seen(page: str, printed: str, patterns: list[str] | None = None) -> None:
    for pattern in SEEN.get(page, []) if patterns is None else patterns:
        assert re.search(pattern, printed), pattern


@pytest.mark.parametrize("page", QUICK)
def test_python_of_a_page_runs(page, workplace, capsys):
    run_page(page, with_commands=False)
    check_seen(page, capsys.readouterr().out)


@slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # Trainer's, without a GPU
@pytest.mark.parametrize("page", [page for page in PAGES if runs_something(page)])
def test_a_page_runs(page, workplace, capfd, monkeypatch):
    """All Python, and all commands that need neither the hub nor hours."""
    if page == "docs/evaluation.md":
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    with pytest.warns(UserWarning, match=WARNED[page]) if page in WARNED else nullcontext():
        run_page(page, with_commands=True)
    check_seen(page, capfd.readouterr().out)


def test_the_quickstart_shows_the_data_it_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = blocks("docs/quickstart.md")
    (script,) = (block for block in page if block.title == "prepare.py")
    (shown,) = (block for block in page if block.language == "json")
    exec(compile(script.text, script.place, "exec"), {})
    assert Path("data.jsonl").read_text().startswith(shown.text)


def test_pages_that_show_what_to_expect_exist():
    assert set(SEEN) | set(QUICK) <= set(PAGES)


# ---- links and names ---------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, "docs/cli.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {path}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {path}#{anchor}"


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in graftlm.__all__:
        home: Any = getattr(graftlm, name)
        written = f"graftlm.{name}" if name == "__version__" else f"{home.__module__}.{name}\n"
        assert written in page, name


# ---- the site ----------------------------------------------------------------------------


@slow
def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path):
    """What a page loads by itself comes from the site; links that a reader follows may leave it."""
    words = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=quiet_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for path in pages:
        loaded = re.findall(r'<(?:script|img|source)[^>]*src="?(https?:[^"\s>]*)', path.read_text())
        styles = re.findall(r'<link[^>]*rel="?stylesheet"?[^>]*', path.read_text())
        assert not loaded, path
        assert not [style for style in styles if "http" in style], path
