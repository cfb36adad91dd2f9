"""The attention kernel on a GPU: its errors against the formula, its times beside PyTorch's and the bandwidth's."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from service.decoder.attention_kernel import Tiles, attend, tiles_for
from tests.decoder.span_cases import Case, formula, random_case

NUM_CASES = 200
# Of ‖out − formula‖ / ‖formula‖. The formula gets the same rounded inputs; in 16 bits the weights are rounded, too.
MOST_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
READ_BYTES = 4 * 2**30
POOL_BYTES = 2**29  # at least, several times what any L2 holds: a layer is read again only after all the others
MAX_LAYERS = 128
REPLAYS = 20
TUNED = (2048, 6404)  # positions of the loads for which other tiles are tried


@dataclass(frozen=True)
class Load:
    """What one step asks of one layer. `lengths`: positions that each span uses; `rows` query rows a span."""

    name: str
    num_heads: int
    num_kv_heads: int
    page_size: int
    lengths: tuple[int, ...]
    rows: int = 1
    head_width: int = 128

    @property
    def causal(self) -> bool:
        return self.page_size == 16

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * sum(self.lengths) * self.num_kv_heads * self.head_width


IDEFICS, LLAMA = (32, 32), (32, 8)
LOADS = (
    *(Load(f"IDEFICS-9B, {n} x {t} tokens", *IDEFICS, 16, (t,) * n) for t in (128, 2048, 16384) for n in (1, 32)
      if n * t <= 65536),
    Load("IDEFICS-9B, 31 x 70 tokens and 1 x 2001", *IDEFICS, 16, (70,) * 31 + (2001,)),
    *(Load(f"IDEFICS-9B, {n} x {p} pictures", *IDEFICS, 64, (64 * p,) * n) for p in (1, 4, 16) for n in (1, 32)),
    *(Load(f"Llama-3.2-11B, {n} x {t} tokens", *LLAMA, 16, (t,) * n) for t in (128, 2048, 16384) for n in (1, 32)),
    *(Load(f"Llama-3.2-11B, {n} x {p} tiles", *LLAMA, 1601, (1601 * p,) * n) for p in (1, 4, 16) for n in (1, 32)),
    Load("IDEFICS-9B, prefill of 512 after 1536 tokens", *IDEFICS, 16, (2048,), rows=512),
    Load("Llama-3.2-11B, prefill of 512 after 1536 tokens", *LLAMA, 16, (2048,), rows=512),
    Load("Llama-3.2-11B, prefill of 512 that see 4 tiles", *LLAMA, 1601, (6404,), rows=512),
)  # fmt: skip


def print_errors(device: torch.device) -> bool:
    """Whether any is wrong: far from the formula, other bits alone than beside others, or it waits for the device."""
    print("| dtype | cases | largest relative error | allowed | other bits alone |\n|---|---|---|---|---|")
    wrong = False
    for dtype, allowed in MOST_ERROR.items():
        errors, num_other = [], 0
        for seed in range(NUM_CASES):
            cpu_case = random_case(seed).to(torch.device("cpu"), dtype)
            case, expected = cpu_case.to(device, dtype), formula(cpu_case)
            torch.cuda.set_sync_debug_mode("error")
            out = run(case)
            torch.cuda.set_sync_debug_mode("default")
            errors.append(float((out.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30)))
            tiles = tiles_for(case.q, len(case.used))
            alone = [run(cpu_case.span(index).to(device, dtype), tiles) for index in range(len(case.used))]
            num_other += not torch.equal(torch.cat(alone), out)
        worst = max(range(NUM_CASES), key=lambda seed: math.inf if math.isnan(errors[seed]) else errors[seed])
        wrong |= num_other > 0 or not errors[worst] <= allowed
        print(
            f"| {dtype} | {NUM_CASES} | {errors[worst]:.1e} (case {worst}) | {allowed:.0e} | {num_other} |", flush=True
        )
    return wrong


def run(case: Case, tiles: Tiles | None = None) -> Tensor:
    return attend(case.q, case.k_pages, case.v_pages, case.starts, case.table, case.used, case.causal, tiles)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a sum over more than any cache holds: the best of the measured."""
    numbers = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / min(seconds(lambda: numbers.sum(), 1) for _ in range(3))


def print_times(device: torch.device, ceiling: float) -> None:
    print("| one layer, bf16 | kernel µs | PyTorch µs | K/V read MB | share of the ceiling | error |")
    print("|---|---|---|---|---|---|")
    for load in LOADS:
        layers = made(load, device)
        kernel_s = seconds(lambda layers=layers: [run(case) for case in layers], len(layers))
        torch_s = seconds(lambda layers=layers: [gathered(case) for case in layers], len(layers))
        ours, theirs = run(layers[0]).double(), gathered(layers[0]).double()
        error = float((ours - theirs).norm() / theirs.norm())
        share = load.kv_bytes / kernel_s / ceiling
        print(
            f"| {load.name} | {kernel_s * 1e6:.1f} | {torch_s * 1e6:.1f} | {load.kv_bytes / 1e6:.1f} "
            f"| {share:.0%} | {error:.1e} |",
            flush=True,
        )


def print_tiles(device: torch.device, ceiling: float) -> None:
    """The best ways to cut each load, to be written into `tiles_for`."""
    print("| one layer, bf16 | tiles | µs | share of the ceiling |\n|---|---|---|---|")
    for load in (load for load in LOADS if load.lengths[0] in TUNED):
        layers = made(load, device)
        default = tiles_for(layers[0].q, len(load.lengths))
        times: dict[Tiles, float] = {}
        decodes = itertools.product((16,), (32, 64, 128), (128, 256, 512), (2, 4), (3, 5))
        prefills = itertools.product((32, 64, 128), (32, 64, 128), (default.split,), (4, 8), (3, 5))
        for cut in decodes if load.rows == 1 else prefills:
            tiles = Tiles(*cut)
            try:
                times[tiles] = seconds(lambda t=tiles, ls=layers: [run(case, t) for case in ls], len(layers), replays=5)
            except Exception as error:  # more shared memory than there is; said, and the next one tried
                print(f"| {load.name} | {tuple(tiles)} | {type(error).__name__} | |")
        best = sorted(times, key=times.__getitem__)[:3]
        for tiles in {*best, default} & times.keys():
            mark = " (what `tiles_for` gives)" if tiles == default else ""
            share = load.kv_bytes / times[tiles] / ceiling
            print(f"| {load.name} | {tuple(tiles)}{mark} | {times[tiles] * 1e6:.1f} | {share:.0%} |", flush=True)


def made(load: Load, device: torch.device) -> list[Case]:
    """Layers with pages of their own, in an order that no prefetcher guesses; random numbers, as zeros run faster."""
    width = max(-(-length // load.page_size) for length in load.lengths)
    num_spans, num_pages = len(load.lengths), sum(-(-length // load.page_size) for length in load.lengths)
    layers = min(MAX_LAYERS, max(2, math.ceil(POOL_BYTES / load.kv_bytes)))
    table = torch.zeros(num_spans, width, dtype=torch.int32)
    free = iter(torch.randperm(num_pages).tolist())
    for span, length in enumerate(load.lengths):
        count = -(-length // load.page_size)
        table[span, :count] = torch.tensor(list(itertools.islice(free, count)))
    starts = torch.arange(num_spans + 1, dtype=torch.int32) * load.rows
    used = torch.tensor(load.lengths, dtype=torch.int32)
    table, starts, used = table.to(device), starts.to(device), used.to(device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    pages = (num_pages, load.num_kv_heads, load.page_size, load.head_width)
    return [
        Case(
            random(num_spans * load.rows, load.num_heads, load.head_width),
            random(*pages), random(*pages), starts, table, used, load.causal,
        )
        for _ in range(layers)
    ]  # fmt: skip


def gathered(case: Case) -> Tensor:
    """The same by PyTorch alone: pages gathered and padded to the longest span, a mask, its own attention.

    Query heads that share a KV head are further rows of it here, too: that copies no K or V.
    """
    num_spans, num_kv_heads = len(case.used), case.k_pages.shape[1]
    k, v = (x[case.table].transpose(1, 2).flatten(2, 3) for x in (case.k_pages, case.v_pages))  # (S, K, positions, C)
    grouped = case.q.unflatten(0, (num_spans, -1)).unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
    group, num_rows = grouped.shape[2:4]  # of (S, K, G, rows, C)
    sees = case.used[:, None]  # (S, 1)
    if case.causal:
        sees = sees - num_rows + 1 + torch.arange(num_rows, device=case.q.device)  # (S, rows)
    mask = torch.arange(k.shape[2], device=case.q.device) < sees[..., None]  # (S, 1 or rows, positions)
    if mask.shape[1] > 1:
        mask = mask.repeat(1, group, 1)  # (S, G*rows, positions)
    out = F.scaled_dot_product_attention(grouped.flatten(2, 3), k, v, attn_mask=mask[:, None])
    return out.unflatten(2, (group, num_rows)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def seconds(work: Callable[[], object], parts: int, replays: int = REPLAYS) -> float:
    """Of one of `parts` equal parts of the work: the median over replays of its CUDA graph, without launch gaps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()  # compiles, and fills the allocator
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(replays):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / parts
