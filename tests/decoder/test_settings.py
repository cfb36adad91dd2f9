from __future__ import annotations

import pytest

from service.decoder.settings import DecoderSettings
from service.errors import InvalidRequest


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("max_running", ["1", "32", "100", "6000"])
def test_a_step_has_room_for_prompts_beside_all_that_may_run(device: str, max_running: str) -> None:
    settings = DecoderSettings.from_environment({"DEVICE": device, "CROSSGATE_MAX_RUNNING": max_running})
    assert settings.max_step_tokens >= 2 * settings.max_running


def test_what_is_set_counts() -> None:
    environment = {"DEVICE": "cpu", "CROSSGATE_MAX_RUNNING": "4", "CROSSGATE_MAX_STEP_TOKENS": "5"}
    settings = DecoderSettings.from_environment({**environment, "CROSSGATE_MAX_PREFILL_TOKENS": "3"})
    assert (settings.max_running, settings.max_step_tokens, settings.max_prefill_tokens) == (4, 5, 3)


def test_steps_too_short_for_any_prompt_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="CROSSGATE_MAX_STEP_TOKENS"):
        DecoderSettings.from_environment({"DEVICE": "cpu", "CROSSGATE_MAX_STEP_TOKENS": "32"})
