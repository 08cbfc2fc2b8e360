"""Applications with a model of their own: whether they can come, and who is there."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from skerry_agent.doctor.finding import Finding, Patient

_CHECK = "applications"


def check_applications(patient: Patient) -> Iterator[Finding]:
    """Whether the socket is there for everybody whom the configuration names."""
    apps = patient.config.apps
    if not apps.clients:
        yield Finding(check=_CHECK, verdict="ok", detail="no socket is wanted: apps.clients is 0")
        return
    path = Path(apps.socket) if apps.socket else patient.config.run_dir / "apps.sock"
    unknown = [user for user in apps.users if not _known(user)]
    if unknown:
        yield Finding(
            check=_CHECK, verdict="fail", detail=f"apps.users: no such user: {', '.join(unknown)}",
            advice="make the user, or correct the name; then skerry-agent reload",
        )  # fmt: skip
    if apps.users and not apps.socket:
        yield Finding(
            check=_CHECK, verdict="fail",
            detail=f"apps.users names {', '.join(apps.users)}, and {path} is in a folder of the agent's user alone",
            advice="set apps.socket to a place that they reach, /run/skerry-agent/apps.sock say, and restart the agent",
        )  # fmt: skip
    elif apps.users and not int(apps.socket_mode, 8) & 0o066:
        yield Finding(
            check=_CHECK, verdict="fail", detail=f"apps.socket_mode {apps.socket_mode} keeps out whom apps.users lets in",
            advice="0660 for the agent's group, 0666 for everybody: the kernel still says who it is",
        )  # fmt: skip
    if patient.status is None:
        return
    try:
        there = stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        there = False
    if not there:
        yield Finding(
            check=_CHECK, verdict="fail", detail=f"the agent runs and {path} is not there",
            advice="restart the agent: somebody removed the socket, or apps.socket was changed",
        )  # fmt: skip
        return
    connected = patient.status.get("applications", {}).get("connected", [])
    said = ", ".join(f"pid {one['pid']} (user {one['uid']})" for one in connected)
    full = len(connected) >= apps.clients
    yield Finding(
        check=_CHECK, verdict="warn" if full else "ok", detail=f"{path}; connected: {said or 'nobody'}",
        advice=f"no more can come: raise apps.clients, now {apps.clients}" if full else "",
    )  # fmt: skip


def _known(user: str) -> bool:
    if user.isdigit():
        return True
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
