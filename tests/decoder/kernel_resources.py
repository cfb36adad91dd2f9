"""python -m tests.decoder.kernel_resources [--json]: what the kernel takes of a GPU that need not be here.

Compiles it as `attend` would for the shapes of real models and asks the assembler: registers a thread, bytes spilled,
shared memory a block, and from these how many blocks a multiprocessor holds. Needs Triton's package alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from service.decoder.attention_kernel import Tiles, attend_tile, merge_splits, span_block, tiles_for

SHARED_KIB = {
    80: 164,
    90: 228,
    100: 228,
}  # of a multiprocessor. Source: CUDA C++ Programming Guide, compute capabilities
RESERVED_SHARED_KIB = 1  # of each block
REGISTERS, WARPS = 65536, 64  # of a multiprocessor, each of the three
NUM_ROWS, NUM_SPANS = 64, 8  # for `tiles_for`: of prefills; decodes have as many spans as rows
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Shape:
    model: str
    num_heads: int
    num_kv_heads: int
    head_width: int
    page_size: int
    causal: bool
    dtype: torch.dtype = torch.bfloat16


SHAPES = (
    Shape("IDEFICS-9B, text", 32, 32, 128, 16, True),
    Shape("IDEFICS-9B, pictures", 32, 32, 128, 64, False),
    Shape("Llama-3.2-11B, text", 32, 8, 128, 16, True),
    Shape("Llama-3.2-11B, pictures", 32, 8, 128, 1601, False),
    Shape("demo, pictures", 9, 3, 64, 24, False),
    Shape("IDEFICS-9B, text", 32, 32, 128, 16, True, torch.float32),
)


@dataclass(frozen=True)
class Resources:
    gpu: str
    kernel: str
    model: str
    dtype: str
    tiles: str  # rows x positions, warps, stages
    registers: int  # a thread
    spilled: int  # bytes a thread
    stack: int  # bytes a thread
    shared: int  # bytes a block
    blocks: int  # that a multiprocessor holds at once


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, tiles: Tiles) -> Any:
    """A kernel as a launch with aligned pointers and strides would compile it, and what the assembler said."""
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = [
        index for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or re.fullmatch("[qkv]_(row|head|page|slot)", name)
    ]  # fmt: skip
    source = ASTSource(kernel, signature, constants, attrs={(index,): [["tt.divisibility", 16]] for index in aligned})
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # what comes out of a cache was not assembled
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return binary, said.getvalue()


def resources(shape: Shape, kernel_name: str, num_spans: int, capability: int) -> Resources:
    kernel = {"attend_tile": attend_tile, "merge_splits": merge_splits}[kernel_name]
    q = torch.empty((NUM_ROWS, shape.num_heads, shape.head_width), dtype=shape.dtype, device="meta")
    tiles, dtype = tiles_for(q, num_spans), DTYPES[shape.dtype]
    types = dict.fromkeys(("q", "k_pages", "v_pages", "out"), f"*{dtype}")
    types |= dict.fromkeys(("starts", "table", "used"), "*i32")
    types |= dict.fromkeys(("part_out", "part_max", "part_sum"), "*fp32") | {"scale": "fp32"}
    constants = {
        "HEAD_WIDTH": shape.head_width,
        "HEAD_BLOCK": triton.next_power_of_2(shape.head_width),
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "PAGE_SIZE": shape.page_size,
        "CAUSAL": shape.causal,
        "SPAN_BLOCK": span_block(num_spans),
        "SPLITS": True,
        "ROWS": tiles.rows,
        "POSITIONS": tiles.positions,
        "SPLIT": tiles.split,
    }
    names = set(kernel.arg_names)
    types = {name: kind for name, kind in types.items() if name in names}
    constants = {name: value for name, value in constants.items() if name in names}
    binary, said = compiled(kernel, types, constants, capability, tiles)
    registers, stack, *spilled = (
        int(number)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes spill st", r"(\d+) bytes spill lo")
        for number in [re.findall(pattern, said)[-1]]
    )
    shared, num_warps = binary.metadata.shared, binary.metadata.num_warps
    return Resources(
        gpu=f"sm_{capability}",
        kernel=kernel.__name__,
        model=shape.model,
        dtype=dtype,
        tiles=f"{tiles.rows} x {tiles.positions}, {num_warps} warps, {tiles.num_stages} stages",
        registers=registers,
        spilled=sum(spilled),
        stack=stack,
        shared=shared,
        blocks=min(
            REGISTERS // (-(-registers // 8) * 8 * 32 * num_warps),
            SHARED_KIB[capability] * 1024 // (shared + RESERVED_SHARED_KIB * 1024),
            WARPS // num_warps,
        ),
    )


def all_resources() -> list[Resources]:
    work = []
    for capability in SHARED_KIB:
        for shape in SHAPES:
            work += [(shape, attend_tile.__name__, NUM_ROWS, capability)]  # decode
            if shape.dtype != torch.float32:  # whose tiles are the same in both
                work += [(shape, attend_tile.__name__, NUM_SPANS, capability)]  # prefill
        work += [(SHAPES[0], merge_splits.__name__, NUM_ROWS, capability)]
    num_cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(num_cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(resources, *zip(*work, strict=True)))


def main() -> None:
    rows = all_resources()
    if "--json" in sys.argv:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    names = [field.name for field in dataclasses.fields(Resources)]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in dataclasses.astuple(row)) + " |")


if __name__ == "__main__":
    main()
