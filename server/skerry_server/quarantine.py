"""What ingest could not use: counted per device and cause, with a bounded sample of the payloads kept.

Of each (device, cause) the first ``KEEP`` are kept, then one in two, one in four, and so on, and never more than the newest
``KEEP``: a device that sends rubbish all day costs a few rows, and ``share`` says which part of it a row stands for. Counts of
devices that are not known go under the empty name, so that made-up names cannot fill the table.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sqlalchemy import Connection, delete, insert, select

from skerry_server.db import queries
from skerry_server.db import tables as t

KEEP = 20
PAYLOAD_BYTES = 64 * 1024
UNKNOWN_DEVICE = ""


@dataclass(frozen=True, slots=True)
class _Note:
    device: str
    topic: str
    code: str
    detail: str
    payload: bytes
    size: int


@dataclass(slots=True)
class Notes:
    """What one transaction counts and sets aside."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _kept: list[_Note] = field(default_factory=list)

    def count(self, device: str, code: str, n: int = 1) -> None:
        """Counts without keeping anything."""
        if n:
            self.counts[device, code] += n

    def keep(self, device: str, topic: str, code: str, detail: str, payload: bytes) -> None:
        """Counts, and offers the payload as a sample."""
        self.counts[device, code] += 1
        self._kept.append(_Note(device, topic[:200], code, detail[:1000], payload[:PAYLOAD_BYTES], len(payload)))

    def store(self, connection: Connection, now_ms: int) -> None:
        """Writes counts and samples."""
        if not self.counts:
            return
        stored = self._stored(connection) if self._kept else {}
        rows = []
        for note in self._kept:
            n = stored[note.device, note.code] = stored.get((note.device, note.code), 0) + 1
            every = thinning(n)
            if n % every == 0:
                rows.append(
                    {
                        "device": note.device,
                        "received_ms": now_ms,
                        "topic": note.topic,
                        "code": note.code,
                        "detail": note.detail,
                        "payload": note.payload,
                        "size": note.size,
                        "share": 1 / every,
                    }
                )
        if rows:
            connection.execute(insert(t.quarantine), rows)
            for device, code in {(row["device"], row["code"]) for row in rows}:
                _drop_oldest(connection, str(device), str(code))
        insert_counts = queries.upsert(connection, t.ingest_counters)
        connection.execute(
            insert_counts.on_conflict_do_update(
                index_elements=["device", "name"], set_={"n": t.ingest_counters.c.n + insert_counts.excluded.n}
            ),
            [{"device": device, "name": name, "n": n} for (device, name), n in sorted(self.counts.items())],
        )

    def _stored(self, connection: Connection) -> dict[tuple[str, str], int]:
        c = t.ingest_counters.c
        names = sorted({note.code for note in self._kept})
        devices = sorted({note.device for note in self._kept})
        found = connection.execute(select(c.device, c.name, c.n).where(c.device.in_(devices), c.name.in_(names)))
        return {(device, name): n for device, name, n in found}


def thinning(n: int) -> int:
    """The n-th of a kind is kept when this number divides n.

    >>> [thinning(n) for n in (1, 20, 21, 40, 41, 81)]
    [1, 1, 2, 2, 4, 8]
    """
    return 1 << max(0, ((n - 1) // KEEP).bit_length())


def _drop_oldest(connection: Connection, device: str, code: str) -> None:
    q = t.quarantine.c
    mine = (q.device == device, q.code == code)
    oldest_kept = connection.execute(
        select(q.id).where(*mine).order_by(q.id.desc()).offset(KEEP - 1).limit(1)
    ).scalar_one_or_none()
    if oldest_kept is not None:
        connection.execute(delete(t.quarantine).where(*mine, q.id < oldest_kept))
