"""Every event and every effect of an update, on one page.

Events are what happened, with what is needed to decide; effects name what the supervisor then carries out on the update
at hand. ``lifecycle`` joins them. An effect that takes time answers with an event.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

Arm = Literal["none", "control", "candidate"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events."""


class Assigned(Event, frozen=True, kw_only=True):
    """The group document gives this device another bundle of ``model``. ``attempt`` counts from 1.

    ``moves``: those of its earlier attempts, see ``lifecycle.MOST_MOVES``.
    """

    model: str
    digest: str
    version: str
    arm: Arm = "none"
    rollout: str = ""
    stage: int = 0
    attempt: int = 1
    moves: int = 0


class ManifestFetched(Event, frozen=True, kw_only=True):
    """The manifest is here, listed by the catalog (or of a bundle that this device confirmed before)."""


class Admitted(Event, frozen=True, kw_only=True):
    """The bundle may run here, as ``variant``."""

    variant: str


class FilesFetched(Event, frozen=True, kw_only=True):
    """All files lie in the staging folder."""


class Verified(Event, frozen=True, kw_only=True):
    """Every file has the size and sha256 that the manifest names."""


class Staged(Event, frozen=True, kw_only=True):
    """The slot is on disk, whole."""


class Held(Event, frozen=True, kw_only=True):
    """The slot is on disk, and may not be started yet. ``detail``: what holds it, and from when on that is over."""

    detail: str


class Opened(Event, frozen=True, kw_only=True):
    """Nothing holds the update any more."""


class Proved(Event, frozen=True, kw_only=True):
    """The new generation loaded its models and answered the golden cases right."""


class HandedOver(Event, frozen=True, kw_only=True):
    """The new generation answers requests; the old one is gone."""


class Rekeyed(Event, frozen=True, kw_only=True):
    """The same bundle now counts under another key: its rollout went on to another stage."""

    arm: Arm
    rollout: str
    stage: int


class TrialKept(Event, frozen=True, kw_only=True):
    """Enough traffic, and nothing against the new generation."""

    detail: str = ""


class TrialQuiet(Event, frozen=True, kw_only=True):
    """The trial's time is over without enough traffic and without anything against the new generation."""

    detail: str = ""


class Failed(Event, frozen=True, kw_only=True):
    """The step under way failed. ``code`` is of the update vocabulary."""

    code: str
    detail: str = ""


class Deadline(Event, frozen=True, kw_only=True):
    """The state's time is over."""


class Withdrawn(Event, frozen=True, kw_only=True):
    """The group document no longer gives this bundle to this device."""


class Yielded(Event, frozen=True, kw_only=True):
    """The update makes way: it is held, and another model's, which nothing holds, goes first; or a way back does. ``detail``: for what."""

    detail: str = ""


class Cancelled(Event, frozen=True, kw_only=True):
    """A person ends the update under way, here or through the server. ``detail``: who."""

    detail: str = ""


class RevertOrdered(Event, frozen=True, kw_only=True):
    """A person at the device wants the previous bundle back. The fields name the one that goes."""

    model: str
    digest: str
    version: str
    variant: str = ""


class CrashLooped(Event, frozen=True, kw_only=True):
    """The confirmed bundle killed its worker again and again. The fields name it; the previous one comes back.

    ``detail``: how, where it was not in the middle of an inference.
    """

    model: str
    digest: str
    version: str
    variant: str = ""
    detail: str = ""


class ForcedOut(Event, frozen=True, kw_only=True):
    """What serves is below a forced floor and must not answer any more. The fields name it."""

    model: str
    digest: str
    version: str
    variant: str = ""
    code: str
    detail: str = ""


class Reverted(Event, frozen=True, kw_only=True):
    """What ran before the update runs again, or nothing had to be changed."""


class Booted(Event, frozen=True, kw_only=True):
    """The supervisor started and found this update as it was last stored.

    ``further``: more of the bundle is here than at the last start, so that it gets somewhere, however often it is cut off.
    """

    further: bool = False


class Stopped(Event, frozen=True, kw_only=True):
    """The supervisor ends in order: its service is restarted, the machine shuts down."""


EVENTS: tuple[type[Event], ...] = (
    Assigned, ManifestFetched, Admitted, FilesFetched, Verified, Staged, Held, Opened, Proved, HandedOver, Rekeyed, TrialKept, TrialQuiet,
    Failed, Deadline, Withdrawn, Yielded, Cancelled, RevertOrdered, CrashLooped, ForcedOut, Reverted, Booted, Stopped,
)  # fmt: skip


class Effect(StrEnum):
    """What the supervisor does about the update at hand, in the order given, after the new state is on disk."""

    FETCH_MANIFEST = "fetch the manifest by courier"
    ADMIT = "ask admission"
    FETCH_FILES = "fetch the files by courier"
    VERIFY_FILES = "check size and sha256 of every file"
    STAGE_SLOT = "rename the staging folder to its slot"
    START_WORKER = "start the next generation and let it prove itself"
    HAND_OVER = "let the new generation listen, drain the old one"
    WATCH_TRIAL = "compare its health with what ran before"
    CONFIRM = "point confirmed at it, previous at what it replaced"
    DISCARD = "stop what is under way, remove what was staged"
    STOP_NEW = "end the new generation, which never listened"
    RESTORE = "start what ran before and hand back to it"
    GIVE_UP = "end the way back: what serves goes on, what does not is tried on and on beside whatever comes next"
    PENALISE = "count a failed attempt of this bundle"
    RECORD = "record an event and report the state"
