"""Bundles on disk, and the pointer file that says which of them run.

``slots/.staging/<digest>/`` grows by download; when every file has the sha256 of the manifest it becomes ``slots/<digest>/`` by
one rename, and never changes again; files that came in part lie in ``slots/.parts/`` by their content. ``slots/pointers.json`` names per model what is confirmed, what it replaced and what
answers requests now; it is written whole, synced and renamed. It stands beside the database and does not need it: with
a lost database the device still runs what it had confirmed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Literal

import msgspec
from skerry_contract import manifest as m
from skerry_contract.errors import ContractError

from skerry_agent import memory_folder
from skerry_agent.core.effects import Arm
from skerry_agent.errors import Degraded, Rejected
from skerry_agent.logs import kv

log = logging.getLogger(__name__)

_POINTERS = "pointers.json"
PARTS = ".parts"
"""The courier's folder of files that came in part, by their sha256."""
KEYS = ".keys"
"""The courier's folder of wrapped content keys, by digest."""
STAGED_MANIFEST = ".manifest.json"
"""The manifest of a bundle whose files are still coming."""
_CHUNK = 1 << 20

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


class Slots:
    """The folder ``slots``.

    What leads forward (``activate``, ``confirm``) is on disk when the method returns, or it raises and nothing changed. What leads back
    holds at once, also on a disk that takes no file: then it is on disk with the next change, or with ``settle``.

    Attributes:
        opened: where encrypted bundles lie in the clear, one folder each, in memory; None: nowhere.
        kept: digests that no pointer names and that stay: bundles in shadow.
        in_use: digests that workers serve or load, whatever the pointers name.
        forbidden: whether a version of a model must not serve any more; asked with both names.
    """

    def __init__(self, root: Path, opened: Path | None = None) -> None:
        self.root = root
        self.opened = opened
        self.staging = root / ".staging"
        if not self.staging.exists():
            self.staging.mkdir(parents=True, mode=0o700, exist_ok=True)
            root.chmod(0o700)
            _sync_folder(root)
            # What is confirmed in it later is worth nothing under a name that power takes away.
            _sync_folder(root.parent)
        self.damage = ""
        self._stay = ""
        self.kept: set[str] = set()
        self.in_use: Callable[[], Collection[str]] = tuple
        self.forbidden: Callable[[str, str], bool] = lambda _model, _version: False
        self._models = self._read()
        self._on_disk = self._models

    # --- pointers ----------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Pointers]:
        path = self.root / _POINTERS
        try:
            return read_pointers(self.root)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # Renames are atomic, so only the medium or a hand can have done this. The slots themselves are whole.
            self.damage = f"{path}: {error}"
            with contextlib.suppress(OSError):
                # On a disk that takes no change it stays where it is: what runs is fetched anew all the same.
                path.replace(path.with_name(_POINTERS + ".damaged"))
            return {}

    def _write(self, model: str, pointers: Pointers) -> None:
        self._put({**self._models, model: pointers})

    def _write_back(self, model: str, pointers: Pointers) -> None:
        """Of a way back: it is gone whatever the disk says."""
        self._models = {**self._models, model: pointers}
        self.settle()

    @property
    def unwritten(self) -> bool:
        """Whether the pointer file lacks a way back that was gone."""
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
        temporary = self.root / (_POINTERS + ".new")
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(_File(schema=1, models=models)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.root / _POINTERS)
        _sync_folder(self.root)
        self._models = self._on_disk = models

    def models(self) -> tuple[str, ...]:
        """Names that have pointers, sorted."""
        return tuple(sorted(self._models))

    def pointers(self, model: str) -> Pointers:
        """Of one model; all None when it never ran."""
        return self._models.get(model, Pointers())

    def answering(self, model: str) -> Slot | None:
        """What should answer requests now, when it is whole on disk."""
        now = self.pointers(model)
        slot = now.active or now.confirmed
        return slot if slot is not None and self.may_serve(model, slot) else None

    def may_serve(self, model: str, slot: Slot) -> bool:
        """Whether it is whole on disk, and no forced floor stands above it."""
        return not self.forbidden(model, slot.version) and self.whole(slot.digest, slot.variant)

    def activate(self, model: str, slot: Slot) -> None:
        """``slot`` answers requests now; what is confirmed stays."""
        self._write(model, msgspec.structs.replace(self.pointers(model), active=slot))

    def confirm(self, model: str, slot: Slot) -> None:
        """``slot`` is what a boot starts from now on. Doing it twice is doing it once."""
        now = self.pointers(model)
        same = now.confirmed is not None and now.confirmed.digest == slot.digest
        self._write(model, Pointers(confirmed=slot, previous=now.previous if same else now.confirmed, active=slot))

    def revert_active(self, model: str) -> None:
        """A trial is over: what is confirmed answers again."""
        now = self.pointers(model)
        if now.active != now.confirmed:
            self._write_back(model, msgspec.structs.replace(now, active=now.confirmed))

    def step_back(self, model: str) -> bool:
        """A person's revert: previous becomes confirmed, and there is nothing before it. False without a previous."""
        now = self.pointers(model)
        if now.previous is None:
            return False
        back = msgspec.structs.replace(now.previous, arm="none", rollout="", stage=0)
        self._write_back(model, Pointers(confirmed=back, previous=None, active=back))
        return True

    def rekey(self, model: str, *, arm: Arm, rollout: str, stage: int) -> None:
        """The active bundle counts under another key; the confirmed one too when it is the same."""
        now = self.pointers(model)

        def keyed(slot: Slot | None) -> Slot | None:
            if slot is None or now.active is None or slot.digest != now.active.digest:
                return slot
            return msgspec.structs.replace(slot, arm=arm, rollout=rollout, stage=stage)

        self._write_back(
            model, Pointers(confirmed=keyed(now.confirmed), previous=now.previous, active=keyed(now.active))
        )

    def runnable(self, model: str, *, unless: Collection[str] = ()) -> Slot | None:
        """What a boot starts of a model: confirmed, else previous, whichever is whole and not in ``unless`` (digests)."""
        pointers = self.pointers(model)
        for slot in (pointers.confirmed, pointers.previous):
            if slot is not None and slot.digest not in unless and self.may_serve(model, slot):
                return slot
        return None

    def boot(self) -> tuple[dict[str, Slot], list[str]]:
        """What to run after a start, per model: confirmed, else previous, whichever is whole.

        Returns:
            The slots, and a line about each that should run and cannot.
        """
        found: dict[str, Slot] = {}
        complaints: list[str] = []
        self._drop_scraps()
        for model in self.models():
            pointers = self.pointers(model)
            for slot in (pointers.confirmed, pointers.previous):
                if slot is None or self.forbidden(model, slot.version):
                    continue
                if self.whole(slot.digest, slot.variant):
                    found[model] = slot
                    break
                complaints.append(f"{model} {slot.version} ({slot.digest[:12]}) is not whole on disk")
            self.revert_active(model)
        return found, complaints

    # --- folders -----------------------------------------------------------------------------------------------------

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
            fault = _fault(folder / file.path, file)
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
            _sync_folder(self.root)
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
                _sync_folder(path) if path.is_dir() else _sync_file(path)
            _sync_folder(source)
            if target.exists():
                self._add(source, target)
            else:
                source.rename(target)
            _sync_folder(self.root)
            shutil.rmtree(source, ignore_errors=True)
        except OSError as error:
            raise Degraded("not_enough_disk", f"{target}: {error.strerror}", advice="make room on the disk") from error

    def _add(self, source: Path, target: Path) -> None:
        """To a slot that lacks a variant's files, or was damaged. File by file, since what another variant runs from stays at every moment.

        What rotted in it goes; its manifest comes last.
        """
        named = {file.path: file.sha256 for file in m.parse((source / m.MANIFEST_FILE).read_bytes()).files()}
        for held in [path for path in target.rglob("*") if path.is_file()]:
            name = str(held.relative_to(target))
            if name != m.MANIFEST_FILE and not (source / name).exists() and _sha256(held) != named.get(name):
                held.unlink()
        files = [path for path in source.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path == source / m.MANIFEST_FILE):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        for folder in (*(path for path in target.rglob("*") if path.is_dir()), target):
            _sync_folder(folder)

    def discard(self, digest: str) -> bool:
        """Drops what ``verify`` found wrong: where nothing is staged, the slot itself. Returns whether that was taken away.

        Of what is staged the wrong file is gone already, and the others stay for the next try.
        """
        return not self.staging_path(digest).exists() and self.set_aside(digest)

    def collect(self, keep: Collection[str]) -> tuple[str, ...]:
        """Removes bundles that no pointer names and ``keep`` does not either. Returns their digests."""
        named = self._stays(keep)
        gone: list[str] = []
        stay = ""
        for digest in self.digests():
            if digest in named:
                continue
            # Renamed first: a folder half removed must not look like a slot.
            doomed = self.staging / f"{digest}.old"
            shutil.rmtree(doomed, ignore_errors=True)
            try:
                self.path(digest).rename(doomed)
            except OSError as error:
                # A card that can only be read any more, say. Nothing waits for this.
                stay = str(error)
                continue
            shutil.rmtree(doomed, ignore_errors=True)
            gone.append(digest)
        for entry in self.staging.iterdir():
            if entry.name.removesuffix(".old") not in named or entry.name.endswith(".old"):
                shutil.rmtree(entry, ignore_errors=True)
        stay = self._drop_other_variants() or stay
        self._drop_secrets(named)
        if stay and stay != self._stay:
            log.error("bundle not removed", extra=kv(detail=stay))
        self._stay = stay
        return tuple(gone)

    def _named(self) -> list[Slot]:
        """What the pointers name, those on disk too where it takes no others."""
        every = (*self._models.values(), *self._on_disk.values())
        return [slot for p in every for slot in (p.confirmed, p.previous, p.active) if slot is not None]

    def _stays(self, keep: Collection[str]) -> set[str]:
        return {*keep, *self.kept, *self.in_use(), *(slot.digest for slot in self._named())}

    def spare(self, keep: Collection[str]) -> tuple[int, int]:
        """What ``collect`` would make room for on the disk: bytes, and files."""
        named = self._stays(keep)
        doomed = [self.path(digest) for digest in self.digests() if digest not in named]
        doomed += [entry for entry in self.staging.iterdir() if entry.name not in named]
        total, files = 0, 0
        for folder in doomed:
            for path in folder.rglob("*"):
                with contextlib.suppress(OSError):
                    found = path.stat()
                    # A file with another name elsewhere frees nothing.
                    total += found.st_blocks * 512 if found.st_nlink == 1 or path.is_dir() else 0
                    files += found.st_nlink == 1 or path.is_dir()
        return total, files

    def _drop_secrets(self, named: Collection[str]) -> None:
        """Wrapped keys, and bundles in the clear, that belong to nothing here any more."""
        with contextlib.suppress(OSError):
            for path in (self.root / KEYS).iterdir():
                if path.stem not in named:
                    path.unlink(missing_ok=True)
        if self.opened is not None:
            memory_folder.drop(self.opened, lambda name: name not in named and not name.startswith("."))

    def _drop_scraps(self) -> None:
        """What couriers of an earlier life left half opened; none runs yet."""
        if self.opened is not None:
            memory_folder.drop(self.opened, lambda name: name.startswith("."))

    def _drop_other_variants(self) -> str:
        """Files of variants that no pointer names any more: a worker reads every file that is there, and one that rots stops it.

        Returns:
            Why one stays; empty where none does.
        """
        needed: dict[str, set[str]] = {}
        stay = ""
        for slot in self._named():
            if (variant := self.variant(slot)) is not None:
                needed.setdefault(slot.digest, set()).update(file.path for file in variant.files)
        for digest, paths in needed.items():
            manifest = self.manifest(digest)
            for file in manifest.files() if manifest is not None else ():
                if file.path not in paths:
                    try:
                        (self.path(digest) / file.path).unlink(missing_ok=True)
                    except OSError as error:
                        stay = str(error)
        return stay

    def size_bytes(self) -> int:
        """What all bundles take, staging included."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())


def read_pointers(root: Path) -> dict[str, Pointers]:
    """The pointer file of a folder of slots; empty when there is none yet.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError: it is damaged.
    """
    try:
        return dict(msgspec.json.decode((root / _POINTERS).read_bytes(), type=_File).models)
    except FileNotFoundError:
        return {}


def _fault(path: Path, file: m.File) -> Rejected | None:
    """What is wrong with a file; None when it is the manifest's."""
    try:
        size = path.stat().st_size
        if size != file.size:
            return Rejected("size_mismatch", f"{file.path}: wanted {file.size} bytes, got {size}")
        got = _sha256(path)
    except OSError as error:
        return Rejected("size_mismatch", f"{file.path}: {error.strerror}")
    if got != file.sha256:
        return Rejected("hash_mismatch", f"{file.path}: wanted sha256 {file.sha256}, got {got}")
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
