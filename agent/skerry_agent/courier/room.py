"""Whether the disk takes what is to come, asked before the first byte of it does."""

from __future__ import annotations

import os
from pathlib import Path

_OTHER_FILES = 8
"""Names that a fetch takes beside the files: folders, the manifest, validators."""


def lack(folder: Path, *, files: int, size_bytes: int, reserve_bytes: int, reserve_files: int) -> str:
    """What is missing for so many more files of so many bytes in all; empty when they fit and leave the reserve.

    A file system that does not say how many files it can name (FAT, btrfs) is not asked for them.
    """
    if not files:
        return ""
    disk = os.statvfs(folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    # Each file ends in a block of its own.
    wanted_bytes = size_bytes + files * disk.f_frsize
    if free_bytes - reserve_bytes < wanted_bytes:
        return (
            f"{folder}: {wanted_bytes / 1e6:.1f} MB are to come, {free_bytes / 1e6:.1f} MB are free, "
            f"{reserve_bytes / 1e6:.1f} MB of them are kept for others"
        )
    if disk.f_files and disk.f_favail - reserve_files < files + _OTHER_FILES:
        return (
            f"{folder}: {files + _OTHER_FILES} more files are to come, the disk has names for {disk.f_favail}, "
            f"{reserve_files} of them are kept for others"
        )
    return ""
