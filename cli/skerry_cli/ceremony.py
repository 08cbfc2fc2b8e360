"""A ceremony of several holders on several machines: one folder that goes from a plan to signed documents, step by step.

The steps, each kept on disk before the next, so that an interrupted ceremony goes on where it was::

    plan.json            who holds what, thresholds, the server's online keys
    public/NAME.json     each holder's public part, and how its fingerprint was compared
    request.json         root, targets and first catalog, with the signatures so far
    root.json ...        the signed documents, record.md and, last, ceremony.json: the record

Owns these files and the order. Keys are made by their holders (``keyring``), signed for by ``signing_requests``; what the record says is
``record``'s. Nothing is written over: another plan, key or document under the same name is refused.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key
from tuf.api.metadata import Metadata

from skerry_cli import key_files, keyring, offline_roles, record
from skerry_cli import signing_requests as requests
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_cli.keyring import PublicPart
from skerry_cli.offline_roles import CATALOG_LIFE, EMPTY_FLOORS, ROOT_LIFE, TARGETS_LIFE, Holders, RootWish, TargetsWish

PLAN_FILE = "plan.json"
REQUEST_FILE = "request.json"
PUBLIC_FOLDER = "public"
STEPS_FILE = "steps.jsonl"
ROLES = ("root", "targets", "approver")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who is to hold what. ``holders``: role of ``ROLES`` -> names; ``online``: the server's public keys by key id."""

    organiser: str
    holders: Mapping[str, tuple[str, ...]]
    thresholds: Mapping[str, int]
    online: Mapping[str, Key]

    @property
    def names(self) -> tuple[str, ...]:
        """Every holder, in order."""
        return tuple(name for role in ROLES for name in self.holders[role])

    def role_of(self, name: str) -> str:
        """The role that a holder's key signs for. Raises ``Usage`` for a name that is not planned."""
        for role in ROLES:
            if name in self.holders[role]:
                return role
        raise Usage(f"{name}: the plan names {', '.join(self.names)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Handed:
    """A public part that the ceremony has. ``kept``: where the private part lies; ``compared``: how its fingerprint was checked."""

    part: PublicPart
    kept: str
    compared: str


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Where a ceremony stands.

    Attributes:
        plan: None before there is one; handed: by name; waiting_keys: names whose public part is missing.
        reviewed: the documents, once every key is there; finished: whether the record is written.
    """

    plan: Plan | None
    handed: Mapping[str, Handed]
    reviewed: tuple[requests.Reviewed, ...]
    finished: bool

    @property
    def waiting_keys(self) -> tuple[str, ...]:
        """Holders whose public part is missing."""
        return tuple(name for name in self.plan.names if name not in self.handed) if self.plan else ()

    @property
    def waiting_signatures(self) -> tuple[str, ...]:
        """Holders who may still sign a document that wants signatures."""
        names = {handed.part.key.keyid: name for name, handed in self.handed.items()}
        found: list[str] = []
        for one in self.reviewed:
            for lack in one.standing.lacks:
                found += [names[keyid] for keyid in lack.keyids if keyid in names and names[keyid] not in found]
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Builtins, for ``--json``."""
        names = {handed.part.key.keyid: name for name, handed in self.handed.items()}
        return {
            "planned": self.plan is not None,
            "keys": [
                {"name": name, "keyid": one.part.key.keyid, "kept": one.kept, "compared": one.compared}
                for name, one in self.handed.items()
            ],
            "waiting_for_keys": list(self.waiting_keys),
            "documents": [
                {
                    "role": one.role,
                    "sha256": one.sha256,
                    "signed_by": [names.get(keyid, keyid) for keyid in one.standing.signed],
                    "complete": one.standing.complete,
                }
                for one in self.reviewed
            ],
            "waiting_for_signatures": list(self.waiting_signatures),
            "finished": self.finished,
        }


def read(folder: Path, now: dt.datetime) -> State:
    """Where the ceremony in this folder stands.

    Raises:
        Usage: a file is damaged. RefusedForSafety: the documents are not those of the plan and the keys.
    """
    plan = _read_plan(folder)
    handed = _read_handed(folder, plan) if plan is not None else {}
    finished = (folder / record.RECORD_FILE).exists()
    reviewed: tuple[requests.Reviewed, ...] = ()
    path = folder / REQUEST_FILE
    if plan is not None and path.exists():
        request = requests.read(path)
        names = {one.part.key.keyid: name for name, one in handed.items()}
        reviewed = requests.review(request, None, own_names=names, now=now)
        _require_planned(request, plan, handed)
    return State(plan=plan, handed=handed, reviewed=reviewed, finished=finished)


def start(folder: Path, plan: Plan, *, now: dt.datetime) -> None:
    """Keeps the plan. The same again is fine.

    Raises:
        Usage: a name, threshold or key that cannot be, another plan is there, or the folder holds a finished ceremony.
    """
    _check_plan(plan)
    document = {
        "schema": 1,
        "organiser": plan.organiser,
        "holders": {role: list(plan.holders[role]) for role in ROLES},
        "thresholds": {role: plan.thresholds[role] for role in ROLES},
        "online_keys": {keyid: key.to_dict() for keyid, key in plan.online.items()},
    }
    path = folder / PLAN_FILE
    if path.exists():
        if json.loads(path.read_bytes()) != document:
            raise Usage(f"{path} holds another plan; nothing is written over", advice="name a new folder")
        return
    if (folder / "root.json").exists():
        raise Usage(
            f"{folder} holds a ceremony's documents already; nothing is written over", advice="name a new folder"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key_files.write_new(path, json.dumps(document, indent=2).encode() + b"\n", mode=0o644)
    said = ", ".join(f"{role} {plan.thresholds[role]} of {len(plan.holders[role])}" for role in ROLES)
    _note(folder, now, plan.organiser, f"planned: {said}; online key {', '.join(k[:16] for k in plan.online)}")


def hand_over(folder: Path, part: PublicPart, *, kept: str, compared: str, now: dt.datetime) -> None:
    """Takes a holder's public part in. The same again is fine.

    Raises:
        Usage: the plan does not name the holder, another key of theirs is here, or the key is somebody else's too.
    """
    plan = _read_plan(folder)
    if plan is None:
        raise Usage(f"{folder / PLAN_FILE}: wanted a plan first")
    plan.role_of(part.name)
    handed = _read_handed(folder, plan)
    if part.name in handed:
        if handed[part.name].part.key.keyid != part.key.keyid:
            raise Usage(f"{part.name}: another key of theirs is here; nothing is written over")
        return
    for name, other in handed.items():
        if other.part.key.keyval == part.key.keyval:
            raise RefusedForSafety(f"{part.name}: this is {name}'s key; each holder needs a key of their own")
    if part.key.keyid in plan.online:
        raise RefusedForSafety(f"{part.name}: this is the server's online key")
    (folder / PUBLIC_FOLDER).mkdir(exist_ok=True)
    document = {"part": part.to_json(), "kept": kept, "compared": compared}
    path = folder / PUBLIC_FOLDER / f"{part.name}.json"
    key_files.write_new(path, json.dumps(document, indent=2).encode() + b"\n", mode=0o644)
    _note(folder, now, part.name, f"handed over the key {part.key.keyid}, kept in {kept}; {compared}")


def make_documents(folder: Path, *, now: dt.datetime) -> Path:
    """Makes the documents to be signed, once every key is here; returns the request's path. Made once only."""
    plan = _read_plan(folder)
    path = folder / REQUEST_FILE
    if plan is None:
        raise Usage(f"{folder / PLAN_FILE}: wanted a plan first")
    handed = _read_handed(folder, plan)
    missing = [name for name in plan.names if name not in handed]
    if missing:
        raise Usage(f"keys of {', '.join(missing)} are missing")
    if not path.exists():
        held = {
            role: Holders(
                keys={handed[n].part.key.keyid: handed[n].part.key for n in plan.holders[role]},
                threshold=plan.thresholds[role],
            )
            for role in ROLES
        }
        root = RootWish(root=held["root"], targets=held["targets"], online=plan.online)
        targets = TargetsWish(catalog=held["approver"], online=plan.online)
        documents: dict[str, Metadata[Any]] = {
            "root": Metadata(root.build(1, offline_roles.after(now, ROOT_LIFE))),
            "targets": Metadata(targets.build(1, offline_roles.after(now, TARGETS_LIFE))),
            "catalog": Metadata(offline_roles.first_catalog(offline_roles.after(now, CATALOG_LIFE))),
        }
        names = {one.part.key.keyid: name for name, one in handed.items()}
        key_files.write_new(path, requests.Request(documents=documents, names=names).encode(), mode=0o644)
        _note(folder, now, plan.organiser, "made the documents to be signed")
    return path


def take_signatures(folder: Path, theirs: requests.Request, *, now: dt.datetime) -> tuple[str, ...]:
    """Merges a holder's signed copy in; returns who has signed something new.

    Raises:
        RefusedForSafety: it is a copy of other documents.
    """
    state = read(folder, now)
    mine = requests.read(folder / REQUEST_FILE)
    merged = requests.merge(mine, theirs, state.reviewed)
    names = {one.part.key.keyid: name for name, one in state.handed.items()}
    new: list[str] = []
    for one in state.reviewed:
        for keyid in merged.documents[one.role].signatures:
            if keyid not in one.standing.signed:
                new.append(names.get(keyid, keyid[:16]))
                _note(folder, now, new[-1], f"signed {one.role}, sha256 of what is signed {one.sha256}")
    requests.write(folder / REQUEST_FILE, merged)
    return tuple(dict.fromkeys(new))


def finish(folder: Path, *, now: dt.datetime) -> dict[str, Any] | None:
    """Writes documents and record when every threshold is met; returns the record, None while signatures are missing."""
    state = read(folder, now)
    if state.finished:
        return dict(json.loads((folder / record.RECORD_FILE).read_bytes()))
    if state.plan is None or not state.reviewed or not all(one.standing.complete for one in state.reviewed):
        return None
    documents = {f"{one.role}.json": one.metadata.to_bytes() for one in state.reviewed} | {"floors.json": EMPTY_FLOORS}
    holders = [
        record.Holder(
            name=name,
            role=state.plan.role_of(name),
            key=state.handed[name].part.key,
            kept=state.handed[name].kept,
        )
        for name in state.plan.names
    ]
    made = record.make(
        documents=documents,
        holders=holders,
        thresholds=state.plan.thresholds,
        online_keys=list(state.plan.online),
        encrypted=None,
        organiser=state.plan.organiser,
        steps=_steps(folder),
        now=now,
    )
    for name, data in (*documents.items(), (record.TEXT_FILE, record.text(made).encode())):
        # A finish that was cut short wrote some of them: the same documents again, with the text of its own time.
        key_files.replace(folder / name, data)
    key_files.write_new(folder / record.RECORD_FILE, record.encode(made), mode=0o644)
    return made


def _check_plan(plan: Plan) -> None:
    if not plan.online:
        raise Usage("ceremony: wanted at least one online key of the server")
    for name in plan.names:
        keyring.check_name(name)
    if len(set(plan.names)) != len(plan.names):
        raise Usage(f"ceremony: each key needs a name of its own, got {', '.join(plan.names)}")
    for role in ROLES:
        most = len(plan.holders[role])
        if not 1 <= plan.thresholds[role] <= most:
            raise Usage(f"ceremony: threshold of {role}: wanted 1 to {most}, got {plan.thresholds[role]}")
    if not plan.organiser.strip() or not plan.organiser.isprintable():
        raise Usage("ceremony: wanted the name of who leads it")


def _read_plan(folder: Path) -> Plan | None:
    path = folder / PLAN_FILE
    try:
        document = json.loads(path.read_bytes())
        return Plan(
            organiser=str(document["organiser"]),
            holders={role: tuple(map(str, document["holders"][role])) for role in ROLES},
            thresholds={role: int(document["thresholds"][role]) for role in ROLES},
            online=key_files.read_online_keys(json.dumps({"keys": document["online_keys"]})),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Usage(f"{path}: wanted a ceremony's plan: {error!r}") from None


def _read_handed(folder: Path, plan: Plan) -> dict[str, Handed]:
    found: dict[str, Handed] = {}
    for name in plan.names:
        path = folder / PUBLIC_FOLDER / f"{name}.json"
        try:
            document = json.loads(path.read_bytes())
            part = keyring.public_part(document["part"], str(path))
            found[name] = Handed(part=part, kept=str(document["kept"]), compared=str(document["compared"]))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Usage(f"{path}: wanted a holder's public part: {error!r}") from None
        if part.name != name:
            raise Usage(f"{path}: it is the public part of {part.name}")
    return found


def _require_planned(request: requests.Request, plan: Plan, handed: Mapping[str, Handed]) -> None:
    """The documents name exactly the planned keys and thresholds."""
    wish = RootWish.read(request.documents["root"].signed)
    delegated = TargetsWish.read(request.documents["targets"].signed)
    for role, holders in (("root", wish.root), ("targets", wish.targets), ("approver", delegated.catalog)):
        wanted = [handed[name].part.key.keyid for name in plan.holders[role] if name in handed]
        if list(holders.keys) != wanted or holders.threshold != plan.thresholds[role]:
            raise RefusedForSafety(f"{REQUEST_FILE}: {role}: the documents name other keys than the plan")
    if set(wish.online) != set(plan.online) or set(delegated.online) != set(plan.online):
        raise RefusedForSafety(f"{REQUEST_FILE}: the documents name other online keys than the plan")


def _steps(folder: Path) -> Sequence[record.Step]:
    path = folder / STEPS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record.Step(**json.loads(line)) for line in lines]


def _note(folder: Path, now: dt.datetime, who: str, what: str) -> None:
    path = folder / STEPS_FILE
    before = path.read_bytes() if path.exists() else b""
    line = json.dumps({"at": record.instant(now), "who": who, "what": what})
    key_files.replace(path, before + line.encode() + b"\n")
