"""Identifiers and their grammar.

Ids of devices, groups and models match ``[a-z0-9][a-z0-9-]{0,62}``: safe as a DNS label, a path segment, an MQTT level and
a NATS token at once. The server's own identities start with ``_``, which that grammar cannot form.
"""

from __future__ import annotations

import re
from typing import NewType

from skerry_contract.errors import Malformed

DeviceId = NewType("DeviceId", str)
GroupName = NewType("GroupName", str)
ModelName = NewType("ModelName", str)
VariantId = NewType("VariantId", str)
BundleDigest = NewType("BundleDigest", str)
"""sha256 of the canonical manifest, 64 lower-case hex digits."""
RolloutId = NewType("RolloutId", str)
Epoch = NewType("Epoch", str)
"""One life of an outbox: 32 lower-case hex digits, random."""

SERVER_IDENTITY = "_server"

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_HEX32 = re.compile(r"[0-9a-f]{32}")
_SEMVER = re.compile(
    r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})"
    r"(?:-((?:0|[1-9]\d{0,8}|\d*[a-zA-Z-][0-9a-zA-Z-]{0,31})(?:\.(?:0|[1-9]\d{0,8}|\d*[a-zA-Z-][0-9a-zA-Z-]{0,31})){0,7}))?",
    # Without it \d takes the digits of every script, and one version has many spellings.
    re.ASCII,
)


def _name(kind: str, text: object) -> str:
    if not isinstance(text, str) or _NAME.fullmatch(text) is None:
        raise Malformed(kind, f"wanted [a-z0-9][a-z0-9-]{{0,62}}, got {_shown(text)}")
    return text


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def device_id(text: object) -> DeviceId:
    """Checks a device id. Raises ``Malformed`` when it does not match the grammar."""
    return DeviceId(_name("device id", text))


def group_name(text: object) -> GroupName:
    """Checks a group name. Raises ``Malformed`` when it does not match the grammar."""
    return GroupName(_name("group", text))


def model_name(text: object) -> ModelName:
    """Checks a model name. Raises ``Malformed`` when it does not match the grammar."""
    return ModelName(_name("model", text))


def variant_id(text: object) -> VariantId:
    """Checks a variant id. Raises ``Malformed`` when it does not match the grammar."""
    return VariantId(_name("variant", text))


def rollout_id(text: object) -> RolloutId:
    """Checks a rollout id. Raises ``Malformed`` when it does not match the grammar."""
    return RolloutId(_name("rollout", text))


def bundle_digest(text: object) -> BundleDigest:
    """Checks a bundle digest: 64 lower-case hex digits. Raises ``Malformed``."""
    return BundleDigest(sha256_hex(text, what="bundle digest"))


def sha256_hex(text: object, *, what: str = "sha256") -> str:
    """Checks 64 lower-case hex digits. Raises ``Malformed``."""
    if not isinstance(text, str) or _HEX64.fullmatch(text) is None:
        raise Malformed(what, f"wanted 64 lower-case hex digits, got {_shown(text)}")
    return text


def key_uri(key_sha256: str) -> str:
    """The URI by which a device's certificate names its key; the argument is what ``sha256_hex`` lets pass."""
    return f"urn:skerry:key:{key_sha256}"


def epoch(text: object) -> Epoch:
    """Checks an epoch: 32 lower-case hex digits. Raises ``Malformed``."""
    if not isinstance(text, str) or _HEX32.fullmatch(text) is None:
        raise Malformed("epoch", f"wanted 32 lower-case hex digits, got {_shown(text)}")
    return Epoch(text)


def version_key(text: object) -> tuple[int, int, int, tuple[tuple[int, int, str], ...]]:
    """Parses a semantic version into a key that sorts by precedence (semver.org 2.0.0, clause 11).

    Build metadata (``+...``) is refused: two versions of one model must never compare equal.

    >>> version_key("1.10.0") > version_key("1.9.9") > version_key("1.9.9-rc.1")
    True

    Raises:
        Malformed: when the text is not a version.
    """
    found = _SEMVER.fullmatch(text) if isinstance(text, str) and len(text) <= 128 else None
    if found is None:
        raise Malformed("version", f"wanted MAJOR.MINOR.PATCH[-pre], got {_shown(text)}")
    pre = found.group(4)
    if pre is None:
        tail: tuple[tuple[int, int, str], ...] = ((2, 0, ""),)
    else:
        tail = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in pre.split("."))
    return int(found.group(1)), int(found.group(2)), int(found.group(3)), tail
