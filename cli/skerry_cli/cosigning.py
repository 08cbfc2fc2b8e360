"""Metadata that several people sign, each on a machine of their own: whose signatures hold, who is missing, when it is enough.

Owns counting, adding and merging signatures, and nothing of what is signed: whoever calls has built or rebuilt the document from
what they verified themselves, shown the difference and asked. Rules:

- A signature counts only when it was made over these bytes by a key that one of the authorities names. What does not hold is
  dropped and never passed on.
- Two copies are merged only when they say the same, byte for byte of what is signed.
- It is complete when every authority's threshold is met: a new root's are the old root's and its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, Role, Root, Targets

from skerry_cli.errors import CliError, Failed, RefusedForSafety


@dataclass(frozen=True, kw_only=True, slots=True)
class Authority:
    """Whose signatures a role needs.

    Attributes:
        whose: who says so, e.g. ``root version 3``; keys: by key id; threshold: how many of them must sign.
    """

    whose: str
    keys: Mapping[str, Key]
    threshold: int

    @classmethod
    def of(cls, delegator: Root | Targets, role: str) -> Authority:
        """What ``delegator`` asks of a role that it names. Raises ``RefusedForSafety`` when it names none."""
        keys: Mapping[str, Key]
        found: Role | None
        if isinstance(delegator, Root):
            keys, found = delegator.keys, delegator.roles.get(role)
        else:
            delegations = delegator.delegations
            keys = delegations.keys if delegations is not None else {}
            found = (delegations.roles or {}).get(role) if delegations is not None else None
        if found is None:
            raise RefusedForSafety(f"{delegator.type} version {delegator.version} names no role {role}")
        whose = f"{delegator.type} version {delegator.version}"
        return cls(whose=whose, keys={k: keys[k] for k in found.keyids if k in keys}, threshold=found.threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lack:
    """What an authority still wants: ``wanted`` more signatures of ``keyids``."""

    whose: str
    wanted: int
    keyids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far a document is.

    Attributes:
        signed: key ids whose signatures hold, in the order of the document.
        lacks: what each authority still wants; empty when nothing is missing.
    """

    signed: tuple[str, ...]
    lacks: tuple[Lack, ...]

    @property
    def complete(self) -> bool:
        """Whether every threshold is met."""
        return not self.lacks

    def text(self, names: Mapping[str, str]) -> str:
        """One line for a person. ``names``: key id -> holder."""

        def name(keyid: str) -> str:
            return names.get(keyid, keyid[:16])

        said = f"signed by {', '.join(map(name, self.signed)) or 'nobody'}"
        wants = [f"{lack.wanted} more of {', '.join(map(name, lack.keyids))} for {lack.whose}" for lack in self.lacks]
        return f"{said}; {'wanted: ' + '; '.join(wants) if wants else 'complete'}"


def authorities_of_root(old: Root | None, new: Root) -> tuple[Authority, ...]:
    """Whose signatures a root needs: the one before it and its own; of the first its own."""
    own = Authority.of(new, Root.type)
    return (own,) if old is None else (Authority.of(old, Root.type), own)


def standing(metadata: Metadata[Any], authorities: Sequence[Authority]) -> Standing:
    """Counts the signatures that hold."""
    holding = _holding(metadata, authorities)
    lacks = []
    for authority in authorities:
        # Several key ids may name one key: that is one signer.
        keys = {_identity(key) for keyid, key in authority.keys.items() if keyid in holding}
        if len(keys) < authority.threshold:
            missing = tuple(keyid for keyid in authority.keys if keyid not in holding)
            lacks.append(Lack(whose=authority.whose, wanted=authority.threshold - len(keys), keyids=missing))
    return Standing(signed=tuple(holding), lacks=tuple(lacks))


def add_signature(metadata: Metadata[Any], signer: Signer, authorities: Sequence[Authority]) -> Metadata[Any]:
    """The document with one more signature, and without those that do not hold.

    Raises:
        RefusedForSafety: no authority names this key, or what the key made does not hold under it.
        Failed: the key could not sign.
    """
    keyid = signer.public_key.keyid
    if not any(keyid in authority.keys for authority in authorities):
        asked = " or ".join(authority.whose for authority in authorities)
        raise RefusedForSafety(f"key {keyid[:16]} is not among the keys that {asked} names for {metadata.signed.type}")
    made = Metadata(metadata.signed, dict(metadata.signatures))
    make_signature(made, signer)
    holding = _holding(made, authorities)
    if keyid not in holding:
        raise RefusedForSafety(f"key {keyid[:16]}: what signed is another key")
    return Metadata(made.signed, {held: made.signatures[held] for held in holding})


def make_signature(metadata: Metadata[Any], signer: Signer) -> None:
    """Signs in place, beside the signatures that are there.

    Raises:
        Failed: the key could not sign. Also what this tool's own signers say (``signers.CheckedSigner``).
    """
    try:
        metadata.sign(signer, append=True)
    except Exception as error:
        # Signers of other people's libraries raise what they like (a token that is gone, a cloud that is not reached); tuf wraps it.
        cause = error.__cause__ or error
        if isinstance(cause, CliError):
            raise cause from None
        keyid = signer.public_key.keyid
        raise Failed(f"key {keyid[:16]} could not sign: {type(cause).__name__}: {cause}") from error


def merge(copies: Iterable[Metadata[Any]], authorities: Sequence[Authority]) -> Metadata[Any]:
    """One document with the signatures of all its copies.

    Raises:
        RefusedForSafety: the copies do not say the same.
    """
    first, *others = copies
    signatures = dict(first.signatures)
    for other in others:
        if other.signed.to_dict() != first.signed.to_dict():
            raise RefusedForSafety(
                f"{first.signed.type} version {first.signed.version}: the copies do not say the same",
                advice="signatures of another document are void: have it signed again",
            )
        only = Metadata(other.signed, dict(other.signatures))
        signatures |= {keyid: only.signatures[keyid] for keyid in _holding(only, authorities)}
    merged = Metadata(first.signed, signatures)
    return Metadata(merged.signed, {keyid: signatures[keyid] for keyid in _holding(merged, authorities)})


def _holding(metadata: Metadata[Any], authorities: Sequence[Authority]) -> list[str]:
    keys: dict[str, Key] = {}
    for authority in authorities:
        keys.update(authority.keys)
    payload = metadata.signed_bytes
    holding = []
    for keyid, signature in metadata.signatures.items():
        key = keys.get(keyid)
        if key is None:
            continue
        try:
            key.verify_signature(signature, payload)
        except (UnverifiedSignatureError, VerificationError):
            continue
        holding.append(keyid)
    return holding


def _identity(key: Key) -> str:
    return str(sorted(key.keyval.items()))
