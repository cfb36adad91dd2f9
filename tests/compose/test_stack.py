"""The whole deployment on a real engine, as an operator would meet it; the last test takes it down."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

from deploy.grafana import queries
from tests.compose.client import Answer, ask, at_once, load, outcomes
from tests.compose.stack import MAX_RUNNING, NUM_REPLICAS, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

WHOLE_AGAIN_S = 60.0
NUM_CLIENTS = 10
NO_GPU = "no GPU here: the queries of dcgm-exporter's panels are left out"


def test_containers_have_no_rights_and_triton_publishes_no_port(stack):
    containers = stack.containers()
    assert len(stack.replicas()) == NUM_REPLICAS
    for container in containers:
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"], container["Name"]
        assert "no-new-privileges:true" in host["SecurityOpt"], container["Name"]
        addresses = {binding["HostIp"] for bindings in (host["PortBindings"] or {}).values() for binding in bindings}
        assert addresses <= {"127.0.0.1"}, container["Name"]
    assert not any(one["HostConfig"]["PortBindings"] for one in stack.replicas())


def test_a_question_with_a_picture_is_answered_and_the_second_time_from_the_cache(stack):
    first, second = (ask(stack.gateway, 1, max_tokens=16) for _ in range(2))
    assert first.is_complete and first.usage["completion_tokens"] == 16 and first.usage["cached_images"] == 0
    assert second.is_complete and second.usage["cached_images"] == 1


def test_text_alone_is_answered(stack):
    assert ask(stack.gateway, None, max_tokens=8).is_complete


def test_the_same_picture_asked_50_times_lands_on_one_replica(stack, say):
    before = stack.picture_queries()
    for _ in range(50):
        assert ask(stack.gateway, 2, max_tokens=2).is_complete
    asked = {name: count - before[name] for name, count in stack.picture_queries().items()}
    say(f"50 questions about one picture: {asked}")
    assert sorted(asked.values()) == [0, 50]


def test_a_hot_picture_beyond_the_load_bound_spreads(stack, say):
    before = stack.picture_queries()
    answers = at_once(stack.gateway, 2, max_tokens=64, count=16)
    asked = {name: count - before[name] for name, count in stack.picture_queries().items()}
    say(f"16 questions about one picture at once: {asked}")
    assert outcomes(answers) == {"complete": 16}
    assert min(asked.values()) >= 2, "the bound is 150 % of the average, so about a quarter goes elsewhere"


def test_prometheus_sees_every_part(stack):
    def reached():
        return {
            job: sum(float(one["value"][1]) for one in stack.query(f'up{{job="{job}"}}'))
            for job in ("gateway", "triton", "haproxy", "prometheus")
        }

    wanted = {"gateway": 1, "triton": NUM_REPLICAS, "haproxy": 1, "prometheus": 1}
    wait_until(lambda: reached() == wanted, 60, f"Prometheus reaches {wanted}")


def test_every_query_of_the_dashboard_returns_data(stack, say):
    assert httpx.post(f"{stack.gateway}/v1/generate", json={"promt": "x"}, timeout=10).status_code == 400
    asked = [query for query in queries.panel_queries() if not query.needs_gpu]
    say(f"{len(asked)} queries of the dashboard; {NO_GPU}")

    def empty():
        return [query for query in asked if not queries.ask(stack.prometheus, query, "1m")]

    with load(stack.gateway, num_clients=2, max_tokens=16):
        wait_until(lambda: not empty(), 90, "every query has data")


@pytest.mark.parametrize(
    ("program", "argument"), [("tritonserver", "model-repository"), ("triton_python_backend_stub", "fused_decoder")]
)
def test_a_death_under_load_costs_no_request_that_had_no_token(stack, say, program, argument):
    wait_until(stack.is_whole, WHOLE_AGAIN_S, "whole before")
    victim = stack.replicas()[0]
    with load(stack.gateway, NUM_CLIENTS, max_tokens=400) as answers:
        wait_until(lambda: stack.gauge(victim, "crossgate_decoder_num_requests_waiting") >= 2, 60, "two wait there")
        num_before = len(answers)
        stack.kill_inside(victim, program, argument)
        killed_s = time.monotonic()
        wait_until(lambda: restarted(stack, victim), WHOLE_AGAIN_S, f"{victim['Name']} is started anew")
        wait_until(stack.is_whole, WHOLE_AGAIN_S, "whole again")
        whole_s = time.monotonic() - killed_s
    told = outcomes(answers)
    say(f"{program} killed: whole again after {whole_s:.1f} s; {dict(told)}")
    assert whole_s < WHOLE_AGAIN_S
    assert outcomes(answers[:num_before]).keys() <= {"complete"}
    assert told.keys() == {"complete", "clean error after the first token"}, [a for a in answers if not a.is_complete]
    assert told["clean error after the first token"] <= MAX_RUNNING


def restarted(stack, victim):
    now = next(one for one in stack.replicas() if one["Id"] == victim["Id"])
    return now["RestartCount"] > victim["RestartCount"] and now["State"]["Running"]


def test_down_drains_without_dropping_a_running_stream(stack, say):
    wait_until(stack.is_whole, WHOLE_AGAIN_S, "whole before")
    stack.keep_logs()
    started = threading.Event()
    answers: list[Answer] = []
    client = threading.Thread(target=lambda: answers.append(ask(stack.gateway, 3, 1500, started)), daemon=True)
    client.start()
    assert started.wait(30)
    begin_s = time.monotonic()
    down = threading.Thread(target=stack.down)
    down.start()
    wait_until(lambda: httpx.get(f"{stack.gateway}/readyz", timeout=10).status_code == 503, 30, "draining")
    assert client.is_alive(), "the stream was to run still when the gateway was told to stop"
    down.join()
    client.join(10)
    down_s = time.monotonic() - begin_s
    say(f"down after {down_s:.1f} s; the stream that ran meanwhile: {answers[0].outcome}")
    assert answers[0].is_complete and answers[0].num_tokens == 1500
    assert stack.containers() == []
