"""python -m tests.decoder.interpreted_kernel NUM_CASES: the kernel on a CPU, in Triton's interpreter.

A process of its own with TRITON_INTERPRET=1, which Triton has to find when it is first imported, and which changes it
for good. Writes one JSON line a case.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from service.decoder.attention_kernel import Tiles, attend
from tests.decoder.span_cases import Case, formula, random_case

# Small, so that small cases have several tiles and splits. The interpreter has no warps and no stages.
TILES = (Tiles(16, 16, 16, 4, 2), Tiles(16, 32, 64, 4, 2), Tiles(32, 16, 64, 4, 2), Tiles(16, 16, 256, 4, 2))
NUM_COMPARED = 8  # cases of which also parts and cleaned pages are attended to


def run(case: Case, tiles: Tiles) -> torch.Tensor:
    return attend(case.q, case.k_pages, case.v_pages, case.starts, case.table, case.used, case.causal, tiles)


def examine(seed: int) -> dict[str, Any]:
    case, tiles = random_case(seed), TILES[seed % len(TILES)]
    out, expected = run(case, tiles), formula(case)
    report: dict[str, Any] = {
        "seed": seed,
        "kinds": sorted(case.kinds | {f"tiles {tiles.rows} {tiles.positions} {tiles.split}"}),
        "error": float((out.double() - expected).abs().max()),
        "unseen_is_zero": not bool(out[(expected == 0).all(-1)].any()),
    }
    if seed < NUM_COMPARED:
        alone = torch.cat([run(case.span(index), tiles) for index in range(len(case.used))])
        report["alone_is_same"] = torch.equal(out, alone)
        report["clean_is_same"] = torch.equal(out, run(case.without_poison(), tiles))
    return report


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("TRITON_INTERPRET has to be 1 before this starts")
    torch.set_num_threads(1)
    for seed in range(int(sys.argv[1])):
        print(json.dumps(examine(seed)), flush=True)


if __name__ == "__main__":
    main()
