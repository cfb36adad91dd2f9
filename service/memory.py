"""How much of the host's memory this process may use: what is there, within its container's limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")


def free_host_bytes(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP, meminfo: Path = MEMINFO) -> int:
    """What the host can give, but no more than what is left of each limit. Never below 0."""
    host = _available(meminfo)
    return max(0, min([host, *(limit - held for limit, held in _limits(cgroups, membership))]))


def _available(meminfo: Path) -> int:
    """The page cache included, which the kernel takes back: a host that has read much has little that is unused."""
    lines = meminfo.read_text(encoding="ascii").splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kibibytes) << 10


def _limits(cgroups: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes held that the kernel cannot take back) of this process's cgroup and of those above it.

    In a container the file system's root is most often its own cgroup, and the path in `membership` is not there.
    """
    for root, path, limit_file, usage_file, prefix in _memberships(cgroups, membership):
        for folder in (root / path, *(root / above for above in Path(path).parents)):
            try:
                limit = int((folder / limit_file).read_text(encoding="ascii"))
                usage = int((folder / usage_file).read_text(encoding="ascii"))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                reclaimable = int(stat[f"{prefix}active_file"]) + int(stat[f"{prefix}inactive_file"])  # the page cache
            except (OSError, ValueError, KeyError):  # no such folder, or no limit: "max"
                continue
            yield limit, usage - reclaimable


def _memberships(cgroups: Path, membership: Path) -> Iterator[tuple[Path, str, str, str, str]]:
    """(hierarchy, path in it, names of the files of limit and usage, prefix of counts with those below)"""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        path = path.lstrip("/")
        if not controllers:
            yield cgroups, path, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            yield cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
