"""`transformers` in one process: all users in one static batch, which ends when its longest answer does.

It also tells the seconds between its tokens.

python -m loadtest.bench.peers.static_batches FOLDER DTYPE
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

from loadtest.bench.scenario import Request
from loadtest.bench.worker import serve


class Clock:
    """A streamer of `generate`: notes when tokens come. The prompt comes first, at once."""

    def __init__(self) -> None:
        self._times_s: list[float] = []

    def put(self, value: Any) -> None:
        self._times_s.append(time.perf_counter())

    def end(self) -> None:
        pass

    def gaps_s(self) -> list[float]:
        """Between the tokens of an answer."""
        return [after - before for before, after in itertools.pairwise(self._times_s[1:])]


def main() -> None:
    folder, dtype = sys.argv[1:]

    def start() -> Any:
        from loadtest.bench.peers.generator import Generator

        generator = Generator(Path(folder), dtype)

        def handle(message: dict[str, Any]) -> dict[str, Any]:
            requests = [Request.from_json(fields) for fields in message["requests"]]
            questions = [generator.question_about(r.input_ids, r.pictures, r.max_tokens) for r in requests]
            begin_s = time.perf_counter()
            clock = Clock()
            tokens = generator.answer(questions, streamer=clock)
            return {"seconds": time.perf_counter() - begin_s, "tokens": tokens, "gaps_s": clock.gaps_s()}

        return handle

    serve(start)


if __name__ == "__main__":
    main()
