"""A process of its own that answers one line of JSON with another: what runs in it disturbs nobody else's threads.

What it prints goes to standard error, so that no library can break the protocol.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from service.cores import num_cores
from service.launch.settings import ROOT

STOP_TIMEOUT_S = 20.0


def environment() -> dict[str, str]:
    """The same for every system: all cores, and nothing from a network."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(num_cores()), "HF_HUB_OFFLINE": "1"}


class Worker:
    """`python -m MODULE ARGUMENTS…`, which calls `serve`. Ready when made."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._read()
        except RuntimeError:
            self.stop()
            raise

    def ask(self, **message: Any) -> dict[str, Any]:
        """Raises RuntimeError, with the worker's traceback, if it fails."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self._module} failed:\n{answer['error']}")
        return answer


def serve(start: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """In the worker: `start` loads what it needs and returns what answers messages. Until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    handle = start()
    say({"ready": True})
    for line in sys.stdin:
        try:
            say(handle(json.loads(line)))
        except Exception:
            say({"error": traceback.format_exc()})
