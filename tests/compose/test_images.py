"""The two images, by themselves."""

from __future__ import annotations

import json

import pytest

from tests.compose.check import PROFILES

pytestmark = [pytest.mark.compose, pytest.mark.timeout(3600)]

MAX_GATEWAY_BYTES = 350_000_000


def test_gateway_image_is_under_350_mb(docker, images, say):
    num_bytes = json.loads(docker("image", "inspect", images.gateway))[0]["Size"]
    say(f"the gateway image has {num_bytes / 1e6:.0f} MB, its base included")
    assert num_bytes < MAX_GATEWAY_BYTES


def test_gateway_image_has_no_torch(docker, images):
    search = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    docker("run", "--rm", "--network", "none", "--entrypoint", "python3", images.gateway, "-c", search)


@pytest.mark.parametrize("name", ["gateway", "triton"])
def test_images_run_as_nobody_special_and_know_their_health(docker, images, name):
    config = json.loads(docker("image", "inspect", getattr(images, name)))[0]["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "python3", "bin/probe.py"]


def test_a_wrong_setting_is_one_line(docker, images):
    command = f"docker run --rm --network none -e CROSSGATE_MAX_IMAGE=1 {images.gateway}; echo $?"
    assert docker.shell(command).splitlines() == ["crossgate: CROSSGATE_MAX_IMAGE is not a setting of Crossgate.", "2"]


@pytest.mark.parametrize("profiles", PROFILES)
def test_every_sensible_set_of_profiles_is_a_valid_project(docker, profiles):
    config = json.loads(docker("compose", "config", "--format", "json", COMPOSE_PROFILES=profiles))
    for name, service in config["services"].items():
        assert service["cap_drop"] == ["ALL"] and service["read_only"] and service["security_opt"], name
        published = {port["host_ip"] for port in service.get("ports", [])}
        assert published <= {"127.0.0.1"} and (not published or not name.startswith("triton")), name
