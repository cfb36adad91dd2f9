"""What gRPC and Triton say when a call fails, as errors of ours.

An error of a stage of ours is told by its code. Only what Triton, gRPC or a balancer say themselves is told by its
text, and none of that reaches a client.
"""

from __future__ import annotations

import logging

import grpc

from service.errors import CrossgateError, Internal, Overloaded, StageLost, StageTimeout, Unavailable, from_triton

log = logging.getLogger(__name__)

# Triton's own. A request that got one of these has reached no model.
_FULL = ("exceeds maximum queue size", "request timeout expired")  # of the encoder's queue; the second waited in it
_NOT_READY = (
    "unknown model",
    "not ready",
    "not at ready state",
    "not healthy",
    "not found",
    "no available versions",
    "stopped accepting new inference requests",
    "server is stopping",
    "is being unloaded",
    "unavailable",
)
# gRPC's own and a balancer's: no server has had the call. HAProxy says 503 where it had none to send it to.
_NEVER_SENT = ("failed to connect", "dns resolution failed", "domain name not found", "http2 header with status: 503")
_STREAM_ENDED = ("stream removed", "received rst_stream", "internal error from core")  # the last: of a write on it


def from_message(message: str) -> CrossgateError:
    """The error of a stage of ours, or a fixed text for what Triton itself says."""
    return from_triton(message) or _from_text(message.lower()) or _unknown(message)


def from_grpc(code: grpc.StatusCode, details: str | None) -> CrossgateError:
    """The error of a call that ended with a status."""
    message = details or ""
    known = from_triton(message) or _from_text(message.lower())
    if known is not None:
        return known
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return StageTimeout("The model server did not answer in time.")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded("The model server is full; try again later.", retry_after_s=1)
    ended = message.lower().startswith(_STREAM_ENDED)  # by a balancer whose server died: an INTERNAL or UNKNOWN
    if ended or code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED):
        return StageLost("The model server ended the call.", retry_after_s=1)
    return _unknown(message)


def _from_text(text: str) -> CrossgateError | None:
    if any(said in text for said in _FULL):
        return Overloaded("The vision encoder's queue is full; try again later.", retry_after_s=1)
    if any(said in text for said in _NOT_READY):
        return Unavailable("The model is not ready.", retry_after_s=5)
    if any(said in text for said in _NEVER_SENT):
        return Unavailable("The model server cannot be reached.", retry_after_s=5)
    return None


def _unknown(message: str) -> Internal:
    log.error("Triton: %s", message)
    return Internal("The model server failed.")
