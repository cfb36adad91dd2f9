"""One run of a file's own tests, in a process of its own, with the file as it is or as a mutant has it.

Such a process is forked from one that has imported what is slow to import, so that a trial takes about as long as its
tests. The mutant is in the fork's memory only; no file is touched.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

import hypothesis
import pytest

ROOT = Path(__file__).parents[2]
MORE_MEMORY_BYTES = 4 << 30  # a mutant that never stops appending ends here
POLL_S = 0.005
PLUGINS = ("pytest_asyncio.plugin", "pytest_timeout", "_hypothesis_pytestplugin")  # others take a second to load
OPTIONS = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", "--assert=plain", "--rootdir", str(ROOT))


class Verdict(Enum):
    SURVIVED = "survived"
    NOTICED = "noticed"
    TIMED_OUT = "timed out"
    NO_TESTS = "no tests"


@dataclass(frozen=True)
class Trial:
    """`source`: what stands in for the file at `path`."""

    path: str
    tests: tuple[str, ...]
    source: str
    timeout_s: float


def import_what_is_slow(tests: Iterable[str]) -> None:
    """Import what the tests import, and forget what is ours: each trial has that anew."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    hypothesis.settings.register_profile(
        "mutants",
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # no shrinking: that it fails is enough
    )
    hypothesis.settings.load_profile("mutants")
    sys.path.insert(0, str(ROOT))
    files = dict.fromkeys(("tests/conftest.py", "tests/gateway/conftest.py", *tests))
    for name in (*PLUGINS, *(path.removesuffix(".py").replace("/", ".") for path in files)):
        importlib.import_module(name)
    for name in list(sys.modules):
        ours = name.split(".")[0] in ("service", "tests")
        if ours and name != "tests" and not name.startswith("tests.mutants"):
            del sys.modules[name]
    gc.collect()
    gc.freeze()  # a fork need not look through it


def run_all(trials: Iterable[Trial], num_at_once: int) -> Iterator[tuple[Trial, Verdict, float]]:
    """Each with how it ended and its seconds, in the order in which they end."""
    under_way: dict[int, tuple[Trial, float]] = {}
    coming = iter(trials)
    while True:
        while len(under_way) < num_at_once and (trial := next(coming, None)) is not None:
            under_way[_start(trial)] = trial, time.monotonic()
        if not under_way:
            return
        time.sleep(POLL_S)
        for pid, (trial, start) in list(under_way.items()):
            took_s = time.monotonic() - start
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                verdict = _verdict(os.waitstatus_to_exitcode(status))
            elif took_s > trial.timeout_s:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                verdict = Verdict.TIMED_OUT
            else:
                continue
            del under_way[pid]
            yield trial, verdict, took_s


def _verdict(code: int) -> Verdict:
    if code == pytest.ExitCode.OK:
        return Verdict.SURVIVED
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        return Verdict.NO_TESTS
    return Verdict.NOTICED


def _start(trial: Trial) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    with contextlib.suppress(BaseException):
        code = _in_the_fork(trial)
    os._exit(code)


def _in_the_fork(trial: Trial) -> int:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY_BYTES, resource.RLIM_INFINITY))
    quiet = os.open(os.environ.get("MUTANTS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(ROOT)
    name = trial.path.removesuffix(".py").replace("/", ".")
    sys.meta_path.insert(0, _Instead(name, ROOT / trial.path, trial.source))
    plugins = [option for name in PLUGINS for option in ("-p", name)]
    return int(pytest.main([*OPTIONS, *plugins, *trial.tests], plugins=[_ExamplesFirst()]))


class _ExamplesFirst:
    """Most mutants fail on an example; hundreds of random ones are for those that do not."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: hasattr(getattr(item, "obj", None), "hypothesis"))


class _Instead(MetaPathFinder):
    """Finds one module, with another source than its file's."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self._name, self._path, self._source = name, path, source

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        return spec_from_file_location(fullname, self._path, loader=_Loader(fullname, str(self._path), self._source))


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec")
