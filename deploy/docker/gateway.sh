#!/bin/sh
# The gateway image's entrypoint: what Compose cannot say conditionally, then the gateway itself.
set -eu

# API keys are optional: Compose mounts /dev/null where there are none, and a file with nothing in it is an error.
if [ ! -c /run/secrets/api_keys ] && [ -e /run/secrets/api_keys ]; then
    export CROSSGATE_API_KEYS_FILE=/run/secrets/api_keys
fi

# Compose starts the balancer of profile `scale` before us, so its name resolves exactly where that profile is on.
if [ -z "${TRITON_URL:-}" ]; then
    if getent hosts haproxy > /dev/null; then TRITON_URL=haproxy:8001; else TRITON_URL=triton:8001; fi
    export TRITON_URL
fi

exec python3 -m service.gateway "$@"
