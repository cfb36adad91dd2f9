"""`transformers` in one process: all users in one static batch, which ends when its longest answer does.

python -m loadtest.bench.peers.static_batches FOLDER DTYPE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from loadtest.bench.scenario import Request
from loadtest.bench.worker import serve


def main() -> None:
    folder, dtype = sys.argv[1:]

    def start() -> Any:
        from loadtest.bench.peers.generator import Generator

        generator = Generator(Path(folder), dtype)

        def handle(message: dict[str, Any]) -> dict[str, Any]:
            requests = [Request.from_json(fields) for fields in message["requests"]]
            questions = [generator.question_about(r.input_ids, r.pictures, r.max_tokens) for r in requests]
            begin_s = time.perf_counter()
            tokens = generator.answer(questions)
            return {"seconds": time.perf_counter() - begin_s, "tokens": tokens}

        return handle

    serve(start)


if __name__ == "__main__":
    main()
