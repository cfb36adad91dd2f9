"""python3 -m tests.gpu.check [--tiles]: what can only be known on a machine with an NVIDIA GPU.

Is the attention kernel right there, and how near does it come to the memory's bandwidth? Needs this repository, torch
2.11 or later and Triton's package; no network, nothing installed. Exit status 0: all right, 1: a wrong result,
2: there is no GPU or no Triton, so nothing was checked. `--tiles` tries other ways to cut the work, too.
"""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys

import torch


def main() -> int:
    if not torch.cuda.is_available():
        print(f"crossgate: gpu-check needs an NVIDIA GPU; torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("crossgate: gpu-check needs the package triton, which torch for CUDA brings", file=sys.stderr)
        return 2
    from tests.gpu import kernel  # only now: it imports Triton

    device = torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{described()}\n")
    wrong = kernel.print_errors(device)
    ceiling = kernel.read_bandwidth(device)
    print(f"\nReading alone: {ceiling / 1e12:.2f} TB/s, the ceiling of the shares below.\n")
    kernel.print_times(device, ceiling)
    if "--tiles" in sys.argv:
        print()
        kernel.print_tiles(device, ceiling)
    return 1 if wrong else 0


def described() -> str:
    import triton

    properties = torch.cuda.get_device_properties(0)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB; Python {platform.python_version()}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, Triton {triton.__version__}; commit {git.stdout.strip() or 'unknown'}"
    )


if __name__ == "__main__":
    sys.exit(main())
