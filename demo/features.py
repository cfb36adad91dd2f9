"""Caches what the frozen encoder makes of scenes, so that training never runs the encoder.

    python -m demo.features --scenes 36000     # goes on where it stopped

For each set ("train", "blank"): `<set>.npy` fp16 [scenes, P, 1280] and `<set>.json`, one
(concepts, background colour) per scene.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from demo.concepts import TRAIN_VENDORS, demo_concepts
from demo.drawings import DATA, load_drawings
from demo.encoder import load_encoder
from demo.scenes import COLOURS, SIDE, Scene, compose, plain_scene

FEATURES = DATA / "features"
CHUNK = 32  # scenes of one job
BLANK_SCENES = 220
REPEATED_SHARE = 0.12  # how often a further drawing shows the first one's concept again
UNCHANGED_SHARE = 0.10  # of training scenes, composed of drawings as their vendors drew them
VENDOR_WEIGHTS = {"fluent-emoji-flat": 1.2, "fluent-emoji-high-contrast": 0.35}  # 1 for the others
SET_SEEDS = {"train": 0, "blank": 3}


class FeatureSet(NamedTuple):
    features: NDArray[np.float16]  # [scenes, P, 1280], memory-mapped
    scenes: list[tuple[list[str], str]]  # concepts, colour


def load_features(name: str) -> FeatureSet:
    scenes = json.loads((FEATURES / f"{name}.json").read_text())
    return FeatureSet(np.load(FEATURES / f"{name}.npy", mmap_mode="r"), [tuple(scene) for scene in scenes])


def training_scene(index: int) -> Scene:
    rng = np.random.default_rng((7, SET_SEEDS["train"], index))
    drawings, concepts = pick(rng, TRAIN_VENDORS)
    return compose(drawings, concepts, rng, augmented=rng.random() >= UNCHANGED_SHARE)


def blank_scene(index: int) -> Scene:
    rng = np.random.default_rng((7, SET_SEEDS["blank"], index))
    return plain_scene(list(COLOURS)[index % len(COLOURS)], rng)


def pick(rng: np.random.Generator, vendors: tuple[str, ...]) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """One drawing in half of the scenes, else two or three."""
    concepts: list[str] = []
    for _ in range(int(rng.choice([1, 2, 3], p=[0.5, 0.25, 0.25]))):
        repeated = bool(concepts) and rng.random() < REPEATED_SHARE
        concepts.append(concepts[0] if repeated else str(rng.choice(demo_concepts())))
    return [drawing_of(concept, vendors, rng) for concept in concepts], concepts


def drawing_of(concept: str, vendors: tuple[str, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    drawings = load_drawings()
    own = [vendor for vendor in vendors if (vendor, concept) in drawings.places]
    weights = np.array([VENDOR_WEIGHTS.get(vendor, 1.0) for vendor in own])
    vendor = str(rng.choice(own, p=weights / weights.sum()))
    return np.asarray(drawings.pixels[int(rng.choice(drawings.places[vendor, concept]))])


class Job(NamedTuple):
    make_scene: Callable[[int], Scene]
    start: int
    stop: int


def start_worker() -> None:
    global encoder
    torch.set_num_threads(1)
    encoder = load_encoder().to(memory_format=torch.channels_last)


@torch.inference_mode()
def encode(job: Job) -> tuple[NDArray[np.float16], list[tuple[tuple[str, ...], str]]]:
    scenes = [job.make_scene(index) for index in range(job.start, job.stop)]
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2)
    normalised = ((pixels.float() - 127) / 128).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(normalised)  # (B, P, 1280)
    return features.half().numpy(), [(scene.concepts, scene.colour) for scene in scenes]


def write_set(name: str, size: int, make_scene: Callable[[int], Scene]) -> None:
    """Fills a set, going on after the scenes that are there; the index is written every forty chunks."""
    FEATURES.mkdir(parents=True, exist_ok=True)
    index, path = FEATURES / f"{name}.json", FEATURES / f"{name}.npy"
    done = json.loads(index.read_text()) if index.exists() else []
    if len(done) >= size:
        return
    num_positions = (SIDE // 32) ** 2
    if done and len(np.load(path, mmap_mode="r")) == size:
        stored = np.load(path, mmap_mode="r+")
    else:
        done = []
        stored = np.lib.format.open_memmap(path, "w+", np.float16, (size, num_positions, 1280))
    jobs = [Job(make_scene, start, min(start + CHUNK, size)) for start in range(len(done), size, CHUNK)]
    started, before = time.monotonic(), len(done)
    with multiprocessing.Pool(initializer=start_worker) as pool:
        for count, (job, (features, scenes)) in enumerate(zip(jobs, pool.imap(encode, jobs), strict=True), 1):
            stored[job.start : job.stop] = features
            done += scenes
            if count % 40 == 0 or job is jobs[-1]:
                stored.flush()
                index.write_text(json.dumps(done))
                print(f"{name}: {len(done)}, {(len(done) - before) / (time.monotonic() - started):.0f}/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cache the encoder's features of scenes.")
    parser.add_argument("--scenes", type=int, default=36_000, help="training scenes")
    arguments = parser.parse_args()
    load_drawings()
    write_set("blank", BLANK_SCENES, blank_scene)
    write_set("train", arguments.scenes, training_scene)


if __name__ == "__main__":
    main()
