"""One item of a batch never fails the others, and a process that can compute nothing more says so. For both stages.

Knows nothing of what is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_DEAD_BATCHES = 3  # in a row

logger = logging.getLogger(__name__)


class Broken(Exception):
    """This process can compute nothing more; only a new one can."""


def run_apart(run: Callable[[list[Item]], list[Result | None]], items: list[Item]) -> list[Result | None]:
    """`run(items)`, one result each; if that raises, its halves', and so on down to single items.

    None: the item failed by itself. `run` must give the same when it is run again. Raises Broken if the accelerator
    will answer nothing but errors.
    """
    try:
        return run(items)
    except Exception as error:
        if is_sticky(error):
            raise Broken(f"{error!r}") from error
        if len(items) == 1:
            logger.exception("one of a batch failed by itself")
        else:
            logger.warning("a batch of %d failed, and is computed in parts: %r", len(items), error)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # out here, where the exception keeps no tensor alive any more
    if len(items) <= 1:
        return [None for _ in items]
    half = len(items) // 2
    return [*run_apart(run, items[:half]), *run_apart(run, items[half:])]


def is_sticky(error: BaseException) -> bool:
    """Whether every later call to the accelerator will fail, too. Out of memory is not that."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text:
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in text


class Pulse:
    """Tells broken requests from a broken process, when everything in a batch has failed.

    Whoever sends nothing but requests that fail must not end a process that others use: `probe`, which computes
    something small that always worked, has the last word.
    """

    def __init__(self, probe: Callable[[], bool]) -> None:
        self._probe = probe
        self._num_dead = 0

    def beat(self, alive: bool) -> None:
        """After each batch: whether anything in it worked. Raises Broken if nothing has for several in a row."""
        self._num_dead = 0 if alive or self._works() else self._num_dead + 1
        if self._num_dead == MAX_DEAD_BATCHES:
            raise Broken(f"everything failed in {MAX_DEAD_BATCHES} batches in a row, and so did a probe after each")

    def _works(self) -> bool:
        try:
            return self._probe()
        except Exception as error:
            if is_sticky(error):
                raise Broken(f"{error!r}") from error
            logger.exception("a probe failed")
            return False


def all_finite(tensor: Tensor) -> bool:
    """Whether every number is. The least and the greatest tell, NaN being both, ten times as fast as `isfinite()`."""
    if tensor.numel() == 0:
        return True
    least, greatest = tensor.aminmax()
    return bool(least.isfinite() & greatest.isfinite())
