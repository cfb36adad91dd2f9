"""Which checkpoint a folder holds, as a digest of its bytes.

Two of them: `config_identity` over the small files, by which the gateway makes prompts and pixels, and
`checkpoint_identity` over these and every byte of the weights, which takes as long as reading them. No digest is kept
on disk: a time stamp does not show that bytes are the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from service.errors import Unavailable

SMALL = ("*.json", "*.jinja", "*.model", "*.txt")  # config, preprocessing, index, tokenizer, chat template
WEIGHTS = ("*.safetensors",)
PART_BYTES = 16 << 20  # hashed apart, so that threads share a file
READ_BYTES = 1 << 20
MAX_THREADS = 8


def checkpoint_identity(folder: Path) -> str:
    """64 hex digits, other ones if any byte of config, tokenizer or weights differs, or the name of a file."""
    digest = hashlib.sha256(config_identity(folder).encode())
    files = [(path, path.stat().st_size) for path in _files(folder, WEIGHTS)]
    digest.update("".join(f"{path.name}\0{size}\0" for path, size in files).encode() + b"\0")
    parts = [(path, start) for path, size in files for start in range(0, size, PART_BYTES)]
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        for part in threads.map(_hash_part, parts):
            digest.update(part)
    return digest.hexdigest()


def config_identity(folder: Path) -> str:
    """64 hex digits over everything but the weights. Milliseconds."""
    digest = hashlib.sha256()
    for path in _files(folder, SMALL):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """For whoever loads weights and says whose they are. Raises Unavailable if a file was replaced in the meantime."""
    before = _stamps(folder)
    yield
    if _stamps(folder) != before:
        raise Unavailable("The checkpoint was changed while it was loaded.")


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _hash_part(part: tuple[Path, int]) -> bytes:
    path, start = part
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = PART_BYTES
        while left and (count := file.readinto(buffer[: min(left, READ_BYTES)])):
            digest.update(buffer[:count])  # without Python's lock
            left -= count
    return digest.digest()


def _stamps(folder: Path) -> list[tuple[str, int, int, int]]:
    stats = [(path.name, path.stat()) for path in _files(folder, (*SMALL, *WEIGHTS))]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
