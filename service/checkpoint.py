"""Safetensors files -> the parameters of a module, through a family's weight names.

Beside the parameters themselves no more than one published tensor is in memory at a time, and none on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from service.errors import InvalidRequest
from service.families.family import Target, read_json


@dataclass(frozen=True)
class Published:
    """A tensor of a checkpoint: the file that it lies in, its name there, its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


def load_weights(
    module: nn.Module, folder: Path, target_of: Callable[[str], Target | None], device: str, dtype: torch.dtype
) -> None:
    """Fill a module, which may be on the meta device, from a checkpoint's `*.safetensors`, with or without an index.

    Published tensors that go to one parameter are concatenated along axis 0 in the order of their parts. Axes of size 1
    do not count: IDEFICS publishes gates as [1, 1, D], others one number without an axis.

    Raises InvalidRequest naming the first weight that is missing, in part or whole, there twice, unknown, broken or of
    another shape, before any is read.
    """
    parts = _parts(folder, target_of)
    wanted = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    _check(parts, wanted, folder)
    state = {name: torch.empty(weight.shape, dtype=dtype, device=device) for name, weight in wanted.items()}
    for name, pieces in parts.items():
        places = state[name].view(-1).split([math.prod(piece.shape) for piece in pieces])
        for piece, place in zip(pieces, places, strict=True):
            place.copy_(_read(piece).view(-1))
    module.load_state_dict(state, assign=True)


def _parts(folder: Path, target_of: Callable[[str], Target | None]) -> dict[str, list[Published]]:
    """What goes to each of our parameters, in order. Reads the files' headers only."""
    parts: dict[str, dict[int, Published]] = {}
    for file in _files(folder):
        for piece in _header(file):
            target = target_of(piece.name)
            if target is None:
                continue
            other = parts.setdefault(target.name, {}).setdefault(target.part, piece)
            if other is not piece:
                raise InvalidRequest(
                    f"The checkpoint {folder} has the weight for {target.name} twice: as {other.name} in "
                    f"{other.file.name} and as {piece.name} in {file.name}.",
                    param="MODEL_PATH",
                )
    return {name: _in_order(name, pieces) for name, pieces in parts.items()}


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickled = next(folder.glob("*.bin"), None) or next(folder.glob("*.pt*"), None)
        instead = f", only {pickled.name}, which may run code when it is read" if pickled else ""
        raise InvalidRequest(
            f"{folder} has no model*.safetensors file{instead}: save the model as safetensors.", param="MODEL_PATH"
        )
    index = folder / "model.safetensors.index.json"
    try:
        named = set(read_json(index).get("weight_map", {}).values())
    except (ValueError, AttributeError) as error:
        raise InvalidRequest(f"{index} is not an index of weights: copy it anew.", param="MODEL_PATH") from error
    if missing := sorted(named - {file.name for file in files}):
        raise InvalidRequest(
            f"{folder} lacks {missing[0]}, which its index names: copy the whole checkpoint.", param="MODEL_PATH"
        )
    return files


def _in_order(name: str, pieces: dict[int, Published]) -> list[Published]:
    missing = set(range(max(pieces))) - set(pieces)
    if missing:
        raise InvalidRequest(
            f"The checkpoint has parts of the weight for {name}, but lacks number {min(missing)}, counted from 0.",
            param="MODEL_PATH",
        )
    return [pieces[part] for part in sorted(pieces)]


def _header(file: Path) -> Iterator[Published]:
    with _opened(file) as weights:
        for name in weights.keys():  # noqa: SIM118 - not a dict
            yield Published(file, name, tuple(weights.get_slice(name).get_shape()))


def _read(piece: Published) -> Tensor:
    """The file is opened, which maps it, for one tensor: what was read of others does not stay in memory."""
    with _opened(piece.file) as weights:
        tensor: Tensor = weights.get_tensor(piece.name)
    return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise InvalidRequest(f"{file} is not a readable safetensors file.", param="MODEL_PATH") from error


def _check(parts: Mapping[str, list[Published]], wanted: Mapping[str, Tensor], folder: Path) -> None:
    for name, weight in wanted.items():
        if name not in parts:
            raise InvalidRequest(f"The checkpoint {folder} lacks the weight for {name}.", param="MODEL_PATH")
        shape = _joined_shape(name, [piece.shape for piece in parts[name]])
        if _without_ones(shape) != _without_ones(weight.shape):
            raise InvalidRequest(
                f"The checkpoint's weight for {name} has shape {shape}, the config says {tuple(weight.shape)}.",
                param="MODEL_PATH",
            )
    unknown = sorted(set(parts) - set(wanted))
    if unknown:
        raise InvalidRequest(
            f"The checkpoint has weights its config does not explain: {unknown[0]}.", param="MODEL_PATH"
        )


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _joined_shape(name: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Of the concatenation along axis 0."""
    if len(shapes) == 1:
        return shapes[0]
    if () in shapes or len({shape[1:] for shape in shapes}) > 1:
        raise InvalidRequest(
            f"The checkpoint's weights for {name} have shapes {', '.join(map(str, shapes))}, which do not join.",
            param="MODEL_PATH",
        )
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
