"""From logits to tokens, a whole batch at once, each row by its own parameters and its own random numbers.

The n-th token of a request takes one uniform number, BLAKE2b of the request's seed and n, and turns it into a token by
the inverse of the cumulative distribution. So a seed gives the same tokens alone and in any batch, and after a
preemption. (A hash is the counter-based generator that costs a microsecond a row here; numpy's Philox takes 25.)

No vocabulary is sorted where that can be helped. Without top-k any order of the tokens will do: one is drawn of all,
and with top-p drawn again, of the likelier ones alone, until it is one that top-p keeps (rejection sampling, as in
FlashInfer). With a top-k up to NUM_LIKELIEST that many tokens are sorted, with a larger one all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from service.contract import SamplingParams
from service.decoder.sequence import Sequence

Choose = Callable[[Tensor, list[Sequence]], Tensor]

GREEDY_BELOW = 1e-5  # a temperature at which nothing but the likeliest token has a chance; division by less overflows
NUM_LIKELIEST = 256
GROUP = 16  # tokens whose mass is summed, or whose likeliest is found, before any is looked at by itself


def sample(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """The next token of each sequence from fp32 logits [B, V]: temperature, then top-k, then top-p, as in vLLM.

    A row that is not finite gets some token and changes no other row.
    """
    tokens = [0] * len(sequences)
    rows_of: dict[Choose, list[int]] = {}
    for row, sequence in enumerate(sequences):
        rows_of.setdefault(_chooser(sequence.sampling, logits.shape[1]), []).append(row)
    for choose, rows in rows_of.items():
        of_rows = logits if len(rows) == len(sequences) else logits[rows]
        for row, token in zip(rows, choose(of_rows, [sequences[row] for row in rows]).tolist(), strict=True):
            tokens[row] = token
    return tokens


def _chooser(sampling: SamplingParams, num_logits: int) -> Choose:
    if sampling.temperature < GREEDY_BELOW or sampling.top_p * num_logits <= 1:  # the likeliest alone has that share
        return _greedy
    if (top_k := sampling.top_k or num_logits) < num_logits:
        return _from_likeliest if top_k <= NUM_LIKELIEST else _from_sorted
    return _from_nucleus if sampling.top_p < 1.0 else _from_all


def _greedy(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    return logits.argmax(dim=-1)


def _scaled(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] -> fp32 [B, V padded to whole groups] by temperature, 0 at most: no exponential overflows."""
    temperature = logits.new_tensor([s.sampling.temperature for s in sequences])
    scaled: Tensor = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature[:, None])
    padding = -logits.shape[1] % GROUP
    return F.pad(scaled, (0, padding), value=-torch.inf) if padding else scaled


def _from_all(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] -> int64 [B]."""
    return _draw(_scaled(logits, sequences).exp_(), _uniform(sequences, logits.device))


def _from_nucleus(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] -> int64 [B], by top-p, which keeps a token if all likelier ones together have less than its share.

    One that it does not keep says so of all that are no likelier. On average that leaves half of the mass.
    """
    device, attempt = logits.device, 0
    mass = _scaled(logits, sequences).exp_()
    limit = _top_p(sequences, device) * _sum(mass)
    tokens = torch.zeros(len(sequences), dtype=torch.int64, device=device)
    rows, order = torch.arange(len(sequences), device=device), torch.arange(mass.shape[1], device=device)
    while len(rows):
        drawn = _draw(mass, _uniform([sequences[row] for row in rows.tolist()], device, attempt))[:, None]
        tokens[rows] = drawn.squeeze(1)
        own = mass.gather(1, drawn)
        mass.masked_fill_((mass < own) | ((mass == own) & (order >= drawn)), 0.0)  # leaves those that are likelier
        refused = (_sum(mass) >= limit).nonzero().squeeze(1)  # none that is not finite
        rows, mass, limit = rows[refused], mass[refused], limit[refused]
        attempt += 1
    return tokens


def _draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """Fp32 [B, whole groups] and [B] -> int64 [B]: a group of tokens by its mass, then one of the group."""
    groups: Tensor = mass.unflatten(1, (GROUP, -1))  # (B, GROUP, groups): a group's tokens lie apart, which sums fast
    group, uniform = _invert(groups.sum(dim=1).double(), uniform)
    members = groups[torch.arange(len(group), device=group.device), :, group]  # (B, GROUP)
    member, _ = _invert(members.double(), uniform)
    return member * groups.shape[2] + group


def _sum(mass: Tensor) -> Tensor:
    """Fp32 [B, whole groups] -> fp64 [B]. Groups first: long rows alone would be summed in another order than many."""
    total: Tensor = mass.unflatten(1, (GROUP, -1)).sum(dim=1).double().sum(dim=-1)
    return total


def _from_likeliest(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] -> int64 [B], by a top-k up to NUM_LIKELIEST, then top-p."""
    return _from_ordered(*_likeliest(_scaled(logits, sequences)), sequences)


def _from_sorted(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] -> int64 [B], by any top-k, then top-p."""
    return _from_ordered(*_scaled(logits, sequences).sort(dim=-1, descending=True, stable=True), sequences)


def _likeliest(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """The NUM_LIKELIEST largest of each row [B, V], in order, and their tokens. They are in as many groups at most."""
    groups = scaled.unflatten(1, (GROUP, -1))  # (B, GROUP, groups)
    num_groups = groups.shape[2]
    best = groups.amax(dim=1).topk(min(NUM_LIKELIEST, num_groups), sorted=False).indices  # (B, n)
    members = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1)  # (B, GROUP * n)
    ordered, where = members.topk(min(NUM_LIKELIEST, members.shape[1]))
    return ordered, where // best.shape[1] * num_groups + best.gather(1, where % best.shape[1])


def _from_ordered(scaled: Tensor, token_ids: Tensor, sequences: list[Sequence]) -> Tensor:
    """Of the likeliest n tokens, at least as many as top-k keeps, in order: fp32 [B, n], int64 [B, n] -> int64 [B]."""
    ranks = torch.arange(scaled.shape[1], device=scaled.device)
    top_k = torch.tensor([s.sampling.top_k or 0 for s in sequences], device=scaled.device)
    mass = scaled.double().exp().masked_fill_(ranks >= top_k[:, None], 0.0)
    before = mass.cumsum(dim=-1) - mass  # the mass of likelier tokens
    limit = _top_p(sequences, scaled.device) * mass.sum(dim=-1)
    mass = mass.masked_fill(before >= limit[:, None], 0.0)  # keeps the likeliest at least
    rank, _ = _invert(mass, _uniform(sequences, scaled.device))
    return token_ids.gather(1, rank[:, None]).squeeze(1)


def _invert(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Fp64 [B, n], of any sum, and [B] -> where the cumulative mass passes that share of it, and how far into that one.

    The second is as uniform as the first was, and independent of the choice.
    """
    cumulative = mass.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    ranks = torch.arange(mass.shape[1], device=mass.device)
    last = torch.where(mass > 0, ranks, 0).amax(dim=-1, keepdim=True)  # rounding must not choose what has no mass
    chosen = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
    share = mass.gather(1, chosen)
    rest = (target - cumulative.gather(1, chosen) + share) / share
    return chosen.squeeze(1), rest.squeeze(1).clamp(0.0, 1.0)


def _top_p(sequences: list[Sequence], device: torch.device) -> Tensor:
    """Fp64 [B]."""
    return torch.tensor([s.sampling.top_p for s in sequences], dtype=torch.float64, device=device)


def _uniform(sequences: list[Sequence], device: torch.device, attempt: int = 0) -> Tensor:
    """Fp64 [B] in [0, 1): the number of each request's seed for its next token, another for each attempt at it."""
    numbers = [s.seed.to_bytes(8, "little") + s.num_generated.to_bytes(8, "little") for s in sequences]
    salt = attempt.to_bytes(8, "little")
    digests = [hashlib.blake2b(number, digest_size=8, salt=salt).digest() for number in numbers]
    integers = [int.from_bytes(digest, "little") >> 11 for digest in digests]
    return torch.tensor(integers, dtype=torch.float64, device=device) * 2.0**-53
