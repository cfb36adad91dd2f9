"""Clients' text on its way through a chat template, so that the template's control tokens can be told from it.

Whatever could spell a control token is exchanged, one character for one, for private-use characters that the client's
text does not hold. Lengths, spaces and line ends stay, so templates may trim, slice, measure and test what they like.
Knows nothing of templates.
"""

from __future__ import annotations

from collections.abc import Iterable

from service.errors import InvalidRequest
from service.gateway.text.control_tokens import ControlTokens

FIRST_PRIVATE, LAST_PRIVATE = 0xF0000, 0x10FFFD  # planes 15 and 16


class Disguise:
    """Of one request, with all its `texts`. Raises InvalidRequest if they use up the private-use characters."""

    def __init__(self, control_tokens: ControlTokens, texts: Iterable[str]) -> None:
        self._control_tokens = control_tokens
        marks = sorted(set().union(*map(_marks, control_tokens.spellings)))
        first = _free_block(len(marks), set().union(*texts))
        self._hide = {ord(char): first + index for index, char in enumerate(marks)}
        self._reveal = {private: char for char, private in self._hide.items()}

    def hide_spellings(self, text: str) -> str:
        """Only what spells a control token; most texts come back as they are."""
        hidden, done = [], 0
        for start, end, _ in self._control_tokens.find(text):
            hidden += [text[done:start], text[start:end].translate(self._hide)]
            done = end
        return "".join([*hidden, text[done:]])

    def hide_marks(self, text: str) -> str:
        """Every `<`, `|` and whatever else makes a control token of a word: nothing is left to make one of."""
        return text.translate(self._hide)

    def reveal(self, text: str) -> str:
        return text.translate(self._reveal)


def _marks(spelling: str) -> set[str]:
    """In either case, lest a template make a control token by writing a text in capitals."""
    ends = {spelling[0], spelling[-1]}
    signs = {char for char in spelling if not char.isalnum() and not char.isspace()}
    return signs | {char for end in ends for char in (end, *end.upper(), *end.lower())}


def _free_block(size: int, chars: set[str]) -> int:
    """The first of `size` private-use characters that are not among `chars`."""
    size = max(1, size)
    taken = {(ord(char) - FIRST_PRIVATE) // size for char in chars}
    for block in range((LAST_PRIVATE - FIRST_PRIVATE) // size):
        if block not in taken:
            return FIRST_PRIVATE + block * size
    raise InvalidRequest("The messages hold too many different private-use characters.", param="messages")
