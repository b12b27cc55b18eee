"""README is short, and names every file. That it runs: tests/test_pages.py."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readme_example_is_short():
    """Fifteen lines and two imports, blank ones not counted."""
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert first is not None
    assert len([line for line in first.group(1).splitlines() if line]) <= 17


def test_every_file_is_in_the_map():
    """A newcomer finds each file of the package in README's map."""
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "src" / "graftlm").glob("*.py"):
        if not path.name.startswith("_"):
            assert path.name in readme, f"{path.name} is missing from README's map"
