"""Which picture's K/V lies on which pages of the picture pool, by content key. Pure accounting, no torch.

A picture owns one page or more, as many as it has tiles: its key says what the encoder saw, so always as many. It is
held by the sequences that look at it. It is resident once its pages were filled; pages that never were go back empty
with their last holder. A resident picture that nobody holds stays until its pages are wanted, least recently used
first. All counts are of pages. The tensors are a `page_pool.PagePool`.
"""

from __future__ import annotations

from collections import OrderedDict

Pages = tuple[int, ...]  # of one picture, in the order of its tiles


class ImagePages:
    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._pages_of: dict[str, Pages] = {}
        self._unfilled: set[str] = set()  # have pages, are not resident yet
        self._refcounts: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # resident, held by nobody, least recently used first
        self._num_idle = 0
        self._empty = list(range(num_pages - 1, -1, -1))

    @property
    def num_resident(self) -> int:
        return self.num_pages - len(self._empty) - self.num_pages_of(*self._unfilled)

    @property
    def num_held(self) -> int:
        return self.num_pages - len(self._empty) - self._num_idle

    def __contains__(self, key: str) -> bool:
        """Whether a picture is resident."""
        return key in self._pages_of and key not in self._unfilled

    def has_pages(self, key: str) -> bool:
        """Whether a picture is resident, or will be once its pages are filled."""
        return key in self._pages_of

    def num_pages_of(self, *keys: str) -> int:
        """What these pictures have together; 0 for those that have none."""
        return sum(len(self._pages_of.get(key, ())) for key in keys)

    def refcount(self, key: str) -> int:
        return self._refcounts.get(key, 0)

    def num_insertable(self, wanted: set[str]) -> int:
        """How many pages could be inserted while those of `wanted` that are resident are kept."""
        kept = self.num_pages_of(*(key for key in wanted if key in self._idle))
        return len(self._empty) + self._num_idle - kept

    def hold(self, key: str) -> Pages:
        """Become one more holder of a picture that has pages; returns them. Raises KeyError if it has none."""
        pages = self._pages_of[key]
        if key in self._idle:
            del self._idle[key]
            self._num_idle -= len(pages)
        self._refcounts[key] += 1
        return pages

    def insert(self, key: str, num_pages: int) -> Pages:
        """Give a picture its pages, and hold it; the caller fills them before they are read, then calls `filled`.

        Raises, having taken and evicted none, IndexError if too few pages can be had, KeyError if it has pages.
        """
        if key in self._pages_of:
            raise KeyError(key)
        if num_pages > self.num_insertable(set()):
            raise IndexError(f"{num_pages} pages wanted, {self.num_insertable(set())} are not held")
        while len(self._empty) < num_pages:
            evicted, _ = self._idle.popitem(last=False)
            self._num_idle -= self.num_pages_of(evicted)
            self._forget(evicted)
        pages = tuple(self._empty.pop() for _ in range(num_pages))
        self._pages_of[key] = pages
        self._unfilled.add(key)
        self._refcounts[key] = 1
        return pages

    def filled(self, key: str) -> None:
        """The picture's K/V is on its pages: from now on it is resident."""
        self._unfilled.discard(key)

    def release(self, key: str) -> None:
        """Stop holding a picture. If resident, it stays so until its pages are wanted."""
        self._refcounts[key] -= 1
        if self._refcounts[key] > 0:
            return
        if key in self._unfilled:
            self._unfilled.discard(key)
            self._forget(key)
        else:
            self._idle[key] = None
            self._num_idle += self.num_pages_of(key)

    def _forget(self, key: str) -> None:
        self._empty.extend(reversed(self._pages_of.pop(key)))
        del self._refcounts[key]
