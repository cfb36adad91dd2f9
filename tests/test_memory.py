from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.memory import free_host_bytes

MB = 1 << 20


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return _write(tmp_path / "membership", "0::/pods/one\n")


def test_a_cgroups_limit_counts_with_what_it_holds(tmp_path: Path, membership: Path) -> None:
    _cgroup(tmp_path / "pods" / "one", limit="64M", current=40, active_file=10, inactive_file=20)
    assert free_host_bytes(tmp_path, membership) == (64 - (40 - 30)) * MB  # the page cache can be taken back


def test_the_lowest_limit_on_the_way_up_counts(tmp_path: Path, membership: Path) -> None:
    _cgroup(tmp_path / "pods" / "one", limit="64M", current=8)
    _cgroup(tmp_path / "pods", limit="32M", current=30)
    _cgroup(tmp_path, limit="max", current=100)
    assert free_host_bytes(tmp_path, membership) == 2 * MB


def test_a_container_that_sees_its_own_cgroup_as_the_root_is_limited(tmp_path: Path) -> None:
    _cgroup(tmp_path, limit="16M", current=4)
    for path in ("/", "/not/to/be/seen/here", "/../other"):
        assert free_host_bytes(tmp_path, _write(tmp_path / "membership", f"0::{path}\n")) == 12 * MB


def test_the_first_version_of_cgroups_counts_too(tmp_path: Path) -> None:
    folder = tmp_path / "memory" / "docker" / "one"
    _write(folder / "memory.limit_in_bytes", str(64 * MB))
    _write(folder / "memory.usage_in_bytes", str(20 * MB))
    _write(folder / "memory.stat", f"active_file 0\ninactive_file 0\ntotal_active_file {4 * MB}\ntotal_inactive_file 0")
    membership = _write(tmp_path / "membership", "12:cpu,cpuacct:/other\n9:memory:/docker/one\n0::/\n")
    assert free_host_bytes(tmp_path, membership) == 48 * MB


@pytest.mark.parametrize("limit", ["max", str(1 << 62)])
def test_without_a_limit_the_hosts_memory_counts(tmp_path: Path, membership: Path, limit: str) -> None:
    _cgroup(tmp_path / "pods" / "one", limit=limit, current=1)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host / 1000 < free_host_bytes(tmp_path, membership) <= host


def test_what_the_host_has_read_into_its_cache_is_free(tmp_path: Path, membership: Path) -> None:
    meminfo = _write(tmp_path / "meminfo", "MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable:   640 kB\nCached: 650 kB\n")
    assert free_host_bytes(tmp_path, membership, meminfo) == 640 << 10


def test_a_cgroup_that_is_full_leaves_nothing(tmp_path: Path, membership: Path) -> None:
    _cgroup(tmp_path / "pods" / "one", limit="8M", current=9)
    assert free_host_bytes(tmp_path, membership) == 0


def _cgroup(folder: Path, limit: str, current: int, active_file: int = 0, inactive_file: int = 0) -> None:
    """Megabytes."""
    _write(folder / "memory.max", str(int(limit[:-1]) * MB) if limit.endswith("M") else limit)
    _write(folder / "memory.current", f"{current * MB}\n")
    stat = f"anon 1\nfile 7\nactive_file {active_file * MB}\ninactive_file {inactive_file * MB}\n"
    _write(folder / "memory.stat", stat)


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
