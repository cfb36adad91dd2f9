"""locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 -u 16 -t 2m --headless [SCENARIO …]

Every user class is a scenario; named on the command line they run alone, unnamed all of them together. Three entries a
scenario: TTFT, ITL (each gap between pieces of an answer), E2E; only E2E counts failures. `docs/loadtest.md` says how
to read them. Speaks HTTP only.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # locust loads this file by its path

from locust import User, constant, constant_throughput, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadtest.client import CHAT, GENERATE, Client, Reply
from loadtest.record import Recorder, Sample
from loadtest.scenarios import SCENARIOS, Ask

ROUTES = {"chat": (CHAT,), "generate": (GENERATE,), "both": (CHAT, GENERATE)}
STREAMS = {"yes": (True,), "no": (False,), "both": (True, True, True, False)}

ERROR_PAUSE_S = 1.0  # as a person would; without it a server that refuses is hammered


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=0.0, help="open loop: requests/s of all users; 0: closed loop")
    parser.add_argument("--think-s", type=float, default=0.0, help="closed loop: pause between answer and question")
    parser.add_argument("--route", choices=sorted(ROUTES), default="both")
    parser.add_argument("--stream", choices=sorted(STREAMS), default="both", help="both: three of four stream")
    parser.add_argument("--seed", type=int, default=None, help="the same pictures and questions again")
    parser.add_argument("--record", default="", help="folder for loadtest.report")
    parser.add_argument("--api-key", default="", env_var="CROSSGATE_API_KEY", is_secret=True)


@events.test_start.add_listener
def open_record(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    if not options.record:
        return
    about = {
        "host": environment.host,
        "scenarios": [user.__name__ for user in environment.user_classes],
        "users": options.num_users,
        "arrival": f"open, {options.rate:g} requests/s" if options.rate else f"closed, {options.think_s:g} s pause",
        "route": options.route,
        "stream": options.stream,
        "seed": options.seed,
        "start": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    environment.recorder = Recorder(Path(options.record), about)


@events.test_stop.add_listener
def close_record(environment: Environment, **_: Any) -> None:
    recorder = getattr(environment, "recorder", None)
    if recorder is not None:
        environment.recorder = None
        recorder.close()


class Asking(User):
    """A person who asks, reads the answer, and asks again."""

    abstract = True
    scenario = ""

    def on_start(self) -> None:
        options = self.environment.parsed_options
        number = self.environment.runner.user_count
        seed = None if options.seed is None else f"{options.seed} {self.scenario} {number}"
        self.rng = random.Random(seed)
        self.asks = SCENARIOS[self.scenario](self.rng)
        self.answer: str | None = None  # None: the first question is still to come
        self.client = Client(self.host, api_key=options.api_key or None)
        self.routes, self.streams = ROUTES[options.route], STREAMS[options.stream]
        if options.rate:
            wait = constant_throughput(options.rate / max(1, options.num_users))
            time.sleep(self.rng.random() * options.num_users / options.rate)  # or all would arrive together
            self._cp_last_run = time.perf_counter()  # constant_throughput would count that sleep as a task
        else:
            wait = constant(options.think_s)
        self.wait_time = functools.partial(wait, self)

    def on_stop(self) -> None:
        self.client.close()

    @task
    def ask(self) -> None:
        ask: Ask = next(self.asks) if self.answer is None else self.asks.send(self.answer)
        route = CHAT if ask.chat_only else self.rng.choice(self.routes)
        stream = ask.leave_after is not None or self.rng.choice(self.streams)
        reply = self.client.ask(ask, route, stream=stream)
        self.answer = reply.text
        self._tell(reply, route, stream)
        if reply.error:
            time.sleep(ERROR_PAUSE_S)

    def _tell(self, reply: Reply, route: str, stream: bool) -> None:
        name = f"{self.scenario} {route.removeprefix('/v1/')}{' stream' if stream else ''}"
        fire = functools.partial(self.environment.events.request.fire, name=name, response_length=0, context={})
        if reply.ttft_ms is not None:
            fire(request_type="TTFT", response_time=reply.ttft_ms, exception=None)
        for gap in reply.gaps_ms:
            fire(request_type="ITL", response_time=gap, exception=None)
        kind = "LEFT" if reply.left else "E2E"
        fire(request_type=kind, response_time=reply.e2e_ms, exception=reply.error)
        recorder = getattr(self.environment, "recorder", None)
        if recorder is not None:
            recorder.add(Sample.of(reply, scenario=self.scenario, route=route, stream=stream))


class UniquePictures(Asking):
    scenario, weight = "unique_pictures", 2


class HotPicture(Asking):
    scenario, weight = "hot_picture", 2


class ZipfMix(Asking):
    scenario, weight = "zipf_mix", 4


class MultiTurnChat(Asking):
    scenario, weight = "multi_turn_chat", 2


class TextOnly(Asking):
    scenario, weight = "text_only", 2


class ManyPictures(Asking):
    scenario, weight = "many_pictures", 1


class ShortAnswers(Asking):
    scenario, weight = "short_answers", 1


class LongAnswers(Asking):
    scenario, weight = "long_answers", 1


class LeavingClients(Asking):
    scenario, weight = "leaving_clients", 1
