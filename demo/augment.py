"""Changes a drawing as another artist might: colours, flatness, outlines, proportions, tilt.

What vendors differ in most is what is varied most: OpenMoji fills flat and draws black outlines, Twemoji has
neither gradients nor outlines, Fluent shades everything.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps


def augment(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns a changed copy of an RGBA drawing, cut to what is painted."""
    alpha = picture.getchannel("A")
    rgb = picture.convert("RGB")
    if is_glyph(np.asarray(picture)):
        tint = tuple(int(v) for v in rng.integers(0, 256, 3)) if rng.random() < 0.7 else (0, 0, 0)
        rgb = Image.new("RGB", picture.size, tint)
    else:
        rgb = change_colours(rgb, rng)
        if rng.random() < 0.35:
            rgb = flatten(rgb, rng)
        if rng.random() < 0.30:
            rgb = ink_edges(rgb, rng)
    if rng.random() < 0.40:
        rgb, alpha = outline(rgb, alpha, rng)
    picture = rgb.copy()
    picture.putalpha(alpha)
    return change_shape(picture, rng)


def is_glyph(drawing: NDArray[np.uint8]) -> bool:
    """Whether the drawing is a black silhouette (Fluent high-contrast)."""
    return not drawing[..., :3][drawing[..., 3] > 250].any()


def change_colours(rgb: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.7:
        hue, saturation, value = rgb.convert("HSV").split()
        shift = int(rng.normal(0, 9))
        rgb = Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")
        rgb = ImageEnhance.Color(rgb).enhance(float(rng.uniform(0.4, 1.7)))
        rgb = ImageEnhance.Brightness(rgb).enhance(float(rng.uniform(0.75, 1.3)))
        rgb = ImageEnhance.Contrast(rgb).enhance(float(rng.uniform(0.75, 1.4)))
    if rng.random() < 0.06:
        rgb = ImageOps.grayscale(rgb).convert("RGB")
    return rgb


def flatten(rgb: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Replaces shading by a few flat colours."""
    if rng.random() < 0.5:
        rgb = rgb.filter(ImageFilter.BoxBlur(1.5))
    return rgb.quantize(int(rng.integers(4, 12)), dither=Image.Dither.NONE).convert("RGB")


def ink_edges(rgb: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Draws dark lines where colours change inside the drawing."""
    edges = rgb.filter(ImageFilter.FIND_EDGES).convert("L")
    threshold = int(rng.integers(50, 120))
    ink = edges.point(lambda level: 255 if level > threshold else 0)
    return Image.composite(Image.new("RGB", rgb.size, (20, 20, 20)), rgb, ink)


def outline(rgb: Image.Image, alpha: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Strokes the silhouette, mostly in black, sometimes with the inside left empty or white."""
    radius = max(1.0, float(rng.uniform(0.012, 0.028)) * max(rgb.size))
    solid = alpha.point(lambda level: 255 if level > 100 else 0)
    inner = solid.filter(ImageFilter.BoxBlur(radius)).point(lambda level: 255 if level > 235 else 0)
    ring = ImageChops.subtract(solid, inner)
    ink = (20, 20, 20) if rng.random() < 0.8 else tuple(int(v) for v in rng.integers(0, 256, 3))
    if rng.random() < 0.10:
        rgb = Image.blend(rgb, Image.new("RGB", rgb.size, (255, 255, 255)), 0.75)
    return Image.composite(Image.new("RGB", rgb.size, ink), rgb, ring), alpha


def change_shape(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if rng.random() < 0.7:
        angle = float(rng.normal(0, 14))
        shear = float(rng.normal(0, 0.08))
        stretch = float(np.exp(rng.normal(0, 0.1)))
        cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        grow = 1.25
        forward = grow * np.array([[cos * stretch, -sin], [sin * stretch, cos]]) @ np.array([[1, shear], [0, 1]])
        centre = np.array([picture.width / 2, picture.height / 2])
        offset = centre - forward @ centre
        (a, b), (d, e) = forward.tolist()
        picture = picture.transform(
            picture.size, Image.Transform.AFFINE, (a, b, offset[0], d, e, offset[1]), Image.Resampling.BILINEAR
        )
        box = picture.getchannel("A").getbbox()
        picture = picture.crop(box) if box else picture
    if rng.random() < 0.15:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.8))))
    return picture
