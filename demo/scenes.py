"""Composes scenes: one to three drawings on a plain background of a named colour.

Every random choice comes from the generator that is passed in, so a seed gives the same scene again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.augment import augment

SIDE = 224
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (60, 165, 75),
    "blue": (45, 105, 215),
    "purple": (130, 60, 175),
    "pink": (245, 160, 195),
    "brown": (125, 80, 45),
    "gray": (135, 135, 135),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
COLOUR_JITTER = 10  # of 255, each channel
SCALES = {1: (0.55, 0.95), 2: (0.38, 0.50), 3: (0.32, 0.44)}  # of the scene's side, by number of drawings
MAX_OVERLAP = 0.06  # of the smaller box
MIN_CONTRAST = 60.0  # mean distance between a drawing's pixels and the background, of 441


class Scene(NamedTuple):
    pixels: NDArray[np.uint8]  # [SIDE, SIDE, 3]
    concepts: tuple[str, ...]
    colour: str


def compose(
    drawings: Sequence[NDArray[np.uint8]],
    concepts: Sequence[str],
    rng: np.random.Generator,
    augmented: bool,
    side: int = SIDE,
) -> Scene:
    """Puts RGBA drawings [h, w, 4] on a background that they stand out from."""
    low, high = SCALES[len(drawings)]
    boxes = place([int(rng.uniform(low, high) * side) for _ in drawings], side, rng)
    pictures = []
    for drawing, (_, _, size) in zip(drawings, boxes, strict=True):
        picture = Image.fromarray(drawing)
        picture = picture.reduce(max(1, round(picture.width / (1.25 * size))))  # cheaper to change when small
        pictures.append(augment(picture, rng) if augmented else picture)
    colour, background = pick_background(pictures, rng)
    scene = Image.new("RGB", (side, side), background)
    for picture, (x, y, size) in zip(pictures, boxes, strict=True):
        scale = size / max(picture.size)
        small = picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BILINEAR
        )
        scene.paste(small, (x + (size - small.width) // 2, y + (size - small.height) // 2), small)
    return Scene(np.asarray(scene), tuple(concepts), colour)


def place(sizes: list[int], side: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Finds a square (x, y, size) for each size so that they hardly overlap, shrinking all if there is no room."""
    while True:
        for _ in range(40):
            boxes = [(int(rng.integers(0, side - s + 1)), int(rng.integers(0, side - s + 1)), s) for s in sizes]
            pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
            if all(overlap(a, b) <= MAX_OVERLAP for a, b in pairs):
                return boxes
        sizes = [max(16, int(s * 0.94)) for s in sizes]


def overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return max(0, width) * max(0, height) / min(a[2], b[2]) ** 2


def pick_background(pictures: Sequence[Image.Image], rng: np.random.Generator) -> tuple[str, tuple[int, int, int]]:
    """Draws a named colour, again while a drawing would drown in it; the most contrasting of eight at worst."""
    best: tuple[float, str, tuple[int, int, int]] | None = None
    thumbnails = [np.asarray(picture.resize((24, 24)), dtype=np.float32).reshape(-1, 4) for picture in pictures]
    painted = [thumb[thumb[:, 3] > 128, :3] for thumb in thumbnails]
    for _ in range(8):
        name = str(rng.choice(list(COLOURS)))
        value = jittered(name, rng)
        distances = [float(np.linalg.norm(p - np.array(value), axis=1).mean()) for p in painted if len(p)]
        contrast = min(distances, default=441.0)
        if contrast >= MIN_CONTRAST:
            return name, value
        if best is None or contrast > best[0]:
            best = (contrast, name, value)
    assert best is not None
    return best[1], best[2]


def plain_scene(colour: str, rng: np.random.Generator, side: int = SIDE) -> Scene:
    """A background of this colour without any drawing."""
    return Scene(np.full((side, side, 3), jittered(colour, rng), np.uint8), (), colour)


def jittered(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    red, green, blue = np.clip(np.array(COLOURS[colour]) + jitter, 0, 255).tolist()
    return red, green, blue
