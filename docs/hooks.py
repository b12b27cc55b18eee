"""What mkdocs is told in code: files that lie above `docs/` are pages, or files, of the site too.

A link such as `../CHANGELOG.md` leads to the file in the repository, and to its copy in the site.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
COPIES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "examples/train.yaml",
    "examples/data.jsonl",
)


def on_files(files: Files, config: Any) -> Files:
    """Put the copies beside the pages."""
    for name in COPIES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **event: Any) -> str:
    """Point links above `docs/` at the copies."""
    return markdown.replace("](../", "](")
