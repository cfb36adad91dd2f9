"""Which picture is on which pages: a picture is resident from the moment its pages are filled, never before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.decoder.image_pages import ImagePages


def test_a_picture_is_resident_once_its_page_is_filled() -> None:
    images = ImagePages(2)
    images.insert("a", 1)
    assert "a" not in images and images.has_pages("a")
    assert (images.num_resident, images.num_held) == (0, 1)
    images.filled("a")
    assert "a" in images and images.num_resident == 1


def test_a_page_that_was_never_filled_goes_back_empty_with_its_last_holder() -> None:
    images = ImagePages(1)
    pages = images.insert("a", 1)
    assert images.hold("a") == pages
    images.release("a")
    assert images.has_pages("a")
    images.release("a")
    assert not images.has_pages("a") and images.num_held == 0
    assert images.num_insertable(set()) == 1
    assert images.insert("b", 1) == pages


def test_a_page_being_filled_is_not_evicted() -> None:
    images = ImagePages(1)
    images.insert("a", 1)
    assert images.num_insertable(set()) == 0
    with pytest.raises(IndexError):
        images.insert("b", 1)


def test_what_is_insertable_leaves_the_wanted_where_they_are() -> None:
    images = ImagePages(3)
    for key in "ab":
        images.insert(key, 1)
        images.filled(key)
        images.release(key)
    assert images.num_insertable(set()) == 3
    assert images.num_insertable({"a", "x"}) == 2
    assert images.num_insertable({"a", "b"}) == 1


def show(images: ImagePages, key: str, num_pages: int) -> None:
    images.insert(key, num_pages)
    images.filled(key)
    images.release(key)


def test_the_least_recently_used_are_evicted_first_and_no_more_than_need_be() -> None:
    images = ImagePages(8)
    for key, num_pages in (("a", 2), ("b", 1), ("c", 3), ("d", 1)):
        show(images, key, num_pages)
    images.hold("a")
    images.release("a")  # now later than all others
    pages = images.insert("e", 3)  # one page is empty
    assert len(set(pages)) == 3
    assert [key for key in "abcd" if key in images] == ["a", "d"]
    assert (images.num_held, images.num_resident) == (3, 3)


def test_what_does_not_fit_evicts_nobody() -> None:
    images = ImagePages(4)
    show(images, "a", 2)
    images.insert("b", 1)
    assert images.num_insertable(set()) == 3
    with pytest.raises(IndexError):
        images.insert("c", 4)
    assert "a" in images and images.num_insertable(set()) == 3
    with pytest.raises(KeyError):
        images.insert("a", 2)


def test_a_picture_that_is_gone_leaves_nothing_behind() -> None:
    images = ImagePages(2)
    assert images.refcount("a") == 0
    show(images, "a", 2)
    show(images, "b", 2)
    images.insert("c", 1)
    images.release("c")
    assert [images.refcount(key) for key in "abc"] == [0, 0, 0]
    assert not images._refcounts.keys() & {"a", "b", "c"}, "or keys would pile up for ever"


@given(st.integers(1, 9), st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3)), max_size=60))
def test_no_page_has_two_owners_and_every_count_adds_up(num_pages: int, events: list[tuple[str, int]]) -> None:
    """Against a model that looks at everything: pictures of 1 to 4 pages, held, filled, released in any order."""
    images, holders = ImagePages(num_pages), dict[str, int]()
    pages_of: dict[str, tuple[int, ...]] = {}
    used: list[str] = []  # resident, least recently used first
    for key, event in events:
        size = 1 + ord(key) % 4
        idle = [each for each in used if not holders.get(each)]
        if event == 0 and images.has_pages(key):
            assert images.hold(key) == pages_of[key]
            holders[key] = holders.get(key, 0) + 1
        elif event == 0:
            room = num_pages - sum(map(len, pages_of.values()))
            if size > room + sum(len(pages_of[each]) for each in idle):
                with pytest.raises(IndexError):
                    images.insert(key, size)
                continue
            while room < size:
                room += len(pages_of.pop(idle[0]))
                used.remove(idle.pop(0))
            pages_of[key] = images.insert(key, size)
            holders[key] = 1
        elif event == 1 and holders.get(key):
            images.filled(key)
            used = [*(each for each in used if each != key), key]
        elif event == 2 and holders.get(key):
            images.release(key)
            holders[key] -= 1
            if key in used:
                used = [*(each for each in used if each != key), key]
            elif holders[key] == 0:
                del pages_of[key]
        owned = [page for pages in pages_of.values() for page in pages]
        assert len(owned) == len(set(owned)) and set(owned) <= set(range(num_pages))
        assert {each for each in "abcdefgh" if images.has_pages(each)} == pages_of.keys()
        assert {each for each in "abcdefgh" if each in images} == set(used)
        assert images.num_pages_of(*"abcdefgh") == len(owned)
        held = [each for each in pages_of if holders.get(each)]
        assert images.num_held == sum(len(pages_of[each]) for each in held)
        assert images.num_resident == sum(len(pages_of[each]) for each in used)
        free = num_pages - images.num_held
        assert images.num_insertable(set()) == free
        wanted = sum(len(pages_of[each]) for each in used if not holders.get(each) and each in "abc")
        assert images.num_insertable(set("abcx")) == free - wanted
