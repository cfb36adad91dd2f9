from __future__ import annotations

from pathlib import Path

import pytest

from service.decoder.settings import DecoderSettings
from service.dtype import default_dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx512f avx512_bf16 sse", "bfloat16"),
        ("fpu amx_bf16 amx_tile", "bfloat16"),
        ("fpu avx2 avx512f avx512_vnni amx_tile", "float32"),
        ("avx512_bf16x", "float32"),
    ],
)
def test_a_cpu_computes_in_bfloat16_if_it_has_instructions_for_it(tmp_path: Path, flags: str, dtype: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor\t: 0\nbugs\t\t: amx_bf16\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n"
    )
    assert default_dtype("cpu", cpuinfo) == dtype
    assert default_dtype("cuda", cpuinfo) == "bfloat16"


def test_a_system_that_tells_nothing_of_its_cpu_gets_float32(tmp_path: Path) -> None:
    assert default_dtype("cpu", tmp_path / "cpuinfo") == "float32"
    (tmp_path / "cpuinfo").write_text("Processor : ARMv8\nFeatures : fp asimd\n")
    assert default_dtype("cpu", tmp_path / "cpuinfo") == "float32"


def test_what_dtype_says_counts() -> None:
    for dtype in ("float32", "bfloat16"):
        assert DecoderSettings.from_environment({"DEVICE": "cpu", "DTYPE": dtype}).dtype == dtype
    assert DecoderSettings.from_environment({"DEVICE": "cpu"}).dtype == default_dtype("cpu")
