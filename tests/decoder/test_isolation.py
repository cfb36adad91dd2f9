"""A request that breaks a step fails alone; what a request does not own never reaches its tokens."""

from __future__ import annotations

import dataclasses
import queue
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from service.contract import MAX_STOP_TOKEN_IDS, SamplingParams, TokenEvent, ValidRequest
from service.decoder.engine import Engine
from service.decoder.loop import EngineLoop
from service.decoder.scheduler import Step
from service.decoder.settings import DecoderSettings
from service.errors import CrossgateError, ImageNotResident, Internal, InvalidRequest
from service.families import Family, load_family
from service.isolation import Broken
from service.vision.stage import VisionStage
from tests.checkpoints import make_idefics
from tests.decoder.drive import Pictures, add, drain, make_request, tokens
from tests.decoder.faults import install, raises_for

ROOMY = DecoderSettings(kv_blocks=256, image_pages=64, max_running=16, max_step_tokens=512)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
POISON = 299  # the embedding of this token is not a number in `world.poisoned()`
INNOCENT = range(8)


@dataclasses.dataclass
class World:
    family: Family
    stage: VisionStage
    requests: list[tuple[ValidRequest, Pictures]]

    def engine(self, settings: DecoderSettings = ROOMY) -> Engine:
        return Engine.from_family(self.family, settings)

    def poisoned(self, settings: DecoderSettings = ROOMY) -> Engine:
        engine = self.engine(settings)
        engine.runner.model.embed_tokens.weight.data[POISON] = torch.nan
        return engine

    def add(self, engine: Engine, *indices: int) -> None:
        for index in indices:
            add(engine, index, self.requests[index][0], self.stage, self.requests[index][1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder: Path = make_idefics(tmp_path_factory.mktemp("idefics"))
    family = load_family(folder)
    rng = np.random.default_rng(12)
    requests = []
    for index in INNOCENT:
        pictures = rng.integers(0, 256, (index % 3, 3, 28, 28), dtype=np.uint8)
        input_ids = [1, *([family.image_token_id] * len(pictures))]
        input_ids += [int(t) for t in rng.integers(3, 299, rng.integers(5, 60))]
        requests.append((make_request(family, input_ids, pictures, GREEDY), pictures))
    return World(family, VisionStage(family, "cpu", "float32"), requests)


@pytest.fixture(scope="module")
def expected(world: World) -> dict[int, list[int]]:
    alone = {}
    for index in INNOCENT:
        engine = world.engine()
        world.add(engine, index)
        alone[index] = tokens(drain(engine)[index])
    return alone


def drain_all(engine: Engine) -> tuple[dict[int, list[int]], dict[int, CrossgateError]]:
    """Tokens by request, and errors by request, until nothing is left."""
    events: dict[int, list[TokenEvent]] = {}
    errors: dict[int, CrossgateError] = {}
    while engine.has_work:
        for request_id, event in engine.step():
            if isinstance(event, CrossgateError):
                errors[request_id] = event
            else:
                events.setdefault(request_id, []).append(event)
    return {request_id: tokens(of_one) for request_id, of_one in events.items()}, errors


def assert_all_free(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used, stats.image_pages_used) == (0, 0, 0, 0)


def poison(num_tokens: int, at: int = 0) -> ValidRequest:
    return ValidRequest(tuple([5] * at + [POISON] + [7] * (num_tokens - at - 1)), sampling=GREEDY)


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 5e-324, 1e-300, 1e-6, 2e-5])
def test_a_tiny_temperature_is_greedy_and_harms_nobody(
    world: World, expected: dict[int, list[int]], temperature: float
) -> None:
    engine = world.engine()
    world.add(engine, *INNOCENT)
    request, pictures = world.requests[2]
    tiny = dataclasses.replace(request, sampling=dataclasses.replace(GREEDY, temperature=temperature, top_p=1e-300))
    add(engine, 99, tiny, world.stage, pictures)
    got, errors = drain_all(engine)
    assert not errors
    assert got == {**expected, 99: expected[2]}


@pytest.mark.parametrize("max_step_tokens", [512, 17])
def test_a_request_whose_numbers_are_not_finite_fails_alone(
    world: World, expected: dict[int, list[int]], max_step_tokens: int
) -> None:
    engine = world.poisoned(dataclasses.replace(ROOMY, max_step_tokens=max_step_tokens))
    engine.add(98, poison(40, at=20))
    world.add(engine, *INNOCENT)
    engine.add(99, poison(1))
    got, errors = drain_all(engine)
    assert {request_id: type(error) for request_id, error in errors.items()} == {98: Internal, 99: Internal}
    assert got == expected
    assert_all_free(engine)


@pytest.mark.parametrize("guilty", [(0,), (7,), (2, 3), (0, 4, 7), tuple(INNOCENT)])
@pytest.mark.parametrize("max_step_tokens", [512, 20])
def test_requests_whose_step_raises_are_found_and_the_others_go_on(
    world: World, expected: dict[int, list[int]], guilty: tuple[int, ...], max_step_tokens: int
) -> None:
    engine = world.engine(dataclasses.replace(ROOMY, max_step_tokens=max_step_tokens))
    install(engine, raises_for(*guilty))
    world.add(engine, *INNOCENT)
    got, errors = drain_all(engine)
    assert sorted(errors) == list(guilty)
    assert got == {index: expected[index] for index in INNOCENT if index not in guilty}
    assert_all_free(engine)


def test_a_request_that_breaks_late_keeps_what_it_was_told(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.engine()

    def fault(step: Step) -> BaseException | None:
        late = any(c.sequence.request_id == 3 and c.sequence.num_generated >= 5 for c in step.chunks)
        return RuntimeError("late") if late else None

    install(engine, fault)
    world.add(engine, *INNOCENT)
    got, errors = drain_all(engine)
    assert list(errors) == [3]
    assert got == {**expected, 3: expected[3][:5]}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
)
def test_a_step_without_memory_for_all_is_computed_in_parts(
    world: World, expected: dict[int, list[int]], error: BaseException
) -> None:
    engine = world.engine()
    install(engine, lambda step: error if len(step.chunks) > 3 else None)
    world.add(engine, *INNOCENT)
    got, errors = drain_all(engine)
    assert not errors
    assert got == expected


def test_a_device_that_answers_only_errors_is_reported_at_once(world: World) -> None:
    engine = world.engine()
    faulty = install(engine, lambda step: torch.AcceleratorError("CUDA error: device-side assert triggered"))
    world.add(engine, 0, 1)
    with pytest.raises(Broken):
        engine.step()
    assert len(faulty.steps) == 1


def test_an_engine_in_which_everything_fails_is_reported_after_some_steps(world: World) -> None:
    engine = world.engine()
    install(engine, lambda step: RuntimeError("always"))
    with pytest.raises(Broken):
        for index in INNOCENT:
            world.add(engine, index)
            engine.step()


def test_nobody_ends_an_engine_by_asking_for_what_breaks_it_again_and_again(world: World) -> None:
    engine = world.poisoned()
    install(engine, raises_for(0))
    for attempt in range(10):
        if attempt % 2:
            engine.add(99, poison(10))
        else:
            world.add(engine, 0)
        _, errors = drain_all(engine)
        assert len(errors) == 1
    assert_all_free(engine)


def test_a_failed_step_leaves_no_picture_resident(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.engine(dataclasses.replace(ROOMY, image_pages=2))
    faulty = install(engine, lambda step: None)
    world.add(engine, 2)  # its pictures are on both pages
    drain(engine)
    faulty.fault = raises_for(5)
    world.add(engine, 5)
    _, errors = drain_all(engine)
    assert list(errors) == [5]
    assert engine.stats().image_kv_bytes == 0
    faulty.fault = lambda step: None
    with pytest.raises(ImageNotResident):
        engine.add(6, world.requests[5][0])
    world.add(engine, 5)
    assert tokens(drain(engine)[5]) == expected[5]
    assert_all_free(engine)


def test_after_a_failed_step_the_next_request_is_answered_about_its_own_picture(
    world: World, expected: dict[int, list[int]]
) -> None:
    """As clients have it: through the loop, which drops the requests of a step that failed as a whole."""
    engine = world.engine(dataclasses.replace(ROOMY, image_pages=2))
    world.add(engine, 2)  # its pictures are on both pages
    drain(engine)
    project_image = engine.runner.model.project_image

    def broken(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no kernel")

    def ask() -> tuple[list[int], CrossgateError | None]:
        answers: queue.SimpleQueue[TokenEvent | CrossgateError | None] = queue.SimpleQueue()
        request, pictures = world.requests[5]
        latents = world.stage.encode(torch.from_numpy(pictures)).flatten(0, 1)
        loop.submit(request, latents, list(range(len(pictures))), answers.put, lambda: False)
        got: list[int] = []
        while True:
            answer = answers.get(timeout=30)
            if answer is None or isinstance(answer, CrossgateError):
                return got, answer
            got += answer.token_ids
            if answer.finish_reason is not None:
                return got, None

    loop = EngineLoop(lambda: engine)
    try:
        engine.runner.model.project_image = broken  # type: ignore[method-assign]
        assert isinstance(ask()[1], Internal)
        engine.runner.model.project_image = project_image  # type: ignore[method-assign]
        assert ask() == (expected[5], None)
    finally:
        loop.close()


def test_a_picture_that_one_of_two_requests_has_filled_is_resident(
    world: World, expected: dict[int, list[int]]
) -> None:
    engine = world.engine()
    install(engine, raises_for(90))
    request, pictures = world.requests[1]
    add(engine, 90, request, world.stage, pictures)
    world.add(engine, 1)
    got, errors = drain_all(engine)
    assert (list(errors), got) == ([90], {1: expected[1]})
    engine.add(1, request)  # without latents
    assert tokens(drain(engine)[1]) == expected[1]


def test_requests_that_bring_the_same_picture_at_once_share_one_fill(
    world: World, expected: dict[int, list[int]]
) -> None:
    engine = world.engine()
    faulty = install(engine, lambda step: None)
    request, pictures = world.requests[2]
    for request_id in (2, 90, 91):
        add(engine, request_id, request, world.stage, pictures)
    got, _ = drain_all(engine)
    assert sum(len(step.image_fills) for step in faulty.steps) == len(pictures)
    assert got == dict.fromkeys((2, 90, 91), expected[2])


def test_a_picture_whose_fill_breaks_fails_those_who_need_it(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.engine()
    request, pictures = world.requests[1]
    latents = world.stage.encode(torch.from_numpy(pictures)).flatten(0, 1)
    endless = latents.clone()
    endless[0, 0] = 3e38 * torch.where(torch.arange(latents.shape[2]) % 2 == 0, 1.0, -1.0)  # finite; its K/V is not
    broken = dataclasses.replace(request, image_keys=("ab" * 32,))
    engine.add(90, broken, endless, [0])
    world.add(engine, *INNOCENT)
    engine.add(91, broken, endless, [0])
    got, errors = drain_all(engine)
    assert sorted(errors) == [90, 91]
    assert got == expected
    with pytest.raises(ImageNotResident):
        engine.add(92, broken)
    assert_all_free(engine)


def test_a_broken_picture_is_never_resident_though_its_prompt_begins_without_it(world: World) -> None:
    engine = world.engine(dataclasses.replace(ROOMY, max_step_tokens=17))
    endless = torch.full((1, 8, 48), 3e38) * torch.where(torch.arange(48) % 2 == 0, 1.0, -1.0)
    late = ValidRequest((*([5] * 40), world.family.image_token_id, 6), ("ab" * 32,), (40,), GREEDY)
    engine.add(90, late, endless, [0])
    assert drain_all(engine)[1].keys() == {90}
    with pytest.raises(ImageNotResident):
        engine.add(91, late)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_latents_that_are_not_finite_are_refused(world: World, value: float) -> None:
    request, pictures = world.requests[2]
    latents = world.stage.encode(torch.from_numpy(pictures)).flatten(0, 1).clone()
    latents[1, -1, -1] = value
    with pytest.raises(InvalidRequest) as caught:
        world.engine().add(0, request, latents, [0, 1])
    assert caught.value.param == "latents"


def test_latents_past_the_range_of_the_decoders_dtype_are_refused(world: World) -> None:
    request, pictures = world.requests[1]
    latents = world.stage.encode(torch.from_numpy(pictures)).flatten(0, 1).clone()
    latents[0, 0, 0] = 1e5
    engine = world.engine(dataclasses.replace(ROOMY, dtype="float16"))
    with pytest.raises(InvalidRequest) as caught:
        engine.add(0, request, latents, [0])
    assert caught.value.param == "latents"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_memory_that_a_request_has_not_written_reaches_no_token(
    world: World, expected: dict[int, list[int]], value: float
) -> None:
    engine = world.engine(dataclasses.replace(ROOMY, max_step_tokens=50))
    for memory in (engine.runner.self_kv.k, engine.runner.self_kv.v, engine.runner.image_kv.k):
        memory.fill_(value)
    engine.runner.image_kv.v.fill_(value)
    world.add(engine, *INNOCENT)
    got, errors = drain_all(engine)
    assert (got, errors) == (expected, {})


def test_blocks_that_held_what_is_no_number_are_used_again(world: World, expected: dict[int, list[int]]) -> None:
    engine = world.poisoned(dataclasses.replace(ROOMY, kv_blocks=12))
    for round_ in range(3):
        for number in range(4):
            engine.add(100 + number, poison(35 + number, at=17))
        world.add(engine, *INNOCENT)
        got, errors = drain_all(engine)
        assert sorted(errors) == [100, 101, 102, 103], round_
        assert got == expected, round_
    assert_all_free(engine)


def test_a_block_that_held_what_is_no_number_is_found_by_nobody(world: World) -> None:
    engine = world.poisoned(dataclasses.replace(ROOMY, max_step_tokens=20))
    engine.add(0, poison(70, at=18))  # in the second block; the chunks end in the middle of blocks
    drain_all(engine)
    engine.runner.model.embed_tokens.weight.data[POISON] = 0.5
    engine.add(1, poison(70, at=18))
    events = drain(engine)[1]
    fresh = world.engine()
    fresh.runner.model.embed_tokens.weight.data[POISON] = 0.5
    fresh.add(1, poison(70, at=18))
    assert tokens(events) == tokens(drain(fresh)[1])
    assert events[-1].usage is not None and events[-1].usage.cached_prompt_tokens <= 16


MILLION = 10**6


@pytest.mark.parametrize(
    ("request_", "num_latents"),
    [
        (ValidRequest(tuple(range(MILLION))), 0),
        (ValidRequest((-1,) * MILLION), 0),
        (ValidRequest((1, 2, 3), ("ab" * 32,) * MILLION, tuple(range(MILLION))), 0),
        (ValidRequest((1, 2, 3), ("ab" * 32,), tuple(range(MILLION))), 0),
        (ValidRequest((1, 2, 3), ("ab" * 32,), (0,)), MILLION),
    ],
    ids=["input_ids", "negative input_ids", "image_keys", "image_positions", "latents"],
)
def test_a_million_of_anything_is_refused_before_it_is_looked_at(
    world: World, request_: ValidRequest, num_latents: int
) -> None:
    engine = world.engine()
    latents = torch.zeros(1, 1, 1).expand(num_latents, 8, 48) if num_latents else None
    index, times = [0] * num_latents, []
    for _ in range(5):
        start_s = time.perf_counter()
        with pytest.raises(InvalidRequest):
            engine.add(0, request_, latents, index)
        times.append(time.perf_counter() - start_s)
    assert min(times) < 0.001


def test_stop_ids_cost_a_step_nothing(world: World) -> None:
    """A step asks a set, not a list: as many as are allowed cost what none cost."""

    def step_s(stop: tuple[int, ...]) -> float:
        engine = world.engine()
        sampling = SamplingParams(max_tokens=200, ignore_eos=True, stop_token_ids=stop)
        for request_id in range(8):
            engine.add(request_id, ValidRequest((1, 5), sampling=sampling))
        times = []
        for _ in range(60):
            start_s = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start_s)
        return min(times)

    never = tuple(range(world.family.decoder.num_logits, world.family.decoder.vocab_size))
    assert step_s((never * MAX_STOP_TOKEN_IDS)[:MAX_STOP_TOKEN_IDS]) < 2 * step_s(())


def test_stop_ids_past_the_vocabulary_are_refused(world: World) -> None:
    engine = world.engine()
    beyond = world.family.decoder.vocab_size
    engine.add(0, ValidRequest((1,), sampling=SamplingParams(stop_token_ids=(beyond - 1,))))
    with pytest.raises(InvalidRequest) as caught:
        engine.add(1, ValidRequest((1,), sampling=SamplingParams(stop_token_ids=(beyond,))))
    assert caught.value.param == "stop_token_ids"


def test_what_goes_wrong_about_one_sequence_after_the_step_is_its_own(world: World) -> None:
    engine = world.engine()
    world.add(engine, 0, 1)
    sequence = engine.scheduler.waiting[0]
    sequence.stop_token_ids = None  # type: ignore[assignment]  # breaks where its token is looked at
    got, errors = drain_all(engine)
    assert (list(errors), list(got)) == ([0], [1])
    assert_all_free(engine)
