"""Rings and label books that applications write: lent with a grant, given back, taken over.

They are files of the agent, in its folder; an application gets them as descriptors, locked from birth, so that an application of another
user writes into its own ring and opens nothing. Which key a ring counts under says the grant, stored before the ring is given away.
While an application holds them they are *lent*, and nobody else folds them; what it gave up is made the agent's alone first.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from pathlib import Path

import msgspec
from skerry_contract import window as w

from skerry_agent.config import Config
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.serving.rings import Rings, book_of
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store

log = logging.getLogger(__name__)

PREFIX = "app"
_GRANTS = "app_rings"
_MOST_RING_BYTES = 256 << 20


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """What a ring that was given away counts. ``uid``: whose application."""

    model: str
    digest: str
    version: str
    variant: str
    arm: str
    rollout: str
    stage: int
    uid: int

    @property
    def key(self) -> w.Key:
        """The window key."""
        return w.Key(self.model, self.digest, self.variant, self.arm, self.rollout, self.stage)


class Lending:
    """See the module.

    Attributes:
        lent: paths that an application holds; grants: by ring.
        folder: where they lie.
    """

    def __init__(self, config: Config, store: Store, slots: Slots, rings: Rings) -> None:
        self.config = config
        self.store = store
        self.slots = slots
        self.rings = rings
        self.lent: set[str] = set()
        self.grants: dict[str, Grant] = msgspec.convert(store.get(_GRANTS, {}), dict[str, Grant])
        self.folder = config.state_dir / "rings"
        rings.guests = self

    def lend(self, slot: Slot, model: str, uid: int) -> tuple[str, str, tuple[int, ...]]:
        """Makes a ring, and a label book where labels are taken. Returns their paths and open, locked descriptors.

        Raises:
            Degraded: the store or the disk is full.
        """
        serial = self.store.count_up("app_rings_made")
        ring = str(self.folder / f"{PREFIX}{serial}-{model}-0.ring")
        grant = Grant(
            model=model, digest=slot.digest, version=slot.version, variant=slot.variant, arm=slot.arm, rollout=slot.rollout,
            stage=slot.stage, uid=uid,
        )  # fmt: skip
        self.keep_grants({**self.grants, ring: grant})
        book = book_of(ring) if self.config.labels.max_age_s > 0 else ""
        fds: list[int] = []
        self.lent |= {path for path in (ring, book) if path}
        try:
            for path in (ring, book) if book else (ring,):
                fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                with contextlib.suppress(OSError):
                    # Of the open file, not of this process: it goes with the descriptor.
                    fcntl.flock(fds[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            self.give_back(ring, book)
            raise Degraded("not_enough_disk", f"{ring}: {error.strerror}", advice="make room on the disk") from None
        return ring, book, tuple(fds)

    def keep_grants(self, grants: dict[str, Grant]) -> None:
        """Stores who counts what. Raises ``Degraded``."""
        self.store.put(_GRANTS, grants)
        self.grants = grants

    def give_back(self, *paths: str) -> None:
        """Nobody out there writes these any more: what is in them is folded like what a dead worker left."""
        for path in paths:
            if path and path in self.lent:
                self.lent.discard(path)
                with contextlib.suppress(OSError):
                    if os.path.getsize(path) == 0:
                        self.rings.remove(path)

    def forget_gone(self) -> None:
        """Forgets grants of rings that are gone."""
        gone = [ring for ring in self.grants if not any(os.path.exists(path) for path in (ring, book_of(ring)))]
        if gone:
            # A store that is held or full says so where something is lost by it; here the next tick tries again.
            with contextlib.suppress(Degraded):
                self.keep_grants({ring: grant for ring, grant in self.grants.items() if ring not in gone})

    # --- what ``serving.rings`` asks ---------------------------------------------------------------------------------

    def may_count(self, ring: str, key: w.Key) -> bool:
        """Whether a ring or label book may hold windows of that key."""
        if not Path(ring).name.startswith(PREFIX):
            return True
        grant = self.grants.get(str(Path(ring).with_suffix(".ring")))
        if grant is not None:
            return key == grant.key
        # The store that knew was lost. What never ran here is nobody's to count.
        pointers = self.slots.pointers(key.model)
        known = {slot.digest for slot in (pointers.confirmed, pointers.previous, pointers.active) if slot is not None}
        return key.bundle in known

    def take_over(self, path: Path) -> bool:
        """Makes a file that an application gave up the agent's alone, before a worker maps it; False when there is nothing in it."""
        if not path.name.startswith(PREFIX):
            return True
        grant = self.grants.get(str(path.with_suffix(".ring")))
        try:
            size = path.stat().st_size
            if size == 0 or size > _MOST_RING_BYTES:
                if size:
                    self.rings.count_lost("rings_damaged", 1)
                    log.error("ring too large", extra=kv(ring=path.name, size_bytes=size))
                self.rings.remove(str(path))
                return False
            if grant is None or grant.uid not in (0, os.geteuid()):
                # Whoever kept its descriptor could cut the file short under the worker, which would die of that.
                copy = path.with_name(f"{path.name}.own")
                shutil.copyfile(path, copy)
                copy.chmod(0o600)
                copy.replace(path)
        except OSError as error:
            log.warning("ring not taken over", extra=kv(ring=path.name, detail=str(error)))
            return False
        return True


def is_ours(path: str, kind: str, folder: Path) -> bool:
    """Whether a path is one that ``lend`` may have given out."""
    name = os.path.basename(path)
    return re.fullmatch(rf"{PREFIX}[0-9]+-[a-z0-9-]+\.{kind}", name) is not None and path == str(folder / name)


def is_file(fd: int, path: str, folder: Path) -> bool:
    """Whether a descriptor is of the file that lies at ``path``, one of ours."""
    if not is_ours(path, "(ring|labels)", folder):
        return False
    try:
        ours, theirs = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
