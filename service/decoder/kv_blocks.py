"""Who owns which block of the paged self-K/V cache, and which full blocks can be shared. Pure accounting, no torch.

A block is free (refcount 0) or held by one or more sequences. Full blocks are published under the hash of all that
their K/V depends on; a published block may gain holders, because nobody writes to a full block again. A free block
stays published until it is taken for something else, least recently freed first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as List

BLOCK_SIZE = 16  # tokens


class KVBlocks:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refcounts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently freed first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def refcount(self, block: int) -> int:
        return self._refcounts[block]

    def lookup(self, hashes: List[bytes]) -> list[int]:
        """The published blocks of the longest known prefix of `hashes`. Takes none of them."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: List[int]) -> None:
        """Become one more holder of published blocks."""
        for block in blocks:
            self._free.pop(block, None)
            self._refcounts[block] += 1

    def num_allocatable(self, shared: List[int]) -> int:
        """How many blocks could be allocated after `share(shared)`."""
        return len(self._free) - sum(1 for block in shared if self._refcounts[block] == 0)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks to write to, ascending, since a row of them needs no gather. Whatever was published
        in them is forgotten.

        Raises IndexError, having taken none, if fewer are free.
        """
        if count > len(self._free):
            raise IndexError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = sorted(self._free.popitem(last=False)[0] for _ in range(count))
        for block in blocks:
            self._refcounts[block] = 1
            block_hash = self._hash_of.pop(block, None)
            if block_hash is not None:
                del self._block_of[block_hash]
        return blocks

    def publish(self, block: int, block_hash: bytes) -> None:
        """Let others find a block that is full and will not be written again."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: List[int]) -> None:
        """Stop holding a sequence's blocks, given in its order: its last block is the first to be taken again."""
        for block in reversed(blocks):
            self._refcounts[block] -= 1
            if self._refcounts[block] == 0:
                self._free[block] = None


def hash_block(previous: bytes, token_ids: List[int], sights: List[tuple[str, ...]]) -> bytes:
    """The chained hash of one full block: all that its self-K/V depends on.

    `sights[i]`: keys of the pictures that token i sees; self-K/V above the first gated block depends on them.
    """
    digest = hashlib.sha256(previous)
    for token, keys in zip(token_ids, sights, strict=True):
        digest.update(b"%d:%s;" % (token, ",".join(keys).encode()))
    return digest.digest()
