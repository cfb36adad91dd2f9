"""Whose memory is whose: fractions of a GPU, and the pools that are made of one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.decoder.settings import DecoderSettings
from service.errors import InvalidRequest
from service.gateway.settings import STAGE_VARIABLES
from service.shares import MemoryFractions, Pool, divide
from tests.checkpoints import make_idefics
from tests.decoder import triton_stand_in

DECODER, ENCODER = "CROSSGATE_DECODER_MEMORY_FRACTION", "CROSSGATE_ENCODER_MEMORY_FRACTION"
ADAPTER = Path(__file__).resolve().parents[1] / "model_repo" / "vision_encoder" / "1" / "model.py"


def test_fractions_are_as_set_and_leave_room_if_not() -> None:
    assert MemoryFractions.from_environment({DECODER: "0.5", ENCODER: "0.25"}) == MemoryFractions(0.5, 0.25)
    unset = MemoryFractions.from_environment({DECODER: ""})
    assert 0 < unset.encoder < unset.decoder and unset.decoder + unset.encoder < 1
    assert DecoderSettings.from_environment({"DEVICE": "cuda", DECODER: "0.5"}).memory_fraction == 0.5
    assert {DECODER, ENCODER} <= STAGE_VARIABLES


@pytest.mark.parametrize("value", ["0", "-0.1", "1.01", "nan", "inf", "70%", "half"])
@pytest.mark.parametrize("name", [DECODER, ENCODER])
def test_a_value_that_is_no_fraction_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}={value} is not a number") as caught:
        MemoryFractions.from_environment({name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(("decoder", "encoder"), [("0.7", "0.31"), ("1", "0.01"), ("0.9", "")])
def test_two_fractions_that_pass_the_whole_are_refused_in_one_line(decoder: str, encoder: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{DECODER} and {ENCODER} are .* more than 1") as caught:
        DecoderSettings.from_environment({"DEVICE": "cpu", DECODER: decoder, ENCODER: encoder})
    assert len(caught.value.message.splitlines()) == 1


@given(st.integers(1, 99))
def test_two_fractions_may_be_the_whole(percent: int) -> None:
    MemoryFractions.from_environment({DECODER: str(percent / 100), ENCODER: str((100 - percent) / 100)})


def test_text_gets_its_share_and_pictures_the_rest() -> None:
    assert divide(1000, Pool(10, 1, 999), Pool(25, 1, 999), 0.75) == (75, 10)


def test_what_one_has_no_use_for_goes_to_the_other() -> None:
    assert divide(1000, Pool(10, 1, 40), Pool(25, 1, 999), 0.75) == (40, 24)
    assert divide(1000, Pool(10, 1, 999), Pool(25, 1, 4), 0.75) == (90, 4)
    assert divide(1000, Pool(10, 1, 40), Pool(25, 1, 4), 0.75) == (40, 4)


def test_each_has_its_least_before_the_other_has_more() -> None:
    assert divide(1000, Pool(10, 90, 999), Pool(25, 1, 999), 0.75) == (90, 4)
    assert divide(1000, Pool(10, 1, 999), Pool(25, 30, 999), 0.75) == (25, 30)


pools = st.builds(
    lambda page_bytes, least, more: Pool(page_bytes, least, least + more),
    st.integers(1, 1000),
    st.integers(0, 50),
    st.integers(0, 10_000),
)


@given(st.integers(0, 1_000_000), pools, pools, st.floats(0, 1))
def test_pools_fit_are_within_their_bounds_and_leave_nothing_that_either_could_use(
    spare: int, text: Pool, pictures: Pool, share: float
) -> None:
    num_bytes = spare + text.least_bytes + pictures.least_bytes
    num_blocks, num_pictures = divide(num_bytes, text, pictures, share)
    left = num_bytes - num_blocks * text.page_bytes - num_pictures * pictures.page_bytes
    assert text.least <= num_blocks <= text.most and pictures.least <= num_pictures <= pictures.most
    assert left >= 0
    assert num_blocks == text.most or left < text.page_bytes
    assert num_pictures == pictures.most or left < max(pictures.page_bytes, text.page_bytes)


@pytest.mark.parametrize(("device", "held_to"), [("cuda", [(0.25, None)]), ("cuda:1", [(0.25, 1)]), ("cpu", [])])
def test_the_encoders_process_is_held_to_its_fraction_before_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, held_to: list[tuple[float, int | None]]
) -> None:
    limits: list[tuple[float, int | None]] = []
    when_loaded: list[list[tuple[float, int | None]]] = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    monkeypatch.setattr("service.vision.stage.VisionStage", lambda *arguments: when_loaded.append(list(limits)))
    for name, value in {"MODEL_PATH": make_idefics(tmp_path), "DEVICE": device, ENCODER: 0.25}.items():
        monkeypatch.setenv(name, str(value))
    _adapter(monkeypatch).TritonPythonModel().initialize({})
    assert when_loaded == [held_to]


def test_an_encoder_told_of_no_fraction_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL_PATH": make_idefics(tmp_path), "DEVICE": "cpu", ENCODER: "2"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InvalidRequest, match=ENCODER):
        _adapter(monkeypatch).TritonPythonModel().initialize({})


def _adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The vision encoder's module, as Triton's stub imports it."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_stand_in)
    spec = importlib.util.spec_from_file_location("vision_encoder_adapter", ADAPTER)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
