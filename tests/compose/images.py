"""The images of the deployment, built on stand-ins for the bases that would come from a registry."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.compose import debian
from tests.compose.engine import ROOT, Docker

STANDINS = ROOT / "tests" / "compose" / "standins"
BUILD_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Images:
    gateway: str = "crossgate-test/gateway"
    triton: str = "crossgate-test/triton"
    demo: str = "crossgate-test/demo"
    haproxy: str = "crossgate-standin/haproxy"
    prometheus: str = "crossgate-standin/prometheus"


def build(docker: Docker, say: Callable[[str], None]) -> Images:
    """Everything that was built before and has not changed comes from the engine's cache."""
    images = Images()
    bases = _imported(docker, say)
    standin_triton = "crossgate-standin/triton"
    for target, tag in (
        ("triton", standin_triton),
        ("haproxy", images.haproxy),
        ("prometheus", images.prometheus),
    ):
        say(f"building a stand-in for {target}")
        _build(docker, STANDINS, target, tag, bases)
    for target, tag in (("gateway", images.gateway), ("triton", images.triton), ("demo", images.demo)):
        say(f"building the {target} image")
        _build(docker, ROOT, target, tag, {"GATEWAY_BASE": bases["DEBIAN"], "TRITON_BASE": standin_triton})
    return images


def _imported(docker: Docker, say: Callable[[str], None]) -> dict[str, str]:
    """The arguments of the stand-ins' Dockerfile. An image's tag says what went into it."""
    certificates = Path(debian.pip_options().get("cert", "/etc/ssl/certs/ca-certificates.crt")).read_bytes()
    settings = repr((debian.SUITE, debian.PACKAGES, debian.LEFT_OUT, sorted(debian.pip_options().items())))
    tag = hashlib.sha256(settings.encode() + certificates).hexdigest()[:12]
    bases = {"DEBIAN": f"crossgate-standin/debian:{tag}", "WHEELS": f"crossgate-standin/wheels:{tag}"}
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "archive.tar"
        if not docker.has("image", "inspect", bases["DEBIAN"]):
            say(f"bootstrapping Debian {debian.SUITE}")
            debian.bootstrap(Path(folder) / "root", archive)
            docker("import", str(archive), bases["DEBIAN"], timeout_s=BUILD_TIMEOUT_S)
        if not docker.has("image", "inspect", bases["WHEELS"]):
            debian.wheels(archive)
            docker("import", str(archive), bases["WHEELS"], timeout_s=BUILD_TIMEOUT_S)
    return bases


def _build(docker: Docker, context: Path, target: str, tag: str, arguments: dict[str, str]) -> None:
    given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    command = ["build", "--network", "host", "--target", target, "--tag", tag, *given, str(context)]
    try:
        docker(*command, timeout_s=BUILD_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"building {target} failed: {' '.join(error.__notes__)}") from None
