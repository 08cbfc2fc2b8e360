"""The group document: what the devices of a group run, signed by the online role ``fleet``.

A stage writes O(1): a device is a candidate when ``hash64(salt, id) < cut``. Cuts are 64-bit numbers written as decimal
strings (2**64 means everyone; JSON numbers lose precision past 2**53 in some readers). ``assign`` is the one definition of
which device runs what; server and device both call it.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from skerry_contract import canonical, ids, opening
from skerry_contract.errors import Malformed, UnsupportedVersion, misfit_in
from skerry_contract.reading import ready

SCHEMA = 1
MAX_BYTES = 4 << 20
EVERYONE = 1 << 64
ANY_STRATUM = "*"

FEATURES: frozenset[str] = frozenset({"pins", "canary", "shadow", "windows", "networks", "opens_at", "fetch_windows"})
"""What this release understands of a group document's ``requires``."""

BOUNDS: dict[str, tuple[float, float]] = {
    "window_s": (0.1, 86_400),
    "sample_rate": (0, 1),
    "sync_s": (1, 86_400),
    "jitter_s": (0, 86_400),
    "max_kib_s": (0, 10 << 20),
    "trial_s": (0.1, 7 * 86_400),
    "trial_inferences": (0, 10_000_000),
    "shadow_share": (0, 1),
    "shadow_cpu": (0.001, 1),
    "shadow_c": (0, 150),
    "opens_at": (0, 253_402_300_799),
}
"""Least and greatest value of each numeric setting. No document, by mistake or by a thief of the online key, makes devices spin,
or look and report less than once a day."""
UNMETERED = "unmetered"
NETWORKS: frozenset[str] = frozenset({"ethernet", "wifi", "cellular", UNMETERED})
"""What this release knows of ``networks``; a device matches no other."""
MAX_NETWORKS = 64
MAX_NETWORK_CHARS = 63
MOST_VIA = 32

Mode = Literal["canary", "shadow", "ab"]
Arm = Literal["none", "control", "candidate"]


class _Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class Target(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """A bundle as the group document names it: the digest decides, the version says where the catalog lists it."""

    digest: str
    version: str


class Rollout(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """A candidate on its way.

    Attributes:
        id: the rollout's id; stage: number of the stage now running, from 0; both key the telemetry windows.
        salt: 32 hex digits (16 bytes).
        cuts: stratum -> cut as decimal string; ``*`` for strata not named. Cuts only grow.
        windows: kept from the first release, read by nobody: hours are those of ``Settings``. opens_at: seconds since 1970 before which the candidate does not begin to answer (it is fetched); 0 for at once.
    """

    id: str
    stage: int
    candidate: Target
    salt: str
    cuts: dict[str, str]
    mode: Mode = "canary"
    selector: dict[str, Any] = {}
    windows: tuple[dict[str, Any], ...] = ()
    opens_at: int = 0
    layer: str = ""


class ModelPlan(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What the group runs of one model.

    Attributes:
        fallback: bundle for a device that can run neither of the others.
        shadow: bundle that sees what the answering one sees, on every device, and answers nobody.
        via: bundles that others of this plan want confirmed before them (the manifest's ``after``): a device that confirmed a lower
            version than one of them takes it first, on its way to a higher version. An agent that does not know them is kept off by the
            manifest's ``requires``.
    """

    stable: Target
    fallback: Target | None = None
    rollout: Rollout | None = None
    shadow: Target | None = None
    via: tuple[Target, ...] = ()


class Settings(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """How the agents of the group behave. Seconds, KiB per second (0: as fast as it goes); ``networks`` empty for any.

    ``BOUNDS`` says what the numbers may be.

    Attributes:
        networks: kinds of network (``NETWORKS``) that bundles may be downloaded over. Who sets some names ``networks`` in ``requires``.
        opens_at: seconds since 1970 before which no other bundle begins to answer; fetched it is. Who sets it names ``opens_at`` in
            ``requires``.
        windows: in which hours another bundle may begin to answer, by each device's local time; empty: in any. Who sets some
            names ``windows`` in ``requires``.
        fetch_windows: in which hours files of bundles may be downloaded, likewise; empty: in any. Who sets some names
            ``fetch_windows`` in ``requires``.
        shadow_share: of the requests, that a bundle in shadow sees as well.
        shadow_cpu: share of one core that it may take.
        shadow_c: degrees Celsius of the hottest sensor above which it pauses; 0 for any.
    """

    window_s: float = 300.0
    sample_rate: float = 0.0
    sync_s: float = 300.0
    jitter_s: float = 30.0
    max_kib_s: int = 0
    networks: tuple[str, ...] = ()
    windows: tuple[opening.Window, ...] = ()
    trial_s: float = 60.0
    trial_inferences: int = 100
    shadow_share: float = 0.1
    shadow_cpu: float = 0.25
    shadow_c: float = 0.0
    opens_at: int = 0
    fetch_windows: tuple[opening.Window, ...] = ()


class GroupDocument(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """See the module.

    Attributes:
        generation: grows with every change under the same key ids.
        requires: abilities an agent must have; one that lacks any keeps what it runs and reports ``agent_too_old``.
        models: by model name.
        pins: ``pin_key`` -> model -> target; a pin beats stable and rollout.
    """

    schema: int
    group: str
    generation: int
    requires: tuple[str, ...] = ()
    models: dict[str, ModelPlan] = {}
    pins: dict[str, dict[str, Target]] = {}
    settings: Settings = Settings()


class Assignment(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What one device should run of one model, and the key its windows carry."""

    model: str
    digest: str
    version: str
    arm: Arm
    rollout: str
    stage: int
    reason: Literal["stable", "candidate", "pin"]


def hash64(salt: bytes, identity: str) -> int:
    """First 8 bytes of sha256(salt || id), big-endian. The salt is 16 bytes.

    >>> hash64(bytes(16), "device-1")
    5289042743158628261
    """
    if len(salt) != 16:
        raise ValueError(f"wanted 16 bytes of salt, got {len(salt)}")
    return int.from_bytes(hashlib.sha256(salt + identity.encode()).digest()[:8], "big")


def pin_key(group: str, device: ids.DeviceId) -> str:
    """The key of a device in ``pins``: the document is public to its group, so it holds no plain ids."""
    return hashlib.sha256(f"skerry-pin:{group}:{device}".encode()).hexdigest()[:32]


def cut_for(rollout: Rollout, stratum: str) -> int:
    """The cut of a stratum: its own, else that of ``*``, else 0."""
    return int(rollout.cuts.get(stratum, rollout.cuts.get(ANY_STRATUM, "0")))


def is_candidate(rollout: Rollout, device: ids.DeviceId, stratum: str) -> bool:
    """Whether the device's hash lies below its stratum's cut."""
    return hash64(bytes.fromhex(rollout.salt), device) < cut_for(rollout, stratum)


def assign(document: GroupDocument, device: ids.DeviceId, model: str, stratum: str) -> Assignment | None:
    """What the device should run of the model; None when the group does not run it.

    A pinned device takes no part in a rollout (arm ``none``). Outside a rollout the arm is ``none``, inside it is
    ``candidate`` or ``control``. Modes ``shadow`` and ``ab`` change nothing here: a shadow candidate answers nobody, so
    its devices stay on stable, and a release that understands them says so in ``requires``.
    """
    plan = document.models.get(model)
    pin = document.pins.get(pin_key(document.group, device), {}).get(model)
    if pin is not None:
        return Assignment(
            model=model, digest=pin.digest, version=pin.version, arm="none", rollout="", stage=0, reason="pin"
        )
    if plan is None:
        return None
    rollout = plan.rollout
    if rollout is not None and rollout.mode == "canary":
        candidate = is_candidate(rollout, device, stratum)
        target = rollout.candidate if candidate else plan.stable
        return Assignment(
            model=model,
            digest=target.digest,
            version=target.version,
            arm="candidate" if candidate else "control",
            rollout=rollout.id,
            stage=rollout.stage,
            reason="candidate" if candidate else "stable",
        )
    return Assignment(
        model=model,
        digest=plan.stable.digest,
        version=plan.stable.version,
        arm="none",
        rollout="",
        stage=0,
        reason="stable",
    )


def shadow_of(document: GroupDocument, device: ids.DeviceId, model: str, stratum: str) -> Target | None:
    """The bundle that the device should run in shadow of the one that answers; None for none.

    A rollout of mode ``shadow`` puts its candidate there on the devices below the cut; else it is the plan's own ``shadow``, a
    version that was replaced and is still watched, say. A pinned device has none, and no bundle is a shadow of itself.
    """
    plan = document.models.get(model)
    assigned = assign(document, device, model, stratum)
    if plan is None or assigned is None or assigned.reason == "pin":
        return None
    rollout, found = plan.rollout, plan.shadow
    if rollout is not None and rollout.mode == "shadow" and is_candidate(rollout, device, stratum):
        found = rollout.candidate
    return found if found is not None and found.digest != assigned.digest else None


def missing_abilities(document: GroupDocument, abilities: frozenset[str] = FEATURES) -> tuple[str, ...]:
    """What the document requires and the reader lacks, sorted."""
    return tuple(sorted(set(document.requires) - abilities))


def encode(document: GroupDocument) -> bytes:
    """The canonical bytes, checked as a reader would."""
    data = canonical.encode(document)
    parse(data)
    return data


def parse(data: bytes) -> GroupDocument:
    """Reads a group document.

    Raises:
        Malformed: not canonical, a field missing or of the wrong type or out of range.
        UnsupportedVersion: written by a newer server.
    """
    value = canonical.decode(data, what="group document", max_bytes=MAX_BYTES)
    schema = value.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise UnsupportedVersion("group document", schema, SCHEMA)
    try:
        document = msgspec.convert(value, GroupDocument)
    except msgspec.ValidationError as error:
        raise misfit_in("group document", error, GroupDocument, value) from None
    _check(document)
    return document


def _check(document: GroupDocument) -> None:
    if document.schema != SCHEMA:
        raise Malformed("group document", f"wanted {SCHEMA}, got {document.schema}", where="$.schema")
    ids.group_name(document.group)
    if document.generation < 1:
        raise Malformed("group document", "wanted >= 1", where="$.generation")
    for name, plan in document.models.items():
        ids.model_name(name)
        candidate = plan.rollout.candidate if plan.rollout else None
        if len(plan.via) > MOST_VIA:
            detail = f"wanted at most {MOST_VIA} bundles, got {len(plan.via)}"
            raise Malformed("group document", detail, where=f"$.models.{name}.via")
        for target in (plan.stable, plan.fallback, plan.shadow, candidate, *plan.via):
            if target is not None:
                _check_target(target)
        if plan.rollout is not None:
            _check_rollout(plan.rollout, f"$.models.{name}.rollout")
    for key, pins in document.pins.items():
        if not _is_hex32(key):
            raise Malformed("group document", "wanted 32 hex digits", where="$.pins")
        for name, target in pins.items():
            ids.model_name(name)
            _check_target(target)
    _check_settings(document.settings)


def _check_settings(settings: Settings) -> None:
    for name, (low, high) in BOUNDS.items():
        value = getattr(settings, name)
        # So written that NaN is out of range, too.
        if not low <= value <= high:
            raise Malformed("group document", f"wanted {low} to {high}, got {value}", where=f"$.settings.{name}")
    if len(settings.networks) > MAX_NETWORKS:
        detail = f"wanted at most {MAX_NETWORKS} names, got {len(settings.networks)}"
        raise Malformed("group document", detail, where="$.settings.networks")
    for i, network in enumerate(settings.networks):
        if not 1 <= len(network) <= MAX_NETWORK_CHARS:
            detail = f"wanted 1 to {MAX_NETWORK_CHARS} characters, got {len(network)}"
            raise Malformed("group document", detail, where=f"$.settings.networks[{i}]")
    _check_windows(settings.windows, "$.settings.windows")
    _check_windows(settings.fetch_windows, "$.settings.fetch_windows")


def _check_windows(windows: tuple[opening.Window, ...], where: str) -> None:
    if len(windows) > opening.MOST_WINDOWS:
        detail = f"wanted at most {opening.MOST_WINDOWS} windows, got {len(windows)}"
        raise Malformed("group document", detail, where=where)
    for i, window in enumerate(windows):
        fault = opening.fault(window)
        if fault is not None:
            raise Malformed("group document", fault, where=f"{where}[{i}]")


def _check_target(target: Target) -> None:
    ids.bundle_digest(target.digest)
    ids.version_key(target.version)


def _is_hex32(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)


def _check_rollout(rollout: Rollout, where: str) -> None:
    ids.rollout_id(rollout.id)
    if not _is_hex32(rollout.salt):
        raise Malformed("group document", "wanted 32 lower-case hex digits", where=f"{where}.salt")
    if rollout.stage < 0:
        raise Malformed("group document", "wanted >= 0", where=f"{where}.stage")
    for stratum, cut in rollout.cuts.items():
        plain = cut.isascii() and cut.isdigit() and len(cut) <= 20 and (cut == "0" or cut[0] != "0")
        if not plain or not 0 <= int(cut) <= EVERYONE:
            raise Malformed(
                "group document", "wanted a decimal number from 0 to 2**64", where=f"{where}.cuts.{stratum}"
            )


ready(GroupDocument, Settings)
