"""The name by which gateway and decoder know a picture: who has another name for it does not find it cached."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def picture_key(pixels: NDArray[np.uint8], identity: str) -> str:
    """SHA-256 over the pixels and the config by which they were made, in hex.

    Not over the weights: latents say whose they are, and a decoder holds what its own encoder made.
    """
    digest = hashlib.sha256(f"{identity}\0{pixels.dtype.str}\0{pixels.shape}\0".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def salted_key(key: str, salt: bytes) -> str:
    """The key of the same picture among those who have this salt; without one, the key itself."""
    return hashlib.sha256(salt + bytes.fromhex(key)).hexdigest() if salt else key
