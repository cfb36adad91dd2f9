"""Which file's mutants are shown to which tests: its own, and no others'."""

from __future__ import annotations

TARGETS: dict[str, tuple[str, ...]] = {
    "service/decoder/scheduler.py": ("tests/decoder/test_scheduler.py",),
    "service/decoder/sequence.py": ("tests/decoder/test_sequence.py",),
    "service/decoder/kv_blocks.py": ("tests/decoder/test_kv_blocks.py",),
    "service/decoder/image_pages.py": ("tests/decoder/test_image_pages.py",),
    "service/decoder/sampler.py": ("tests/decoder/test_sampler.py",),
    "service/gateway/admission.py": ("tests/gateway/test_admission.py",),
    "service/gateway/pictures/encode.py": ("tests/gateway/pictures/test_encode.py",),
    "service/gateway/pictures/residency.py": ("tests/gateway/pictures/test_residency.py",),
    "service/gateway/stages/patience.py": ("tests/gateway/stages/test_patience.py",),
    "service/gateway/stages/run.py": ("tests/gateway/stages/test_run.py",),
    "service/gateway/text/stop_strings.py": ("tests/gateway/text/test_stop_strings.py",),
}
