"""Validating a pushed bundle: its files are laid out as a bundle, and a child process with limits loads and proves it.

The model file is foreign code to a runtime written in C++: it may crash, hang or eat memory. ``skerry_runtime.validation`` runs it
in a process of its own; this module gives that process a copy of the files and turns its verdict into the registry's words.

Children are few and take turns, in threads of their own: whoever asks for many validations keeps nobody else from the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from anyio import CapacityLimiter, to_thread
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import layout, sealed
from skerry_contract import manifest as m
from skerry_runtime.validation import validate_bundle

from skerry_server.config import Validation as Limits
from skerry_server.errors import Unavailable
from skerry_server.provenance import ModelSigners

AT_ONCE = 2
"""Children that run at the same time."""
MOST_WAITING = 32
"""Requests that may wait for a turn; one more is told to come back."""
T = TypeVar("T")

LACKING_HERE = frozenset({"runtime_missing"})
"""Codes that speak of this server and not of the bundle: it stays a draft."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What validation found.

    Attributes:
        code: stable reason, empty when the bundle is good; reason: the same in words, and for a good bundle which variants
            this server could not run.
        report: what the child measured, JSON builtins.
    """

    code: str
    reason: str
    report: dict[str, Any]

    @property
    def good(self) -> bool:
        """Whether the bundle may be approved."""
        return not self.code


class Turns:
    """Who validates when: ``AT_ONCE`` at a time, and never the same bundle twice at once. Used in the event loop."""

    def __init__(self) -> None:
        self._threads = CapacityLimiter(AT_ONCE)
        self._bundles: dict[str, asyncio.Lock] = {}
        self._here = 0

    @contextlib.asynccontextmanager
    async def of(self, digest: str) -> AsyncIterator[Callable[[Callable[[], T]], Any]]:
        """Waits until nobody else validates this bundle; gives what runs a function in a thread when it is its turn.

        Raises:
            Unavailable: too many wait already.
        """
        if self._here >= MOST_WAITING:
            raise Unavailable("validation_busy", f"{MOST_WAITING} validations wait already; try again later")
        self._here += 1
        lock = self._bundles.setdefault(digest, asyncio.Lock())
        try:
            async with lock:
                yield lambda act: to_thread.run_sync(act, limiter=self._threads)
        finally:
            self._here -= 1
            if not self._here:
                self._bundles.clear()


class Validator:
    """Runs one child per bundle. Safe to use from several threads."""

    def __init__(self, repository: Path, scratch: Path, limits: Limits, signers: ModelSigners) -> None:
        """Args:
        repository: the folder that holds the blobs.
        scratch: where bundles are laid out; emptied here.
        signers: whose signature a bundle must carry.
        """
        self._signers = signers
        self._repository = repository
        self._scratch = scratch
        self._limits = limits
        self.turns = Turns()
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700, parents=True)

    def validate(
        self, digest: str, manifest: bytes, signature: bytes | None, content_key: bytes | None = None
    ) -> Outcome:
        """Lays the bundle out, an encrypted one with its content key in the clear, and lets the child prove it.

        Raises:
            Unavailable: this server lacks the bundle's runtime; nothing is said about the bundle.
        """
        refused, said = self._signers.judge(manifest, signature)
        if refused:
            return Outcome(code=refused, reason=said, report={})
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        try:
            self._lay_out(folder, manifest, signature, content_key)
            limits = self._limits
            found = validate_bundle(folder, timeout_s=limits.timeout_s, memory_mb=limits.memory_mb, digest=digest)
        except sealed.CannotOpen as error:
            return Outcome(code="cannot_decrypt", reason=str(error), report={})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if found.code in LACKING_HERE:
            raise Unavailable("validation_unavailable", f"this server cannot validate it: {found.detail}")
        code = "" if found.ok else found.code or "validation_failed"
        skipped = [f"{one.id} ({one.detail})" for one in found.variants if one.status == "skipped"]
        reason = f"not run here: {', '.join(skipped)}" if skipped and not code else found.detail
        report = msgspec.to_builtins(found)
        return Outcome(code=code, reason=reason, report=report | ({"signed_by": said} if said else {}))

    def _lay_out(self, folder: Path, manifest: bytes, signature: bytes | None, content_key: bytes | None) -> None:
        (folder / m.MANIFEST_FILE).write_bytes(manifest)
        if signature is not None:
            (folder / m.SIGNATURE_FILE).write_bytes(signature)
        for file in m.parse(manifest).files():
            place = folder / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.plain is not None:
                if content_key is None:
                    raise sealed.CannotOpen(f"{file.path}: there is no content key")
                with open(self._repository / layout.blob(file.sha256), "rb") as source, open(place, "wb") as target:
                    target.writelines(sealed.opened(source, content_key, file.plain.sha256, AESGCM))
                continue
            # A copy and no link: the child may not reach the file that devices will download.
            shutil.copyfile(self._repository / layout.blob(file.sha256), place)
