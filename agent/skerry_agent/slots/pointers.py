"""The pointer file, ``slots/pointers.json``: per model what is confirmed, what it replaced and what answers requests now.

It is written whole, synced and renamed. What begins a trial is on disk when it was done, or was not done. What the stored update stands
behind, a confirmation or a way back, holds whatever the disk says, and is owed to it until it takes it. What the names mean for a boot is ``running``'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Literal

import msgspec

from skerry_agent.core.effects import Arm
from skerry_agent.durable import sync_folder
from skerry_agent.logs import kv

log = logging.getLogger(__name__)

_POINTERS = "pointers.json"

Standing = Literal["trial", "confirmed", "confirmed_on_golden"]


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle as it runs: which variant, and the key its windows carry."""

    digest: str
    version: str
    variant: str
    standing: Standing
    arm: Arm = "none"
    rollout: str = ""
    stage: int = 0


class Pointers(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model.

    Attributes:
        confirmed: what a boot starts.
        previous: what ``confirmed`` replaced; where a person's revert goes.
        active: what answers requests now: the trial's bundle, or ``confirmed``.
    """

    confirmed: Slot | None = None
    previous: Slot | None = None
    active: Slot | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True):
    schema: int
    models: dict[str, Pointers]


class PointerFile:
    """The pointers of all models, as they hold now and as they are on disk.

    Attributes:
        damage: why the file could not be read at the start, when it was set aside; empty otherwise.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.damage = ""
        self._models = self._read()
        self._on_disk = self._models

    def _read(self) -> dict[str, Pointers]:
        path = self._root / _POINTERS
        try:
            return read_pointers(self._root)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # Renames are atomic, so only the medium or a hand can have done this. The slots themselves are whole.
            self.damage = f"{path}: {error}"
            with contextlib.suppress(OSError):
                # On a disk that takes no change it stays where it is: what runs is fetched anew all the same.
                path.replace(path.with_name(_POINTERS + ".damaged"))
            return {}

    def write(self, model: str, pointers: Pointers) -> None:
        """On disk when it returns; it raises ``OSError`` where nothing changed."""
        self._put({**self._models, model: pointers})

    def owe(self, model: str, pointers: Pointers) -> None:
        """They hold from now on whatever the disk says, and are on it as soon as it takes them."""
        self._models = {**self._models, model: pointers}
        self.settle()

    @property
    def unwritten(self) -> bool:
        """Whether the pointer file lacks something that holds."""
        return self._models is not self._on_disk

    def settle(self) -> bool:
        """Writes what the pointer file lacks. Returns whether it lacks nothing now."""
        if self.unwritten:
            try:
                self._put(self._models)
            except OSError as error:
                log.error("pointer file not written", extra=kv(detail=str(error)))
        return not self.unwritten

    def _put(self, models: dict[str, Pointers]) -> None:
        temporary = self._root / (_POINTERS + ".new")
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(_File(schema=1, models=models)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._root / _POINTERS)
        sync_folder(self._root)
        self._models = self._on_disk = models

    @property
    def models(self) -> dict[str, Pointers]:
        """By model, as they hold now."""
        return self._models

    def named(self) -> list[Slot]:
        """What the pointers name, those on disk too where it takes no others."""
        every = (*self._models.values(), *self._on_disk.values())
        return [slot for p in every for slot in (p.confirmed, p.previous, p.active) if slot is not None]


def read_pointers(root: Path) -> dict[str, Pointers]:
    """The pointer file of a folder of slots; empty when there is none yet.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError: it is damaged.
    """
    try:
        return dict(msgspec.json.decode((root / _POINTERS).read_bytes(), type=_File).models)
    except FileNotFoundError:
        return {}
