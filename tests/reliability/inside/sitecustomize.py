"""Python imports this at its start where PYTHONPATH names this folder: lets us count the gateway's tasks from outside.

SIGUSR1 makes it write how many asyncio tasks are not done to $RELIABILITY_FOLDER/tasks-<pid>.
"""

import os
import signal
import sys


def count_tasks(number: int, frame: object) -> None:
    import asyncio
    import gc

    tasks = sum(isinstance(each, asyncio.Task) and not each.done() for each in gc.get_objects())
    path = os.path.join(os.environ["RELIABILITY_FOLDER"], f"tasks-{os.getpid()}")
    with open(f"{path}.new", "w") as file:
        file.write(str(tasks))
    os.replace(f"{path}.new", path)


if "RELIABILITY_FOLDER" in os.environ and "service.gateway" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, count_tasks)
