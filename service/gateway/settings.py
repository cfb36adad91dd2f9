"""The gateway's settings: read from the environment once, then frozen.

`MODEL_PATH`, `HOST`, `PORT`, `TRITON_URL` have no prefix; everything else is `CROSSGATE_` and the field's name in
capitals. An unknown `CROSSGATE_*` variable is an error, so that a misspelt limit is not silently without effect.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.dtype import default_dtype
from service.errors import InvalidRequest

PREFIX = "CROSSGATE_"
STAGE_VARIABLES = frozenset(  # read by the two stages and the launcher, which share our environment
    {
        "CROSSGATE_MAX_RUNNING",
        "CROSSGATE_MAX_WAITING",
        "CROSSGATE_MAX_PREFILL_TOKENS",
        "CROSSGATE_MAX_STEP_TOKENS",
        "CROSSGATE_KV_BLOCKS",
        "CROSSGATE_IMAGE_PAGES",
        "CROSSGATE_DECODER_MEMORY_FRACTION",
        "CROSSGATE_ENCODER_MEMORY_FRACTION",
        "CROSSGATE_NUM_THREADS",
    }
)


class Settings(BaseSettings):
    """Times in seconds. A field with an alias is that variable; the others are CROSSGATE_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, populate_by_name=True)

    model_path: Path = Field(validation_alias="MODEL_PATH")
    host: str = Field("127.0.0.1", validation_alias="HOST")
    port: int = Field(8000, ge=0, le=65535, validation_alias="PORT")
    ops_port: int | None = Field(None, ge=1, le=65535)  # probes and metrics listen there alone; unset: at PORT, too
    triton_url: str = Field("127.0.0.1:8001", validation_alias="TRITON_URL")  # gRPC host:port
    device: str = Field("", validation_alias="DEVICE")  # of the stages, as this and the next; empty: not known here
    dtype: str = Field("", pattern="^(|float32|bfloat16|float16)$", validation_alias="DTYPE")
    shared_memory_bytes: int | None = Field(None, ge=0)  # with Triton; unset: 1 GiB if it is at a loopback address
    model_name: str = ""  # as clients call it; empty: the name of the checkpoint's folder

    api_keys: SecretStr = SecretStr("")  # NAME:KEY or KEY, separated by commas; none at all: no authentication
    api_keys_file: Path | None = None  # one a line, with comments; looked at again when it changes
    isolate_keys: bool = False  # each key has its own cached pictures and prefixes

    max_images: int = Field(16, ge=0)  # of one request
    max_image_bytes: int = Field(10 << 20, ge=1)  # of one picture's file
    max_image_pixels: int = Field(32_000_000, ge=1, le=89_000_000)  # of one picture; Pillow's own limit is above it
    picture_memory_bytes: int = Field(192 << 20, ge=16 << 20)  # of all pictures decoded at a time, and so of one
    picture_workers: int | None = Field(
        None, ge=1, le=1024
    )  # processes that decode; unset: one more than cores, at most 5
    picture_timeout_s: float = Field(10.0, gt=0)  # for decoding one picture
    max_body_bytes: int = Field(64 << 20, ge=1)
    max_json_bytes: int = Field(1 << 20, ge=1)  # of a body, apart from the pictures in it
    max_inflight_body_bytes: int = Field(128 << 20, ge=1)  # of all bodies together, until their pictures are decoded
    max_header_bytes: int = Field(16 << 10, ge=1024)  # of one request
    max_connections: int = Field(1024, ge=1)
    max_concurrent_requests: int = Field(64, ge=1)
    max_shared_requests: int = Field(8, ge=1)  # of the above, while several keys share them: docs/keys.md says more
    max_queue: int = Field(128, ge=0)  # requests that wait for one of the above
    max_concurrent_encodes: int = Field(32, ge=1)  # pictures at the vision encoder: one batch runs, the next fills up
    default_max_tokens: int = Field(256, ge=1)

    first_token_timeout_s: float = Field(120.0, gt=0)
    inter_token_timeout_s: float = Field(60.0, gt=0)
    encode_timeout_s: float = Field(30.0, gt=0)
    request_timeout_s: float = Field(600.0, gt=0)  # from arrival: for waiting, pictures and every attempt together
    restart_wait_s: float = Field(60.0, ge=0)  # of a request without its first token, for a stage that restarts
    heartbeat_period_s: float = Field(2.0, gt=0)
    heartbeat_timeout_s: float = Field(5.0, gt=0)
    client_timeout_s: float = Field(60.0, gt=0, le=36_000)  # for a client to take the last piece
    header_timeout_s: float = Field(10.0, gt=0)  # for a client to send the whole head of a request
    body_timeout_s: float = Field(60.0, gt=0)  # for a client to send the whole body
    ping_interval_s: float = Field(10.0, ge=0.05)  # of silence in a stream, then a comment
    keep_alive_s: float = Field(75.0, gt=0)  # for an idle connection; above the 60 s after which balancers close theirs
    drain_timeout_s: float = Field(30.0, ge=0)

    latents_cache_bytes: int = Field(64 << 20, ge=0)
    max_resident_keys: int = Field(4096, ge=0)  # pictures that we remember the decoder to hold
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")

    @field_validator("isolate_keys")
    @classmethod
    def _has_keys_to_isolate(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not (
            info.data.get("api_keys", SecretStr("")).get_secret_value() or info.data.get("api_keys_file")
        ):
            raise ValueError("there are no keys: set CROSSGATE_API_KEYS or CROSSGATE_API_KEYS_FILE")
        return value

    @field_validator("max_inflight_body_bytes")
    @classmethod
    def _holds_the_longest(cls, value: int, info: ValidationInfo) -> int:
        """A quarter is kept for small bodies, and the longest must fit into the rest, or it would never be read."""
        if value // 4 * 3 < info.data.get("max_body_bytes", 0):
            raise ValueError("three quarters of it must hold CROSSGATE_MAX_BODY_BYTES")
        return value

    @property
    def served_name(self) -> str:
        return self.model_name or self.model_path.resolve().name

    @property
    def dtype_of_stages(self) -> str | None:
        """What they compute in. None if nothing says so here."""
        return self.dtype or (default_dtype(self.device) if self.device else None)

    @property
    def shared_memory(self) -> int:
        """Bytes, for latents that are too large to be sent."""
        host = self.triton_url.rpartition(":")[0]
        is_local = host in ("localhost", "[::1]") or host.startswith("127.")
        return (1 << 30 if is_local else 0) if self.shared_memory_bytes is None else self.shared_memory_bytes

    @property
    def has_keys(self) -> bool:
        return bool(self.api_keys.get_secret_value()) or self.api_keys_file is not None


def load_settings() -> Settings:
    """Settings of this process. Raises InvalidRequest, in one line for an operator, naming the variable."""
    variables = {_variable(field) for field in Settings.model_fields}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in variables and name not in STAGE_VARIABLES:
            raise InvalidRequest(f"{name} is not a setting of Crossgate.", param=name)
    if not os.environ.get("MODEL_PATH"):
        raise InvalidRequest("MODEL_PATH is not set: it names the checkpoint's folder.", param="MODEL_PATH")
    try:
        return Settings()  # type: ignore[call-arg]  # the environment gives what is missing
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0])
        name = field if field in variables else _variable(field)
        raise InvalidRequest(f"{name} has a wrong value: {problem['msg']}.", param=name) from error


def _variable(field: str) -> str:
    alias = Settings.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else PREFIX + field.upper()
