"""What an operator can set about the decoder, from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from service.dtype import default_dtype
from service.errors import InvalidRequest
from service.shares import DECODER_FRACTION, MemoryFractions

CPU_STEP_TOKENS = 512
# Beside 8 that decode, steps then take two to three times as long, anywhere in a prompt, since the scheduler counts
# what a token attends to; with 512 they would take twenty times as long.
CPU_PREFILL_TOKENS = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DecoderSettings:
    """`kv_blocks` and `image_pages` None: as many as fit (`pool_sizes`)."""

    device: str = "cpu"
    dtype: str = "float32"
    max_running: int = 32
    max_waiting: int = 256
    max_step_tokens: int = CPU_STEP_TOKENS
    max_prefill_tokens: int | None = None  # of a step in which others decode; None: no bound but the step's
    kv_blocks: int | None = None
    image_pages: int | None = None
    memory_fraction: float = DECODER_FRACTION  # of a GPU's whole memory

    def __post_init__(self) -> None:
        """Raises InvalidRequest for values that cannot work."""
        if self.dtype not in DTYPES:
            raise InvalidRequest(f"DTYPE must be one of {', '.join(DTYPES)}.", param="DTYPE")
        if self.max_step_tokens <= self.max_running:
            raise InvalidRequest(
                "CROSSGATE_MAX_STEP_TOKENS must be above CROSSGATE_MAX_RUNNING, or prompts would starve.",
                param="CROSSGATE_MAX_STEP_TOKENS",
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> DecoderSettings:
        """Raises InvalidRequest for values that are not positive integers, and for fractions that are none."""
        device = environment.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = device != "cpu"
        max_running = _integer(environment, "CROSSGATE_MAX_RUNNING") or (256 if on_gpu else 32)
        step_tokens = max(8192 if on_gpu else CPU_STEP_TOKENS, 2 * max_running)  # prompts get at least half of it
        prefill_tokens = None if on_gpu else CPU_PREFILL_TOKENS
        return cls(
            device=device,
            dtype=environment.get("DTYPE") or default_dtype(device),
            max_running=max_running,
            max_waiting=_integer(environment, "CROSSGATE_MAX_WAITING") or 256,
            max_step_tokens=_integer(environment, "CROSSGATE_MAX_STEP_TOKENS") or step_tokens,
            max_prefill_tokens=_integer(environment, "CROSSGATE_MAX_PREFILL_TOKENS") or prefill_tokens,
            kv_blocks=_integer(environment, "CROSSGATE_KV_BLOCKS"),
            image_pages=_integer(environment, "CROSSGATE_IMAGE_PAGES"),
            memory_fraction=MemoryFractions.from_environment(environment).decoder,
        )


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise InvalidRequest(f"{name} must be a positive integer.", param=name)
    return int(text)
