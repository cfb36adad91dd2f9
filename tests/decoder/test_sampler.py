"""The sampler against the distribution that temperature, top-k and top-p define, computed in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.contract import SamplingParams, ValidRequest
from service.decoder.sampler import sample
from service.decoder.sequence import Sequence
from service.families.flamingo import see
from tests.decoder.launches import Launches

LOGITS = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -3.0, 1.5, 0.5])


def reference(sampling: SamplingParams, logits: np.ndarray = LOGITS) -> np.ndarray:
    """Probabilities by the definition: sort, keep k, keep the smallest set of mass top_p, renormalise."""
    order = np.argsort(-logits, kind="stable")
    scaled = logits[order] / sampling.temperature
    scaled = scaled[: sampling.top_k or len(scaled)]
    mass = np.exp(scaled - scaled.max())
    mass /= mass.sum()
    kept = int(np.searchsorted(np.cumsum(mass), sampling.top_p - 1e-12)) + 1
    mass = mass[:kept] / mass[:kept].sum()
    full = np.zeros(len(logits))
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


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.2),
        SamplingParams(temperature=0.2, top_p=0.5),
        SamplingParams(temperature=1.0, top_k=100),
        SamplingParams(temperature=1.5, top_k=200, top_p=0.8),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=2.0, top_p=0.1),  # of ten tokens drawn of all one is kept
        SamplingParams(temperature=1.0, top_k=700),
        SamplingParams(temperature=1.2, top_k=700, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=700, top_p=0.3),  # of the mass of the 700, not of all
        SamplingParams(temperature=1.0, top_k=256, top_p=0.5),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution_over_a_large_vocabulary(sampling: SamplingParams) -> None:
    """Over 20 sets of tokens that should be drawn about equally often, and never one that is left out."""
    num_draws = 4000
    logits = np.random.default_rng(5).normal(size=1999)
    expected = reference(sampling, logits.astype(np.float32).astype(np.float64))
    sequences = [Sequence(0, ValidRequest((1,), sampling=sampling), {}, see, 0.0, seed) for seed in range(num_draws)]
    batch = torch.tensor(logits, dtype=torch.float32).expand(num_draws, -1)
    drawn = np.array(sample(batch, sequences))
    assert (expected[drawn] > 0).all()
    shuffled = np.random.default_rng(6).permutation(np.flatnonzero(expected))
    sets = np.minimum((expected[shuffled].cumsum() * 20).astype(int), 19)
    set_of = np.zeros(len(logits), dtype=int)
    set_of[shuffled] = sets
    counts = np.bincount(set_of[drawn], minlength=20)
    wanted = np.bincount(sets, weights=expected[shuffled], minlength=20) * num_draws
    assert ((counts - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum() < 45.97  # 99.95 % at 19 degrees of freedom


def test_the_tokens_of_one_request_are_independent_of_each_other() -> None:
    """Pairs of neighbours are drawn equally often where all tokens are equally likely."""
    sequence = Sequence(0, ValidRequest((1,), sampling=SamplingParams(temperature=1.0)), {}, see, 0.0, 3)
    num_draws, num_tokens = 8000, 4
    for _ in range(num_draws):
        sequence.append(*sample(torch.zeros(1, num_tokens), [sequence]))
    drawn = np.array(sequence.token_ids[1:])
    pairs = np.bincount(drawn[:-1] * num_tokens + drawn[1:], minlength=num_tokens**2)
    expected = (num_draws - 1) / num_tokens**2
    assert ((pairs - expected) ** 2 / expected).sum() < 39.7  # the 99.95 % quantile at 15 degrees of freedom


def test_a_seed_gives_the_same_token_alone_and_in_any_batch() -> None:
    kinds = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0.0, 0.3, 1.0)
        for top_k in (None, 40, 900)
        for top_p in (1.0, 0.6, 0.95)
    ]
    sequences = [Sequence(0, ValidRequest((1,), sampling=kinds[n]), {}, see, 0.0, 1000 + n) for n in range(len(kinds))]
    logits = torch.randn(len(kinds), 3001, generator=torch.Generator().manual_seed(4))
    together = sample(logits, sequences)
    assert together == [sample(logits[n : n + 1], sequences[n : n + 1])[0] for n in range(len(kinds))]
    backwards = sample(logits.flip(0), sequences[::-1])
    assert together == backwards[::-1]


def test_greedy_and_random_rows_share_a_batch() -> None:
    greedy = Sequence(0, ValidRequest((1,), sampling=SamplingParams(temperature=0.0)), {}, see, 0.0, 1)
    top_one = Sequence(1, ValidRequest((1,), sampling=SamplingParams(temperature=1.0, top_k=1)), {}, see, 0.0, 2)
    logits = torch.tensor(np.stack([LOGITS, LOGITS[::-1].copy()]), dtype=torch.float32)
    assert sample(logits, [greedy, top_one]) == [0, 7]


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-20, 1e-5, 1e-4, 2.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 1e35])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (2**31 - 1, 5e-324), (1, 1e-300), (3, 0.5)])
def test_every_legal_parameter_gives_a_token_of_the_vocabulary(
    temperature: float, scale: float, top_k: int | None, top_p: float
) -> None:
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    sequence = Sequence(0, ValidRequest((1,), sampling=sampling), {}, see, 0.0, 2**63 - 1)
    (token,) = sample(torch.tensor(LOGITS[::-1].copy(), dtype=torch.float32)[None] * scale, [sequence])
    assert 0 <= token < len(LOGITS)
    if temperature < 1e-4 * scale or top_p < 1e-200:
        assert token == len(LOGITS) - 1


def test_top_p_keeps_the_fewest_tokens_whose_mass_reaches_it() -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.5)
    sequences = [Sequence(0, ValidRequest((1,), sampling=sampling), {}, see, 0.0, seed) for seed in range(200)]
    assert len(set(sample(torch.zeros(200, 4), sequences))) == 2


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_sorts_nothing(top_p: float) -> None:
    """A sort of a whole vocabulary takes longer than the step's other work on it."""
    sampling = SamplingParams(temperature=1.0, top_p=top_p)
    sequences = [Sequence(0, ValidRequest((1,), sampling=sampling), {}, see, 0.0, seed) for seed in range(32)]
    logits = torch.randn(32, 5000, generator=torch.Generator().manual_seed(1))
    with Launches() as launches:
        sample(logits, sequences)
    assert "exp_" in launches.kernels and not launches.kernels.keys() & {"sort", "topk"}


def test_a_temperature_below_the_threshold_is_greedy_also_between_near_equals() -> None:
    sampling = SamplingParams(temperature=9e-6)
    sequences = [Sequence(0, ValidRequest((1,), sampling=sampling), {}, see, 0.0, seed) for seed in range(50)]
    logits = torch.tensor([0.0, 1e-6]).repeat(50, 1)
    assert sample(logits, sequences) == [1] * 50


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_changes_no_other_row(value: float, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, top_p=0.9)
    sequences = [Sequence(0, ValidRequest((1,), sampling=sampling), {}, see, 0.0, seed) for seed in range(9)]
    logits = torch.tensor(LOGITS, dtype=torch.float32).repeat(9, 1)
    alone = sample(logits, sequences)
    logits[4] = value
    got = sample(logits, sequences)
    assert got[:4] + got[5:] == alone[:4] + alone[5:]


def draw(seed: int, num_tokens: int, vocabulary: int = 1000) -> list[int]:
    """One request's tokens where all are equally likely."""
    sequence = Sequence(0, ValidRequest((1,), sampling=SamplingParams(temperature=1.0)), {}, see, 0.0, seed)
    for _ in range(num_tokens):
        sequence.append(sample(torch.zeros(1, vocabulary), [sequence])[0])
    return sequence.token_ids[1:]


def test_every_token_of_a_request_has_a_random_number_of_its_own() -> None:
    drawn = np.array(draw(5, 400))
    assert len(set(drawn.tolist())) > 280  # 330 are expected of 400 draws from 1,000; the same one again would be 1
    counts = np.bincount(drawn // 100, minlength=10)
    assert ((counts - 40) ** 2 / 40).sum() < 33.7  # the 99.99 % quantile at 9 degrees of freedom
    later = np.corrcoef(drawn[:-1], drawn[1:])[0, 1]
    assert abs(later) < 0.25, "a token says nothing of the next"


def test_a_seed_gives_the_same_tokens_again_and_another_seed_gives_others() -> None:
    assert draw(5, 50) == draw(5, 50)
    assert draw(5, 50) != draw(6, 50)
    assert draw(5, 50)[1:] != draw(6, 50)[:-1]
