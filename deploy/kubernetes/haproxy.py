"""python -m deploy.kubernetes.haproxy: writes haproxy.cfg, which is Compose's with a server for each replica by name.

Compose has one HAProxy and finds its replicas by a template, in the order in which DNS lists them. Here there are
several, and each must give a picture to the same replica: a server's place on the ring follows from its id, and a
StatefulSet's pod keeps its name when it is replaced.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "haproxy" / "haproxy.cfg"
OUTPUT = HERE / "haproxy.cfg"
MAX_REPLICAS = 16  # also in scaling.yaml
DOMAIN = "triton.crossgate.svc.cluster.local"
TEMPLATE = re.compile(r'^    server-template triton \S+ "\$\{TRITON_HOST\}":8001 (.*)$', re.MULTILINE)
HEADER = "# Written by `python -m deploy.kubernetes.haproxy` from deploy/haproxy/haproxy.cfg: make changes there.\n"


def main() -> int:
    OUTPUT.write_text(render(), encoding="utf-8")
    print(OUTPUT)
    return 0


def render() -> str:
    """Raises ValueError if the source has no server-template to replace."""
    text, count = TEMPLATE.subn(_servers, SOURCE.read_text(encoding="utf-8"))
    if not count:
        raise ValueError(f"{SOURCE} has no server-template line for triton")
    return HEADER + text


def _servers(template: re.Match[str]) -> str:
    return "\n".join(
        f"    server triton-{n} triton-{n}.{DOMAIN}:8001 id {n + 1} {template[1]}" for n in range(MAX_REPLICAS)
    )


if __name__ == "__main__":
    sys.exit(main())
