"""`make mutants`: would the tests notice? Breaks a file in one small way at a time and runs that file's own tests.

    python -m tests.mutants                        every mutant of every file
    python -m tests.mutants --only service/…/x.py  of these files
    python -m tests.mutants --short                a sample, always the same one

Ends with status 1 where fewer than 90 % of a file's mutants are noticed, not counting those that `survivors.toml` names
and explains, or where that list names one that is noticed or is no more.
"""

from __future__ import annotations

import argparse
import difflib
import os
import random
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutants.mutate import Mutant, mutants
from tests.mutants.targets import TARGETS
from tests.mutants.trial import ROOT, Trial, Verdict, import_what_is_slow, run_all

WANTED_SHARE = 0.9
SAMPLE_SIZE, SAMPLE_SEED = 60, 8
SURVIVORS = Path(__file__).with_name("survivors.toml")


@dataclass
class Result:
    """Of one file. `named`: survivors whose names are in the list; `unnamed`: the others."""

    path: str
    num_mutants: int = 0
    named: list[Mutant] = field(default_factory=list)
    unnamed: list[Mutant] = field(default_factory=list)
    noticed: set[str] = field(default_factory=set)  # their names
    all_names: set[str] = field(default_factory=set)  # of the file's mutants, those left out of a sample, too

    @property
    def share(self) -> float:
        """Noticed of those that can be."""
        num_meant = self.num_mutants - len(self.named)
        return len(self.noticed) / num_meant if num_meant else 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TARGETS, metavar="FILE", help="these files' mutants")
    parser.add_argument("--short", action="store_true", help=f"{SAMPLE_SIZE} of them")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="trials at once")
    arguments = parser.parse_args()
    begin = time.monotonic()
    paths = arguments.only or list(TARGETS)
    explained: dict[str, dict[str, str]] = tomllib.loads(SURVIVORS.read_text())
    bred = {path: mutants(path, (ROOT / path).read_text()) for path in paths}
    chosen = [mutant for path in paths for mutant in bred[path]]
    if arguments.short:
        chosen = random.Random(SAMPLE_SEED).sample(chosen, min(SAMPLE_SIZE, len(chosen)))
    import_what_is_slow(test for path in paths for test in TARGETS[path])
    results = []
    for path in paths:
        result = Result(path, all_names={mutant.name for mutant in bred[path]})
        _try([mutant for mutant in chosen if mutant.path == path], result, explained.get(path, {}), arguments.jobs)
        results.append(result)
    stale = list(_stale(results, explained))
    _report(results, stale, time.monotonic() - begin)
    if arguments.short:  # too few of a file for a share of its own
        results = [_together(results)]
    return 1 if stale or any(result.share < WANTED_SHARE for result in results) else 0


def _try(chosen: list[Mutant], result: Result, explained: dict[str, str], num_at_once: int) -> None:
    """Fills in the result of one file. Its tests must pass without any mutant."""
    begin = time.monotonic()
    tests = TARGETS[result.path]
    unbroken = Trial(result.path, tests, (ROOT / result.path).read_text(), timeout_s=300)
    ((_, verdict, took_s),) = run_all([unbroken], num_at_once=1)
    if verdict is not Verdict.SURVIVED:
        sys.exit(f"crossgate: {' '.join(tests)}: {verdict.value} without any mutant")
    by_source = {mutant.source: mutant for mutant in chosen}
    trials = [Trial(result.path, tests, source, timeout_s=3 + 3 * took_s) for source in by_source]
    for trial, verdict, _ in run_all(trials, num_at_once):
        mutant = by_source[trial.source]
        result.num_mutants += 1
        if verdict is Verdict.NOTICED or (verdict is not Verdict.SURVIVED and mutant.name not in explained):
            result.noticed.add(mutant.name)
        elif mutant.name in explained:  # also one that a busy machine did not come to the end of
            result.named.append(mutant)
        else:
            result.unnamed.append(mutant)
            _show(mutant)
    took = f"{time.monotonic() - begin:.0f} s; its tests alone {took_s:.1f} s"
    print(f"{result.path}: {len(result.noticed)} of {result.num_mutants} noticed, {took}", file=sys.stderr, flush=True)


def _show(mutant: Mutant) -> None:
    print(f"Survived, not named: {mutant.path}:{mutant.line}\n  {mutant.name}")
    source = (ROOT / mutant.path).read_text().splitlines()
    for line in difflib.unified_diff(source, mutant.source.splitlines(), n=1, lineterm=""):
        if not line.startswith(("---", "+++", "@@")):
            print(f"    {line}")
    print(flush=True)


def _stale(results: Iterable[Result], explained: dict[str, dict[str, str]]) -> Iterator[str]:
    """What the list of survivors says that is not so."""
    for result in results:
        for name in explained.get(result.path, {}):
            if name in result.noticed:
                yield f"{result.path}: noticed, take it out of the list: {name}"
            elif name not in result.all_names:
                yield f"{result.path}: there is no such mutant: {name}"


def _together(results: Iterable[Result]) -> Result:
    whole = Result("together")
    for result in results:
        whole.num_mutants += result.num_mutants
        whole.named += result.named
        whole.unnamed += result.unnamed
        whole.noticed |= {f"{result.path} {name}" for name in result.noticed}
    return whole


def _report(results: list[Result], stale: list[str], took_s: float) -> None:
    print("| file | mutants | noticed | named | share of the rest |\n|---|---|---|---|---|")
    for result in (*results, _together(results)):
        numbers = f"{result.num_mutants} | {len(result.noticed)} | {len(result.named)} | {result.share:.1%}"
        print(f"| {result.path} | {numbers} |")
    print()
    for line in stale:
        print(f"survivors.toml: {line}")
    print(f"{took_s:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
