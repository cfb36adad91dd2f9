"""LitServe with its batching around `generate`, not streaming: what it can batch is a whole answer.

A batch is as large as the scenario has users, so it never waits for the timeout: at its best.

    python -m loadtest.bench.peers.litserve_batch FOLDER DTYPE PORT BATCH
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve

from loadtest.bench.peers.generator import Generator, Question

BATCH_TIMEOUT_S = 30.0  # its window opens before the first request comes: a short one now and then cuts a batch in two


class Batched(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, folder: Path, dtype: str, max_batch_size: int) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=BATCH_TIMEOUT_S, api_path="/v1/generate")
        self._folder, self._dtype = folder, dtype

    def setup(self, device: str) -> None:
        self.generator = Generator(self._folder, self._dtype)

    def decode_request(self, request) -> Question:  # type: ignore[no-untyped-def]  # LitServe acts on an annotation
        return self.generator.question(request)

    def batch(self, inputs: list[Question]) -> list[Question]:
        return inputs

    def predict(self, questions: list[Question]) -> list[list[int]]:
        return self.generator.answer(questions)

    def unbatch(self, output: list[list[int]]) -> list[list[int]]:
        return output

    def encode_response(self, output: list[int]) -> dict[str, Any]:
        return {"token_ids": output}


if __name__ == "__main__":
    server = litserve.LitServer(
        Batched(Path(sys.argv[1]), sys.argv[2], int(sys.argv[4])),
        accelerator="cpu",
        workers_per_device=1,
        timeout=False,
    )
    server.run(host="127.0.0.1", port=int(sys.argv[3]), log_level="warning", generate_client_file=False)
