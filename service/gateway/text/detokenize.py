"""Token ids to text as they come: never half a character, and in sum exactly what decoding them all at once gives.

Source: the window method of text-generation-inference and vLLM, with departures. Special tokens, empty ones and ids
without a token never enter the window: one of nothing but them would make the next word lose its space. A run of
byte-fallback tokens waits for its end, because such a decoder judges the run as a whole. And what was sent is counted
in characters from the window's end, so that a window can be cut short anywhere, even inside a character: no push costs
more for what came before it. (`tokenizers.decoders.DecodeStream` has no way to flush its tail, and raises on sequences
whose decoding is not a prefix of the longer one's.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
MAX_WINDOW = 16
KEPT = 8  # at least as many bytes, of which 3 may be the beginning of a character that is not complete


class Vocabulary:
    """What a Detokenizer must know of a tokenizer, read once and shared by all requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode = tokenizer.decode
        vocabulary = tokenizer.get_vocab()
        special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        # of a padded vocabulary some ids have no token
        self.visible_ids = frozenset(token_id for token, token_id in vocabulary.items() if token) - special
        letter = vocabulary.get("<0x41>")
        has_byte_fallback = letter is not None and tokenizer.decode([letter], skip_special_tokens=False) == "A"
        self.byte_ids = frozenset(
            token_id for token, token_id in vocabulary.items() if has_byte_fallback and BYTE_TOKEN.fullmatch(token)
        )


class Detokenizer:
    """Of one request."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []  # the last ids, those first whose text is sent
        self._num_sent = 0  # characters of the window's text

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now; "" while it ends inside a character."""
        visible = [token for token in token_ids if token in self._vocabulary.visible_ids]
        self._window += visible
        if not visible or visible[-1] in self._vocabulary.byte_ids:
            return ""
        text = self._decode(self._window)
        # what is not complete is the last character alone: before it, U+FFFD stands for good
        num_certain = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._num_sent : num_certain]
        self._num_sent = max(self._num_sent, num_certain)
        if len(self._window) > MAX_WINDOW:
            self._cut(len(text))
        return piece

    def flush(self) -> str:
        """What is left at the end; an unfinished character comes out as U+FFFD."""
        text = self._decode(self._window)[self._num_sent :]
        self._window, self._num_sent = [], 0
        return text

    def _cut(self, num_chars: int) -> None:
        """Forget all but the last ids of a window with `num_chars`. What differs then is at the beginning, and sent."""
        kept = self._window[-KEPT:]
        num_sent = self._num_sent + len(self._decode(kept)) - num_chars
        if num_sent > 0:  # else they may be spaces that a decoder strips from an end
            self._window, self._num_sent = kept, num_sent

    def _decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids, skip_special_tokens=False)
