"""A picture worker: a process that decodes one picture after another, and that may be killed while it does.

It reads jobs from the socket at its standard input and answers there, until the gateway closes it or dies. It imports
no web framework and no gRPC, holds no key and no secret, and its memory is limited anew for each picture.

A message is the length of a JSON head (4 bytes, big-endian), the head, and as many bytes as its "length" says. First
the `Setup`, pickled. Then jobs {"field", "base64", "heavy_bytes"} with the picture's bytes. Answers are {"key",
"shape"} with pixels, {"heavy_bytes"} for a picture that has to ask again with that, or {"code", "message"};
"retires": the worker is to be replaced. Nothing that a worker says is unpickled.
"""

from __future__ import annotations

import binascii
import ctypes
import itertools
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import CrossgateError, InvalidRequest, TooLarge
from service.gateway.pictures.decode import PictureLimits, cost, draft_scale, draw, examine
from service.gateway.pictures.key import picture_key

LIGHT_BYTES = 16 << 20  # memory of a picture that needs no room in the budget
LIGHT_WORK = 64_000_000  # pixels, those of each scan: some 50 ms
SLACK_BYTES = 64 << 20  # beside a picture's memory, for the allocator
FILE_COPIES = 4  # of its file: as it came, without base64, in parts, and reduced to the first frame
MAX_PICTURES = 2_000  # then a new process, should a decoder leak
NICENESS = 5  # decoding gives way to the gateway's own loop
PR_SET_PDEATHSIG = 1
HEAD = struct.Struct(">I")


@dataclass(frozen=True)
class Setup:
    """What a worker knows of the limits and the model. Pixels: of a side of a tile, and of the square that resizing is
    counted as.
    """

    limits: PictureLimits
    identity: str
    tile_size: int
    resized_side: int
    preprocess: Callable[[Image.Image], NDArray[np.uint8]]


def main() -> None:
    _follow(int(sys.argv[1]))
    connection = socket.socket(fileno=0)
    stream = connection.makefile("rb")
    setup: Setup = pickle.loads(_read(stream)[1])
    memory_bytes = _memory_bytes()
    for number in itertools.count(1):
        _limit_memory(resource.RLIM_INFINITY)  # the gateway bounds what it sends
        try:
            job, content = _read(stream)
        except EOFError:
            return
        file_bytes = FILE_COPIES * len(content)
        _limit_memory(memory_bytes + SLACK_BYTES + file_bytes + (job["heavy_bytes"] or LIGHT_BYTES) * 5 // 4)
        retires = number >= MAX_PICTURES
        try:
            answer, pixels = _answer(setup, job, content)
        except CrossgateError as error:
            answer, pixels = {"code": error.code, "message": error.message}, b""
        except Exception:  # out of memory, mostly: a picture that its header did not announce
            answer, pixels = {"code": InvalidRequest.code, "message": "The picture cannot be decoded."}, b""
            retires = True
        del content
        connection.sendall(head_bytes({**answer, "retires": retires, "length": len(pixels)}) + pixels)


def head_bytes(head: dict[str, Any]) -> bytes:
    text = json.dumps(head).encode()
    return HEAD.pack(len(text)) + text


def _answer(setup: Setup, job: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    field, limits = job["field"], setup.limits
    if job["base64"]:
        try:
            content = binascii.a2b_base64(content, strict_mode=True)
        except binascii.Error as error:
            raise InvalidRequest("The data URL is not valid base64.", param=field) from error
        if len(content) > limits.max_image_bytes:
            raise TooLarge(f"A picture takes at most {limits.max_image_bytes} bytes.", param=field)
    container = examine(content, field, limits.max_image_pixels)
    del content
    scale = draft_scale(container, setup.tile_size)
    needed = cost(container, setup.resized_side, scale)
    if needed.memory_bytes > limits.memory_bytes:
        raise TooLarge(
            f"A picture takes at most {limits.memory_bytes} bytes of memory to decode; "
            f"this one would take {needed.memory_bytes}.",
            param=field,
        )
    if not job["heavy_bytes"] and (needed.memory_bytes > LIGHT_BYTES or needed.work > LIGHT_WORK):
        return {"heavy_bytes": needed.memory_bytes}, b""
    picture = draw(container, field, scale)
    del container
    pixels = np.ascontiguousarray(setup.preprocess(picture))
    return {"key": picture_key(pixels, setup.identity), "shape": pixels.shape}, pixels.tobytes()


def _read(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Raises EOFError when the gateway is gone."""
    (length,) = HEAD.unpack(_exactly(stream, HEAD.size))
    head: dict[str, Any] = json.loads(_exactly(stream, length))
    return head, _exactly(stream, head["length"])


def _exactly(stream: BinaryIO, length: int) -> bytes:
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content


def _follow(gateway: int) -> None:
    """Ends with the gateway, however that ends, and with nobody else's Ctrl-C; leaves no core behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != gateway:
        sys.exit()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)


def _memory_bytes() -> int:
    """Address space in use."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


def _limit_memory(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
