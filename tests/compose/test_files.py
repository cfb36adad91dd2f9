"""What can be said about the deployment's files without an engine."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.compose.engine import ROOT

PINS = ROOT / "deploy" / "docker"


@pytest.mark.parametrize("image", ["gateway", "triton", "demo"])
def test_every_pin_of_an_image_has_one_version(image):
    for line in (PINS / f"requirements-{image}.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


@pytest.mark.parametrize(
    ("image", "extras"), [("gateway", ["gateway", "otel"]), ("triton", ["stages"]), ("demo", ["stages", "demo"])]
)
def test_images_install_what_pyproject_pins(image, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [*project["dependencies"], *(pin for extra in extras for pin in project["optional-dependencies"][extra])]
    wanted = {re.sub(r"\[.*?\]|[-_]", "", pin.lower()) for pin in pins}
    lines = (PINS / f"requirements-{image}.txt").read_text().lower().splitlines()
    missing = wanted - {re.sub(r"[-_]", "", line) for line in lines}
    assert not missing, "run: python deploy/docker/lock.py"


def test_torch_stays_out_of_the_gateway():
    assert "torch" not in (PINS / "requirements-gateway.txt").read_text()
