"""Experiments on models of the user's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from rich.console import Console

import tiny_experiment
from graftlm import ComposedForCausalLM
from graftlm.reproduce import code, low_resource, own_models, run, translate
from graftlm.reproduce.language_model import PRESETS
from graftlm.reproduce.own_models import OwnModels, at_same_heights
from tiny import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models of the names of the options; m_B has 4 layers, the others have 3."""
    models = tiny_experiment.save_models(tmp_path_factory.mktemp("models"))
    assert models.vanilla is not None
    return {
        "anchor": str(models.anchor),
        "augmenting": str(models.augmenting["augmenting"]),
        "vanilla": str(models.vanilla["augmenting"]),
    }


@pytest.fixture(autouse=True)
def two_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the tests need no packages then."""
    monkeypatch.setattr(low_resource, "load_tests", lambda language: ["books", "interface"])


def test_connections_are_at_the_same_heights() -> None:
    pairs = ((2, 3), (3, 11), (5, 28))
    assert at_same_heights(pairs, (6, 30), (6, 30)) == pairs
    assert at_same_heights(pairs, (6, 30), (12, 60)) == ((5, 7), (7, 23), (11, 57))
    assert at_same_heights(pairs, (6, 30), (3, 15)) == ((1, 1), (1, 5), (2, 13))
    assert at_same_heights(pairs, (6, 30), (2, 1)) == ((1, 0),)
    for module, layers in ((code, code.LAYERS), (translate, translate.LAYERS)):
        experiment = module.experiment("quick")
        assert experiment.composition.connections == module.COMPOSITION.connections
        assert max(i for i, _ in module.COMPOSITION.connections) == layers[0] - 1
    assert low_resource.experiment("small").ablations == low_resource.ABLATIONS


@pytest.mark.parametrize("module", [code, low_resource, translate])
def test_an_experiment_takes_its_models_from_the_options(
    module: Any, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And needs none of its own then, nor trains any."""
    monkeypatch.setattr(low_resource, "train_parents", lambda *args, **kw: pytest.fail("trains"))
    monkeypatch.setenv("GRAFTLM_MODELS", str(tmp_path))  # there are none
    given = {part: folders[part] for part in ("anchor", "augmenting")}
    experiment = module.experiment("quick", **given)
    models = experiment.models(tmp_path, {"augmenting"}, "cpu")
    assert models.anchor == Path(folders["anchor"])
    assert list(models.augmenting.values()) == [Path(folders["augmenting"])]
    assert models.vanilla is None
    assert "vanilla" not in {*experiment.systems, *(n for g in experiment.goals for n in g.beats)}
    all_pairs = [experiment.composition.connections]
    for system in experiment.ablations.values():
        all_pairs.append(system.composition.get("connections", all_pairs[0]))
    for pairs in all_pairs:
        assert {i for i, _ in pairs} <= {0, 1, 2}
        assert {j for _, j in pairs} <= {0, 1, 2, 3}
    assert (2, 3) in all_pairs[0]
    assert folders["anchor"] in experiment.about
    assert experiment.changes["anchor"] == folders["anchor"]


@pytest.mark.parametrize("module", [code, low_resource])
def test_what_the_augmenting_model_was_before(module: Any, folders: dict[str, str]) -> None:
    experiment = module.experiment("quick", **folders)
    assert "vanilla" in experiment.systems
    assert "vanilla" in experiment.goals[0].beats
    assert list(experiment.models(Path(), {"vanilla"}, "cpu").vanilla.values()) == [
        Path(folders["vanilla"])
    ]


def test_another_anchor_reads_what_the_command_trains(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def trained(language: str, **options: Any) -> Any:
        asked.append(language)
        return low_resource_parents

    low_resource_parents = type("Parents", (), {"specialised": Path("s"), "vanilla": Path("v")})
    monkeypatch.setattr(low_resource, "train_parents", trained)
    experiment = low_resource.experiment("quick", language="xhosa", anchor=folders["anchor"])
    models = experiment.models(Path(), {"augmenting"}, "cpu")
    assert models.anchor == Path(folders["anchor"])
    assert models.augmenting == {"xhosa": Path("s")}
    assert asked == ["xhosa"]
    assert max(i for i, _ in experiment.composition.connections) == PRESETS["quick"].num_layers - 1
    assert "vanilla" in experiment.systems


def test_such_an_experiment_runs(folders: dict[str, str], tmp_path: Path) -> None:
    asked: Any = {part: folders[part] for part in ("anchor", "augmenting")}
    experiment = translate.experiment("quick", **asked)
    tiny = tiny_experiment.experiment(tiny_experiment.save_models(tmp_path / "unused"))
    experiment = replace(experiment, data=tiny.data, tests=tiny.tests, goals=(), in_bf16=False)
    console = Console(quiet=True)
    systems = [("composed", 1), ("self", 1)]
    run.run(
        experiment, systems=systems, output=tmp_path, device="cpu", console=console, plots=False
    )
    config = ComposedForCausalLM.from_pretrained(tmp_path / "composed" / "0").config
    assert [(c.augmenting_layer, c.anchor_layer) for c in config.connections] == list(
        experiment.composition.connections
    )


def test_models_that_cannot_be_had(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"--vanilla v is what .* give both, or leave"):
        own_models.find(vanilla="v")
    save_model(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").rename(tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"bare holds no \.safetensors file"):
        own_models.find(anchor=str(tmp_path / "bare"))

    def nowhere(model: str, **options: Any) -> str:
        raise OSError(f"no {model}\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nowhere)
    words = r"'some/model' is no folder here, and the hub does not give it \(no some/model\); give"
    with pytest.raises(ValueError, match=words):
        own_models.find(anchor="some/model")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda model, **options: folders["anchor"]
    )
    found = own_models.find(anchor="some/model")
    assert found == OwnModels(anchor=Path(folders["anchor"]), names={"anchor": "some/model"})
    assert found.title("anchor", "default") == "some/model"
