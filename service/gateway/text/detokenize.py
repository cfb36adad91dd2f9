"""Token ids to text as they come: never half a character, and in sum exactly what decoding them all at once gives.

Source: the window method of text-generation-inference and vLLM (prefix and read offset), with three departures.
Special tokens and ids without a token never enter the window: one of nothing but them would make the next word lose
its space. A run of byte-fallback tokens waits for its end, because such a decoder judges the run as a whole. And the
text already sent of a window is remembered instead of decoded again. (`tokenizers.decoders.DecodeStream` has no way to
flush its tail, and raises on sequences whose decoding is not a prefix of the longer one's.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Vocabulary:
    """What a Detokenizer must know of a tokenizer, read once and shared by all requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode = tokenizer.decode
        vocabulary = tokenizer.get_vocab()
        special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.visible_ids = frozenset(vocabulary.values()) - special  # of a padded vocabulary some ids have no token
        self.byte_ids = frozenset(token_id for token, token_id in vocabulary.items() if BYTE_TOKEN.fullmatch(token))


class Detokenizer:
    """Of one request."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []  # the ids of the last piece sent, then those not sent yet
        self._num_read = 0  # ids of the window whose text is sent
        self._sent = ""  # the text of those ids, decoded alone

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now; "" while it ends inside a character."""
        visible = [token for token in token_ids if token in self._vocabulary.visible_ids]
        self._window += visible
        if not visible or visible[-1] in self._vocabulary.byte_ids:
            return ""
        text = self._vocabulary.decode(self._window, skip_special_tokens=False)
        if len(text) <= len(self._sent) or text.endswith(REPLACEMENT):
            return ""
        piece = text[len(self._sent) :]
        del self._window[: self._num_read]
        self._num_read = len(self._window)
        self._sent = self._vocabulary.decode(self._window, skip_special_tokens=False)
        return piece

    def flush(self) -> str:
        """What is left at the end; an unfinished character comes out as U+FFFD."""
        text = self._vocabulary.decode(self._window, skip_special_tokens=False)[len(self._sent) :]
        self._window, self._num_read, self._sent = [], 0, ""
        return text
