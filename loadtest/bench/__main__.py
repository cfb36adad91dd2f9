"""python -m loadtest.bench: Crossgate beside its peers on this machine, one table.

    make bench                        # every scenario in float32, bounds beside the ratios
    make bench ARGS='--dtype both'    # and in bfloat16: each at its best
    make bench ARGS=--short           # a minute or two: does it run, are the tokens right
    make bench ARGS=--growth          # tokens/s and memory against users, context and pictures
    make bench ARGS=--figures         # the figures of single parts

Ends with status 1 if in float32 any system's tokens are not those of the reference. `--write` puts the table into
docs/performance.md. `--record FILE` keeps the numbers, so that scenarios measured apart (`--only`) make one table.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from loadtest.bench import measure, systems, table
from loadtest.bench.measure import Result
from loadtest.bench.scenario import SCENARIOS, SHORT, Request, Scenario
from loadtest.bench.worker import Worker
from service.cores import num_cores
from service.launch.settings import ROOT
from tests.reliability.table import write

PAGE, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
CODE = ("service", "model_repo", "loadtest")  # what a measurement depends on
DTYPES = ("float32", "bfloat16")


class WrongTokens(Exception):
    """A system's greedy tokens are not the reference's."""


Start = Callable[[Sequence[str], Path, str, Worker], list[systems.System]]


def main(
    arguments: Sequence[str] | None = None,
    start: Start = systems.start_systems,
    make: Callable[[Path], Path] | None = None,
) -> int:
    """`start` brings the systems up, `make` writes the checkpoint."""
    options = parse(arguments)
    make = make or make_checkpoint
    with tempfile.TemporaryDirectory(prefix="crossgate-bench-") as folder:
        try:
            if options.growth or options.figures:
                name, text = one_part(options, Path(folder))
                text = f"{about()}\n\n{text}"
            elif options.show:
                name, text = "bench", report(options, [])
            else:
                name, text = "bench", compare(options, make(Path(folder)), start)
        except WrongTokens as error:
            print(f"crossgate: {error}", file=sys.stderr)
            return 1
    print(text)
    if options.write:
        write(name, text, PAGE)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench", description=__doc__.partition("\n")[2])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--growth", action="store_true", help="how speed and memory grow, in process")
    part.add_argument("--figures", action="store_true", help="of single parts")
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="float32")
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="scenarios, figures or curves whose name this pattern finds"
    )
    parser.add_argument("--systems", metavar="NAMES", default=",".join(systems.NAMES), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add the results to these, and show them all")
    parser.add_argument("--show", action="store_true", help="measure nothing: the table of what --record holds")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    options.systems = options.systems.split(",")
    if unknown := [name for name in options.systems if name not in systems.NAMES]:
        parser.error(f"no system called {', '.join(unknown)}; there are {', '.join(systems.NAMES)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.show and not (options.record and options.record.exists()):
        parser.error("--show needs the FILE of a --record")
    if options.short and options.write:
        parser.error("a short run is no measurement: --write without --short")
    return options


def compare(options: argparse.Namespace, checkpoint: Path, start: Start) -> str:
    """The table of all systems. Raises WrongTokens."""
    scenarios = chosen(options)
    dtypes = DTYPES if options.dtype == "both" else (options.dtype,)
    results: list[Result] = []
    with contextlib.ExitStack() as running:
        users = Worker("loadtest.bench.client")
        running.callback(users.stop)
        judge = Worker("loadtest.bench.judge", str(checkpoint))
        running.callback(judge.stop)
        for dtype in dtypes:
            check = checker(judge, dtype)
            started = start(options.systems, checkpoint, dtype, users)
            try:
                for scenario in scenarios:
                    found = run_scenario(scenario, started, dtype, 1 if options.short else options.rounds, check)
                    results += found
                    if options.record:
                        measure.save(found, options.record)
            finally:
                systems.stop_systems(started)
    return report(options, results)


def report(options: argparse.Namespace, results: Sequence[Result]) -> str:
    """The table of these results, or of all that were recorded; with `--write` also the plot."""
    if options.record:
        results = in_order(measure.load(options.record))
    if options.write:
        dtypes = [result.dtype for result in results]
        PLOT.write_text(table.chart(results, "float32" if "float32" in dtypes else dtypes[0]))
    where = list(dict.fromkeys(result.about for result in results))
    return "\n\n".join([*where, table.results_table(results, judged=not options.short), table.client_line(results)])


def chosen(options: argparse.Namespace) -> list[Scenario]:
    scenarios = [scenario for scenario in SCENARIOS if re.search(options.only, scenario.name)]
    if options.short:
        scenarios = [scenario.short() for scenario in scenarios if options.only or scenario.name in SHORT]
    if not scenarios:
        raise SystemExit(f"crossgate: no scenario's name has {options.only!r}")
    return scenarios


def run_scenario(
    scenario: Scenario, started: Sequence[systems.System], dtype: str, rounds: int, check: measure.Check
) -> list[Result]:
    from loadtest.bench.checkpoint import IMAGE_TOKEN_ID

    begin_s = time.monotonic()
    found = measure.measure(scenario, started, dtype, rounds, IMAGE_TOKEN_ID, check)
    for result in found:
        result.about = about()
    rates = ", ".join(f"{result.system} {result.rate:,.0f}" for result in found)
    print(f"{scenario.name}, {dtype}: {rates}  [{time.monotonic() - begin_s:.0f} s]", file=sys.stderr, flush=True)
    return found


def checker(judge: Worker, dtype: str) -> measure.Check:
    """Of tokens against the reference. In bfloat16 they may differ: the table says what share agrees."""

    def check(system: str, requests: Sequence[Request], tokens: Sequence[Sequence[int]]) -> float:
        asked = [request.to_json() for request in requests]
        answer = judge.ask(requests=asked, tokens=[list(answer) for answer in tokens])
        if dtype == "float32" and answer["wrong"]:
            raise WrongTokens(f"{system} gives other tokens than the reference; {'; '.join(answer['wrong'])}")
        return float(answer["num_agree"] / answer["num_tokens"])

    return check


def one_part(options: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """(its place in the page, its tables). Torch is loaded here, and nowhere in the comparison's own process."""
    from loadtest.bench import figures, growth

    dtype = "float32" if options.dtype == "both" else options.dtype
    if options.growth:
        plots = PAGE.parent if options.write else None
        checkpoint = make_checkpoint(folder)
        return "growth", growth.report(checkpoint, dtype, only=options.only, short=options.short, plots=plots)
    return "figures", figures.report(folder, dtype, only=options.only, short=options.short)


def make_checkpoint(folder: Path) -> Path:
    from loadtest.bench.checkpoint import benchmark_checkpoint

    return benchmark_checkpoint(folder / "checkpoint")


def in_order(results: Sequence[Result]) -> list[Result]:
    """As the scenarios stand here, however they were measured."""
    places = {scenario.name: place for place, scenario in enumerate(SCENARIOS)}
    return sorted(results, key=lambda result: (places.get(result.scenario, len(places)), DTYPES.index(result.dtype)))


def about() -> str:
    """Machine, commit and date, as they stand over a table."""
    info = Path("/proc/cpuinfo").read_text()
    model = next(line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name"))
    flags = next(line.partition(":")[2].split() for line in info.splitlines() if line.startswith("flags"))
    fast = ", ".join(flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags)
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    commit += " with changes" if git("status", "--porcelain", "--", *CODE) else ""
    return f"{model}, {num_cores()} cores, {fast or 'no bf16'}; commit {commit}, {time.strftime('%d %B %Y')}."


def end(*_: object) -> None:
    """Through every `finally`, undisturbed: `timeout` sends its signal twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def git(*arguments: str) -> str:
    """What it prints; nothing outside a repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    sys.exit(main())
