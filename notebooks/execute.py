"""Run the notebooks in full and keep what they print and draw: `make notebooks`.

What libraries say on stderr is left out: it speaks of the machine, not of the subject.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path, workplace: Path, **environment: str) -> Any:
    """The notebook with its outputs; what it writes goes into the workplace.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(workplace)}},
    )
    client.execute(env={**os.environ, **environment})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(output for output in cell.outputs if not is_noise(output))
    return notebook


def joined(outputs: Iterable[Any]) -> list[Any]:
    """Outputs in which what was printed in several goes is one."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def is_noise(output: Mapping[str, Any]) -> bool:
    """Whether an output is what libraries say beside the subject."""
    return output.get("name") == "stderr"


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all, in place."""
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(path, FOLDER)
        notebook.metadata["language_info"] = {"name": "python"}  # not of which version it ran
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
