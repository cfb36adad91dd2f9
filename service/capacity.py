"""python -m service.capacity MODEL_PATH --gpu-memory 80GB --dtype bfloat16 --bandwidth 3.35TB/s

How many pictures and tokens fit beside the decoder's weights, and the most decode tokens/s that bandwidth allows.
Reads config.json only. With s bytes per number (2 for bfloat16), X gated blocks, n layers, names as in `contract`:

    token bytes    = 2 · n · K · C · s                      its K and V in every layer
    picture bytes  = 2 · X · R · K' · C' · s                its K and V in every gated block
    free           = memory · fraction - weights - step     CROSSGATE_DECODER_MEMORY_FRACTION; tensors of a step
    tokens         = free · 75 % / (token bytes · (1 + 1/n))
    pictures       = free · 25 % / (picture bytes · (1 + 1/X))
    bytes per step = weights read + B · (context · token bytes + seen · picture bytes)
    tokens/s      <= B · bandwidth / bytes per step

This is the rule of `shares`, by which the engine makes its pools; the engine measures what a step takes, here it is
estimated. One layer more is what attention gathers. Pictures are 16,384 at most, and tokens have what they leave; the
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
from service.families.family import DecoderConfig
from service.shares import DECODER_FRACTION, MAX_PICTURES, Pool, divide

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
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
    picture_bytes: int
    num_tokens: int
    num_pictures: int

    def step_bytes(self, batch: int, context: int, seen: int) -> int:
        """What a decode step of `batch` sequences reads, each of `context` tokens and looking at `seen` pictures."""
        return self.read_bytes + batch * (context * self.token_bytes + seen * self.picture_bytes)

    def max_batch(self, context: int) -> int:
        """Sequences of `context` tokens that fit at once."""
        return self.num_tokens // (-(-context // BLOCK_SIZE) * BLOCK_SIZE)


def plan(config: DecoderConfig, dtype: str, memory_bytes: int) -> Capacity:
    """`memory_bytes`: what there is for the decoder's weights and K/V. Nothing fits: the counts are 0."""
    size, parameters, cross = DTYPE_BYTES[dtype], config.num_parameters, config.cross_attention
    unread = 0 if config.tied_head else config.vocab_size * config.width
    free = max(0, memory_bytes - parameters * size)
    block_bytes = BLOCK_SIZE * replace(config, num_layers=config.num_layers + 1).token_kv_bytes(size)
    page_bytes = replace(cross, layers=(*cross.layers, config.num_layers)).picture_kv_bytes(size)
    num_blocks, num_pictures = divide(free, Pool(block_bytes, 0, free), Pool(page_bytes, 0, MAX_PICTURES))
    return Capacity(
        num_parameters=parameters,
        weight_bytes=parameters * size,
        read_bytes=(parameters - unread) * size,
        token_bytes=config.token_kv_bytes(size),
        picture_bytes=cross.picture_kv_bytes(size),
        num_tokens=num_blocks * BLOCK_SIZE,
        num_pictures=num_pictures,
    )


def parse_size(text: str) -> int:
    """ "80GB" -> 80·10⁹, "80GiB" -> 80·2³⁰, "3.35TB/s" -> 3.35·10¹². Raises ValueError."""
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]i?)?b?(?:/s)?", text.strip().lower())
    if not found:
        raise ValueError(text)
    return int(float(found[1]) * _UNITS[found[2] or ""])


def describe(name: str, config: DecoderConfig, capacity: Capacity, bandwidth: int, context: int, seen: int) -> str:
    cross = config.cross_attention
    heads, picture_heads = config.attention, cross.attention
    per_token = f"2 · {config.num_layers} layers · {heads.num_kv_heads} heads · {heads.head_width}"
    per_picture = f"2 · {len(cross.layers)} gated blocks · {cross.num_latents} latents · "
    per_picture += f"{picture_heads.num_kv_heads} heads · {picture_heads.head_width}"
    ratio = capacity.picture_bytes / capacity.token_bytes
    lines = [
        f"{name}: {capacity.num_parameters / 1e6:,.1f} M parameters in the decoder, {_bytes(capacity.weight_bytes)}",
        f"a token    {_bytes(capacity.token_bytes)} of K/V: {per_token}",
        f"a picture  {_bytes(capacity.picture_bytes)} of K/V: {per_picture}; as much as {ratio:,.1f} tokens",
        f"room for   {capacity.num_tokens:,} tokens ({capacity.max_batch(context):,} sequences of {context:,}) and"
        f" {capacity.num_pictures:,} pictures",
        "",
        f"ceiling from {_bytes(bandwidth)}/s, each sequence {context:,} tokens long and looking at {seen} picture(s):",
        f"{'batch':>7} {'bytes a step':>14} {'ms a step':>11} {'tokens/s':>10}",
    ]
    for batch in BATCHES:
        step_bytes = capacity.step_bytes(batch, context, seen)
        fits = "" if batch <= capacity.max_batch(context) else "   does not fit"
        milliseconds = step_bytes / bandwidth * 1e3
        rate = batch * bandwidth / step_bytes
        lines.append(f"{batch:>7} {_bytes(step_bytes):>14} {milliseconds:>11.3f} {rate:>10,.0f}{fits}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.capacity", description=__doc__.partition("\n")[2])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model_path", type=Path, help="a checkpoint's folder; its config.json is enough")
    parser.add_argument("--gpu-memory", type=parse_size, default="80GB", metavar="80GB")
    parser.add_argument("--bandwidth", type=parse_size, default="3.35TB/s", metavar="3.35TB/s")
    parser.add_argument("--dtype", choices=sorted(DTYPE_BYTES), default="bfloat16")
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
    capacity = plan(family.decoder, options.dtype, memory_bytes)
    title = f"{family.name} in {options.dtype}, {options.fraction:.0%} of {_bytes(options.gpu_memory)}"
    print(describe(title, family.decoder, capacity, options.bandwidth, options.context, options.pictures))
    return 0


def _bytes(count: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    sys.exit(main())
