"""A states cache: hidden states that training never changes, in memory-mapped files.

FOLDER/states.json                what the states were computed for, and how they are cut into parts
FOLDER/states-00007.safetensors   part 7: the states of so many examples, one tensor a layer

A part appears complete or not at all, so that work that was stopped goes on with the next one.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

FILE = "states.json"
FORMAT = 2  # of the files, and of how models with tokens of their own read a text
LENGTHS = "lengths"  # of a part's file: tokens of each example, by part of the model
MADE_FOR = "made_for"  # in the metadata of a part's file
OPEN_PARTS = 64  # a file that is open costs memory for its header, and addresses for its pages


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What `states.json` says.

    Args:
        made_for: What the states depend on, in the words of a message, each with a hash or value.
        num_examples: Of the data.
        part_size: Examples a part; the last one has fewer.
        format_version: Of the files.
    """

    made_for: Mapping[str, Any]
    num_examples: int
    part_size: int
    format_version: int = FORMAT

    @property
    def key(self) -> str:
        """What every part's file says of what it was computed for."""
        facts = json.dumps(self.made_for, sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def num_parts(self) -> int:
        """Files there are when all is computed."""
        return -(-self.num_examples // self.part_size)

    def part(self, number: int) -> range:
        """The examples of one part."""
        start = number * self.part_size
        return range(start, min(start + self.part_size, self.num_examples))


def read_layout(folder: Path) -> Layout | None:
    """What a folder holds, or None if it is no states cache.

    Raises:
        ValueError: If a newer version wrote it, or the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version == FORMAT:
            return Layout(**values)
    except (ValueError, KeyError, TypeError) as exc:
        raise ValueError(f"{path} is damaged; delete {folder} and compute it again") from exc
    raise ValueError(
        f"{folder} has format {version} of hidden states, but this version of graftlm reads "
        f"{FORMAT}; delete it and compute it again"
    )


def write_layout(folder: Path, layout: Layout) -> None:
    """Write `states.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(layout), indent=2), encoding="utf-8")
    temporary.replace(folder / FILE)


def part_path(folder: Path, number: int) -> Path:
    """The file of one part."""
    return folder / f"states-{number:05d}.safetensors"


def missing_parts(folder: Path, layout: Layout) -> list[int]:
    """The parts that are still to be computed; those of something else are computed again."""
    return [n for n in range(layout.num_parts) if made_for_of(part_path(folder, n)) != layout.key]


def made_for_of(path: Path) -> str | None:
    """What a part's file says it was computed for, or None if there is no such file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(MADE_FOR)
    except SafetensorError:  # damaged from outside: to be computed again
        return None


def write_part(
    folder: Path,
    layout: Layout,
    number: int,
    examples: Sequence[Mapping[str, Tensor]],
    lengths: Mapping[str, str],
) -> None:
    """Write one part.

    Args:
        folder: Of the cache.
        layout: What the states are computed for.
        number: Of the part.
        examples: For each example its states by name, (tokens, d).
        lengths: Name of one layer of each part of the model, by whose states tokens are counted.

    Raises:
        OSError: If the disk is full; nothing is left of the part then.
    """
    tensors = {name: torch.cat([states[name] for states in examples]) for name in examples[0]}
    for part, name in lengths.items():
        tensors[f"{LENGTHS}.{part}"] = torch.tensor([len(states[name]) for states in examples])
    path = part_path(folder, number)
    temporary = folder / f".{path.name}.{os.getpid()}"
    try:
        save_file(tensors, temporary, metadata={MADE_FOR: layout.key})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a disk may say only here that it is full
        temporary.replace(path)
    except (OSError, SafetensorError) as exc:
        raise OSError(
            f"part {number} of the hidden states could not be written to {folder}: {exc}; make "
            "room and run it again, the parts before it are kept"
        ) from exc
    finally:
        temporary.unlink(missing_ok=True)


class StatesCache:
    """The hidden states of every example of some data, read from files as they are asked for.

    `states[index]` are those of one example, by name ("anchor.J", "NAME.I"), each of shape
    (tokens, d) and mapped from the file: nothing is read before it is used.

    Args:
        folder: Made by `graftlm.cache_states` or `graftlm cache`.

    Raises:
        ValueError: If the folder holds no states, or not yet all of them.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        layout = read_layout(self.folder)
        if layout is None:
            raise ValueError(f"{folder} holds no hidden states; make them with graftlm cache")
        missing = missing_parts(self.folder, layout)
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {layout.num_parts} parts of the hidden states; "
                "run graftlm cache again, it goes on where it stopped"
            )
        self.layout = layout
        self._open: OrderedDict[int, tuple[dict[str, Any], dict[str, list[int]]]] = OrderedDict()

    def __len__(self) -> int:
        return self.layout.num_examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no example {index} among {len(self)}")
        number, row = divmod(index, self.layout.part_size)
        tensors, ends = self.part(number)
        states = {}
        for name, tensor in tensors.items():
            until = ends[name.rpartition(".")[0]]
            states[name] = tensor[until[row] : until[row + 1]]
        return states

    def part(self, number: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """One part: its tensors, and where each example begins in them and the last one ends."""
        if number not in self._open:
            with safe_open(part_path(self.folder, number), framework="pt") as file:
                names = list(file.keys())
                tensors = {n: file.get_tensor(n) for n in names if not n.startswith(LENGTHS)}
                counts = {
                    name.removeprefix(f"{LENGTHS}."): file.get_tensor(name).tolist()
                    for name in names
                    if name.startswith(LENGTHS)
                }
            ends = {part: [0, *torch.tensor(n).cumsum(0).tolist()] for part, n in counts.items()}
            self._open[number] = tensors, ends
            if len(self._open) > OPEN_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        """Data loading processes open the files themselves."""
        return self.__dict__ | {"_open": OrderedDict()}

    def with_states(self, examples: Any) -> "WithStates":
        """Examples that bring their hidden states; for `Trainer` and `ComposedDataCollator`.

        Args:
            examples: The data the states were computed for, in the same order.

        Raises:
            ValueError: If it is not.
        """
        if data_hash(examples) != self.layout.made_for["the data"]:
            raise ValueError(
                f"these {len(examples)} examples are not the {len(self)} whose hidden states "
                f"{self.folder} holds, or not in their order"
            )
        return WithStates(examples, self)


class WithStates(Dataset):
    """A dataset whose examples have `frozen_states` too; made by `StatesCache.with_states`."""

    def __init__(self, examples: Any, states: StatesCache):
        self.examples = examples
        self.states = states

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.examples[index], "frozen_states": self.states[index]}


def data_hash(examples: Any) -> str:
    """SHA-256 over the tokens and labels of all examples, in order.

    Raises:
        ValueError: If an example is padded or packed, which states are not computed for.
    """
    digest = hashlib.sha256()
    for index in range(len(examples)):
        example = examples[index]
        check_example(example, index)
        for name in ("input_ids", "labels", "read_ids"):
            column = example.get(name)
            values = torch.as_tensor([] if column is None else column, dtype=torch.long)
            digest.update(f"{name} {len(values)} {column is None}\n".encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def check_example(example: Mapping[str, Any], index: int) -> None:
    """Refuse what changes hidden states and is not theirs to know.

    Raises:
        ValueError: Naming the column.
    """
    mask = example.get("attention_mask")
    is_padded = mask is not None and not bool(torch.as_tensor(mask).all())
    if is_padded or example.get("position_ids") is not None:
        name = "attention_mask with zeros" if is_padded else "position_ids"
        raise ValueError(
            f"example {index} has {name}, but hidden states are kept of whole texts, one an "
            "example; pad in the collator, and do not pack"
        )


def pad_states(
    rows: Iterable[Mapping[str, Tensor]], lengths: Mapping[str, int]
) -> dict[str, Tensor]:
    """The states of several examples as `ComposedForCausalLM.forward` takes them.

    Args:
        rows: For each example its states by name.
        lengths: Tokens to pad to by part of the model; by default the longest example's, and at
            least 1.

    Returns:
        (batch, tokens, d) by name, with zeros behind each example.
    """
    rows = list(rows)
    padded = {}
    for name, first in rows[0].items():
        longest = max(1, *(len(row[name]) for row in rows))
        length = lengths.get(name.rpartition(".")[0], longest)
        padded[name] = first.new_zeros(len(rows), length, first.shape[-1])
        for whole, row in zip(padded[name], rows, strict=True):
            whole[: len(row[name])] = row[name]
    return padded
