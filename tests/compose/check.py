"""python -m tests.compose.check: whether docker-compose.yml is a valid project, for every sensible set of profiles.

Needs no engine. Compose v2 is Docker's plugin, or Debian's, kept in .cache; where neither can be had, one line says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.compose.debian import install_plugins
from tests.compose.engine import CACHE, ROOT

PROFILES = ["cpu", "gpu", "cpu,observe", "gpu,observe", "cpu,scale", "cpu,scale,observe", "gpu,scale,observe"]


def compose_command() -> list[str] | None:
    plugin = ["docker", "compose"]
    if (
        shutil.which("docker")
        and subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode == 0
    ):
        return plugin
    folder = CACHE / "config" / "cli-plugins"
    try:
        install_plugins(folder)
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return None
    return [str(Path(folder) / "docker-compose")]


def main() -> int:
    command = compose_command()
    if command is None:
        print("crossgate: Compose v2 cannot be had here; docker-compose.yml is not checked", file=sys.stderr)
        return 0
    failed = 0
    for profiles in PROFILES:
        environment = {**os.environ, "COMPOSE_PROFILES": profiles}
        failed |= subprocess.run([*command, "config", "--quiet"], cwd=ROOT, env=environment, check=False).returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
