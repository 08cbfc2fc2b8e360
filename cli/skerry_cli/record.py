"""The written record of a ceremony: what it says, how a person reads it, and whether it still holds.

``ceremony.json`` is the record; ``record.md`` is the same in words, made from it alone, so that a changed word shows. ``check``
holds both against the documents: digests, signatures, keys, thresholds, expiries, the later versions and their history. It
opens no private key and asks nobody. Names, where keys are kept, and the steps are the word of who led the ceremony: no document holds them, and
whoever relies on them compares the record's own sha256, which ``check`` tells.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key
from skerry_contract import canonical, layout
from tuf.api.metadata import Root, Targets

from skerry_cli import cosigning, history, key_files, keyring, offline_roles
from skerry_cli.errors import CliError, RefusedForSafety, Usage
from skerry_cli.offline_roles import RootWish, TargetsWish, spoken

RECORD_FILE = "ceremony.json"
TEXT_FILE = "record.md"
DOCUMENTS = ("root.json", "targets.json", "catalog.json", "floors.json")
_TOOLS = ("skerry", "securesystemslib", "tuf", "cryptography")


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """One key of the record. ``kept``: where its private part lies, in words; ``file``: its name when it lies in the folder."""

    name: str
    role: str
    key: Key
    kept: str
    file: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One thing that was done."""

    at: str
    who: str
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at."""

    what: str
    holds: bool
    detail: str


def make(
    *,
    documents: Mapping[str, bytes],
    holders: Sequence[Holder],
    thresholds: Mapping[str, int],
    online_keys: Sequence[str],
    encrypted: bool | None,
    organiser: str,
    steps: Sequence[Step],
    now: dt.datetime,
) -> dict[str, Any]:
    """The record, as builtins. ``documents``: the bytes of ``DOCUMENTS`` by file name."""
    root = offline_roles.parse(documents["root.json"], Root, "root").signed
    targets = offline_roles.parse(documents["targets.json"], Targets, "targets").signed
    catalog = offline_roles.parse(documents["catalog.json"], Targets, "catalog").signed
    entries = []
    for holder in holders:
        entry = {"name": holder.name, "role": holder.role, "keyid": holder.key.keyid, "key": holder.key.to_dict()}
        entries.append(entry | {"kept": holder.kept} | ({"file": holder.file} if holder.file else {}))
    record: dict[str, Any] = {
        "schema": 1,
        "made": instant(now),
        "organiser": organiser,
        "tools": {"python": platform.python_version()} | {name: _version(name) for name in _TOOLS},
        "root_sha256": canonical.sha256(documents["root.json"]),
        "documents": {name: canonical.sha256(documents[name]) for name in DOCUMENTS},
        "keys": entries,
        "thresholds": dict(thresholds),
        "online_keys": sorted(online_keys),
        "expires": {
            "root": root.expires.isoformat(),
            "targets": targets.expires.isoformat(),
            "catalog": catalog.expires.isoformat(),
        },
        "steps": [{"at": step.at, "who": step.who, "what": step.what} for step in steps],
    }
    return record if encrypted is None else record | {"encrypted": encrypted}


def text(record: Mapping[str, Any]) -> str:
    """The record in words. The same record always gives the same text."""
    lines = [
        "# Record of the key ceremony",
        "",
        f"Made {record['made']}" + (f", led by {record['organiser']}." if record.get("organiser") else "."),
        "Tools: " + ", ".join(f"{name} {version}" for name, version in sorted(record.get("tools", {}).items())) + ".",
        "",
        "## Root",
        "",
        "sha256 of root.json, which every enrolment token carries:",
        "",
        f"    {spoken(str(record['root_sha256']))}",
        "",
        "## Who holds what",
        "",
    ]
    for role, wanted in record["thresholds"].items():
        entries = [entry for entry in record["keys"] if entry.get("role") == role]
        lines += [f"{role}: {wanted} of {len(entries)} must sign.", ""]
        for entry in entries:
            lines += [f"- {entry['name']} ({entry.get('kept', 'a file')})", "", f"      {spoken(entry['keyid'])}", ""]
    lines += ["The server's online keys, which sign fleet, snapshot and timestamp and nothing else:", ""]
    lines += [f"      {spoken(keyid)}" for keyid in record["online_keys"]]
    lines += ["", "## Documents", ""]
    lines += [f"- {name}: sha256 {digest}" for name, digest in record.get("documents", {}).items()]
    lines += ["", "## Expires", ""]
    lines += [f"- {role}: {when}" for role, when in record["expires"].items()]
    lines += ["", "## What was done", ""]
    lines += [f"- {step['at']} {step['who']}: {step['what']}" for step in record.get("steps", [])]
    lines += ["", "Check it with: skerry keys verify-record --dir FOLDER", ""]
    return "\n".join(lines)


def encode(record: Mapping[str, Any]) -> bytes:
    """The bytes of ``ceremony.json``."""
    return json.dumps(record, indent=2).encode() + b"\n"


def check(folder: Path) -> list[Check]:
    """Looks at everything that the record says; every check is made, whatever the ones before found.

    Raises:
        Usage: there is no record to check.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_bytes())
        _ = (record["keys"], record["thresholds"], record["root_sha256"], record["expires"], record["online_keys"])
    except OSError as error:
        raise Usage(f"{folder / RECORD_FILE}: {error.strerror or error}; wanted a ceremony's record") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Usage(f"{folder / RECORD_FILE}: wanted a ceremony's record: {error!r}") from None
    found: list[Check] = []

    def look(what: str, act: Callable[[], str]) -> None:
        try:
            found.append(Check(what=what, holds=True, detail=act()))
        except CliError as error:
            found.append(Check(what=what, holds=False, detail=error.message))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found.append(Check(what=what, holds=False, detail=f"{type(error).__name__}: {error}"))

    look("documents are those of the record", lambda: _digests(folder, record))
    look("signatures reach their thresholds", lambda: _signatures(folder, record))
    look("keys and thresholds are those of the documents", lambda: _keys(folder, record))
    look("expiries are those of the documents", lambda: _expiries(folder, record))
    look("the record in words says the same", lambda: _text(folder, record))
    look("later versions follow from the first root", lambda: _chain(folder))
    look("later versions are those of the history", lambda: _history(folder))
    look("names, keeping and steps are the word of who led", lambda: _word(folder))
    return found


def instant(now: dt.datetime) -> str:
    """A time as the record has it."""
    return now.astimezone(dt.UTC).replace(microsecond=0).isoformat()


def _digests(folder: Path, record: Mapping[str, Any]) -> str:
    wanted = dict(record.get("documents") or {}) | {"root.json": record["root_sha256"]}
    lacking = [name for name in DOCUMENTS if name not in wanted]
    for name, digest in wanted.items():
        got = canonical.sha256((folder / name).read_bytes())
        if got != digest:
            raise RefusedForSafety(f"{name} has sha256 {got}, the record says {digest}")
    return f"{len(wanted)} documents" + (f"; the record names no digest of {', '.join(lacking)}" if lacking else "")


def _signatures(folder: Path, record: Mapping[str, Any]) -> str:
    names = {str(entry["keyid"]): str(entry["name"]) for entry in record["keys"]}
    root = offline_roles.parse((folder / "root.json").read_bytes(), Root, "root.json")
    targets = offline_roles.parse((folder / "targets.json").read_bytes(), Targets, "targets.json")
    catalog = offline_roles.parse((folder / "catalog.json").read_bytes(), Targets, "catalog.json")
    said = []
    for name, metadata, authorities in (
        ("root", root, cosigning.authorities_of_root(None, root.signed)),
        ("targets", targets, (cosigning.Authority.of(root.signed, "targets"),)),
        ("catalog", catalog, (cosigning.Authority.of(targets.signed, layout.CATALOG_ROLE),)),
    ):
        standing = cosigning.standing(metadata, authorities)
        if not standing.complete:
            raise RefusedForSafety(f"{name}: {standing.text(names)}")
        said.append(f"{name} by {', '.join(names.get(keyid, keyid[:16]) for keyid in standing.signed)}")
    return "; ".join(said)


def _keys(folder: Path, record: Mapping[str, Any]) -> str:
    root = RootWish.read(offline_roles.parse((folder / "root.json").read_bytes(), Root, "root.json").signed)
    targets = offline_roles.parse((folder / "targets.json").read_bytes(), Targets, "targets.json").signed
    catalog = TargetsWish.read(targets).catalog
    for role, holders in (("root", root.root), ("targets", root.targets), ("approver", catalog)):
        listed = {str(entry["keyid"]) for entry in record["keys"] if entry.get("role") == role}
        if listed != set(holders.keys):
            raise RefusedForSafety(f"{role}: the documents name other keys than the record")
        if record["thresholds"].get(role) != holders.threshold:
            raise RefusedForSafety(
                f"{role}: {holders.threshold} must sign, the record says {record['thresholds'].get(role)}"
            )
    for entry in record["keys"]:
        keyring.check_name(entry["name"])
        if "key" in entry:
            key_files.read_online_keys(json.dumps({"keyid": entry["keyid"], **entry["key"]}), what=str(entry["name"]))
    if sorted(root.online) != sorted(record["online_keys"]):
        raise RefusedForSafety("online: root names other keys than the record")
    return f"{len(record['keys'])} keys"


def _expiries(folder: Path, record: Mapping[str, Any]) -> str:
    root = offline_roles.parse((folder / "root.json").read_bytes(), Root, "root.json").signed
    targets = offline_roles.parse((folder / "targets.json").read_bytes(), Targets, "targets.json").signed
    catalog = offline_roles.parse((folder / "catalog.json").read_bytes(), Targets, "catalog.json").signed
    for role, signed in (("root", root), ("targets", targets), ("catalog", catalog)):
        expires = signed.expires.isoformat()
        if record["expires"].get(role) != expires:
            raise RefusedForSafety(f"{role} expires {expires}, the record says {record['expires'].get(role)}")
    return "3 expiries"


def _word(folder: Path) -> str:
    digest = canonical.sha256((folder / RECORD_FILE).read_bytes())
    return f"compare sha256 {spoken(digest)} of {RECORD_FILE} with those who were there"


def _text(folder: Path, record: Mapping[str, Any]) -> str:
    path = folder / TEXT_FILE
    if not path.exists() and "documents" not in record:
        return f"an older record has no {TEXT_FILE}"
    if path.read_text(encoding="utf-8") != text(record):
        raise RefusedForSafety(f"{TEXT_FILE} does not say what {RECORD_FILE} says")
    return TEXT_FILE


def _chain(folder: Path) -> str:
    trusted = history.read_trusted(folder)
    targets = trusted.targets_role.version if trusted.targets_role is not None else 0
    return f"root version {trusted.root.version}, targets version {targets}"


def _history(folder: Path) -> str:
    noted = {str(line["sha256"]) for line in history.read_history(folder)}
    held = {
        canonical.sha256(path.read_bytes()): path.name
        for role in history.ROLES
        for path in sorted(folder.glob(f"*.{role}.json"))
        if path.name.partition(".")[0].isdigit()
    }
    for digest, name in held.items():
        if digest not in noted:
            raise RefusedForSafety(f"{name} is not in {history.HISTORY_FILE}")
    if noted - set(held):
        raise RefusedForSafety(
            f"{history.HISTORY_FILE} names a document that is not here: sha256 {min(noted - set(held))}"
        )
    return f"{len(held)} later versions"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "from the source tree"
