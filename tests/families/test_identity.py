"""Two checkpoints have one identity only if they are the same byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from service.errors import Unavailable
from service.families import load_family
from service.families.identity import PART_BYTES, unchanged
from tests.checkpoints import make_idefics

SIZE = 2 * PART_BYTES + 12345


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in several files, one of them stretched past the parts in which it is hashed."""
    folder = make_idefics(tmp_path_factory.mktemp("identity") / "a", max_shard_size="200KB")
    (folder / "model-big.safetensors").write_bytes(np.random.default_rng(0).bytes(SIZE))
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "b", copy_function=os.link))


def identities(folder: Path) -> tuple[str, str]:
    family = load_family(folder)
    return family.identity, family.config_identity


def rewrite(path: Path, change: Callable[[bytearray], None]) -> None:
    """As a new file of the same size: the original shares its content with the copy."""
    content = bytearray(path.read_bytes())
    change(content)
    path.unlink()
    path.write_bytes(content)


def flip(offset: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[offset] ^= 1

    return change


def test_the_same_bytes_elsewhere_are_the_same_checkpoint(original: Path, copy: Path) -> None:
    assert identities(original) == identities(copy)


@pytest.mark.parametrize(
    "offset", [0, 1 << 20, (1 << 20) + 1, PART_BYTES - 1, PART_BYTES, 2 * PART_BYTES, SIZE - 1, -1]
)
def test_one_bit_of_a_weight_anywhere_makes_another_checkpoint(original: Path, copy: Path, offset: int) -> None:
    rewrite(copy / "model-big.safetensors", flip(offset))
    assert identities(copy)[0] != identities(original)[0]
    assert identities(copy)[1] == identities(original)[1], "prompts are made as before"


def test_parts_and_files_that_change_places_make_another_checkpoint(original: Path, copy: Path) -> None:
    def swap(content: bytearray) -> None:
        content[:PART_BYTES], content[PART_BYTES : 2 * PART_BYTES] = (
            content[PART_BYTES : 2 * PART_BYTES],
            content[:PART_BYTES],
        )

    rewrite(copy / "model-big.safetensors", swap)
    swapped = identities(copy)[0]
    first, second = sorted(copy.glob("model-0*.safetensors"))[:2]
    first.rename(copy / "other")
    second.rename(first)
    (copy / "other").rename(second)
    assert len({identities(original)[0], swapped, identities(copy)[0]}) == 3


def test_every_shard_and_every_small_file_counts(original: Path, copy: Path) -> None:
    before, seen = identities(original), set()
    for path in sorted(copy.iterdir()):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            rewrite(path, lambda old, new=content: old.__setitem__(slice(None), json.dumps({**new, "x": 1}).encode()))
            assert identities(copy)[1] != before[1], path.name
        elif path.suffix == ".safetensors":
            rewrite(path, flip(-1))
        seen.add(identities(copy)[0])
    assert before[0] not in seen and len(seen) == len(list(copy.iterdir()))


def test_a_file_that_is_renamed_added_or_gone_makes_another_checkpoint(original: Path, copy: Path) -> None:
    seen = {identities(original)[0]}
    (copy / "model-big.safetensors").rename(copy / "model-big2.safetensors")
    seen.add(identities(copy)[0])
    (copy / "model-empty.safetensors").write_bytes(b"")
    seen.add(identities(copy)[0])
    (copy / "model-big2.safetensors").unlink()
    seen.add(identities(copy)[0])
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(identities(copy)[0])
    assert len(seen) == 5


def test_reading_a_family_reads_no_weights(copy: Path) -> None:
    for path in copy.glob("*.safetensors"):
        path.unlink()
        path.mkdir()  # to be read is an error
    assert len(load_family(copy).config_identity) == 64


def test_weights_replaced_while_they_are_loaded_are_noticed(copy: Path) -> None:
    with unchanged(copy):
        pass
    with pytest.raises(Unavailable), unchanged(copy):
        rewrite(copy / "model-big.safetensors", flip(-1))
