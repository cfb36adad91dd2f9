"""The sampler against the distribution that temperature, top-k and top-p define, computed in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.contract import SamplingParams, ValidRequest
from service.decoder.sampler import sample
from service.decoder.sequence import Sequence
from service.families.flamingo import see

LOGITS = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -3.0, 1.5, 0.5])


def reference(sampling: SamplingParams) -> np.ndarray:
    """Probabilities by the definition: sort, keep k, keep the smallest set of mass top_p, renormalise."""
    order = np.argsort(-LOGITS, kind="stable")
    scaled = LOGITS[order] / sampling.temperature
    scaled = scaled[: sampling.top_k or len(scaled)]
    mass = np.exp(scaled - scaled.max())
    mass /= mass.sum()
    kept = int(np.searchsorted(np.cumsum(mass), sampling.top_p - 1e-12)) + 1
    mass = mass[:kept] / mass[:kept].sum()
    full = np.zeros(len(LOGITS))
    full[order[:kept]] = mass
    return full


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.5, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=1.2, top_k=6, top_p=0.9),
    ],
)
def test_frequencies_follow_the_distribution(sampling: SamplingParams) -> None:
    num_draws = 20000
    sequences = [Sequence(0, ValidRequest((1,), sampling=sampling), {}, see, 0.0, seed) for seed in range(num_draws)]
    logits = torch.tensor(LOGITS, dtype=torch.float32).expand(num_draws, -1)
    counts = np.bincount(sample(logits, sequences), minlength=len(LOGITS))
    expected = reference(sampling) * num_draws
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_squared = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert chi_squared < 26.1  # the 99.95 % quantile at 7 degrees of freedom


def test_greedy_and_random_rows_share_a_batch() -> None:
    greedy = Sequence(0, ValidRequest((1,), sampling=SamplingParams(temperature=0.0)), {}, see, 0.0, 1)
    top_one = Sequence(1, ValidRequest((1,), sampling=SamplingParams(temperature=1.0, top_k=1)), {}, see, 0.0, 2)
    logits = torch.tensor(np.stack([LOGITS, LOGITS[::-1].copy()]), dtype=torch.float32)
    assert sample(logits, [greedy, top_one]) == [0, 7]
