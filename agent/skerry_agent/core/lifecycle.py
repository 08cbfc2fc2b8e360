"""The update lifecycle: one table (state, event) -> (state, effects) that can be printed.

Theory of operation. One update is under way at a time: one model goes from one bundle to another. The supervisor feeds
events to ``step``, stores the update that comes back, and only then carries out the effects; an effect's outcome is the
next event. So a power cut at any point finds a stored state, and ``Booted`` says what follows from it. Which bundle runs
is not decided here: the slots' pointer file says so, and only ``CONFIRM`` and the way back to the previous bundle (ordered by a
person, or after a crash loop) change it, once the bundle that comes back has proved itself.

Whoever may hold an update back (a lock of an application, a maintenance window, a wish to activate it by hand) holds it between
``stage`` and ``prove``, in ``ready``: all of it is here and checked, and what serves goes on. It waits there over restarts, too. Who comes
while it proves itself is asked before it answers, and it goes back to ``ready``.

``idle``, ``confirmed`` and ``confirmed_on_golden`` rest: the next ``Assigned`` starts from them. Every failure passes through
``revert`` to ``idle`` and keeps its reason code. A pair that the table lacks is an answer that came too late: ``step``
ignores it.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from skerry_contract.window import Instant

from skerry_agent.core import effects as e
from skerry_agent.core.effects import Effect

State = Literal[
    "idle", "fetch", "verify", "stage", "ready", "prove", "trial", "confirmed", "confirmed_on_golden", "revert"
]
STATES: tuple[State, ...] = (
    "idle", "fetch", "verify", "stage", "ready", "prove", "trial", "confirmed", "confirmed_on_golden", "revert",
)  # fmt: skip
RESTING: frozenset[State] = frozenset({"idle", "confirmed", "confirmed_on_golden"})
CONFIRMED: frozenset[State] = RESTING - {"idle"}

DEADLINES_S: dict[State, float] = {
    "fetch": 3600.0, "verify": 600.0, "stage": 120.0, "ready": 31 * 86_400.0, "prove": 180.0, "revert": 240.0,
}  # fmt: skip
"""How long a state may last, seconds; ``fetch``: while it gets no further, and at the least. A way back has more time than the way in: what came up within that has to come back. ``ready`` counts
over restarts. The trial's time comes from the group's settings; ``TRIAL_OVER_S`` and the drain's time come on top."""
TRIAL_OVER_S = 120.0
"""A trial that is over for so long and could not be judged goes back: its worker says nothing, or the hand-over never ended."""
LEAST_KIB_S = 8.0
"""A download that is slower ends as ``timeout``, keeps what came and waits for its next try; see ``fetch_s``."""
MOST_OVERDUE = 3
"""So many deadlines of a way back may pass; then it ends, and what did not come back is tried on and on in the background."""
MOST_MOVES = 28
"""So often an update may move from state to state, all its attempts together, as Mender counts them. It is counted on disk with the state.

Attempts that ended for want of a network, of room, or of power before anything was started do not count: they wait, longer each time, and
do not go in circles. A person's pardon starts anew, also in the middle of an attempt.
"""

ATTEMPTS: dict[str, int] = {
    "hash_mismatch": 3, "size_mismatch": 3, "malformed_manifest": 1, "download_wasted": 3, "cannot_decrypt": 3,
    "model_damaged": 2, "operator_unknown": 1, "golden_failed": 1, "runtime_crashed": 2, "start_timeout": 2,
    "trial_crashed": 1, "trial_errors": 1, "trial_slow": 1, "reverted_by_operator": 1, "crash_loop": 1,
    "worker_leaked": 1, "worker_spun": 1, "trial_silent": 2, "cancelled": 1, "too_many_moves": 1,
    "runtime_crashed@boot": 3, "trial_crashed@boot": 2, "too_many_moves@boot": 1, "crash_loop@boot": 2,
    "interrupted@trial": 12,
}  # fmt: skip
"""How often a bundle may fail for a reason before it is refused with ``attempts_exhausted``, until a person clears it.

Codes that are not here never exhaust: they speak of the network, of who served or signed the metadata, or of this device's room, which change.
``@boot`` marks an update that ended with the supervisor's own process: a power cut is likelier than the bundle's fault. ``@trial``: an agent
that is stopped in order in a trial, each time, is stopped for the bundle's sake, or never runs for as long as a trial lasts.
"""

MOMENTARY: frozenset[str] = frozenset(
    {
        "process_not_started", "not_enough_memory", "not_enough_disk", "storage_failed", "store_full", "store_busy", "store_failed",
        "timeout", "mirror_wrong", "interrupted",
    }
)  # fmt: skip
"""Codes of a moment's pressure or of others' doing, in whatever state: the bundle waits longer each time, and is never given up for them."""


def left_s(state: State, in_it_s: float, *, trial_s: float = 0.0, drain_s: float = 0.0) -> float | None:
    """What is left of the state's time; None where it has none.

    Args:
        in_it_s: since it was entered, former lives of the agent included where it is kept over them (``ready``).
        trial_s, drain_s: of a trial, by the settings that hold now.
    """
    limit_s = trial_s + drain_s + TRIAL_OVER_S if state == "trial" else DEADLINES_S.get(state)
    return None if limit_s is None else max(0.0, limit_s - in_it_s)


def fetch_s(size_bytes: int, max_kib_s: int) -> float:
    """How long a download may last that gets further: its files' size at ``LEAST_KIB_S``, or at half the group's rate where that is less.

    Args:
        max_kib_s: the rate that the group allows, 0 for any.

    >>> [fetch_s(size, 0) for size in (0, 10_000_000, 500_000_000)]
    [3600.0, 3600.0, 61035.15625]
    >>> fetch_s(500_000_000, 4)
    244140.625
    """
    rate_kib_s = min(LEAST_KIB_S, max_kib_s / 2) if max_kib_s else LEAST_KIB_S
    return max(DEADLINES_S["fetch"], size_bytes / (rate_kib_s * 1024))


def lain_s(noted_s: float, since: Instant, now: Instant) -> float:
    """How long an update has lain in its state, over boots: by what was noted while the agent ran, or by the clock where it can be trusted.

    Args:
        noted_s: what the boots before this one add up to, as far as it was noted.
        since: when it came into the state.
    """
    here_s = (now.boot_ns - (since.boot_ns if since.boot_id == now.boot_id else 0)) / 1e9
    by_clock_s = (now.wall_ms - since.wall_ms) / 1e3 if since.synced and now.synced else 0.0
    return max(0.0, noted_s + here_s, by_clock_s)


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """The update under way or last ended; stored as it is.

    Attributes:
        attempt: of this bundle, from 1.
        since: when the state was entered.
        code, detail: why it failed; empty while nothing did.
        failed_in: the state that failed, for ``revert`` and after it.
        at_boot: it ended with the supervisor's process.
        moves: see ``MOST_MOVES``; overdue: deadlines of this state that passed.
        lay_since: of one that proves itself: since when it had lain ready, if it had.
    """

    state: State = "idle"
    model: str = ""
    digest: str = ""
    version: str = ""
    variant: str = ""
    arm: e.Arm = "none"
    rollout: str = ""
    stage: int = 0
    attempt: int = 0
    since: Instant = Instant("", 0, 0, False)
    code: str = ""
    detail: str = ""
    failed_in: str = ""
    at_boot: bool = False
    moves: int = 0
    overdue: int = 0
    lay_since: Instant | None = None

    @property
    def waits(self) -> bool:
        """Whether it ended for want of something outside, or of a wish: no circle, however often that happens."""
        outside = self.failed_in == "fetch" and not self.at_boot and self.code not in ATTEMPTS
        return outside or self.code in MOMENTARY or self.code in ("withdrawn", "yielded", "activation_overdue")

    @property
    def resting(self) -> bool:
        """Whether nothing is under way."""
        return self.state in RESTING

    @property
    def penalty(self) -> str:
        """The entry of ``ATTEMPTS`` that this failure counts under."""
        if self.code == "interrupted" and self.failed_in == "trial":
            return f"{self.code}@trial"
        return f"{self.code}@boot" if self.at_boot else self.code


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the table. ``code`` is the reason when the event brings none."""

    to: State
    effects: tuple[Effect, ...] = ()
    code: str = ""


GIVE_UP = Move(to="idle", effects=(Effect.GIVE_UP, Effect.RECORD))
"""How a way back ends that does not come to its end."""


def _table() -> dict[tuple[State, type[e.Event]], Move]:
    record, discard, penalise = Effect.RECORD, Effect.DISCARD, Effect.PENALISE
    table: dict[tuple[State, type[e.Event]], Move] = {
        ("fetch", e.ManifestFetched): Move(to="fetch", effects=(Effect.ADMIT,)),
        ("fetch", e.Admitted): Move(to="fetch", effects=(Effect.FETCH_FILES,)),
        ("fetch", e.FilesFetched): Move(to="verify", effects=(record, Effect.VERIFY_FILES)),
        ("verify", e.Verified): Move(to="stage", effects=(record, Effect.STAGE_SLOT)),
        ("stage", e.Staged): Move(to="prove", effects=(record, Effect.START_WORKER)),
        ("stage", e.Held): Move(to="ready", effects=(record,)),
        ("ready", e.Held): Move(to="ready", effects=(record,)),
        ("ready", e.Opened): Move(to="prove", effects=(record, Effect.START_WORKER)),
        ("prove", e.Held): Move(to="ready", effects=(record,)),
        ("prove", e.Proved): Move(to="trial", effects=(record, Effect.HAND_OVER)),
        ("trial", e.HandedOver): Move(to="trial", effects=(Effect.WATCH_TRIAL,)),
        ("trial", e.Rekeyed): Move(to="trial", effects=(record,)),
        ("trial", e.TrialKept): Move(to="confirmed", effects=(Effect.CONFIRM, record)),
        ("trial", e.TrialQuiet): Move(to="confirmed_on_golden", effects=(Effect.CONFIRM, record)),
        ("revert", e.Reverted): Move(to="idle", effects=(record,)),
        # What should come back does not start: what serves goes on, and the plan fetches what is missing.
        ("revert", e.Failed): Move(to="idle", effects=(record,)),
        ("revert", e.Deadline): Move(to="revert", effects=(Effect.RESTORE,)),
        ("revert", e.Cancelled): GIVE_UP,
        # What a restarted supervisor finds. It runs what the pointer file calls confirmed, whatever stands here.
        ("ready", e.Booted): Move(to="ready", effects=(record,)),
        ("prove", e.Booted): Move(to="idle", effects=(penalise, record), code="runtime_crashed"),
        ("trial", e.Booted): Move(to="idle", effects=(penalise, record), code="trial_crashed"),
        ("revert", e.Booted): Move(to="idle", effects=(record,)),
        # Who ends in order says so: it was not the bundle. It begins again after the start; out of a trial after a wait, since what answers badly
        # may be why somebody stops the agent.
        ("prove", e.Stopped): Move(to="idle", effects=(record,), code="interrupted"),
        ("trial", e.Stopped): Move(to="idle", effects=(penalise, record), code="interrupted"),
        # Recorded again: power may have failed between the stored state and the word of it. What was said is not said twice.
        ("idle", e.Booted): Move(to="idle", effects=(record,)),
        ("confirmed", e.Booted): Move(to="confirmed", effects=(Effect.CONFIRM, record)),
        ("confirmed_on_golden", e.Booted): Move(to="confirmed_on_golden", effects=(Effect.CONFIRM, record)),
    }
    fetching: tuple[State, ...] = ("fetch", "verify", "stage", "ready")
    for state in fetching:
        table[state, e.Failed] = Move(to="revert", effects=(penalise, record, discard))
        table[state, e.Deadline] = Move(to="revert", effects=(penalise, record, discard), code="timeout")
        table[state, e.Withdrawn] = Move(to="revert", effects=(record, discard), code="withdrawn")
        table[state, e.Cancelled] = Move(to="revert", effects=(penalise, record, discard), code="cancelled")
        table[state, e.Yielded] = Move(to="revert", effects=(record, discard), code="yielded")
        table.setdefault((state, e.Booted), Move(to="idle", effects=(penalise, record), code="interrupted"))
    table["ready", e.Deadline] = Move(to="revert", effects=(penalise, record, discard), code="activation_overdue")
    table["prove", e.Failed] = Move(to="revert", effects=(penalise, record, Effect.STOP_NEW))
    table["prove", e.Deadline] = Move(to="revert", effects=(penalise, record, Effect.STOP_NEW), code="start_timeout")
    table["prove", e.Withdrawn] = Move(to="revert", effects=(record, Effect.STOP_NEW), code="withdrawn")
    table["prove", e.Yielded] = Move(to="revert", effects=(record, Effect.STOP_NEW), code="yielded")
    table["prove", e.Cancelled] = Move(to="revert", effects=(penalise, record, Effect.STOP_NEW), code="cancelled")
    table["trial", e.Deadline] = Move(to="revert", effects=(penalise, record, Effect.RESTORE), code="trial_silent")
    table["trial", e.Cancelled] = Move(to="revert", effects=(penalise, record, Effect.RESTORE), code="cancelled")
    table["trial", e.Failed] = Move(to="revert", effects=(penalise, record, Effect.RESTORE))
    table["trial", e.Withdrawn] = Move(to="revert", effects=(record, Effect.RESTORE), code="withdrawn")
    table["trial", e.Yielded] = Move(to="revert", effects=(record, Effect.RESTORE), code="yielded")
    table["trial", e.RevertOrdered] = Move(
        to="revert", effects=(penalise, record, Effect.RESTORE), code="reverted_by_operator"
    )
    resting: tuple[State, ...] = ("idle", "confirmed", "confirmed_on_golden")
    for state in resting:
        table[state, e.Assigned] = Move(to="fetch", effects=(record, Effect.FETCH_MANIFEST))
        table[state, e.RevertOrdered] = Move(
            to="revert", effects=(penalise, record, Effect.RESTORE), code="reverted_by_operator"
        )
        table[state, e.ForcedOut] = Move(to="revert", effects=(record, Effect.RESTORE))
        table[state, e.CrashLooped] = Move(to="revert", effects=(penalise, record, Effect.RESTORE), code="crash_loop")
    return table


TABLE = _table()

STEPS_BACK: frozenset[str] = frozenset({"reverted_by_operator", "crash_loop"})
"""Codes of a revert from a confirmed bundle to the one before it."""
STEPS_BACK_EVENTS = (e.RevertOrdered, e.CrashLooped)
"""What begins one."""


def steps_back(update: Update) -> bool:
    """Whether the update is such a revert, which has not been given up."""
    return update.code in STEPS_BACK and update.failed_in in RESTING


def given_up(update: Update, why: str) -> Update:
    """Such a revert that ends before its end: what had to go stays confirmed, and no start goes that way on."""
    detail = f"the way back was given up ({why}): {update.version} goes on"
    return msgspec.structs.replace(update, failed_in="revert", detail=detail)


def restores(update: Update) -> bool:
    """Whether the update is a revert from a bundle that served: what ran before it is being brought up."""
    return update.state == "revert" and (update.failed_in == "trial" or update.failed_in in RESTING)


CRASHES, CRASHES_WITHIN_S = 5, 600.0
"""So often a confirmed bundle may bring its worker down within so many seconds; then the one before it is worth more."""


def step(update: Update, event: e.Event, at: Instant) -> tuple[Update, tuple[Effect, ...]]:
    """The update after an event, and what to do once it is stored.

    Args:
        update: as last stored.
        event: what happened.
        at: when; becomes ``since`` when the state changes.

    Returns:
        The new update and its effects; the same update and none for a pair that the table lacks.
    """
    move = TABLE.get((update.state, type(event)))
    if move is None:
        return update, ()
    # Who waits for a lock or a window goes in no circle, however often one comes.
    waits = isinstance(event, (e.Held, e.Opened))
    moves = update.moves + ((move.to != update.state and not waits) or isinstance(event, e.Deadline))
    if isinstance(event, e.Booted) and event.further:
        # It gets somewhere: no reason to wait.
        moves = 0
        move = msgspec.structs.replace(move, effects=tuple(e for e in move.effects if e is not Effect.PENALISE))
    overdue = update.overdue + 1 if update.state == "revert" and isinstance(event, e.Deadline) else 0
    if overdue >= MOST_OVERDUE:
        move = GIVE_UP
    elif moves > MOST_MOVES and not isinstance(event, e.Stopped):
        move = _stopped(update.state, move)
    changed: dict[str, object] = {"state": move.to, "moves": moves, "overdue": overdue}
    if move.to != update.state:
        # Who goes back to wait has waited since it first did: its month does not begin anew.
        changed["since"] = at if move.to != "ready" or update.lay_since is None else update.lay_since
        changed["lay_since"] = update.since if update.state == "ready" and move.to == "prove" else None
    match event:
        case e.Assigned():
            begun = msgspec.structs.asdict(event) | {"moves": event.moves + 1}
            return Update(state=move.to, since=at, **begun), move.effects
        case e.CrashLooped() | e.ForcedOut():
            update = Update(failed_in=update.state, attempt=1, **msgspec.structs.asdict(event))
        case e.RevertOrdered() if update.state != "trial":
            ordered = msgspec.structs.asdict(event)
            update = Update(failed_in=update.state, attempt=1, **ordered)
        case e.Admitted():
            changed["variant"] = event.variant
        case e.Rekeyed():
            changed.update(arm=event.arm, rollout=event.rollout, stage=event.stage)
        case e.Opened():
            changed["detail"] = ""
        case e.TrialKept() | e.TrialQuiet() | e.Cancelled() | e.Held() | e.Yielded() if move is not GIVE_UP:
            changed["detail"] = event.detail
        case _:
            pass
    failing = move.to == "revert" and update.state != "revert"
    if isinstance(event, e.Failed) and failing:
        changed.update(code=event.code, detail=event.detail)
    elif isinstance(event, e.Failed) and update.state == "revert":
        # Why it had to go stays; that what ran before does not come is said behind it.
        changed["detail"] = "; ".join(filter(None, (update.detail, f"the way back: {event.code}: {event.detail}")))
    elif move.code:
        changed["code"] = move.code
    if move.code == "too_many_moves":
        changed["detail"] = f"it moved {moves} times from state to state and was never confirmed"
    if failing or (isinstance(event, e.Booted | e.Stopped) and move.code):
        changed["failed_in"] = update.failed_in or update.state
        changed["at_boot"] = isinstance(event, e.Booted)
    after = msgspec.structs.replace(update, **changed)
    if steps_back(update) and (move is GIVE_UP or isinstance(event, e.Failed)):
        ended = f"{overdue} deadlines passed"
        if isinstance(event, e.Cancelled | e.Failed):
            ended = ": ".join(filter(None, (getattr(event, "code", ""), event.detail)))
        after = given_up(after, ended)
    return after, move.effects


def _stopped(state: State, move: Move) -> Move:
    """What becomes of a move too many: the update goes home instead of on."""
    if move.to == "revert" and state != "revert":
        return move
    if state == "revert":
        return GIVE_UP if move.to == "revert" else move
    if move.to == "idle":
        return Move(to="idle", effects=(Effect.PENALISE, Effect.RECORD), code="too_many_moves")
    if move.to in RESTING or state in RESTING:
        return move
    return Move(to="revert", effects=TABLE[state, e.Failed].effects, code="too_many_moves")


def printed() -> str:
    """The table as text: one line per cell, states in order, then deadlines and attempt limits."""
    lines = ["state               event            -> state               effects"]
    for state in STATES:
        for event in e.EVENTS:
            move = TABLE.get((state, event))
            if move is None:
                continue
            reason = f" [{move.code}]" if move.code else ""
            names = ", ".join(effect.name.lower() for effect in move.effects) or "-"
            lines.append(f"{state:<19} {event.__name__:<16} -> {move.to:<19} {names}{reason}")
    lines += ["", "deadlines, seconds: " + ", ".join(f"{state} {limit:g}" for state, limit in DEADLINES_S.items())]
    lines[-1] += f", trial as the group's settings say and {TRIAL_OVER_S:g} more"
    lines.append(f"a revert ends at its deadline number {MOST_OVERDUE}; an update ends after {MOST_MOVES} moves")
    lines.append("attempts by reason: " + ", ".join(f"{code} {limit}" for code, limit in ATTEMPTS.items()))
    return "\n".join(lines)
