"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def num_cores() -> int:
    """Those of its affinity, and of its container's CPU quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota: "max"
        return cores
