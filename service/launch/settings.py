"""What the launcher takes from the environment, and the folders it works in."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from service.cores import num_cores
from service.dtype import default_dtype
from service.errors import InvalidRequest
from service.families.card import BYTES

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class LaunchSettings:
    """`model_path` None: the demo. `ops_port` None: the gateway answers probes at its one port."""

    model_path: Path | None
    host: str
    port: int
    device: str
    dtype: str  # of both stages
    num_threads: int  # of each model process
    ops_port: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> LaunchSettings:
        """Raises InvalidRequest, in one line for an operator, for a value that cannot be."""
        model_path = environment.get("MODEL_PATH")
        device = environment.get("DEVICE") or ("cuda" if has_gpu() else "cpu")
        return cls(
            model_path=Path(model_path).expanduser().resolve() if model_path else None,
            host=environment.get("HOST") or "127.0.0.1",
            port=_integer(environment, "PORT", 8000, range(65536)),
            device=device,
            dtype=_dtype(environment, device),
            num_threads=_integer(environment, "CROSSGATE_NUM_THREADS", num_cores(), range(1, 1025)),
            ops_port=_integer(environment, "CROSSGATE_OPS_PORT", 0, range(1, 65536)) or None,
        )

    @property
    def client_host(self) -> str:
        """Where this machine reaches the gateway."""
        return WILDCARDS.get(self.host, self.host)


def _dtype(environment: Mapping[str, str], device: str) -> str:
    dtype = environment.get("DTYPE") or default_dtype(device)
    if dtype not in BYTES:
        raise InvalidRequest(f"DTYPE={dtype} is not one of {', '.join(BYTES)}.", param="DTYPE")
    return dtype


def _integer(environment: Mapping[str, str], name: str, default: int, allowed: range) -> int:
    text = environment.get(name)
    if not text:
        return default
    if not text.isdecimal() or int(text) not in allowed:
        raise InvalidRequest(f"{name}={text} is not a number from {allowed.start} to {allowed.stop - 1}.", param=name)
    return int(text)


def has_gpu() -> bool:
    """Whether there is an NVIDIA driver and a torch that can use it; without the seconds that importing torch takes."""
    return Path("/dev/nvidiactl").exists() and not importlib.metadata.version("torch").endswith("+cpu")


def claim_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises InvalidRequest, in one line for an operator, if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise InvalidRequest(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another: PORT={port + 1} make serve",
            param="PORT",
        ) from error


def free_ports(count: int, *, besides: Collection[int] = ()) -> list[int]:
    """Different ports of the loopback, free now. `besides`: promised to others who do not listen there yet."""
    with contextlib.ExitStack() as listeners:
        sockets = [listeners.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count + len(besides))]
        ports = [int(listener.getsockname()[1]) for listener in sockets]
    return [port for port in ports if port not in besides][:count]
