"""Whether tokens are those that greedy `transformers` chooses, in fp32, one sequence at a time and without any cache.

A whole answer is judged in one pass: given what stands before it, each token must be the reference's best. So one wrong
token is one wrong token, and what follows it is judged by what it follows.

    python -m loadtest.bench.judge FOLDER
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loadtest.bench.scenario import Request
from loadtest.bench.worker import serve
from loadtest.pictures import jpeg
from service.families import load_family
from tests.reference import IdeficsReference

TIE = 1e-3  # of logits whose deviation is about 2: fp32 sums in another order may choose either


@dataclass(frozen=True)
class Verdict:
    """Of `num_tokens`, `num_agree` are the reference's best or tie with it. `first_wrong`: what is said about one."""

    num_tokens: int
    num_agree: int
    first_wrong: str | None = None


def judge_tokens(logits: Tensor, tokens: Sequence[int], expected_count: int) -> Verdict:
    """`logits` fp32 [n, V], the reference's before each of the n tokens."""
    if len(tokens) != expected_count:
        return Verdict(expected_count, 0, f"{len(tokens)} tokens came, {expected_count} were asked for")
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    best, best_ids = logits.max(dim=1)
    wrong = (best - chosen > TIE).nonzero()[:, 0].tolist()
    first = None
    if wrong:
        at = wrong[0]
        first = (
            f"token {at} is {tokens[at]}, the reference's {int(best_ids[at])} is better by {best[at] - chosen[at]:.4f}"
        )
    return Verdict(len(tokens), len(tokens) - len(wrong), first)


class Judge:
    def __init__(self, folder: Path) -> None:
        self._family = load_family(folder)
        self._reference = IdeficsReference(folder, self._family.image_token_id)
        self._latents = lru_cache(maxsize=256)(self._encode)
        self.judge = lru_cache(maxsize=4096)(self._judge)  # most systems give the same answer

    def _judge(self, request: Request, tokens: tuple[int, ...]) -> Verdict:
        if len(tokens) != request.max_tokens:
            return judge_tokens(torch.zeros(0, 0), tokens, request.max_tokens)
        latents = [self._latents(number) for number in request.pictures]
        nothing = torch.zeros(1, *self._family.vision.latents_shape)
        vision = {"perceiver_embeddings": torch.stack(latents or list(nothing))[None]}  # (1, T, R, E)
        ids = [*request.input_ids, *tokens]
        logits = self._reference.logits(ids, vision, len(tokens))[len(request.input_ids) - 1 : -1]
        return judge_tokens(logits, tokens, request.max_tokens)

    def _encode(self, number: int) -> Tensor:
        pixels = self._family.preprocess(Image.open(io.BytesIO(jpeg(number))))
        latents: Tensor = self._reference.vision(np.asarray(pixels)[None])["perceiver_embeddings"][0, 0]
        return latents


def main() -> None:
    def start() -> Any:
        judge = Judge(Path(sys.argv[1]))

        def handle(message: dict[str, Any]) -> dict[str, Any]:
            verdicts = [
                judge.judge(Request.from_json(fields), tuple(tokens))
                for fields, tokens in zip(message["requests"], message["tokens"], strict=True)
            ]
            return {
                "num_tokens": sum(verdict.num_tokens for verdict in verdicts),
                "num_agree": sum(verdict.num_agree for verdict in verdicts),
                "wrong": [f"user {u}: {v.first_wrong}" for u, v in enumerate(verdicts) if v.first_wrong],
            }

        return handle

    serve(start)


if __name__ == "__main__":
    main()
