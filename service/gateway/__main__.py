"""python -m service.gateway: the gateway as the environment says. A mistake there is one line and exit status 2."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys

from service.errors import CrossgateError
from service.families import Family, load_family
from service.gateway.app import create_app
from service.gateway.http.server import listen, serve
from service.gateway.settings import Settings, load_settings
from service.gateway.stages.triton import TritonBackend
from service.gateway.telemetry.logs import configure_logs
from service.gateway.telemetry.tracing import Tracing, configure_tracing
from service.gateway.text.prompt import load_tokenizer
from service.heap import freeze_heap

log = logging.getLogger(__name__)


def main() -> int:
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = (
            "false"  # in the calling thread, which gives way to others, not in a pool
        )
        settings = load_settings()
        configure_logs(settings.log_level)
        family = load_family(settings.model_path)
        tracing, end_tracing = configure_tracing(os.environ)
        backend = _backend(settings, family, tracing)
        app = create_app(settings, family, load_tokenizer(settings.model_path), backend, tracing)
        ports = [settings.port] if settings.ops_port is None else [settings.port, settings.ops_port]
        listeners = [listen(settings.host, port, settings.client_timeout_s) for port in ports]
        if not settings.has_keys and not _is_local(listeners[0]):
            log.warning("no API keys are set: everybody who reaches %s may ask", settings.host)
        freeze_heap()
        serve(app, settings, listeners)
    except CrossgateError as error:
        print(f"crossgate: {error.message}", file=sys.stderr)
        return 2
    end_tracing()
    return 0


def _backend(settings: Settings, family: Family, tracing: Tracing) -> TritonBackend:
    return TritonBackend(
        settings.triton_url,
        config=family.config_identity,
        vision=family.vision,
        probe_token=family.bos_token_id or 0,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        tracing=tracing,
        shared_memory_bytes=settings.shared_memory,
    )


def _is_local(listener: socket.socket) -> bool:
    address, _, _ = listener.getsockname()[0].partition("%")
    return ipaddress.ip_address(address).is_loopback


if __name__ == "__main__":
    sys.exit(main())
