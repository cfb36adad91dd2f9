"""Draws the pictures of demo/examples/: the one of the first question, and Twemoji scenes for demo/README.md.

    python -m demo.examples

`first_question.png` is drawn from Noto (Apache-2.0), `twemoji_*.png` from Twemoji (CC-BY 4.0).
"""

from pathlib import Path

import numpy as np
from PIL import Image

from demo.drawings import load_drawings
from demo.scenes import COLOURS

FOLDER = Path(__file__).parent / "examples"
SIDE = 448
SIZE = {1: 300, 2: 190, 3: 160}
CENTRES = {1: ((224, 224),), 2: ((124, 160), (316, 290)), 3: ((120, 130), (326, 160), (210, 330))}

FIRST_QUESTION = ("noto", ("fox", "key"), "white")
TWEMOJI = (
    (("fox",), "green"),
    (("umbrella", "penguin"), "yellow"),
    (("guitar", "carrot", "owl"), "white"),
    (("rat",), "white"),
    (("telephone",), "blue"),
)


def draw(vendor: str, concepts: tuple[str, ...], colour: str) -> Image.Image:
    scene = Image.new("RGB", (SIDE, SIDE), COLOURS[colour])
    drawings = load_drawings()
    size = SIZE[len(concepts)]
    for concept, (x, y) in zip(concepts, CENTRES[len(concepts)], strict=True):
        pixels = np.asarray(drawings.pixels[drawings.places[vendor, concept][0]])
        drawing = Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS)
        scene.paste(drawing, (x - size // 2, y - size // 2), drawing)
    return scene


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    draw(*FIRST_QUESTION).save(FOLDER / "first_question.png", optimize=True)
    for concepts, colour in TWEMOJI:
        name = "_".join(concept.replace(" ", "-") for concept in concepts)
        draw("twemoji", concepts, colour).save(FOLDER / f"twemoji_{name}.png", optimize=True)


if __name__ == "__main__":
    main()
