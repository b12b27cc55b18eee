"""What mkdocs is told in code: files that lie above `docs/` are pages, or files, of the site too.

A link such as `../CHANGELOG.md` leads to the file in the repository, and to its copy in the site.
Notebooks become pages with what they printed and drew. Sentences in code within tables are marked,
so that site.css can wrap them between words, and names not at all.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
IN_TABLE, CODE = re.compile(r"<table>.*?</table>", re.DOTALL), re.compile(r"<code>([^<]*)</code>")
LONGEST_NAME = 32  # characters; longer code with spaces in it is a sentence
COPIES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "examples/train.yaml",
    "examples/data.jsonl",
)


def on_files(files: Files, config: Any) -> Files:
    """Put the copies and the notebooks beside the pages."""
    for name in COPIES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for name, content in notebook_files(path):
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **event: Any) -> str:
    """Point links above `docs/` at the copies; generated pages lie a folder deeper."""
    if page.file.src_uri.startswith("notebooks/"):
        return markdown.replace("](../docs/", "](../")
    return markdown.replace("](../", "](").replace(".ipynb)", ".md)")


def on_page_content(html: str, **event: Any) -> str:
    """Mark the sentences in code within tables."""
    return IN_TABLE.sub(lambda table: CODE.sub(marked, table.group()), html)


def marked(code: re.Match[str]) -> str:
    """A piece of code, as a sentence if it is long."""
    text = code.group(1)
    is_sentence = len(text) > LONGEST_NAME and " " in text.strip()
    return f'<code class="sentence">{text}</code>' if is_sentence else code.group()


def notebook_files(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """A notebook as a page of Markdown, and its pictures."""
    parts, num_pictures = [], 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                num_pictures += 1
                name = f"{path.stem}-{num_pictures}.png"
                parts.append(f"![drawn by the cell above]({name})")
                yield name, base64.b64decode(output["data"]["image/png"])
    yield f"{path.stem}.md", "\n\n".join(parts)
