"""Pictures made on the spot: simple drawings, a different one for each number. Nothing is downloaded."""

from __future__ import annotations

import base64
import io
import random
from functools import lru_cache

from PIL import Image, ImageDraw

COLOURS = ("white", "ivory", "lightblue", "khaki", "salmon", "seagreen", "navy", "crimson", "orange", "black", "purple")
SIZES = ((224, 224), (320, 240), (480, 360), (256, 384))


@lru_cache(maxsize=256)  # the hot ones of a mix; a unique picture is asked for once and falls out
def data_url(number: int) -> str:
    """The picture of this number as a JPEG data URL."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(number)).decode()


def jpeg(number: int) -> bytes:
    """One to four shapes on a plain ground. Two numbers never give the same pixels in practice."""
    rng = random.Random(number)
    width, height = rng.choice(SIZES)
    picture = Image.new("RGB", (width, height), rng.choice(COLOURS))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.randint(1, 4)):
        x, y = rng.randrange(width), rng.randrange(height)
        half = rng.randint(12, min(width, height) // 3)
        box = (x - half, y - half, x + half, y + half)
        rng.choice((draw.ellipse, draw.rectangle))(box, fill=rng.choice(COLOURS), outline="gray", width=3)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return file.getvalue()
