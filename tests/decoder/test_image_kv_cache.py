"""Which picture is on which page: a picture is resident from the moment its page is filled, never before."""

from __future__ import annotations

import pytest

from service.decoder.image_kv_cache import ImageKVCache


def test_a_picture_is_resident_once_its_page_is_filled() -> None:
    images = ImageKVCache(2)
    images.insert("a")
    assert "a" not in images and images.has_page("a")
    assert (images.num_resident, images.num_held) == (0, 1)
    images.filled("a")
    assert "a" in images and images.num_resident == 1


def test_a_page_that_was_never_filled_goes_back_empty_with_its_last_holder() -> None:
    images = ImageKVCache(1)
    page = images.insert("a")
    assert images.hold("a") == page
    images.release("a")
    assert images.has_page("a")
    images.release("a")
    assert not images.has_page("a") and images.num_held == 0
    assert images.num_insertable(set()) == 1
    assert images.insert("b") == page


def test_a_page_being_filled_is_not_evicted() -> None:
    images = ImageKVCache(1)
    images.insert("a")
    assert images.num_insertable(set()) == 0
    with pytest.raises(IndexError):
        images.insert("b")


def test_what_is_insertable_leaves_the_wanted_where_they_are() -> None:
    images = ImageKVCache(3)
    for key in "ab":
        images.insert(key)
        images.filled(key)
        images.release(key)
    assert images.num_insertable(set()) == 3
    assert images.num_insertable({"a", "x"}) == 2
    assert images.num_insertable({"a", "b"}) == 1
