"""Who may ask the local endpoint, and whether an operator throttles it."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from skerry_agent import clients
from skerry_agent.doctor.finding import Finding, Patient
from skerry_agent.errors import Degraded


def check_access(patient: Patient) -> Iterator[Finding]:
    """Whether the clients' file can be read, is private, and lets anybody in."""
    config = patient.config
    path = config.clients_file
    try:
        known = clients.read(path)
    except Degraded as error:
        yield Finding(check="access", verdict="fail", detail=error.detail, advice=error.advice)
        return
    if known and stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding(
            check="access", verdict="warn", detail=f"{path} can be read by others", advice=f"chmod 0600 {path}"
        )
    if config.access.required and not known:
        yield Finding(
            check="access",
            verdict="fail",
            detail="access.required, and no client is known: nobody may ask",
            advice="skerry-agent token add NAME",
        )
    elif known and not config.access.required:
        yield Finding(
            check="access",
            verdict="warn",
            detail=f"{len(known)} clients are known, and everyone who can connect may ask",
            advice="set access.required = true",
        )
    else:
        detail = f"{len(known)} clients may ask" if config.access.required else "everyone who can connect may ask"
        yield Finding(check="access", verdict="ok", detail=detail)
    throttle = ((patient.status or {}).get("serving") or {}).get("throttle")
    if throttle is not None:
        left_s = throttle["left_s"]
        yield Finding(
            check="throttle",
            verdict="warn",
            detail=f"an operator bounds this device to {throttle['rate']:g} inferences/s "
            + ("without end" if left_s is None else f"for {left_s:.0f} s more"),
            advice="skerry-agent throttle --off",
        )
