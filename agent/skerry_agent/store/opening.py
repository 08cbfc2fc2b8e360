"""Opening the store at a start: a damaged file is moved aside with its time, a new one starts, and the loss is counted.

Of files moved aside the newest stays, for a person to look at, and none where the new store needs its room: a card that goes
bad must not be filled by what went bad on it. A file of a newer agent is left alone; a lock or a full disk is no damage.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.store import ballast
from skerry_agent.store.compaction import Store
from skerry_agent.store.database import Database, connect, suspect_mark

log = logging.getLogger(__name__)

_IOERR_NOMEM = sqlite3.SQLITE_IOERR | 12 << 8
_ASIDE = ".damaged-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What was found when the store was opened.

    Attributes:
        new_epoch: why a new epoch began: ``first``, ``moved``, ``damaged``; empty when the old one goes on.
        moved_aside: where a damaged file went; empty too when there was no room to keep it.
        lost_records: pending records in it that could still be counted; -1 when they could not.
    """

    new_epoch: str = ""
    moved_aside: str = ""
    lost_records: int = 0
    lost_inferences: int = 0


def open_store(
    path: Path,
    *,
    binding: str,
    device: str,
    new_epoch: Callable[[], str],
    wall_s: float,
    bound_bytes: int = 64 << 20,
    files_bound_bytes: int = 0,
    free_bytes: int = 0,
) -> tuple[Store, Opened]:
    """Opens the store, or begins a new one.

    Args:
        path: the database file; its folder exists.
        binding: digest of machine id and device key; another one than stored begins a new epoch.
        device: the device's id; records of another device are dropped and counted.
        new_epoch: makes 32 random hex digits.
        wall_s: seconds since 1970, for the name of a damaged file.
        bound_bytes: what waiting records may take.
        files_bound_bytes: what the store may take on disk, its log included; 0: not bounded.
        free_bytes: what the outbox leaves free on its file system.

    Raises:
        Degraded: ``store_unusable`` when no store can be made here at all.
    """
    if free_bytes and ballast.full(path.parent):
        # The log, its index, and whatever else a start writes, must fit.
        ballast.spend(path.parent)
        log.error(
            "the file system is full",
            extra=kv(code="store_full", detail=str(path), advice="make room on the device's disk"),
        )
    damaged = _damage(path)
    moved_aside, records, inferences = "", 0, 0
    if damaged:
        aside = path.with_name(f"{path.name}{_ASIDE}{int(wall_s)}")
        records, inferences = _salvage_counts(path)
        _remove(moved_aside_of(path))
        for suffix in ("", "-wal", "-shm"):
            source = Path(f"{path}{suffix}")
            if source.exists():
                source.replace(Path(f"{aside}{suffix}"))
        suspect_mark(path).unlink(missing_ok=True)
        moved_aside = str(aside)
    if ballast.room(path.parent)[0] < files_bound_bytes + free_bytes:
        _remove(moved_aside_of(path))
        moved_aside = ""
    try:
        store = Store(path, connect(path), new_epoch, bound_bytes, files_bound_bytes, free_bytes)
    except (sqlite3.Error, OSError) as error:
        raise Degraded("store_unusable", f"{path}: {error}", advice="make room or repair the file system") from error
    try:
        why = store.adopt(binding, device)
    except BaseException:
        store.close()
        raise
    if damaged:
        store.count_lost("store_damaged", 1)
        if records > 0:
            store.count_lost("records_in_damaged_store", records)
        if inferences > 0:
            store.count_lost("inferences_in_damaged_store", inferences)
        why = "damaged"
    return store, Opened(new_epoch=why, moved_aside=moved_aside, lost_records=records, lost_inferences=inferences)


def moved_aside_of(path: Path) -> list[Path]:
    """Damaged files of this store, the oldest first, each followed by its log."""
    return sorted(path.parent.glob(f"{path.name}{_ASIDE}*"))


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("damaged store stays", extra=kv(file=str(file), detail=error.strerror))
            continue
        log.warning("damaged store removed", extra=kv(file=str(file)))


def _damage(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        # The mark was for the file that went aside: power may have failed before it was taken down.
        suspect_mark(path).unlink(missing_ok=True)
        return False
    if suspect_mark(path).exists():
        return True
    try:
        connection = connect(path)
        try:
            if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                return True
            Database(path, connection).verify()
            return False
        finally:
            connection.close()
    except Degraded as error:
        if error.code != "store_damaged":
            raise
        return True
    except sqlite3.DatabaseError as error:
        # A lock, a full disk or a mount to be read only is no damage: moving the file aside would make the loss that it is to
        # prevent. What the disk cannot give back is lost already.
        unreadable = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_IOERR and error.sqlite_errorcode != _IOERR_NOMEM
        return unreadable or not isinstance(error, sqlite3.OperationalError) or "malformed" in str(error)


def _salvage_counts(path: Path) -> tuple[int, int]:
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            row = connection.execute("SELECT count(*), coalesce(sum(inferences), 0) FROM outbox").fetchone()
            return int(row[0]), int(row[1])
        finally:
            connection.close()
    except sqlite3.Error:
        return -1, -1
