"""Between the fused decoder's tensors and `service.contract`'s types.

Tensors cross as DLPack, texts and keys as UINT8: the stub in the PyPI wheel reads NumPy 2 arrays wrongly and a BYTES
tensor ends it, and bf16 has no NumPy form.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import triton_python_backend_utils as pb_utils

from service.contract import MAX_SAMPLING_BYTES, SamplingParams, TokenEvent, ValidRequest
from service.errors import CrossgateError, InvalidRequest, OtherCheckpoint

log = logging.getLogger("fused_decoder")

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def read_request(request: Any, max_positions: int) -> tuple[ValidRequest, torch.Tensor | None, list[int]]:
    """The request, its latents [S, R, E] and their index. Copies: the tensors' memory is Triton's.

    Raises InvalidRequest if a tensor is longer than any can be, before its content is looked at, and if `sampling` is
    not what it should be; the engine checks the rest.
    """
    valid = ValidRequest(
        input_ids=tuple(_integers(request, "input_ids", max_positions)),
        image_keys=tuple(bytes(key).hex() for key in _integers(request, "image_keys", max_positions)),
        image_positions=tuple(_integers(request, "image_positions", max_positions)),
        sampling=SamplingParams.from_json(bytes(_integers(request, "sampling", MAX_SAMPLING_BYTES))),
        cache_salt=bytes(_integers(request, "cache_salt", 32)),
    )
    latents = _tensor(request, "latents", max_positions)  # several rows a picture; the engine knows how many fit
    return valid, latents, _integers(request, "latent_index", max_positions)


def check_makers(request: Any, *, config: str, checkpoint: str, max_images: int) -> None:
    """Raises OtherCheckpoint if the prompt or the latents were made by another checkpoint than ours."""
    if bytes(_integers(request, "config", len(config) // 2)).hex() != config:
        raise OtherCheckpoint("The model server runs another checkpoint than the gateway.", retry_after_s=5)
    makers = _integers(request, "latents_checkpoint", max_images)
    num_latents = len(_integers(request, "latent_index", max_images))
    if len(makers) != num_latents or any(bytes(maker).hex() != checkpoint for maker in makers):
        raise OtherCheckpoint("The two stages run different checkpoints.", retry_after_s=5)


def send(sender: Any, request_id: str, event: TokenEvent | CrossgateError | None) -> None:
    """Send what the engine delivers; None says that the request was cancelled. FINAL is owed then, too.

    A request's last is a line in the log, under the gateway's id. Never raises: what Triton does not take is logged.
    """
    try:
        _send(sender, event)
    except Exception as error:
        pb_utils.Logger.log_error(f"fused_decoder: request {request_id}: a response was not sent: {error!r}")
    if request_id and not (isinstance(event, TokenEvent) and event.finish_reason is None):
        log.info("request %s: %s", request_id, _told(event))


def _send(sender: Any, event: TokenEvent | CrossgateError | None) -> None:
    if event is None:
        sender.send(flags=FINAL)
    elif isinstance(event, CrossgateError):
        sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(event.to_triton())), flags=FINAL)
    else:
        token_ids = torch.tensor(event.token_ids, dtype=torch.int32)
        text = torch.frombuffer(bytearray(event.to_json().encode()), dtype=torch.uint8)
        outputs = [pb_utils.Tensor.from_dlpack("token_ids", token_ids), pb_utils.Tensor.from_dlpack("event", text)]
        sender.send(pb_utils.InferenceResponse(outputs), flags=0 if event.finish_reason is None else FINAL)


def _told(event: TokenEvent | CrossgateError | None) -> str:
    if event is None:
        return "cancelled"
    if isinstance(event, CrossgateError):
        return f"{event.code}: {event.message}"
    return f"{event.finish_reason} {event.usage} {event.timings}"


def _tensor(request: Any, name: str, max_length: int) -> torch.Tensor | None:
    found = pb_utils.get_input_tensor_by_name(request, name)
    if found is None:
        return None
    tensor = torch.from_dlpack(found.to_dlpack())
    if len(tensor) > max_length:
        raise InvalidRequest(f"{name} has {len(tensor)} entries; at most {max_length} are possible.", param=name)
    return torch.from_numpy(tensor.numpy().copy())  # by numpy: torch would copy a large one with OpenMP, in this thread


def _integers(request: Any, name: str, max_length: int) -> list[Any]:
    found = _tensor(request, name, max_length)
    return [] if found is None else found.tolist()
