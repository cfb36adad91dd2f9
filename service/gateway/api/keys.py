"""Whose key a request carries: keys with names, from a variable and a file, which is read again when it has changed.

No message shows a key. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from service.errors import InvalidRequest

log = logging.getLogger(__name__)

VARIABLE, FILE_VARIABLE = "CROSSGATE_API_KEYS", "CROSSGATE_API_KEYS_FILE"
MAX_FILE_BYTES = 1 << 20
LOOK_AGAIN_S = 1.0
MAX_LOOK_S = 1.0  # a file system that hangs must not hold up requests
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]{1,512}")  # what a header can carry and nobody confuses: printable ASCII without spaces


class KeyRing:
    """`listed`: keys separated by commas. `file`: one key a line. Each is `NAME:KEY`, or a bare key, named `key-N`.

    What follows a `#` at the start of a line or after a space is a comment. `on_change` is called, in the event loop,
    when the file has new keys. Raises InvalidRequest, in one line for an operator, if there is no key or a wrong one.
    """

    def __init__(self, listed: str, file: Path | None, on_change: Callable[[KeyRing], None] = lambda ring: None):
        self._listed = listed
        self._file = file
        self._on_change = on_change
        content = b"" if file is None else _read(file)
        self._digests = _parse(listed, file, content)
        self._seen = hashlib.sha256(content).digest()
        self._complaint = ""
        self._looked_s = time.monotonic()
        self._look: asyncio.Task[None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._digests)

    async def name_of(self, key: str) -> str | None:
        """The name that the key stands for; None if it is none of ours. Takes as long whichever it is."""
        await self._look_again()
        given = _digest(key)
        matches = [name for name, digest in self._digests.items() if hmac.compare_digest(given, digest)]
        return matches[0] if matches else None

    async def _look_again(self) -> None:
        """At most once a second; who comes meanwhile waits for the same look."""
        if self._file is None:
            return
        if self._look is None and time.monotonic() - self._looked_s >= LOOK_AGAIN_S:
            self._look = asyncio.create_task(self._reload(self._file))
        if self._look is not None:
            await asyncio.wait((self._look,), timeout=MAX_LOOK_S)

    async def _reload(self, file: Path) -> None:
        """The contents are compared and not the times: a copy may keep its time, and a link its name."""
        try:
            content = await asyncio.to_thread(_read, file)
            seen = hashlib.sha256(content).digest()
            if seen != self._seen:
                self._seen = seen
                self._digests = _parse(self._listed, file, content)
                log.info("the keys were read again: %d of them", len(self._digests))
                self._on_change(self)
            self._complaint = ""
        except InvalidRequest as error:
            if error.message != self._complaint:
                log.error("the keys stay as they were: %s", error.message)
            self._complaint = error.message
        finally:
            self._looked_s = time.monotonic()
            self._look = None


def cache_salt(key: str) -> bytes:
    """What keeps a key's cached pictures and prefixes apart. Made of the key alone, so that all gateways agree, and not
    what `KeyRing` compares."""
    return hashlib.sha256(b"cache salt\0" + key.encode()).digest()


def _read(file: Path) -> bytes:
    """At most so much that it is seen to be too large."""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"{FILE_VARIABLE}: {file} cannot be read.", param=FILE_VARIABLE) from error


def _parse(listed: str, file: Path | None, content: bytes) -> dict[str, bytes]:
    """Digests by name."""
    digests: dict[str, bytes] = {}
    num_bare = 0
    entries = list(_entries(VARIABLE, listed.split(","), "entry"))
    if listed and not entries:
        raise InvalidRequest(f"{VARIABLE} holds no key.", param=VARIABLE)
    if file is not None:
        if len(content) > MAX_FILE_BYTES:
            raise InvalidRequest(f"{file} has more than {MAX_FILE_BYTES} bytes.", param=FILE_VARIABLE)
        try:
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{file} is not UTF-8.", param=FILE_VARIABLE) from error
        in_file = list(_entries(str(file), lines, "line"))
        if not in_file:
            raise InvalidRequest(f"{file} holds no key.", param=FILE_VARIABLE)
        entries += in_file
    for where, name, key in entries:
        if not name:
            num_bare += 1
            name = f"key-{num_bare}"
        if name in digests:
            raise InvalidRequest(f"{where}: the name {name} is taken.", param=where)
        if _digest(key) in digests.values():
            raise InvalidRequest(f"{where}: this key stands there twice.", param=where)
        digests[name] = _digest(key)
    return digests


def _entries(source: str, lines: list[str], unit: str) -> Iterator[tuple[str, str, str]]:
    """(where it stands, name or "", key) of each key."""
    for number, line in enumerate(lines, 1):
        entry = re.split(r"(?:^|\s)#", line.strip(), maxsplit=1)[0].strip()
        if not entry:
            continue
        where = f"{source}, {unit} {number}"
        name, colon, key = entry.partition(":")
        if not colon:
            name, key = "", entry
        elif not _NAME.fullmatch(name):
            raise InvalidRequest(f"{where}: a name has 1 to 64 of A-Z a-z 0-9 . _ -", param=source)
        if not _KEY.fullmatch(key):
            raise InvalidRequest(f"{where}: a key has 1 to 512 printable ASCII characters, no spaces.", param=source)
        yield where, name, key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
