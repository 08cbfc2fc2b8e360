"""Encrypted bundles in the clear: where they lie while they are used, and that they do before a worker is told to load one.

The folder is on a tmpfs and ours alone (``memory_folder``); ``slots/.opened`` says which. It outlives the agent and no power cut, so that only the
first start after one has to open anything; a courier does it (``courier/unsealing``), for it needs the device's key. What no slot has any more goes
with the slot.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from skerry_contract import manifest as m

from skerry_agent import memory_folder
from skerry_agent.config import Config
from skerry_agent.errand import Errands
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.slots import Slots

_UNSEAL_S = 600.0
_KIND = "models"

log = logging.getLogger(__name__)


def folder_of(config: Config) -> Path | None:
    """Where opened bundles lie, as it was noted; None before the first. It need not be there any more, nor be ours."""
    try:
        noted = Path(_note(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return noted if memory_folder.is_drawn(noted, _KIND, config.state_dir) else None


class Opening:
    """See the module. ``errand_input``: fields that every courier gets."""

    def __init__(
        self, config: Config, slots: Slots, errands: Errands, *, errand_input: Callable[[], dict[str, Any]]
    ) -> None:
        self._config = config
        self._slots = slots
        self._errands = errands
        self._errand_input = errand_input

    async def ensure(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Opens what of these (digest, variant) is encrypted and not open yet.

        Raises:
            AgentError: why one cannot be; ``Degraded`` (``no_memory_folder``) when there is no place in memory for it.
        """
        for digest, variant in wanted:
            if not self._slots.is_closed(digest, variant):
                continue
            self._slots.opened = prepared(self._config, self._slots.opened)
            message = {
                **self._errand_input(), "digest": digest, "variant": variant, "folder": str(self._slots.opened),
            }  # fmt: skip
            await self._errands.run("unseal", message, timeout_s=_UNSEAL_S)


def for_download(config: Config, slots: Slots, manifest: m.Manifest) -> str:
    """The folder for a courier that fetches this bundle; empty where there is none: then no delta is asked for.

    It is made here where the bundle is encrypted: the first one of its kind is opened only after it was fetched.
    """
    if manifest.encryption is not None:
        try:
            slots.opened = prepared(config, slots.opened)
        except Degraded as error:
            log.warning("no delta of an encrypted bundle", extra=kv(code=error.code, detail=error.detail))
            return ""
    return str(slots.opened or "")


def prepared(config: Config, held: Path | None) -> Path:
    """The folder, made where it was not there, or where somebody else has its name.

    Args:
        held: the one that is known.

    Raises:
        Degraded: ``no_memory_folder`` when there is no place in memory for it.
    """
    place = Path(config.encryption.memory_dir)
    if why := memory_folder.unfit(place):
        raise _no_folder(why)
    if held is not None:
        if held.parent == place and memory_folder.is_ours(held):
            return held
        if stranger := memory_folder.stranger(held):
            log.warning("folder in memory not ours, another is made", extra=kv(found=stranger))
        memory_folder.remove(held)
    folder = memory_folder.draw(place, _KIND, config.state_dir)
    _write_note(_note(config), folder)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise _no_folder(f"{folder}: {error.strerror}") from None
    return folder


def _write_note(note: Path, folder: Path) -> None:
    """Over the one before, in its room on the disk: what a crash leaves names no folder, or one that is not there, and another is drawn."""
    try:
        descriptor = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, os.write(descriptor, str(folder).encode()))
        finally:
            os.close(descriptor)
    except OSError as error:
        # A full disk, or one that is read only by now, keeps no model dark. The next start opens into another folder.
        log.warning("folder in memory not noted", extra=kv(path=str(note), detail=error.strerror))


def _note(config: Config) -> Path:
    return config.state_dir / "slots" / ".opened"


def _no_folder(detail: str) -> Degraded:
    return Degraded(
        "no_memory_folder", detail, advice="set encryption.memory_dir to a tmpfs; encrypted models are opened there"
    )
