"""python -m service.launch: checkpoint, Triton, gateway, the first question; then watches until Ctrl-C.

What an operator got wrong is one line and exit status 2. `--no-question` leaves the first question out; `--once` stops
after it, with exit status 0 if it was answered.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time

from service.errors import CrossgateError, Unavailable
from service.families import Family
from service.families.card import ModelCard
from service.launch import first_question
from service.launch.client import answers_within
from service.launch.model_path import load_checkpoint
from service.launch.services import LOOPBACK, log_folder, make_services
from service.launch.settings import ROOT, LaunchSettings, claim_port, free_ports
from service.launch.supervisor import Supervisor
from service.launch.triton import TritonPorts, remove_stale_shared_memory


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m service.launch")
    parser.add_argument("--no-question", action="store_true", help="do not ask the first question")
    parser.add_argument("--once", action="store_true", help="stop after the first question")
    arguments = parser.parse_args()
    try:
        settings = LaunchSettings.from_environment()
        port = claim_port(settings.host, settings.port)
        family = load_checkpoint(settings.model_path)
        return serve(settings, family, port, question=not arguments.no_question, once=arguments.once)
    except CrossgateError as error:
        print(f"crossgate: {error.message}", file=sys.stderr, flush=True)
        return 2


def serve(settings: LaunchSettings, family: Family, port: int, *, question: bool, once: bool) -> int:
    """Returns once everything is stopped. Raises Unavailable if Triton or the gateway does not start."""
    begin_s = time.monotonic()
    ports = TritonPorts(*free_ports(3, besides=[port]))
    gateway, triton = make_services(settings, family, port, ports)
    supervisor = Supervisor([gateway, triton], say)
    card = ModelCard.of(family, settings.dtype)
    say(f"loading {family.folder} on {settings.device} with {settings.num_threads} threads: {card.line()}")
    answer: list[bool] = []  # of the asking thread, once it has asked

    def ask() -> None:
        try:
            answer.append(first_question.ask(family, settings.client_host, port))
            print(f"\n  Ask the next:\n\n{first_question.how_to_ask(family, settings.client_host, port)}\n", flush=True)
        except OSError as error:  # no picture to ask about
            answer.append(False)
            say(f"the first question was not asked: {error}")
        supervisor.wake()

    try:
        with supervisor.running():
            if supervisor.wait_until_ready():
                if not answers_within(settings.client_host, settings.ops_port or port, "/readyz", timeout_s=60.0):
                    raise Unavailable(f"The models are loaded but do not answer; see {log_folder(port)}.")
                say(
                    f"ready in {time.monotonic() - begin_s:.1f} s (Triton and the models {triton.ready_s:.1f} s, the "
                    f"gateway beside them {gateway.ready_s:.1f} s)"
                )
                logs = log_folder(port).relative_to(ROOT)
                say(f"http://{settings.client_host}:{port}/docs; Ctrl-C stops; logs in {logs}/")
                say(f"Triton at {LOOPBACK}: gRPC {ports.grpc}, HTTP {ports.http}, /metrics {ports.metrics}")
                if question:
                    threading.Thread(target=ask, daemon=True).start()
            if supervisor.wait(lambda: once and bool(answer)):
                return 0 if answer[0] else 1
            say("stopping: running requests may finish; Ctrl-C again stops at once")
            return 0
    finally:
        remove_stale_shared_memory()


def say(line: str) -> None:
    print(f"crossgate: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
