"""What is started is ended."""

from __future__ import annotations

import subprocess
import sys

from loadtest.bench.systems import end_group
from tests.e2e.running import wait_until_gone

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_servers_workers_end_with_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    with process.stdout:
        worker = int(process.stdout.readline())
    end_group(process)
    assert process.returncode is not None
    assert not wait_until_gone({worker}, timeout_s=5.0)
