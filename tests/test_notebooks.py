"""The notebooks run, on a small preset, and hold nothing of the machine they were made on."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from graftlm.reproduce.real_models import find_model

FOLDER = Path(__file__).parents[1] / "notebooks"
NEEDED = {
    "key_value_arithmetic": (),
    "two_real_models": ("smollm2-135m-instruct", "gemma-3-270m"),
}


def execute() -> Any:
    """`execute` of notebooks/execute.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter's own files and loops
@pytest.mark.parametrize(("name", "models"), NEEDED.items())
def test_a_notebook_runs(name, models, tmp_path):
    missing = [model for model in models if find_model(model) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not on this machine; make models fetches them")
    notebook = execute()(FOLDER / f"{name}.ipynb", tmp_path, GRAFTLM_NOTEBOOK_PRESET="quick")
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    source = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(pictures) == source.count("plt.show()") > 0


def test_all_notebooks_are_tested():
    assert sorted(NEEDED) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NEEDED)
def test_committed_outputs_are_whole_and_tell_nothing_of_a_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|usr)/|stderr|iopub|Traceback", text)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
