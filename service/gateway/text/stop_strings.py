"""Ends a text before its first stop string, also where tokens cut the string into pieces."""

from __future__ import annotations


class StopStrings:
    """Of one request. No part of a stop string is ever given out, nor held back longer than it may be one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._beginnings = [_Beginning(stop) for stop in stops]
        self._held = ""  # an end of the text that may be the beginning of a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """(what may be sent, whether a stop string was met). After True nothing more is to be pushed."""
        if not self._beginnings or not text:
            return text, False
        whole = self._held + text
        found = []
        for beginning in self._beginnings:
            start = whole.find(beginning.stop)
            if start >= 0:
                found.append((start + len(beginning.stop), start))
        if found:  # several: the one complete first, as if the text had come character by character
            self._held = ""
            _, start = min(found)
            return whole[:start], True
        num_sent = len(whole) - max(beginning.follow(text) for beginning in self._beginnings)
        self._held = whole[num_sent:]
        return whole[:num_sent], False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


class _Beginning:
    """How much of a stop string's beginning a text ends with, for a few steps a character.

    Source: Knuth, Morris and Pratt (1977); `borders[n]` is the longest proper end of stop[:n] that begins it, too.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self._length = 0
        self._borders = [0, 0]
        for char in stop[1:]:
            self._borders.append(self._longer(self._borders[-1], char))

    def follow(self, text: str) -> int:
        """The length after `text`, in which the stop string does not become complete."""
        if len(text) >= len(self.stop):
            text, self._length = text[1 - len(self.stop) :] if len(self.stop) > 1 else "", 0
        for char in text:
            self._length = self._longer(self._length, char)
        return self._length

    def _longer(self, length: int, char: str) -> int:
        while length and self.stop[length] != char:
            length = self._borders[length]
        return length + (self.stop[length] == char)
