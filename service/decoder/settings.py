"""What an operator can set about the decoder, from the environment, and what is derived where nothing is set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from service.decoder.kv_blocks import BLOCK_SIZE
from service.decoder.page_pool import PageShape
from service.dtype import default_dtype
from service.errors import InvalidRequest
from service.families.family import DecoderConfig
from service.memory import free_host_bytes

CPU_STEP_TOKENS = 512
# Beside 8 that decode, steps then take two to three times as long, anywhere in a prompt, since the scheduler counts
# what a token attends to; with 512 they would take twenty times as long.
CPU_PREFILL_TOKENS = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DecoderSettings:
    """`kv_blocks` and `image_pages` None: derived from free memory by `sized`."""

    device: str = "cpu"
    dtype: str = "float32"
    max_running: int = 32
    max_waiting: int = 256
    max_step_tokens: int = CPU_STEP_TOKENS
    max_prefill_tokens: int | None = None  # of a step in which others decode; None: no bound but the step's
    kv_blocks: int | None = None
    image_pages: int | None = None

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
        """Raises InvalidRequest for values that are not positive integers."""
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
        )

    def sized(self, config: DecoderConfig) -> tuple[int, int]:
        """(kv_blocks, image_pages): as set, else from the memory that is free once the weights are loaded.

        On a GPU 60 % goes to self-K/V and 20 % to pictures, on a CPU 20 % and 5 %, never more than `max_running`
        contexts or 16,384 pictures could use.
        """
        on_gpu = self.device != "cpu"
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else free_host_bytes()
        dtype = DTYPES[self.dtype]
        blocks_share, pages_share = (0.6, 0.2) if on_gpu else (0.2, 0.05)
        blocks = int(free * blocks_share) // (PageShape.of_text(config).num_values * dtype.itemsize)
        pages = int(free * pages_share) // (PageShape.of_images(config.cross_attention).num_values * dtype.itemsize)
        blocks = min(blocks, self.max_running * -(-config.max_positions // BLOCK_SIZE))
        return self.kv_blocks or max(blocks, 1), self.image_pages or max(min(pages, 16384), 1)


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise InvalidRequest(f"{name} must be a positive integer.", param=name)
    return int(text)
