"""A text ends before its first stop string, however its tokens cut it, and what may begin one waits."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.gateway.text.stop_strings import StopStrings

cuts = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="ab", max_size=40) | st.text(alphabet="abX ", max_size=40),
    stops=st.lists(st.text(alphabet="ab", min_size=3, max_size=7) | st.text(alphabet="abX", min_size=1), max_size=3),
    cuts=cuts,
)
@example(text="aaab", stops=["aab"], cuts=[1])  # after a third letter, two of them may still be its beginning
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


def test_of_every_short_text_just_that_is_held_back_which_may_begin_a_stop_string() -> None:
    letters = ["".join(word) for length in range(1, 5) for word in itertools.product("ab", repeat=length)]
    texts = ["".join(word) for word in itertools.product("ab", repeat=7)]
    for stop, size in itertools.product(letters, (1, 2, 3)):
        for text in texts:
            matcher, sent = StopStrings((stop,)), ""
            for start in range(0, len(text), size):
                piece, stopped = matcher.push(text[start : start + size])
                sent += piece
                seen = text[: start + size]
                if stop in seen:
                    assert (sent, stopped) == (seen[: seen.index(stop)], True)
                    break
                held = max(length for length in range(len(stop)) if seen.endswith(stop[:length]))
                assert (sent, stopped) == (seen[: len(seen) - held], False)


def test_a_stop_string_costs_the_same_wherever_it_nearly_matches() -> None:
    """The worst for a search from the end: each beginning of the stop string is nearly the end of the text."""
    hostile, harmless = ("a" * 255 + "b", "ab" * 128, "ba" * 128, "aab" * 85), ("\n\n", "User:", "</x>", "STOP")

    def seconds(stops: tuple[str, ...], text: str) -> float:
        runs = []
        for _ in range(3):
            matcher = StopStrings(stops)
            start = time.process_time()
            for _ in range(2000):
                matcher.push(text)
            runs.append(time.process_time() - start)
        return min(runs)

    assert seconds(hostile, "aaaa") < 4 * seconds(harmless, " cat") + 0.02


def test_stop_strings_find_their_way_through_one_long_text() -> None:
    matcher = StopStrings(("a" * 255 + "b", "aab" * 85))
    start = time.process_time()
    sent, stopped = matcher.push("a" * 1_000_000)
    assert (len(sent), stopped) == (1_000_000 - 255, False)
    assert matcher.push("bc") == ("", True)
    assert time.process_time() - start < 1


def test_without_stop_strings_nothing_is_held_back() -> None:
    matcher = StopStrings(())
    assert [matcher.push(piece) for piece in ("ab", "", "c")] == [("ab", False), ("", False), ("c", False)]
    assert matcher.flush() == ""


def test_what_may_begin_a_stop_string_waits_until_it_does_not() -> None:
    matcher = StopStrings(("END",))
    assert [matcher.push(piece) for piece in "xEN!"] == [("x", False), ("", False), ("", False), ("EN!", False)]
    assert matcher.push("EEN") == ("E", False)
    assert matcher.flush() == "EN", "the text is over: it was none"
    assert matcher.flush() == ""


@pytest.mark.parametrize("pieces", [["abENDc"], ["abE", "NDc"], ["ab", "E", "N", "D"]])
def test_after_a_stop_string_nothing_is_left_to_send(pieces: list[str]) -> None:
    matcher = StopStrings(("END", "zz"))
    sent, stopped = "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        sent += text
    assert (sent, stopped, matcher.flush()) == ("ab", True, "")
