"""How many blocks and picture pages the decoder's pools get: as set, else as many as fit beside all the rest.

On a GPU there is the decoder's fraction of the whole, less what the process took at most while it computed the largest
step on pools of one page, weights included. So it does not matter which stage starts first. The arithmetic is that of
`service.shares`; what asks the GPU has been run with a stand-in for it alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from service.contract import SamplingParams, ValidRequest
from service.decoder.kv_blocks import BLOCK_SIZE
from service.decoder.model import Decoder
from service.decoder.page_pool import PagePool, PageShape
from service.decoder.runner import MAX_FILLED, Runner
from service.decoder.scheduler import Chunk, Step, num_blocks
from service.decoder.sequence import Sequence
from service.decoder.settings import DTYPES, DecoderSettings
from service.errors import InvalidRequest
from service.families.family import Family
from service.memory import free_host_bytes
from service.shares import MAX_PAGES, Pool, divide, text_share

HOST_SHARE = 0.25  # of a host's free memory; more if one context and one picture need it


def pool_sizes(family: Family, model: Decoder, settings: DecoderSettings, cuda: Any = torch.cuda) -> tuple[int, int]:
    """(blocks, picture pages). On a GPU the process is held to its fraction from then on, so that what PyTorch keeps
    for later is not the encoder's. `cuda`: a stand-in for it, where there is none.

    Raises InvalidRequest, in one line, if what is not set has no room for one context and one picture.
    """
    if settings.kv_blocks is not None and settings.image_pages is not None:
        return settings.kv_blocks, settings.image_pages
    config = family.decoder
    context = num_blocks(config.max_positions)
    text = Pool(_page_bytes(PageShape.of_text(config), settings), context, context * settings.max_running)
    max_pages = family.vision.max_pages
    pictures = Pool(_page_bytes(PageShape.of_images(config.cross_attention), settings), max_pages, MAX_PAGES)
    if settings.kv_blocks is not None:
        text = replace(text, least=settings.kv_blocks, most=settings.kv_blocks)
    if settings.image_pages is not None:
        pictures = replace(pictures, least=settings.image_pages, most=settings.image_pages)
    needed = text.least_bytes + pictures.least_bytes
    if settings.device == "cpu":
        free = free_host_bytes()
        room, whence = min(free, max(int(free * HOST_SHARE), needed)), "what the host has free"
    else:
        total = cuda.mem_get_info(settings.device)[1]
        taken = _taken_at_most(family, model, settings, cuda)
        cuda.set_per_process_memory_fraction(settings.memory_fraction, torch.device(settings.device).index)
        room = max(int(settings.memory_fraction * total) - taken, 0)
        whence = (
            f"CROSSGATE_DECODER_MEMORY_FRACTION={settings.memory_fraction} of {_megabytes(total)}, "
            f"less {_megabytes(taken)} of weights and a step"
        )
    if needed > room:
        raise InvalidRequest(
            f"K/V of {text.least * BLOCK_SIZE:,} tokens and {pictures.least:,} page(s) of pictures takes "
            f"{_megabytes(needed)}, and there is {_megabytes(room)}: {whence}. To make do with less, set "
            f"CROSSGATE_KV_BLOCKS and CROSSGATE_IMAGE_PAGES.",
            param="CROSSGATE_KV_BLOCKS" if settings.device == "cpu" else "CROSSGATE_DECODER_MEMORY_FRACTION",
        )
    return divide(room, text, pictures, text_share(config, max_pages))


def largest_step(family: Family, settings: DecoderSettings) -> Step:
    """As many tokens as a step takes, of as many sequences as run, all of which sample, and pictures; all on page 0.

    Some are whole prompts, the others one token each. A `top_k` of nearly all sorts the vocabulary, which takes most.
    """
    config, num_left = family.decoder, settings.max_step_tokens
    sampling = SamplingParams(temperature=1.0, top_k=max(config.num_logits - 1, 1))
    chunks = []
    for num_others in reversed(range(settings.max_running)):
        count = min(num_left - num_others, config.max_positions - 1)
        num_left -= count
        request = ValidRequest((0,) * count, ("",), (0,), sampling)
        sequence = Sequence(0, request, {}, family.see, arrival_s=0.0, seed=0)
        sequence.block_table, sequence.image_pages = [0] * num_blocks(count), {"": (0,)}
        chunks.append(Chunk.next(sequence, count))
    cross = config.cross_attention
    latents = torch.zeros(MAX_FILLED, cross.num_latents, cross.vision_width)
    return Step(chunks, [((0,) * MAX_FILLED, latents)])


def _page_bytes(shape: PageShape, settings: DecoderSettings) -> int:
    """Of a page, and of one layer of it once more: attention gathers the pages that a step uses, layer by layer."""
    return replace(shape, num_layers=shape.num_layers + 1).num_values * DTYPES[settings.dtype].itemsize


def _taken_at_most(family: Family, model: Decoder, settings: DecoderSettings, cuda: Any) -> int:
    """Bytes of the GPU that PyTorch has for this process while it computes the largest step, used or not."""
    config, weight = family.decoder, next(model.parameters())
    shapes = PageShape.of_text(config), PageShape.of_images(config.cross_attention)
    runner = Runner(model, *(PagePool(shape, 1, weight.device, weight.dtype) for shape in shapes))
    cuda.empty_cache()  # of what loading left
    cuda.reset_peak_memory_stats(settings.device)
    runner.run(largest_step(family, settings))
    taken: int = cuda.max_memory_reserved(settings.device)
    cuda.empty_cache()  # for the pools
    return taken


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
