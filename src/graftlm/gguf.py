"""GGUF files wherever a model is expected: converted once, then read from a folder in seconds.

A converted folder is named by the SHA-256 of its GGUF and holds what `save_pretrained` writes,
weights in bfloat16 as safetensors, and a record with the SHA-256 of each of its files.

What transformers' loader makes of a file is kept as it is. Two things worth knowing: a GGUF with
an output matrix of its own gives an untied model, also where the original was tied (some of
Qwen's: the two matrices are packed differently, and neither is the original); and Gemma's
tokenizer comes out splitting runs of more than 31 spaces otherwise than the original does.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

FORMAT_VERSION = 1
RECORD = "graftlm-conversion.json"
MAGIC = b"GGUF"

# Where this process found or made the folder of a file: by path, size and time of change.
_folders: dict[tuple[str, int, int], Path] = {}


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Whether a model is named by a GGUF file."""
    return os.fspath(name).lower().endswith(".gguf")


def resolve(name: str, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """What transformers can load: the converted folder of a .gguf path, all else as it is.

    The file is hashed once a process, so that asking again costs nothing.

    Args:
        name: A path or a hub id.
        cache_dir: As for `convert`.

    Raises:
        ValueError: As `convert`.
    """
    if not is_gguf(name) or os.path.isdir(name):
        return name
    path = existing(name)
    facts = path.stat()
    key = (str(path), facts.st_size, facts.st_mtime_ns)
    known = _folders.get(key)
    if known is None or not (known / RECORD).exists():
        known = _folders[key] = convert(path, cache_dir)
    return str(known)


def convert(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of safetensors, configuration and tokenizer made from a GGUF file.

    Made at the first call; later ones compare the SHA-256 of the file and of the folder's files,
    which takes a second a gigabyte, and convert again what is not whole. Progress goes to stderr.

    Args:
        path: The GGUF file.
        cache_dir: Where to keep the folder; by default `default_cache()`. One that lies beside
            the file, as `make models` leaves it, is used too.

    Raises:
        ValueError: If there is no such file, it is no whole GGUF file, or the gguf package is
            missing.
    """
    path = existing(path)
    check_magic(path)
    source = sha256(path)
    folder = Path(cache_dir or default_cache()).absolute() / folder_name(source)
    for made_before in (folder, path.parent / folder.name):
        if is_whole(made_before):
            return made_before
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{path} must be converted, but the gguf package is missing; "
            "pip install 'graftlm[gguf]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    say(f"converting {path.name} ({path.stat().st_size / 1e6:,.0f} MB), once")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        made = Path(place, "made")
        write_model(path, made)
        record = {
            "format_version": FORMAT_VERSION,
            "source": path.name,
            "source_sha256": source,
            "files": {file.name: sha256(file) for file in sorted(made.iterdir())},
        }
        (made / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
        if folder.exists() and not is_whole(folder):  # damaged, or from another program
            folder.rename(Path(place, "damaged"))
        try:
            made.rename(folder)
        except OSError:
            if not is_whole(folder):  # else another process was faster
                raise
    say(f"converted in {time.perf_counter() - start:.0f} s: {folder}")
    return folder


def default_cache() -> Path:
    """GRAFTLM_CACHE, or graftlm in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("GRAFTLM_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "graftlm")


def folder_name(source_sha256: str) -> str:
    """What the converted folder of a file with this hash is called."""
    return f"gguf-{source_sha256[:32]}-v{FORMAT_VERSION}"


def is_whole(folder: Path) -> bool:
    """Whether a converted folder holds exactly what was written."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record["format_version"] == FORMAT_VERSION and all(
            sha256(folder / name) == digest for name, digest in record["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    """One line of progress, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


# ---- checking and reading a file ---------------------------------------------------------


def existing(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a file that is there.

    Raises:
        ValueError: If it is not.
    """
    found = Path(path).absolute()
    if not found.is_file():
        raise ValueError(f"the model is {os.fspath(path)!r}, but there is no such file")
    return found


def check_magic(path: Path) -> None:
    """Refuse what does not begin as a GGUF file does.

    Raises:
        ValueError: If it does not.
    """
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
    if begin != MAGIC:
        raise ValueError(
            f"{path} is no GGUF file: it begins with {begin!r}, not {MAGIC!r}; was it "
            "downloaded as a web page or as a pointer to the real file?"
        )


def read_fields(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file that is whole.

    Raises:
        ValueError: If it is cut off or damaged, or only one part of several.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (ValueError, IndexError, KeyError, OverflowError) as exc:
        raise ValueError(
            f"{path} is cut off or damaged ({path.stat().st_size:,} bytes, {exc}); download it "
            "again"
        ) from exc
    parts = fields["split.count"].contents() if "split.count" in fields else 1
    if parts > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model; join them with llama-gguf-split --merge"
        )
    return fields


def write_model(path: Path, folder: Path) -> None:
    """Weights in bfloat16, configuration and tokenizer of a GGUF file, as transformers reads it.

    Raises:
        ValueError: If the file is not whole, or lacks weights of its model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    has_tokenizer = "tokenizer.ggml.model" in read_fields(path)
    folder.mkdir()
    # Read from an empty folder, so that nothing beside the file is taken for a part of it.
    with tempfile.TemporaryDirectory() as empty:
        if has_tokenizer:
            say("  tokenizer")
            tokenizer: Any = AutoTokenizer.from_pretrained(empty, gguf_file=str(path))
            tokenizer.save_pretrained(folder)
            del tokenizer
        say("  weights")
        read, report = AutoModelForCausalLM.from_pretrained(
            empty,
            gguf_file=str(path),
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise ValueError(
            f"{path} lacks weights of its model, such as {min(report['missing_keys'])!r}; "
            "it is not a whole causal language model"
        )
    # transformers refuses to save what it read from a GGUF; a fresh model holds the same weights.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    say("  writing")
    model.save_pretrained(folder)
