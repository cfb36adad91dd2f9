"""The engine: a request's tokens depend on the request alone; every end frees everything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from service.contract import FinishReason, SamplingParams, ValidRequest
from service.decoder.engine import Engine
from service.decoder.settings import DecoderSettings
from service.errors import CrossgateError, ImageNotResident, InvalidRequest, TooLarge
from service.families import Family, load_family
from service.vision.stage import VisionStage
from tests.checkpoints import make_idefics
from tests.decoder.drive import Pictures, add, drain, make_request, tokens

ROOMY = DecoderSettings(kv_blocks=256, image_pages=64, max_running=16, max_step_tokens=512)
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


@dataclasses.dataclass
class World:
    family: Family
    stage: VisionStage
    requests: list[tuple[ValidRequest, Pictures]]  # of many lengths and picture counts

    def engine(self, settings: DecoderSettings = ROOMY) -> Engine:
        return Engine.from_family(self.family, settings)

    def add(self, engine: Engine, index: int, sampling: SamplingParams | None = None) -> None:
        request, pictures = self.requests[index]
        request = dataclasses.replace(request, sampling=sampling or request.sampling)
        add(engine, index, request, self.stage, pictures)

    def alone(self, index: int, sampling: SamplingParams | None = None) -> list[int]:
        engine = self.engine()
        self.add(engine, index, sampling)
        return tokens(drain(engine)[index])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder: Path = make_idefics(tmp_path_factory.mktemp("idefics"))
    family = load_family(folder)
    rng = np.random.default_rng(11)
    requests = []
    for index in range(17):
        num_pictures = index % 4
        pictures = rng.integers(0, 256, (num_pictures, 3, 28, 28), dtype=np.uint8)
        input_ids = [1]
        for _ in range(num_pictures):
            input_ids += [int(t) for t in rng.integers(3, 300, rng.integers(0, 12))] + [family.image_token_id]
        input_ids += [int(t) for t in rng.integers(3, 300, rng.integers(1, 60))]
        requests.append((make_request(family, input_ids, pictures, GREEDY), pictures))
    return World(family, VisionStage(family, "cpu", "float32"), requests)


@pytest.fixture(scope="module")
def expected(world: World) -> dict[int, list[int]]:
    return {index: world.alone(index) for index in range(len(world.requests))}


def assert_all_free(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used, stats.image_pages_used) == (0, 0, 0, 0)


def test_batching_does_not_change_greedy_tokens(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.engine()
    for index in expected:
        world.add(engine, index)
    assert {index: tokens(events) for index, events in drain(engine).items()} == expected
    assert_all_free(engine)


def test_joining_midway_does_not_change_greedy_tokens(world: World, expected: dict[int, list[int]]) -> None:
    engine, got = world.engine(), {index: [] for index in expected}
    pending = list(expected)
    while pending or engine.has_work:
        if pending:
            world.add(engine, pending.pop(0))
        for index, event in engine.step():
            got[index] += event.token_ids
    assert got == expected


def test_chunked_prefill_does_not_change_greedy_tokens(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.engine(dataclasses.replace(ROOMY, max_running=4, max_step_tokens=7))
    for index in expected:
        world.add(engine, index)
    assert {index: tokens(events) for index, events in drain(engine).items()} == expected


def test_preemption_does_not_change_greedy_tokens(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.engine(dataclasses.replace(ROOMY, kv_blocks=12))
    for index in expected:
        world.add(engine, index)
    assert {index: tokens(events) for index, events in drain(engine).items()} == expected
    assert engine.stats().num_preemptions > 0
    assert_all_free(engine)


def test_cached_pictures_and_prefixes_do_not_change_greedy_tokens(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.engine()
    for repeat in range(2):
        for index in expected:
            world.add(engine, index)
        events = drain(engine)
        assert {index: tokens(of_one) for index, of_one in events.items()} == expected
        usage = {index: of_one[-1].usage for index, of_one in events.items()}
        for index, (request, _) in enumerate(world.requests):
            assert usage[index].cached_images == (len(request.image_keys) if repeat else 0)
            assert usage[index].cached_prompt_tokens == ((len(request.input_ids) - 1) // 16 * 16 if repeat else 0)


def test_a_prefix_is_cached_for_those_of_the_same_salt_alone(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.engine()
    index = 4  # without pictures
    request, pictures = world.requests[index]
    cached = {}
    for asker, salt in enumerate((b"s" * 32, b"t" * 32, b"", b"s" * 32, b"t" * 32, b"")):
        add(engine, asker, dataclasses.replace(request, cache_salt=salt), world.stage, pictures)
        (events,) = drain(engine).values()
        assert tokens(events) == expected[index]
        cached[asker] = events[-1].usage.cached_prompt_tokens
    whole_blocks = (len(request.input_ids) - 1) // 16 * 16
    assert whole_blocks > 0 and list(cached.values()) == [0, 0, 0, whole_blocks, whole_blocks, whole_blocks]


def test_a_resident_picture_needs_no_latents(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.engine()
    request, _ = world.requests[3]
    with pytest.raises(ImageNotResident) as caught:
        engine.add(0, request)
    assert caught.value.keys == request.image_keys
    world.add(engine, 3)
    drain(engine)
    engine.add(0, request)
    assert tokens(drain(engine)[0]) == expected[3]


def test_images_do_not_leak_between_requests(world: World) -> None:
    """The same words about another picture give other tokens, and the same again when the first picture is back."""
    engine = world.engine()
    request, pictures = world.requests[1]
    other = make_request(world.family, list(request.input_ids), 255 - pictures, GREEDY)
    add(engine, 0, request, world.stage, pictures)
    add(engine, 1, other, world.stage, 255 - pictures)
    together = drain(engine)
    assert tokens(together[0]) == world.alone(1)
    assert tokens(together[0]) != tokens(together[1])


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=0.7, top_k=20, seed=6, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=1.3, top_p=0.8, seed=7, ignore_eos=True),
    ],
)
def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(world: World, sampling: SamplingParams) -> None:
    alone = world.alone(2, sampling)
    assert alone == world.alone(2, sampling)
    assert alone != world.alone(2, dataclasses.replace(sampling, seed=99))
    engine = world.engine(dataclasses.replace(ROOMY, kv_blocks=12))
    for index in range(8):
        world.add(engine, index, sampling if index == 2 else None)
    assert tokens(drain(engine)[2]) == alone


def test_eos_and_stop_ids_end_a_sequence_and_are_delivered(world: World, expected: dict[int, list[int]]) -> None:
    stop = expected[0][10]
    first = expected[0].index(stop)
    engine = world.engine()
    world.add(engine, 0, SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(stop,)))
    events = drain(engine)[0]
    assert tokens(events) == expected[0][: first + 1]
    assert events[-1].finish_reason is FinishReason.STOP

    engine = world.engine()
    engine.family = dataclasses.replace(world.family, eos_token_ids=(stop,))
    world.add(engine, 0, SamplingParams(max_tokens=40))
    assert tokens(drain(engine)[0]) == expected[0][: first + 1]


def test_max_tokens_and_a_full_context_end_with_length(world: World) -> None:
    engine = world.engine()
    world.add(engine, 0, SamplingParams(max_tokens=3, ignore_eos=True))
    events = drain(engine)[0]
    assert len(tokens(events)) == 3 and events[-1].finish_reason is FinishReason.LENGTH
    limit = world.family.decoder.max_positions
    engine.add(1, ValidRequest(tuple([5] * (limit - 4)), sampling=SamplingParams(max_tokens=50, ignore_eos=True)))
    events = drain(engine)[1]
    assert len(tokens(events)) == 4 and events[-1].finish_reason is FinishReason.LENGTH


def test_a_request_that_does_not_stream_hears_of_its_first_token_and_then_gets_the_rest(
    world: World, expected: dict[int, list[int]]
) -> None:
    engine = world.engine()
    world.add(engine, 4, dataclasses.replace(GREEDY, stream=False))
    first, event = drain(engine)[4]
    assert list(first.token_ids) == expected[4][:1] and first.finish_reason is None
    assert list(event.token_ids) == expected[4][1:]
    assert event.usage is not None and event.usage.completion_tokens == 40
    assert event.timings is not None and event.timings.decode_ms > 0


def test_cancel_returns_everything_in_every_state(world: World) -> None:
    engine = world.engine(dataclasses.replace(ROOMY, max_running=2, max_step_tokens=8))
    for index in (3, 7, 11):
        world.add(engine, index)
    engine.step()  # 3 is in the middle of its prompt, 7 and 11 wait
    assert engine.stats().num_waiting >= 1
    engine.cancel(11)
    while engine.stats().num_running < 2:
        engine.step()
    engine.cancel(7)
    engine.step()
    engine.cancel(3)
    engine.cancel(3)
    assert not engine.has_work
    assert_all_free(engine)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_ids": ()}, "input_ids"),
        ({"input_ids": (1, 10**6)}, "input_ids"),
        ({"input_ids": (1,) * 512}, "input_ids"),
        ({"image_positions": (0, 1)}, "image_positions"),
        ({"image_positions": (999,)}, "image_positions"),
    ],
)
def test_what_the_contract_forbids_is_refused(world: World, changes: dict, param: str) -> None:
    request, _ = world.requests[1]
    with pytest.raises(InvalidRequest) as caught:
        world.engine().add(0, dataclasses.replace(request, **changes))
    assert caught.value.param == param


def tiled(world: World, index: int, num_tiles: int) -> tuple[ValidRequest, torch.Tensor]:
    """A request whose one picture has several tiles, each with latents of its own."""
    request, pictures = world.requests[index]
    rng = np.random.default_rng(index)
    others = rng.integers(0, 256, (num_tiles - 1, 3, 28, 28), dtype=np.uint8)
    latents = world.stage.encode(torch.from_numpy(np.concatenate([pictures, others]))).flatten(0, 1)
    return dataclasses.replace(request, image_keys=(f"{num_tiles:064}",)), latents


def test_a_picture_of_equal_tiles_is_what_one_of_them_is(world: World, expected: dict[int, list[int]]) -> None:
    """A softmax over everything twice is the softmax over it once."""
    request, latents = tiled(world, 1, 1)
    for num_tiles in (1, 2, 4):
        engine = world.engine()
        engine.add(0, request, latents.expand(num_tiles, -1, -1), [0] * num_tiles)
        engine.step()
        assert engine.stats().image_pages_used == num_tiles
        assert engine.stats().image_kv_bytes == num_tiles * engine.runner.image_kv.page_bytes
        engine.cancel(0)
        engine.add(0, request)
        assert tokens(drain(engine)[0]) == expected[1]


def test_pictures_of_many_sizes_in_a_batch_do_not_change_greedy_tokens(
    world: World, expected: dict[int, list[int]]
) -> None:
    alone = {}
    requests = {100 + index: tiled(world, index, 1 + number % 4) for number, index in enumerate((1, 5, 9, 13))}
    for request_id, (request, latents) in requests.items():
        engine = world.engine()
        engine.add(request_id, request, latents, [0] * len(latents))
        alone[request_id] = tokens(drain(engine)[request_id])
    assert alone[105] != expected[5], "the second tile is seen"
    for settings in (ROOMY, dataclasses.replace(ROOMY, image_pages=5, max_step_tokens=17)):
        engine = world.engine(settings)
        for index in expected:
            world.add(engine, index)
        for request_id, (request, latents) in requests.items():
            engine.add(request_id, request, latents, [0] * len(latents))
        assert {index: tokens(events) for index, events in drain(engine).items()} == expected | alone
        assert_all_free(engine)


@pytest.mark.parametrize("latent_index", [[0, 1, 0], [1, 0, 1]])
def test_a_pictures_tiles_stand_together(world: World, latent_index: list[int]) -> None:
    request, pictures = world.requests[2]
    latents = world.stage.encode(torch.from_numpy(pictures)).flatten(0, 1)[[0, 1, 0]]
    with pytest.raises(InvalidRequest) as caught:
        world.engine().add(0, request, latents, latent_index)
    assert caught.value.param == "latent_index"


def test_pictures_of_more_pages_than_there_are_are_too_large(world: World) -> None:
    request, latents = tiled(world, 1, 4)
    engine = world.engine(dataclasses.replace(ROOMY, image_pages=3))
    with pytest.raises(TooLarge):
        engine.add(0, request, latents, [0] * 4)
    assert not engine.has_work


def test_latents_of_another_shape_are_refused(world: World) -> None:
    request, _ = world.requests[1]
    with pytest.raises(CrossgateError, match="latents must be"):
        world.engine().add(0, request, torch.zeros(1, 2, 3), [0])
