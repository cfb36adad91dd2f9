"""Asks the running service about a picture, streams the answer to the terminal, and says how to ask the next."""

from __future__ import annotations

import base64
import http.client
import time
from pathlib import Path

from service.families import Family
from service.launch.client import stream_events
from service.launch.settings import ROOT

PICTURE = ROOT / "demo" / "examples" / "first_question.png"
QUESTION = "What is in the picture?"
NEXT_QUESTION = "Is there a dog in the picture?"
TIMEOUT_S = 120.0


def ask(family: Family, host: str, port: int, picture: Path = PICTURE) -> bool:
    """Whether an answer came. A base model without a chat template is asked in plain text."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    if family.chat_template is None:
        path = "/v1/generate"
        body = {"prompt": f"<image>Question: {QUESTION} Answer:", "images": [url], "stream": True, "max_tokens": 32}
    else:
        path = "/v1/chat/completions"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        body = {"messages": [{"role": "user", "content": parts}], "stream": True}
    print(f"\n  {picture.relative_to(ROOT)}\n  > {QUESTION}\n  ", end="", flush=True)
    begin_s, first_s, answered = time.monotonic(), None, False
    try:
        for event in stream_events(host, port, path, body, TIMEOUT_S):
            if "error" in event:
                print(f"\n  {event['error']['message']}", end="")
                return False
            text = event.get("text") or "".join(
                choice["delta"].get("content") or "" for choice in event.get("choices", [])
            )
            if text and first_s is None:
                first_s = time.monotonic() - begin_s
            print(text.replace("\n", "\n  "), end="", flush=True)
            answered = answered or bool(text)
    except (OSError, http.client.HTTPException):
        print("\n  no answer came", end="")
        return False
    finally:
        print(flush=True)
    if first_s is not None:
        print(f"  ({first_s:.2f} s to the first token, {time.monotonic() - begin_s:.2f} s in all)", flush=True)
    return answered


def how_to_ask(family: Family, host: str, port: int, picture: Path = PICTURE) -> str:
    """The curl for the next question."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    shown = picture.relative_to(ROOT)
    if family.chat_template is None:
        prompt = f"<image>Question: {NEXT_QUESTION} Answer:"
        return f"curl -N {url}/v1/generate -F image=@{shown} -F 'prompt={prompt}' -F stream=true"
    return (
        f"""(printf '{{"stream":true,"messages":[{{"role":"user","content":["""
        f"""{{"type":"image_url","image_url":{{"url":"data:image/png;base64,'; base64 -w0 {shown}; """
        f"""printf '"}}}},{{"type":"text","text":"{NEXT_QUESTION}"}}]}}]}}') | \\\n"""
        f"""  curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d @-"""
    )
