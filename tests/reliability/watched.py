"""The gateway's process as an operator sees it, and its event loop through `inside/sitecustomize.py`."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

INSIDE = Path(__file__).with_name("inside")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class LoopState:
    """`tasks`: not done. `worst_s`: the longest time for which the loop did not come round since it was last asked."""

    tasks: int
    worst_s: float


def watching(folder: Path) -> dict[str, str]:
    """What to add to a gateway's environment."""
    return {"PYTHONPATH": str(INSIDE), "RELIABILITY_FOLDER": str(folder)}


def loop_state(folder: Path, pid: int, url: str, timeout_s: float = 30.0) -> LoopState | None:
    """None if it does not say in time."""
    path = folder / f"loop-{pid}"
    path.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline_s:
            return None
        with suppress(httpx.TransportError):  # a loop that sleeps runs no Python
            httpx.get(f"{url}/livez", timeout=2.0, verify=False)
        time.sleep(0.02)
    return LoopState(**json.loads(path.read_text()))


def resident_bytes(pid: int) -> int:
    """Of a process and of all below it. Cheap enough to be asked ten times a second."""
    total = 0
    with suppress(OSError):
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                total += sum(resident_bytes(int(child)) for child in (thread / "children").read_text().split())
    return total
