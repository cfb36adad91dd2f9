"""Python's garbage collector, and why nobody waits for it."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Call once a process is ready to serve: what it has by now stays, and is looked through no more.

    A full collection visits every object there is, among them all that imports and loading made, while everybody's
    tokens wait: 50 ms in a gateway, 135 ms in a process that has torch. After this, only what requests leave behind.
    """
    gc.collect()
    gc.freeze()
