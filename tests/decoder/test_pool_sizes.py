"""Pools as large as the decoder's memory allows. No GPU is asked: a stand-in says what there is and what was taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from service.contract import SamplingParams, ValidRequest
from service.decoder.engine import Engine
from service.decoder.model import Decoder
from service.decoder.page_pool import PagePool, PageShape
from service.decoder.pool_sizes import largest_step, pool_sizes
from service.decoder.runner import MAX_FILLED
from service.decoder.settings import DecoderSettings
from service.errors import InvalidRequest
from service.families import Family, load_family
from service.shares import text_share
from tests.checkpoints import make_idefics

MB = 10**6
ON_CPU = DecoderSettings(max_running=4, max_step_tokens=700)
ON_GPU = replace(ON_CPU, device="cuda:1", memory_fraction=0.5)
POSITIONS, CONTEXT = 512, 32  # tokens and blocks of one


class GPU:
    """What is asked of `torch.cuda`: so many bytes, none of them free, and so many taken for the largest step."""

    def __init__(self, total: int, taken: int) -> None:
        self.total, self.taken = total, taken
        self.calls: list[Any] = []

    def mem_get_info(self, device: str) -> tuple[int, int]:
        assert device == ON_GPU.device
        return 0, self.total

    def empty_cache(self) -> None:
        self.calls.append("empty")

    def reset_peak_memory_stats(self, device: str) -> None:
        assert device == ON_GPU.device
        self.calls.append("reset")

    def max_memory_reserved(self, device: str) -> int:
        assert device == ON_GPU.device
        self.calls.append("read")
        return self.taken

    def set_per_process_memory_fraction(self, fraction: float, device: int) -> None:
        self.calls.append((fraction, device))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return load_family(make_idefics(tmp_path_factory.mktemp("idefics")))


@pytest.fixture(scope="module")
def model(family: Family) -> Decoder:
    return Engine.from_family(family, replace(ON_CPU, kv_blocks=1, image_pages=1)).runner.model


def kv_bytes(family: Family, num_blocks: int, num_pages: int) -> int:
    """Of tensors as large, and of one layer of each once more."""
    shapes = PageShape.of_text(family.decoder), PageShape.of_images(family.decoder.cross_attention)
    pools = [
        PagePool(shape, num, torch.device("meta"), torch.float32)
        for shape, num in zip(shapes, (num_blocks, num_pages), strict=True)
    ]
    return sum(x.nbytes + x[0].nbytes for pool in pools for x in (pool.k, pool.v))


def test_the_pools_fill_the_decoders_fraction_beside_what_else_it_takes(family: Family, model: Decoder) -> None:
    for total, taken in ((18 * MB, 3 * MB), (12 * MB, 2 * MB)):
        blocks, pages = pool_sizes(family, model, ON_GPU, GPU(total, taken))
        assert kv_bytes(family, blocks, pages) + taken <= total / 2 < kv_bytes(family, blocks + 1, pages) + taken
        share = kv_bytes(family, blocks, 0) / kv_bytes(family, blocks, pages)
        assert share == pytest.approx(text_share(family.decoder, max_pages=1), rel=0.02)


def test_pools_are_no_larger_than_what_can_be_used(family: Family, model: Decoder) -> None:
    assert pool_sizes(family, model, ON_GPU, GPU(10**12, 0)) == (CONTEXT * ON_GPU.max_running, 16_384)


def test_what_is_taken_is_read_after_the_largest_step_and_nothing_is_kept(family: Family, model: Decoder) -> None:
    gpu = GPU(20 * MB, 0)
    hook = model.register_forward_hook(lambda *_: gpu.calls.append("step"))
    pool_sizes(family, model, ON_GPU, gpu)
    hook.remove()
    assert gpu.calls == ["empty", "reset", "step", "read", "empty", (0.5, 1)]


@pytest.mark.parametrize(
    ("max_running", "max_step_tokens", "num_tokens"), [(4, 700, 700), (64, 65, 65), (1, 700, POSITIONS - 1)]
)
def test_the_largest_step_has_as_many_tokens_samples_and_pictures_as_any(
    family: Family, model: Decoder, max_running: int, max_step_tokens: int, num_tokens: int
) -> None:
    settings = replace(ON_GPU, max_running=max_running, max_step_tokens=max_step_tokens)
    shapes: list[tuple[int, ...]] = []
    hooks = [
        model.register_forward_pre_hook(lambda _, inputs: shapes.append((len(inputs[0]), inputs[2].any_sees))),
        model.lm_head.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape))),
    ]
    pool_sizes(family, model, settings, GPU(100 * MB, 0))
    for hook in hooks:
        hook.remove()
    assert shapes == [(num_tokens, True), (max_running, family.decoder.width)]
    step = largest_step(family, settings)
    assert [len(latents) for _, latents in step.image_fills] == [MAX_FILLED]
    assert all(chunk.samples for chunk in step.chunks)


def test_no_step_of_an_engine_takes_more_than_the_largest(family: Family, model: Decoder) -> None:
    """But for the gathered layer, which the pools' sizes allow for."""
    settings = DecoderSettings(max_running=8, max_step_tokens=96, kv_blocks=64, image_pages=12)
    engine = Engine(family, model, settings)
    profile = Engine(family, model, replace(settings, kv_blocks=1, image_pages=1)).runner
    bound = peak_bytes(lambda: profile.run(largest_step(family, settings)))
    bound += kv_bytes(family, 64, 12) - sum(x.nbytes for pool in pools_of(engine) for x in (pool.k, pool.v))
    shape = family.vision.latents_shape
    for index in range(24):
        num_pictures = index % 3
        input_ids = [family.image_token_id] * num_pictures + [5] * (1 + 13 * index % 80)
        keys = tuple(f"{index}/{number}" for number in range(num_pictures))
        sampling = SamplingParams(max_tokens=8, temperature=2.0, top_p=(0.5, 0.9999, 1.0)[index % 3], ignore_eos=True)
        request = ValidRequest(tuple(input_ids), keys, tuple(range(num_pictures)), sampling)
        engine.add(index, request, torch.randn(num_pictures, *shape) if keys else None, list(range(num_pictures)))
    peaks = []
    while engine.has_work:
        peaks.append(peak_bytes(engine.step))
    assert bound / 10 < max(peaks) <= bound


def test_what_is_set_is_made_and_the_other_has_what_it_leaves(family: Family, model: Decoder) -> None:
    untouched = GPU(0, 0)
    both = replace(ON_GPU, kv_blocks=7, image_pages=3)
    assert pool_sizes(family, model, both, untouched) == (7, 3) and not untouched.calls
    blocks, pages = pool_sizes(family, model, replace(ON_GPU, kv_blocks=40), GPU(20 * MB, 3 * MB))
    assert blocks == 40
    assert kv_bytes(family, 40, pages) <= 7 * MB < kv_bytes(family, 40, pages + 1)
    blocks, pages = pool_sizes(family, model, replace(ON_GPU, image_pages=5), GPU(10 * MB, 3 * MB))
    assert pages == 5
    assert kv_bytes(family, blocks, 5) <= 2 * MB < kv_bytes(family, blocks + 1, 5)


def test_less_than_a_context_and_a_picture_is_refused_in_one_line_that_says_what_is_there(
    family: Family, model: Decoder
) -> None:
    needed = kv_bytes(family, CONTEXT, 1)
    assert pool_sizes(family, model, ON_GPU, GPU(2 * needed + 2 * MB, MB)) == (CONTEXT, 1)
    with pytest.raises(InvalidRequest) as caught:
        pool_sizes(family, model, ON_GPU, GPU(2 * needed - 2 + 2 * MB, MB))
    message = caught.value.message
    assert len(message.splitlines()) == 1
    assert "512 tokens and 1 page(s) of pictures" in message
    assert "CROSSGATE_DECODER_MEMORY_FRACTION=0.5 of 5 MB, less 1 MB of weights and a step" in message
    assert "CROSSGATE_KV_BLOCKS and CROSSGATE_IMAGE_PAGES" in message
    with pytest.raises(InvalidRequest, match="160,000 tokens"):  # what is set is not made smaller
        pool_sizes(family, model, replace(ON_GPU, kv_blocks=10_000), GPU(20 * MB, 0))


def test_on_a_cpu_pools_take_a_quarter_of_what_is_free_or_a_context_and_a_picture(
    family: Family, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GPU(0, 0)

    def sizes(free: int) -> tuple[int, int]:
        monkeypatch.setattr("service.decoder.pool_sizes.free_host_bytes", lambda: free)
        return pool_sizes(family, model, ON_CPU, gpu)

    blocks, pages = sizes(16 * MB)
    assert kv_bytes(family, blocks, pages) <= 4 * MB < kv_bytes(family, blocks + 1, pages)
    needed = kv_bytes(family, CONTEXT, 1)
    assert sizes(needed) == sizes(2 * needed) == (CONTEXT, 1)
    with pytest.raises(InvalidRequest, match="what the host has free"):
        sizes(needed - 1)
    assert not gpu.calls


def test_an_engine_has_these_pools(family: Family, model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.decoder.pool_sizes.free_host_bytes", lambda: 16 * MB)
    stats = Engine(family, model, ON_CPU).stats()
    assert (stats.kv_blocks_total, stats.image_pages_total) == pool_sizes(family, model, ON_CPU)


def pools_of(engine: Engine) -> tuple[PagePool, PagePool]:
    return engine.runner.self_kv, engine.runner.image_kv


def peak_bytes(compute: Callable[[], object]) -> int:
    """The most that tensors took at once which were made meanwhile."""
    with torch.profiler.profile(profile_memory=True) as profile:
        compute()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
