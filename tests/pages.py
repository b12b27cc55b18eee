"""The pages of the documents: their blocks, their commands, and a folder in which these run.

A block is Python, a file (its title names it), data, output or commands; there is no other kind.
Python and commands run in the order of the page, in one namespace and one folder, where `anchor`,
`specialist` and the other names the pages use are tiny models.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from families import tiny_llama
from graftlm import compose
from graftlm.cli import build_parser, main
from graftlm.cli.train import take_rest
from graftlm.recipe import Recipe, read_yaml
from lm_tasks import write_tasks
from two_tokenizers import byte_tokenizer, word_tokenizer

ROOT = Path(__file__).parent.parent
# docs/cli.md is what the parser prints; tests/test_cli.py compares it.
PAGES = [
    *("README.md", "CONTRIBUTING.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "cli.md"),
]
COMMANDS = ("", "bash")  # languages of blocks that hold commands; an indented block has none
OUTPUT = "text"
DATA = ("json", "yaml")
# What the pages call models that stand for the reader's.
ANCHORS = ("anchor", "ANCHOR", "BIG", "my/anchor")
OTHERS = ("specialist", "SPECIALIST", "AUGMENTING", "SMALL", "my/specialist", "coder", "lawyer")
# Commands that are understood, but not run: beginning, why.
NOT_RUN = {
    r"make |python -m benchmarks|.*\breproduce\b": "hours, or run by tests of their own",
    r"pip |python3.11 -m venv|peers/": "they install",
    r"tensorboard ": "a server: tests/test_watching.py",
    r"graftlm playground": "a server: tests/test_playground_page.py",
    r"accelerate ": "several processes: tests/test_distributed.py",
    r"lm_eval |.*gsm8k": "data of the hub; lm-eval is run by tests/test_harness.py",
    r".*\.gguf": "real models: tests/test_real_models.py",
    r".*benchmarks/shapes|python benchmarks/lag.py": "minutes; the numbers are those of the page",
    r"python -m graftlm.cli.help": "tests/test_cli.py",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One block of a page, fenced or indented.

    Args:
        title: The file that a reader makes of it, or "".
    """

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """All blocks of a page in order."""
    found = []
    for token in MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language, _, rest = token.info.strip().partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            found.append(
                Block(
                    page=page,
                    line=token.map[0] + 1,
                    language=language,
                    title=title.group(1) if title else "",
                    text=token.content,
                )
            )
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block."""
    found: list[list[str]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";")
        lexer.whitespace_split = True
        found.append([])
        for word in lexer:
            if word == ";":
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]


# ---- understanding -----------------------------------------------------------------------


def understand(words: list[str]) -> None:
    """Refuse a command that its program would refuse: a wrong verb, option, target or extra."""
    match words:
        case ["graftlm", *rest]:
            understand_graftlm(rest)
        case ["accelerate", "launch", *rest]:
            understand_graftlm(rest[rest.index("-m") + 2 :])
        case ["lm_eval", *rest] | ["python", "-m", "graftlm.lm_eval", *rest]:
            harness = importlib.import_module("lm_eval._cli.harness").HarnessCLI()
            harness._parser.parse_args(["run", *rest])
        case ["python", "-m", "benchmarks", *rest]:
            asked = importlib.import_module("benchmarks.__main__").parse(rest)
            sections = importlib.import_module("benchmarks.__main__").SECTIONS
            assert set(filter(None, asked.only.split(","))) <= set(sections)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), module
        case ["python", script, *_]:
            assert script == "prepare.py" or (ROOT / script).is_file(), script
        case ["make", *rest]:
            makefile = (ROOT / "Makefile").read_text()
            for word in rest:
                name, is_variable, _ = word.partition("=")
                pattern = rf"\$\({name}\)" if is_variable else rf"^{name}:"
                assert re.search(pattern, makefile, re.MULTILINE), word
        case ["pip", "install", "."]:
            pass
        case ["pip", "install", name]:
            extra = re.fullmatch(r"(?:graftlm|\.)\[(\w+)\]", name)
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert extra, name
            assert extra[1] in project["optional-dependencies"], name
        case ["tensorboard", "--logdir", _]:
            pass
        case ["python3.11", "-m", "venv", "peers"] | ["peers/bin/pip", "install", *_]:
            pass
        case _:
            raise AssertionError(f"no test knows how to check {shlex.join(words)}")


def understand_graftlm(words: list[str]) -> None:
    """As `graftlm.cli.main` reads them, without running the verb."""
    verb = next(word for word in words if not word.startswith("-"))
    args, rest = build_parser(verb).parse_known_args(words)
    if args.verb in ("train", "cache"):
        recipe, _ = take_rest(rest)
        assert recipe in (None, "recipe.yaml", "examples/train.yaml")
    else:
        assert not rest, rest


def check_data(block: Block, folder: Path) -> None:
    """Refuse rows that are not JSON, and recipes with unknown keys or values."""
    if block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
        return
    path = folder / "block.yaml"
    path.write_text(block.text, encoding="utf-8")
    needed = {"anchor": "a", "augmenting": "b", "data": "c", "output_dir": "d"}
    Recipe.from_mapping(needed | read_yaml(path), block.place)


# ---- running -----------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Tiny models under all names, a composition of two, tasks, data and a recipe.

    The anchor's tokens are bytes and their pairs, the others' are words and their pieces.
    """
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    for seed, names in enumerate((ANCHORS, OTHERS), start=1):
        tokenizer = byte_tokenizer() if names is ANCHORS else word_tokenizer()
        shape = {"intermediate_size": 128, "pad_token_id": tokenizer.pad_token_id}
        shape |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        model = tiny_llama(seed, vocab_size=len(tokenizer), **sizes | shape)
        for name in names:
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    model = compose(folder / "anchor", {"code": folder / "specialist"}, every=1)
    model.save_pretrained(folder / "composed")
    write_tasks(folder / "tasks")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copy(ROOT / "examples" / "data.jsonl", folder / "held_out.jsonl")
    recipe = (ROOT / "examples" / "train.yaml").read_text()
    recipe = recipe.replace("path/or/hub-id-of-the-anchor", "anchor")
    recipe = recipe.replace("path/or/hub-id-of-a-specialist", "specialist")
    for name in ("recipe.yaml", "examples/train.yaml"):
        (folder / name).write_text(recipe)


def run_page(page: str, with_commands: bool) -> None:
    """Run a page in the current folder, as a reader would who pastes every block of it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
        elif with_commands and block.language in COMMANDS:
            for words in commands(block):
                run_command(words, block.place)


def run_command(words: list[str], place: str) -> None:
    """Run one command, unless it is among those that are not."""
    if is_run(words):
        print(f"{place}: {shlex.join(words)}", file=sys.stderr)
        if words[0] == "graftlm":
            status = main(words[1:])
        else:
            status = subprocess.run([sys.executable, *words[1:]], check=False).returncode
        assert status == 0, f"{place}: {shlex.join(words)} ended with {status}"


def is_run(words: list[str]) -> bool:
    """Whether a test runs it."""
    return not any(re.match(pattern, " ".join(words)) for pattern in NOT_RUN)


# ---- links -------------------------------------------------------------------------------


def links(page: str) -> Iterator[tuple[str, str]]:
    """Each relative link and picture of a page: file and anchor."""
    for token in MarkdownIt().enable("table").parse((ROOT / page).read_text(encoding="utf-8")):
        for child in token.children or ():
            target = child.attrs.get("href", child.attrs.get("src", ""))
            if isinstance(target, str) and target and not re.match(r"https?:|mailto:", target):
                path, _, anchor = target.partition("#")
                yield path, anchor


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    parsed = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    headings = [
        parsed[index + 1].content for index, t in enumerate(parsed) if t.type == "heading_open"
    ]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def quiet_environment() -> dict[str, str]:
    """The environment of a program that needs neither network nor notices."""
    return {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
