"""The balancer's configuration on a real HAProxy, before two small servers that say who they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from service.launch.settings import free_ports

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "haproxy" / "haproxy.cfg"
KEYS = [f"{number:064x}" for number in range(40)]

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")


class Replica(ThreadingHTTPServer):
    """Answers its name; to /held, which sets `arrived`, only once `release` is set; 503 to the path `dead`."""

    daemon_threads = True
    dead: str | None = None
    arrived, release = threading.Event(), threading.Event()


class Answer(BaseHTTPRequestHandler):
    # On a client's next connection HAProxy may still count its last answered request as under way; on the same, never.
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet

    def do_GET(self) -> None:
        assert isinstance(self.server, Replica)
        if self.path == "/held":
            self.server.arrived.set()
            self.server.release.wait(20)
        body = str(self.server.server_port).encode()
        self.send_response(503 if self.path == self.server.dead else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def balancer(folder: Path, dead: str | None = None) -> Iterator[str]:
    """Its URL. The shipped configuration, but HTTP/1 and with its servers at known ports.

    Without checks, unless there is a path that the first replica answers with 503.
    """
    port, status_port = free_ports(2)
    with ExitStack() as stack:
        replicas = [stack.enter_context(Replica(("127.0.0.1", 0), Answer)) for _ in range(2)]
        replicas[0].dead = dead
        for replica in replicas:
            threading.Thread(target=replica.serve_forever, daemon=True).start()
            stack.callback(replica.shutdown)
        check = "" if dead else " no-check"
        servers = "\n".join(f"    server triton{n} 127.0.0.1:{r.server_port}{check}" for n, r in enumerate(replicas))
        text = re.sub(r"^    server-template .*$", servers, CONFIG.read_text(), flags=re.MULTILINE)
        text = text.replace("http-check connect port 8000 proto h1", "http-check connect proto h1")
        text = text.replace("bind :8001 proto h2", f"bind 127.0.0.1:{port}")
        text = text.replace("bind :8404", f"bind 127.0.0.1:{status_port}")
        (folder / "haproxy.cfg").write_text(text)
        command = ["haproxy", "-f", str(folder / "haproxy.cfg")]
        process = subprocess.Popen(command, env={**os.environ, "LOAD_FACTOR": "150"}, stdout=subprocess.DEVNULL)
        try:
            wait_until_answers(f"http://127.0.0.1:{status_port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def wait_until_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert process.poll() is None, "haproxy ended"
        try:
            httpx.get(url)
            return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise AssertionError("haproxy did not answer in time")


def replicas_of(client: httpx.Client) -> dict[str, str]:
    return {key: client.get("/", headers={"x-image-key": key}).text for key in KEYS}


def test_a_call_without_a_picture_under_way_sends_no_picture_elsewhere(tmp_path: Path) -> None:
    """A heartbeat or an encoder's call is not load of a decoder: a picture's K/V stays where its questions go."""
    with balancer(tmp_path) as url, httpx.Client(base_url=url) as client:
        homes = replicas_of(client)
        assert len(set(homes.values())) == 2
        held: list[str] = []
        call = threading.Thread(target=lambda: held.append(httpx.get(f"{url}/held", timeout=30).text))
        call.start()
        try:
            assert Replica.arrived.wait(20)
            assert replicas_of(client) == homes
        finally:
            Replica.release.set()
            call.join(20)
        assert len(held) == 1


@pytest.mark.parametrize("model", ["fused_decoder", "vision_encoder"])
def test_a_replica_one_of_whose_models_is_not_ready_gets_nothing(tmp_path: Path, model: str) -> None:
    with balancer(tmp_path, dead=f"/v2/models/{model}/ready") as url, httpx.Client(base_url=url) as client:
        for _ in range(100):
            if len(set(replicas_of(client).values())) == 1:
                return
            time.sleep(0.1)
    raise AssertionError("it still gets requests")
