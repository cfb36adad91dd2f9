"""What is written first: FastAPI around `generate`, behind a lock. Pictures are decoded before it, beside each other.

One thread loads and generates, so that there is one OpenMP pool: at its best.

    python -m loadtest.bench.peers.fastapi_lock FOLDER DTYPE PORT
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from loadtest.bench.peers.generator import Generator


def make_app(folder: Path, dtype: str) -> FastAPI:
    app, lock = FastAPI(), asyncio.Lock()
    model_thread = ThreadPoolExecutor(1)
    generator = model_thread.submit(Generator, folder, dtype).result()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/v1/generate")
    async def generate(request: Request) -> dict[str, Any]:
        question = await asyncio.to_thread(generator.question, await request.json())
        async with lock:
            loop = asyncio.get_running_loop()
            tokens = await loop.run_in_executor(model_thread, generator.answer, [question])
        return {"token_ids": tokens[0]}

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(Path(sys.argv[1]), sys.argv[2]), port=int(sys.argv[3]), log_level="warning")
