"""Llama 3.2 Vision against `transformers`, corrected to Meta's code: pixels, ids, logits and every greedy token."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MllamaConfig, MllamaForConditionalGeneration

from service.contract import SamplingParams, ValidRequest
from service.decoder.engine import Engine
from service.decoder.model import Decoder
from service.decoder.settings import DecoderSettings
from service.errors import InvalidRequest
from service.families import Family, load_family
from service.families.family import sights
from service.families.pixels import choose_grid, fit_tiles, fitting_size, grids_of
from service.vision.stage import VisionModel, VisionStage
from tests.decoder.drive import drain, step_logits, tokens
from tests.families.published import PUBLISHED
from tests.mllama import MllamaReference, make_mllama

CONFIGS: dict[str, dict[str, Any]] = {
    "two_cross_layers": {},
    "first_layer_crosses": {"text": {"cross_attention_layers": [0, 2], "num_key_value_heads": 4}, "seed": 10},
    "one_cross_layer_of_many": {"text": {"num_hidden_layers": 7, "cross_attention_layers": [4]}, "seed": 3},
    "one_intermediate_layer": {"vision": {"intermediate_layers_indices": [2], "num_global_layers": 1}, "seed": 4},
    "larger_tiles_sharded": {
        "vision": {"image_size": 42, "intermediate_layers_indices": [1, 2, 3]},
        "max_shard_size": "200KB",
        "seed": 5,
    },
    "two_tiles": {"vision": {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}, "seed": 6},
}
NUM_TOKENS = 64
SIZES = [(28, 28), (90, 30), (31, 77), (60, 60), (300, 11), (19, 23), (5, 200), (57, 56), (1, 1), (640, 480)]


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mllama(tmp_path_factory.mktemp(request.param), **CONFIGS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mllama(tmp_path_factory.mktemp("plain"))


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Of (width, height), each pixel another."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompts(family: Family) -> dict[str, tuple[list[int], list[Image.Image]]]:
    """None, one of each number of tiles, several, in a row and apart; text before the first."""
    rng = np.random.default_rng(7)
    begin, image = [family.bos_token_id or 0], [family.image_token_id]

    def text(count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, 250, count)]

    pictures = [picture(size, seed) for seed, size in enumerate(SIZES)]
    return {
        "none": ([*begin, *text(8)], []),
        "one": ([*image, *begin, *text(9)], pictures[:1]),
        "text_before": ([*begin, *text(7), *image, *text(5)], pictures[1:2]),
        "three_in_a_row": ([*begin, *image, *image, *image, *text(6)], pictures[2:5]),
        "five": (
            [*begin, *text(3), *image, *text(4), *image, *image, *text(20), *image, *text(3), *image, *text(2)],
            pictures[4:9],
        ),
        "picture_at_the_end": ([*begin, *text(4), *image, *text(2), *image], pictures[8:10]),
    }


def encoded(family: Family, stage: VisionStage, pictures: list[Image.Image]) -> tuple[list[torch.Tensor], list[str]]:
    """Latents [S, R, E] of each picture, and its key."""
    canvases = [family.preprocess(picture) for picture in pictures]
    latents = [stage.encode(torch.from_numpy(canvas)[None])[0] for canvas in canvases]
    return latents, [hashlib.sha256(f"{canvas.shape}".encode() + canvas.tobytes()).hexdigest() for canvas in canvases]


def add(engine: Engine, number: int, input_ids: list[int], latents: list[torch.Tensor], keys: list[str]) -> None:
    positions = tuple(i for i, token in enumerate(input_ids) if token == engine.family.image_token_id)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    request = ValidRequest(tuple(input_ids), tuple(keys), positions, sampling)
    index = [ordinal for ordinal, pages in enumerate(latents) for _ in pages]
    engine.add(number, request, torch.cat(latents) if latents else None, index)


def test_logits_and_greedy_tokens_equal_the_reference(checkpoint: Path) -> None:
    family, reference = load_family(checkpoint), MllamaReference(checkpoint)
    stage = VisionStage(family, "cpu", "float32")
    engine = Engine.from_family(family, DecoderSettings(kv_blocks=64, image_pages=40))
    for name, (input_ids, pictures) in prompts(family).items():
        latents, keys = encoded(family, stage, pictures)
        expected = reference.logits(input_ids, reference.vision(pictures))
        add(engine, 10**6, input_ids, latents, keys)
        torch.testing.assert_close(step_logits(engine, 10**6), expected, atol=1e-4, rtol=0)

        add(engine, 0, input_ids, latents, keys)
        generated = tokens(drain(engine)[0])
        assert generated == reference.greedy(input_ids, pictures, NUM_TOKENS), name
        assert len(set(generated)) > 8, "a run of one repeated token would prove little"


def test_a_batch_of_all_prompts_chunked_and_preempted_gives_each_its_own_tokens(plain: Path) -> None:
    family = load_family(plain)
    stage = VisionStage(family, "cpu", "float32")
    asked = {name: (ids, *encoded(family, stage, pictures)) for name, (ids, pictures) in prompts(family).items()}
    alone = {}
    for name, question in asked.items():
        engine = Engine.from_family(family, DecoderSettings(kv_blocks=64, image_pages=40))
        add(engine, 0, *question)
        alone[name] = tokens(drain(engine)[0])
    tight = DecoderSettings(kv_blocks=20, image_pages=40, max_step_tokens=16, max_running=8)
    engine = Engine.from_family(family, tight)
    for _ in range(2):  # the second time their pictures are there
        for number, question in enumerate(asked.values()):
            add(engine, number, *question)
        together = drain(engine)
        assert {name: tokens(together[number]) for number, name in enumerate(asked)} == alone
    assert engine.stats().num_preemptions > 0 and engine.stats().image_hits > 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
@pytest.mark.parametrize("size", SIZES)
def test_canvases_equal_the_published_processors_tiles(plain: Path, size: tuple[int, int], mode: str) -> None:
    family, reference = load_family(plain), MllamaReference(plain)
    asked = picture(size, seed=11).convert(mode)
    canvas = torch.from_numpy(family.preprocess(asked))
    rows, columns = canvas.shape[1] // 28, canvas.shape[2] // 28
    theirs = reference.processor.image_processor(asked.convert("RGBA") if mode == "LA" else asked, return_tensors="pt")
    assert theirs["num_tiles"] == [[rows * columns]]
    assert theirs["aspect_ratio_ids"].tolist() == [[family.vision.encoder.grids.index((rows, columns)) + 1]]
    tiles = canvas.unflatten(1, (rows, 28)).unflatten(3, (columns, 28)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    stage = VisionStage(family, "cpu", "float32")
    ours = (tiles.float() / 255 - stage._mean) / stage._std
    padded = torch.zeros_like(theirs["pixel_values"][0, 0])
    padded[: len(ours)] = ours
    torch.testing.assert_close(padded, theirs["pixel_values"][0, 0], atol=1.01 / 255 / 0.26, rtol=0)


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 6])
def test_grids_and_sizes_are_the_published_processors(max_tiles: int) -> None:
    from transformers.models.mllama import image_processing_pil_mllama as theirs

    assert list(grids_of(max_tiles)) == theirs.get_all_supported_aspect_ratios(max_tiles)
    rng = np.random.default_rng(max_tiles)
    sizes = [(int(height), int(width)) for height, width in np.exp(rng.uniform(0, 8, (400, 2)))]
    sizes += [(560 * rows + more, 560 * columns) for rows, columns in grids_of(4) for more in (-1, 0, 1)]
    for height, width in sizes:
        grid = choose_grid(height, width, 560, grids_of(max_tiles))
        assert tuple(560 * side for side in grid) == theirs.get_optimal_tiled_canvas(height, width, max_tiles, 560)
        expected = theirs.get_image_size_fit_to_canvas(height, width, grid[0] * 560, grid[1] * 560, 560)
        assert fitting_size(height, width, 560, grid) == expected


def test_large_transparent_picture_is_fitted_in_bands_as_if_whole() -> None:
    wide = picture((2400, 900), seed=1)
    wide.putalpha(Image.linear_gradient("L").resize(wide.size))
    flat = Image.alpha_composite(Image.new("RGBA", wide.size, "white"), wide).convert("RGB")
    np.testing.assert_array_equal(fit_tiles(wide, 560, grids_of(4)), fit_tiles(flat, 560, grids_of(4)))


def test_a_token_sees_the_latest_run_of_consecutive_pictures(plain: Path) -> None:
    family = load_family(plain)
    image = family.image_token_id
    input_ids = (1, 5, image, image, 6, 7, image, 8, image, image, image)
    expected = [(), (), (0,), (0, 1), (0, 1), (0, 1), (2,), (2,), (3,), (3, 4), (3, 4, 5)]
    assert sights(family.see, input_ids, (2, 3, 6, 8, 9, 10)) == expected


def test_transformers_lets_tokens_before_the_first_picture_see_it_and_metas_does_not(plain: Path) -> None:
    """The first of two places where the reference had to be corrected: if it is mended there, this says so."""
    theirs, metas = MllamaReference(plain, as_meta=False), MllamaReference(plain)
    metas.model.model.vision_model.intermediate_layers_indices = [1, 3]  # only the one difference
    input_ids, pictures = prompts(load_family(plain))["text_before"]
    vision = theirs.vision(pictures)
    before = slice(0, input_ids.index(theirs.image_token_id))
    text = metas.logits(input_ids[before], (None, []))
    torch.testing.assert_close(metas.logits(input_ids, vision)[before], text, atol=1e-4, rtol=0)
    assert (theirs.logits(input_ids, vision)[before] - text).abs().max() > 0.1
    input_ids, pictures = prompts(load_family(plain))["one"]  # begins with its picture: there both agree
    vision = theirs.vision(pictures)
    torch.testing.assert_close(metas.logits(input_ids, vision), theirs.logits(input_ids, vision), atol=1e-5, rtol=0)


def test_transformers_takes_the_output_of_intermediate_layers_and_metas_their_input(plain: Path) -> None:
    """The second place. Meta's `ImageTransformer.forward` keeps x before it calls the block of that index."""
    inputs: list[torch.Tensor] = []
    theirs = MllamaReference(plain, as_meta=False)
    encoder = theirs.model.model.vision_model
    read = encoder.intermediate_layers_indices
    for index in read:
        encoder.transformer.layers[index].register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    pictures = [picture((28, 28), 0)]
    pixels = theirs.processor.image_processor(pictures, return_tensors="pt")
    pixels.pop("num_tiles")
    num_positions, width = encoder.num_patches, encoder.hidden_size
    with torch.inference_mode():
        features = encoder(**pixels).last_hidden_state[0, 0, 0, :, width:]
        kept = torch.stack([x[0, :num_positions] for x in inputs], dim=-1).flatten(1)
        assert (features - kept).abs().max() > 0.1
        family = load_family(plain)
        stage = VisionStage(family, "cpu", "float32")
        canvas = torch.from_numpy(family.preprocess(pictures[0]))[None]
        normalised = (canvas.float() / 255 - stage._mean) / stage._std
        torch.testing.assert_close(stage.model.encoder(normalised)[0, :, width:], kept, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"cross_attention_layers": [1, 2]}, "each needs another layer behind it"),
        ("text_config", {"cross_attention_layers": [1, 4]}, "each needs another layer behind it"),
        ("text_config", {"cross_attention_layers": []}, "each needs another layer behind it"),
        ("text_config", {"cross_attention_layers": [3, 1]}, "does not ascend"),
        ("text_config", {"cross_attention_layers": [-1, 3]}, "-1, not a whole number"),
        ("text_config", {"cross_attention_layers": [1.0, 3]}, "1.0, not a whole number"),
        ("text_config", {"cross_attention_layers": 3}, "is 3, not a list"),
        ("text_config", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("text_config", {"num_key_value_heads": 3}, "4 heads and 3 of K and V"),
        ("text_config", {"hidden_size": "64"}, "hidden_size is '64'"),
        ("vision_config", {"intermediate_layers_indices": [1, 4]}, "of 4 layers"),
        ("vision_config", {"intermediate_layers_indices": [3, 1]}, "does not ascend"),
        ("vision_config", {"supported_aspect_ratios": [[1, 1], [2, 2]]}, "not those of 4 tiles"),
        ("vision_config", {"max_num_tiles": 3}, "not those of 3 tiles"),
        ("vision_config", {"max_num_tiles": 0}, "max_num_tiles is 0"),
        ("vision_config", {"image_size": [28, 28]}, "not a whole number"),
        ("vision_config", {"patch_size": 0}, "patch_size is 0"),
        ("vision_config", {"patch_size": 29}, "that cannot be"),
        ("vision_config", {"attention_heads": 7}, "that cannot be"),
        ("vision_config", {"hidden_act": "tanh"}, "tanh"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(
    tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    folder = make_mllama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config[part] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match=message) as caught:
        load_family(folder)
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "billions"), [("Llama-3.2-11B-Vision", 10.67), ("Llama-3.2-90B-Vision", 88.59)], ids=["11B", "90B"]
)
def test_published_sizes_have_the_published_weights_and_no_others(tmp_path: Path, name: str, billions: float) -> None:
    """On the meta device: names and shapes as `transformers` publishes them, each with its place in our modules."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    family = load_family(tmp_path)
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(MllamaConfig.from_dict(PUBLISHED[name]))
        ours = {"vision": VisionModel(family.vision), "decoder": Decoder(family.decoder)}
    published = {_as_published(key): tuple(weight.shape) for key, weight in model.state_dict().items()}
    for stage, target_of in (("vision", family.vision_weight), ("decoder", family.decoder_weight)):
        pieces: dict[str, dict[int, tuple[int, ...]]] = {}
        for key, shape in published.items():
            if (target := target_of(key)) is not None:
                assert pieces.setdefault(target.name, {}).setdefault(target.part, shape) is shape
        joined = {key: (sum(s[0] for s in parts.values()), *parts[0][1:]) for key, parts in pieces.items()}
        assert joined == {key: tuple(weight.shape) for key, weight in ours[stage].named_parameters()}
    assert all(family.vision_weight(key) or family.decoder_weight(key) for key in published)
    num_parameters = sum(weight.numel() for module in ours.values() for weight in module.parameters())
    assert num_parameters == sum(weight.numel() for weight in model.parameters())
    print(f"{name}: {num_parameters:,} parameters, {family.decoder.num_parameters:,} of them in the decoder")
    assert num_parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert family.decoder.num_parameters == sum(weight.numel() for weight in ours["decoder"].parameters())


def _as_published(name: str) -> str:
    """`transformers` renames its modules; files keep the names of the first release."""
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_model.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 56, "width": 56}}, "size of preprocessor_config.json"),
        ({"resample": 3}, "resample of preprocessor_config.json is 3, and only 2 is served"),
        ({"do_normalize": False}, "do_normalize"),
        ({"max_image_tiles": 2}, "max_image_tiles"),
        ({"image_mean": [0.5, 0.5]}, "not three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "has a 0"),
    ],
)
def test_pictures_that_are_made_in_another_way_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = make_mllama(tmp_path)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InvalidRequest, match=message):
        load_family(folder)


def test_nulls_and_what_is_not_there_are_the_published_defaults(tmp_path: Path) -> None:
    published = json.loads(json.dumps(PUBLISHED["Llama-3.2-11B-Vision"]))
    (tmp_path / "config.json").write_text(json.dumps(published))
    expected = load_family(tmp_path)
    published["text_config"] = {"rope_scaling": published["text_config"]["rope_scaling"], "vocab_size": None}
    published["vision_config"] = {"image_size": 560, "intermediate_layers_indices": None}
    (tmp_path / "config.json").write_text(json.dumps(published))
    family = load_family(tmp_path)
    assert (family.vision, family.decoder) == (expected.vision, expected.decoder)
