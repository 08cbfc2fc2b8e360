"""Device states: who is online, what it runs, and which of two states is the newer.

Owns the columns of ``devices`` that the retained topic ``state`` fills. Liveness goes by the server's receive time; a retained
copy that the broker replays says what a device said, not that it is alive now.

Order: a state with a lower birth than the one known is old, whatever it says. Within one birth ``offline`` is the last word: a
device that comes back counts a new birth, so an ``online`` of the same birth after it is a late copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from skerry_contract import group, ids, wire
from skerry_contract.errors import Malformed
from sqlalchemy import Connection, bindparam, select, update

from skerry_server import upkeep
from skerry_server.db import tables as t
from skerry_server.db.bulk import Many

_MOST = (1 << 63) - 1
MOST_MODELS = 64
"""That one device may say it runs."""
MOST_VERSION = 128
SEEN_EVERY_MS = 2000
"""How exact ``seen_ms`` is for records; a state always writes it."""


@dataclass(slots=True)
class Known:
    """What the database says of a device."""

    enrolled: bool
    birth: int
    online: bool
    spoke: bool
    seen_ms: int
    gone_ms: int | None = None


def load(connection: Connection, devices: list[str]) -> dict[str, Known]:
    """The devices of these ids that exist."""
    d = t.devices.c
    # 'spoke' needs no JSON: before the first state there is neither a birth nor a time.
    query = select(d.id, d.status, d.birth, d.online, d.seen_ms, d.agent, d.gone_ms).where(d.id.in_(devices))
    return {
        row.id: Known(
            row.status == "enrolled",
            row.birth,
            row.online,
            row.birth > 0 or bool(row.agent),
            row.seen_ms or 0,
            row.gone_ms,
        )
        for row in connection.execute(query)
    }


class Presence:
    """The states and signs of life of one transaction."""

    def __init__(self, known: Mapping[str, Known], now_ms: int) -> None:
        self._known = known
        self._now_ms = now_ms
        self._said: dict[str, dict[str, Any]] = {}
        self._gone: dict[str, dict[str, Any]] = {}
        self._seen: set[str] = set()

    def seen(self, device: str) -> None:
        """Records came from it."""
        if self._now_ms - self._known[device].seen_ms >= SEEN_EVERY_MS:
            self._seen.add(device)

    def apply(self, device: str, state: wire.State, *, retained: bool) -> bool:
        """Takes a state; False when it is older than what is known."""
        known = self._known[device]
        if known.birth > wire.MOST_BIRTH:
            # Of a server that believed any number.
            known.birth = 0
        if not wire.believable_birth(state.birth, known.birth):
            # Nothing that the device says later would be above it.
            return False
        late = known.spoke and state.birth == known.birth and not known.online and state.status == wire.ONLINE
        if state.birth < known.birth or (late and not retained):
            return False
        if known.online and state.status != wire.ONLINE:
            # Once per absence: the broker replays the same will at every start of the server.
            known.gone_ms = self._now_ms
        known.birth, known.spoke, known.online = state.birth, True, state.status == wire.ONLINE
        if not known.online:
            gone = {"birth": state.birth, "gone_ms": known.gone_ms}
            said = self._said.get(device)
            if said is not None:
                said |= {"online": False, **gone}
            self._gone[device] = {"at": device, **gone}
            return True
        self._gone.pop(device, None)
        if not retained:
            known.seen_ms = self._now_ms
        self._said[device] = {
            "at": device,
            "online": True,
            "birth": state.birth,
            "gone_ms": known.gone_ms,
            "seen_ms": known.seen_ms or self._now_ms,
            "stratum": state.stratum,
            "agent": state.agent,
            "generation": state.generation,
            "running": msgspec.to_builtins(state.running),
            "state": msgspec.to_builtins(state),
        }
        return True

    def store(self, connection: Connection) -> None:
        """Writes what was taken."""
        if self._said:
            connection.execute(_SAID, list(self._said.values()))
            upkeep.note_held(
                connection,
                {device: said["state"].get("tuf") or {} for device, said in self._said.items()},
                self._now_ms,
            )
        gone = [values for device, values in self._gone.items() if device not in self._said]
        if gone:
            connection.execute(_GONE, gone)
        seen = [{"at": device, "seen_ms": self._now_ms} for device in sorted(self._seen - self._said.keys())]
        _SEEN.run(connection, seen)


def expire(connection: Connection, *, before_ms: int, now_ms: int) -> int:
    """Devices that count as online and were last heard of before ``before_ms`` are offline; returns how many.

    For what died while nobody could take its will: the server or its broker was down with it. The birth goes one back, since
    such a device never said that it left: a state of its present session still counts when it comes late.
    """
    gone = (
        update(t.devices)
        .where(t.devices.c.online, (t.devices.c.seen_ms < before_ms) | t.devices.c.seen_ms.is_(None))
        .values(online=False, gone_ms=now_ms, birth=t.devices.c.birth - 1)
    )
    return int(connection.execute(gone).rowcount)


_d = t.devices.c
_AT = _d.id == bindparam("at")
# The columns to set are the names of the parameters.
_SAID = update(t.devices).where(_AT)
_GONE = update(t.devices).where(_AT).values(online=False)
_SEEN = Many(lambda _connection: update(t.devices).where(_AT), ("seen_ms",))


def decode_state(payload: bytes) -> wire.State:
    """Reads a state that the database can hold.

    Raises:
        Malformed, UnsupportedVersion: as ``wire.decode``; also for numbers and texts beyond the columns.
    """
    state = wire.decode(wire.State, payload)
    if not (0 <= state.birth <= _MOST and 0 <= state.generation <= _MOST and 0 <= state.seq <= _MOST):
        raise Malformed("state", "wanted numbers from 0 to 2**63 - 1", where="birth, generation or seq")
    if len(state.stratum) > 200 or len(state.agent) > 40:
        raise Malformed("state", "wanted at most 200 characters of stratum, 40 of agent")
    if state.stratum == group.ANY_STRATUM or not (state.stratum.isprintable() and state.agent.isprintable()):
        # The star would cut every stratum that is not named; the name stands in a signed document and on people's screens.
        raise Malformed(
            "state",
            "wanted a stratum of printable characters other than *, and such an agent",
            where="stratum or agent",
        )
    _check_running(state.running)
    if state.epoch:
        ids.epoch(state.epoch)
    plain_json(msgspec.to_builtins(state), what="state")
    return state


def _check_running(running: Mapping[str, wire.Running]) -> None:
    if len(running) > MOST_MODELS:
        raise Malformed("state", f"wanted at most {MOST_MODELS} models, got {len(running)}", where="running")
    for name, one in running.items():
        ids.model_name(name)
        texts = (one.version, one.variant, one.digest)
        if not all(len(text) <= MOST_VERSION and text.isprintable() for text in texts):
            wanted = f"wanted version, variant and digest of at most {MOST_VERSION} printable characters"
            raise Malformed("state", wanted, where=f"running.{name}")


def plain_json(value: Any, *, what: str) -> None:
    """Refuses what a JSON column cannot hold: bytes, NaN, keys that are no text. Raises ``Malformed``."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(what, f"wanted what JSON can say: {error}") from None
