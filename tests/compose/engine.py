"""A Docker engine with Compose v2: the one that runs here, or one of our own, ended when we are done."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.compose.debian import install_plugins

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "compose"  # images are kept from run to run
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class Docker:
    """The docker program with an environment that reaches one engine."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = {**os.environ, **environment}

    def __call__(self, *arguments: str, timeout_s: float = 120.0, **variables: str) -> str:
        """Standard output. Raises CalledProcessError, with both outputs in its notes."""
        result = subprocess.run(
            ["docker", *arguments],
            cwd=ROOT,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if result.returncode:
            error = subprocess.CalledProcessError(result.returncode, ["docker", *arguments])
            error.add_note(f"{result.stdout[-4000:]}\n{result.stderr[-8000:]}")
            raise error
        return result.stdout

    def shell(self, command: str) -> str:
        """Both outputs of a shell's command line, whatever its status."""
        return subprocess.run(
            command, shell=True, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=120, check=False,
        ).stdout  # fmt: skip

    def has(self, *arguments: str) -> bool:
        try:
            self(*arguments)
        except (OSError, subprocess.CalledProcessError):
            return False
        return True


def why_not() -> str | None:
    """Why no engine can be had here, in one line; None if one can."""
    if not shutil.which("docker"):
        return "needs Docker (on Debian: apt-get install docker.io debootstrap iptables iproute2)"
    if Docker({}).has("info"):
        return None
    missing = [name for name in ("dockerd", "debootstrap", "iptables", "ip") if not shutil.which(name)]
    if missing:
        return f"no Docker engine runs, and to start one {', '.join(missing)} is missing"
    if os.geteuid():
        return "no Docker engine runs, and only root can start one"
    return None


@contextmanager
def running_engine() -> Iterator[Docker]:
    config = CACHE / "config"
    docker = Docker({})
    if docker.has("info"):
        yield _with_plugins(docker, config)
        return
    # Sockets have short paths, and what belongs to the running daemon is of no use afterwards.
    with tempfile.TemporaryDirectory(prefix="crossgate-docker-") as state:
        address = f"unix://{state}/docker.sock"
        with (CACHE / "dockerd.log").open("wb") as log:
            daemon = subprocess.Popen(
                ["dockerd", "--data-root", str(CACHE / "data"), "--exec-root", f"{state}/exec", "--host", address,
                 "--pidfile", f"{state}/docker.pid"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                docker = _with_plugins(Docker({"DOCKER_HOST": address}), config)
                deadline = time.monotonic() + START_TIMEOUT_S
                while not docker.has("info"):
                    assert daemon.poll() is None, "dockerd did not start: see .cache/compose/dockerd.log"
                    assert time.monotonic() < deadline, "dockerd does not answer: see .cache/compose/dockerd.log"
                    time.sleep(0.5)
                yield docker
            finally:
                daemon.terminate()
                daemon.wait(STOP_TIMEOUT_S)


def _with_plugins(docker: Docker, config: Path) -> Docker:
    """The same, with Compose v2 and buildx: Debian's if the machine has none."""
    if docker.has("compose", "version") and docker.has("buildx", "version"):  # Compose v1 is no plugin of docker
        return docker
    install_plugins(config / "cli-plugins")
    return Docker({**docker.environment, "DOCKER_CONFIG": str(config)})
