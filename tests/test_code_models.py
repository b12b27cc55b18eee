"""A model of code that the command trains."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graftlm.reproduce import code, code_models, language_model
from graftlm.reproduce.code_sources import WRITE
from graftlm.reproduce.example import Data, Example, plain
from tiny import save_model
from tiny_language_model import SETTINGS

PROGRAMS = [f"def double_{k}(x):\n    return 2 * x + {k}\n" for k in range(12)]
NEWS = [f"On day {k} the council met and said that rain would come." for k in range(12)]
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def data_of_this_test() -> Iterator[None]:
    """The experiment keeps what it has drawn."""
    code.data.cache_clear()
    yield
    code.data.cache_clear()


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Data:
    """Two of the news come again, as replay does where there are few."""
    tiny = replace(SETTINGS, num_texts=10, most_passes=40)
    monkeypatch.setattr(language_model, "PRESETS", {"quick": tiny})
    monkeypatch.setattr(code_models, "PRESETS", {"quick": tiny})
    task = Example(group=WRITE, source="Double.", target="def f(x): return 2 * x")
    return Data(
        composition=[task, *map(plain, [*NEWS, *NEWS[:2]])],
        tests={"HumanEval": {}, "CodeI/O": {}, "other packages": {WRITE: [task]}},
        retention={"text": [plain("It rained.")]},
        domain=list(map(plain, PROGRAMS)),
    )


def test_it_learns_news_and_then_programs(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = code_models.train_coder(data, preset="quick", output=tmp_path, console=QUIET)
    before, after = (
        json.loads((folder / "language_model.json").read_text())["bits per byte"]
        for folder in (made.vanilla, made.specialised)
    )
    assert list(before) == list(after) == ["Python, other packages", "English, news"]
    python, news = before.keys()
    assert after[python] < before[python] - 0.5
    assert before[news] < after[news]
    monkeypatch.setattr(language_model, "fit", lambda *args, **kwargs: pytest.fail("again"))
    assert code_models.train_coder(data, preset="quick", output=tmp_path, console=QUIET) == made


def test_the_experiment_reads_it(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "load_data", lambda num_tests: data)
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(code_models, "train_specialist", given := Given())
    anchor = save_model(tmp_path / "anchor")
    experiment = code.experiment("quick", anchor=anchor, train_coder=True, no_programs=True)
    assert "vanilla" in experiment.systems
    assert "vanilla" in experiment.goals[0].beats
    layers = SETTINGS.num_layers
    assert {i for i, _ in experiment.composition.connections} <= set(range(layers))
    models = experiment.models(tmp_path, {"vanilla"}, "cpu")
    assert models.augmenting == {"coder": Path("after")}
    assert models.vanilla == {"coder": Path("before")}
    (english, python) = given.texts
    assert english == ("English", NEWS)
    assert python[0] == "Python"
    assert sorted(python[1]) == sorted(PROGRAMS)
    with pytest.raises(ValueError, match=r"--augmenting x is another model .* give one of the two"):
        code.experiment("quick", augmenting="x", train_coder=True)


class Given:
    """Notes what would be learned from."""

    def __call__(self, *texts: Any, **options: Any) -> Any:
        self.texts = texts
        return type("Parents", (), {"specialised": Path("after"), "vanilla": Path("before")})
