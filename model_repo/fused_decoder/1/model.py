"""Triton's side of stage 2: a request in, a decoupled stream of token events out. The work is `service.decoder`'s."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from service.errors import CrossgateError, Internal
from service.families import load_family
from service.families.identity import unchanged

# After that a thread that waits for the interpreter gets it. The engine's gives it up for microseconds at a time, in
# which no other wakes, so the outbox would wait Python's 5 ms again and again. With 1 ms one stream of a tiny model
# got 449 instead of 384 tokens/s, and 32 streams 2,447 instead of 2,033.
SWITCH_INTERVAL_S = 0.001

# Of a decoder whose steps a second thread makes hardly shorter (0.6 M parameters: 3.7 and 3.5 ms with 32 sequences;
# 2.4 M: 6.8 and 5.5; 28 M: 32 and 21), but takes a core from all that carries its tokens to those who asked.
ONE_THREAD_BELOW = 4_000_000  # parameters


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
        latents_shape = list(load_family(Path(os.environ["MODEL_PATH"])).vision.latents_shape)
        for name, data_type, dims, optional in (
            ("input_ids", "TYPE_INT32", [-1], False),
            ("sampling", "TYPE_UINT8", [-1], False),
            ("image_keys", "TYPE_UINT8", [-1, 32], True),
            ("image_positions", "TYPE_INT32", [-1], True),
            ("latents", "TYPE_FP16" if on_gpu() else "TYPE_FP32", [-1, *latents_shape], True),
            ("latent_index", "TYPE_INT32", [-1], True),
            ("latents_checkpoint", "TYPE_UINT8", [-1, 32], True),
            ("config", "TYPE_UINT8", [32], False),
            ("cache_salt", "TYPE_UINT8", [32], True),
        ):
            config.add_input({"name": name, "data_type": data_type, "dims": dims, "optional": optional})
        config.add_output({"name": "token_ids", "data_type": "TYPE_INT32", "dims": [-1]})
        config.add_output({"name": "event", "data_type": "TYPE_UINT8", "dims": [-1]})
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        import torch
        from decoder_messages import check_makers, read_request, send
        from decoder_metrics import DecoderMetrics

        from service.decoder.engine import Engine
        from service.decoder.loop import EngineLoop, at_once
        from service.decoder.settings import DecoderSettings
        from service.heap import freeze_heap
        from service.turns import Turns

        sys.setswitchinterval(SWITCH_INTERVAL_S)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        family = load_family(Path(os.environ["MODEL_PATH"]))
        max_positions = family.decoder.max_positions
        self.read_request, self.send = partial(read_request, max_positions=max_positions), send
        with unchanged(family.folder):
            self.check_makers = partial(
                check_makers, config=family.config_identity, checkpoint=family.identity, max_images=max_positions
            )
            settings = DecoderSettings.from_environment()
            if family.decoder.num_parameters < ONE_THREAD_BELOW and not os.environ.get("CROSSGATE_NUM_THREADS"):
                torch.set_num_threads(1)
            make_engine = partial(Engine.from_family, family, settings)
            computing = at_once if on_gpu() else Turns().turn
            self.loop = EngineLoop(make_engine, on_step=DecoderMetrics().publish, computing=computing)
        freeze_heap()

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to the engine; its thread answers through the response senders."""
        for request in requests:
            sender = request.get_response_sender()
            deliver = partial(self.send, sender, request.request_id())
            try:
                self.check_makers(request)
                valid, latents, latent_index = self.read_request(request)
            except CrossgateError as error:
                deliver(error)
            except Exception as error:  # whatever it is, the others of this call are not to suffer
                pb_utils.Logger.log_error(f"fused_decoder: request {request.request_id()}: {error!r}")
                deliver(Internal("The decoder could not read the request."))
            else:
                self.loop.submit(valid, latents, latent_index, deliver, sender.is_cancelled)

    def is_ready(self) -> bool:
        """Newer Tritons than the wheel's ask it where a probe asks for this model."""
        return bool(self.loop.is_alive)

    def finalize(self) -> None:
        self.loop.close()
        del self.loop  # its metrics, too, while there is a Triton to take them back: afterwards the stub would crash
