"""A small picture in every format and variant that clients may send, and in those that are to be refused."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def accepted() -> dict[str, bytes]:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    smooth = rgb.resize((120, 90), Image.Resampling.BICUBIC)
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(rgb.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "zipped " * 500, zip=True)
    texts.add_itxt("Title", "größer", zip=True)
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    return {
        "jpeg": encode(smooth, "JPEG"),
        "jpeg-progressive": encode(smooth, "JPEG", progressive=True),
        "jpeg-grey": encode(smooth.convert("L"), "JPEG"),
        "jpeg-cmyk": encode(smooth.convert("CMYK"), "JPEG"),
        "jpeg-restarts": encode(smooth, "JPEG", restart_marker_blocks=2, subsampling=0),
        "jpeg-exif-icc": encode(smooth, "JPEG", exif=exif, icc_profile=profile, comment=b"hello"),
        "jpeg-mpo": encode(smooth, "MPO", **{"save_all": True, "append_images": [smooth.rotate(90)]}),
        "png": encode(rgb, "PNG"),
        "png-rgba": encode(rgba, "PNG"),
        "png-palette": encode(rgb.quantize(16), "PNG", transparency=3),
        "png-one-bit": encode(rgb.convert("1"), "PNG"),
        "png-grey-alpha": encode(rgba.convert("LA"), "PNG"),
        "png-16-bit": encode(Image.fromarray(np.arange(37 * 53, dtype=np.uint16).reshape(37, 53) * 30), "PNG"),
        "png-interlaced": interlaced_png(np.asarray(rgb)),
        "png-texts-icc": encode(rgb, "PNG", pnginfo=texts, icc_profile=profile, exif=exif),
        "png-animated": encode(rgb, "PNG", **frames),
        "webp": encode(smooth, "WEBP"),
        "webp-lossless": encode(rgba, "WEBP", lossless=True),
        "webp-exif-icc": encode(rgb, "WEBP", exif=exif, icc_profile=profile),
        "webp-animated": encode(rgb, "WEBP", **frames),
    }


def refused() -> dict[str, bytes]:
    rgb = Image.new("RGB", (40, 30), "red")
    return {
        "gif": encode(rgb, "GIF"),
        "gif-animated": encode(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
        "bmp": encode(rgb, "BMP"),
        "tiff": encode(rgb, "TIFF", compression="tiff_deflate"),
        "ico": encode(rgb, "ICO"),
        "ppm": encode(rgb, "PPM"),
        "jpeg2000": encode(rgb, "JPEG2000"),
    }


def encode(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def interlaced_png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """[H, W, 3] in the seven passes of Adam7, which Pillow reads and does not write."""
    rows = [b"\0" + row.tobytes() for x, y, across, down in ADAM7 for row in pixels[y::down, x::across] if row.shape[0]]
    height, width = pixels.shape[:2]
    data = png_chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return PNG_MAGIC + png_header(width, height, interlace=1) + data + png_chunk(b"IEND", b"")
