"""How the kernel treats clients' connections, so that one whose peer stalls or has vanished is not kept.

`connections` sees only what the kernel has no room for, so a stream that sends little would never be missed there.
"""

from __future__ import annotations

import socket

SEND_BUFFER_BYTES = 128 << 10  # of one connection; the kernel's own limit is megabytes, in which a stall goes unseen
NUM_PROBES = 3


def drop_stalled(listener: socket.socket, timeout_s: float) -> None:
    """Connections accepted from `listener` are aborted when their peer takes no byte of ours for `timeout_s`, or does
    not answer the kernel's probes in an idle connection for about as long. They inherit the options.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1e3)))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(timeout_s / 2)))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(timeout_s / 2 / NUM_PROBES)))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)
