"""The launcher: what an operator sees, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.checkpoints import make_idefics
from tests.e2e.running import Running, command_of, descendants, interrupt, picture, question, wait_until_gone


@pytest.fixture
def own_service(tiny_checkpoint: Path) -> Iterator[Running]:
    running = Running("--no-question", MODEL_PATH=str(tiny_checkpoint))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


def stub_of(running: Running, model: str) -> int:
    return next(pid for pid in descendants(running.process.pid) if f"{model}/1/model.py" in command_of(pid))


def gateway_of(running: Running) -> int:
    return next(pid for pid in descendants(running.process.pid) if command_of(pid).endswith("-m service.gateway "))


def wait_until_answered(running: Running, timeout_s: float = 90.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while httpx.post(f"{running.url}/v1/generate", json=question(picture(1)), timeout=60).status_code != 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


@pytest.mark.parametrize("model", ["vision_encoder", "fused_decoder"])
def test_a_model_process_killed_under_load_costs_no_request_without_its_first_token(
    service: Running, model: str
) -> None:
    """They wait until it is back. One token each, so that none is killed between its first and its last."""
    killed, back = stub_of(service, model), threading.Event()

    def ask(client: int) -> list[int]:
        statuses, number = [], 0
        while not back.is_set() or number < 3:
            body = question(picture(10_000 * client + number), max_tokens=1)
            statuses.append(httpx.post(f"{service.url}/v1/generate", json=body, timeout=120).status_code)
            number += 1
        return statuses

    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask, client) for client in range(1, 9)]
        try:
            time.sleep(1.0)
            os.kill(killed, signal.SIGKILL)
            assert not wait_until_gone({killed}, 5)
            wait_until_answered(service)
        finally:
            back.set()
        statuses = [status for each in asking for status in each.result()]
    assert set(statuses) == {200}, statuses
    assert stub_of(service, model) != killed
    assert httpx.get(f"{service.url}/readyz").status_code == 200


def test_weights_replaced_under_a_running_gateway_are_never_mixed(tmp_path: Path) -> None:
    """Triton comes back with other weights; what the gateway had kept of the old ones is not used."""
    folder = make_idefics(tmp_path / "served", max_position_embeddings=4096)
    other = make_idefics(tmp_path / "other", max_position_embeddings=4096, seed=1)
    bodies = [question(picture(seed), ignore_eos=True) for seed in range(3)]
    running = Running("--no-question", MODEL_PATH=str(folder))

    def ask_all() -> list[list[int]]:
        replies = [httpx.post(f"{running.url}/v1/generate", json=body, timeout=120) for body in bodies]
        assert {reply.status_code for reply in replies} == {200}, replies
        return [reply.json()["token_ids"] for reply in replies]

    try:
        running.wait_until_ready()
        before = ask_all()
        os.replace(other / "model.safetensors", folder / "model.safetensors")
        os.kill(stub_of(running, "fused_decoder"), signal.SIGKILL)
        running.wait_for("Triton is back")
        after = ask_all()
        os.kill(gateway_of(running), signal.SIGKILL)  # the new one has kept nothing
        running.wait_for("gateway is back")
        wait_until_answered(running)
        fresh = ask_all()
    finally:
        running.stop()
    assert after == fresh
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_a_killed_gateway_is_replaced(service: Running) -> None:
    killed = gateway_of(service)
    os.kill(killed, signal.SIGKILL)
    deadline_s = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline_s
        try:
            if httpx.get(f"{service.url}/readyz", timeout=10).status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    wait_until_answered(service)


def test_an_interrupt_lets_a_running_request_finish_and_leaves_no_process(own_service: Running) -> None:
    family = descendants(own_service.process.pid)
    body = question(picture(1), max_tokens=60, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{own_service.url}/v1/generate", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        interrupt(own_service)
        rest = list(lines)
    assert "data: [DONE]" in rest
    assert own_service.wait_for_end() == 0
    assert not wait_until_gone(family, 0)
    assert not list(Path("/dev/shm").glob(f"crossgate-{own_service.process.pid}-*"))


def test_a_second_interrupt_stops_at_once(own_service: Running) -> None:
    family = descendants(own_service.process.pid)
    body = question(picture(1), max_tokens=4000, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{own_service.url}/v1/generate", json=body, timeout=60) as response:
        next(response.iter_lines())
        interrupt(own_service)
        own_service.wait_for("stopping")
        interrupt(own_service)
        own_service.wait_for_end(10)
    assert not wait_until_gone(family, 5)  # picture workers end with their gateway, by the kernel's signal


def test_a_killed_launcher_takes_everything_with_it(own_service: Running) -> None:
    family = descendants(own_service.process.pid)
    own_service.process.kill()
    own_service.process.wait()
    assert not wait_until_gone(family, 20)


def test_a_port_in_use_is_one_clear_line(tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = Running(MODEL_PATH=str(tiny_checkpoint), PORT=str(port))
        assert running.wait_for_end() == 2
    assert len(running.lines) == 1
    assert f"127.0.0.1:{port}" in running.lines[0]
    assert "in use" in running.lines[0]


def test_a_folder_that_is_no_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    running = Running(MODEL_PATH=str(tmp_path))
    assert running.wait_for_end() == 2
    assert running.lines == [f"crossgate: {tmp_path} is not a checkpoint folder: it has no config.json."]


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / SHARD).unlink(), "has no model*.safetensors file: save the model as"),
    "pickled weights": (
        lambda folder: (folder / SHARD).rename(folder / "pytorch_model.bin"),
        "has no model*.safetensors file, only pytorch_model.bin, which may run code when it is read",
    ),
    "a missing shard": (
        lambda folder: (folder / f"{SHARD}.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}})
        ),
        "lacks model-00002-of-00002.safetensors, which its index names: copy the whole checkpoint",
    ),
    "a broken file": (
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-9]),
        "is not a readable safetensors file",
    ),
    "another width": (lambda folder: change(folder, intermediate_size=88), "has shape"),
    "an unknown family": (lambda folder: change(folder, model_type="gpt5"), "has model_type 'gpt5'; known are"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
}
SHARD = "model.safetensors"


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("mistake", WRONG)
def test_a_checkpoint_that_cannot_be_served_is_one_clear_line(tmp_path: Path, mistake: str) -> None:
    folder = make_idefics(tmp_path / "wrong")
    spoil, message = WRONG[mistake]
    spoil(folder)
    running = Running(MODEL_PATH=str(folder))
    assert running.wait_for_end() == 2
    assert len(running.lines) <= 2  # what it loads, if it comes to that, and why it cannot
    assert message in running.lines[-1]
    assert "Traceback" not in running.lines[-1]
