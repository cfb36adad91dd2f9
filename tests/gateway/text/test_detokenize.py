from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from service.gateway.text.detokenize import Detokenizer, Vocabulary
from service.gateway.text.stop_strings import StopStrings
from tests.gateway.checkpoints import byte_fallback_tokenizer, byte_level_tokenizer

TOKENIZERS = {"byte level": byte_level_tokenizer(), "byte fallback": byte_fallback_tokenizer()}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
either = pytest.mark.parametrize("kind", TOKENIZERS)


def pieces_of(kind: str, ids: list[int], cuts: list[int]) -> list[str]:
    """The pieces for `ids` pushed in groups of the lengths `cuts`, over and over."""
    detokenizer = Detokenizer(VOCABULARIES[kind])
    pieces = []
    start = turn = 0
    while start < len(ids):
        end = start + cuts[turn % len(cuts)]
        pieces.append(detokenizer.push(ids[start:end]))
        start, turn = end, turn + 1
    return [*pieces, detokenizer.flush()]


def decoded(kind: str, ids: list[int]) -> str:
    tokenizer: Tokenizer = TOKENIZERS[kind]
    return tokenizer.decode(ids, skip_special_tokens=True)


cuts = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@either
@settings(deadline=None, max_examples=200)
@given(data=st.data(), cuts=cuts)
def test_pieces_of_any_ids_add_up_to_decoding_them_at_once(kind: str, data: st.DataObject, cuts: list[int]) -> None:
    size = TOKENIZERS[kind].get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=40))
    assert "".join(pieces_of(kind, ids, cuts)) == decoded(kind, ids)


@either
@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60), cuts=cuts)
def test_text_never_comes_in_half_characters(kind: str, text: str, cuts: list[int]) -> None:
    ids = TOKENIZERS[kind].encode(text, add_special_tokens=False).ids
    whole = decoded(kind, ids)
    pieces = pieces_of(kind, ids, cuts)
    assert "".join(pieces) == whole
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_word_after_special_tokens_keeps_its_space() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    words = tokenizer.encode("a the", add_special_tokens=False).ids
    end = tokenizer.token_to_id("</s>")
    ids = [*words, *[end] * 9, *tokenizer.encode("cat", add_special_tokens=False).ids]
    assert "".join(pieces_of("byte fallback", ids, [1])) == decoded("byte fallback", ids) == "a the cat"


def test_plain_words_come_without_delay() -> None:
    ids = TOKENIZERS["byte level"].encode("There are three cats", add_special_tokens=False).ids
    assert all(pieces_of("byte level", ids, [1])[:-1])


def test_the_window_stays_short() -> None:
    detokenizer = Detokenizer(VOCABULARIES["byte level"])
    ids = TOKENIZERS["byte level"].encode("There are three cats. " * 50, add_special_tokens=False).ids
    for token in ids:
        detokenizer.push([token])
        assert len(detokenizer._window) <= 8


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="abX ", max_size=40),
    stops=st.lists(st.text(alphabet="abX", min_size=1, max_size=4), max_size=3),
    cuts=cuts,
)
def test_stop_strings_cut_however_the_text_comes(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopStrings(tuple(stops))
    sent, stopped, start, turn = "", False, 0, 0
    while start < len(text) and not stopped:
        end = start + cuts[turn % len(cuts)]
        piece, stopped = matcher.push(text[start:end])
        sent += piece
        start, turn = end, turn + 1
    if not stopped:
        sent += matcher.flush()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert (sent, stopped) == ((text[: min(ends)[1]], True) if ends else (text, False))
