"""Renders every vendor's icons once: RGBA drawings of 192 x 192 pixels on disk, with an index.

python -m demo.drawings     # writes demo/data/drawings.npy and demo/data/drawings.json
"""

import io
import json
import multiprocessing
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from demo.concepts import TEST_VENDORS, TRAIN_VENDORS, Icon, all_concepts, demo_concepts, icons

DATA = Path(__file__).parent / "data"
SIZE = 192


class Drawings(NamedTuple):
    """RGBA drawings; `places[vendor, concept]` are the indices of that vendor's drawings of the concept."""

    pixels: NDArray[np.uint8]  # [drawings, 192, 192, 4]
    places: dict[tuple[str, str], list[int]]


@cache
def load_drawings() -> Drawings:
    """Reads the rendered drawings, pixels memory-mapped; renders them first where that has not been done."""
    if not (DATA / "drawings.json").exists():
        render_all()
    index = json.loads((DATA / "drawings.json").read_text())
    pixels = np.load(DATA / "drawings.npy", mmap_mode="r")
    places: dict[tuple[str, str], list[int]] = {}
    for place, (vendor, concept) in enumerate(index):
        places.setdefault((vendor, concept), []).append(place)
    return Drawings(pixels, places)


def render_all() -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    found: list[Icon] = []
    for vendor in TRAIN_VENDORS:
        found += icons(vendor, all_concepts(), with_variants=True)
    for vendor in TEST_VENDORS:
        found += icons(vendor, demo_concepts(), with_variants=False)
    with multiprocessing.Pool() as pool:
        drawings = pool.map(render, [icon.svg for icon in found], chunksize=16)
    kept = [i for i, drawing in enumerate(drawings) if drawing[..., 3].any()]
    np.save(DATA / "drawings.npy", np.stack([drawings[i] for i in kept]))
    (DATA / "drawings.json").write_text(json.dumps([(found[i].vendor, found[i].concept) for i in kept]))
    print(f"{len(kept)} drawings of {len({found[i].concept for i in kept})} concepts")


def render(svg: str) -> NDArray[np.uint8]:
    """Draws an SVG on a transparent square, cut to what is painted: [192, 192, 4]."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        return np.zeros((SIZE, SIZE, 4), np.uint8)
    picture = picture.crop(box)
    scale = SIZE / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    return np.asarray(square)


if __name__ == "__main__":
    render_all()
