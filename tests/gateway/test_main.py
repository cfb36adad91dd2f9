"""The gateway as a process: what an operator got wrong is one line, and SIGTERM ends it with 0."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from service.gateway.__main__ import main

CONFIG = {
    "model_type": "crossgate_flamingo",
    "additional_vocab_size": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vision_config": {
        "encoder": {
            "kind": "vit",
            "image_size": 16,
            "width": 8,
            "num_positions": 5,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "patch_size": 8,
            "num_layers": 1,
            "num_heads": 1,
            "ffn_width": 16,
        },
        "resampler": {
            "input_width": 8,
            "width": 8,
            "depth": 1,
            "num_heads": 1,
            "head_width": 8,
            "num_latents": 4,
            "ffn_width": 16,
        },
    },
    "text_config": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "cross_attention_config": {
        "layers": [1],
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_width": 8,
        "ffn_width": 16,
        "qk_norm": False,
        "vector_gate": False,
    },
}


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    text = {**CONFIG["text_config"], "vocab_size": size - 1}
    image = tokenizer.token_to_id("<image>")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "text_config": text, "image_token_id": image}))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "mistake", ["no model", "no folder", "no tokenizer", "port in use", "unknown setting", "keys that are not UTF-8"]
)
def test_an_operator_s_mistake_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, mistake: str
) -> None:
    for name in [name for name in os.environ if name.startswith("CROSSGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("service.gateway.__main__.configure_logs", lambda level: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("HOST", "127.0.0.1")
        monkeypatch.setenv("PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("MODEL_PATH", str(checkpoint))
        if mistake == "no model":
            monkeypatch.delenv("MODEL_PATH")
        elif mistake == "no folder":
            monkeypatch.setenv("MODEL_PATH", str(checkpoint / "nowhere"))
        elif mistake == "no tokenizer":
            (checkpoint / "tokenizer.json").unlink()
        elif mistake == "unknown setting":
            monkeypatch.setenv("CROSSGATE_MAX_IMAGE", "3")
        elif mistake == "keys that are not UTF-8":
            (checkpoint / "keys").write_bytes(b"alice:\xff\xfe\n")
            monkeypatch.setenv("CROSSGATE_API_KEYS_FILE", str(checkpoint / "keys"))
        assert main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("crossgate: ")


def environment_of(checkpoint: Path, port: int, **settings: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CROSSGATE_")}
    environment |= {"MODEL_PATH": str(checkpoint), "PORT": str(port), "TRITON_URL": "127.0.0.1:1"}
    return {**environment, "CROSSGATE_HEARTBEAT_TIMEOUT_S": "0.5", "CROSSGATE_RESTART_WAIT_S": "0.5", **settings}


@pytest.mark.asyncio
async def test_the_process_serves_and_ends_with_0_on_sigterm(checkpoint: Path) -> None:
    port = free_port()
    environment = environment_of(checkpoint, port)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service.gateway", env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            while True:
                try:
                    assert (await client.get("/livez")).json() == {"status": "alive"}
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
            assert (await client.get("/readyz")).status_code == 503
            reply = await client.post("/v1/generate", json={"prompt": "Hi"})
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "unavailable"
            process.send_signal(signal.SIGTERM)
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    assert all(json.loads(line)["message"] for line in errors.decode().splitlines())


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [
        ("127.0.0.1", "", False),
        ("0.0.0.0", "", True),
        ("0.0.0.0", "alice:secret", False),
        ("::1", "", False),
        ("::", "", True),
    ],
)
def test_an_open_door_beyond_this_machine_is_one_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    checkpoint: Path,
    host: str,
    keys: str,
    warned: bool,
) -> None:
    for name in [name for name in os.environ if name.startswith("CROSSGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("service.gateway.__main__.configure_logs", lambda level: None)
    monkeypatch.setattr("service.gateway.__main__.serve", lambda app, settings, listeners: listeners[0].close())
    monkeypatch.setenv("HOST", host)
    monkeypatch.setenv("PORT", "0")
    monkeypatch.setenv("MODEL_PATH", str(checkpoint))
    monkeypatch.setenv("CROSSGATE_API_KEYS", keys)
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    assert main() == 0
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [("no API keys" in record.getMessage()) for record in warnings] == [True] * warned


def test_what_is_there_when_it_begins_to_serve_is_left_alone_by_the_collector(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    num_objects = []

    def serve(app: object, settings: object, listeners: list[socket.socket]) -> None:
        num_objects.append(len(gc.get_objects()))
        listeners[0].close()

    monkeypatch.setattr("service.gateway.__main__.serve", serve)
    monkeypatch.setattr("service.gateway.__main__.configure_logs", lambda level: None)
    for name, value in environment_of(checkpoint, 0).items():
        monkeypatch.setenv(name, value)
    try:
        assert main() == 0
    finally:
        gc.unfreeze()
    assert num_objects[0] < 1000
