from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import InvalidRequest
from service.gateway.http.server import listen
from service.gateway.settings import STAGE_VARIABLES, load_settings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("CROSSGATE_")] + ["HOST", "PORT", "TRITON_URL"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODEL_PATH", str(tmp_path / "my-model"))


def test_settings_come_from_the_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9000")
    monkeypatch.setenv("CROSSGATE_MAX_IMAGES", "3")
    settings = load_settings()
    assert (settings.port, settings.max_images, settings.served_name) == (9000, 3, "my-model")
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_the_stages_variables_are_known_and_others_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STAGE_VARIABLES:
        monkeypatch.setenv(name, "1")
    load_settings()
    monkeypatch.setenv("CROSSGATE_MAX_IMAGE", "3")
    with pytest.raises(InvalidRequest, match="CROSSGATE_MAX_IMAGE is not a setting"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "70000"),
        ("CROSSGATE_MAX_QUEUE", "-1"),
        ("MODEL_PATH", ""),
        ("CROSSGATE_CLIENT_TIMEOUT_S", "inf"),
        ("CROSSGATE_CLIENT_TIMEOUT_S", "70000"),
        ("CROSSGATE_PING_INTERVAL_S", "1e-9"),
        ("CROSSGATE_PICTURE_WORKERS", "1000000"),
        ("CROSSGATE_ISOLATE_KEYS", "perhaps"),
        ("CROSSGATE_ISOLATE_KEYS", "true"),  # there are no keys
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest) as caught:
        load_settings()
    assert caught.value.param == name and name in caught.value.message and "\n" not in caught.value.message


def test_keys_can_be_isolated_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load_settings().isolate_keys
    monkeypatch.setenv("CROSSGATE_ISOLATE_KEYS", "true")
    monkeypatch.setenv("CROSSGATE_API_KEYS_FILE", "keys")
    assert load_settings().isolate_keys


def test_keys_are_no_part_of_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load_settings().has_keys
    monkeypatch.setenv("CROSSGATE_API_KEYS", "sk-secret, two")
    settings = load_settings()
    assert settings.has_keys and "sk-secret" not in repr(settings)


@pytest.mark.parametrize("timeout_s", ["36000", "1e-9"])
def test_the_longest_and_the_shortest_time_for_a_client_are_taken_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch, timeout_s: str
) -> None:
    monkeypatch.setenv("CROSSGATE_CLIENT_TIMEOUT_S", timeout_s)
    listen("127.0.0.1", 0, load_settings().client_timeout_s).close()
