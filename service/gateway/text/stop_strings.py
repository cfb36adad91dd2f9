"""Ends a text before its first stop string, also where tokens cut the string into pieces."""

from __future__ import annotations


class StopStrings:
    """Of one request. No part of a stop string is ever given out, nor held back longer than it may be one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""  # an end of the text that may be the beginning of a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """(what may be sent, whether a stop string was met). After True nothing more is to be pushed."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if found:  # several: the one complete first, as if the text had come character by character
            self._held = ""
            _, start = min(found)
            return text[:start], True
        num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
