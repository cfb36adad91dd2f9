"""Pictures of several requests in one forward: one that fails, fails alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.errors import Internal, InvalidRequest
from service.families import load_family
from service.isolation import Broken
from service.turns import Turns
from service.vision.stage import VisionStage
from tests.checkpoints import make_idefics

MARK = 255  # a picture that begins with it is the one that breaks


class BreakingModel(torch.nn.Module):
    """The stage's model, which raises, or computes no number, for a picture that begins with the mark."""

    def __init__(self, model: torch.nn.Module, error: BaseException | None, value: float = torch.nan) -> None:
        super().__init__()
        self.model, self.error, self.value = model, error, value

    def forward(self, pixels: Tensor) -> Tensor:
        latents = self.model(pixels)
        marked = pixels[:, 0, 0, 0] > 1.9  # normalised: the brightest
        if self.error is not None and marked.any():
            raise self.error
        return torch.where(marked[:, None, None, None], self.value, latents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_idefics(tmp_path_factory.mktemp("idefics"))


class CountedTurns(Turns):
    def __init__(self) -> None:
        super().__init__()
        self.num_passed = 0

    def pass_on(self) -> None:
        self.num_passed += 1
        super().pass_on()


@pytest.fixture
def stage(folder: Path) -> VisionStage:
    return VisionStage(load_family(folder), "cpu", "float32")


def pictures(count: int, seed: int, marked: bool = False) -> Tensor:
    pixels = torch.randint(0, 200, (count, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if marked:
        pixels[-1, 0, 0, 0] = MARK
    return pixels


@pytest.mark.parametrize("error", [RuntimeError("no"), torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
@pytest.mark.parametrize("guilty", [(0,), (4,), (1, 2), (0, 1, 2, 3, 4)])
def test_requests_that_break_the_encoder_fail_alone(
    stage: VisionStage, error: BaseException, guilty: tuple[int, ...]
) -> None:
    requests = [pictures(1 + index % 2, index, marked=index in guilty) for index in range(5)]
    alone = [stage.encode(pixels) for pixels in requests]
    stage.model = BreakingModel(stage.model, error)
    results = stage.encode_each(requests)
    for index, result in enumerate(results):
        if index in guilty:
            assert isinstance(result, Internal)
        else:
            torch.testing.assert_close(result, alone[index])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_picture_whose_latents_are_not_finite_fails_alone(stage: VisionStage, value: float) -> None:
    requests = [pictures(1, 0), pictures(2, 1, marked=True), pictures(1, 2)]
    stage.model = BreakingModel(stage.model, None, value)
    first, second, third = stage.encode_each(requests)
    assert isinstance(second, Internal)
    assert isinstance(first, Tensor) and isinstance(third, Tensor)
    assert first.isfinite().all() and third.isfinite().all()


def test_latents_past_the_range_of_half_precision_are_not_sent(stage: VisionStage) -> None:
    stage.model = BreakingModel(stage.model, None, 1e5)
    stage.latents_dtype = torch.float16
    first, second = stage.encode_each([pictures(1, 0), pictures(1, 1, marked=True)])
    assert isinstance(first, Tensor) and isinstance(second, Internal)


@pytest.mark.parametrize(
    "misfit",
    [
        torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
        torch.zeros(1, 3, 28, 29, dtype=torch.uint8),
        torch.zeros(1, 1, 28, 28, dtype=torch.uint8),
        torch.zeros(3, 28, 28, dtype=torch.uint8),
        torch.zeros(1, 3, 28, 28),
    ],
)
def test_pixels_of_another_shape_or_type_are_refused_alone(stage: VisionStage, misfit: Tensor) -> None:
    first, second, third = stage.encode_each([pictures(1, 0), misfit, pictures(1, 1)])
    assert isinstance(first, Tensor) and isinstance(third, Tensor)
    assert isinstance(second, InvalidRequest) and second.param == "pixels"


def test_nobody_ends_the_encoder_with_pictures_that_break_it(stage: VisionStage) -> None:
    stage.model = BreakingModel(stage.model, RuntimeError("no"))
    for _ in range(10):
        (result,) = stage.encode_each([pictures(1, 0, marked=True)])
        assert isinstance(result, Internal)


@pytest.mark.parametrize("sick", [False, True])
def test_an_encoder_that_can_do_nothing_more_says_so(stage: VisionStage, sick: bool) -> None:
    class Dead(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure") if sick else RuntimeError("no")

    stage.model = Dead()
    with pytest.raises(Broken):
        for _ in range(1 if sick else 3):
            stage.encode_each([pictures(1, 0), pictures(1, 1)])


def test_taking_turns_with_a_decoder_changes_no_latents(folder: Path, stage: VisionStage) -> None:
    turns = CountedTurns()
    in_turns = VisionStage(load_family(folder), "cpu", "float32", turns)
    requests = [pictures(1 + index, index) for index in range(3)]
    for latents, expected in zip(in_turns.encode_each(requests), stage.encode_each(requests), strict=True):
        assert isinstance(latents, Tensor) and isinstance(expected, Tensor)
        torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    assert turns.num_passed >= 6 * len(list(stage.model.encoder.layers))  # six pictures, between all layers
