"""A delta between encrypted files, applied: opened in memory, applied to what is in the base, and the result encrypted again.

Encryption is deterministic, so what comes out has the very sha256 that the manifest signs. What is in the clear on the way lies beside the
opened bundles and is gone when this returns.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import manifest as manifests
from skerry_contract import sealed
from skerry_runtime import delta

from skerry_agent.courier import requests
from skerry_agent.errors import Degraded

_SPARE_BYTES = 1 << 20


class Sealed:
    """Of one bundle that is fetched."""

    def __init__(self, request: requests.Fetch, content_key: bytes) -> None:
        self._folder = Path(request.opened)
        self._key = content_key
        files = manifests.parse(request.manifest.encode()).files()
        self._files = {file.sha256: file for file in files}

    def apply(self, base_path: Path, patch: Path, made: Path, *, base: str, target: str) -> None:
        """Writes the encrypted target to ``made``.

        Args:
            base_path: the base in the clear; patch: the encrypted delta.
            base, target: sha256 that the delta is named by.

        Raises:
            DeltaError: it does not open, or gives another file.
            Degraded: ``not_enough_memory``.
        """
        wanted = self._files[target].content
        scratch = self._folder / f".delta-{target}"
        shutil.rmtree(scratch, ignore_errors=True)
        self._check_room(wanted.size + patch.stat().st_size)
        scratch.mkdir(mode=0o700)
        try:
            with patch.open("rb") as source, (scratch / "delta").open("wb") as out:
                out.writelines(sealed.opened_delta(source, self._key, base=base, target=target, new_cipher=AESGCM))
            plain = scratch / "target"
            delta.apply(base_path, scratch / "delta", plain, sha256=wanted.sha256, size=wanted.size)
            with plain.open("rb") as source, made.open("wb") as out:
                out.writelines(sealed.seal(source, self._key, wanted.sha256, AESGCM))
        except sealed.CannotOpen as error:
            raise delta.DeltaError(str(error)) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _check_room(self, wanted: int) -> None:
        found = os.statvfs(self._folder)
        if wanted + _SPARE_BYTES > found.f_bavail * found.f_frsize:
            raise Degraded("not_enough_memory", f"{self._folder}: {wanted} bytes for a delta do not fit")
