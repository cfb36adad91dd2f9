"""One engine and one build for all tests of this folder; `make test-compose` runs them."""

from __future__ import annotations

import sys
import time

import pytest

from tests.compose import images as builder
from tests.compose.engine import CACHE, running_engine, why_not
from tests.compose.stack import MAX_RUNNING, NUM_REPLICAS, Stack


def pytest_configure(config):
    config.addinivalue_line("markers", "compose: needs a Docker engine, or root and Debian's packages to start one")


def pytest_collection_modifyitems(config, items):
    """Leave them out of `make test`, and say why where they cannot run."""
    compose = [item for item in items if item.get_closest_marker("compose")]
    reason = why_not() if "compose" in config.option.markexpr else "run by `make test-compose`"
    if reason is not None:
        for item in compose:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def say(request):
    """To the terminal at once: builds take minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    begin_s = time.monotonic()

    def say(line):
        with capture.global_and_fixture_disabled():
            sys.stdout.write(f"\n[{time.monotonic() - begin_s:5.0f} s] {line}")
            sys.stdout.flush()

    return say


@pytest.fixture(scope="session")
def docker(say):
    CACHE.mkdir(parents=True, exist_ok=True)
    with running_engine() as docker:
        say(f"Docker engine {docker('version', '--format', '{{.Server.Version}}').strip()}, "
            f"Compose {docker('compose', 'version', '--short').strip()}")  # fmt: skip
        yield docker


@pytest.fixture(scope="session")
def images(docker, say):
    return builder.build(docker, say)


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    file = tmp_path_factory.mktemp("settings") / "settings.env"
    file.write_text(f"CROSSGATE_NUM_THREADS=1\nCROSSGATE_MAX_RUNNING={MAX_RUNNING}\n")
    return file


@pytest.fixture(scope="module")
def demo(docker, images, settings, say):
    """Profile cpu as it comes: the demo's checkpoint, one Triton, no balancer."""
    yield from brought_up(Stack(docker, images, settings, profiles=("cpu",)), say)


@pytest.fixture(scope="module")
def stack(docker, images, settings, say, tmp_path_factory):
    """Profiles cpu, observe and scale, with a tiny checkpoint."""
    from tests.checkpoints import make_idefics  # brings torch and transformers

    folder = make_idefics(tmp_path_factory.mktemp("checkpoint") / "tiny", max_position_embeddings=8192)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    profiles = ("cpu", "observe", "scale")
    scaled = Stack(docker, images, settings, profiles=profiles, num_replicas=NUM_REPLICAS, checkpoint=folder)
    yield from brought_up(scaled, say)


def brought_up(stack, say):
    begin_s = time.monotonic()
    try:
        stack.up()
        say(f"docker compose up: healthy after {time.monotonic() - begin_s:.0f} s")
        yield stack
    finally:
        stack.keep_logs()
        stack.down("--volumes", "--timeout", "5")
