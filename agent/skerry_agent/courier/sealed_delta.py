"""A delta between encrypted files, applied: opened in memory, applied to what is in the base, and the result encrypted again.

Encryption is deterministic, so what comes out has the very sha256 that the manifest signs. What is in the clear on the way lies beside the
opened bundles and is gone when this returns.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import manifest as manifests
from skerry_contract import sealed
from skerry_runtime import delta

from skerry_agent import memory_folder, scraps
from skerry_agent.courier import content_keys, requests
from skerry_agent.errors import Degraded

_SPARE_BYTES = 1 << 20


class Sealed:
    """Of one bundle that is fetched. A delta from an encrypted base opens with the content keys of both."""

    def __init__(self, request: requests.Fetch, content_key: bytes) -> None:
        self._request = request
        self._folder = Path(request.opened)
        self._key = content_key
        files = manifests.parse(request.manifest.encode()).files()
        self._files = {file.sha256: file for file in files}

    def base_key(self, digest: str, key_id: str) -> bytes:
        """The content key of an encrypted base that is kept here; empty when there is none: then no delta from it can be opened."""
        return content_keys.kept(self._request, digest, key_id)

    def apply(self, base_path: Path, patch: Path, made: Path, *, base_key: bytes, base: str, target: str) -> None:
        """Writes the encrypted target to ``made``.

        Args:
            base_path: the base in the clear; patch: the encrypted delta.
            base_key: of an encrypted base, else empty.
            base, target: sha256 that the delta is named by.

        Raises:
            DeltaError: it does not open, or gives another file.
            Degraded: ``not_enough_memory``; ``no_memory_folder``: what opens here would open in a folder that others can read.
        """
        if not memory_folder.is_ours(self._folder):
            raise Degraded(
                "no_memory_folder", f"{self._folder}: wanted a folder of ours with mode 0700, and no link to one"
            )
        wanted = self._files[target].content
        with scraps.held(self._folder, f".delta-{target}") as scratch:
            self._check_room(wanted.size + patch.stat().st_size)
            self._apply(scratch, base_path, patch, made, wanted, base_key, base, target)

    def _apply(
        self,
        scratch: Path,
        base_path: Path,
        patch: Path,
        made: Path,
        wanted: manifests.Plain,
        base_key: bytes,
        base: str,
        target: str,
    ) -> None:
        try:
            with patch.open("rb") as source, (scratch / "delta").open("wb") as out:
                out.writelines(
                    sealed.opened_delta(
                        source, self._key, base_key=base_key, base=base, target=target, new_cipher=AESGCM
                    )
                )
            plain = scratch / "target"
            delta.apply(base_path, scratch / "delta", plain, sha256=wanted.sha256, size=wanted.size)
            with plain.open("rb") as source, made.open("wb") as out:
                out.writelines(sealed.seal(source, self._key, wanted.sha256, AESGCM))
        except sealed.CannotOpen as error:
            raise delta.DeltaError(str(error)) from None

    def _check_room(self, wanted: int) -> None:
        found = os.statvfs(self._folder)
        if wanted + _SPARE_BYTES > found.f_bavail * found.f_frsize:
            raise Degraded("not_enough_memory", f"{self._folder}: {wanted} bytes for a delta do not fit")
