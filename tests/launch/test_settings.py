from __future__ import annotations

import socket
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from service.errors import InvalidRequest
from service.launch.settings import LaunchSettings, claim_port, free_ports


def test_an_empty_environment_means_the_demo_on_the_loopback() -> None:
    settings = LaunchSettings.from_environment({"MODEL_PATH": ""})
    assert settings.model_path is None
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.num_threads >= 1


def test_what_is_set_counts(tmp_path: Path) -> None:
    environment = {"MODEL_PATH": str(tmp_path), "HOST": "0.0.0.0", "PORT": "81", "CROSSGATE_NUM_THREADS": "3"}
    settings = LaunchSettings.from_environment({**environment, "DEVICE": "cuda:1"})
    assert settings == LaunchSettings(tmp_path.resolve(), "0.0.0.0", 81, "cuda:1", "bfloat16", 3)
    assert settings.client_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("CROSSGATE_NUM_THREADS", "0"),
        ("DTYPE", "int8"),
        ("CROSSGATE_NUM_THREADS", "²"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        LaunchSettings.from_environment({name: value})
    assert caught.value.param == name


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"127.0.0.1:{port}"):
            claim_port("127.0.0.1", port)


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"192\.0\.2\.1"):
        claim_port("192.0.2.1", 0)


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_a_port_that_is_promised_is_not_given_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at a promised port yet, so the system may offer it again."""
    offered = [
        MagicMock(**{"__enter__.return_value.getsockname.return_value": ("127.0.0.1", port)}) for port in (1, 2, 3)
    ]
    monkeypatch.setattr(socket, "create_server", MagicMock(side_effect=offered))
    assert free_ports(2, besides=[2]) == [1, 3]
