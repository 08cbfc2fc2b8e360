"""What a person must do about the update repository before devices feel it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

_DAY_MS = 86_400_000
LIVES_MS = {
    "root": 365 * _DAY_MS,
    "targets": 365 * _DAY_MS,
    "catalog": 180 * _DAY_MS,
    "fleet": 7 * _DAY_MS,
    "snapshot": 7 * _DAY_MS,
    "timestamp": _DAY_MS,
}
"""How long a role is signed for. It is time to sign it anew at a third left; online roles should have been at half."""
ONLINE_ROLES = frozenset({"fleet", "snapshot", "timestamp"})
_MOST_AHEAD_MS = 3_600_000
_DO = {
    "root": "its holders sign the next one: skerry keys rotate --root",
    "targets": "its holders sign the next one: skerry keys rotate --targets",
    "catalog": "the approvers sign the next one: skerry approve --renew",
}
_DO_ONLINE = "this server signs it by itself and could not: its log says why; does root still name its online key?"

_DO_AHEAD = (
    "set this server's clock right; by a week devices go on, and it is over when the time has come; what was signed further ahead "
    "counts on devices until its key is replaced: skerry-server new-online-key, then skerry keys rotate --add-online --remove-online"
)

_DO_BEHIND = (
    "compare this server's clock with the time, and set it right where it is behind: nothing else is to be done, and no key is to be "
    "replaced, what it signs meanwhile goes on by the time that it measures; where the clock is right, what was signed before is ahead "
    "by so much, and devices go on"
)
_DO_OFFLINE_BEHIND = (
    "compare this server's clock with the time, and set it right where it is behind; where it is right, "
    "the clock of whoever signed this was ahead, and the next version mends it"
)

Code = Literal["metadata_expired", "metadata_expires", "signed_time_ahead", "clock_behind", "devices_hold_newer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """Something that a person must see to. ``do``: what; ``left_ms``: until the role expires, None where that is not the matter."""

    code: Code
    role: str
    text: str
    do: str
    left_ms: int | None = None

    def to_builtins(self) -> dict[str, Any]:
        """As a dict."""
        return asdict(self)


def alerts(
    roles: Mapping[str, tuple[int, int]],
    ahead: Mapping[str, tuple[int, str]],
    now_ms: int,
    *,
    clock_behind: bool = False,
) -> tuple[Alert, ...]:
    """Alerts of the roles that are served, the most urgent first.

    Args:
        roles: name -> (version, expires_ms) as served.
        ahead: name -> (version, device) that a device says it holds beyond what is served.
        clock_behind: whether the wall clock is behind what was signed and the time that was measured since.

    >>> [a.code for a in alerts({"timestamp": (7, 100), "catalog": (2, 180 * 86_400_000)}, {"catalog": (3, "press-7")}, 200)]
    ['metadata_expired', 'devices_hold_newer']
    >>> [a.code for a in alerts({"timestamp": (7, 30 * 86_400_000)}, {}, 200)]
    ['signed_time_ahead']
    >>> [a.code for a in alerts({"timestamp": (7, 30 * 86_400_000)}, {}, 200, clock_behind=True)]
    ['clock_behind']
    """
    found = []
    for role, (version, expires_ms) in roles.items():
        left_ms, life_ms = expires_ms - now_ms, LIVES_MS.get(role)
        do = _DO.get(role, _DO_ONLINE)
        if left_ms <= 0:
            text = f"{role} version {version} expired {_span(-left_ms)} ago: devices serve on and take nothing new under it"
            found.append(Alert(code="metadata_expired", role=role, text=text, do=do, left_ms=left_ms))
        elif life_ms is not None and left_ms < life_ms / 3:
            text = f"{role} version {version} expires in {_span(left_ms)}"
            found.append(Alert(code="metadata_expires", role=role, text=text, do=do, left_ms=left_ms))
        elif life_ms is not None and left_ms > life_ms + _MOST_AHEAD_MS:
            by = _span(left_ms - life_ms)
            if role not in ONLINE_ROLES or clock_behind:
                text = f"this server's clock is {by} behind what {role} version {version} was signed by"
                do = _DO_BEHIND if role in ONLINE_ROLES else _DO_OFFLINE_BEHIND
                found.append(Alert(code="clock_behind", role=role, text=text, do=do, left_ms=left_ms))
            else:
                text = (
                    f"{role} version {version} was signed {by} ahead of the time: this server's clock was or is wrong"
                )
                found.append(Alert(code="signed_time_ahead", role=role, text=text, do=_DO_AHEAD, left_ms=left_ms))
    found.sort(key=lambda alert: (alert.left_ms or 0, alert.role))
    for role, (version, device) in sorted(ahead.items()):
        served = roles.get(role, (0, 0))[0]
        if version > served:
            text = f"device {device} says it holds {role} version {version}, this server serves {served}: was it restored from a backup?"
            do = (
                "whoever signed it last: skerry restore"
                if role in _DO
                else "if the device is to be believed, replace the online key (skerry-server new-online-key); else revoke the device"
            )
            found.append(Alert(code="devices_hold_newer", role=role, text=text, do=do))
    return tuple(found)


def _span(ms: int) -> str:
    for unit, length in (("days", _DAY_MS), ("hours", 3_600_000), ("minutes", 60_000)):
        if ms >= 2 * length:
            return f"{ms // length} {unit}"
    return f"{ms // 1000} seconds"
