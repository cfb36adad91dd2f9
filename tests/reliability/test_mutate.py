"""Mutants: the same again for the same seed, different enough, and made of what is right."""

from __future__ import annotations

import io
from random import Random

from PIL import Image

from tests.reliability import mutate, pictures
from tests.reliability.cases import KINDS, Cases


def test_a_seed_and_a_number_give_the_same_mutant_again() -> None:
    for kind in KINDS:
        assert Cases(3).make(kind, 17) == Cases(3).make(kind, 17)
        assert Cases(3).make(kind, 17) != Cases(4).make(kind, 17)


def test_mutants_differ_from_each_other() -> None:
    cases = Cases(1)
    for kind in KINDS:
        assert len({cases.make(kind, number).raw for number in range(300)}) > 270


def test_every_picture_that_is_mutated_is_one() -> None:
    for name, data in pictures.accepted().items():
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert picture.format in ("JPEG", "MPO", "PNG", "WEBP"), name
            assert ("interlaced" in name) == bool(picture.info.get("interlace"))


def test_some_mutants_of_pictures_still_open_and_some_do_not() -> None:
    rng, opened = Random(1), 0
    png = pictures.accepted()["png"]
    for _ in range(200):
        try:
            Image.open(io.BytesIO(mutate.mutate_picture(rng, png, [png]))).load()
            opened += 1
        except Exception:
            continue
    assert 10 < opened < 190


def test_a_jpeg_is_the_sum_of_its_segments() -> None:
    jpeg = pictures.accepted()["jpeg-progressive"]
    assert b"".join(mutate._split_jpeg(jpeg)) == jpeg
