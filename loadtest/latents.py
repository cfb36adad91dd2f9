"""python -m loadtest.latents: what a four-tile picture's latents cost on their way from the encoder to the decoder.

A checkpoint in Llama 3.2 Vision's layout, of its positions and a text width of 2,048, all else tiny: 52 MB of latents
in float32, as the 11B model has in fp16. Its pictures are encoded and asked about, with the latents sent by gRPC and
with them in memory shared with Triton. What the same costs without them is taken off: encoding for the checkpoint's
identity alone, asking about a picture that the decoder holds, and what the decoder computes, by its own account.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2_grpc

from service.contract import SamplingParams, ValidRequest
from service.families import Family, load_family
from service.gateway.pictures.key import picture_key
from service.gateway.stages.messages import encoder_message
from service.gateway.stages.triton import CHANNEL_OPTIONS, TritonBackend
from tests.e2e.running import Running
from tests.reliability.proxy import Proxy
from tests.reliability.table import markdown

ROUNDS = 9
TEXT = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "cross_attention_layers": [0],
}
VISION = {
    "image_size": 560,
    "patch_size": 14,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "attention_heads": 1,
    "intermediate_size": 16,
    "intermediate_layers_indices": [0],
}


@dataclass
class Transfer:
    """Of each round. `first`: about a new picture, encoding included; `second`: about the same again.

    The seconds are without what the decoder computed.
    """

    latents_bytes: int
    encode_s: list[float] = field(default_factory=list)  # without latents
    first_s: list[float] = field(default_factory=list)
    second_s: list[float] = field(default_factory=list)
    first_bytes: list[int] = field(default_factory=list)  # between the gateway's side and Triton
    second_bytes: list[int] = field(default_factory=list)

    @property
    def added_s(self) -> float:
        """What latents add, in the median round."""
        rounds = zip(self.first_s, self.encode_s, self.second_s, strict=True)
        return statistics.median(first - encode - second for first, encode, second in rounds)


class Asker:
    """The gateway's side of the stages. `port`: Triton's, or that of something before it."""

    def __init__(self, family: Family, port: int, *, shares_memory: bool) -> None:
        self.family = family
        self.backend = TritonBackend(
            f"127.0.0.1:{port}",
            config=family.config_identity,
            vision=family.vision,
            probe_token=0,
            heartbeat_timeout_s=30.0,
            shared_memory_bytes=1 << 30 if shares_memory else 0,
        )
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def encode_for_nothing(self, pixels: NDArray[np.uint8]) -> float:
        await self._stub.ModelInfer(encoder_message(pixels, wants_latents=False))
        return 0.0

    async def ask(self, pixels: NDArray[np.uint8], *, is_new: bool) -> float:
        """To the first token; returns the seconds that the decoder computed."""
        key = picture_key(pixels, self.family.config_identity)
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        request = ValidRequest((self.family.image_token_id, 5, 6), (key,), (0,), sampling)
        latents = {key: await self.backend.encode(pixels)} if is_new else {}
        prefill_s = 0.0
        async for event in self.backend.generate(request, latents):
            prefill_s = event.timings.prefill_ms / 1e3 if event.timings else prefill_s
        return prefill_s

    async def close(self) -> None:
        await self.backend.close()
        await self._channel.close()


def measure(service: Running, family: Family, *, shares_memory: bool, rounds: int) -> Transfer:
    return asyncio.run(_measure(service, family, shares_memory, rounds))


async def _measure(service: Running, family: Family, shares_memory: bool, rounds: int) -> Transfer:
    rng = np.random.default_rng(int(shares_memory))
    size = 2 * family.vision.encoder.image_size
    num_latents, width = family.vision.latents_shape
    transfer = Transfer(4 * num_latents * width * 4)

    def picture() -> NDArray[np.uint8]:
        return rng.integers(0, 256, (3, size, size), dtype=np.uint8)

    asker = Asker(family, service.triton_grpc_port, shares_memory=shares_memory)
    await asker.ask(picture(), is_new=True)  # warms
    for _ in range(rounds):
        pixels = picture()
        transfer.encode_s.append(await _seconds(asker.encode_for_nothing(pixels)))
        transfer.first_s.append(await _seconds(asker.ask(pixels, is_new=True)))
        transfer.second_s.append(await _seconds(asker.ask(pixels, is_new=False)))
    await asker.close()
    async with Proxy(service.triton_grpc_port) as proxy:  # it counts, but it takes time
        asker = Asker(family, proxy.port, shares_memory=shares_memory)
        await asker.ask(picture(), is_new=True)
        for _ in range(2):
            pixels = picture()
            for counted, is_new in ((transfer.first_bytes, True), (transfer.second_bytes, False)):
                before = proxy.num_bytes
                await asker.ask(pixels, is_new=is_new)
                counted.append(proxy.num_bytes - before)
        await asker.close()
    return transfer


async def _seconds(work: Awaitable[float]) -> float:
    """What it took, without the seconds that it returns."""
    start_s = time.perf_counter()
    computed_s = await work
    return time.perf_counter() - start_s - computed_s


def main() -> None:
    from tests.mllama import make_mllama  # torch and transformers

    with tempfile.TemporaryDirectory(prefix="crossgate-latents-") as name:
        folder = make_mllama(Path(name), text=TEXT, vision=VISION)
        family = load_family(folder)
        service = Running("--no-question", MODEL_PATH=str(folder), CROSSGATE_NUM_THREADS="")
        try:
            service.wait_until_ready()
            found = {how: measure(service, family, shares_memory=how == "shared memory", rounds=ROUNDS) for how in HOW}
        finally:
            service.stop()
    rows = [
        [
            how,
            f"{transfer.added_s * 1e3:,.0f}",
            f"{statistics.median(transfer.first_s) * 1e3:,.0f}",
            f"{statistics.median(transfer.first_bytes) / 1e6:,.1f}",
            f"{statistics.median(transfer.second_bytes) / 1e6:,.3f}",
        ]
        for how, transfer in found.items()
    ]
    size = found["gRPC"].latents_bytes
    header = [
        f"{size / 1e6:.0f} MB of latents by",
        "they add, ms",
        "first token, ms",
        "MB, first",
        "MB, second question",
    ]
    print(markdown(header, rows))
    ratio = found["gRPC"].added_s / found["shared memory"].added_s
    print(f"\nShared memory is {ratio:.1f} times as fast.")


HOW = ("gRPC", "shared memory")

if __name__ == "__main__":
    main()
