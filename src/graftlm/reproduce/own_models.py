"""An experiment on models of the user's, connected at the same relative heights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftlm import gguf
from graftlm.reproduce.experiment import Experiment
from graftlm.reproduce.systems import System

Pairs = tuple[tuple[int, int], ...]
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a hub's repository


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnModels:
    """Folders of the models that replace an experiment's; None leaves it its own.

    Args:
        vanilla: The augmenting model before it became a specialist.
        names: What the user called them: a converted or downloaded folder's own name says little.
    """

    anchor: Path | None = None
    augmenting: Path | None = None
    vanilla: Path | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def title(self, part: str, default: str) -> str:
        """What the report calls the anchor or the augmenting model."""
        return self.names.get(part, default)


def find(
    anchor: str | None = None, augmenting: str | None = None, vanilla: str | None = None
) -> OwnModels:
    """The folders of named models.

    Args:
        anchor, augmenting, vanilla: Folders, GGUF files, or hub ids, which are downloaded.

    Raises:
        ValueError: If the vanilla model is named, but not what became of it.
    """
    if vanilla and not augmenting:
        raise ValueError(
            f"--vanilla {vanilla} is what the augmenting model was before, which --augmenting does "
            "not name; give both, or leave --vanilla out"
        )
    given = {"anchor": anchor, "augmenting": augmenting, "vanilla": vanilla}
    return OwnModels(
        **{part: folder_of(model) for part, model in given.items()},
        names={part: model for part, model in given.items() if model is not None},
    )


def folder_of(model: str | None) -> Path | None:
    """Where the files of a model are; one that is no path is downloaded from the hub.

    Raises:
        ValueError: If it cannot be had, or has no safetensors.
    """
    if model is None:
        return None
    place = Path(gguf.resolve(model)).expanduser()
    if not place.is_dir():
        from huggingface_hub import snapshot_download

        try:
            place = Path(snapshot_download(model, allow_patterns=FILES))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{model!r} is no folder here, and the hub does not give it ({reason}); "
                "give a folder, a GGUF file or a hub id"
            ) from error
    if not any(place.glob("*.safetensors")):
        raise ValueError(f"{place} holds no .safetensors file; convert the model's weights first")
    return place


def on_own_models(
    experiment: Experiment,
    own: OwnModels,
    *,
    layers: tuple[int, int],
    trained: int | None = None,
) -> Experiment:
    """The experiment with its connections where the models' layers are.

    Args:
        layers: How many m_A and m_B have for whom the connections were chosen.
        trained: How many m_A has, if the experiment trains another.
    """
    found = (
        num_layers(own.augmenting) if own.augmenting else trained or layers[0],
        num_layers(own.anchor) if own.anchor else layers[1],
    )

    def moved(systems: Mapping[str, System]) -> dict[str, System]:
        return {name: at_heights(system, layers, found) for name, system in systems.items()}

    composition = replace(
        experiment.composition,
        connections=at_same_heights(experiment.composition.connections, layers, found),
    )
    left_out = {"vanilla"} if own.augmenting and not own.vanilla else set()
    return replace(
        experiment,
        composition=composition,
        systems={n: s for n, s in moved(experiment.systems).items() if n not in left_out},
        ablations=moved(experiment.ablations),
        goals=[
            replace(goal, beats=tuple(name for name in goal.beats if name not in left_out))
            for goal in experiment.goals
        ],
    )


def num_layers(folder: Path) -> int:
    """Of a model's decoder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return config.get_text_config(decoder=True).num_hidden_layers


def at_heights(system: System, meant: tuple[int, int], found: tuple[int, int]) -> System:
    """A system whose own connections, if any, are at the same relative heights."""
    pairs = system.composition.get("connections")
    if pairs is None:
        return system
    moved = {"connections": at_same_heights(pairs, meant, found)}
    return replace(system, composition={**system.composition, **moved})


def at_same_heights(pairs: Pairs, meant: tuple[int, int], found: tuple[int, int]) -> Pairs:
    """Pairs of layers at the same relative heights of models with other numbers of layers.

    Args:
        pairs: Of m_A's and m_B's layers, counted from 0.
        meant, found: How many layers m_A and m_B have, there and here. Where m_B has too few for
            all, pairs that would meet in one of its layers are one: the last of them.
    """
    by_anchor = {
        same_height(j, meant[1], found[1]): same_height(i, meant[0], found[0]) for i, j in pairs
    }
    return tuple((i, j) for j, i in by_anchor.items())


def same_height(layer: int, meant: int, found: int) -> int:
    """The layer of a model of `found` layers that stands where `layer` does among `meant`."""
    return max(0, round((layer + 1) / meant * found) - 1)
