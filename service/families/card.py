"""What a checkpoint is, in numbers for those who run it: `/v1/models`, the log and the capacity planner say them."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.families.family import Family

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms: counted while training
HEADER_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class ModelCard:
    """Parameters of each stage; K and V of a token and of the largest picture. None: not known here."""

    family: str
    dtype: str | None
    encoder_parameters: int | None
    decoder_parameters: int
    token_kv_bytes: int | None
    picture_kv_bytes: int | None
    max_tiles: int  # of a picture

    @classmethod
    def of(cls, family: Family, dtype: str | None) -> ModelCard:
        """`dtype`: what the stages compute in. The encoder's parameters are counted where its weights are."""
        decoder, max_tiles = family.decoder, family.vision.max_pages
        size = None if dtype is None else BYTES[dtype]
        return cls(
            family=family.name,
            dtype=dtype,
            encoder_parameters=encoder_parameters(family),
            decoder_parameters=decoder.num_parameters,
            token_kv_bytes=None if size is None else decoder.token_kv_bytes(size),
            picture_kv_bytes=None if size is None else max_tiles * decoder.cross_attention.picture_kv_bytes(size),
            max_tiles=max_tiles,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """For a log."""
        encoder = "unknown" if self.encoder_parameters is None else in_millions(self.encoder_parameters)
        line = f"{self.family}, parameters: encoder {encoder}, decoder {in_millions(self.decoder_parameters)}"
        if self.token_kv_bytes is None or self.picture_kv_bytes is None:
            return line
        tiles = f" of {self.max_tiles} tiles" if self.max_tiles > 1 else ""
        token, picture = in_bytes(self.token_kv_bytes), in_bytes(self.picture_kv_bytes)
        return f"{line}; K/V in {self.dtype}: {token} a token, {picture} a picture{tiles}"


def encoder_parameters(family: Family) -> int | None:
    """Counted in the weights' headers."""
    files = sorted(family.folder.glob("model*.safetensors"))
    shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
    counts = [
        math.prod(shape)
        for name, shape in shapes.items()
        if family.vision_weight(name) is not None and not name.endswith(STATISTICS)
    ]
    return sum(counts) if counts else None


def in_millions(count: int) -> str:
    return f"{count / 1e9:,.2f} B" if count >= 10**9 else f"{count / 1e6:,.1f} M"


def in_bytes(count: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _shapes(file: Path) -> dict[str, list[int]]:
    """By the published names. A file that is broken has none: whoever loads it says what is wrong with it."""
    try:
        with file.open("rb") as content:
            (length,) = HEADER_LENGTH.unpack(content.read(HEADER_LENGTH.size))
            header = json.loads(content.read(min(length, file.stat().st_size)))
        return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return {}
