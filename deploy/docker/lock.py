"""Writes requirements-*.txt, what the images install: pyproject.toml's pins and everything these need, pinned too.

Run it after a change of pyproject.toml:  python deploy/docker/lock.py
torch's own CUDA packages are left out: torch pins them itself, and an image for CPU has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent / "pyproject.toml"
# tokenizers declares a hub's client, and so all it needs; it imports that only to download, which we never do.
HUB = {"filelock", "fsspec", "hf-xet", "httpcore2", "httpx2", "huggingface_hub", "pyyaml", "tqdm", "truststore"}
EXTRAS = {"gateway": ["gateway", "otel"], "triton": ["stages"], "demo": ["stages", "demo"]}


def direct_pins(extras: list[str]) -> list[str]:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    pins = [*project["dependencies"], *(pin for extra in extras for pin in project["optional-dependencies"][extra])]
    if extras == EXTRAS["demo"]:  # the demo's tokenizer is written with the package that the gateway reads it with
        pins += [pin for pin in project["optional-dependencies"]["gateway"] if pin.startswith("tokenizers==")]
    return pins


def resolve(pins: list[str]) -> list[str]:
    """`name==version` of everything that pip would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = json.loads(subprocess.run([*command, *pins], check=True, stdout=subprocess.PIPE).stdout)
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    return [
        f"{name}=={version.partition('+')[0]}"
        for name, version in sorted(found.items())
        if not name.startswith(("cuda-", "nvidia-")) and name != "triton"
    ]


def main() -> None:
    for image, extras in EXTRAS.items():
        pins = resolve(direct_pins(extras))
        if image == "gateway":
            pins = [pin for pin in pins if pin.partition("==")[0] not in HUB]
        lines = ["# Written by deploy/docker/lock.py from pyproject.toml.", *pins]
        (HERE / f"requirements-{image}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
