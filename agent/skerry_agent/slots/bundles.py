"""The folders of bundles, each by the digest of its manifest.

``slots/.staging/<digest>/`` grows by download; when every file has the sha256 of the manifest it becomes ``slots/<digest>/`` by
one rename, and never changes again; files that came in part lie in ``slots/.parts/`` by their content. An encrypted bundle lies here
as it came, and in the clear in memory only. Which of them run is not known here.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from skerry_contract import manifest as m
from skerry_contract.errors import ContractError

from skerry_agent import memory_folder
from skerry_agent.durable import sync_file, sync_folder
from skerry_agent.errors import Degraded, Rejected
from skerry_agent.slots.files import add, fault_of
from skerry_agent.slots.pointers import Slot

PARTS = ".parts"
"""The courier's folder of files that came in part, by their sha256."""
KEYS = ".keys"
"""The courier's folder of wrapped content keys, by digest."""
STAGED_MANIFEST = ".manifest.json"
"""The manifest of a bundle whose files are still coming."""


class Bundles:
    """The folder ``slots`` without its pointer file.

    Attributes:
        root: the folder; staging: the one in it for what is coming.
        opened: where encrypted bundles lie in the clear, one folder each, in memory; None: nowhere.
    """

    def __init__(self, root: Path, opened: Path | None = None) -> None:
        self.root = root
        self.opened = opened
        self.staging = root / ".staging"
        if not self.staging.exists():
            self.staging.mkdir(parents=True, mode=0o700, exist_ok=True)
            root.chmod(0o700)
            sync_folder(root)
            # What is confirmed in it later is worth nothing under a name that power takes away.
            sync_folder(root.parent)

    def path(self, digest: str) -> Path:
        """The folder of a bundle that is here."""
        return self.root / digest

    def load_path(self, digest: str) -> Path:
        """The folder that a bundle is loaded from: its slot, or where it was opened."""
        return self._memory() / digest if self.encrypted(digest) else self.path(digest)

    def _memory(self) -> Path:
        """The folder of opened bundles; where it is not ours, one that is never there."""
        if self.opened is not None and memory_folder.is_ours(self.opened):
            return self.opened
        return self.root / ".closed"

    def encrypted(self, digest: str) -> bool:
        """Whether the bundle that is here is encrypted."""
        manifest = self.manifest(digest)
        return manifest is not None and manifest.encryption is not None

    def is_open(self, digest: str, variant: str) -> bool:
        """Whether an encrypted bundle lies in the clear, every file in the right size. Hashes are read at load."""
        manifest = self.manifest(digest)
        folder = self._memory() / digest
        if manifest is None or not (folder / m.MANIFEST_FILE).is_file():
            return False
        try:
            files = manifest.variant(variant).files
            return all((folder / file.path).stat().st_size == file.content.size for file in files)
        except (KeyError, OSError):
            return False

    def is_closed(self, digest: str, variant: str) -> bool:
        """Whether the bundle is encrypted and does not lie in the clear."""
        return self.encrypted(digest) and not self.is_open(digest, variant)

    def staging_path(self, digest: str) -> Path:
        """The folder of a bundle that is coming."""
        return self.staging / digest

    def digests(self) -> tuple[str, ...]:
        """Bundles that are here, sorted."""
        return tuple(sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and entry.name[0] != "."))

    def manifest(self, digest: str) -> m.Manifest | None:
        """The manifest of a bundle that is here; None when it is not, or is not the one of that digest."""
        try:
            data = (self.path(digest) / m.MANIFEST_FILE).read_bytes()
            return m.parse(data) if m.digest(data) == digest else None
        except (OSError, ContractError):
            return None

    def variant(self, slot: Slot) -> m.Variant | None:
        """What a slot runs, as its manifest says; None when that cannot be read."""
        manifest = self.manifest(slot.digest)
        try:
            return manifest.variant(slot.variant) if manifest is not None else None
        except KeyError:
            return None

    def whole(self, digest: str, variant: str) -> bool:
        """Whether the slot has its manifest and every file of the variant in the right size. Hashes are read at load."""
        manifest = self.manifest(digest)
        if manifest is None:
            return False
        try:
            files = manifest.variant(variant).files
            return all((self.path(digest) / file.path).stat().st_size == file.size for file in files)
        except (KeyError, OSError):
            return False

    def present_bytes(self, digest: str, files: Iterable[m.File]) -> int:
        """Bytes of the files that need not come: in the slot, staged, in part, or in another bundle that holds the same."""
        total = 0
        others = {
            (file.sha256, file.size): self.path(other) / file.path
            for other in self.digests()
            if other != digest and (manifest := self.manifest(other)) is not None
            for file in manifest.files()
        }
        for file in files:
            places = [self.path(digest) / file.path, self.staging_path(digest) / file.path]
            if (file.sha256, file.size) in others:
                places.append(others[file.sha256, file.size])
            for place in (*places, self.root / PARTS / file.sha256):
                try:
                    total += min(file.size, place.stat().st_size)
                    break
                except OSError:
                    continue
        return total

    def idle_bytes(self, files: Iterable[m.File]) -> int:
        """What lies in part and belongs to none of the files: a courier that lacks room drops it."""
        wanted = {file.sha256 for file in files}
        total = 0
        with contextlib.suppress(OSError):
            for path in (self.root / PARTS).iterdir():
                if path.name.partition(".")[0] not in wanted:
                    with contextlib.suppress(OSError):
                        total += path.stat().st_blocks * 512
        return total

    def coming_bytes(self, digest: str) -> int:
        """How much has come of a bundle that is not a slot yet: its staged files, and what its staged manifest's files are in part."""
        folder = self.staging_path(digest or "none")
        total = 0
        with contextlib.suppress(OSError):
            total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        with contextlib.suppress(OSError, ContractError):
            for sha256 in {file.sha256 for file in m.parse((folder / STAGED_MANIFEST).read_bytes()).files()}:
                with contextlib.suppress(FileNotFoundError):
                    total += (self.root / PARTS / sha256).stat().st_size
        return total

    def size_bytes(self) -> int:
        """What all bundles take, staging included."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def verify(self, digest: str, files: Iterable[m.File], *, staged: bool = True) -> None:
        """Reads every file of the staged (or present) bundle against the manifest's size and sha256. Slow: not for the loop.

        A staged file that is wrong is removed, so that the next try brings that one again and no other.

        Args:
            staged: look at what was staged, when there is any; else at the slot.

        Raises:
            Rejected: ``size_mismatch``, ``hash_mismatch`` or ``malformed_manifest``, naming the file.
        """
        fresh = staged and self.staging_path(digest).exists()
        folder = self.staging_path(digest) if fresh else self.path(digest)
        try:
            data = (folder / m.MANIFEST_FILE).read_bytes()
        except OSError as error:
            raise Rejected("malformed_manifest", f"no manifest in what was fetched: {error.strerror}") from None
        if m.digest(data) != digest:
            raise Rejected("hash_mismatch", f"manifest.json: wanted {digest}, got {m.digest(data)}")
        for file in files:
            fault = fault_of(folder / file.path, file)
            if fault is not None:
                if fresh:
                    (folder / file.path).unlink(missing_ok=True)
                raise fault

    def fault(self, slot: Slot) -> str:
        """What is wrong with a slot's files, hashes included; empty when nothing is. Slow: not for the loop."""
        manifest = self.manifest(slot.digest)
        if manifest is None:
            return "no manifest of that digest"
        try:
            self.verify(slot.digest, manifest.variant(slot.variant).files, staged=False)
        except (KeyError, Rejected) as error:
            return str(error)
        return ""

    def set_aside(self, digest: str) -> bool:
        """A slot was found damaged: it is no slot any more, and what is fetched next starts anew. Returns whether there was one."""
        found = False
        doomed = self.staging / f"{digest}.old"
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.path(digest).rename(doomed)
            found = True
            sync_folder(self.root)
        shutil.rmtree(doomed, ignore_errors=True)
        return found

    def stage(self, digest: str) -> None:
        """Makes the staged folder the bundle's slot: sync, rename, sync. Doing it twice is doing it once.

        Raises:
            Degraded: ``not_enough_disk`` when the disk cannot take it.
        """
        source, target = self.staging_path(digest), self.path(digest)
        if not source.exists():
            return
        try:
            for path in sorted(source.rglob("*")):
                sync_folder(path) if path.is_dir() else sync_file(path)
            sync_folder(source)
            if target.exists():
                add(source, target)
            else:
                source.rename(target)
            sync_folder(self.root)
            shutil.rmtree(source, ignore_errors=True)
        except OSError as error:
            raise Degraded("not_enough_disk", f"{target}: {error.strerror}", advice="make room on the disk") from error

    def discard(self, digest: str) -> bool:
        """Drops what ``verify`` found wrong: where nothing is staged, the slot itself. Returns whether that was taken away.

        Of what is staged the wrong file is gone already, and the others stay for the next try.
        """
        return not self.staging_path(digest).exists() and self.set_aside(digest)
