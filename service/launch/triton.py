"""How to start the tritonserver of the PyPI wheel `nvidia-pytriton`, unpacked in .triton.

The wheel keeps a stub (the process that runs model.py) for every Python apart from the backend that looks for it
beside itself, so a private tree of links puts the two together. Three things about this stub are not in Triton's docs:

- It starts an isolated interpreter: PYTHONPATH and PYTHONHOME mean nothing to it. It finds a virtual environment as a
  `python3` would: the first one in PATH, through its pyvenv.cfg. The working directory is on its sys.path.
- It needs libpython as a shared library. Where several are installed, LD_LIBRARY_PATH has to name this Python's.
- It reads NumPy 2 arrays wrongly (each element the first) and dies of BYTES tensors; the adapters use DLPack.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.errors import Unavailable
from service.launch.settings import CACHE, ROOT

WHEEL = ROOT / ".triton"
SERVER = WHEEL / "pytriton" / "tritonserver"
SHM_PREFIX = "crossgate"
EXIT_TIMEOUT_S = 5
LOAD_TIMEOUT_S = 600  # of a model: gigabytes of weights from a slow disk
# How often OpenMP's threads look for the next parallel region before they sleep: they stay awake from layer to layer,
# and leave the cores to the other stage between steps. Without looking each layer would wait for threads to wake.
SPIN_COUNT = 20_000


@dataclass(frozen=True)
class TritonPorts:
    grpc: int
    http: int
    metrics: int


def triton_command(ports: TritonPorts, backends: Path) -> list[str]:
    flags = {
        "model-repository": ROOT / "model_repo",
        "backend-directory": backends,
        "exit-timeout-secs": EXIT_TIMEOUT_S,
        "log-info": "false",
        "log-warning": "false",
        "allow-cpu-metrics": "false",
        "http-thread-count": 2,
        "http-address": "127.0.0.1",
        "http-port": ports.http,
        "grpc-address": "127.0.0.1",
        "grpc-port": ports.grpc,
        "grpc-http2-max-ping-strikes": 0,  # gateways ask every few seconds whether the connection still stands
        "metrics-address": "127.0.0.1",
        "metrics-port": ports.metrics,
    }
    python = {
        "shm-region-prefix-name": f"{SHM_PREFIX}-{os.getpid()}-",
        "stub-timeout-seconds": LOAD_TIMEOUT_S,
    }
    return [
        str(SERVER / "bin" / "tritonserver"),
        *(f"--{name}={value}" for name, value in flags.items()),
        *(f"--backend-config=python,{name}={value}" for name, value in python.items()),
    ]


def triton_environment(
    model_path: Path, device: str, num_threads: int, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of tritonserver and of its stubs, which inherit it."""
    libraries = [str(WHEEL / "nvidia_pytriton.libs"), *_libpython_folder(), environment.get("LD_LIBRARY_PATH", "")]
    return {
        "GOMP_SPINCOUNT": str(SPIN_COUNT),
        **environment,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{environment.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        "PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}",  # for a stub that is not isolated
        "MODEL_PATH": str(model_path),
        "DEVICE": device,
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # the two stages share the cores: a waiting thread must not spin for long
    }


def link_backends(environment: Mapping[str, str]) -> Path:
    """The private tree for --backend-directory. Raises Unavailable, in one line, if this Python cannot be served."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = SERVER / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not SERVER.is_dir():
        raise Unavailable("Triton is not installed in .triton: run `make install`.")
    if not stub.is_file():
        known = sorted(path.name for path in (SERVER / "python_backend_stubs").iterdir())
        raise Unavailable(f"Triton's wheel has no stub for Python {version}, only for {', '.join(known)}.")
    _check_libraries(stub, environment)
    backends = CACHE / "triton" / version / "backends"
    (backends / "python").mkdir(parents=True, exist_ok=True)
    for file in [stub, *(SERVER / "backends" / "python").iterdir()]:
        link = backends / "python" / file.name
        if not link.is_symlink() or link.readlink() != file:
            link.unlink(missing_ok=True)
            link.symlink_to(file)
    return backends


def remove_stale_shared_memory() -> None:
    """Free what a launcher that was killed has left in /dev/shm; regions carry their launcher's pid."""
    for region in Path("/dev/shm").glob(f"{SHM_PREFIX}-*"):
        pid = region.name.split("-")[1]
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():
            region.unlink(missing_ok=True)


def stub_pids(server_pid: int) -> list[int]:
    """The model processes: children of tritonserver."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(after_name[1]) == server_pid and after_name[0] != "Z":
            pids.append(int(stat.parent.name))
    return pids


def _libpython_folder() -> list[str]:
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    return [str(folder)] if (folder / str(sysconfig.get_config_var("INSTSONAME"))).is_file() else []


def _check_libraries(stub: Path, environment: Mapping[str, str]) -> None:
    listing = subprocess.run(["ldd", str(stub)], env=dict(environment), capture_output=True, text=True, check=False)
    missing = [line.split()[0] for line in listing.stdout.splitlines() if line.endswith("not found")]
    if missing:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Unavailable(
            f"Triton's Python stub lacks {', '.join(missing)}. For libpython: install this Python's shared library "
            f"(on Debian or Ubuntu `apt install libpython{version}`)."
        )
