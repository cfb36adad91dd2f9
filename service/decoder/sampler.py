"""From logits to tokens, a whole batch at once, each row by its own parameters and its own random numbers.

The n-th token of a request takes one uniform number, BLAKE2b of the request's seed and n, and turns it into a token by
the inverse of the cumulative distribution. So a seed gives the same tokens alone and in any batch, and after a
preemption. (A hash is the counter-based generator that costs a microsecond a row here; numpy's Philox takes 25.)

No vocabulary is sorted where that can be helped. Without top-k and top-p any order of the tokens will do. With them
the likeliest NUM_LIKELIEST nearly always hold all that may be chosen; a row of which that is not so is sorted.
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
    if sampling.temperature < GREEDY_BELOW:
        return _greedy
    if sampling.top_p < 1.0 or (sampling.top_k or num_logits) < num_logits:
        return _from_likeliest
    return _from_all


def _greedy(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    return logits.argmax(dim=-1)


def _scaled(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] -> fp32 [B, V padded to whole groups] by temperature, 0 at most: no exponential overflows."""
    temperature = logits.new_tensor([s.sampling.temperature for s in sequences])
    scaled: Tensor = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature[:, None])
    padding = -logits.shape[1] % GROUP
    return F.pad(scaled, (0, padding), value=-torch.inf) if padding else scaled


def _from_all(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] -> int64 [B]: a group of tokens by its mass, then one of the group."""
    mass = _scaled(logits, sequences).exp_()
    groups: Tensor = mass.unflatten(1, (GROUP, -1))  # (B, GROUP, groups): a group's tokens lie apart, which sums fast
    group, uniform = _invert(groups.sum(dim=1).double(), _uniform(sequences, logits.device))
    members = groups[torch.arange(len(group), device=group.device), :, group]  # (B, GROUP)
    member, _ = _invert(members.double(), uniform)
    return member * groups.shape[2] + group


def _from_likeliest(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] -> int64 [B], by top-k, then top-p."""
    scaled = _scaled(logits, sequences)
    device, num_logits = logits.device, scaled.shape[1]
    top_k = torch.tensor([min(s.sampling.top_k or num_logits, num_logits) for s in sequences], device=device)
    top_p = torch.tensor([s.sampling.top_p for s in sequences], dtype=torch.float64, device=device)
    uniform = _uniform(sequences, device)
    ordered, token_ids = _likeliest(scaled)
    mass = ordered.double().exp()
    total = scaled.exp_().sum(dim=-1).double()
    suffices = (top_k <= mass.shape[1]) | ((top_k == num_logits) & (mass.sum(dim=-1) > top_p * total))
    tokens = _from_ordered(mass, token_ids, total, top_k, top_p, uniform)
    rest = (~suffices).nonzero().squeeze(1)
    if len(rest):
        scaled = _scaled(logits[rest], [sequences[row] for row in rest.tolist()])
        ordered, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
        mass = ordered.double().exp()
        tokens[rest] = _from_ordered(mass, token_ids, total[rest], top_k[rest], top_p[rest], uniform[rest])
    return tokens


def _likeliest(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """The NUM_LIKELIEST largest of each row [B, V], in order, and their tokens. They are in as many groups at most."""
    groups = scaled.unflatten(1, (GROUP, -1))  # (B, GROUP, groups)
    num_groups = groups.shape[2]
    best = groups.amax(dim=1).topk(min(NUM_LIKELIEST, num_groups), sorted=False).indices  # (B, n)
    members = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1)  # (B, GROUP * n)
    ordered, where = members.topk(min(NUM_LIKELIEST, members.shape[1]))
    return ordered, where // best.shape[1] * num_groups + best.gather(1, where % best.shape[1])


def _from_ordered(
    mass: Tensor, token_ids: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor
) -> Tensor:
    """The mass, fp64 [B, n], of the likeliest n tokens [B, n], in order, and of all [B] -> int64 [B]."""
    num_ordered = mass.shape[1]
    mass = mass.masked_fill(torch.arange(num_ordered, device=mass.device) >= top_k[:, None], 0.0)
    total = torch.where(top_k <= num_ordered, mass.sum(dim=-1), total)
    before = (mass.cumsum(dim=-1) - mass) / total[:, None]  # the share of likelier tokens
    mass = mass.masked_fill(before >= top_p[:, None], 0.0)  # keeps the likeliest at least
    rank, _ = _invert(mass, uniform)
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


def _uniform(sequences: list[Sequence], device: torch.device) -> Tensor:
    """Fp64 [B] in [0, 1): the number of each request's seed for its next token."""
    numbers = [s.seed.to_bytes(8, "little") + s.num_generated.to_bytes(8, "little") for s in sequences]
    digests = [int.from_bytes(hashlib.blake2b(number, digest_size=8).digest(), "little") for number in numbers]
    return torch.tensor([digest >> 11 for digest in digests], dtype=torch.float64, device=device) * 2.0**-53
