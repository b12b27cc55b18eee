"""Evaluate a composed model and its parts with lm-eval, side by side, on the same tasks.

The models are loaded once. Each part's results are written when it is finished, so a run that was
stopped goes on with the next part.
"""

import contextlib
import gc
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from graftlm.bases import for_augmenting, reference
from graftlm.checkpoint import read_config
from graftlm.config import ComposedConfig
from graftlm.tasks import FOLDER

RESULTS = "results.json"
KEPT = ("results", "groups", "higher_is_better", "n-shot", "n-samples", "versions")
LOADING = ("dtype", "quantization_config")  # what loading options can change in the results


def evaluate(
    folder: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    parts: Sequence[str] | None = None,
    batch_size: int | str = 1,
    limit: float | None = None,
    num_fewshot: int | None = None,
    use_cache: str | os.PathLike[str] | None = None,
    include_path: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    device: str | None = None,
    apply_chat_template: bool = False,
    seed: int | None = None,
    on_part: Callable[[str, bool], None] | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Run lm-eval's tasks on a composed model, its anchor and its augmenting models.

    Args:
        folder: A composed model, as `save_pretrained` wrote it.
        tasks: Tasks, groups or tags of lm-eval, or of `include_path`; patterns such as
            `mgsm_direct_*` too.
        parts: "composed", "anchor" and names of augmenting models; all of them by default.
        batch_size: Rows at a time, or "auto": as many as fit.
        limit: Examples of each task; a share of them if below 1.
        num_fewshot: Solved examples in each prompt, instead of what a task says.
        use_cache: Where lm-eval keeps answers, one file a part and model: the path given, and
            what tells them apart. They are pickles; open none that others made.
        include_path: A folder with tasks of your own.
        output: A folder for `results.json` and each part's samples; a part whose results are
            there is not run again.
        device: Where to; by default a GPU if there is one.
        apply_chat_template: Write prompts as chats, each part in its own template.
        seed: For everything drawn; by default lm-eval's.
        on_part: Called before each part with its name, and whether its results were there.
        loading: As in `ComposedForCausalLM.from_pretrained`.

    Returns:
        `arguments`, and `parts`: for each what lm-eval returns, under `results` the metrics.

    Raises:
        ImportError: If lm-eval is missing.
        ValueError: If there is no such task or part, or `output` holds results of other arguments.
    """
    require_lm_eval()
    from graftlm import harness

    config = read_config(os.fspath(folder))
    name_bases(config, loading.get("anchor"), loading.get("augmenting"))
    parts = list(parts or harness.part_names(config))
    for part in parts:
        harness.check_part(config, part)
    settings: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
    }
    flores = os.environ.get("GRAFTLM_FLORES200")
    arguments = settings | {
        "model": identity(config),
        "tasks": sorted(tasks),
        "seed": seed,
        "task_files": None if include_path is None else files_hash(Path(include_path)),
        "flores200": files_hash(Path(flores)) if flores else None,
        "chat_templates": harness.chat_templates(folder, config) if apply_chat_template else None,
        "loading": {name: str(loading[name]) for name in LOADING if loading.get(name)},
        **{name: version(name) for name in ("lm_eval", "graftlm", "torch", "transformers")},
    }
    report = read_report(output, arguments)
    model: Any = None
    manager: Any = None
    for part in parts:
        is_done = part in report["parts"]
        if on_part:
            on_part(part, is_done)
        if is_done:
            continue
        manager = manager or find_tasks(tasks, include_path)
        model = load(folder, device, **loading) if model is None else model
        settings |= {
            "tasks": manager.match_tasks(list(tasks)),
            "task_manager": manager,
            "use_cache": cache_path(use_cache, part, arguments),
            **seeds(seed),
        }
        found = run_part(harness.GraftLM(model, part, batch_size=batch_size), settings)
        samples = found.pop("samples", {})
        report["parts"][part] = found
        if output is not None:
            write_part(Path(output), part, samples, report)
    report["parts"] = {part: report["parts"][part] for part in parts}
    return report


def require_lm_eval() -> None:
    """Refuse to start without lm-eval.

    Raises:
        ImportError: Saying how to install it.
    """
    try:
        importlib.import_module("lm_eval")
    except ModuleNotFoundError as exc:
        raise ImportError(
            "evaluation needs the lm-eval package, which is missing; "
            "pip install 'graftlm[evaluate]'"
        ) from exc


def load(folder: str | os.PathLike[str], device: str | None, **loading: Any) -> Any:
    """The composed model, where it is to run."""
    import torch

    from graftlm.causal_lm import ComposedForCausalLM

    model = ComposedForCausalLM.from_pretrained(os.fspath(folder), **loading)
    if device is None and torch.cuda.is_available():
        device = "cuda"
    if device is not None and loading.get("device_map") is None:
        model.to(device)  # pyrefly: ignore[missing-argument, bad-argument-type]
    return model


def find_tasks(tasks: Sequence[str], include_path: str | os.PathLike[str] | None) -> Any:
    """lm-eval's index of tasks; its own 15,000 are left out where they are not needed.

    Raises:
        ValueError: If there is no such task.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not os.path.isdir(include_path):
        raise ValueError(f"include_path is {str(include_path)!r}, but there is no such folder")
    places: Any = [str(FOLDER), *([] if include_path is None else [os.fspath(include_path)])]
    manager = TaskManager(include_path=places, include_defaults=False)
    if all(manager.match_tasks([task]) for task in tasks):
        return manager
    manager = TaskManager(include_path=places)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ValueError(
                f"lm-eval has no task {task!r}; lm_eval ls tasks lists them, include_path adds some"
            )
    return manager


def run_part(lm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results for one part, and its samples; what lm-eval prints goes to stderr.

    Raises:
        ValueError: If lm-eval asserts that something does not fit, such as a length.
    """
    from lm_eval.evaluator import simple_evaluate

    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found: Any = simple_evaluate(model=lm, **settings)
        except AssertionError as exc:
            if not str(exc):
                raise
            raise ValueError(f"lm-eval refuses {lm.part}: {exc}") from exc
    gc.collect()  # tasks and their requests hold each other
    report = {name: found[name] for name in KEPT if name in found}
    report["seconds"] = round(time.perf_counter() - start, 1)
    return plain(report) | {"samples": found.get("samples", {})}


def seeds(seed: int | None) -> dict[str, int]:
    """One seed for all that is drawn; none leaves lm-eval's."""
    kinds = () if seed is None else ("random", "numpy_random", "torch_random", "fewshot_random")
    return {f"{kind}_seed": seed for kind in kinds if seed is not None}


# ---- what was asked, and what is there already ----------------------------------------------


def name_bases(config: ComposedConfig, anchor: Any, augmenting: Any) -> None:
    """Have a configuration say where the bases are taken from, if not from where they were."""
    given = for_augmenting(augmenting, list(config.augmenting_configs), "augmenting")
    for name, base in {"anchor": anchor, **given}.items():
        if base is not None:
            place = reference(base) if isinstance(base, PreTrainedModel) else os.fspath(base)
            config.bases.setdefault(name, {})["name_or_path"] = place


def identity(config: ComposedConfig) -> str:
    """A hash that tells one composed model from another, wherever it and its bases lie."""
    facts = {
        "bridges": config.weights_sha256,
        "bases": {name: base.get("fingerprint") for name, base in config.bases.items()},
        "scales": config.scales,
        "alignments": config.alignments,
        "connections": [str(connection) for connection in config.connections],
        "bridge": asdict(config.bridge),  # heads and positions show in no weight
        "reads": config.reads,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def files_hash(folder: Path) -> str:
    """A hash over the names and contents of all files below a folder of tasks."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def cache_path(
    use_cache: str | os.PathLike[str] | None, part: str, arguments: dict[str, Any]
) -> str | None:
    """Where lm-eval caches: its keys do not say which model answered, so the path must."""
    if use_cache is None:
        return None
    facts = json.dumps([arguments["model"], arguments["loading"]])
    model = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return f"{os.fspath(use_cache)}-{part}-{model}"


def read_report(output: str | os.PathLike[str] | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The results that are there, or none yet.

    Raises:
        ValueError: If they are of other arguments.
    """
    path = None if output is None else Path(output, RESULTS)
    if path is None or not path.exists():
        return {"arguments": arguments, "parts": {}}
    report = json.loads(path.read_text(encoding="utf-8"))
    theirs = report["arguments"]
    for name, value in arguments.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{path} holds results for {name} {theirs.get(name)!r}, not {value!r}; choose "
                "another output folder"
            )
    return report


# ---- files -------------------------------------------------------------------------------


def write_part(folder: Path, part: str, samples: dict[str, Any], report: dict[str, Any]) -> None:
    """A part's samples, one file a task, and then the results that name it as finished."""
    place = folder / "samples" / part
    place.mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        lines = (json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
        write_whole(place / f"{task}.jsonl", "".join(lines))
    write_whole(folder / RESULTS, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def plain(value: Any) -> Any:
    """The same as JSON has it."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable))
