"""From logits to tokens, a whole batch at once, each row by its own parameters and its own random numbers.

The n-th token of a request takes one uniform number from a counter-based generator keyed by the request's seed
(Philox, Salmon et al. 2011, as in numpy), and turns it into a token by the inverse of the cumulative distribution.
So a seed gives the same tokens alone and in any batch, and after a preemption.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from service.decoder.sequence import Sequence

GREEDY_BELOW = 1e-5  # a temperature at which nothing but the likeliest token has a chance; division by less overflows


def sample(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """The next token of each sequence from fp32 logits [B, V]: temperature, then top-k, then top-p, as in vLLM.

    A row that is not finite gets some token and changes no other row.
    """
    tokens = logits.argmax(dim=-1)  # (B,)
    random_rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature >= GREEDY_BELOW]
    if random_rows:
        chosen = [sequences[row] for row in random_rows]
        tokens[random_rows] = _sample_random(logits[random_rows], chosen)
    return tokens.tolist()


def _sample_random(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] -> int64 [B]."""
    device, num_logits = logits.device, logits.shape[1]
    temperature = torch.tensor([s.sampling.temperature for s in sequences], dtype=torch.float32, device=device)
    top_k = torch.tensor([min(s.sampling.top_k or num_logits, num_logits) for s in sequences], device=device)
    top_p = torch.tensor([s.sampling.top_p for s in sequences], dtype=torch.float64, device=device)
    uniform = torch.tensor([_uniform(s) for s in sequences], dtype=torch.float64, device=device)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]  # at most 0: no overflow
    ordered, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(num_logits, device=device) >= top_k[:, None], -torch.inf)
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the mass of likelier tokens
    probabilities = probabilities.masked_fill(before >= top_p[:, None], 0.0)  # keeps the likeliest at least
    cumulative = probabilities.cumsum(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    ranks = torch.searchsorted(cumulative, threshold, right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not choose a token of probability 0
    last = last.clamp(min=0)  # not finite: none is above 0
    return token_ids.gather(1, torch.minimum(ranks, last)).squeeze(1)


def _uniform(sequence: Sequence) -> float:
    """In [0, 1): the number of this request's seed for its next token."""
    bits = np.random.Philox(key=sequence.seed, counter=sequence.num_generated)
    return float(np.random.Generator(bits).random())
