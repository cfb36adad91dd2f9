"""Which picture's K/V lies on which page of the picture pool, by content key. Pure accounting, no torch.

A picture is held by the sequences that look at it. One that nobody holds stays until its page is wanted, least
recently used first. The tensors are `cross_attention.ImagePages`.
"""

from __future__ import annotations

from collections import OrderedDict


class ImageKVCache:
    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._page_of: dict[str, int] = {}
        self._refcounts: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # resident, held by nobody, least recently used first
        self._empty = list(range(num_pages - 1, -1, -1))

    @property
    def num_resident(self) -> int:
        return len(self._page_of)

    @property
    def num_held(self) -> int:
        return len(self._page_of) - len(self._idle)

    def __contains__(self, key: str) -> bool:
        return key in self._page_of

    def refcount(self, key: str) -> int:
        return self._refcounts.get(key, 0)

    def num_insertable(self, wanted: set[str]) -> int:
        """How many pictures could be inserted while those of `wanted` that are resident are kept."""
        return len(self._empty) + sum(1 for key in self._idle if key not in wanted)

    def hold(self, key: str) -> int:
        """Become one more holder of a resident picture; returns its page. Raises KeyError if it is not resident."""
        page = self._page_of[key]
        self._idle.pop(key, None)
        self._refcounts[key] += 1
        return page

    def insert(self, key: str) -> int:
        """Give a picture that is not resident a page, and hold it; the caller fills the page before it is read.

        Raises IndexError if every page is held, KeyError if the picture is resident.
        """
        if key in self._page_of:
            raise KeyError(key)
        if not self._empty:
            if not self._idle:
                raise IndexError("every page is held")
            evicted, _ = self._idle.popitem(last=False)
            self._empty.append(self._page_of.pop(evicted))
            del self._refcounts[evicted]
        page = self._empty.pop()
        self._page_of[key] = page
        self._refcounts[key] = 1
        return page

    def release(self, key: str) -> None:
        """Stop holding a picture. It stays resident until its page is wanted."""
        self._refcounts[key] -= 1
        if self._refcounts[key] == 0:
            self._idle[key] = None
