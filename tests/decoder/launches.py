"""Counts, without a GPU, what a computation would launch there: a mode that sees every operation of torch.

What CUDA has one kernel for is one launch, though the CPU computes it in several operations; what is composed of others
everywhere is counted by its parts. Views, metadata and memory cost nothing. The attention kernel is not run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from service.decoder.attention import Spans

aten = torch.ops.aten
ONE_KERNEL = {aten.rms_norm.default, aten.layer_norm.default, aten.linear.default}  # on CUDA, weight of x's dtype
NO_KERNEL = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.detach_.default,
    aten.lift_fresh.default,
    torch.ops.prim.device.default,
}


class Launches(TorchDispatchMode):
    """`kernels`: launches by the name of the operation. `uploads`: copies of the host's numbers to the device, which
    are tensors made of Python's, and tensors of the CPU where the device is "meta", one without memory.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.kernels: Counter[str] = Counter()
        self.uploads = 0

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, spans: Spans) -> Tensor:
        """In place of `attend`: one launch, as the kernel needs for up to 256 positions, and numbers without meaning.

        (Over more a second one merges what spans of one row were cut into.)
        """
        self.kernels["attend"] += 1
        return q

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op not in ONE_KERNEL:
            with self:
                composed = op.decompose(*args, **kwargs)
            if composed is not NotImplemented:
                return composed
        if not (op.is_view or op in NO_KERNEL):
            self.kernels[op.name().removeprefix("aten::").split(".")[0]] += 1
        out = op(*args, **kwargs)
        if isinstance(out, Tensor) and out.device.type == self.device:
            elsewhere = any(isinstance(x, Tensor) and x.device.type != self.device for x in args)
            self.uploads += elsewhere or op is aten.lift_fresh.default
        return out

    def table(self) -> str:
        rows = [f"{count:5}  {name}" for name, count in self.kernels.most_common()]
        return "\n".join([*rows, f"{self.kernels.total():5}  in all, and {self.uploads} copies of the host's numbers"])
