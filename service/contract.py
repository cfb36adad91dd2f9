"""What the gateway and the two stages say to each other: types, tensor names, and the axis key.

Axes: B sequences · N flat tokens of a step · L text tokens · T pictures · S tiles of one picture or of
several · P patches · R latents of a page · D text width · E vision width · H query heads · K KV heads ·
C head width · V vocabulary.

`vision_encoder`  in  `pixels` UINT8 [B, 3, H, W], the whole canvas where a picture is cut into tiles
                  out `latents` FP32 (FP16 on GPU) [B, S, R, E], a page for each tile ·
                      `checkpoint` UINT8 [B, 32], the encoder's identity
`fused_decoder`   in  `input_ids` INT32 [L] · `image_keys` UINT8 [T, 32] (SHA-256) · `image_positions` INT32 [T] ·
                      `latents` [S, R, E] and `latent_index` INT32 [S] (row s is a tile of which of the T pictures;
                      a picture's rows stand together, in the order of its tiles, and a key has always as many) ·
                      `latents_checkpoint` UINT8 [S, 32], the identity of the encoder that made each row ·
                      `config` UINT8 [32], of the checkpoint by whose files the gateway made the prompt ·
                      `sampling` UINT8 [n], UTF-8 JSON of SamplingParams ·
                      `cache_salt` UINT8 [32], if nobody with another salt, or none, is to share its cached prefix
                      It refuses what another checkpoint has made: OtherCheckpoint.
                  out `token_ids` INT32 [n] · `event` UINT8 [m], UTF-8 JSON of TokenEvent without its token ids
                  Inputs whose first axis would be 0 are left out. JSON travels as UINT8 and not as BYTES, because the
                  Python stub of the Triton wheel predates NumPy 2 and fails on BYTES; DLPack carries the rest.

Knows nothing of HTTP, torch or Triton.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from service.errors import InvalidRequest

MAX_STOP_TOKEN_IDS = 64
MAX_SAMPLING_BYTES = 4096  # several times what the longest legal JSON has

VISION_ENCODER = "vision_encoder"
FUSED_DECODER = "fused_decoder"


class FinishReason(StrEnum):
    STOP = "stop"  # an EOS or stop token id, or (gateway) a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. `temperature` below 1e-5 is greedy; `top_k` None and `top_p` 1.0 are off.

    `seed` None draws a fresh one. `stop_token_ids` end a sequence beside the checkpoint's EOS ids, whose ids are
    not to be listed here; the token that ended a sequence is delivered. `ignore_eos` turns EOS off, for benchmarks.
    `stream` False asks for two messages: the first token when it is there, so that who waits knows that decoding has
    begun, and the rest at the end.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stream: bool = True

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the field that is of another type or out of range."""
        if not (_is_integer(self.max_tokens) and 1 <= self.max_tokens < 2**31):
            raise InvalidRequest("max_tokens must be an integer from 1 to 2**31 - 1.", param="max_tokens")
        if not (_is_number(self.temperature) and 0.0 <= self.temperature <= 2.0):
            raise InvalidRequest("temperature must be between 0 and 2.", param="temperature")
        if self.top_k is not None and not (_is_integer(self.top_k) and 1 <= self.top_k < 2**31):
            raise InvalidRequest("top_k must be an integer from 1 to 2**31 - 1.", param="top_k")
        if not (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidRequest("top_p must be above 0 and at most 1.", param="top_p")
        if self.seed is not None and not (_is_integer(self.seed) and 0 <= self.seed < 2**63):
            raise InvalidRequest("seed must be an integer from 0 to 2**63 - 1.", param="seed")
        if not isinstance(self.stop_token_ids, tuple) or len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"stop_token_ids must be a list of at most {MAX_STOP_TOKEN_IDS} token ids.", param="stop_token_ids"
            )
        if not all(_is_integer(token) and 0 <= token < 2**31 for token in self.stop_token_ids):
            raise InvalidRequest("stop_token_ids must be integers from 0 to 2**31 - 1.", param="stop_token_ids")
        for name in ("ignore_eos", "stream"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name} must be true or false.", param=name)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> SamplingParams:
        """Raises InvalidRequest for broken JSON, unknown fields and values out of range."""
        if len(text) > MAX_SAMPLING_BYTES:
            raise InvalidRequest(f"sampling may have at most {MAX_SAMPLING_BYTES} bytes.", param="sampling")
        try:
            fields = json.loads(text)
            if isinstance(fields.get("stop_token_ids"), list):
                fields["stop_token_ids"] = tuple(fields["stop_token_ids"])
            return cls(**fields)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidRequest("sampling must be a JSON object of SamplingParams.", param="sampling") from error


@dataclass(frozen=True)
class Usage:
    """What a request took. `cached_images`: distinct pictures whose K/V was already in the decoder's pool."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0
    cached_images: int = 0
    cached_prompt_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Milliseconds. `queue_ms`: arrival to first schedule; `prefill_ms`: to first token; `decode_ms`: to the last."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


@dataclass(frozen=True)
class TokenEvent:
    """Tokens that became ready together, one at least. A request's last has a finish reason, usage and timings."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None

    def to_json(self) -> str:
        """Everything but the token ids, which travel as a tensor."""
        fields: dict[str, Any] = {}
        if self.finish_reason is not None:
            fields["finish_reason"] = self.finish_reason
        if self.usage is not None:
            fields["usage"] = dataclasses.asdict(self.usage)
        if self.timings is not None:
            fields["timings"] = dataclasses.asdict(self.timings)
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str | bytes, token_ids: list[int]) -> TokenEvent:
        fields = json.loads(text)
        return cls(
            token_ids=tuple(token_ids),
            finish_reason=FinishReason(fields["finish_reason"]) if "finish_reason" in fields else None,
            usage=Usage(**fields["usage"]) if "usage" in fields else None,
            timings=Timings(**fields["timings"]) if "timings" in fields else None,
        )


@dataclass(frozen=True)
class ValidRequest:
    """A request past every check: what the fused decoder needs, less the latents.

    `image_positions[t]` is the index in `input_ids` of the image token of picture t, ascending; `image_keys[t]` its
    content key (64 hex digits). The same key may stand several times. `cache_salt`: 32 bytes, or none; requests share
    cached prefixes with those of the same alone. Their pictures they share by key, so the salt is in the keys already.
    """

    input_ids: tuple[int, ...]
    image_keys: tuple[str, ...] = ()
    image_positions: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: bytes = b""


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float)
