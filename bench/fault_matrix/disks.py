"""Disks that are full or slow.

A full disk is a small file system in memory (tmpfs, needs root) on which a part's files lie and
which is filled to its last page: the kernel itself refuses to write. A slow disk is a library in
front of the C library's sync and rename (needs gcc), which takes its time where it is told to.
"""

import errno
import os
import shutil
import subprocess
from pathlib import Path

SIZE_MIB = 128
SYNC_MS = 1500
_BALLAST = ".ballast"


class SmallDisk:
    """A file system of its own, mounted over a folder whose files are moved onto it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        aside = folder.with_name(f"{folder.name}.aside")
        folder.rename(aside)
        folder.mkdir(mode=0o700)
        options = f"size={SIZE_MIB}m,mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        shutil.rmtree(aside)

    def fill(self) -> None:
        """Leave no page free."""
        with (self._folder / _BALLAST).open("ab", buffering=0) as ballast:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        ballast.write(bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Give back what `fill` took."""
        (self._folder / _BALLAST).unlink(missing_ok=True)

    def unmount(self) -> None:
        """Take the file system away, even if a process is still about to close its files."""
        subprocess.run(["umount", "--lazy", self._folder], check=False)


class SlowDisk:
    """Slow syncs and renames of processes that run in `environment`.

    Args:
        folder: for the library and for its orders.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "slow_disk.so"
        source = Path(__file__).with_name("slow_disk.c")
        command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True)
        self._order = folder / "slow"
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAULTS_FOLDER": str(folder),
            "FAULTS_DELAY_MS": str(SYNC_MS),
        }

    def begin(self, who: str) -> None:
        """Slow one down from now on: "redis", or a process id."""
        self._order.write_text(who)

    def end(self) -> None:
        """Let all be as fast as they are."""
        self._order.unlink(missing_ok=True)


def why_no_disks() -> str:
    """Why this machine cannot play bad disks; empty where it can."""
    if os.geteuid() != 0:
        return "full disks need root, to mount a small one"
    return "" if shutil.which("gcc") else "slow disks need gcc"
