"""Why a device runs what it runs, and why not what it should. Pure: recorded facts -> an answer in words, with a stable state.

The assignment is what ``skerry_contract.group.assign`` gives, the definition that the device itself follows. The rules below stand in
the order in which they are asked: the first that holds is the answer, so that a device which refused a bundle and then lost its
network is ``refused`` and not ``offline``. What a device has not said is not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from skerry_contract import group as g

from skerry_server.core import eligibility

State = Literal[
    "as_assigned",
    "waiting_for_stage",
    "on_trial",
    "updating",
    "due",
    "retrying",
    "offline",
    "unfit",
    "refused",
    "reverted",
    "stopped",
    "unassigned",
    "revoked",
]

MEANINGS: dict[str, str] = {
    "unreachable": "server or repository does not answer",
    "mirror_wrong": "what the repository, or a cache or mirror of it, sent is not what was signed, or led elsewhere; it is asked again",
    "blob_missing": "the repository does not have a file that the catalog promises; push the bundle again",
    "download_wasted": (
        "bytes of a file came in vain, three times its size and more: the connection breaks and the server, or a proxy before it, does not resume"
    ),
    "timeout": "a step took longer than it may",
    "interrupted": "the agent was stopped or restarted in the middle of it; it begins again, out of a trial after a wait",
    "withdrawn": "the group no longer gives this bundle to this device",
    "expired": "metadata is past its date; what serves goes on serving",
    "rollback": "metadata went back to an older version",
    "bad_signature": "signatures do not hold, or too few",
    "malformed_metadata": "metadata that TUF cannot read",
    "hash_mismatch": "a file differs from the digest that was signed",
    "size_mismatch": "a file is shorter or longer than signed",
    "not_in_catalog": "no approver signed this bundle",
    "malformed_manifest": "the manifest breaks the contract, or the catalog lists it larger than one may be",
    "below_floor": "the version is below the signed floor",
    "must_pass_first": "the bundle goes after a version that this device has not confirmed (the manifest's `after`), and the group's document does not name that one: approve it",
    "below_forced_floor": "what served is below a floor that the approvers forced: it stopped. The bundle before it came back where "
    "that may serve, else the model answers nothing until a permitted one is assigned",
    "no_variant": "no variant for this architecture and runtime",
    "agent_too_old": "group document or manifest requires what this agent lacks",
    "runtime_missing": (
        "the variant's runtime is not installed, or does not work here: then the device takes another variant of the bundle where one fits"
    ),
    "not_enough_disk": "the bundle needs more than is free",
    "not_enough_memory": "the bundle needs more than is free",
    "key_not_given": "the bundle is encrypted, and the server does not give this device its content key: its group moved on meanwhile, the key never came to the server, it knows the device no more, or its answer was another key",
    "encryption_key_differs": "the server knows another encryption key of this device, and gives content keys to that one alone: `skerry device forget-key`, or erase its state and enrol it anew",
    "encryption_key_unusable": "the device's encryption key cannot be used: its file, its token or its PIN",
    "cannot_decrypt": "a file of an encrypted bundle does not open with its content key",
    "no_memory_folder": "`encryption.memory_dir` is no tmpfs, or no folder with mode 0700 can be made in it: encrypted models are opened nowhere else",
    "storage_failed": "this device could not write",
    "model_damaged": "the runtime refuses the model file",
    "operator_unknown": "the runtime lacks an operator",
    "golden_failed": "golden cases came out otherwise on this runtime and CPU",
    "runtime_crashed": "the worker died while it loaded or proved",
    "start_timeout": "the worker was not ready in time",
    "trial_crashed": "the worker died, or hung and was killed, while it served on trial",
    "trial_errors": "too many requests failed on trial",
    "trial_slow": "far slower than what ran before, or than the bundle's own limit",
    "worker_leaked": "the worker had far more memory than its models declare while it served on trial",
    "worker_spun": "the worker used a core without work while it served on trial",
    "trial_silent": "the trial was over and could not be judged: its worker said nothing, or the hand-over did not end",
    "reverted_by_operator": "a person ordered it at the device",
    "yielded": "it made way for a way back, or lay ready and was held while another model's update went first, which nothing held; it is taken up again",
    "fetch_window_closed": "the group's `fetch_windows` are closed now, or the device does not know the time; it goes on when they open",
    "network_not_allowed": "the group's `networks` do not name the network that the device is on; it goes on when it is on another",
    "activation_overdue": "it lay ready for a month and nothing let it begin: a lock, a closed window, or nobody's `activate`; it is taken up again",
    "cancelled": "a person ended the update, at the device or through the server",
    "too_many_moves": "the update moved from state to state again and again and was never confirmed",
    "crash_loop": (
        "the confirmed bundle's worker died, or was replaced, five times within ten minutes; of several models in it, the one that "
        "was in work each time. Or five starts of it failed one after the other. The bundle before it came back"
    ),
    "attempts_exhausted": "it failed too often; `skerry-agent sync --pardon` tries again",
}
"""The words of docs/reference/reason-codes.md for the codes of updates."""

UNDER_WAY: frozenset[str] = frozenset({"fetch", "verify", "stage", "ready", "prove", "trial", "revert"})
"""States of the agent's lifecycle in which an update is not at rest."""
_CONFIRMED = ("confirmed", "confirmed_on_golden")
_SERVED = ("trial", *_CONFIRMED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The last thing that a device reported against the bundle that it should run.

    Attributes:
        event: id of its row; at_ms: when the server received it.
        failed_in: the state of the device's lifecycle in which it failed; empty when it did not say.
        forgiven: the device obeyed a person's ``retry`` since, and has not failed again.
    """

    event: int
    at_ms: int
    code: str
    detail: str
    failed_in: str
    forgiven: bool = False

    @property
    def went_back(self) -> bool:
        """Whether the bundle had already answered requests."""
        return self.failed_in in _SERVED or self.code in (
            "trial_crashed",
            "trial_errors",
            "trial_slow",
            "trial_silent",
            "worker_leaked",
            "worker_spun",
            "reverted_by_operator",
            "crash_loop",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Silence:
    """What a device reported of a bundle that answered, or should, and does not: it does not start, or a forced floor stopped it.

    Attributes:
        event: id of its row; at_ms: when the server received it; digest: of the bundle.
    """

    event: int
    at_ms: int
    digest: str
    code: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """The rollout that a model of the group is in, or was in last.

    Attributes:
        version, candidate: of its candidate; reason: of its last move; held: why its stage does not end now, empty when nothing holds it.
        stage, stages: the one now running, from 0; all of them. ``stage == stages``: it is completing.
        joins: the stage that will take this device as the fleet is now, ``stages`` for the end, None when that is not known or it is in.
        share, cut: where the device's hash and its stratum's cut lie, 0 to 1.
    """

    id: str
    state: str
    candidate: str
    version: str
    stage: int
    stages: int
    reason: str
    held: str
    joins: int | None
    share: float
    cut: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What is known of one model on the device.

    Attributes:
        running, update: as the device reported them.
        silence: why nothing answers for it, where nothing does and the device said why.
        wants: runtimes and architectures of the assigned bundle's variants, in words; fits: whether one fits what the device reported.
        pinned_by: who pinned it, when and why, in words.
    """

    name: str
    assigned: g.Assignment | None
    running: Mapping[str, Any]
    update: Mapping[str, Any]
    failure: Failure | None
    course: Course | None
    wants: str
    fits: bool
    pinned_by: str
    silence: Silence | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What is known of the device.

    Attributes:
        generation: of the group document that it obeys; published: of the group's own.
        lacks: what the group document requires and the agent does not understand.
        revoked: by whom and why, empty while it is enrolled.
        since: since when it is offline, in words; runtimes: as it reported them, in words.
        lacks_certificate: what it needs of a person, since its certificate ended too long ago; empty while it comes back by itself.
    """

    id: str
    group: str
    online: bool
    since: str
    generation: int
    published: int
    lacks: tuple[str, ...]
    revoked: str
    runtimes: str
    settings: g.Settings
    lacks_certificate: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """``because``: why it is so; ``assignment``: why it should run what it should; ``waits_for``: what comes next, empty for nothing.

    ``do``: what a person can do about it, empty for nothing.
    """

    state: State
    because: str
    assignment: str
    waits_for: str
    do: str = ""


def explain(device: Device, model: Model) -> Answer:
    """See the module."""
    assignment = _assignment(device, model)

    def answer(state: State, because: str, waits_for: str = "") -> Answer:
        do = _do(state, device, model)
        return Answer(state=state, because=because, assignment=assignment, waits_for=waits_for, do=do)

    if device.revoked:
        return answer(
            "revoked",
            f"the device was revoked {device.revoked}: the server hears and tells it nothing; it goes on serving {_runs(model) if model.running else 'what it has'}",
            "nothing: a revoked id never comes back; enrol the device under another",
        )
    assigned = model.assigned
    if assigned is None:
        return answer(
            "unassigned",
            f"group {device.group} gives it no bundle of {model.name}; it last reported {_runs(model)}",
            f"a first bundle of {model.name} in group {device.group}" if not model.running else "",
        )
    if model.running.get("digest") == assigned.digest:
        return _runs_it(device, model, assigned, answer)
    return _does_not(device, model, assigned, answer)


def _runs_it(device: Device, model: Model, assigned: g.Assignment, answer: Callable[..., Answer]) -> Answer:
    standing = str(model.running.get("state", ""))
    if standing == "stopped":
        return answer(
            "stopped", "no worker answers requests on the device now", "the agent to bring a worker up; see its log"
        )
    if standing == "trial":
        return answer("on_trial", "it serves on trial and is not confirmed yet", _trial(device))
    course = model.course
    waiting = course is not None and course.id == assigned.rollout and assigned.arm == "control"
    if course is not None and waiting:
        where = f"{course.share:.1%} of the way through the rollout's order of devices, and the stage ends at {course.cut:.1%}"
        return answer(
            "waiting_for_stage",
            f"rollout {course.id} has not reached it: it stands {where}",
            _next_stage(course),
        )
    return answer("as_assigned", f"it runs what it should, {standing.replace('_', ' ')}")


def _does_not(device: Device, model: Model, assigned: g.Assignment, answer: Callable[..., Answer]) -> Answer:
    runs = f"it runs {_runs(model)} instead"
    failure, silence = model.failure, model.silence
    if silence is not None:
        runs += f", since {silence.code}: {MEANINGS.get(silence.code, '')}"
    if device.lacks:
        because = f"agent_too_old: {MEANINGS['agent_too_old']} ({', '.join(device.lacks)}); {runs}"
        return answer("unfit", because, "a newer agent on the device")
    trying = _is_trying(model, assigned)
    if trying and device.online:
        return _trying(device, model, answer, runs)
    if silence is not None and silence.digest == assigned.digest and device.online:
        because = f"it has the bundle, and no worker starts with it: {_meant(silence.code, silence.detail)}; it runs {_runs(model)}"
        return answer("stopped", because, _UNFIT.get(silence.code, "the agent to bring a worker up; it goes on trying"))
    if trying or (failure is not None and failure.forgiven):
        # What it said before is over: it tries again, or will when it is heard again.
        failure = None
    if failure is not None and failure.code == "cancelled":
        return answer("refused", f"its update was ended: {_said(failure)}; {runs}", _after(failure))
    if failure is not None and failure.code in eligibility.UNABLE:
        return answer("unfit", f"{_said(failure)}; {runs}", _UNFIT.get(failure.code, _unfit(model)))
    if failure is not None and failure.code not in eligibility.ELSEWHERE:
        if failure.went_back:
            return answer("reverted", f"it went back: {_said(failure)}; {runs}", _after(failure))
        return answer("refused", f"it refused it: {_said(failure)}; {runs}", _after(failure))
    if not model.fits:
        because = f"no variant fits: the bundle is for {model.wants}, the device has {device.runtimes}; {runs}"
        return answer("unfit", because, _unfit(model))
    if not device.online:
        return answer(
            "offline",
            f"it is offline {device.since}; {runs}",
            f"the device to connect: it then takes {model.name} {assigned.version} by itself",
        )
    if failure is None and (model.failure is not None and model.failure.forgiven):
        because = (
            f"it obeyed a person's retry and has not reported a new try yet; before: {_said(model.failure)}; {runs}"
        )
        return answer("retrying", because, _next_look(device))
    if model.update.get("digest") == assigned.digest and model.update.get("state") in UNDER_WAY:
        return _trying(device, model, answer, runs)
    if failure is not None:
        return answer(
            "retrying",
            f"the last try did not get through: {_said(failure)}; {runs}",
            _ADMITS.get(failure.code, "its next try, after a growing pause"),
        )
    if device.generation < device.published:
        because = f"it has not read the group's newest document: it obeys generation {device.generation} of {device.published}; {runs}"
    else:
        because = f"it has read the group's document and has not reported a try yet; {runs}"
    return answer("due", because, _next_look(device))


def _is_trying(model: Model, assigned: g.Assignment) -> bool:
    """Whether the assigned bundle is on its way in by the device's own word: an older failure says nothing any more."""
    update = model.update
    return update.get("digest") == assigned.digest and update.get("state") in UNDER_WAY - {"revert"}


def _trying(device: Device, model: Model, answer: Callable[..., Answer], runs: str) -> Answer:
    state, attempt = str(model.update["state"]), int(model.update.get("attempt") or 1)
    waits = _trial(device) if state == "trial" else f"the update to leave {state!r}"
    if state == "ready":
        waits = str(model.update.get("detail") or "what holds it on the device")
    before = "" if model.failure is None else f"; the try before ended with {_said(model.failure)}"
    because = f"an update is under way, in {state!r}, attempt {attempt}{_fetched(model)}{before}; {runs}"
    return answer("updating", because, waits)


def _fetched(model: Model) -> str:
    progress = model.update.get("progress") or {}
    done, size = progress.get("done", 0), progress.get("size", 0)
    return f", {done / 1e6:.1f} of {size / 1e6:.1f} MB fetched ({done / size:.0%})" if size else ""


def _runs(model: Model) -> str:
    version, variant = model.running.get("version"), model.running.get("variant")
    if not version:
        return f"no {model.name}"
    return f"{model.name} {version}" + (f" ({variant})" if variant else "")


def _assignment(device: Device, model: Model) -> str:
    assigned, course = model.assigned, model.course
    if device.revoked:
        return "none: the device is revoked"
    if assigned is None:
        return f"none: group {device.group} does not run {model.name}"
    what = f"{model.name} {assigned.version}"
    if assigned.reason == "pin":
        return f"{what}: pinned on this device{model.pinned_by}, whatever its group runs"
    if course is not None and course.id == assigned.rollout and assigned.arm == "candidate":
        stage = "completing" if course.stage >= course.stages else f"stage {course.stage + 1} of {course.stages}"
        return f"{what}: candidate of rollout {course.id} ({course.state.replace('_', ' ')}, {stage})"
    if course is not None and course.id == assigned.rollout:
        return f"{what}: what group {device.group} runs; rollout {course.id} of {course.version} keeps it as a control"
    back = ""
    if course is not None and course.state in ("rolling_back", "rolled_back", "aborted"):
        ended = {"aborted": "was aborted", "rolled_back": "went back", "rolling_back": "goes back"}[course.state]
        back = f"; rollout {course.id} of {course.version} {ended}: {course.reason}"
    elif course is not None and course.state == "completed" and course.candidate == assigned.digest:
        back = f"; rollout {course.id} brought it"
    return f"{what}: what group {device.group} runs{back}"


def _said(failure: Failure) -> str:
    return _meant(failure.code, failure.detail)


def _meant(code: str, detail: str) -> str:
    meaning = MEANINGS.get(code, "a code that this server does not know")
    return f"{code}: {meaning}" + (f" ({detail})" if detail else "")


def _after(failure: Failure) -> str:
    if failure.code == "below_forced_floor":
        return "a bundle at or above that floor: a device never takes a forced floor back"
    if failure.code == "below_floor":
        return "a bundle at or above that floor: a device keeps the highest floor that it has seen"
    if failure.code == "not_in_catalog":
        return "another bundle, or a catalog that lists this one; it looks again by itself"
    if failure.code == "cancelled":
        return "another bundle, or a person's word that it may try this one again"
    return "another bundle; it tries this one again a few times at most, then not before a person says so"


def _do(state: State, device: Device, model: Model) -> str:
    """The command, or the step outside, that a person has; empty where there is nothing to do."""
    end = f"nothing; `skerry device cancel {device.id} --reason WHY` ends it"
    again = f"`skerry device retry {device.id} --reason WHY` lets it try again, or `skerry-agent sync --pardon` on the device"
    if device.lacks_certificate and not device.online:
        return device.lacks_certificate
    course, code = model.course, model.failure.code if model.failure is not None else ""
    if state == "waiting_for_stage" and course is not None and course.state == "paused":
        return f"`skerry rollout resume {course.id} --reason WHY`, or abort it"
    if state == "updating" and model.update.get("state") == "ready":
        return f"nothing; `skerry-agent activate` on the device starts it (`--despite-locks`: past a lock too), `skerry device cancel {device.id} --reason WHY` ends it"
    if state == "retrying" and (model.failure is None or not model.failure.forgiven):
        return _outside(code) or end
    if state in ("refused", "reverted") and code in _MENDED_BY:
        return _MENDED_BY[code]
    if state == "stopped" and model.silence is not None:
        code = model.silence.code
    if state in ("unfit", "stopped") and code == "encryption_key_differs":
        return f"`skerry device forget-key {device.id} --reason WHY`, if its board or token was replaced"
    if state == "unfit":
        return "install a newer agent on the device" if code == "agent_too_old" or device.lacks else again
    return {
        "on_trial": end,
        "updating": end,
        "retrying": end,
        "refused": f"{again}; if the bundle is wrong, publish another version",
        "reverted": f"{again}; if the bundle is wrong, publish another version",
        "due": f"nothing; if it stays so, `skerry device logs {device.id}` says why",
        "stopped": f"`skerry device logs {device.id}` says why; another version, or a rollback, if it does not come back",
        "offline": "bring it back to its network and power; it needs nothing else",
        "revoked": "enrol it under another id",
    }.get(state, "")


def _outside(code: str) -> str:
    """What keeps every device from its repository, and who can change it."""
    if code == "expired":
        return "publish metadata anew: `skerry info` says which role has ended"
    if code == "key_not_given":
        return "push the bundle again with its content key: `skerry push`"
    return "let the device reach its repository" if code in ("unreachable", "timeout") else ""


_ADMITS = {
    "network_not_allowed": "another network, or other `networks` of its group",
    "fetch_window_closed": "the hours of its group's `fetch_windows`, by a clock that is set",
}
"""By code, what a download waits for that its group's settings hold back."""


_UNFIT = {
    "must_pass_first": "an approval of the version that goes before it: the server then names it to the device by itself, which takes it first",
    "agent_too_old": "a newer agent on the device",
    "not_enough_disk": "room on the device's disk",
    "not_enough_memory": "free memory on the device",
    "encryption_key_differs": "the server to take the encryption key that the device has now",
    "encryption_key_unusable": "the device's encryption key, its token or its PIN to be mended",
    "no_memory_folder": "a tmpfs at the device's `encryption.memory_dir`",
}
"""By code, what a device that cannot run its bundle waits for."""


_MENDED_BY = {
    "below_forced_floor": "publish a version at or above the forced floor, approve it, and roll it out to the group; no retry helps",
    "below_floor": "give it a version at or above the floor: a device that has seen a floor keeps it, `skerry floor set --lower` reaches only others",
    "not_in_catalog": "have the approvers approve it: `skerry approve`",
}
"""By code, what lets a bundle in that the signed catalog keeps out: no word to the device does."""


def _unfit(model: Model) -> str:
    return f"a bundle with a variant that this device can run, or a device that can run {model.wants or 'this one'}"


def _trial(device: Device) -> str:
    settings = device.settings
    return f"{settings.trial_inferences} inferences on trial, or the end of its {settings.trial_s:g} s"


def _next_look(device: Device) -> str:
    within = device.settings.sync_s + device.settings.jitter_s
    return f"the device to look, at the bell or within {within:g} s"


def _next_stage(course: Course) -> str:
    if course.state == "paused":
        return f"a person: the rollout is paused, because: {course.reason}"
    if course.joins is None:
        stage = "a later stage of the rollout"
    elif course.joins >= course.stages:
        stage = "the end of the rollout, when everyone is taken"
    else:
        stage = f"stage {course.joins + 1} of {course.stages}, as the fleet is now"
    held = f"; stage {course.stage + 1} is held: {course.held}" if course.held else ""
    return stage + held
