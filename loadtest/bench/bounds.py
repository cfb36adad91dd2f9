"""What the service has to reach, in one place, and whether it does.

`float32`: both sides compute in it. `best`: each side in the dtype in which it is faster.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """`scenario` None: all of them. The service's tokens/s are at least so many times those of `over`."""

    over: str
    scenario: str | None
    float32: float
    best: float

    def least(self, dtype: str) -> float | None:
        return {"float32": self.float32, "best": self.best}.get(dtype)


BOUNDS = (
    Bound("fastapi", "1 user, text", 1.5, 2.0),
    Bound("fastapi", "1 user, 1 picture", 1.5, 2.0),
    Bound("fastapi", "8 users, 1 picture", 6.0, 8.0),
    Bound("fastapi", "8 users, 4 pictures", 4.0, 6.0),
    Bound("fastapi", "8 users, 4 pictures, repeated", 10.0, 12.0),
    Bound("fastapi", "16 users, 1 picture, ragged", 8.0, 10.0),
    Bound("litserve", "8 users, 1 picture", 1.4, 1.8),
    Bound("litserve", "8 users, 4 pictures", 2.0, 3.0),
    Bound("litserve", "8 users, 4 pictures, repeated", 5.0, 6.0),
    Bound("litserve", "16 users, 1 picture, ragged", 3.0, 4.0),
    Bound("engine", None, 0.8, 0.8),
)


def least(over: str, scenario: str, dtype: str) -> float | None:
    """The bound of a ratio, or None if there is none."""
    found = [bound for bound in BOUNDS if bound.over == over and bound.scenario in (None, scenario)]
    return found[0].least(dtype) if found else None


def verdict(ratio: float, bound: float | None, *, at_most: bool = False) -> str:
    """A table's cell: the ratio, its bound, and whether it holds. `at_most`: less is better."""
    if bound is None:
        return f"{ratio:.2f}"
    met = ratio <= bound if at_most else ratio >= bound
    return f"{ratio:.2f} ({'≤' if at_most else '≥'} {bound:g}: {'met' if met else '**not met**'})"
