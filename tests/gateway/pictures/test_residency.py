"""What we believe the decoder to hold: the keys last used, so many, until we learn better."""

from __future__ import annotations

from service.gateway.pictures.residency import ResidentKeys


def test_of_a_picture_never_seen_nothing_is_believed() -> None:
    assert ResidentKeys(2).missing(["a", "b"]) == {"a", "b"}


def test_a_key_is_believed_resident_once_it_was_used() -> None:
    resident = ResidentKeys(2)
    resident.add(["a"])
    assert resident.missing(["b", "a"]) == {"b"}


def test_a_belief_that_was_wrong_is_given_up() -> None:
    resident = ResidentKeys(3)
    resident.add(["a", "b", "c"])
    resident.discard(["a", "x", "c"])
    assert resident.missing(["a", "b", "c"]) == {"a", "c"}
    resident.add(["a"])
    assert resident.missing(["a"]) == set()


def test_the_memory_of_keys_is_bounded_and_the_one_longest_unused_goes_first() -> None:
    resident = ResidentKeys(2)
    resident.add(["a", "b"])
    assert resident.missing(["a", "b"]) == set()
    resident.add(["a"])
    resident.add(["c"])
    assert resident.missing(["a", "b", "c"]) == {"b"}
    resident.add(["d", "e", "f"])
    assert resident.missing(["d", "e", "f"]) == {"d"}
