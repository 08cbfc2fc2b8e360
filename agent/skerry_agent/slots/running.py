"""Which bundles run: what a boot starts, what answers requests now, and how the pointer file follows an update.

It stands beside the database and does not need it: with a lost database the device still runs what it had confirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from skerry_agent.core.effects import Arm
from skerry_agent.slots.bundles import Bundles
from skerry_agent.slots.collecting import Collecting
from skerry_agent.slots.pointers import PointerFile, Pointers, Slot


class Slots(Bundles):
    """The folder ``slots``: its bundles, and which of them run.

    ``activate`` is on disk when the method returns, or it raises and nothing changed. All others hold at once, also on a disk that takes no
    file: then they are on disk with the next change, or with ``settle``.

    Attributes:
        damage: why the pointer file was set aside at the start; empty when it was not.
        kept: digests that no pointer names and that stay: bundles in shadow.
        in_use: digests that workers serve or load, whatever the pointers name.
        forbidden: whether a version of a model must not serve any more; asked with both names.
    """

    def __init__(self, root: Path, opened: Path | None = None) -> None:
        super().__init__(root, opened)
        self.kept: set[str] = set()
        self.in_use: Callable[[], Collection[str]] = tuple
        self.forbidden: Callable[[str, str], bool] = lambda _model, _version: False
        self._file = PointerFile(root)
        self._collecting = Collecting(self, pointed=self._file.named)
        self.damage = self._file.damage

    @property
    def unwritten(self) -> bool:
        """Whether the pointer file lacks something that holds."""
        return self._file.unwritten

    def settle(self) -> bool:
        """Writes what the pointer file lacks. Returns whether it lacks nothing now."""
        return self._file.settle()

    def models(self) -> tuple[str, ...]:
        """Names that have pointers, sorted."""
        return tuple(sorted(self._file.models))

    def pointers(self, model: str) -> Pointers:
        """Of one model; all None when it never ran."""
        return self._file.models.get(model, Pointers())

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
        self._file.write(model, msgspec.structs.replace(self.pointers(model), active=slot))

    def confirm(self, model: str, slot: Slot) -> None:
        """``slot`` is what a boot starts from now on. Doing it twice is doing it once."""
        now = self.pointers(model)
        same = now.confirmed is not None and now.confirmed.digest == slot.digest
        self._file.owe(model, Pointers(confirmed=slot, previous=now.previous if same else now.confirmed, active=slot))

    def revert_active(self, model: str) -> None:
        """A trial is over: what is confirmed answers again."""
        now = self.pointers(model)
        if now.active != now.confirmed:
            self._file.owe(model, msgspec.structs.replace(now, active=now.confirmed))

    def step_back(self, model: str) -> bool:
        """A person's revert: previous becomes confirmed, and there is nothing before it. False without a previous."""
        now = self.pointers(model)
        if now.previous is None:
            return False
        back = msgspec.structs.replace(now.previous, arm="none", rollout="", stage=0)
        self._file.owe(model, Pointers(confirmed=back, previous=None, active=back))
        return True

    def rekey(self, model: str, *, arm: Arm, rollout: str, stage: int) -> None:
        """The active bundle counts under another key; the confirmed one too when it is the same."""
        now = self.pointers(model)

        def keyed(slot: Slot | None) -> Slot | None:
            if slot is None or now.active is None or slot.digest != now.active.digest:
                return slot
            return msgspec.structs.replace(slot, arm=arm, rollout=rollout, stage=stage)

        self._file.owe(model, Pointers(confirmed=keyed(now.confirmed), previous=now.previous, active=keyed(now.active)))

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
        self._collecting.drop_scraps()
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

    def collect(self, keep: Collection[str]) -> tuple[str, ...]:
        """Removes bundles that no pointer names and ``keep`` does not either. Returns their digests."""
        return self._collecting.collect(self._stays(keep))

    def spare(self, keep: Collection[str]) -> tuple[int, int]:
        """What ``collect`` would make room for on the disk: bytes, and files."""
        return self._collecting.spare(self._stays(keep))

    def _stays(self, keep: Collection[str]) -> set[str]:
        return {*keep, *self.kept, *self.in_use(), *(slot.digest for slot in self._file.named())}
