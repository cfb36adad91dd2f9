"""python -m service.capacity MODEL_PATH --gpu-memory 80GB --dtype bfloat16 --bandwidth 3.35TB/s

How many tokens and pages of pictures fit beside the decoder's weights, and the most decode tokens/s that bandwidth
allows. With s bytes per number (2 for bfloat16), X gated blocks, n layers, names as in `contract`:

    token bytes    = 2 · n · K · C · s                      its K and V in every layer
    page bytes     = 2 · X · R · K' · C' · s                of a picture, or a tile of it, in every gated block
    free           = memory · fraction - weights - step     CROSSGATE_DECODER_MEMORY_FRACTION; tensors of a step
    text           = free · c / (c + 32 · p)                c, p: bytes of a full context, of the largest picture
    tokens         = text / (token bytes · (1 + 1/n))
    pages          = (free - text) / (page bytes · (1 + 1/X))
    bytes per step = weights read + B · (context · token bytes + seen · page bytes)
    tokens/s      <= B · bandwidth / bytes per step

This is the rule of `shares`, by which the engine makes its pools; the engine measures what a step takes, here it is
estimated. One layer more is what attention gathers. Pages are 16,384 at most, and tokens have what they leave; the
engine has no more tokens than CROSSGATE_MAX_RUNNING full contexts. CROSSGATE_IMAGE_PAGES and CROSSGATE_KV_BLOCKS set
either.

A step reads each weight once, whatever the batch, but of an untied embedding only the rows it looks up; it writes one
token's K/V a sequence, which is left out. The ceiling is of reading alone: it supposes that computing hides behind it,
which ends at the batch where the GPU's arithmetic becomes the limit, and no kernel reaches all of the bandwidth.

Knows nothing of torch or GPUs. Source: the roofline model (Williams et al., 2009); Pope et al., arXiv 2211.05102, §2.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from service.errors import CrossgateError
from service.families import load_family
from service.families.card import BYTES, ModelCard, in_bytes
from service.families.family import DecoderConfig
from service.shares import DECODER_FRACTION, MAX_PAGES, Pool, divide, text_share

BLOCK_SIZE = 16  # tokens; K/V is handed out in whole blocks
BATCHES = (1, 4, 16, 32, 64, 128, 256)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Capacity:
    """Bytes, and what fits into them."""

    num_parameters: int
    weight_bytes: int
    read_bytes: int  # weights that a decode step reads
    token_bytes: int
    page_bytes: int
    num_tokens: int
    num_pages: int

    def step_bytes(self, batch: int, context: int, seen: int) -> int:
        """What a decode step of `batch` sequences reads, each of `context` tokens and looking at `seen` pages."""
        return self.read_bytes + batch * (context * self.token_bytes + seen * self.page_bytes)

    def max_batch(self, context: int) -> int:
        """Sequences of `context` tokens that fit at once."""
        return self.num_tokens // (-(-context // BLOCK_SIZE) * BLOCK_SIZE)


def plan(config: DecoderConfig, dtype: str, memory_bytes: int, max_pages: int = 1) -> Capacity:
    """`memory_bytes`: what there is for the decoder's weights and K/V. Nothing fits: the counts are 0.

    `max_pages`: of one picture.
    """
    size, parameters, cross = BYTES[dtype], config.num_parameters, config.cross_attention
    unread = 0 if config.tied_head else config.vocab_size * config.width
    free = max(0, memory_bytes - parameters * size)
    block_bytes = BLOCK_SIZE * replace(config, num_layers=config.num_layers + 1).token_kv_bytes(size)
    page_bytes = replace(cross, layers=(*cross.layers, config.num_layers)).picture_kv_bytes(size)
    text, pictures = Pool(block_bytes, 0, free), Pool(page_bytes, 0, MAX_PAGES)
    num_blocks, num_pages = divide(free, text, pictures, text_share(config, max_pages))
    return Capacity(
        num_parameters=parameters,
        weight_bytes=parameters * size,
        read_bytes=(parameters - unread) * size,
        token_bytes=config.token_kv_bytes(size),
        page_bytes=cross.picture_kv_bytes(size),
        num_tokens=num_blocks * BLOCK_SIZE,
        num_pages=num_pages,
    )


def parse_size(text: str) -> int:
    """ "80GB" -> 80·10⁹, "80GiB" -> 80·2³⁰, "3.35TB/s" -> 3.35·10¹². Raises ValueError."""
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]i?)?b?(?:/s)?", text.strip().lower())
    if not found:
        raise ValueError(text)
    return int(float(found[1]) * _UNITS[found[2] or ""])


def describe(
    name: str, config: DecoderConfig, capacity: Capacity, bandwidth: int, context: int, seen: int, max_pages: int
) -> str:
    """`seen`: pictures, the largest that there are, of `max_pages` each."""
    cross = config.cross_attention
    heads, picture_heads = config.attention, cross.attention
    per_token = f"2 · {config.num_layers} layers · {heads.num_kv_heads} heads · {heads.head_width}"
    per_picture = f"2 · {len(cross.layers)} gated blocks · {cross.num_latents} latents · "
    per_picture += f"{picture_heads.num_kv_heads} heads · {picture_heads.head_width}"
    ratio = capacity.page_bytes / capacity.token_bytes
    page = "a picture " if max_pages == 1 else "a tile    "
    of_tiles = "" if max_pages == 1 else f", pictures have 1 to {max_pages} tiles"
    lines = [
        f"{name}: {capacity.num_parameters / 1e6:,.1f} M parameters in the decoder, {in_bytes(capacity.weight_bytes)}",
        f"a token    {in_bytes(capacity.token_bytes)} of K/V: {per_token}",
        f"{page} {in_bytes(capacity.page_bytes)} of K/V: {per_picture}; as much as {ratio:,.1f} tokens{of_tiles}",
        f"room for   {capacity.num_tokens:,} tokens ({capacity.max_batch(context):,} sequences of {context:,}) and"
        f" {capacity.num_pages // max_pages:,} pictures" + (" of the largest kind" if max_pages > 1 else ""),
        "",
        f"ceiling from {in_bytes(bandwidth)}/s, each sequence {context:,} tokens long, looking at {seen} picture(s):",
        f"{'batch':>7} {'bytes a step':>14} {'ms a step':>11} {'tokens/s':>10}",
    ]
    for batch in BATCHES:
        step_bytes = capacity.step_bytes(batch, context, seen * max_pages)
        fits = "" if batch <= capacity.max_batch(context) else "   does not fit"
        milliseconds = step_bytes / bandwidth * 1e3
        rate = batch * bandwidth / step_bytes
        lines.append(f"{batch:>7} {in_bytes(step_bytes):>14} {milliseconds:>11.3f} {rate:>10,.0f}{fits}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.capacity", description=__doc__.partition("\n")[2])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model_path", type=Path, help="a checkpoint's folder; its config.json is enough")
    parser.add_argument("--gpu-memory", type=parse_size, default="80GB", metavar="80GB")
    parser.add_argument("--bandwidth", type=parse_size, default="3.35TB/s", metavar="3.35TB/s")
    parser.add_argument("--dtype", choices=sorted(BYTES), default="bfloat16")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a sequence, prompt and answer")
    parser.add_argument("--pictures", type=int, default=1, help="pictures that a token looks at")
    parser.add_argument("--fraction", type=float, default=DECODER_FRACTION, help="the decoder's of the memory")
    parser.add_argument("--step", type=parse_size, default="2GB", metavar="2GB", help="what a step's tensors take")
    options = parser.parse_args(arguments)
    if options.context < 1 or options.pictures < 0 or not 0 < options.fraction <= 1:
        parser.error("context must be above 0, pictures at least 0, fraction above 0 and at most 1")
    try:
        family = load_family(options.model_path)
    except CrossgateError as error:
        print(f"crossgate: {error.message}", file=sys.stderr)
        return 2
    memory_bytes = int(options.gpu_memory * options.fraction) - options.step
    max_pages = family.vision.max_pages
    capacity = plan(family.decoder, options.dtype, memory_bytes, max_pages)
    print(ModelCard.of(family, options.dtype).line())
    title = f"{family.name} in {options.dtype}, {options.fraction:.0%} of {in_bytes(options.gpu_memory)}"
    print(describe(title, family.decoder, capacity, options.bandwidth, options.context, options.pictures, max_pages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
