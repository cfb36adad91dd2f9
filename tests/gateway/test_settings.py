from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import InvalidRequest
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
    ("name", "value"), [("PORT", "http"), ("PORT", "70000"), ("CROSSGATE_MAX_QUEUE", "-1"), ("MODEL_PATH", "")]
)
def test_a_wrong_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest) as caught:
        load_settings()
    assert caught.value.param == name and name in caught.value.message and "\n" not in caught.value.message


def test_api_keys_come_from_variable_and_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings().read_api_keys() == frozenset()
    keys = tmp_path / "keys"
    keys.write_text("three\n\n")
    monkeypatch.setenv("CROSSGATE_API_KEYS", "one, two")
    monkeypatch.setenv("CROSSGATE_API_KEYS_FILE", str(keys))
    settings = load_settings()
    assert settings.read_api_keys() == {"one", "two", "three"}
    assert "two" not in repr(settings)
    keys.write_text("\n")
    monkeypatch.delenv("CROSSGATE_API_KEYS")
    with pytest.raises(InvalidRequest, match="holds no key"):
        load_settings().read_api_keys()
