"""What a folder of keys trusts: its first root, every later root and the last targets, each verified from the one before.

Owns the files ``root.json``, ``targets.json`` and their later versions ``N.root.json``, ``N.targets.json``, and ``history.jsonl``,
one line for each version that was taken in: when, whose signatures it has, what it changes, its sha256. Nothing is written over: a
second document of a version is refused. Making and signing documents is ``signing_requests``' and ``cosigning``'s.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry_contract import canonical
from tuf.api.metadata import Metadata, Root, Targets

from skerry_cli import cosigning, key_files, keyring, offline_roles
from skerry_cli.errors import RefusedForSafety, Usage

HISTORY_FILE = "history.jsonl"
ROLES: dict[str, type[Root] | type[Targets]] = {"root": Root, "targets": Targets}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trusted:
    """The newest versions that hold from the folder's own first root.

    Attributes:
        roots: every root from the first on, as bytes; targets: the newest, as bytes, None when the folder has none.
        root, targets_role: their newest signed parts.
    """

    roots: tuple[bytes, ...]
    root: Root
    targets: bytes | None
    targets_role: Targets | None

    def authorities(self, role: str, signed: Root | Targets, *, next_root: Root | None = None) -> tuple[Any, ...]:
        """Whose signatures the next version of a role needs; ``next_root``: the root that comes with it."""
        if isinstance(signed, Root):
            return cosigning.authorities_of_root(self.root, signed)
        return (cosigning.Authority.of(next_root or self.root, role),)


def read_trusted(folder: Path) -> Trusted:
    """Verifies what the folder holds, from its ``root.json`` on.

    Raises:
        Usage: there is none. RefusedForSafety: a version is missing, or does not hold.
    """
    roots = [_read(folder, "root", 1)]
    root = offline_roles.parse(roots[0], Root, str(folder / "root.json"))
    _require(root, cosigning.authorities_of_root(None, root.signed), folder / "root.json")
    chain = [root.signed]
    for version in _versions(folder, "root"):
        path = file_of(folder, "root", version)
        if version != chain[-1].version + 1:
            raise RefusedForSafety(f"{path}: version {chain[-1].version + 1} of root is missing")
        data = path.read_bytes()
        metadata = offline_roles.parse(data, Root, str(path))
        if metadata.signed.version != version:
            raise RefusedForSafety(f"{path}: it is version {metadata.signed.version}")
        _require(metadata, cosigning.authorities_of_root(chain[-1], metadata.signed), path)
        roots.append(data)
        chain.append(metadata.signed)
    newest = max([*_versions(folder, "targets"), *([1] if (folder / "targets.json").exists() else [])], default=0)
    if not newest:
        return Trusted(roots=tuple(roots), root=chain[-1], targets=None, targets_role=None)
    data = _read(folder, "targets", newest)
    targets = offline_roles.parse(data, Targets, str(file_of(folder, "targets", newest)))
    # A later root may name other keys for targets; what was signed before it stays the base of the next version.
    for number, trusted in enumerate(reversed(chain)):
        authorities = (cosigning.Authority.of(trusted, Targets.type),)
        if cosigning.standing(targets, authorities).complete:
            break
        if number == len(chain) - 1:
            _require(targets, authorities, file_of(folder, "targets", newest))
    return Trusted(roots=tuple(roots), root=chain[-1], targets=data, targets_role=targets.signed)


def accept(folder: Path, data: bytes, *, now: dt.datetime, names: Mapping[str, str]) -> Path:
    """Takes the next version of root or targets in, after checking it against what the folder trusts; returns its file.

    The same bytes again are fine. ``names``: key id -> holder, for the history.

    Raises:
        RefusedForSafety: signatures do not reach the threshold, a version is skipped, another document of that version is here, it
            holds more than keys and thresholds, or it has expired.
        Usage: it is neither root nor targets.
    """
    try:
        role = str(json.loads(data)["signed"]["_type"])
        kind = ROLES[role]
    except (ValueError, KeyError, TypeError):
        raise Usage("wanted metadata of root or of targets") from None
    metadata: Metadata[Any] = offline_roles.parse(data, kind, role)
    signed = metadata.signed
    path = file_of(folder, role, signed.version)
    if path.exists():
        if path.read_bytes() == data:
            return path
        raise RefusedForSafety(f"{path}: another {role} of version {signed.version} is here; nothing is written over")
    trusted = read_trusted(folder)
    base = trusted.root if isinstance(signed, Root) else trusted.targets_role
    if (
        base is not None
        and signed.version != base.version + 1
        and (isinstance(signed, Root) or signed.version <= base.version)
    ):
        raise RefusedForSafety(f"{role}: wanted version {base.version + 1}, got {signed.version}")
    if signed.is_expired(now):
        raise RefusedForSafety(f"{role} version {signed.version}: it expired {signed.expires:%Y-%m-%d}")
    offline_roles.require_plain(f"{role} version {signed.version}", signed)
    _require(metadata, trusted.authorities(role, signed), path)
    note(
        folder,
        at=now,
        what=f"{role} version {signed.version}",
        sha256=canonical.sha256(data),
        signed_by=[names.get(keyid, keyid) for keyid in metadata.signatures],
        changes=list(offline_roles.difference(base, signed, names)),
        names={keyid: names[keyid] for keyid in _keyids(signed) if keyid in names},
    )
    # After its line: a line without its file is told by the check, a file without a line would be a secret.
    key_files.write_new(path, data, mode=0o644)
    return path


def note(
    folder: Path,
    *,
    at: dt.datetime,
    what: str,
    sha256: str,
    signed_by: list[str],
    changes: list[str],
    names: Mapping[str, str],
) -> None:
    """Adds a line to the folder's history. ``names``: key id -> holder, of the keys that the version names."""
    path = folder / HISTORY_FILE
    line = {
        "at": at.astimezone(dt.UTC).replace(microsecond=0).isoformat(),
        "what": what,
        "sha256": sha256,
        "signed_by": signed_by,
        "changes": changes,
        "names": dict(names),
    }
    before = path.read_bytes() if path.exists() else b""
    key_files.replace(path, before + json.dumps(line).encode() + b"\n")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of the folder's history; none when it has none. Raises ``Usage`` for a damaged file."""
    path = folder / HISTORY_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        _ = [(line["at"], line["what"], line["sha256"]) for line in found]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise Usage(f"{path}: wanted one JSON document per line: {error!r}") from None
    return found


def read_names(folder: Path) -> dict[str, str]:
    """Who holds which key as far as this folder's record, history and own keys say: key id -> name.

    Raises:
        Usage: one of them is damaged, or holds what is no name.
    """
    found: dict[str, str] = {}
    try:
        record = json.loads((folder / "ceremony.json").read_bytes())
        said = {str(entry["keyid"]): entry["name"] for entry in record["keys"]}
        found |= keyring.checked_names(said, str(folder / "ceremony.json"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Usage(f"{folder / 'ceremony.json'}: wanted a ceremony's record: {error!r}") from None
    for line in read_history(folder):
        found |= keyring.checked_names(line.get("names") or {}, str(folder / HISTORY_FILE))
    return found | {own.key.keyid: name for name, own in keyring.read_keyring(folder).items()}


def file_of(folder: Path, role: str, version: int) -> Path:
    """Where a version lies."""
    return folder / (f"{role}.json" if version == 1 else f"{version}.{role}.json")


def _keyids(signed: Root | Targets) -> list[str]:
    if isinstance(signed, Root):
        return list(signed.keys)
    return list(signed.delegations.keys) if signed.delegations is not None else []


def _versions(folder: Path, role: str) -> list[int]:
    found = []
    for path in folder.glob(f"*.{role}.json"):
        number = path.name.partition(".")[0]
        if number.isascii() and number.isdigit() and int(number) > 1:
            found.append(int(number))
    return sorted(found)


def _read(folder: Path, role: str, version: int) -> bytes:
    path = file_of(folder, role, version)
    try:
        return path.read_bytes()
    except OSError as error:
        raise Usage(
            f"{path}: {error.strerror or error}; wanted the fleet's {role}",
            advice="take the ceremony's documents in with 'skerry keys join'",
        ) from None


def _require(metadata: Metadata[Any], authorities: tuple[cosigning.Authority, ...], path: Path) -> None:
    found = cosigning.standing(metadata, authorities)
    if not found.complete:
        raise RefusedForSafety(f"{path}: {found.text({})}")
