"""Numbers of the host on the device, many lists by one copy that nobody waits for."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

DTYPES = {"q": torch.int64, "i": torch.int32, "B": torch.bool}  # by an array's type code
ALIGNMENT = 16  # bytes. Kernels are compiled for pointers that are so aligned, and once more for those that are not


def upload(parts: Iterable[array[int]], device: torch.device) -> list[Tensor]:
    """Each part as a tensor [n], in their order: views of one buffer.

    A GPU fetches from pinned memory by itself, while the host goes on; from other memory the host would copy, and wait.
    Torch gives pinned memory to no one else before the copy has been made.
    """
    buffer = bytearray()
    places: list[tuple[int, int, torch.dtype]] = []
    for part in parts:
        first = len(buffer)
        buffer += part
        places.append((first, len(buffer), DTYPES[part.typecode]))
        buffer += bytes(ALIGNMENT - len(buffer) % ALIGNMENT)  # never nothing: a tensor wants memory
    host = torch.frombuffer(buffer, dtype=torch.uint8)
    if device.type == "cuda":
        host = host.pin_memory()
    on_device = host.to(device, non_blocking=True)
    return [on_device[first:end].view(dtype) for first, end, dtype in places]
