"""Which drawings show which concept: the names of the demo and the icons that each vendor has for them.

Training reads only vendors under the Apache or MIT licence. Twemoji and OpenMoji are for evaluation alone.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from demo.packages import EMOJIBASE, ICONIFY, fetch

TRAIN_VENDORS = ("noto", "noto-v1", "fxemoji", "fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")
TEST_VENDORS = ("twemoji", "openmoji")

# Emojibase labels whose drawings also show a concept, where an artist may draw the head or the whole animal.
ALSO = {
    "car": ("automobile",),
    "cat": ("cat face",),
    "cow": ("cow face",),
    "dog": ("dog face",),
    "horse": ("horse face",),
    "monkey": ("monkey face",),
    "mouse": ("mouse face",),
    "pig": ("pig face",),
    "rabbit": ("rabbit face",),
    "tiger": ("tiger face",),
    "full moon": ("full moon face",),
    "sun": ("sun with face",),
}
# The drawing that stands for a concept where the label is another.
LABELS = {"car": "automobile"}
# FxEmoji names its icons in its own way.
FXEMOJI_NAMES = {
    "basketball": ("basketballandhoop",),
    "camel": ("dromedarycamel",),
    "car": ("automobile",),
    "castle": ("europeancastle",),
    "cat": ("catside",),
    "dog": ("dogside",),
    "eggplant": ("aubergine",),
    "high-heeled shoe": ("heels",),
    "horse": ("horseface",),
    "house": ("housebuilding",),
    "houses": ("housebuildings",),
    "joker": ("playingcardblackjoker",),
    "locomotive": ("steamlocomotive",),
    "mobile phone": ("cellphone",),
    "mouse": ("mouseside",),
    "paintbrush": ("lowerleftpaintbrush",),
    "pen": ("lowerleftpen",),
    "pig": ("pigside",),
    "pizza": ("sliceofpizza",),
    "rabbit": ("bunny", "bunnyside"),
    "scissors": ("blackscissors",),
    "snowman": ("snowmanwithoutsnow",),
    "sun": ("sunrays",),
    "sunset": ("sunsetoverbuildings",),
    "t-shirt": ("mansshirt",),
    "telephone": ("blacktelephone",),
    "telephone receiver": ("telephonereceiver2",),
    "tennis": ("tennisball",),
    "tiger": ("tigerside",),
    "wrapped gift": ("present",),
}
GROUPS = (3, 4, 5, 6, 7)  # Emojibase: animals and nature, food, travel, activities, objects


class Icon(NamedTuple):
    vendor: str
    concept: str
    svg: str


@cache
def demo_concepts() -> tuple[str, ...]:
    """The concepts that the demo names, in the order of their file."""
    return tuple(json.loads((Path(__file__).parent / "concepts.json").read_text()))


@cache
def all_concepts() -> tuple[str, ...]:
    """The demo's concepts, then every other label of the groups above: a finer signal for the Resampler alone."""
    shown = {label for labels in ALSO.values() for label in labels}
    emojis = json.loads(read_member(str(fetch(EMOJIBASE)), "package/en/data.json"))
    labels = [emoji["label"].lower() for emoji in emojis if emoji.get("group") in GROUPS]
    others = (label for label in labels if label not in shown and not is_clock(label))
    return tuple(dict.fromkeys((*demo_concepts(), *others)))


def icons(vendor: str, concepts: tuple[str, ...], with_variants: bool) -> Iterator[Icon]:
    """The vendor's icons of these concepts. `with_variants`: the drawings of `ALSO` too, for training."""
    icon_set: dict[str, Any] = json.loads(read_member(str(fetch(ICONIFY)), f"package/json/{vendor}.json"))
    names = {plain(name): name for name in icon_set["icons"]}
    names |= {plain(name): alias["parent"] for name, alias in icon_set.get("aliases", {}).items() if len(alias) == 1}
    for concept in concepts:
        wanted = [LABELS.get(concept, concept)]
        if with_variants:
            wanted += ALSO.get(concept, ())
        if vendor == "fxemoji":
            wanted += FXEMOJI_NAMES.get(concept, ())
        for name in sorted({names[plain(label)] for label in wanted if plain(label) in names}):
            yield Icon(vendor, concept, svg_of(icon_set, name))


def svg_of(icon_set: dict[str, Any], name: str) -> str:
    icon = icon_set["icons"][name]
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{box}">{icon["body"]}</svg>'
    )


def plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def is_clock(label: str) -> bool:
    return label.endswith(("o’clock", "o'clock", "-thirty"))


@cache
def read_member(archive: str, member: str) -> bytes:
    with tarfile.open(archive) as tar:
        file = tar.extractfile(member)
        if file is None:
            raise FileNotFoundError(member)
        return file.read()
