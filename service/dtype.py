"""What a stage computes in where DTYPE does not say."""

from __future__ import annotations

from pathlib import Path

# x86 instructions that multiply bfloat16. A processor without them converts it, which takes longer than float32.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def default_dtype(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """bfloat16 where the device computes it fast: half the bytes of weights and K/V, twice the products a second."""
    return "bfloat16" if device != "cpu" or BFLOAT16_FLAGS & _flags(cpuinfo) else "float32"


def _flags(cpuinfo: Path) -> set[str]:
    """Of the first processor. None where the system tells nothing."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
