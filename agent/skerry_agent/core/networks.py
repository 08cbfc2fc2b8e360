"""Over which networks bundles may be downloaded: decided from values. Pure.

The group's setting ``networks`` names kinds (``ethernet``, ``wifi``, ``cellular``) and ``unmetered``, any that is not paid by volume. Metadata
and telemetry are not asked about: they are small, and an order must reach the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from skerry_contract.group import UNMETERED


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What the device's default route leads over. ``kind``: empty where there is none, or none that is known."""

    interface: str = ""
    kind: str = ""
    metered: bool = False


def hindrance(wanted: Iterable[str], network: Network) -> str:
    """Why nothing may be downloaded over it, in words; empty when it may."""
    names = tuple(wanted)
    if not names or network.kind in names or (UNMETERED in names and network.kind and not network.metered):
        return ""
    here = f"{network.interface} is {network.kind}" if network.kind else "it has no default route"
    paid = ", metered" if network.metered else ""
    return f"its group downloads over {' or '.join(names)}, and {here}{paid}"


def default_interface(routes: str) -> str:
    """The interface of the default route with the least metric, of ``/proc/net/route``; empty for none."""
    found: list[tuple[int, str]] = []
    for line in routes.splitlines()[1:]:
        fields = line.split()
        # Up, and to everywhere.
        if len(fields) >= 8 and fields[1] == fields[7] == "00000000" and _number(fields[3], 16) & 1:
            found.append((_number(fields[6], 10), fields[0]))
    return min(found)[1] if found else ""


def default_interface_v6(routes: str) -> str:
    """The same of ``/proc/net/ipv6_route``."""
    found: list[tuple[int, str]] = []
    for line in routes.splitlines():
        fields = line.split()
        if len(fields) < 10 or fields[9] == "lo" or fields[0].strip("0") or fields[1] != "00":
            continue
        # Up, and not a route that refuses.
        flags = _number(fields[8], 16)
        if flags & 1 and not flags & 0x200:
            found.append((_number(fields[5], 16), fields[9]))
    return min(found)[1] if found else ""


def _number(text: str, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        return 0
