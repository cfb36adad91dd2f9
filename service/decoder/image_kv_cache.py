"""Which picture's K/V lies on which page of the picture pool, by content key. Pure accounting, no torch.

A picture is held by the sequences that look at it. It is resident once its page was filled; a page that never was goes
back empty with its last holder. A resident picture that nobody holds stays until its page is wanted, least recently
used first. The tensors are `cross_attention.ImagePages`.
"""

from __future__ import annotations

from collections import OrderedDict


class ImageKVCache:
    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._page_of: dict[str, int] = {}
        self._unfilled: set[str] = set()  # have a page, are not resident yet
        self._refcounts: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # resident, held by nobody, least recently used first
        self._empty = list(range(num_pages - 1, -1, -1))

    @property
    def num_resident(self) -> int:
        return len(self._page_of) - len(self._unfilled)

    @property
    def num_held(self) -> int:
        return len(self._page_of) - len(self._idle)

    def __contains__(self, key: str) -> bool:
        """Whether a picture is resident."""
        return key in self._page_of and key not in self._unfilled

    def has_page(self, key: str) -> bool:
        """Whether a picture is resident, or will be once its page is filled."""
        return key in self._page_of

    def refcount(self, key: str) -> int:
        return self._refcounts.get(key, 0)

    def num_insertable(self, wanted: set[str]) -> int:
        """How many pictures could be inserted while those of `wanted` that are resident are kept."""
        return len(self._empty) + len(self._idle) - sum(1 for key in wanted if key in self._idle)

    def hold(self, key: str) -> int:
        """Become one more holder of a picture that has a page; returns it. Raises KeyError if it has none."""
        page = self._page_of[key]
        self._idle.pop(key, None)
        self._refcounts[key] += 1
        return page

    def insert(self, key: str) -> int:
        """Give a picture a page, and hold it; the caller fills the page before it is read, then calls `filled`.

        Raises IndexError if every page is held, KeyError if the picture has a page.
        """
        if key in self._page_of:
            raise KeyError(key)
        if not self._empty:
            if not self._idle:
                raise IndexError("every page is held")
            evicted, _ = self._idle.popitem(last=False)
            self._forget(evicted)
        page = self._empty.pop()
        self._page_of[key] = page
        self._unfilled.add(key)
        self._refcounts[key] = 1
        return page

    def filled(self, key: str) -> None:
        """The picture's K/V is on its page: from now on it is resident."""
        self._unfilled.discard(key)

    def release(self, key: str) -> None:
        """Stop holding a picture. If resident, it stays so until its page is wanted."""
        self._refcounts[key] -= 1
        if self._refcounts[key] > 0:
            return
        if key in self._unfilled:
            self._unfilled.discard(key)
            self._forget(key)
        else:
            self._idle[key] = None

    def _forget(self, key: str) -> None:
        self._empty.append(self._page_of.pop(key))
        del self._refcounts[key]
