"""What this device does, since when, what it waits for and what a person can do, in plain words. Pure.

It is asked on the device, without any server; what a server knows beside is ``skerry device why``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from skerry_contract.window import Instant

from skerry_agent.core.lifecycle import Update

_DOES: Mapping[str, str] = {
    "fetch": "fetches it",
    "verify": "checks every file of it",
    "stage": "puts it into its slot",
    "ready": "has all of it here, checked, and holds it back",
    "prove": "starts it beside what serves, and lets it answer its golden cases",
    "trial": "answers requests with it, on trial",
    "revert": "goes back to what ran before",
}
_PARDON = "`skerry-agent sync --pardon` here, or `skerry device retry` from afar, lets it try again"
_CANCEL = "nothing; `skerry-agent cancel` ends it"
_NEEDS: Mapping[str, str] = {
    "unreachable": "a way to the server and the repository: network, name, firewall; and a clock that is not ahead, certificates end by it",
    "timeout": "a better way to the server and the repository, or more time",
    "mirror_wrong": "the right bytes: whoever serves the repository (a cache, a mirror, a proxy) sends others than were signed",
    "expired": "metadata that has not ended: whoever runs the fleet publishes it anew",
    "rollback": "whoever runs the fleet publishes above what this device has seen",
    "bad_signature": "whoever runs the fleet: metadata is not signed by whom this device trusts",
    "certificate_expired": "an operator's word, `skerry device renew`: this device then renews its certificate by itself",
    "unknown_device": "a person: this device is not known, or was revoked; enrol it anew",
    "not_enrolled": "a person: `skerry-agent enrol`",
    "identity_damaged": "a person: `skerry-agent doctor` says which file; enrol it anew",
    "fetch_window_closed": "the hours in which its group downloads, by a clock that is set",
    "network_not_allowed": "a network that its group's settings name",
    "not_enough_disk": "room on the disk",
    "not_enough_memory": "free memory",
    "key_not_given": "the bundle's content key from the server: whoever runs the fleet pushes the bundle again, or the group gives it",
    "encryption_key_differs": "a person: `skerry device forget-key` lets the server take this device's encryption key",
    "encryption_key_unusable": "a person: this device's encryption key, its token or its PIN",
    "no_memory_folder": "a tmpfs at `encryption.memory_dir`",
    "agent_too_old": "a newer agent",
    "runtime_missing": "the runtime that the bundle wants",
    "no_variant": "a bundle with a variant for this device",
    "must_pass_first": "the bundle that goes before it, approved and in the group's document",
    "below_floor": "a bundle at or above the signed floor",
    "not_in_catalog": "an approval of the bundle",
    "below_forced_floor": "a bundle at or above the floor that the approvers forced",
    "blob_missing": "the file in the repository: whoever runs the fleet pushes the bundle again",
    "download_wasted": "a connection that lasts, or a server that resumes",
    "process_not_started": "free memory, processes and descriptors",
    "storage_failed": "a disk that can be written",
    "store_full": "room on the disk",
    "courier_crashed": "its next try; `skerry-agent logs` says what happened",
    "start_timeout": "a less busy machine, or a smaller bundle",
}
"""By code, what has to come from outside."""
STOPPED = "stopped"
"""The standing of what should answer, and has no worker that does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How an update of another model ended; fields as in ``Facts``."""

    update: Update
    since_s: float | None
    wait_s: float
    spent: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known.

    Attributes:
        running: model -> version and standing, of what answers; ``STOPPED`` of what should.
        since_s: how long the update has been in its state; None where the device started since and no clock says it.
        left_s: until its state's deadline; None without one.
        wait_s: until its bundle may be tried again; 0: at the next look.
        spent: the bundle's attempts are used up, or a person ended it.
        beside: how the last updates of the other models ended.
        sync_code, sync_detail, sync_age_s: how the last look ended, and how long ago; age None before the first.
        membership: the code by which the server refuses this device; empty while it does not.
        linked: whether the broker hears it.
        certificate_left_s: until its certificate ends, below 0 since; None where that is not known.
        restarts: starts of the agent before this one that did not last.
        unstarted: model -> code and detail of the last start that failed, of what should answer.
        trial: inferences so far, wanted, and seconds of its time that are left.
        unwritten: the disk does not take the pointer file, so that no update is taken up.
        lacks: what the group's document requires and this agent does not know, so that none is either; empty for nothing.
    """

    running: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    update: Update = field(default_factory=Update)
    since_s: float | None = None
    left_s: float | None = None
    wait_s: float = 0.0
    spent: bool = False
    beside: tuple[Ended, ...] = ()
    sync_code: str = ""
    sync_detail: str = ""
    sync_age_s: float | None = None
    membership: str = ""
    linked: bool = True
    certificate_left_s: float | None = None
    restarts: int = 0
    unstarted: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    trial: tuple[int, int, float] = (0, 0, 0.0)
    unwritten: bool = False
    lacks: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """One thing: what it is about, what is so, since when in seconds, what is waited for, what to do, and the reason code."""

    about: str
    says: str
    since_s: float | None = None
    waits_for: str = ""
    do: str = ""
    code: str = ""


def explain(facts: Facts) -> tuple[Told, ...]:
    """What runs and the update first, then what keeps the device from news."""
    found = [_serves(facts, model, *running) for model, running in sorted(facts.running.items())]
    if not found:
        stopped = facts.update.code == "below_forced_floor"
        waits_for = "a bundle that may run here" if facts.update.code else "a first bundle"
        waits_for = _NEEDS["below_forced_floor"] if stopped else waits_for
        found.append(Told(about="models", says="nothing answers", waits_for=waits_for, do=""))
    update = facts.update
    if update.model and not update.resting:
        found.append(_under_way(facts))
    elif update.code and update.state == "idle":
        found.append(_ended(update, facts.since_s, facts.wait_s, facts.spent))
    for one in facts.beside:
        if one.spent or one.wait_s > 0:
            found.append(_ended(one.update, one.since_s, one.wait_s, one.spent))
    if facts.lacks:
        says = f"requires what this agent does not know: {facts.lacks}; what runs goes on, and nothing new is taken up"
        needs = _NEEDS["agent_too_old"]
        found.append(
            Told(about="group document", says=says, waits_for=needs, do="install a newer agent", code="agent_too_old")
        )
    if facts.unwritten:
        says = "takes no file: what was confirmed or went back holds all the same, and nothing new is taken up"
        do = "make room on it, or see whether it can be written"
        found.append(Told(about="disk", says=says, waits_for=_NEEDS["not_enough_disk"], do=do, code="not_enough_disk"))
    found += _outside(facts)
    return tuple(found)


def _serves(facts: Facts, model: str, version: str, standing: str) -> Told:
    if standing != STOPPED:
        return Told(about=model, says=f"answers as {version}, {standing.replace('_', ' ')}")
    last = next((u for u in (facts.update, *(one.update for one in facts.beside)) if u.model == model), None)
    if last is not None and last.code == "below_forced_floor":
        return Told(about=model, says=f"nothing answers: {version} must not any more", waits_for=_NEEDS[last.code])
    waits_for = "a worker, which is started again after a growing wait"
    code, detail = facts.unstarted.get(model, ("", ""))
    if code:
        needs = _NEEDS.get(code, "")
        return Told(
            about=model, says=f"nothing answers: {version} should, and does not start: {_reason(code, detail)}",
            waits_for=waits_for + (f"; it needs {needs}" if needs else ""),
            do=f"see to it: {needs}" if needs else "`skerry-agent revert` goes back to the bundle before it, where there is one", code=code,
        )  # fmt: skip
    return Told(
        about=model, says=f"nothing answers: {version} should, and no worker does", waits_for=waits_for,
        do="`skerry-agent logs` says why it does not; `skerry-agent revert` goes back to the bundle before it, where there is one",
    )  # fmt: skip


def _under_way(facts: Facts) -> Told:
    update = facts.update
    what = f"update to {update.model} {update.version}"
    why = f", because of {_reason(update.code, update.detail)}" if update.code else ""
    waits = f"the end of that, within {_time(facts.left_s)}" if facts.left_s is not None else "the end of that"
    if update.state == "trial":
        done, wanted, left_s = facts.trial
        waits = f"{max(0, wanted - done)} of {wanted} inferences, or the end of its time in {_time(left_s)}"
    do = _CANCEL
    if update.state == "ready":
        waits = f"{update.detail or 'what holds it to end'}, at most {_time(facts.left_s)}"
        past = " --despite-locks" if update.detail.startswith("the lock of ") else ""
        do = f"`skerry-agent activate{past}` starts it now; {_CANCEL.partition('; ')[2]}"
    says = f"{_DOES[update.state]}, attempt {update.attempt}{why}"
    return Told(about=what, says=says, since_s=facts.since_s, waits_for=waits, do=do, code=update.code)


def _ended(update: Update, since_s: float | None, wait_s: float, spent: bool) -> Told:
    says = f"gave it up in {update.failed_in or 'fetch'}: {_reason(update.code, update.detail)}"
    needs = _NEEDS.get(update.code, "")
    if spent:
        waits, do = "another bundle, or a person's word", _PARDON
    elif wait_s > 0:
        waits = f"its next try, in {_time(wait_s)}" + (f"; it needs {needs}" if needs else "")
        do = f"nothing; `skerry-agent sync --pardon` tries at once, {_CANCEL.partition('; ')[2]}"
    else:
        waits, do = needs or "its next look", needs and f"see to it: {needs}"
    if update.code == "yielded":
        waits, do = "the update that went first", ""
    if update.code == "withdrawn":
        waits, do = "what its group offers next", ""
    return Told(
        about=f"update to {update.model} {update.version}", says=says, since_s=since_s, waits_for=waits, do=do,
        code=update.code,
    )  # fmt: skip


def _outside(facts: Facts) -> list[Told]:
    found = []
    if facts.sync_code:
        needs = _NEEDS.get(facts.sync_code, "")
        says = f"the last one failed: {_reason(facts.sync_code, facts.sync_detail)}; what runs goes on"
        found.append(
            Told(
                about="look for news", says=says, since_s=facts.sync_age_s, waits_for="its next try" + (f"; it needs {needs}" if needs else ""),
                do=f"see to it: {needs}" if needs else "`skerry-agent doctor` examines the way", code=facts.sync_code,
            )
        )  # fmt: skip
    elif facts.sync_age_s is None:
        found.append(Told(about="look for news", says="none was made since the start", waits_for="the first one"))
    if facts.membership:
        needs = _NEEDS.get(facts.membership, "a person: `skerry-agent doctor` says more")
        says = f"the server refuses this device: {facts.membership}; what runs goes on, and is not heard"
        found.append(Told(about="server", says=says, waits_for=needs, do=needs, code=facts.membership))
    left_s = facts.certificate_left_s
    if left_s is not None and left_s <= 0:
        says = f"this device's certificate ended {_time(-left_s)} ago: no broker lets it in"
        waits = "the server, which renews it at the next look, within its days of grace"
        found.append(Told(about="certificate", says=says, waits_for=waits, code="certificate_expired"))
    elif not facts.linked:
        found.append(
            Told(about="broker", says="no session: what is counted waits here", waits_for="the broker", do="`skerry-agent doctor` examines the way")
        )  # fmt: skip
    if facts.restarts:
        says = f"ended {facts.restarts} times in a row soon after its start"
        found.append(
            Told(
                about="agent", says=says, waits_for="a start that lasts", do="`skerry-agent logs` says what it did last"
            )
        )
    return found


def ago_s(since: Instant, now: Instant) -> float | None:
    """How long ago that was; None where neither this boot nor a clock that both moments trust can say.

    >>> ago_s(Instant("a", 5 * 10**9, 0, False), Instant("a", 7 * 10**9, 0, False))
    2.0
    >>> ago_s(Instant("a", 5 * 10**9, 1000, True), Instant("b", 10**9, 61_000, True))
    60.0
    """
    if since.boot_id and since.boot_id == now.boot_id:
        return (now.boot_ns - since.boot_ns) / 1e9
    by_clock_s = (now.wall_ms - since.wall_ms) / 1e3
    return by_clock_s if since.synced and now.synced and by_clock_s >= 0 else None


def _reason(code: str, detail: str) -> str:
    return code + (f" ({detail})" if detail else "")


def _time(seconds: float | None) -> str:
    """How long, as a person says it.

    >>> [_time(s) for s in (0, 90, 5000, 200_000)]
    ['0 s', '1 min 30 s', '1 h 23 min', '2 d 7 h']
    """
    left = max(0, round(seconds or 0.0))
    for size, unit, below, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if left >= size:
            rest = left % size // below
            return f"{left // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"


def since(seconds: float | None) -> str:
    """Since when, behind a sentence.

    >>> since(None), since(65)
    ('', ', for 1 min 5 s')
    """
    return "" if seconds is None else f", for {_time(seconds)}"
