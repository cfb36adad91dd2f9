"""Text to token ids, where control tokens stand only for what this service wrote: `write` gives them secret names.

A tokenizer recognises `<|im_end|>` wherever it is spelled, in a user's words, too. Ours is a copy in which each control
token has a name that no client can know, so that clients' text is only text, whatever it spells. Ids are unchanged.

A control token is an added token that is special, or not spelled like a word: `<tool_call>` has power over a model as
well. Added words, emoji and runs of spaces stay what they are.
"""

from __future__ import annotations

import json
import secrets
import unicodedata

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import WordLevel

from service.errors import InvalidRequest

Match = tuple[int, int, int]  # start, end, index among the control tokens


class ControlTokens:
    """Raises InvalidRequest, for an operator, if the tokenizer's control tokens cannot be told from its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        ids = [
            token_id for token_id in sorted(added) if added[token_id].special or not _is_word(added[token_id].content)
        ]
        tokens = [added[token_id] for token_id in ids]
        self.spellings = tuple(token.content for token in tokens)
        self._first_chars = {spelling[0] for spelling in self.spellings}
        self._secret = secrets.token_hex(8)
        # the first and last character stay, since neighbours that are `single_word` look at them
        self._names = [f"{text[0]}{self._secret}{index:05d}{text[-1]}" for index, text in enumerate(self.spellings)]
        self._ids = frozenset(ids)
        self._finder = _finder(tokens)
        self._tokenizer, self._unknown_id = _renamed(tokenizer, dict(zip(self.spellings, self._names, strict=True)))
        if [self._tokenizer.token_to_id(name) for name in self._names] != ids:
            raise InvalidRequest("The tokenizer's added tokens are not where its file says.", param="MODEL_PATH")

    def find(self, text: str) -> list[Match]:
        """Where `text` spells control tokens: the leftmost longest, as the tokenizer would recognise them."""
        if not any(char in text for char in self._first_chars):
            return []
        encoding = self._finder.encode_batch([text])[0]
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [(start, end, number - 1) for number, (start, end) in pairs if number]

    def write(self, text: str) -> str:
        """`text`, which no client wrote, with the names of the control tokens that it spells."""
        written, done = [], 0
        for start, end, index in self.find(text):
            written += [text[done:start], self._names[index]]
            done = end
        return "".join([*written, text[done:]])

    def count(self, text: str) -> int:
        """Tokens of a text that holds no names."""
        return len(self._encode(text, False).ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of what `write` gave, with clients' text between. Raises InvalidRequest if that became a token."""
        encoding = self._encode(text, add_special_tokens)
        places = self._places(text, encoding)
        if len(places) < text.count(self._secret):
            text = self._without_unmatched(text, places)
            encoding = self._encode(text, add_special_tokens)
            self._places(text, encoding)
        return tuple(encoding.ids)

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        # a batch of one: `encode` itself would hold the interpreter's lock all the while
        return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def _places(self, text: str, encoding: Encoding) -> set[int]:
        """Where the names stand that became tokens. Raises InvalidRequest if anything else became a control token."""
        places = set()
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._ids and start < end:  # what the tokenizer puts before and after a text has no place in it
                place = text.find(self._secret, start, end)
                if place >= 0:
                    places.add(place)
                elif token != self._unknown_id:
                    raise InvalidRequest("The text became a control token, which is not for clients to write.")
        return places

    def _without_unmatched(self, text: str, places: set[int]) -> str:
        """Names that the tokenizer passed over become spellings again.

        With `normalized` a token is sought in normalised text, where Llama's older files have `▁<s>` for `<s>`, and
        find it at the beginning only: elsewhere `<s>` is text to them, even if a template writes it.
        """
        written, done = [], 0
        while (place := text.find(self._secret, done)) >= 0:
            start, end = place - 1, place - 1 + len(self._names[0])
            index = int(text[place + len(self._secret) : end - 1])
            written += [text[done:start], text[start:end] if place in places else self.spellings[index]]
            done = end
        return "".join([*written, text[done:]])


def _is_word(text: str) -> bool:
    """Letters, digits, spaces, emoji (and `▁`): nothing that markup is made of."""
    return all(
        char in "'’-" or unicodedata.category(char)[0] in "LMNZC" or unicodedata.category(char) == "So" for char in text
    )


def _finder(tokens: list[AddedToken]) -> Tokenizer:
    """A tokenizer that knows nothing but `tokens`; number n is the n-th of them, 0 is whatever lies between."""
    finder = Tokenizer(WordLevel({"": 0}, unk_token=""))
    finder.add_tokens([AddedToken(token.content, single_word=token.single_word, normalized=False) for token in tokens])
    return finder


def _renamed(tokenizer: Tokenizer, names: dict[str, str]) -> tuple[Tokenizer, int | None]:
    """A copy whose tokens `names` have other spellings, and the id that it gives to what it does not know."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], list):  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
    prefix = model.get("continuing_subword_prefix") or ""
    if "merges" in model:  # text is not to become a control token by merging its pieces either
        model["merges"] = [
            (first, second)
            for first, second in model["merges"]
            if not names.keys() & {first, second, first + second.removeprefix(prefix)}
        ]
    unknown = model.get("unk_token")
    unknown_id = model.get("unk_id") if unknown is None else tokenizer.token_to_id(unknown)
    if unknown is not None:
        model["unk_token"] = names.get(unknown, unknown)
    return Tokenizer.from_str(json.dumps(content)), unknown_id
