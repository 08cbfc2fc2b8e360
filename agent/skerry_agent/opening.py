"""Encrypted bundles in the clear: where they lie while they are used, and that they do before a worker is told to load one.

The folder is on a tmpfs and ours alone. It outlives the agent and no power cut, so that only the first start after one has to open anything;
a courier does it (``courier/unsealing``), for it needs the device's key. What no slot has any more goes with the slot.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from skerry_agent.at_rest import IN_MEMORY, file_system
from skerry_agent.config import Config
from skerry_agent.errand import Errands
from skerry_agent.errors import Degraded
from skerry_agent.slots import Slots

_UNSEAL_S = 600.0


def folder_of(config: Config) -> Path:
    """Where opened bundles lie; it need not be there yet."""
    name = hashlib.sha256(str(config.state_dir).encode()).hexdigest()[:16]
    return Path(config.encryption.memory_dir) / f"skerry-models-{os.getuid()}-{name}"


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
            if not self._slots.encrypted(digest) or self._slots.is_open(digest, variant):
                continue
            message = {
                **self._errand_input(), "digest": digest, "variant": variant, "folder": str(prepared(self._config)),
            }  # fmt: skip
            await self._errands.run("unseal", message, timeout_s=_UNSEAL_S)


def prepared(config: Config) -> Path:
    """The folder, made where it was not there.

    Raises:
        Degraded: ``no_memory_folder`` when it is no place in memory of our own.
    """
    folder = folder_of(config)
    kind = file_system(folder.parent)
    if kind not in IN_MEMORY:
        raise _no_folder(f"{folder.parent}: wanted a tmpfs, it is {kind or 'not there'}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Others may write beside it: a link or a folder of theirs under our name is refused.
        found = os.lstat(folder)
    except OSError as error:
        raise _no_folder(f"{folder}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise _no_folder(f"{folder}: wanted a folder of ours with mode 0700")
    return folder


def _no_folder(detail: str) -> Degraded:
    return Degraded(
        "no_memory_folder", detail, advice="set encryption.memory_dir to a tmpfs; encrypted models are opened there"
    )
