"""Triton's side of stage 1: pixels in, latents out. The work is `service.vision`'s.

Tensors cross as DLPack: the stub in the PyPI wheel reads NumPy 2 arrays wrongly, and bf16 has no NumPy form.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from service.errors import CrossgateError, StageLost
from service.families import load_family
from service.families.identity import unchanged

END_DELAY_S = 1.0  # for the answers that are on their way to Triton


def on_gpu() -> bool:
    """As DEVICE says, which `make serve` and the containers set; else it takes torch to know."""
    if device := os.environ.get("DEVICE"):
        return device != "cpu"
    import torch

    return torch.cuda.is_available()


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Declare the tensors from the checkpoint. No torch here: Triton runs this in a process of its own."""
        family = load_family(Path(os.environ["MODEL_PATH"]))
        encoder, data_type = family.vision.encoder, "TYPE_FP16" if on_gpu() else "TYPE_FP32"
        is_tiled = len(encoder.grids) > 1
        canvas = [-1, -1] if is_tiled else [encoder.image_size, encoder.image_size]
        latents = [-1 if is_tiled else 1, *family.vision.latents_shape]
        config.add_input({"name": "pixels", "data_type": "TYPE_UINT8", "dims": [3, *canvas]})
        config.add_output({"name": "latents", "data_type": data_type, "dims": latents})
        config.add_output({"name": "checkpoint", "data_type": "TYPE_UINT8", "dims": [32]})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        import torch

        from service.dtype import default_dtype
        from service.heap import freeze_heap
        from service.shares import MemoryFractions
        from service.turns import Turns
        from service.vision.stage import VisionStage

        self.torch = torch
        family = load_family(Path(os.environ["MODEL_PATH"]))
        device = os.environ.get("DEVICE") or ("cuda" if on_gpu() else "cpu")
        dtype = os.environ.get("DTYPE") or default_dtype(device)
        fractions = MemoryFractions.from_environment()
        if on_gpu():
            torch.cuda.set_per_process_memory_fraction(fractions.encoder, torch.device(device).index)
        with unchanged(family.folder):
            identity = bytearray.fromhex(family.identity)
            turns = None if on_gpu() else Turns()
            self.stage = VisionStage(family, device, dtype, turns)
        self.identity = torch.frombuffer(identity, dtype=torch.uint8)
        self.works = True
        freeze_heap()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One forward for all the requests that Triton's dynamic batcher put together; one that fails fails alone.

        When nothing works any more this process ends: whoever supervises Triton starts it anew.
        """
        tensors = [pb_utils.get_input_tensor_by_name(request, "pixels") for request in requests]
        pixels = [self.torch.from_dlpack(tensor.to_dlpack()) for tensor in tensors]  # each (B, 3, H, W), of one size
        try:
            results = self.stage.encode_each(pixels)
        except Exception as error:  # whatever it is, every request is owed an answer
            pb_utils.Logger.log_error(f"vision_encoder: cannot go on; its process ends: {error!r}")
            results = [StageLost("The vision encoder failed and is started anew.", retry_after_s=5)] * len(requests)
            self.works = False
            threading.Timer(END_DELAY_S, os._exit, (1,)).start()
        return [self._response(result) for result in results]

    def is_ready(self) -> bool:
        """Newer Tritons than the wheel's ask it where a probe asks for this model."""
        return self.works

    def _response(self, result: Any) -> Any:
        if isinstance(result, CrossgateError):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(result.to_triton()))
        checkpoint = self.identity.repeat(len(result), 1)  # (B, 32)
        outputs = {"latents": result, "checkpoint": checkpoint}
        return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack(*output) for output in outputs.items()])
