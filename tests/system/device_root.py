"""A Debian 12 of its own in a folder, where packages are installed and purged: no machine's state is touched but the folder's.

The bare system is made once by mmdebstrap and kept in ``build/chroot``. Every command runs in a mount namespace of its own, so
that a test that is killed leaves no mount behind.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.architecture.source import ROOT

# What the package depends on, and systemd to have its units judged by.
INCLUDED = "python3,adduser,systemd"
_ENTER = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}


def missing() -> str:
    """What keeps this machine from having such a root; empty when nothing does."""
    if os.geteuid() != 0:
        return "a chroot needs root"
    if shutil.which("mmdebstrap") is None:
        return "mmdebstrap is not installed (on Debian: apt install mmdebstrap)"
    return ""


class DeviceRoot:
    """The system below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        subprocess.run(["tar", "-C", str(folder), "-xf", str(_bare())], check=True, timeout=300)

    def command(self, *arguments: str) -> list[str]:
        """What runs the program inside; the process that is started becomes it, so that its pid is the program's."""
        return ["unshare", "--mount", "sh", "-c", _ENTER, str(self.folder), *arguments]

    def run(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Runs a program inside, as root, to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def do(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """Runs a program inside that must succeed. Returns what it said."""
        ended = self.run(*arguments, timeout_s=timeout_s)
        assert ended.returncode == 0, (arguments, ended.returncode, ended.stdout, ended.stderr)
        return ended.stdout

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Starts a program inside."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(*arguments),
                env={**_ENVIRONMENT, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def files(self) -> set[str]:
        """Every path there is, but what dpkg keeps for itself, logs, and what lasts only until the next boot."""
        own = ("var/lib/dpkg", "var/log", "var/cache", "proc", "run", "tmp")
        found = set()
        for folder, names, files in os.walk(self.folder):
            inside = Path(folder).relative_to(self.folder)
            if inside.as_posix() in own:
                names.clear()
                continue
            found.update((inside / name).as_posix() for name in (*names, *files))
        return found


def _bare() -> Path:
    key = hashlib.sha256(INCLUDED.encode()).hexdigest()[:8]
    kept = ROOT / "build" / "chroot" / f"bookworm-amd64-{key}.tar"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = kept.with_name(f"{os.getpid()}.new.tar")
        command = ["mmdebstrap", "--quiet", "--variant=minbase", "--architectures=amd64", f"--include={INCLUDED}"]
        try:
            subprocess.run([*command, "bookworm", str(made)], check=True, timeout=900)
            made.rename(kept)
        finally:
            made.unlink(missing_ok=True)
    return kept
