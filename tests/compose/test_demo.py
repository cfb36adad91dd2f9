"""`docker compose --profile cpu up`, with nothing set: the demo is in its volume, and answers."""

from __future__ import annotations

import base64

import httpx
import pytest

from tests.compose.engine import ROOT

pytestmark = [pytest.mark.compose, pytest.mark.timeout(3600)]


def test_the_demo_answers_about_a_picture(demo, say):
    picture = base64.b64encode((ROOT / "demo/examples/first_question.png").read_bytes()).decode()
    question = "What is in the picture?"
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": question},
    ]
    body = {"model": "crossgate", "messages": [{"role": "user", "content": parts}], "max_tokens": 32}
    reply = httpx.post(f"{demo.gateway}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    answer = reply.json()["choices"][0]["message"]["content"]
    say(f"{question} {answer}")
    assert "fox" in answer.lower()
