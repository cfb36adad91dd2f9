"""What the machine's package manager can give where no container registry can be reached: Debian only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

SUITE = "bookworm"  # whose python3 is one that Triton's wheel has a stub for
PLUGIN_SUITE = "trixie"  # the first whose docker-compose is Compose v2; its programs need no more than an older libc
PLUGINS = ("docker-compose", "docker-buildx")
PACKAGES = ("python3", "python3-pip", "ca-certificates")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
LEFT_OUT = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "var/cache/apt",
    "var/lib/apt/lists",
)


def mirror() -> str:
    """Where this machine gets Debian's packages."""
    targets = ["apt-get", "indextargets", "--format", "$(CREATED_BY) $(ORIGIN) $(REPO_URI)"]
    for line in subprocess.run(targets, check=True, capture_output=True, text=True).stdout.splitlines():
        created_by, origin, uri = line.split(maxsplit=2)
        if (created_by, origin) == ("Packages", "Debian") and "security" not in uri:
            return uri.rstrip("/")
    raise RuntimeError("apt knows no Debian mirror; run `apt-get update`")


def install_plugins(folder: Path) -> None:
    """Put Compose v2 and buildx into `folder`, if they are not there. The system's packages stay as they are."""
    missing = [name for name in PLUGINS if not (folder / name).exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    apt = folder.parent / "apt"
    shutil.rmtree(apt, ignore_errors=True)
    for part in ("sources", "lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "sources" / "plugins.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {PLUGIN_SUITE} main\n")
    apt_get = [
        "apt-get", "-qq", "-o", "Dir::Etc::sourcelist=/dev/null", "-o", f"Dir::Etc::sourceparts={apt / 'sources'}",
        "-o", f"Dir::State::lists={apt / 'lists'}", "-o", f"Dir::Cache={apt / 'cache'}",
        "-o", "APT::Sandbox::User=root",
    ]  # fmt: skip
    subprocess.run([*apt_get, "update"], check=True)
    subprocess.run([*apt_get, "download", *missing], check=True, cwd=apt)
    for package in apt.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, apt / "unpacked"], check=True)
    for name in missing:
        shutil.copy(apt / "unpacked/usr/libexec/docker/cli-plugins" / name, folder / name)
    shutil.rmtree(apt)


def bootstrap(root: Path, archive: Path) -> None:
    """A slim Debian with Python as a tar archive, and with this machine's certificates and pip configuration."""
    shutil.rmtree(root, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root), mirror()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    excludes = "".join(f"path-exclude /{folder}/*\n" for folder in LEFT_OUT if folder.startswith("usr"))
    (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(excludes)
    options = pip_options()
    certificates = options.get("cert", "/etc/ssl/certs/ca-certificates.crt")
    shutil.copy(certificates, root / "etc/ssl/certs/ca-certificates.crt")
    options["cert"] = "/etc/ssl/certs/ca-certificates.crt"
    options["find-links"] = "/opt/packages"
    lines = "".join(f"{name} = {value}\n" for name, value in options.items())
    (root / "etc/pip.conf").write_text(f"[global]\n{lines}")

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if member.name.startswith(LEFT_OUT) else member

    with tarfile.open(archive, "w") as tar:
        for entry in root.iterdir():
            tar.add(entry, arcname=entry.name, filter=wanted)
    shutil.rmtree(root)


def wheels(archive: Path) -> None:
    """The folders in which this machine's pip looks for packages, as opt/packages in a tar archive."""
    with tarfile.open(archive, "w") as tar:
        directory = tarfile.TarInfo("opt/packages")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(directory)
        for folder in pip_configured().get("find-links", "").split():
            for wheel in Path(folder).glob("*.whl"):
                tar.add(wheel, arcname=f"opt/packages/{wheel.name}")


def pip_options() -> dict[str, str]:
    """Those of pip's settings that mean the same in a container: what is on this machine's disk is not there."""
    known = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert", "timeout", "default-timeout")
    return {name: value for name, value in pip_configured().items() if name in known and not value.startswith("file:")}


def pip_configured() -> dict[str, str]:
    """`pip config list`: the files' settings, over which those of the environment win."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    pairs = [line.partition("=") for line in listing.splitlines()]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))
    return {name.rpartition(".")[2]: value.strip("'\"") for name, _, value in pairs}
