"""What another user may put under the name of a folder of ours, in a place that belongs to everybody."""

from __future__ import annotations

import os
from pathlib import Path

WAYS = ("link", "open", *(("foreign",) if os.geteuid() == 0 else ()))
"""``open``: a folder of ours that others have rights to; ``foreign``: another user's, which root alone can make here."""


def take(name: Path, way: str) -> Path:
    """Puts it there. Returns the folder that the name leads to."""
    folder = name.with_name(f"of-another-{name.name}") if way == "link" else name
    folder.mkdir(mode=0o700)
    if way == "link":
        name.symlink_to(folder)
    elif way == "open":
        folder.chmod(0o777)
    else:
        os.chown(folder, 1234, 1234)
    return folder
