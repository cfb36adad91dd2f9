"""Which pictures we believe the decoder to hold. A belief: being wrong costs one more round, never correctness."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class ResidentKeys:
    """The `max_keys` keys last used."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._keys: OrderedDict[str, None] = OrderedDict()

    def missing(self, keys: Iterable[str]) -> set[str]:
        return {key for key in keys if key not in self._keys}

    def add(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._max_keys:
            self._keys.popitem(last=False)

    def discard(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._keys.pop(key, None)
