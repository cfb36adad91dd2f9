from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from service.gateway.text.detokenize import MAX_WINDOW, Detokenizer, Vocabulary
from tests.gateway.checkpoints import byte_fallback_tokenizer, byte_level_tokenizer

TOKENIZERS = {"byte level": byte_level_tokenizer(), "byte fallback": byte_fallback_tokenizer()}
HALVES = {  # of each kind, tokens whose text depends on those beside them, and one that U+FFFD itself is made of
    kind: [
        token_id
        for token, token_id in tokenizer.get_vocab().items()
        if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token_id]) or token in ("▁", "<0x41>", "a", "Ġ", "</s>", "")
    ]
    for kind, tokenizer in TOKENIZERS.items()
}
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
@settings(deadline=None, max_examples=300)
@given(data=st.data(), cuts=cuts)
def test_pieces_of_half_characters_add_up_as_well(kind: str, data: st.DataObject, cuts: list[int]) -> None:
    """Runs and alternations of them, longer than any window, with whole tokens and special ones between."""
    token = st.sampled_from(HALVES[kind]) | st.integers(0, TOKENIZERS[kind].get_vocab_size() + 2)
    encoded = st.text(max_size=4).map(lambda text: TOKENIZERS[kind].encode(text, add_special_tokens=False).ids)
    group = st.lists(token, min_size=1, max_size=4) | encoded
    runs = data.draw(st.lists(st.tuples(group, st.integers(1, 3 * MAX_WINDOW)), max_size=6))
    ids = [token_id for group, times in runs for token_id in group * times]
    assert "".join(pieces_of(kind, ids, cuts)) == decoded(kind, ids)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_no_more_than_one_character_is_held_back_unless_bytes_fall_back(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.sampled_from(HALVES["byte level"]), max_size=100))
    detokenizer, sent = Detokenizer(VOCABULARIES["byte level"]), ""
    for number, token_id in enumerate(ids, start=1):
        sent += detokenizer.push([token_id])
        assert len(decoded("byte level", ids[:number])) - len(sent) <= 1


def test_a_token_without_text_takes_nothing_from_its_neighbours() -> None:
    vocab = {"▁a": 0, "b": 1, "": 2, "<unk>": 3, "<0x41>": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ids = [0, *[2] * 100, 0, 1, 4, 4]
    detokenizer = Detokenizer(Vocabulary(tokenizer))
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == "a ab<0x41><0x41>"
    assert pieces[-1] == "<0x41>", "without byte fallback, a token spelled like a byte is a word like others"


ENDLESS: dict[str, tuple[str, Callable[[Tokenizer], list[int]]]] = {
    "beginnings of characters": ("byte level", lambda tokenizer: tokenizer.encode("🙂").ids[:1]),
    "ends of characters": ("byte level", lambda tokenizer: tokenizer.encode("🙂").ids[-1:]),
    "U+FFFD itself": ("byte level", lambda tokenizer: tokenizer.encode("\N{REPLACEMENT CHARACTER}").ids),
    "bytes that fall back": ("byte fallback", lambda tokenizer: [tokenizer.token_to_id("<0xF0>")]),
    "bytes and letters": (
        "byte fallback",
        lambda tokenizer: [tokenizer.token_to_id("<0xF0>"), tokenizer.token_to_id("a")],
    ),
    "spaces": ("byte fallback", lambda tokenizer: [tokenizer.token_to_id("▁")]),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_eight_times_the_tokens_take_about_eight_times_as_long(name: str) -> None:
    kind, unit = ENDLESS[name]
    ids = (unit(TOKENIZERS[kind]) * 8000)[:8000]

    def seconds(num_tokens: int) -> float:
        runs = []
        for _ in range(3):
            start = time.process_time()
            pieces = pieces_of(kind, ids[:num_tokens], [1])
            runs.append(time.process_time() - start)
            assert "".join(pieces) == decoded(kind, ids[:num_tokens])
        return min(runs)

    assert seconds(8000) < 8 * 3 * seconds(1000) + 0.02


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
        assert len(detokenizer._window) <= MAX_WINDOW
