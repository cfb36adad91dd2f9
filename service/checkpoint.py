"""Safetensors files -> the parameters of a module, through a family's weight names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from service.errors import InvalidRequest
from service.families.family import Target


def load_weights(
    module: nn.Module, folder: Path, target_of: Callable[[str], Target | None], device: str, dtype: torch.dtype
) -> None:
    """Fill a module, which may be on the meta device, from a checkpoint's `*.safetensors`, with or without an index.

    Published tensors that go to one parameter are concatenated along axis 0 in the order of their parts; a tensor
    with our parameter's element count takes its shape.

    Raises InvalidRequest naming the first weight that is missing, unknown, broken or of another size.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt", device=device) as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict
                    target = target_of(name)
                    if target is not None:
                        parts.setdefault(target.name, {})[target.part] = weights.get_tensor(name).to(dtype)
        except SafetensorError as error:
            raise InvalidRequest(f"{file} is not a readable safetensors file.", param="MODEL_PATH") from error
    state = {name: _joined(pieces) for name, pieces in parts.items()}
    wanted = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, parameter in wanted.items():
        if name not in state:
            raise InvalidRequest(f"The checkpoint {folder} lacks the weight for {name}.", param="MODEL_PATH")
        if state[name].numel() != parameter.numel():
            raise InvalidRequest(
                f"The checkpoint's weight for {name} has shape {tuple(state[name].shape)}, "
                f"the config says {tuple(parameter.shape)}.",
                param="MODEL_PATH",
            )
        state[name] = state[name].reshape(parameter.shape)
    unknown = sorted(set(state) - set(wanted))
    if unknown:
        raise InvalidRequest(
            f"The checkpoint has weights its config does not explain: {unknown[0]}.", param="MODEL_PATH"
        )
    module.load_state_dict(state, assign=True)


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InvalidRequest(f"{folder} has no model*.safetensors file.", param="MODEL_PATH")
    return files


def _joined(pieces: dict[int, Tensor]) -> Tensor:
    ordered = [pieces[part] for part in sorted(pieces)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered)
