"""Reads a GGUF file: its metadata as Python values and its tensors as fp32 arrays.

The `gguf` package's own reader takes seconds over a hundred thousand vocabulary strings; this one takes a fraction of
one. Dequantizing is the package's. Source: ggml docs/gguf.md, version 3, little endian.
"""

import struct
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32


class GGUFFile:
    """`metadata`: key -> number, string or list. `tensor(name)` dequantizes one tensor."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the file is not GGUF version 3."""
        self._bytes = path.read_bytes()
        self._offset = 0
        magic, version, num_tensors, num_values = self._take("<4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"{path} is not a GGUF file of version 3")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            self.metadata[key] = self._value(self._take("<I")[0])
        self._tensors: dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType, int]] = {}
        for _ in range(num_tensors):
            name = self._string()
            (num_axes,) = self._take("<I")
            shape = tuple(reversed(self._take(f"<{num_axes}Q")))  # GGUF lists the fastest axis first
            kind, offset = self._take("<IQ")
            self._tensors[name] = shape, gguf.GGMLQuantizationType(kind), offset
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        self._data = -(-self._offset // alignment) * alignment

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> NDArray[np.float32]:
        shape, kind, offset = self._tensors[name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = np.frombuffer(self._bytes, np.uint8, prod(shape) // block * block_bytes, self._data + offset)
        rows = raw.reshape(*shape[:-1], -1)
        if kind == gguf.GGMLQuantizationType.F32:
            return rows.view(np.float32).reshape(shape)
        return gguf.dequantize(rows, kind).reshape(shape).astype(np.float32, copy=False)

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._bytes, self._offset)
        self._offset += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        start = self._offset
        self._offset += length
        return self._bytes[start : self._offset].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item_kind, length = self._take("<IQ")
            if item_kind in SCALARS:
                return list(self._take(f"<{length}{SCALARS[item_kind]}"))
            return [self._value(item_kind) for _ in range(length)]
        return self._take(f"<{SCALARS[kind]}")[0]
