"""What counts as an answer, and as a failure."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

from loadtest.client import CHAT, GENERATE, Client
from loadtest.scenarios import Ask, Message
from tests.loadtest.fake_server import Behaviour, fake_server

ASK = Ask((Message("user", "What is it?", (1, 2)),))


def ask_once(url, ask, route, *, stream):
    with closing(Client(url)) as client:
        return client.ask(ask, route, stream=stream)


ROUTES = pytest.mark.parametrize("route", [CHAT, GENERATE])


@ROUTES
def test_stream_is_measured_from_sending_to_done(route):
    with fake_server(Behaviour(first_token_s=0.1, between_tokens_s=0.04)) as url:
        reply = ask_once(url, ASK, route, stream=True)
    assert reply.error is None
    assert reply.text == "word word word "
    assert reply.ttft_ms >= 100  # not the role's chunk, which comes at once
    assert len(reply.gaps_ms) == 2
    assert all(gap > 30 for gap in reply.gaps_ms)  # not read in blocks, where the first gap holds all and the rest none
    assert reply.e2e_ms >= reply.ttft_ms + sum(reply.gaps_ms)
    assert reply.usage["cached_images"] == 1
    assert reply.timings["prefill_ms"] == 20.0


@ROUTES
def test_whole_answer_is_read(route):
    with fake_server(Behaviour()) as url:
        reply = ask_once(url, ASK, route, stream=False)
    assert (reply.error, reply.text, reply.ttft_ms) == (None, "a red circle", None)
    assert reply.usage["completion_tokens"] == 3


@ROUTES
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("error_chunk", "in the stream: unavailable"),
        ("no_done", "the stream ended without [DONE]"),
        ("cut", "the stream ended without [DONE]"),
        ("overloaded", "429 overloaded"),
    ],
)
def test_every_fault_of_a_stream_is_a_failure(route, fault, error):
    with fake_server(Behaviour(fault=fault)) as url:
        reply = ask_once(url, ASK, route, stream=True)
    assert reply.error == error


def test_nobody_there_is_a_failure():
    assert ask_once("http://127.0.0.1:9", ASK, CHAT, stream=True).error == "ConnectionRefusedError"


def test_connection_is_used_again_after_a_success_and_not_after_a_failure():
    behaviour = Behaviour(first_token_s=0.0, between_tokens_s=0.0)
    with fake_server(behaviour) as url:
        client = Client(url)
        for stream in (True, True, False, True):
            assert client.ask(ASK, CHAT, stream=stream).error is None
        behaviour.fault = "error_chunk"
        client.ask(ASK, CHAT, stream=True)
        behaviour.fault = ""
        assert client.ask(ASK, CHAT, stream=True).error is None
        client.close()
    assert len(set(behaviour.ports[:5])) == 1
    assert behaviour.ports[5] != behaviour.ports[4]


def test_connection_that_idled_long_is_not_used_again(monkeypatch):
    """The server may just be closing it; what then breaks would be no failure of the server's."""
    monkeypatch.setattr("loadtest.client.KEEP_ALIVE_S", 0.05)
    behaviour = Behaviour()
    with fake_server(behaviour) as url, closing(Client(url)) as client:
        for _ in range(2):
            assert client.ask(ASK, CHAT, stream=True).error is None
            time.sleep(0.1)
    assert len(set(behaviour.ports)) == 2


def test_client_that_leaves_hangs_up_and_has_not_failed():
    behaviour = Behaviour(between_tokens_s=0.01)
    ask = Ask(ASK.messages, max_tokens=100, to_the_limit=True, leave_after=3)
    with fake_server(behaviour) as url:
        reply = ask_once(url, ask, CHAT, stream=True)
        deadline = time.monotonic() + 5
        while not behaviour.num_broken and time.monotonic() < deadline:
            time.sleep(0.01)
    assert (reply.left, reply.error, len(reply.gaps_ms)) == (True, None, 2)
    assert behaviour.num_broken == 1


def test_bodies_hold_every_picture_in_place():
    behaviour = Behaviour()
    with fake_server(behaviour) as url:
        client = Client(url)
        client.ask(ASK, CHAT, stream=True)
        client.ask(ASK, GENERATE, stream=False)
        client.close()
    chat, generate = behaviour.bodies
    parts = chat["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert generate["prompt"] == "<image><image>What is it?"
    assert generate["images"] == [part["image_url"]["url"] for part in parts[:2]]
    assert len(set(generate["images"])) == 2
