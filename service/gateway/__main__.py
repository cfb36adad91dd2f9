"""python -m service.gateway: the gateway as the environment says. A mistake there is one line and exit status 2."""

from __future__ import annotations

import sys

from service.errors import CrossgateError
from service.families import Family, load_family
from service.gateway.app import create_app
from service.gateway.logs import configure_logs
from service.gateway.prompt import load_tokenizer
from service.gateway.server import listen, serve
from service.gateway.settings import Settings, load_settings
from service.gateway.triton import TritonBackend


def main() -> int:
    try:
        settings = load_settings()
        configure_logs(settings.log_level)
        family = load_family(settings.model_path)
        app = create_app(settings, family, load_tokenizer(settings.model_path), _backend(settings, family))
        listener = listen(settings.host, settings.port)
    except CrossgateError as error:
        print(f"crossgate: {error.message}", file=sys.stderr)
        return 2
    serve(app, listener, settings.drain_timeout_s)
    return 0


def _backend(settings: Settings, family: Family) -> TritonBackend:
    return TritonBackend(
        settings.triton_url,
        image_size=family.vision.encoder.image_size,
        probe_token=family.bos_token_id or 0,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
    )


if __name__ == "__main__":
    sys.exit(main())
