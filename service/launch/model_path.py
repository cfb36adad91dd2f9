"""The checkpoint to serve: the operator's, or the demo, put together on first use."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from service.errors import Unavailable
from service.families import Family, load_family
from service.launch.settings import CACHE, ROOT

CONNECTOR = ROOT / "demo" / "connector.safetensors"
RECIPE = ("assemble", "encoder", "gguf_file", "packages", "recipe", "smollm2")


def load_checkpoint(model_path: Path | None) -> Family:
    """Raises InvalidRequest or Unavailable, in one line for an operator."""
    return load_family(model_path or demo_checkpoint())


def demo_checkpoint() -> Path:
    """Assembled into .cache/demo, anew when the trained connector or the recipe has changed.

    Raises Unavailable if that fails.
    """
    target, stamp = CACHE / "demo", CACHE / "demo" / ".assembled_from"
    try:
        sources = [CONNECTOR, *(CONNECTOR.with_name(f"{name}.py") for name in RECIPE)]
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    except OSError as error:
        raise Unavailable(f"The demo is incomplete: {error.filename} cannot be read.") from error
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return target
    command = [sys.executable, "-m", "demo.assemble", str(target), "--connector", str(CONNECTOR)]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise Unavailable("The demo checkpoint could not be assembled; the lines above say why.")
    stamp.write_text(digest, encoding="utf-8")
    return target
