"""Isolated keys through real stages: another key's question leaves no trace in what is cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests.e2e.running import Running, picture, question

TEXT = {"prompt": "a long prompt without any picture, that fills a block and more " * 3, "max_tokens": 2}


def cached(service: Running, key: str, body: dict[str, Any]) -> tuple[int, bool]:
    """(cached pictures, whether a part of the prompt was cached)"""
    response = httpx.post(
        f"{service.url}/v1/generate", json=body, timeout=60, headers={"authorization": f"Bearer {key}"}
    )
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    return usage["cached_images"], usage["cached_prompt_tokens"] > 0


def test_a_key_finds_cached_what_it_has_sent_itself_and_nothing_else(tiny_checkpoint: Path) -> None:
    service = Running(
        "--no-question",
        MODEL_PATH=str(tiny_checkpoint),
        CROSSGATE_API_KEYS="alice:sk-a,bob:sk-b",
        CROSSGATE_ISOLATE_KEYS="true",
    )
    try:
        service.wait_until_ready()
        seen = question(picture(7), prompt=f"<image>{TEXT['prompt']}")
        assert [cached(service, key, seen) for key in ("sk-a", "sk-b")] == [(0, False), (0, False)]
        assert [cached(service, key, seen) for key in ("sk-a", "sk-b")] == [(1, True), (1, True)]
        assert [cached(service, key, TEXT) for key in ("sk-a", "sk-b")] == [(0, False), (0, False)]
        assert [cached(service, key, TEXT) for key in ("sk-a", "sk-b")] == [(0, True), (0, True)]
    finally:
        service.stop()
