"""The files of a composition: bridges, configuration and model card; never a base weight."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from graftlm._version import __version__
from graftlm.config import FORMAT_VERSION, ComposedConfig
from graftlm.errors import CheckpointMismatchError
from graftlm.sharding import whole_shape

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
PREFIX = "model.bridges."


class HasFiles(Protocol):
    """A tokenizer or processor."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write its files."""
        ...


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: ComposedConfig,
    tensors: Mapping[str, Tensor],
    generation_config: GenerationConfig,
    tokenizer: HasFiles | None,
    num_parameters: Mapping[str, int],
) -> None:
    """Write all files, or none: a new folder appears complete, files in an old one one by one.

    Args:
        folder: Where to.
        config: Of the composed model.
        tensors: The bridges' weights, named `model.bridges.*`.
        generation_config: As the model has it now.
        tokenizer: The anchor's, or the processor with all of them, if it is at hand.
        num_parameters: Parameters of each part, for the model card.

    Raises:
        ValueError: If the folder holds a model of another kind.
    """
    folder = Path(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, new / WEIGHTS, metadata={"format": "pt", "graftlm": __version__})
        config.weights_sha256 = file_hash(new / WEIGHTS)
        config.format_version = FORMAT_VERSION
        config.save_pretrained(new)
        generation_config.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / "README.md").write_text(model_card(config, num_parameters), encoding="utf-8")
        if not folder.exists():
            new.rename(folder)
            return
        # The configuration comes last: until then it holds the hash of the old weights.
        files = (path for path in new.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda path: path.name == CONFIG):
            place = folder / file.relative_to(new)
            place.parent.mkdir(exist_ok=True)
            file.replace(place)


def check_replaceable(folder: Path) -> None:
    """Refuse to write bridges over a model that is not a composed one: a base, most likely.

    Raises:
        ValueError: If it holds one.
    """
    path = folder / CONFIG
    if path.is_file() and (kind := read_json(path).get("model_type")) != "graftlm":
        raise ValueError(
            f"{folder} holds a model of type {kind!r}, which bridges would replace; choose another "
            "folder"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The settings in a file; none if it holds something else.

    Raises:
        CheckpointMismatchError: If it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointMismatchError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(folder: str, **hub_options: Any) -> ComposedConfig:
    """The configuration of a composed model.

    Raises:
        CheckpointMismatchError: If it is missing, damaged, of another kind or of a newer version.
    """
    path = find(folder, CONFIG, hub_options)
    content = read_json(path)
    if (kind := content.get("model_type")) != "graftlm":
        raise CheckpointMismatchError(
            f"{folder} holds a model of type {kind!r}, not a composed model; compose it first"
        )
    config = ComposedConfig.from_dict(content)
    config.name_or_path = folder
    return config


def read_weights(folder: str, config: ComposedConfig, **hub_options: Any) -> dict[str, Tensor]:
    """The bridges' weights.

    Raises:
        CheckpointMismatchError: If the file is missing, cut off or changed.
    """
    path = find(folder, WEIGHTS, hub_options)
    found = file_hash(path)
    if config.weights_sha256 != found:
        raise CheckpointMismatchError(
            f"{path} was cut off or changed after saving: its SHA-256 is {found[:12]}..., but "
            f"config.json says {str(config.weights_sha256)[:12]}..."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointMismatchError(f"{path} is not a safetensors file: {error}") from error


def read_generation_config(folder: str, **hub_options: Any) -> GenerationConfig | None:
    """How the composed model generates, or None if nothing is said.

    Raises:
        CheckpointMismatchError: If the file is damaged.
    """
    path = cached_file(
        folder, GENERATION, _raise_exceptions_for_missing_entries=False, **hub_options
    )
    if path is None:
        return None
    try:
        return GenerationConfig.from_pretrained(os.path.dirname(path))
    except (OSError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointMismatchError(f"{path} cannot be used ({reason}); restore it") from error


def find(folder: str, name: str, hub_options: Mapping[str, Any]) -> Path:
    """The local path of one file of a folder or hub repository.

    Raises:
        CheckpointMismatchError: If it is not there.
    """
    if os.path.isdir(folder):
        path = Path(folder, hub_options.get("subfolder") or "", name)
        if not path.is_file():
            raise CheckpointMismatchError(f"{folder} has no {name}; is it a graftlm folder?")
        return path
    if "/" not in folder or folder.startswith((".", "/")):  # no hub id: do not ask the network
        raise CheckpointMismatchError(f"there is no folder {folder!r}")
    try:
        found = cached_file(folder, name, **hub_options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointMismatchError(f"{folder!r} has no {name}: {reason}") from error
    assert found is not None
    return Path(found)


def check_names(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: str) -> None:
    """Refuse weights that do not fit the bridges, naming the first that does not.

    Raises:
        CheckpointMismatchError: If a weight is missing, superfluous or of another shape.
    """
    for name in sorted(set(tensors) | set(expected)):
        if name not in tensors:
            raise CheckpointMismatchError(f"{folder}: {WEIGHTS} lacks {name}")
        if name not in expected:
            raise CheckpointMismatchError(f"{folder}: {WEIGHTS} holds {name}, which no bridge has")
        if whole_shape(tensors[name]) != whole_shape(expected[name]):
            raise CheckpointMismatchError(
                f"{folder}: {name} has shape {tuple(tensors[name].shape)}, but the composition "
                f"needs {whole_shape(expected[name])}"
            )


def bridge_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bridges' part of a full state dict, as FSDP and others gather one."""
    wrapper = "_checkpoint_wrapped_module."
    return {
        PREFIX + name.split("bridges.", 1)[1].replace(wrapper, ""): tensor
        for name, tensor in state_dict.items()
        if "bridges." in name
    }


def model_card(config: ComposedConfig, num_parameters: Mapping[str, int]) -> str:
    """The README of a checkpoint: what was composed, and how to load it."""
    bases = {name: base.get("name_or_path") for name, base in config.bases.items()}
    hub_ids = [ref for ref in bases.values() if ref and not os.path.isabs(ref)]
    front = ["---", "library_name: graftlm", "tags:", "- graftlm", "- calm"]
    if hub_ids:
        front += ["base_model:", *(f"- {ref}" for ref in hub_ids)]
    rows = []
    for name, sub in {"anchor": config.anchor_config, **config.augmenting_configs}.items():
        text = sub.get_text_config(decoder=True)
        short = bases.get(name) or "given as a loaded model"
        short = os.path.basename(short) if os.path.isabs(short) else short
        rows.append(
            f"| {name} | {short} | {sub.model_type} | {text.num_hidden_layers} x "
            f"{text.hidden_size} | {num_parameters[name]:,} |"
        )
    connections = [
        f"| {c.augmenting} | {c.augmenting_layer} | {c.anchor_layer} |" for c in config.connections
    ]
    return "\n".join(
        [
            *front,
            "---",
            "",
            "# A composed language model",
            "",
            f"Bridges (CALM, arXiv 2401.02412) made with graftlm {__version__}. This folder holds "
            f"the {num_parameters['bridges']:,} weights of the bridges and no weight of the base "
            "models, which are loaded from where they were and checked against their fingerprints.",
            "",
            "| part | model | kind | layers x width | parameters |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "| augmenting model | layer read | anchor layer |",
            "| --- | --- | --- |",
            *connections,
            "",
            f"Bridges: {config.bridge}. Reads: {config.reads}.",
            "",
            "```python",
            "from graftlm import ComposedForCausalLM",
            "",
            'model = ComposedForCausalLM.from_pretrained("this-folder")',
            "```",
            "",
        ]
    )
