"""What can be imported, and what importing costs."""

import importlib
import subprocess
import sys

import pytest

import graftlm


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_is_exactly_what_can_be_imported():
    assert sorted(graftlm.__all__) == graftlm.__all__ == dir(graftlm)
    for name in graftlm.__all__:
        assert getattr(graftlm, name) is not None
        home = getattr(getattr(graftlm, name), "__module__", "graftlm")
        assert home.split(".")[0] == "graftlm"
    with pytest.raises(AttributeError, match="module 'graftlm' has no attribute 'Bridges'"):
        graftlm.Bridges  # noqa: B018


@pytest.mark.parametrize("name", sorted(graftlm._HOME))
def test_names_come_from_where_they_live(name):
    home = importlib.import_module(f"graftlm.{graftlm._HOME[name]}")
    assert getattr(graftlm, name).__module__ == home.__name__


def test_importing_loads_no_model_code():
    heavy = "{'torch', 'transformers', 'numpy', 'safetensors', 'matplotlib', 'datasets'}"
    assert run(f"import sys, graftlm; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import graftlm, transformers",
        "import transformers, graftlm",
        "import graftlm; from transformers import AutoConfig",
        "from transformers import AutoModelForCausalLM; import graftlm",
        "import graftlm; import transformers.models.auto.modeling_auto",
    ],
)
def test_auto_classes_know_composed_models_whichever_is_imported_first(imports):
    code = f"""
{imports}
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("graftlm")
print(type(config).__name__, AutoModelForCausalLM._model_mapping[type(config)].__name__)
"""
    assert run(code) == "ComposedConfig ComposedForCausalLM"
