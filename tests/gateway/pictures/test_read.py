from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from service.errors import InvalidRequest, TooLarge
from service.families.pixels import flatten, resize_square
from service.gateway.pictures.decode import decode_picture, draft_scale, draw, examine
from service.gateway.pictures.key import picture_key
from service.gateway.pictures.read import payload_start
from tests.gateway.hostile_pictures import crumbs_png, scans_jpeg, segments_jpeg, thin_png
from tests.gateway.picture_files import encoded, file_of

LIMIT = 1_000_000


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(flatten(decode_picture(content, "image", LIMIT)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_three_formats_are_told_by_their_bytes(form: str) -> None:
    picture = pixels(encoded("red", form=form))
    assert picture.shape == (20, 24, 3)
    assert np.abs(picture.astype(int) - [255, 0, 0]).max() <= 4


def test_transparent_means_white() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 4))
    picture = pixels(file_of(half))
    assert (picture[:, :2] == [0, 0, 255]).all() and (picture[:, 2:] == 255).all()


def test_a_transparent_palette_means_white() -> None:
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    assert (pixels(file_of(palette, transparency=0)) == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    assert (pixels(file_of(grey)) == 0x80).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert pixels(file_of(Image.new(mode, (5, 3)), form)).shape == (3, 5, 3)


def test_the_camera_s_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright = pixels(file_of(Image.new("RGB", (30, 10)), "JPEG", exif=exif.tobytes()))
    assert upright.shape == (30, 10, 3)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    moving = file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(moving) == [255, 0, 0]).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_a_truncated_picture_is_refused(form: str, part: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    content = file_of(noise, form)
    with pytest.raises(InvalidRequest):
        decode_picture(content[: int(len(content) * part)], "image", LIMIT)


def test_data_urls_need_no_type() -> None:
    for header in ("data:;base64,", "DATA:image/png;charset=x;BASE64,"):
        assert payload_start(header + "YWI=", "image") == len(header)


def test_the_key_depends_on_all_the_encoder_sees() -> None:
    one = np.zeros((3, 4, 2), np.uint8)
    keys = {
        picture_key(one, "a"),
        picture_key(one, "b"),
        picture_key(one.reshape(3, 2, 4), "a"),
        picture_key(one + np.uint8(1), "a"),
    }
    assert len(keys) == 4 and all(len(key) == 64 for key in keys)
    assert picture_key(one.copy(), "a") == picture_key(one, "a")


@pytest.mark.parametrize("size", [(1500, 1200), (1200, 1500), (3000, 400), (400, 3000)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "CMYK", "RGB"])
def test_resizing_in_bands_is_resizing_the_whole(mode: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 4), np.uint8)
    picture = Image.fromarray(noise).resize(size).convert(mode)
    whole = np.asarray(flatten(picture).resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    difference = np.abs(resize_square(picture, 224).astype(int) - whole)
    if mode == "RGB" or size[0] > size[1]:
        assert not difference.any()
    else:  # Pillow may shorten the other side first: rounded and clipped elsewhere
        assert difference.mean() < 0.3 and difference.max() <= 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_orientations_are_pillow_s_own(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 30, 3), np.uint8))
    content = file_of(noise, form, exif=exif.tobytes())
    assert (pixels(content) == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))).all()


def test_pixels_are_pillow_s_own_below_the_size_of_drafts() -> None:
    noise = Image.effect_noise((1100, 900), 80).convert("RGB")
    for form, options in [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {"lossless": True})]:
        content = file_of(noise, form, **options)
        assert (pixels(content) == np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))).all()
        assert draft_scale(examine(content, "image", 10**8), 224) == 1


def test_a_huge_photo_is_decoded_smaller_with_hardly_a_difference() -> None:
    photo = Image.effect_noise((300, 250), 60).resize((4800, 4000)).convert("RGB")
    container = examine(file_of(photo, "JPEG"), "image", 10**8)
    scale = draft_scale(container, 224)
    smaller = draw(container, "image", scale)
    assert scale == 4 and smaller.size == (1200, 1000)
    difference = np.abs(resize_square(smaller, 224).astype(int) - resize_square(draw(container, "image"), 224))
    assert difference.mean() < 1 and difference.max() <= 8


def test_metadata_is_left_out_and_pixels_stay() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x010E] = "x" * 9000
    for form in ("PNG", "JPEG", "WEBP"):
        content = file_of(noise, form, icc_profile=b"x" * 9000, exif=exif.tobytes())
        container = examine(content, "image", LIMIT)
        assert len(container.content) < len(content) - 9000 or form == "PNG"
        assert not Image.open(io.BytesIO(container.content)).info.keys() & {"icc_profile", "exif", "xmp"}
        assert (pixels(content) == np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))).all()


@pytest.mark.parametrize("make", [scans_jpeg, segments_jpeg, crumbs_png])
def test_more_parts_than_a_picture_needs_are_refused_unseen(make: Callable[[], bytes]) -> None:
    with pytest.raises(TooLarge, match="too many parts"):
        examine(make(), "image", 10**8)


def test_a_picture_millions_of_pixels_long_is_refused_by_its_side() -> None:
    with pytest.raises(TooLarge, match="65535"):
        examine(thin_png(), "image", 10**8)
