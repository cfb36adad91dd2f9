"""Triton's side of stage 2: a request in, a decoupled stream of token events out. The work is `service.decoder`'s.

Tensors cross as DLPack, texts and keys as UINT8: the stub in the PyPI wheel reads NumPy 2 arrays wrongly and a BYTES
tensor ends it, and bf16 has no NumPy form.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from service.contract import SamplingParams, TokenEvent, ValidRequest
from service.errors import CrossgateError
from service.families import load_family

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
GAUGE, COUNTER = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
PUBLISH_PERIOD_S = 0.05  # a value costs a call into Triton; the last step of a busy time is published always
METRICS: dict[str, tuple[Any, str, Callable[[Any], float]]] = {
    "decoder_num_requests_running": (GAUGE, "Sequences in the batch", lambda s: s.num_running),
    "decoder_num_requests_waiting": (GAUGE, "Sequences not yet scheduled", lambda s: s.num_waiting),
    "kv_cache_usage_ratio": (GAUGE, "Self-K/V blocks in use", lambda s: s.kv_blocks_used / max(1, s.kv_blocks_total)),
    "image_kv_cache_bytes": (GAUGE, "K/V bytes of resident pictures", lambda s: s.image_kv_bytes),
    "image_kv_cache_queries_total": (COUNTER, "Pictures looked up", lambda s: s.image_queries),
    "image_kv_cache_hits_total": (COUNTER, "Pictures found resident", lambda s: s.image_hits),
    "prefix_cache_queries_total": (COUNTER, "Prompt tokens looked up", lambda s: s.prefix_queries),
    "prefix_cache_hits_total": (COUNTER, "Prompt tokens found cached", lambda s: s.prefix_hits),
    "num_preemptions_total": (COUNTER, "Sequences put back for recomputing", lambda s: s.num_preemptions),
    "decoder_steps_total": (COUNTER, "Engine steps", lambda s: s.steps),
}


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Declare the tensors from the checkpoint. No torch here: Triton runs this in a process of its own."""
        latents_shape = list(load_family(Path(os.environ["MODEL_PATH"])).vision.latents_shape)
        on_gpu = not os.environ.get("DEVICE", "cpu").startswith("cpu")
        for name, data_type, dims, optional in (
            ("input_ids", "TYPE_INT32", [-1], False),
            ("sampling", "TYPE_UINT8", [-1], False),
            ("image_keys", "TYPE_UINT8", [-1, 32], True),
            ("image_positions", "TYPE_INT32", [-1], True),
            ("latents", "TYPE_FP16" if on_gpu else "TYPE_FP32", [-1, *latents_shape], True),
            ("latent_index", "TYPE_INT32", [-1], True),
        ):
            config.add_input({"name": name, "data_type": data_type, "dims": dims, "optional": optional})
        config.add_output({"name": "token_ids", "data_type": "TYPE_INT32", "dims": [-1]})
        config.add_output({"name": "event", "data_type": "TYPE_UINT8", "dims": [-1]})
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        import torch

        from service.decoder.engine import Engine
        from service.decoder.loop import EngineLoop
        from service.decoder.settings import DecoderSettings

        self.torch = torch
        self.families = {  # a family that is not referenced takes its metrics along
            name: pb_utils.MetricFamily(name=f"crossgate_{name}", description=description, kind=kind)
            for name, (kind, description, _) in METRICS.items()
        }
        self.metrics = {name: family.Metric(labels={}) for name, family in self.families.items()}
        self.published = dict.fromkeys(METRICS, 0.0)
        self.published_at_s = 0.0
        family = load_family(Path(os.environ["MODEL_PATH"]))
        engine = Engine.from_family(family, DecoderSettings.from_environment())
        self.loop = EngineLoop(engine, on_step=self.publish)

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to the engine; its thread answers through the response senders."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.loop.submit(*self.read(request), self.deliver_to(sender), sender.is_cancelled)
            except CrossgateError as error:
                self.deliver_to(sender)(error)

    def read(self, request: Any) -> tuple[ValidRequest, Any, list[int]]:
        """The request, its latents [S, R, E] and their index. Copies: the tensors' memory is Triton's."""

        def tensor(name: str) -> Any:
            found = pb_utils.get_input_tensor_by_name(request, name)
            return None if found is None else self.torch.from_dlpack(found.to_dlpack()).clone()

        def integers(name: str) -> list[int]:
            found = tensor(name)
            return [] if found is None else found.tolist()

        valid = ValidRequest(
            input_ids=tuple(integers("input_ids")),
            image_keys=tuple(bytes(key).hex() for key in integers("image_keys")),
            image_positions=tuple(integers("image_positions")),
            sampling=SamplingParams.from_json(bytes(integers("sampling"))),
        )
        return valid, tensor("latents"), integers("latent_index")

    def deliver_to(self, sender: Any) -> Callable[[TokenEvent | CrossgateError | None], None]:
        """What the engine calls with a request's events; None says that it was cancelled. FINAL is owed after each end."""

        def tensor(name: str, values: Any, dtype: Any) -> Any:
            return pb_utils.Tensor.from_dlpack(name, self.torch.tensor(values, dtype=dtype))

        def deliver(event: TokenEvent | CrossgateError | None) -> None:
            if event is None:
                sender.send(flags=FINAL)
            elif isinstance(event, CrossgateError):
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(event.to_triton())), flags=FINAL)
            else:
                token_ids = tensor("token_ids", event.token_ids or (0,), self.torch.int32)
                text = tensor("event", list(event.to_json().encode()), self.torch.uint8)
                flags = 0 if event.finish_reason is None else FINAL
                sender.send(pb_utils.InferenceResponse([token_ids, text]), flags=flags)

        return deliver

    def publish(self, stats: Any) -> None:
        """Bring Triton's /metrics up to date; called by the engine after each step and when it falls idle."""
        now_s = time.monotonic()
        if stats.num_running + stats.num_waiting > 0 and now_s - self.published_at_s < PUBLISH_PERIOD_S:
            return
        self.published_at_s = now_s
        for name, (kind, _, value_of) in METRICS.items():
            value, before = float(value_of(stats)), self.published[name]
            if value != before:
                self.metrics[name].set(value) if kind == GAUGE else self.metrics[name].increment(value - before)
                self.published[name] = value

    def finalize(self) -> None:
        self.loop.close()
