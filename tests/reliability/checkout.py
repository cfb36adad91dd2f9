"""A copy of what runs, in a folder of its own: its decoder can be made to fail, its disk can be full."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.launch.settings import ROOT

MARK = 7  # a token id; twice, and one of the kinds behind it, marks a request that breaks its step
RAISE, OUT_OF_MEMORY, NOT_A_NUMBER = 8, 9, 10
LAST_POSITION = 777  # a sequence breaks the step in which its answer comes here
FAILING = f'''

class _Failing(Decoder):
    """Put here by tests/reliability/checkout.py: fails over marked requests as a broken kernel would."""

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        twice = (input_ids[:-2] == {MARK}) & (input_ids[1:-1] == {MARK}) & (positions[2:] == positions[:-2] + 2)
        kinds = torch.where(twice, input_ids[2:], -1)
        late = (positions == {LAST_POSITION}) & (positions.roll(1) != {LAST_POSITION - 1})
        if (kinds == {RAISE}).any() or late.any():
            raise RuntimeError("injected")
        if (kinds == {OUT_OF_MEMORY}).any():
            raise torch.OutOfMemoryError("injected")
        hidden = super().forward(input_ids, positions, attention)
        if (kinds == {NOT_A_NUMBER}).any():
            hidden[2:][kinds == {NOT_A_NUMBER}] = torch.nan
        return hidden


Decoder = _Failing  # type: ignore[misc]
'''


def copy_checkout(root: Path, *, failing: bool = False) -> Path:
    """Service, models and a link to Triton, so that `python -m service.launch` runs there. `failing`: see above."""
    for folder in ("service", "model_repo"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / ".triton").symlink_to((ROOT / ".triton").resolve())
    (root / ".cache").mkdir()
    if failing:
        with (root / "service" / "decoder" / "model.py").open("a") as file:
            file.write(FAILING)
    return root


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A file system on which no byte is free takes the folder's place. Needs root: raises PermissionError."""
    options = ["-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode != 0:
        raise PermissionError("a file system cannot be mounted here")
    try:
        with (folder / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
