"""The service as `make serve` runs it, for tests: real Triton, real gateway, on free ports, ended by process id."""

from __future__ import annotations

import base64
import io
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180.0


class Running:
    """`python -m service.launch` and what it printed. Nothing of it outlives `stop`. `root`: the checkout that runs."""

    def __init__(self, *arguments: str, root: Path = ROOT, **environment: str) -> None:
        self._root = root
        self.lines: list[str] = []
        self._arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.launch", *arguments],
            cwd=root,
            env={
                **os.environ,
                "PORT": "0",
                "DEVICE": "cpu",
                "DTYPE": "float32",
                "CROSSGATE_NUM_THREADS": "1",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))
                self._arrived.put(line)
        self._arrived.put(None)

    def wait_for(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """The first line that matches, printed already or yet to come."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for line in self.lines:
                if match := re.search(pattern, line):
                    return match
            try:
                if self._arrived.get(timeout=max(0.0, deadline_s - time.monotonic())) is None and not any(
                    re.search(pattern, line) for line in self.lines
                ):
                    raise AssertionError("the launcher ended; it said:\n" + "\n".join(self.lines))
            except queue.Empty:
                raise AssertionError(f"no {pattern!r} in time; it said:\n" + "\n".join(self.lines)) from None

    def wait_until_ready(self) -> None:
        self.port = int(self.wait_for(r"http://127\.0\.0\.1:(\d+)/docs")[1])
        triton = self.wait_for(r"gRPC (\d+), HTTP (\d+), /metrics (\d+)")
        self.triton_grpc_port, self.triton_http_port, self.metrics_port = (int(port) for port in triton.groups())
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_for_end(self, timeout_s: float = 60.0) -> int:
        """The exit status, once all its output is read."""
        status = self.process.wait(timeout_s)
        self._reader.join(10.0)
        return status

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(10.0)
        print(*self.lines, sep="\n")  # pytest shows it beside a failure
        if hasattr(self, "port"):
            shutil.rmtree(self._root / ".cache" / "log" / str(self.port), ignore_errors=True)

    def metric(self, name: str, **labels: str) -> float:
        """A value from Triton's /metrics, 0 if it is not there yet."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", headers={"connection": "close"}).text
        for line in text.splitlines():
            if line.startswith((name + " ", name + "{")) and all(
                f'{key}="{value}"' in line for key, value in labels.items()
            ):
                return float(line.rpartition(" ")[2])
        return 0.0

    def encoder_executions(self) -> float:
        return self.metric("nv_inference_exec_count", model="vision_encoder")

    def encoded_pictures(self) -> float:
        return self.metric("nv_inference_count", model="vision_encoder")


def descendants(pid: int) -> set[int]:
    """Pids of the processes below this one."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in {pid, *found}} - found:
        found |= more
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def wait_until_gone(pids: set[int], timeout_s: float) -> set[int]:
    """Those that still run after the timeout. A zombie has ended: reaping it is its parent's business."""
    deadline_s = time.monotonic() + timeout_s
    while alive := {pid for pid in pids if _runs(pid)}:
        if time.monotonic() > deadline_s:
            return alive
        time.sleep(0.05)
    return set()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def picture(seed: int, size: int = 40) -> bytes:
    """A PNG of noise, another for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def question(*pictures: bytes, prompt: str | None = None, **fields: Any) -> dict[str, Any]:
    """A body for /v1/generate: greedy, ids returned, with as many marks as pictures."""
    text = prompt if prompt is not None else "<image>" * len(pictures) + "What is this?"
    body = {"prompt": text, "images": [data_url(png) for png in pictures], "max_tokens": 8, "return_token_ids": True}
    return {**body, **fields}


def interrupt(running: Running) -> None:
    running.process.send_signal(signal.SIGINT)
