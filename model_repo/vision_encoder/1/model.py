"""Triton's side of stage 1: pixels in, latents out. The work is `service.vision`'s."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from service.errors import Internal
from service.families import load_family


def on_gpu() -> bool:
    return os.environ.get("DEVICE", "cpu").startswith("cuda")


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Declare the tensors from the checkpoint. No torch here: Triton runs this in a process of its own."""
        family = load_family(Path(os.environ["MODEL_PATH"]))
        size = family.vision.encoder.image_size
        config.add_input({"name": "pixels", "data_type": "TYPE_UINT8", "dims": [3, size, size]})
        data_type = "TYPE_FP16" if on_gpu() else "TYPE_FP32"
        config.add_output({"name": "latents", "data_type": data_type, "dims": list(family.vision.latents_shape)})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        from service.vision.stage import VisionStage  # torch: not needed by auto_complete_config

        device = os.environ.get("DEVICE", "cpu")
        dtype = os.environ.get("DTYPE") or ("bfloat16" if on_gpu() else "float32")
        self.stage = VisionStage(load_family(Path(os.environ["MODEL_PATH"])), device, dtype)
        self.latents_type = np.float16 if on_gpu() else np.float32

    def execute(self, requests: list[Any]) -> list[Any]:
        """One forward for all the requests that Triton's dynamic batcher put together."""
        pixels = [pb_utils.get_input_tensor_by_name(request, "pixels").as_numpy() for request in requests]
        try:
            latents = self.stage.encode(np.concatenate(pixels)).float().cpu().numpy()  # (B, R, E)
        except Exception as error:
            pb_utils.Logger.log_error(f"vision_encoder: {error!r}")
            failure = pb_utils.TritonError(Internal("The vision encoder failed.").to_triton())
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        ends = np.cumsum([len(part) for part in pixels])[:-1]
        parts = np.split(latents.astype(self.latents_type, copy=False), ends)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("latents", part)]) for part in parts]
