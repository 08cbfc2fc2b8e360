"""From an assignment to a slot: the manifest, whether it may run here, its files.

These are the lifecycle's effects before a worker is started; when each is due is the table's (``updating``). Bytes come from a
courier, or from what lies here already; both are judged by their hash.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from skerry_contract import manifest as m

from skerry_agent import facts, opening
from skerry_agent.config import Config
from skerry_agent.core import admission
from skerry_agent.core import effects as e
from skerry_agent.core.lifecycle import Update
from skerry_agent.downloads import Downloads
from skerry_agent.errand import Errands
from skerry_agent.errors import Rejected
from skerry_agent.failures import Failures
from skerry_agent.fetched import Fetched
from skerry_agent.progress import FetchProgress
from skerry_agent.runtimes import Runtimes
from skerry_agent.slots import Slots
from skerry_agent.store import Store

_MOST_LACKED = 8


class Fetching:
    """See the module.

    Args:
        update: the one under way, as it is stored.
        errand_input: fields that every courier gets.
        downloads: how files come.
        progress: hears how far a download is.
        parked: the bundle that made way and has its turn again; empty for none.

    Attributes:
        manifest: what was fetched last, None before the first.
        progress: of the download under way; fetched: what it took.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        slots: Slots,
        errands: Errands,
        runtimes: Runtimes,
        failures: Failures,
        *,
        update: Callable[[], Update],
        errand_input: Callable[[], dict[str, Any]],
        progress: FetchProgress,
        downloads: Downloads,
        parked: Callable[[], str] = lambda: "",
    ) -> None:
        self._config = config
        self._store = store
        self._slots = slots
        self._errands = errands
        self._runtimes = runtimes
        self._failures = failures
        self._update = update
        self._errand_input = errand_input
        self.downloads = downloads
        self.progress = progress
        self.fetched = Fetched(store)
        self._parked = parked
        self._text = ""
        self.manifest: m.Manifest | None = None
        # What did not fit on the disk when it was tried last.
        self._lacked: dict[str, m.Manifest] = {}

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._config = config

    async def fetch_manifest(self) -> e.Event:
        """Brings the manifest of the update, from a slot that holds it or by a courier.

        Raises:
            Rejected: ``hash_mismatch`` or ``malformed_manifest``.
            AgentError: the courier's.
        """
        update = self._update()
        pointers = self._slots.pointers(update.model)
        # What this device confirmed itself needs no catalog to come back to, only to be above the floor.
        own = any(slot is not None and slot.digest == update.digest for slot in (pointers.confirmed, pointers.previous))
        manifest = self._slots.manifest(update.digest) if own else None
        if manifest is not None:
            self._text = (self._slots.path(update.digest) / m.MANIFEST_FILE).read_text()
        if manifest is None:
            answer = await self._errands.run(
                "manifest",
                {**self._errand_input(), "model": update.model, "version": update.version, "digest": update.digest},
                timeout_s=self._config.timing.courier_s,
            )
            self._text = str(answer.get("manifest", ""))
            data = self._text.encode()
            if m.digest(data) != update.digest:
                raise Rejected("hash_mismatch", f"manifest: wanted {update.digest}, got {m.digest(data)}")
            manifest = m.parse(data)
        if (manifest.model, manifest.version) != (update.model, update.version):
            raise Rejected(
                "malformed_manifest",
                f"wanted {update.model} {update.version}, the manifest says {manifest.model} {manifest.version}",
            )
        self.manifest = manifest
        return e.ManifestFetched()

    def admit(self) -> e.Event:
        """Chooses the variant.

        Raises:
            Rejected: with the reason for which it may not run here.
        """
        assert self.manifest is not None
        digest = self._update().digest
        keep = self._stays(digest)
        answer = self.admission(self.manifest, digest)
        if _lacks_room(answer) and not _lacks_room(
            self.admission(self.manifest, digest, spare=self._slots.spare(keep))
        ):
            # What waits for another try gives its room to what comes now, where that is enough.
            self._slots.collect(keep)
            answer = self.admission(self.manifest, digest)
        self._lacked.pop(digest, None)
        if isinstance(answer, admission.Refuse):
            if _lacks_room(answer):
                self._lacked = dict([*self._lacked.items(), (digest, self.manifest)][-_MOST_LACKED:])
            raise Rejected(answer.code, answer.detail)
        return e.Admitted(variant=answer.variant)

    def _stays(self, digest: str) -> set[str]:
        return {digest, self._parked()} - {""}

    def lacks_room(self, digest: str) -> bool:
        """Whether the bundle did not fit on the disk, and would not now: nothing is to make way for it."""
        manifest, update = self._lacked.get(digest), self._update()
        # What is under way keeps its files when it makes way.
        return manifest is not None and _lacks_room(
            self.admission(manifest, digest, spare=self._slots.spare({*self._stays(digest), update.digest}))
        )

    def admission(
        self, manifest: m.Manifest, digest: str, *, spare: tuple[int, int] = (0, 0)
    ) -> admission.Admit | admission.Refuse:
        """May the bundle run here, now? As which variant?

        Args:
            spare: bytes and files that could go from the disk for it.
        """
        pointers = self._slots.pointers(manifest.model)
        # What was confirmed here and comes back carries nothing over.
        own = pointers.previous is not None and pointers.previous.digest == digest
        confirmed = pointers.confirmed.version if pointers.confirmed is not None and not own else ""
        return admission.admit(
            manifest,
            facts.device(self._config, self._runtimes.usable, self._runtimes.broken),
            admission.Memory(
                floor=str(self._store.get("floors", {}).get(manifest.model, "")),
                confirmed=confirmed,
                failures=self._failures.of(digest),
                present_bytes=self._slots.present_bytes(digest, manifest.files()),
                idle_bytes=self._slots.idle_bytes(manifest.files()) + spare[0],
                idle_files=spare[1],
            ),
        )

    def _files(self) -> tuple[m.File, ...]:
        assert self.manifest is not None
        return self.manifest.variant(self._update().variant).files

    async def fetch_files(self) -> e.Event:
        """Brings what the slot lacks of the variant's files."""
        digest = self._update().digest
        if not self._slots.whole(digest, self._update().variant):
            assert self.manifest is not None
            self.progress.begin()
            self.fetched.begin()
            answer: dict[str, Any] | None = None
            # Once it is cut off, another update may be at hand.
            total = sum(file.size for file in self._files())
            try:
                answer = await self.downloads.run(
                    {
                        **self._errand_input(),
                        **facts.reserves(self._config),
                        "digest": digest,
                        "manifest": self._text,
                        "files": [{"path": f.path, "sha256": f.sha256, "size": f.size} for f in self._files()],
                        "variant": self._update().variant,
                        "held": held(self._slots, self._update().model),
                        "opened": opening.for_download(self._config, self._slots, self.manifest),
                    },
                    on_progress=self._take_progress,
                )
            finally:
                self.progress.end()
                self.fetched.end(digest, total, answer)
        return e.FilesFetched()

    def _take_progress(self, said: dict[str, Any]) -> None:
        self.progress.take(said)
        self.fetched.take(said)

    async def verify_files(self) -> e.Event:
        """Reads every file of the variant again, and judges it by its hash."""
        await asyncio.to_thread(self._slots.verify, self._update().digest, self._files())
        return e.Verified()

    async def stage(self) -> e.Event:
        """What was fetched becomes a slot."""
        await asyncio.to_thread(self._slots.stage, self._update().digest)
        return e.Staged()

    def bytes_here(self) -> int:
        """How much of the update's bundle has come, files in part included."""
        return self._slots.coming_bytes(self._update().digest)

    def has_another_variant(self, update: Update) -> bool:
        """Whether the update failed for a runtime that does not work here, and another variant of the bundle may run."""
        if update.failed_in != "prove" or self.manifest is None:
            return False
        if not self._runtimes.lacks(self.manifest.variant(update.variant)):
            return False
        return isinstance(self.admission(self.manifest, update.digest), admission.Admit)

    def discard(self) -> None:
        """Drops what was found wrong on this disk. What was fetched right stays for the next try."""
        update = self._update()
        wrong = update.code in ("hash_mismatch", "size_mismatch", "malformed_manifest")
        # What could not be fetched is not here; a slot was not even looked at.
        if wrong and update.failed_in != "fetch" and self._slots.discard(update.digest):
            # It was this device's own copy that rotted: nothing is said about the bundle.
            self._failures.forgive(update.digest)


def _lacks_room(answer: admission.Admit | admission.Refuse) -> bool:
    return isinstance(answer, admission.Refuse) and answer.code == "not_enough_disk"


def held(slots: Slots, model: str) -> list[dict[str, str]]:
    """What this device has of a model and a delta may lead from, the likeliest first."""
    pointers = slots.pointers(model)
    found = {
        (slot.digest, slot.variant): None
        for slot in (pointers.active, pointers.confirmed, pointers.previous)
        if slot is not None
    }
    return [{"digest": digest, "variant": variant} for digest, variant in found]
