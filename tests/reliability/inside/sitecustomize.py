"""Python imports this at its start where PYTHONPATH names this folder: shows us the gateway's event loop from outside.

SIGUSR1 makes the gateway write to $RELIABILITY_FOLDER/loop-<pid>, as JSON, how many asyncio tasks are not done and the
longest time, since it was last asked, for which the loop did not come round.
"""

import gc
import json
import os
import signal
import sys
import threading
import time

TICK_S = 0.02
worst_s = 0.0


def write(number: int, frame: object) -> None:
    global worst_s
    import asyncio

    tasks = sum(isinstance(each, asyncio.Task) and not each.done() for each in gc.get_objects())
    path = os.path.join(os.environ["RELIABILITY_FOLDER"], f"loop-{os.getpid()}")
    with open(f"{path}.new", "w") as file:
        json.dump({"tasks": tasks, "worst_s": worst_s}, file)
    os.replace(f"{path}.new", path)
    worst_s = 0.0


def watch() -> None:
    global worst_s
    loop = None
    while loop is None:
        time.sleep(0.2)
        asyncio = sys.modules.get("asyncio")
        if hasattr(asyncio, "AbstractEventLoop"):
            loops = (each for each in gc.get_objects() if isinstance(each, asyncio.AbstractEventLoop))
            loop = next((each for each in loops if each.is_running()), None)
    came = threading.Event()
    while True:
        came.clear()
        asked_s = time.monotonic()
        try:
            loop.call_soon_threadsafe(came.set)
        except RuntimeError:  # it has ended
            return
        came.wait()
        worst_s = max(worst_s, time.monotonic() - asked_s)
        time.sleep(TICK_S)


if "RELIABILITY_FOLDER" in os.environ and "service.gateway" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, write)
    threading.Thread(target=watch, daemon=True).start()
